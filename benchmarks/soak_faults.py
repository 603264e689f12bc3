"""What the soak does to a cluster and its drivers: real signals to real processes, drawn from a seed."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from soak_work import Driver, Raylets

NOTICE_S = 30.0


@dataclass
class Scene:
    """Where a fault happens."""

    lab: Raylets
    driver: Driver
    draw: random.Random
    later: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    """What happens afterwards, and when."""

    def after(self, delay_s: float, act: Callable[[], object]) -> None:
        """Do something later in the round."""
        self.later.append((time.monotonic() + delay_s, act))

    def catch_up(self, *, at_once: bool = False) -> None:
        """Do what is due by now, or all that is left."""
        for due in sorted(self.later, key=lambda entry: entry[0]):
            if at_once or due[0] <= time.monotonic():
                self.later.remove(due)
                due[1]()


def kill_worker(scene: Scene) -> None:
    """A process that trains."""
    found = scene.lab.processes("ray::", "RayTrainWorker" if scene.driver.work == "train" else "Trial")
    if not found:
        raise TimeoutError("no process trains")
    scene.draw.choice(found).kill()


def kill_driver(scene: Scene) -> None:
    """The command; somebody starts it again."""
    scene.driver.send(signal.SIGKILL)


def notice(scene: Scene) -> None:
    """SIGTERM; it must have saved its state and ended before the machine goes."""
    scene.driver.send(signal.SIGTERM)
    scene.driver.wait(NOTICE_S)


def kill_raylet(scene: Scene) -> None:
    """A raylet alone; another one joins soon."""
    scene.lab.kill_raylet(scene.draw.choice(scene.lab.nodes))
    scene.after(scene.draw.uniform(0.5, 5.0), scene.lab.add)


def kill_node(scene: Scene) -> None:
    """Everything on a worker node; another one joins soon."""
    scene.lab.kill_node(scene.draw.choice(scene.lab.nodes))
    scene.after(scene.draw.uniform(0.5, 5.0), scene.lab.add)


def pause(scene: Scene) -> None:
    """A raylet hangs, shorter than it takes to be given up."""
    scene.after(1.5, scene.lab.hang(scene.draw.choice(scene.lab.nodes)))


def hang(scene: Scene) -> None:
    """A raylet hangs until it is given up; another one joins; the old one wakes up again, and must leave."""
    node = scene.draw.choice(scene.lab.nodes)
    scene.after(scene.draw.uniform(9.0, 15.0), scene.lab.hang(node))
    scene.after(5.0, scene.lab.add)
    scene.lab.leaving.append(node)


def restart_gcs(scene: Scene) -> None:
    """The head's table server dies and comes back."""
    scene.lab.kill_gcs()
    scene.after(scene.draw.uniform(1.0, 4.0), scene.lab.start_gcs)


def kill_head(scene: Scene) -> None:
    """The whole head; the cluster is made again."""
    scene.lab.kill_head()


@dataclass(frozen=True)
class Fault:
    """A fault by name."""

    act: Callable[[Scene], None]
    durable: bool = True
    """Whether the head keeps its tables on disk."""
    ends: bool = True
    """Whether training processes may be lost by it."""


FAULTS = {
    "worker killed": Fault(kill_worker),
    "driver killed": Fault(kill_driver),
    "driver told to end": Fault(notice),
    "raylet killed": Fault(kill_raylet),
    "node killed": Fault(kill_node),
    "raylet paused": Fault(pause, ends=False),
    "raylet hung": Fault(hang),
    "GCS restarted": Fault(restart_gcs),
    "GCS restarted without its tables": Fault(restart_gcs, durable=False),
    "head killed": Fault(kill_head),
}
