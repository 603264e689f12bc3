"""From a teacher, and statistics where a method needs any, to a compressed model: plan → compress → publish.

A later stage of a method starts from the run of the stage before instead. The plan fixes the exact number of
parameters before a weight is touched, and what was built must have it. Each replaced matrix leaves a row in
`report.json`: predicted and achieved error, energy kept, rank, parameters, MACs.
"""

import json
import time
from dataclasses import asdict

from model.compress.methods import make_method, make_plan
from model.compress.stats_file import load_stats
from model.config import ModelError
from model.export import save_native
from pipeline.compress.load import load_model
from pipeline.compress.outlook import budget_of
from pipeline.config.schema import RunConfig
from pipeline.errors import CompressError
from pipeline.store.artifacts import Artifact, Identity, Store
from pipeline.store.scratch import scratch_folder

REPORT = "report.json"


def build_init(
    config: RunConfig,
    identity: Identity,
    teacher: Artifact,
    store: Store,
    *,
    stats: Artifact | None = None,
    before: Artifact | None = None,
    force: bool = False,
) -> Artifact:
    """Compress `teacher`, or the run `before`, as `config.method` says and publish the result.

    Raises CompressError if that cannot be done.
    """
    began = time.monotonic()
    dense = load_model(teacher)
    source = load_model(before) if before else dense
    try:
        measured = load_stats(stats.folder()) if stats else None
        method = make_method(config.method)
        plan = make_plan(method, source, budget_of(config.budget), measured)
        compressed = method.compress(source, plan, measured, seed=config.seed)
    except ModelError as err:
        raise CompressError(f"{identity.address}: {err}") from err
    counted = sum(parameter.numel() for parameter in compressed.model.parameters())
    assert counted == plan.num_parameters, f"planned {plan.num_parameters:,} parameters, built {counted:,}"
    rows = [asdict(row) for row in compressed.report]
    with store.attempt(identity, force=force) as attempt, scratch_folder() as folder:
        save_native(compressed.model, folder)
        (folder / REPORT).write_text(json.dumps(rows, indent=1))
        attempt.location.put_folder(folder)
        spec = compressed.model.spec
        replaced = sum(row["parameters"] for row in rows)
        energies = [row["energy_kept"] for row in rows]
        metrics = {
            "parameters": spec.num_parameters("tied_all"),
            "krony_parameters": spec.num_parameters("krony_no_wpe"),
            "dense_parameters": dense.spec.num_parameters("tied_all"),
            "macs_per_token": spec.macs_per_token("factored"),
            "dense_macs_per_token": dense.spec.macs_per_token("factored"),
            "replaced_matrices": len(rows),
            "replaced_parameters": replaced,
            "energy_kept": sum(energies) / len(energies) if energies else 1.0,
        }
        if before:
            metrics |= {f"{key}_before": int(before.record.metrics[key]) for key in ("steps", "tokens")}
        return attempt.publish(metrics=metrics, settings={"compress_s": round(time.monotonic() - began, 2)})
