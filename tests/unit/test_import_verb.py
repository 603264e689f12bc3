"""`krony import`, and what comes after it: an imported model is a teacher, or the start of more training."""

import json
import os
from dataclasses import replace

import pytest
import torch

from jobs import cli
from model.config import GPT2Config, Kron, ModelSpec
from model.export import load_native, save_native
from model.nanogpt import save_nanogpt
from pipeline.chain import chain
from pipeline.compress.build import build_init
from pipeline.compress.load import load_model
from pipeline.compress.outlook import outlook
from pipeline.compress.teacher import import_teacher
from pipeline.config.load import load_study
from pipeline.errors import ConfigError
from pipeline.store.artifacts import Store

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=24, vocab_size=61, activation="gelu")
KRON = Kron(m1=16, n1=16, m2=1, n2=4, terms=2, scales=True)
COMPRESSED = ModelSpec.dense(ARCH).with_matrices({f"h.{i}.mlp.c_fc": KRON for i in (0, 1)})
IDX = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))


def study(folder, *words):
    overrides = ["--teacher.name", "hub", "--teacher.id", str(folder), *words]
    return load_study(None, overrides=overrides).first


def test_a_checkpoint_becomes_folders_and_the_way_on_is_said(toy, tmp_path, capsys):
    model = toy(ModelSpec.dense(ARCH))
    save_nanogpt(model, tmp_path / "ckpt.pt")
    words = ["import", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert f"nanoGPT, {model.num_parameters():,} parameters" in said
    for form in ("stock", "native", "factored"):
        assert str(tmp_path / "out" / form) in said
    with torch.no_grad():
        again = load_native(tmp_path / "out" / "native").eval()
        torch.testing.assert_close(again(IDX), model(IDX), atol=1e-5, rtol=1e-5)
    assert cli.main(words) == 3
    assert "holds a model already" in capsys.readouterr().err
    assert cli.main([*words, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "nanoGPT"


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_that_would_run_code_is_one_line(tmp_path, capsys):
    torch.save({"model": Hostile()}, tmp_path / "evil.pt")
    assert cli.main(["import", str(tmp_path / "evil.pt"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "krony import: " in error
    assert "could run code" in error
    assert not (tmp_path / "out").exists()


def test_a_compressed_native_folder_is_a_start_for_more_training(toy, tmp_path):
    model = toy(COMPRESSED)
    save_native(model, tmp_path / "native")
    config = study(tmp_path / "native", "--method.name", "dense", "--eval.protocols", '["krony/wt103"]')
    assert outlook(config).parameters == model.num_parameters()
    identities = chain(config)
    assert list(identities.scores) == ["krony/wt103@ctx24"], "the context is that of the folder"
    store = Store(str(tmp_path / "store"))
    teacher = import_teacher(config.teacher, identities.teacher, store)
    start = load_model(build_init(config, identities.init, teacher, store))
    assert start.spec == COMPRESSED
    with torch.no_grad():
        assert torch.equal(start(IDX), model(IDX))
    other = toy(COMPRESSED, seed=1)
    save_native(other, tmp_path / "native")
    assert chain(config).teacher.address != identities.teacher.address, "its weights are its identity"


def test_the_stock_folder_of_an_import_is_compressed_like_any_teacher(toy, tmp_path):
    save_nanogpt(toy(ModelSpec.dense(ARCH)), tmp_path / "ckpt.pt")
    assert cli.main(["import", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "out")]) == 0
    config = study(tmp_path / "out" / "stock", "--method.name", "kron_vl", "--method.shape", "[16, 16]")
    identities, store = chain(config), Store(str(tmp_path / "store"))
    teacher = import_teacher(config.teacher, identities.teacher, store)
    found = load_model(build_init(config, identities.init, teacher, store))
    kron = replace(KRON, terms=1, scales=False)
    assert found.spec.blocks[1].mlp_c_fc == kron
    assert found.spec.arch == ARCH, "the exact GELU stays"
    assert outlook(config).parameters == found.num_parameters()


def test_a_folder_of_something_else_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"its config\.json is no GPT-2's \('n_layer'\)"):
        chain(study(tmp_path))
    (tmp_path / "config.json").write_text('{"model": {"arch": {}}}')
    with pytest.raises(ConfigError, match=r"no GPT-2's \(model.* lacks key"):
        chain(study(tmp_path))


def test_export_wants_a_place_for_what_it_hands_out(capsys):
    assert cli.main(["export", "--nanogpt"]) == 2
    assert "name a folder with --out" in capsys.readouterr().err
