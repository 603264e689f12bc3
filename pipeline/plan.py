"""What a study would do and has done: read from configs and records alone, nothing is built.

`statuses` is what `krony status` prints; `describe` adds the exact size of every variant before it exists,
and is what every verb prints for `--plan`.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.chain import chain
from pipeline.config.load import Study, to_json
from pipeline.config.schema import HubTeacher, RunConfig
from pipeline.config.sources import BpeTokenizer
from pipeline.errors import CompressError
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
        tokens = config.train.max_steps * config.train.batch_tokens
        size = f"{'' if row['exact'] else '≤ '}{row['parameters']:,}"
        macs = f"{row['macs_per_token']:,}" if row["exact"] else "–"
        lines.append(
            f"{config.name:<28}{config.method.name:<14}{size:>13}{row['share']:>8.1%}{macs:>13}{tokens:>14,}"
        )
    lines += ["", *(f"{row['state']:<11}{row['address']:<58}{row['note']}".rstrip() for row in states)]
    return "\n".join(lines)


def _size(config: RunConfig) -> Mapping[str, Any]:
    """Exact parameters and MACs of a variant, from integers; raises CompressError if it cannot be built.

    A structure that follows from statistics is exact once they are in the store; before, and where it follows
    from the weights, only its cap is known.
    """
    from model.compress.budget import Budget
    from model.compress.contract import Unmeasured
    from model.compress.methods import make_method
    from model.config import GPT2Config, ModelError, ModelSpec

    dense = ModelSpec.dense(GPT2Config(**_architecture(config)))
    budget = Budget(
        params=config.budget.params,
        convention=config.budget.convention,
        tolerance=config.budget.tolerance,
        allocate=config.budget.allocate,
    )
    method, total = make_method(config.method), dense.num_parameters("tied_all")
    try:
        try:
            plan = method.plan(dense, budget)
        except Unmeasured:
            plan = method.plan(dense, budget, _stored_stats(config))
    except Unmeasured:
        uncounted = total - dense.num_parameters(budget.convention)
        cap = budget.params + uncounted if budget.params else total
        return {"parameters": cap, "exact": False, "share": cap / total, "macs_per_token": None}
    except ModelError as err:
        raise CompressError(f"{config.name}: {err}") from err
    return {
        "parameters": plan.num_parameters,
        "exact": True,
        "share": plan.num_parameters / total,
        "macs_per_token": plan.spec.macs_per_token("factored"),
    }


def _stored_stats(config: RunConfig) -> "Stats | None":
    """The statistics of a config, where they have been collected."""
    from model.compress.stats_file import load_stats

    identity = chain(config).stats
    artifact = Store(config.store).find(identity) if identity else None
    return load_stats(artifact.folder()) if artifact else None


def _architecture(config: RunConfig) -> dict[str, int]:
    """Sizes of the teacher as far as they are known without building it."""
    teacher = config.teacher
    if isinstance(teacher, HubTeacher):
        folder = Location.of(teacher.id)
        if not folder.exists("config.json"):
            return {}  # GPT-2 small; other published sizes are read when their folder is there
        stock = json.loads(folder.read_bytes("config.json"))
        names = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_ctx": "n_positions"}
        return {ours: stock[theirs] for ours, theirs in names.items()} | {"vocab_size": stock["vocab_size"]}
    sizes = {name: getattr(teacher, name) for name in ("n_layer", "n_head", "n_embd", "n_ctx")}
    vocab = config.tokenizer.vocab_size if isinstance(config.tokenizer, BpeTokenizer) else 50257
    return sizes | {"vocab_size": vocab}


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
    history = [row for row in read_history(attempt) if row.get("tokens_per_s")]
    if not history:
        return f"{len(attempt.list())} files"
    last = history[-1]
    return f"step {last['step']:,} · {duration(last['tokens'] / last['tokens_per_s'])} of training done"
