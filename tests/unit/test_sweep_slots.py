"""How many trials fit: the scarcest resource decides, and no share of a GPU spans two devices."""

from dataclasses import replace

import pytest

from pipeline.config.schema import RayConfig, RunConfig
from pipeline.sweep.slots import held, trial_slots

LAPTOP = [{"CPU": 2.0}]
NODE = {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "ray", "slots"),
    [
        (LAPTOP, {}, 2),
        (LAPTOP, {"cpus_per_worker": 2.0}, 1),
        (LAPTOP, {"cpus_per_worker": 3.0}, 0),
        (LAPTOP, {"cpus_per_worker": 0.1}, 20),
        ([NODE], {"gpus_per_worker": 1.0}, 2),
        ([NODE], {"gpus_per_worker": 0.25, "cpus_per_worker": 1.0}, 8),
        ([NODE], {"gpus_per_worker": 0.4}, 4),  # two on each device, and a fifth of each is left
        ([NODE], {"gpus_per_worker": 0.25, "cpus_per_worker": 4.0}, 4),  # here the cores are scarce
        ([NODE, NODE, {"CPU": 64.0}], {"gpus_per_worker": 1.0}, 4),
        ([NODE, NODE], {"workers": 2, "gpus_per_worker": 1.0}, 2),
        ([NODE, NODE], {"workers": 4, "gpus_per_worker": 1.0}, 1),
        ([NODE, NODE], {"workers": 8, "gpus_per_worker": 1.0}, 0),
        (LAPTOP, {"workers": 2}, 1),  # the trial itself holds no core beside its workers
        ([{"CPU": 5.0}], {"workers": 2}, 2),
        ([], {}, 0),
    ],
)
def test_slots(nodes, ray, slots):
    assert trial_slots(nodes, RayConfig(**ray)) == slots


def test_a_trial_that_will_use_the_gpu_holds_one():
    assert held(RunConfig(), has_gpu=True).gpus_per_worker == 1.0
    assert held(RunConfig(), has_gpu=False).gpus_per_worker == 0.0
    packed = RunConfig(ray=RayConfig(gpus_per_worker=0.25))
    assert held(packed, has_gpu=True).gpus_per_worker == 0.25


@pytest.mark.parametrize("has_gpu", [True, False])
def test_who_insists_on_a_gpu_asks_for_it_and_who_does_not_want_one_holds_none(has_gpu: bool):
    for device, gpus in (("cuda", 1.0), ("cpu", 0.0)):
        config = RunConfig(train=replace(RunConfig().train, device=device))
        assert held(config, has_gpu=has_gpu).gpus_per_worker == gpus


def test_one_worker_needs_no_ray_train():
    assert held(RunConfig(ray=RayConfig(workers=1)), has_gpu=False).workers == 0
    assert held(RunConfig(ray=RayConfig(workers=2)), has_gpu=False).workers == 2
