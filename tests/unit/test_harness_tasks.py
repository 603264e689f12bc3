"""Tasks of lm-evaluation-harness before it is there: ids, texts, addresses, and what is said without it."""

import json
from importlib import metadata

import pytest

from jobs import eval as verb
from pipeline.errors import ConfigError, EvaluateError, PreflightError
from pipeline.evaluate import tasks
from pipeline.evaluate.protocols import PROTOCOLS, get_protocol
from pipeline.evaluate.tasks import (
    HarnessTask,
    documents_of,
    harness_version,
    pages,
    task_file,
    text_identity,
)
from pipeline.evaluate.texts import TEXTS, Text, read_text


def test_any_task_is_a_protocol_and_those_on_our_texts_are_listed():
    assert get_protocol("lm_eval/lambada_openai") is PROTOCOLS["lm_eval/lambada_openai"]
    short = get_protocol("lm_eval/wikitext").at_context(256).at_tokens(1000)
    assert (short.id, short.task, short.window) == ("lm_eval/wikitext@ctx256", "wikitext", 256)
    assert get_protocol(short.id) == short
    other = get_protocol("lm_eval/arc_easy")
    assert (other.task, other.text, other.metric) == ("arc_easy", "", "accuracy")
    assert get_protocol("lambada/openai_last_word").task == ""
    for wrong in ("lm_eval/", "lm_eval/a b", "lm_eva/lambada_openai"):
        with pytest.raises(ConfigError, match="unknown protocol"):
            get_protocol(wrong)


def test_pages_begin_at_titles_and_keep_every_line():
    rows = [
        "",
        " = One = \n",
        "",
        " text \n",
        " = = Part = = \n",
        " = = = Sub = = = \n",
        "",
        " = Two = \n",
        " end \n",
    ]
    found = pages(rows)
    assert [page.split("\n")[0] for page in found] == [" = One = ", " = Two = "]
    assert "\n".join(found) == "".join(row or " \n" for row in rows[1:])
    task = HarnessTask("wikitext", Text("wikitext-2-raw-v1", tuple(rows), "here"))
    assert documents_of(task) == [{"page": page} for page in found]


def test_raw_wikitext_has_62_pages(shared_data):
    text = read_text("wikitext-2-raw-v1", shared_data / "eval")
    found = pages(text.rows)
    assert len(found) == 62
    assert sum(len(page.split()) for page in found) == 241_211


def test_an_address_follows_the_documents(tmp_path, monkeypatch):
    bound = get_protocol("lm_eval/lambada_standard")
    assert text_identity(bound, "") == text_identity(bound, str(tmp_path)) == TEXTS["lambada"].sha256
    mine, theirs = get_protocol("lm_eval/mine"), get_protocol("lm_eval/arc_easy")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/mine.yaml").write_text("include: base\ntask: 'mine'  # ours\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert task_file("mine", str(tmp_path)) == tmp_path / "deep/mine.yaml"
    assert task_file("min", str(tmp_path)) is None
    before = text_identity(mine, str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{} \n")
    assert text_identity(mine, str(tmp_path)) != before
    monkeypatch.setattr(tasks.metadata, "version", lambda name: "0.4.13")
    assert text_identity(theirs, str(tmp_path)) == "lm_eval 0.4.13"
    with pytest.raises(EvaluateError, match="is not a folder"):
        text_identity(mine, str(tmp_path / "absent"))


def test_without_the_harness_there_is_one_clear_line(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tasks.metadata, "version", absent)
    with pytest.raises(PreflightError, match=r"pip install 'krony\[lm-eval\]'") as caught:
        harness_version()
    assert caught.value.exit_code == 3
    with pytest.raises(PreflightError):
        text_identity(get_protocol("lm_eval/arc_easy"), "")


def test_another_version_of_a_task_on_our_texts_is_refused():
    bound = HarnessTask("lambada_openai", Text("lambada", ("a b",), "here"))
    tasks.require_known_version(bound, tasks.VERSIONS["lambada_openai"])
    with pytest.raises(EvaluateError, match=r"lambada_openai is version .* has 99.0: install lm-eval"):
        tasks.require_known_version(bound, 99.0)
    tasks.require_known_version(HarnessTask("lambada_openai", folder="mine"), 99.0)  # its address says it


def test_protocols_of_the_command_line_stand_for_those_of_the_config(tmp_path, capsys):
    words = ["--method", "dense", "--protocol", "lm_eval/wikitext", "--protocol", "corpus/val"]
    assert verb.main(["--plan", "--json", "--store", str(tmp_path), *words]) == 0
    planned = [row["address"] for row in json.loads(capsys.readouterr().out)["artifacts"]]
    scores = [address for address in planned if address.startswith("scores/")]
    assert len(scores) == 4  # of the teacher and of the model
    assert sum("lm_eval.wikitext" in address for address in scores) == 2
    assert verb.main(["--list"]) == 0
    assert "lm_eval/lambada_openai" in capsys.readouterr().out
