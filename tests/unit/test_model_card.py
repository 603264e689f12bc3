"""A model card says what records say: written at export, written anew with scores when it is handed out."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from model.config import GPT2Config, Kron, ModelSpec
from model.export import load_native, save_native
from model.nanogpt import from_checkpoint, read_checkpoint
from pipeline.chain import VERSIONS
from pipeline.compress.export import export_model, hand_out
from pipeline.data.tokenizer import FILE, tokenizer_json, train_bpe
from pipeline.errors import CompressError
from pipeline.store.artifacts import Identity, Store

TRAIN = {"objective": "ce", "lr": 0.001, "max_steps": 40}


class Bench:
    """A store with everything that one exported model stands on."""

    def __init__(self, root, toy, *, tied=True, source=""):
        self.store = Store(root / "store")
        encoding = train_bpe(["some text to learn merges from, again and again. " * 20], vocab_size=280)
        arch = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=24, vocab_size=encoding.n_vocab)
        kron = Kron(m1=16, n1=16, m2=1, n2=4)
        self.model = toy(ModelSpec.dense(arch, tied=tied).with_matrices({"h.1.mlp.c_fc": kron}))
        corpus = Identity("corpus", "pydocs", {"version": "3.11"})
        self.tokenizer_id = Identity("tokenizer", "bpe280", {}, {"corpus": corpus})
        tokens = Identity("tokens", "toy", {}, {"corpus": corpus, "tokenizer": self.tokenizer_id})
        self.teacher_id = Identity("teacher", "scratch-2x16", {"seed": 0}, {"tokens": tokens})
        method = {"name": "kron_vl", "shape": [16, 16], "terms": 1}
        budget = {"params": 7000, "convention": "tied_all"}
        init = Identity("init", "kron_vl", {"method": method, "budget": budget}, {"teacher": self.teacher_id})
        inputs = {"init": init, "tokens": tokens}
        run = Identity("run", "kron_vl-s3", {"train": TRAIN, "seed": 3}, inputs)
        model_inputs = {"run": run, "tokenizer": self.tokenizer_id}
        self.model_id = Identity("model", run.name, {}, model_inputs, VERSIONS["model"])
        counted = {"parameters": 6000, "dense_parameters": 8000}
        self.put(tokens, {"train_tokens": 123_456, "val_tokens": 7_890})
        self.put(self.teacher_id, {"tokens": 614_400}, settings={"source": source} if source else {})
        self.put(init, counted)
        self.tokenizer = self.put(
            self.tokenizer_id, {"vocab_size": encoding.n_vocab}, files={FILE: tokenizer_json(encoding)}
        )
        save_native(self.model, root / "native")
        files = {path.name: path.read_bytes() for path in (root / "native").iterdir()}
        losses = {"val_loss_initial": 7.4163, "val_loss": 7.1117, "tokens": 163_840, "steps": 40}
        self.run = self.put(run, losses, files=files, settings={"name": "van-loan"})

    def put(self, identity, metrics, *, files=None, settings=None):
        with self.store.attempt(identity) as attempt:
            for name, data in (files or {"payload": b"."}).items():
                attempt.location.put_bytes(name, data)
            return attempt.publish(metrics=metrics, settings=settings)

    def export(self):
        return export_model(self.model_id, self.run, self.tokenizer, self.store)

    def hand_out(self, model, folder, **options):
        hand_out(model, self.run, self.tokenizer, self.store, folder, **options)

    def score(self, of, value):
        settings = {"protocol": "krony/wt103@ctx24", "version": 1}
        identity = Identity("scores", f"{of.name}-wt103", settings, {"model": of})
        metrics = {"value": value, "metric": "perplexity"}
        self.put(identity, metrics, settings={"description": "Test split | of WikiText-103."})


def cards(folder):
    return {form: (folder / form / "README.md").read_text() for form in ("stock", "factored")}


def test_a_card_tells_method_budget_data_training_and_sizes(toy, tmp_path):
    bench = Bench(tmp_path, toy)
    artifact = bench.export()
    assert {name.split("/")[0] for name in artifact.record.files} == {"native", "stock", "factored"}
    assert artifact.record.metrics["factored_logit_difference"] <= 1e-5
    assert artifact.record.metrics["factored_bytes"] < artifact.record.metrics["stock_bytes"]
    for form, text in cards(artifact.folder()).items():
        front, _, body = text.removeprefix("---\n").partition("\n---\n")
        assert yaml.safe_load(front) == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["krony", "gpt2", "compression"],
        }
        spec = bench.model.spec
        for expected in (
            "# van-loan",
            "`kron_vl`",
            '"shape": [16, 16]',
            "at most 7,000 (tied_all)",
            "75.0% of 8,000",
            f"{spec.num_parameters():,}",
            f"{spec.num_parameters('krony_no_wpe'):,}",
            "pretrained on 614,400 tokens",
            "163,840 tokens in 40 steps, next token, seed 3",
            "7.4163 before, 7.1117 after",
            "`corpus/pydocs-",
            "123,456 training, 7,890 validation",
            "`tokenizer/bpe280-",
            "(16×16)(1×4) of 16×64, in 1 of 2 blocks",
            "None was on record",
            bench.run.record.address,
            "No record states a licence",
        ):
            assert expected in body, (form, expected)
        assert str(tmp_path) not in text
    again = export_model(bench.model_id, bench.run, bench.tokenizer, bench.store, force=True)
    assert again.record.digest == artifact.record.digest, "a card depends on records alone"


def test_handed_out_cards_hold_the_scores_known_by_then(toy, tmp_path):
    bench = Bench(tmp_path, toy)
    artifact = bench.export()
    published = cards(artifact.folder())
    bench.score(bench.model_id, 4019.2474)
    bench.score(bench.teacher_id, 3800.5)
    bench.score(Identity("model", "another"), 1.0)
    bench.hand_out(artifact, tmp_path / "out", nanogpt=True)
    for text in cards(tmp_path / "out").values():
        assert "| `krony/wt103@ctx24` | perplexity | 4019.2 | 3800.5 |" in text
        assert "Test split | of WikiText-103." in text
        assert "None was on record" not in text
    assert cards(artifact.folder()) == published, "what is published never changes"
    artifact.verify()
    assert (load_native(tmp_path / "out" / "native").spec) == bench.model.spec
    ckpt = from_checkpoint(read_checkpoint(tmp_path / "out" / "nanogpt" / "ckpt.pt"))
    assert ckpt.spec == ModelSpec.dense(replace(bench.model.spec.arch, activation="gelu"))
    idx = torch.randint(280, (1, 24), generator=torch.Generator().manual_seed(0))
    assert (ckpt.eval()(idx) - bench.model(idx)).abs().max() < 0.01, "another GELU, the same weights"


def test_scores_of_an_earlier_export_of_the_same_run_count(toy, tmp_path):
    bench = Bench(tmp_path, toy)
    older = replace(bench.model_id, version=1)
    bench.put(older, {})
    bench.score(older, 77.25)
    bench.hand_out(bench.export(), tmp_path / "out")
    assert "| perplexity | 77.25 | – |" in cards(tmp_path / "out")["factored"]
    assert not (tmp_path / "out" / "nanogpt").exists()


@pytest.mark.parametrize(
    ("source", "licence", "shown"),
    [("openai-community/gpt2", "mit", "openai-community/gpt2"), ("/data/secret/weights", None, "`weights`")],
)
def test_a_licence_is_stated_only_where_it_is_known(toy, tmp_path, source, licence, shown):
    bench = Bench(tmp_path, toy, source=source)
    text = cards(bench.export().folder())["factored"]
    front = yaml.safe_load(text.removeprefix("---\n").partition("\n---\n")[0])
    assert front.get("license") == licence
    assert front.get("base_model") == (source if licence else None)
    assert shown in text
    assert "/data/secret" not in text


def test_nanogpt_cannot_hold_an_untied_head(toy, tmp_path):
    bench = Bench(tmp_path, toy, tied=False)
    artifact = bench.export()
    with pytest.raises(CompressError, match=r"model/kron_vl-s3-\w+: .* nanoGPT ties it"):
        bench.hand_out(artifact, tmp_path / "out", nanogpt=True)
    assert not (tmp_path / "out").exists()
    config = json.loads((artifact.folder("factored") / "config.json").read_text())
    assert config["spec"]["tied"] is False
