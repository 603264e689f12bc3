"""Help, plans of nothing, records and tables load no heavy library: the layers are true at run time too."""

import json

import pytest

HEAVY = ("torch", "ray", "mlflow", "transformers", "datasets", "tokenizers", "matplotlib")
LOADED = (
    f"import json, sys; print(json.dumps([name for name in {(*HEAVY, 'pandas')} if name in sys.modules]))"
)
HELP = """
import contextlib, io
import jobs.cli
for words in (["--help"], ["--version"], *([verb, "--help"] for verb in jobs.cli.VERBS)):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        jobs.cli.main(words)
    assert "krony" in shown.getvalue(), words
"""


def test_help_of_every_verb_loads_no_heavy_library(python):
    done = python("-c", HELP + LOADED)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize(
    "module",
    [
        "model.compress.recipe",
        "model.config",
        "pipeline.chain",
        "pipeline.config.load",
        "pipeline.store.artifacts",
        "pipeline.submit",
        "pipeline.tracking.jsonl",
        "pipeline.tracking.tracker",
    ],
)
def test_what_the_light_commands_import_is_light(python, module: str):
    done = python("-c", f"import {module}\n" + LOADED)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_tables_need_no_torch_and_no_ray(python):
    modules = ["frames", "baselines", "stats", "tables", "plots", "page", "versus_text"]
    done = python("-c", "\n".join(f"import analysis.{name}" for name in modules) + "\n" + LOADED)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "ray", "mlflow", "transformers", "datasets"} & set(json.loads(done.stdout))
