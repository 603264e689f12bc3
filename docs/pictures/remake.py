"""Remakes the pictures of the README from a store with real runs, and from what MLflow knows of a sweep.

    python docs/pictures/remake.py plot configs/local/sizes.toml [any flag of krony report]
    python docs/pictures/remake.py mlflow sqlite:///runs/mlflow.db main-sweep [--chromium chromium]

`plot` is the size-quality plot of `krony report`, as it is. `mlflow` starts the MLflow server on loopback,
asks it for the trials of one seed of the named sweep, opens their comparison in headless Chromium and crops
the chart.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
PORT = 5077
WINDOW, CHART = (1500, 900), (212, 172, 1082, 596)
"""Pixels of the browser, and of the chart in it (left, top, right, bottom)."""


def plot(words: list[str]) -> None:
    """The size-quality plot of the first protocol."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "jobs.report", *words, "--out", folder], check=True)
        shutil.copyfile(Path(folder) / "figures" / "size-quality-1.svg", HERE / "size-quality.svg")


def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One call of MLflow's REST interface."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - loopback
        found: dict[str, Any] = json.loads(answer.read() or b"{}") if data else {}
    return found


def mlflow(words: list[str]) -> None:
    """The comparison of the trials of one sweep and seed, as MLflow shows it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("uri")
    parser.add_argument("sweep")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args(words)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", options.uri]
    command += ["--host", "127.0.0.1", "--port", str(PORT)]
    quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                ask("health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        address = comparison(options.sweep, seed=options.seed)
        with tempfile.TemporaryDirectory() as folder:
            shot = Path(folder) / "shot.png"
            flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
            flags += [f"--window-size={WINDOW[0]},{WINDOW[1]}", "--virtual-time-budget=60000"]
            subprocess.run(
                [options.chromium, *flags, f"--screenshot={shot}", address],
                check=True,
                stderr=subprocess.DEVNULL,
            )
            picture = Image.open(shot).crop(CHART).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
            picture.save(HERE / "mlflow-comparison.png", optimize=True)
    finally:
        server.terminate()
        server.wait(30)


def comparison(sweep: str, *, seed: str) -> str:
    """Address of the page that compares the trials of the newest run of a sweep."""
    experiments = ask("api/2.0/mlflow/experiments/search", {"max_results": 100}).get("experiments", [])
    everywhere = {"experiment_ids": [each["experiment_id"] for each in experiments], "max_results": 1000}
    runs = ask("api/2.0/mlflow/runs/search", everywhere).get("runs", [])
    parents = [run for run in runs if run["info"].get("run_name", "") == sweep]
    if not parents:
        raise SystemExit(
            f"no run of a sweep named {sweep!r}; there are {sorted({r['info']['run_name'] for r in runs})}"
        )
    parent = max(parents, key=lambda run: run["info"]["start_time"])["info"]
    children = [
        run["info"]["run_id"]
        for run in runs
        if tag(run, "mlflow.parentRunId") == parent["run_id"] and run["info"]["run_name"].endswith(f"s{seed}")
    ]
    found = (
        urllib.parse.quote(json.dumps(children)),
        urllib.parse.quote(json.dumps([parent["experiment_id"]])),
    )
    return f"http://127.0.0.1:{PORT}/#/compare-runs?runs={found[0]}&experiments={found[1]}"


def tag(run: dict[str, Any], key: str) -> str:
    """The value of a tag, or nothing."""
    return next((each["value"] for each in run["data"].get("tags", []) if each["key"] == key), "")


if __name__ == "__main__":
    if sys.argv[1:2] not in (["plot"], ["mlflow"]):
        raise SystemExit(__doc__)
    {"plot": plot, "mlflow": mlflow}[sys.argv[1]](sys.argv[2:])
