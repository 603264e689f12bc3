"""What a trial holds, and how many fit at once: by the scarcest of it, node by node. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.config.schema import RayConfig, RunConfig
from pipeline.room import processes_that_fit

DRIVER_BYTES = 256 * 2**20
"""Memory of the actor of a trial whose training runs on workers of its own; it holds no core beside them."""


def held(config: RunConfig, *, has_gpu: bool) -> RayConfig:
    """What a trial of this config holds: as it says, with a GPU of its own where it will use one.

    One worker needs no Ray Train; and `ray.gpus_per_worker` is 0 by default, which for a training that takes
    the GPU by itself means one whole GPU: always where `train.device` is "cuda", and where it is "auto" if
    there is one (`has_gpu`). So "auto" never asks an autoscaler for its first GPU.
    """
    ray = config.ray if config.ray.workers > 1 else replace(config.ray, workers=0)
    takes_gpu = config.train.device == "cuda" or (has_gpu and config.train.device == "auto")
    if takes_gpu and ray.workers == 0 and ray.gpus_per_worker == 0:
        return replace(ray, gpus_per_worker=1.0)
    return ray


def trial_slots(nodes: Sequence[Mapping[str, float]], config: RayConfig) -> int:
    """Trials that fit on `nodes` (resources by name, of each) at the same time; 0 if not even one."""
    workers = processes_that_fit(nodes, cpus=config.cpus_per_worker, gpus=config.gpus_per_worker)
    return workers // max(1, config.workers)


def trial_resources(config: RayConfig) -> dict[str, float]:
    """What the actor of one trial holds, by Tune's names."""
    if config.workers < 2:
        return {"cpu": config.cpus_per_worker, "gpu": config.gpus_per_worker}
    return {"cpu": 0.0, "gpu": 0.0, "memory": float(DRIVER_BYTES)}
