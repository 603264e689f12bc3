"""Train on Ray: the same loop on every worker of a Ray Train group, with restarts, and a line to the driver.

Ray Train places the workers, makes the process group and restarts it when a worker is lost; it hears numbers
and keeps no checkpoints of ours. Rows travel over the line: rank 0 pushes before it saves, so a checkpoint
never knows a row that the driver cannot get. An error that a person can act on goes over it too: all
ranks leave without a restart, and the driver raises it as the one line that it is.
"""

import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline.cluster import connect
from pipeline.config.schema import RayConfig
from pipeline.errors import Interrupted, KronyError, PreflightError, TrainError
from pipeline.interrupt import abandon
from pipeline.progress import say
from pipeline.room import GROW_S, can_grow, require_resources
from pipeline.store.location import Location
from pipeline.train.blame import blame, first_line, is_memory
from pipeline.train.line import Line, Told
from pipeline.train.loop import Hooks, run
from pipeline.train.network import choose_network
from pipeline.train.relay import Relay
from pipeline.train.request import FitRequest, FitResult, OnLog, Row, ShouldStop
from pipeline.train.topology import TIMEOUT_S, PeerLost, choose_device, joined

if TYPE_CHECKING:
    from types import ModuleType

    from pipeline.train.group import Grip

PUMP_S = 0.2
"""Seconds between two looks at the line, by the driver and by rank 0."""

FREE_WAIT_S = 20.0
"""Longest wait for CPUs and GPUs that other work still holds, in seconds."""

CONTINUES = "the same command continues from the last checkpoint"

CONTROLLER_FAILURES = 3
PREEMPTIONS = 10


def fit(
    request: FitRequest,
    config: RayConfig,
    *,
    on_log: OnLog,
    should_stop: ShouldStop,
    on_leader: Callable[[bytes], None] | None = None,
    on_queue: Callable[[], None] = lambda: None,
) -> FitResult:
    """Train on `config.workers` workers, or continue; `on_log` and `should_stop` are called in this process.

    `on_leader` gets the id of the actor that leads the workers, for whoever must free their place
    (`pipeline.train.group.groups_of`) if this process is killed; `on_queue` is called again and again while
    workers wait for their place. Raises PreflightError if the cluster cannot hold the workers, Interrupted if
    asked to stop while none trains, TrainError if the group is lost more often than `config.max_failures`,
    and whatever KronyError a worker raised. No worker goes on after an error of this process.
    """
    device = "" if config.gpus_per_worker else request.train.device
    if device == "cuda":
        raise PreflightError("train.device='cuda' on Ray needs ray.gpus_per_worker above 0, it is 0; try 1")
    with connect(config) as ray:
        if device == "auto" and ray.cluster_resources().get("GPU"):
            say("train", "on CPUs: the cluster has GPUs, but ray.gpus_per_worker is 0")
        _require_room(ray, config, should_stop, on_queue)
        if can_grow(ray):  # a lost machine is replaced in minutes, Ray Train gives a group one to start
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{GROW_S:.0f}")
        line = _open_line(ray)
        storage, name = _scratch(request.run)
        trainer = _trainer(request, config, line=line, storage=storage, name=name)

        def fit_and_clear() -> Any:
            _clear(storage, name)  # Ray Train would resume from what lies there
            try:
                return trainer.fit()
            finally:
                _clear(storage, name)

        return _drive(
            ray,
            fit_and_clear,
            line,
            Relay(request, on_log),
            should_stop,
            on_leader=on_leader,
            on_queue=on_queue,
        )


# --- in the driver ------------------------------------------------------------------------------------------


def _require_room(
    ray: "ModuleType", config: RayConfig, should_stop: ShouldStop, on_queue: Callable[[], None]
) -> None:
    asked = {"CPU": config.workers * config.cpus_per_worker, "GPU": config.workers * config.gpus_per_worker}
    what = f"training with {config.workers} workers"
    require_resources(
        ray,
        cpus=asked["CPU"],
        gpus=asked["GPU"],
        what=what,
        workers=config.workers,
        should_stop=should_stop,
        on_wait=on_queue,
    )
    until = time.monotonic() + FREE_WAIT_S
    while True:
        free = ray.available_resources()
        short = {name: count for name, count in asked.items() if count > free.get(name, 0.0) + 1e-9}
        if not short:
            return
        if should_stop():
            raise Interrupted(f"{what}: stopped before it began; the same command goes on")
        if time.monotonic() > until:
            listed = " and ".join(
                f"{count:g} {name}, free {free.get(name, 0.0):g}" for name, count in short.items()
            )
            raise PreflightError(
                f"{what} asks for {listed}; other work holds the rest: wait for it, or lower ray.workers"
            )
        on_queue()
        time.sleep(PUMP_S)


def _open_line(ray: "ModuleType") -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Firmly: a soft wish leads to a worker where the head has no CPUs, and a run must not end with a worker.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Line).options(scheduling_strategy=here).remote()


def _trainer(request: FitRequest, config: RayConfig, *, line: Any, storage: Location, name: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.train.group import Watch

    gpu = config.gpus_per_worker > 0
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if gpu else {})

    def worker() -> FitResult | None:
        return _work(request, line, gpu=gpu)

    return TorchTrainer(
        worker,
        torch_config=_torch_config("nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=storage.uri,
            callbacks=[Watch(line)],
            failure_config=FailureConfig(
                max_failures=config.max_failures,
                controller_failure_limit=CONTROLLER_FAILURES,  # infinite unless set, like the next
                max_preemption_failures=PREEMPTIONS,
            ),
        ),
    )


def _torch_config(backend: str) -> Any:
    """Ray's own, with the network named in every worker before it makes the group."""
    from ray.train.torch import TorchConfig

    base: Any = TorchConfig().backend_cls

    def on_start(self: Any, workers: Any, config: Any) -> None:
        workers.execute(_name_network)
        base.on_start(self, workers, config)

    # Made by hand: classes inside of functions lose the names in their annotations when they are pickled.
    networked = type("Networked", (base,), {"on_start": on_start})
    config = type("NetworkedConfig", (TorchConfig,), {"backend_cls": property(lambda _: networked)})
    return config(backend=backend, timeout_s=int(TIMEOUT_S))


def _drive(
    ray: "ModuleType",
    work: Callable[[], Any],
    line: Any,
    relay: Relay,
    should_stop: ShouldStop,
    *,
    on_leader: Callable[[bytes], None] | None,
    on_queue: Callable[[], None],
) -> FitResult:
    """Run the trainer in a thread and keep the line moving from this one, where signals arrive."""
    from pipeline.train.group import Grip, id_of

    pool, grip = ThreadPool(2), Grip()
    asked, leaves = False, False
    running = pool.apply_async(work)
    try:
        while not running.ready():
            running.wait(PUMP_S)
            if not asked and should_stop():
                ray.get(line.ask_stop.remote())
                asked = True
            told = _pump(ray, line, relay, grip)
            if on_leader and told.leader is not None:
                on_leader(id_of(told.leader))
            if told.waits and not running.ready():
                on_queue()
                if asked and grip.holds:  # nobody is there who could hear it
                    raise Interrupted(f"stopped while its workers waited for their place; {CONTINUES}")
        if (failure := _pump(ray, line, relay, grip).failure) is not None:
            raise failure
        return _answer(running.get)
    except ray.exceptions.RayError as err:
        why = blame(err) if is_memory(err) else f"the connection to Ray was lost ({first_line(err)})"
        raise TrainError(f"{why}; {CONTINUES}") from err
    except Exception:  # this process cannot go on, as where its history cannot be written
        line.ask_stop.remote()
        leaves = True
        raise
    finally:
        if not running.ready():
            grip.end(running, pool=pool, leaves=leaves)
        if not running.ready():
            abandon()
        pool.terminate()


def _answer(result: Callable[[], Any]) -> FitResult:
    from ray.train import ControllerError, TrainingFailedError

    try:
        answer = result().return_value
    except ControllerError as err:
        if is_memory(err.controller_failure):  # of a node that is still full when its workers start again
            raise TrainError(f"{blame(err.controller_failure)}; {CONTINUES}") from err
        raise PreflightError(
            f"Ray could not start the workers ({first_line(err.controller_failure)}); "
            "`krony doctor` shows what is free"
        ) from err
    except TrainingFailedError as err:
        raise TrainError(f"{blame(err)}; restarts are used up (ray.max_failures): {CONTINUES}") from err
    assert isinstance(answer, FitResult), answer
    return answer


def _pump(ray: "ModuleType", line: Any, relay: Relay, grip: "Grip") -> Told:
    told: Told = ray.get(line.listen.remote())
    grip.note(told)
    for note in told.notes:
        say("train", note)
    relay.rows(told.rows)
    return told


def _scratch(run_location: Location) -> tuple[Location, str]:
    """Where Ray Train may write, and the run's name: address and attempt, so never a name of another run."""
    path = PurePosixPath(run_location.uri)
    return Location(run_location.uri.rsplit("/", 1)[0]), "ray-" + "-".join(path.parts[-3:])


def _clear(storage: Location, name: str) -> None:
    if storage.is_local:
        shutil.rmtree(Path(storage.uri) / name, ignore_errors=True)
        return
    for key in storage.list(name):
        storage.delete(key)


# --- in a worker --------------------------------------------------------------------------------------------


def _name_network() -> None:
    import ray

    choose_network(ray.util.get_node_ip_address())


def _work(request: FitRequest, line: Any, *, gpu: bool) -> FitResult | None:
    """One rank; None if the run ended by an error that is on the line."""
    import ray

    if ray.get(line.failure.remote()) is not None:
        return None  # restarted for nothing: the error is one that no restart mends
    try:
        topology = joined(_device(request, gpu=gpu))
        if topology.is_main:
            ray.get(line.join.remote())
        return run(request, topology, _hooks(line, is_main=topology.is_main))
    except PeerLost:
        if ray.get(line.failure.remote()) is None:
            raise
    except KronyError as err:
        ray.get(line.fail.remote(err))
        if gpu:
            raise  # ranks that wait in NCCL do not notice: let Ray end them
        dist.destroy_process_group()  # ranks that wait in gloo do
    return None


def _device(request: FitRequest, *, gpu: bool) -> torch.device:
    if gpu:
        from ray.train.torch import get_device

        device: torch.device = get_device()
        return device
    return choose_device("cpu" if request.train.device == "auto" else request.train.device)


def _hooks(line: Any, *, is_main: bool) -> Hooks:
    import ray
    import ray.train

    told = False

    def on_log(row: Row) -> None:
        if is_main:
            ray.get(line.push.remote([row]))
        if (
            "val_loss" in row
        ):  # on every rank alike; a report waits for the controller's next look at its workers
            ray.train.report(dict(row))

    def preempted() -> bool:
        nonlocal told
        notice = ray.train.get_preemption_info() is not None  # a barrier too
        first, told = notice and not told, told or notice
        return first

    return Hooks(
        on_log=on_log,
        on_history=lambda rows: ray.get(line.push.remote(list(rows))),
        on_note=lambda text: ray.get(line.note.remote(text)),
        should_stop=lambda: is_main and bool(ray.get(line.is_stop_asked.remote())),
        should_save=preempted,
    )
