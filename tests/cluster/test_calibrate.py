"""The stage that measures a teacher: the same windows and sums for any number of workers; what uses them."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from model.compress.calibration import Measurement, collect
from model.compress.contract import StatsSpec
from model.compress.low_rank_recipe import SVD, SVDLLMBC
from model.compress.stats_file import load_stats
from model.config import GPT2Config, ModelSpec
from model.export import load_native, save_native
from pipeline.compress.build import build_init
from pipeline.compress.calibrate import Part, calibrate
from pipeline.config.schema import BudgetConfig, CalibrationConfig, RayConfig, RunConfig
from pipeline.data.shards import ShardWriter
from pipeline.errors import CompressError, DataError, PreflightError
from pipeline.store.artifacts import Identity, Store

SPEC = ModelSpec.dense(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=32, vocab_size=300))
CONFIG = CalibrationConfig(sequences=11, length=32, seed=3)
NEEDS = ("block_influence", "delta_gram", "gram", "row_fisher")
ALONE, TWO = RayConfig(), RayConfig(workers=2)


class Bench:
    """A store with a teacher and two training shards."""

    def __init__(self, folder, toy) -> None:
        self.store = Store(folder / "store")
        self.identities = {kind: Identity(kind, "t", {}, {}) for kind in ("teacher", "tokens")}
        with self.store.attempt(self.identities["teacher"]) as attempt:
            save_native(toy(SPEC, seed=1), folder / "teacher")
            attempt.location.put_folder(folder / "teacher")
            self.teacher = attempt.publish(metrics={})
        with self.store.attempt(self.identities["tokens"]) as attempt:
            (folder / "tokens").mkdir()
            for name, count in (("train-00000", 500), ("train-00001", 700), ("val-00000", 300)):
                with ShardWriter(folder / "tokens" / f"{name}.bin") as shard:
                    shard.add(np.random.default_rng(count).integers(0, 300, count))
            attempt.location.put_folder(folder / "tokens")
            self.tokens = attempt.publish(metrics={})

    def identity(self, config=CONFIG, needs=NEEDS, salt=""):
        return Identity(
            "stats", "s", {"needs": list(needs), "seed": config.seed, "salt": salt}, self.identities
        )

    def calibrate(self, config=CONFIG, needs=NEEDS, *, ray=ALONE, salt=""):
        identity = self.identity(config, needs, salt)
        return calibrate(config, identity, self.teacher, self.tokens, self.store, ray=ray, quiet=True)

    def part(self, config=CONFIG, start=0, stop=11):
        return Part(config, NEEDS, self.teacher, self.tokens, start, stop)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, toy):
    return Bench(tmp_path_factory.mktemp("bench"), toy)


@pytest.fixture(scope="module")
def here(bench):
    return bench.calibrate()


def assert_same(one, other):
    a, b = load_stats(one.folder()), load_stats(other.folder())
    assert (a.tokens, a.sequences, set(a.sums)) == (b.tokens, b.sequences, set(b.sums))
    for key, value in a.sums.items():
        assert float((value - b.sums[key]).norm()) <= 1e-10 * float(value.norm()), key


def test_windows_follow_from_the_seed_and_are_shared_out_without_loss(bench):
    whole = list(bench.part().rows())
    assert [tuple(row.shape) for row in whole] == [(1, 32)] * 11
    assert len({tuple(row[0].tolist()) for row in whole}) == 11
    for count in (1, 2, 3, 11):
        parts = bench.part().split(count)
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([row for part in parts for row in part.rows()]), torch.cat(whole))
    other = list(bench.part(replace(CONFIG, seed=4)).rows())
    assert not torch.equal(torch.cat(other), torch.cat(whole))
    fewer = list(bench.part(replace(CONFIG, sequences=5), stop=5).rows())
    assert torch.equal(torch.cat(fewer), torch.cat(whole[:5]))  # more sequences only add


def test_the_published_sums_are_those_of_the_windows(bench, here):
    rows = torch.cat(list(bench.part().rows()))
    spec = StatsSpec.everywhere(NEEDS, SPEC)
    expected = collect(load_native(bench.teacher.folder()), spec, rows, measurement=Measurement())
    stats = load_stats(here.folder())
    assert (stats.tokens, stats.sequences) == (11 * 32, 11)
    for key, value in expected.sums.items():
        torch.testing.assert_close(stats.sums[key], value, rtol=1e-12, atol=0)
    record = here.record
    assert set(record.files) == {"sums.safetensors", "counts.json"}
    assert set(record.inputs) == {"teacher", "tokens"}
    assert (record.metrics["sequences"], record.metrics["tokens"]) == (11, 352)
    assert (
        -1
        <= record.metrics["row_fisher_rank_correlation_min"]
        <= record.metrics["row_fisher_rank_correlation"]
        <= 1
    )
    influence = [1 - float(stats.mean(f"block_influence/h.{i}")) for i in range(2)]
    assert record.metrics["block_influence"] == pytest.approx(influence)
    gram = stats.sums[f"gram/{record.metrics['gram_top_module']}"]
    assert record.metrics["gram_top_share"] == pytest.approx(float(gram.diagonal().max() / gram.trace()))


def test_what_cannot_be_measured_is_one_line(bench):
    with pytest.raises(
        DataError, match=r"asks for 38 sequences of 32 tokens, tokens/t-\w+ holds 37 for training"
    ):
        bench.calibrate(replace(CONFIG, sequences=38))
    assert (
        bench.calibrate(replace(CONFIG, sequences=37), needs=("abs_mean",), salt="all").record.metrics[
            "tokens"
        ]
        == 1184
    )
    with pytest.raises(CompressError, match=r"teacher/t-\w+: 33 tokens do not fit the context of 32"):
        bench.calibrate(replace(CONFIG, length=33))
    if not torch.cuda.is_available():
        with pytest.raises(PreflightError, match=r"calibration\.device='cuda' is not there"):
            bench.calibrate(replace(CONFIG, device="cuda"))


def test_a_method_is_built_from_statistics_and_its_record_names_them(bench, here):
    for allocate in ("uniform", "greedy_gain"):
        config = RunConfig(
            method=SVDLLMBC(targets="all_linear"),
            budget=BudgetConfig(params=30_000, tolerance=0.05, allocate=allocate),
            calibration=CONFIG,
        )
        inputs = {"teacher": bench.identities["teacher"], "stats": bench.identity()}
        init = build_init(
            config, Identity("init", allocate, {}, inputs), bench.teacher, bench.store, stats=here
        )
        assert init.record.inputs["stats"].digest == here.record.digest
        assert 28_500 <= init.record.metrics["parameters"] <= 30_000
        rows = json.loads(init.path("report.json").read_text())
        assert {row["metric"] for row in rows} == {"output error"}
        assert all(row["predicted_error"] == pytest.approx(row["achieved_error"], rel=1e-4) for row in rows)


def test_without_its_statistics_a_method_says_what_it_needs(bench):
    config = RunConfig(method=SVDLLMBC(rank=4))
    with pytest.raises(CompressError, match="svdllm_bc needs statistics: gram"):
        build_init(config, Identity("init", "x", {}, {}), bench.teacher, bench.store)
    build_init(RunConfig(method=SVD(rank=4)), Identity("init", "y", {}, {}), bench.teacher, bench.store)


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_are_one(bench, here, ray_local):
    assert_same(bench.calibrate(ray=TWO, salt="two"), here)
    few = replace(CONFIG, sequences=1)
    assert_same(bench.calibrate(few, ray=TWO, salt="one"), bench.calibrate(few, salt="alone"))


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_in_a_worker_arrives_as_it_was_raised(bench, ray_local):
    with pytest.raises(DataError, match="asks for 38 sequences"):
        bench.calibrate(replace(CONFIG, sequences=38), ray=TWO)
    with pytest.raises(PreflightError, match="calibration with 3 workers asks for 3 CPU"):
        bench.calibrate(ray=RayConfig(workers=3))


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_changes_nothing(bench, ray_local):
    long = replace(CONFIG, sequences=37, length=32)
    expected = bench.calibrate(long, salt="undisturbed")
    killed: list[int] = []

    def kill_one() -> None:
        until = time.monotonic() + 60
        while not killed and time.monotonic() < until:
            for process in psutil.Process().children(recursive=True):
                try:
                    if "_task" in " ".join(process.cmdline()) and "ray::" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    found = bench.calibrate(long, ray=TWO, salt="killed")
    killer.join()
    assert killed, "no worker was found while it measured"
    assert_same(found, expected)
