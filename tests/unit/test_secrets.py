"""Secrets that lie around where krony runs: none of them is in what it says, keeps or sends."""

import sys
from pathlib import Path

import pytest

from jobs import cli
from pipeline.config.load import flag_table, load_study
from pipeline.errors import ConfigError, KronyError, PreflightError, hide_passwords
from pipeline.store.provenance import redact
from pipeline.tracking.tracker import ui_command

PLANTED = "pl4nted"
ENVIRONMENT = {
    name: f"{PLANTED}-{name}"
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_USERNAME",
        "PGPASSWORD",
        "RAY_AUTH_TOKEN",
    )
}
STUDY = """
[tokenizer]
vocab_size = 400
[data]
validation_fraction = 0.1
[teacher]
n_layer = 1
n_head = 2
n_embd = 16
n_ctx = 32
[teacher.train]
max_steps = 4
batch_tokens = 128
seq_len = 32
val_tokens = 256
device = "cpu"
[train]
max_steps = 4
batch_tokens = 128
seq_len = 32
val_tokens = 256
device = "cpu"
[eval]
device = "cpu"
[method]
name = "kron_vl"
shape = [16, 16]
"""


@pytest.fixture
def planted(monkeypatch) -> None:
    """A secret under every name that our libraries read one from."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def holding(folder: Path) -> list[str]:
    """Files below a folder that hold a planted secret, or are named by one."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if PLANTED in str(path) or PLANTED.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_a_whole_chain_tells_and_keeps_no_secret(data_lab, tmp_path, free_port, monkeypatch, capfd):
    data_lab.in_process(monkeypatch)
    corpus = data_lab.write_corpus(tmp_path / "texts", documents=80)
    (tmp_path / "study.toml").write_text(STUDY)
    address = f"http://{PLANTED}-user:{PLANTED}-p4ss@127.0.0.1:{free_port}"
    words = [str(tmp_path / "study.toml"), "--store", str(tmp_path / "runs" / "store"), "--corpus", "files"]
    words += ["--corpus.paths", f"['{corpus}']", "--tracking.uri", address, "--out", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", ["krony", "run", *words])
    assert cli.run("run", words) == 0
    # The tracker could not be reached; now all that it missed goes into a database.
    words[words.index(address)] = "auto"
    assert cli.run("report", [*words, "--sync"]) == 0
    assert cli.run("doctor", [*words[:-2], "--no-ray", "--tracking.uri", address]) == 3
    said = capfd.readouterr()
    assert f"http://***@127.0.0.1:{free_port}" in said.err
    assert "cannot be opened" in said.out
    assert PLANTED not in said.out + said.err
    assert (tmp_path / "runs" / "mlflow.db").is_file()
    records = list(tmp_path.rglob("record.json"))
    assert any(f"http://***@127.0.0.1:{free_port}" in path.read_text() for path in records)
    assert holding(tmp_path) == []


@pytest.mark.usefixtures("planted")
def test_a_submitted_command_holds_no_secret(capsys):
    assert cli.run("submit", ["--plan", "run", "configs/smoke.toml", "--store", "/shared/krony"]) == 0
    shown = capsys.readouterr()
    assert PLANTED not in shown.out + shown.err
    uri = f"postgresql://krony:{PLANTED}@db/mlflow"
    for word in ([f"--tracking.uri={uri}"], ["--tracking.uri", uri], ["--hf-token", PLANTED]):
        assert cli.run("submit", ["--plan", "run", "configs/smoke.toml", *word]) in (2, 3)
        shown = capsys.readouterr()
        assert PLANTED not in shown.out + shown.err
    assert "MLFLOW_TRACKING_USERNAME" in shown.err or "hf-token" in shown.err


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(
    "name", [*(name for name in ENVIRONMENT if "USERNAME" not in name), "MY_API_KEY", "DB_PASSWD"]
)
def test_a_shared_config_cannot_make_a_place_of_a_secret(tmp_path, name):
    (tmp_path / "shared.toml").write_text(f'store = "/data/${{{name}}}/store"')
    with pytest.raises(ConfigError, match=name) as caught:
        load_study(tmp_path / "shared.toml")
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:p@ss@host:5000/x", "at http://***@host:5000/x"),
        ("postgresql+psycopg2://me:pw@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("postgresql://db/mlflow?user=me&password=pw&x=1", "postgresql://db/mlflow?user=me&password=***&x=1"),
        ("https://host/a?access_token=pw", "https://host/a?access_token=***"),
        ("s3://key:secret@bucket/prefix: gone", "s3://***@bucket/prefix: gone"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("krony/wt103@ctx256", "krony/wt103@ctx256"),
    ],
)
def test_passwords_in_addresses_are_hidden(text, shown):
    assert hide_passwords(text) == shown
    assert KronyError(text).line == shown


def test_recorded_words_hold_values_that_decide_and_none_that_is_secret():
    words = [
        "krony",
        "--train.batch-tokens",
        "512",
        "--tokenizer.name",
        "gpt2",
        "--hf-token",
        "x",
        "--api_key=y",
    ]
    assert redact(words) == [*words[:5], "--hf-token", "***", "--api_key=***"]


def test_recorded_words_can_be_read_again():
    """A record with control characters, or with bytes that are no UTF-8, is refused by whoever reads it."""
    assert redact(["a\x1b[31m", "b\udcff", "two\nlines", "ü 漢"]) == [
        "a\ufffd[31m",
        "b\ufffd",
        "two\nlines",
        "ü 漢",
    ]


def test_the_command_that_shows_the_pages_is_on_loopback_and_holds_no_password():
    assert ui_command("http://me:pw@host:5000") == "http://***@host:5000"
    command = ui_command("postgresql://me:pw@db/x")
    assert "--host 127.0.0.1" in command
    assert "pw" not in command.split("uri ")[1]


def test_flags_are_checked_as_files_are(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        flag_table(["--store", "$HF_TOKEN/x"], base=Path("/data"))


def test_a_refusal_is_one_line():
    line = PreflightError("tracking.uri=http://a:b@c: cannot\nbe opened").line
    assert line == "tracking.uri=http://***@c: cannot be opened"
