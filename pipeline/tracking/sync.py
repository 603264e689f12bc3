"""Fill MLflow from what the store holds: runs that it never heard of, and steps that it missed.

Records and histories are the truth, so this can be done at any time, twice, and into another server.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import PreflightError
from pipeline.store.artifacts import Artifact, Store
from pipeline.tracking.jsonl import read_history
from pipeline.tracking.tracker import NullTracker, flatten, open_tracker, replay, resolve_uri

TRAINED = ("teacher", "run")
"""Kinds that have a history."""


def sync(store: Store, *, uri: str, experiment: str) -> list[str]:
    """Tell the tracker every finished run of the store; the addresses that were told.

    Raises PreflightError if the tracker is off or cannot be opened.
    """
    if not resolve_uri(uri, store=store.root.uri):
        raise PreflightError("tracking.uri=off: there is nothing to fill; give --tracking.uri")
    told = []
    for kind in TRAINED:
        for record in store.records(kind):
            artifact = store.open(record.address)
            rows = read_history(artifact.location)
            if not rows:
                continue  # a published teacher was not trained here
            name = str(record.settings.get("name", record.name))
            tracker = open_tracker(
                uri,
                store=store.root.uri,
                experiment=experiment,
                run_id=f"{record.address}/{record.attempt}",
                name=name,
            )
            if isinstance(tracker, NullTracker):
                raise PreflightError(f"tracking.uri={uri}: cannot be opened, nothing was sent")
            tracker.params(flatten(_asked(store, artifact)))
            tracker.tags({"krony.address": record.address, **_origin(artifact)})
            if "tokens" in record.inputs:
                tokens = store.open(record.inputs["tokens"].address)
                tracker.dataset(tokens.record.name, digest=tokens.record.digest, source=tokens.location.uri)
            replay(tracker, rows)
            tracker.metrics(record.metrics, step=int(rows[-1]["step"]))
            tracker.link(record.kind, artifact.location.uri, digest=record.digest)
            tracker.close("FINISHED")
            told.append(record.address)
    return told


def _origin(artifact: Artifact) -> dict[str, str]:
    origin = artifact.record.provenance
    return {
        "mlflow.source.name": " ".join(origin.get("argv", [])),
        "mlflow.source.git.commit": str(origin.get("commit", "")),
    }


def _asked(store: Store, artifact: Artifact) -> Mapping[str, Any]:
    # The names that the run itself would have logged: a student's method and budget are those of its init.
    record = artifact.record
    if record.kind == "teacher":
        return {"teacher": record.config, "seed": record.config["seed"]}
    return {**store.open(record.inputs["init"].address).record.config, **record.config}
