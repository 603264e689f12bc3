"""Whatever is wrong with a run's input is one line, and what was trained so far is kept."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.shards import ShardWriter
from pipeline.errors import DataError, KronyError, TrainError
from pipeline.store.location import Location

PROJECT = Path(__file__).resolve().parents[2]
SHORT = """
import resource, sys
from pathlib import Path
from train_lab import Lab
from pipeline.errors import TrainError
lab, run = Lab(Path(sys.argv[1])), Path(sys.argv[2])
big = {"batch_tokens": 16 * 10_000, "checkpoint_every": 1}
lab.fit(lab.request(run, max_steps=1, micro_batch=500, **big))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, resource.RLIM_INFINITY))
try:
    lab.fit(lab.request(run, max_steps=2, micro_batch=10_000, **big))
except TrainError as err:
    print(err)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(lab.fit(lab.request(run, max_steps=2, micro_batch=500, **big)).result.resumed_from)
"""


def failing(lab, request, kind: type[KronyError], text: str, **how) -> str:
    with pytest.raises(kind, match=text) as caught:
        lab.fit(request, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shard(path: Path, tokens: np.ndarray) -> None:
    with ShardWriter(path) as writer:
        writer.add(tokens)


@pytest.fixture
def own_lab(lab, tmp_path):
    """A lab whose files may be damaged."""
    return type(lab).build(tmp_path / "lab")


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_checkpoint(lab, tmp_path):
    run = tmp_path / "run"
    good = lab.fit(lab.request(run, checkpoint_every=5), stop_at=5)
    assert good.result.step == 5
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    wild = lab.request(run, lr=1e30, grad_clip=0.0, checkpoint_every=2)
    line = failing(lab, wild, TrainError, r"step 6: the loss after it is not a finite number")
    assert "lower train.lr (now 1e+30)" in line
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    rare = lab.request(run, lr=1e30, grad_clip=0.0, checkpoint_every=50, log_every=50, val_every=50)
    failing(lab, rare, TrainError, r"step 6: the loss or its gradient is not a finite number")
    assert lab.fit(lab.request(run, max_steps=8)).result.resumed_from == 5


def test_tokens_of_another_tokenizer(own_lab, tmp_path):
    shard(own_lab.folder / "tokens/train-00001.bin", np.full(700, 4095))
    line = failing(own_lab, own_lab.request(tmp_path / "run"), DataError, "made with another tokenizer")
    assert "token 4,095" in line
    assert "the model knows 300" in line


def test_validation_tokens_of_another_tokenizer(own_lab, tmp_path):
    shard(own_lab.folder / "tokens/val-00000.bin", np.full(700, 4095))
    failing(own_lab, own_lab.request(tmp_path / "run"), DataError, "made with another tokenizer")


def test_shards_that_are_missing_cut_short_or_empty(own_lab, tmp_path):
    request = own_lab.request(tmp_path / "run")
    failing(own_lab, replace(request, shards=("train-00009.bin",)), DataError, r"train-00009\.bin is missing")
    path = own_lab.folder / "tokens/train-00001.bin"
    path.write_bytes(path.read_bytes()[:-100])
    failing(own_lab, request, DataError, r"train-00001\.bin.*cut short")
    shard(own_lab.folder / "tokens/val-00000.bin", np.zeros(1, dtype=np.int64))
    only = replace(request, shards=("train-00000.bin",))
    failing(own_lab, only, DataError, "the validation shards hold 1 tokens, at least 2 are needed")


def test_a_model_that_is_damaged_or_too_short(own_lab, tmp_path):
    request = own_lab.request(tmp_path / "run")
    failing(
        own_lab,
        own_lab.request(tmp_path / "run", seq_len=24),
        TrainError,
        "longer than the model's context of 16",
    )
    weights = own_lab.folder / "init/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    failing(own_lab, request, TrainError, r"init.*model\.safetensors")


def test_a_checkpoint_of_another_configuration(lab, tmp_path):
    lab.fit(lab.request(tmp_path / "run"), stop_at=5)
    other = lab.request(tmp_path / "run", fingerprint="e" * 64)
    failing(lab, other, TrainError, r"belongs to run ffffffffffff…, this is eeeeeeeeeeee…")


def test_a_loss_that_jumps_across_a_restart(own_lab, tmp_path):
    request = own_lab.request(tmp_path / "run")
    own_lab.fit(request, stop_at=10)
    shard(own_lab.folder / "tokens/val-00000.bin", np.zeros(150, dtype=np.int64))
    failing(
        own_lab, request, TrainError, r"the loss jumps from \d\.\d+ to \d\.\d+ across the restart at step 10"
    )


def test_a_place_that_cannot_be_written(lab, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    request = lab.request(tmp_path / "run")
    failing(lab, replace(request, run=Location(str(tmp_path / "file/run"))), KronyError, "file")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_memory_that_runs_out_is_one_line_and_costs_no_checkpoint(lab, tmp_path, python):
    path = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    done = python("-c", SHORT, str(lab.folder), str(tmp_path / "run"), env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    line, resumed = done.stdout.splitlines()
    assert line.startswith("step 1: out of memory with 10000 rows of 16 tokens on cpu")
    assert "lower train.micro_batch (now 10000)" in line
    assert resumed == "1"
