"""Preparing with Ray: one task per planned shard, and the same bytes for any number of workers."""

import json

import pytest

from pipeline.config.schema import RayConfig
from pipeline.config.sources import FilesCorpus
from pipeline.data import prepare
from pipeline.data.corpora import build_corpus, corpus_identity
from pipeline.data.documents import CorpusError
from pipeline.data.prepare import run_tasks
from pipeline.errors import DataError
from pipeline.store.artifacts import Identity, Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def corpus(data_lab, tmp_path_factory):
    return data_lab.write_corpus(tmp_path_factory.mktemp("corpus"))


def test_any_number_of_workers_and_any_loss_give_the_same_bytes(
    ray_local, data_lab, corpus, tmp_path, monkeypatch
):
    runs = []
    for workers, encoder in ((1, "tiktoken"), (2, "auto")):
        store = tmp_path / f"store{workers}"
        config = data_lab.config_of(corpus, store, tokenize_workers=workers, encoder=encoder)
        prepared = data_lab.Prepared(config)
        runs.append((prepared, prepared.tokens()))
    (_, one), (prepared, two) = runs
    assert one.record.address == two.record.address
    assert data_lab.payload(one) == data_lab.payload(two)
    libraries = [made.record.settings["encoder"].split()[0] for made in (one, two)]
    assert libraries == ["tiktoken", "gigatoken"]

    # Half of the shards are lost, and the record with them: only those are made again, one task each.
    shards = two.record.metrics["shards"]
    before = data_lab.payload(two)
    prepared.store.root.child(prepared.chain.tokens.address).delete("record.json")
    lost = range(0, shards, 2)
    for index in lost:
        two.location.delete(f"train-{index:05d}.bin")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    make = prepare._make

    def counted(job, row):
        import ray

        index = json.loads(row["shard"])["index"]
        (tasks / f"{ray.get_runtime_context().get_task_id()}-{index}").touch()
        return make(job, row)

    monkeypatch.setattr(prepare, "_make", counted)
    again = prepared.tokens()
    assert data_lab.payload(again) == before
    found = [path.name.split("-") for path in tasks.iterdir()]
    assert sorted(int(index) for _, index in found) == list(lost)
    assert len({task for task, _ in found}) == len(lost)


def test_partitions_are_extracted_by_tasks_and_stay_in_order(ray_local, data_lab, tmp_path):
    for number in range(5):
        data_lab.write_corpus(tmp_path / f"part{number}", documents=5 + number, repeats=0)
    stored = []
    for megabytes in (0.0, 0.007):
        config = FilesCorpus(paths=(str(tmp_path / "part*/*.jsonl"),), max_megabytes=megabytes)
        identity = Identity("corpus", "files", corpus_identity(config))
        artifact = build_corpus(config, identity, Store(tmp_path / "store"), ray=RayConfig(), quiet=True)
        stored.append(artifact.record)
    assert stored[0].metrics["documents"] == 5 + 6 + 7 + 8 + 9
    assert 0.007e6 <= stored[1].metrics["text_bytes"] < 0.009e6
    assert set(stored[1].files) < set(stored[0].files) | {"corpus.json"}


def test_an_error_in_a_task_arrives_as_the_one_line_it_was(ray_local, data_lab, tmp_path):
    for number in range(3):
        data_lab.write_corpus(tmp_path / f"part{number}", documents=5, repeats=0)
    (tmp_path / "part1/corpus.jsonl").write_text('{"body": "x"}\n')
    config = FilesCorpus(paths=(str(tmp_path / "part*/*.jsonl"),))
    identity = Identity("corpus", "files", corpus_identity(config))
    with pytest.raises(CorpusError) as caught:
        build_corpus(config, identity, Store(tmp_path / "store"), ray=RayConfig(), quiet=True)
    assert type(caught.value) is CorpusError
    assert "part1/corpus.jsonl:1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_while_encoding_arrives_the_same_way(ray_local, data_lab, corpus, tmp_path):
    prepared = data_lab.Prepared(data_lab.config_of(corpus, tmp_path / "store"))
    for key in prepared.corpus.record.files:
        if key.endswith(".parquet"):
            size = prepared.corpus.path(key).stat().st_size
            prepared.corpus.path(key).write_bytes(b"\0" * size)
    prepared.config = data_lab.config_of(corpus, tmp_path / "store", dedup=False)
    with pytest.raises(DataError, match=r"^[^\n]*documents-00000-000\.parquet: sha256 [^\n]* was changed"):
        prepared.tokens()


def test_a_reader_that_stops_leaves_no_task_running(ray_local, tmp_path):
    def slow(item):
        import time

        time.sleep(0.3)
        (tmp_path / str(item)).touch()
        return item

    results = run_tasks(slow, list(range(50)), ray=RayConfig(), quiet=True)
    assert [next(results), next(results)] == [0, 1]
    results.close()
    done = len(list(tmp_path.iterdir()))
    import time

    time.sleep(1.0)
    assert len(list(tmp_path.iterdir())) == done < 50
