"""What a study would do and has done: read from configs and records alone, nothing is built.

`statuses` is what `krony status` prints; `describe` adds the exact size of every variant before it exists,
and is what every verb prints for `--plan`.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.chain import chain, train_tokens
from pipeline.compress.outlook import outlook
from pipeline.config.load import Study, to_json
from pipeline.config.schema import RunConfig
from pipeline.progress import duration
from pipeline.store.artifacts import Identity, Store
from pipeline.store.location import Location
from pipeline.tracking.jsonl import read_history

if TYPE_CHECKING:
    from model.compress.contract import Stats


def statuses(study: Study) -> list[dict[str, str]]:
    """One row per artifact, in building order: state (`done`, `unfinished`, `missing`), address, note."""
    rows: dict[str, dict[str, str]] = {}
    for config in study.configs:
        store = Store(config.store)
        for identity in chain(config).identities():
            if identity.address not in rows:
                rows[identity.address] = _status(store, identity)
    return list(rows.values())


def describe(study: Study, *, as_json: bool = False) -> str:
    """The plan of a study: every variant with its exact size, every artifact with its state."""
    variants = [{"name": config.name, **_size(config), "config": to_json(config)} for config in study.configs]
    states = statuses(study)
    if as_json:
        return json.dumps({"variants": variants, "artifacts": states}, indent=1)
    lines = [f"{study.source}: {len(variants)} variant{'s' if len(variants) > 1 else ''}", ""]
    lines.append(
        f"{'variant':<28}{'method':<14}{'parameters':>13}{'share':>8}{'MACs/token':>13}{'tokens':>14}"
    )
    for row, config in zip(variants, study.configs, strict=True):
        size = f"{'' if row['exact'] else '≤ '}{row['parameters']:,}"
        macs = f"{row['macs_per_token']:,}" if row["exact"] else "–"
        lines.append(
            f"{config.name:<28}{config.method.name:<14}{size:>13}{row['share']:>8.1%}{macs:>13}"
            f"{train_tokens(config):>14,}"
        )
    lines += ["", *(f"{row['state']:<11}{row['address']:<58}{row['note']}".rstrip() for row in states)]
    return "\n".join(lines)


def _size(config: RunConfig) -> Mapping[str, Any]:
    """Exact parameters and MACs of a variant; raises CompressError if it cannot be built."""
    seen = outlook(config, lambda: _stored_stats(config))
    return {
        "parameters": seen.parameters,
        "exact": seen.plan is not None,
        "share": seen.share,
        "macs_per_token": seen.macs_per_token,
    }


def _stored_stats(config: RunConfig) -> "Stats | None":
    """The statistics of a config, where they have been collected."""
    from model.compress.stats_file import load_stats

    identity = chain(config).stats
    artifact = Store(config.store).find(identity) if identity else None
    return load_stats(artifact.folder()) if artifact else None


def _status(store: Store, identity: Identity) -> dict[str, str]:
    row = {"kind": identity.kind, "address": identity.address}
    artifact = store.find(identity)
    if artifact:
        size = sum(info.bytes for info in artifact.record.files.values())
        return row | {"state": "done", "note": f"{size / 1e6:,.1f} MB · {artifact.record.finished}"}
    attempts = store.root.folders(identity.address)
    if not attempts:
        return row | {"state": "missing", "note": ""}
    return row | {
        "state": "unfinished",
        "note": _progress(store.root.child(f"{identity.address}/{attempts[-1]}")),
    }


def _progress(attempt: Location) -> str:
    """How far an unfinished attempt came, where it keeps a history."""
    wanted = ("tokens", "tokens_per_s")
    history = [
        row for row in read_history(attempt) if all(isinstance(row.get(key), int | float) for key in wanted)
    ]
    history = [row for row in history if row["tokens_per_s"] > 0]
    if not history:
        return f"{len(attempt.list())} files"
    last = history[-1]
    return f"step {last['step']:,} · {duration(last['tokens'] / last['tokens_per_s'])} of training done"
