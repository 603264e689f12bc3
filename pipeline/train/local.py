"""Train in this process, or as one rank of `torchrun`: the loop without Ray."""

from pipeline.progress import say
from pipeline.train.loop import Hooks, run
from pipeline.train.relay import Relay
from pipeline.train.request import FitRequest, FitResult, OnLog, Row, ShouldStop
from pipeline.train.topology import from_environment


def fit(request: FitRequest, *, on_log: OnLog, should_stop: ShouldStop) -> FitResult:
    """Train, or continue; under `torchrun` every rank calls this, and rank 0 alone logs and writes.

    `on_log` gets each step of the run once, in order, also over restarts. `should_stop` is asked on every
    rank.
    """
    with from_environment(request.train.device) as topology:
        relay = Relay(request, on_log if topology.is_main else _drop)
        hooks = Hooks(
            on_log=relay.row,
            on_history=relay.rows,
            on_note=lambda text: say("train", text),
            should_stop=should_stop,
            should_save=lambda: False,
        )
        return run(request, topology, hooks)


def _drop(row: Row) -> None:
    """Only rank 0 has a history."""
