"""`krony prepare --plan`: an estimate before the corpus is stored, exact after, and nothing is done."""

from pipeline.chain import chain
from pipeline.data.prepare import plan_tokens
from pipeline.store.artifacts import Store


def test_the_plan_becomes_exact_once_the_corpus_is_stored(data_lab, tmp_path, monkeypatch):
    data_lab.in_process(monkeypatch)
    config = data_lab.config_of(data_lab.write_corpus(tmp_path / "text"), tmp_path / "store")
    store = Store(config.store)
    before = plan_tokens(config, chain(config).tokens, store)
    assert not (tmp_path / "store").exists()
    assert not before.exact
    assert "estimates" in str(before)

    prepared = data_lab.Prepared(config)
    after = plan_tokens(config, prepared.chain.tokens, store)
    made = prepared.tokens().record
    assert after.exact
    assert after.documents == 250
    assert after.text_bytes == prepared.corpus.record.metrics["text_bytes"]
    assert after.shards == made.metrics["shards"]
    assert 0.5 < before.text_bytes / after.text_bytes < 2
    assert made.address in str(after)
