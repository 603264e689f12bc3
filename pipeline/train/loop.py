"""The training loop: one story for a laptop, for `torchrun` and for Ray Train.

It knows no Ray, no tracker, and no files but through checkpoints. Numbers leave by `on_log`, which is called
on every rank equally often; wishes come in by `should_stop` and `should_save`, which ranks agree on once per
log interval. All ranks leave at the same step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from model.export import save_native
from pipeline.allocator import keeping_memory
from pipeline.store.scratch import scratch_folder
from pipeline.train.request import FitRequest, FitResult, OnLog, Row, ShouldStop
from pipeline.train.schedule import is_due
from pipeline.train.session import Losses, Session
from pipeline.train.topology import Topology

POLL_S = 0.2
"""A single process looks at its flags this often, in seconds, also between two log lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """How a run speaks with whoever drives it."""

    on_log: OnLog
    """Gets each row; called on every rank equally often."""

    on_history: Callable[[Sequence[Row]], None]
    """Gets, on rank 0 and once after a restart, all rows of the earlier sessions."""

    on_note: Callable[[str], None]
    """Gets, on rank 0, what a person should read: a damaged checkpoint, the loss across a restart."""

    should_stop: ShouldStop
    """Asked on every rank; one yes makes all of them save and leave."""

    should_save: ShouldStop
    """Asked on every rank; one yes makes a checkpoint, and training goes on."""


def run(request: FitRequest, topology: Topology, hooks: Hooks) -> FitResult:
    """Train to the end, or until asked to stop; continues from the newest whole checkpoint.

    The training loss may be distillation from a teacher; validation is always next-token cross-entropy.
    Raises TrainError, alike on every rank, if the loss is no longer finite.
    """
    with _reproducible(topology.device), keeping_memory(topology.device.type):
        session = Session(request, topology)
        try:
            result = _train(session, request, topology, hooks)
            if not result.stopped:
                _publish(session, request, topology)
        finally:
            session.close()
    return result


def _train(session: Session, request: FitRequest, topology: Topology, hooks: Hooks) -> FitResult:
    config, total = request.train, request.train.max_steps
    history: list[Row] = []
    earlier = session.restore(on_note=hooks.on_note)
    if earlier is None:
        initial = session.validate()
        train_loss, losses = None, Losses(val_initial=initial, val=initial)
        history.append({"step": 0, "tokens": 0, "val_loss": initial})
        hooks.on_log(history[-1])
    else:
        train_loss = earlier.train_loss
        losses = Losses(val_initial=earlier.val_loss_initial, val=earlier.val_loss)
        history.extend(earlier.history)
        if topology.is_main:
            hooks.on_history(history)
    clock, stop = _Clock(session.tokens), False
    while session.step < total and not stop:
        session.advance()
        validate = is_due(session.step, config.val_every, total=total) or session.step in request.validate_at
        log = is_due(session.step, config.log_every, total=total)
        save = is_due(session.step, config.checkpoint_every, total=total)
        if log or validate:
            reading = session.reading()
            row = {
                "step": session.step,
                "tokens": session.tokens,
                **reading._asdict(),
                "tokens_per_s": clock.rate(session.tokens),
            }
            if validate:
                with clock.paused():
                    losses = losses._replace(val=session.validate())
                row["val_loss"] = losses.val
            history.append(row)
            hooks.on_log(row)
        if log or validate or (topology.world == 1 and clock.is_poll_due()):
            stop, wanted = topology.any(hooks.should_stop(), hooks.should_save())
            save = save or stop or wanted
        if save:
            train_loss = session.reading().loss
            with clock.paused():
                session.save(losses, history)
    metrics = {"val_loss_initial": losses.val_initial, "val_loss": losses.val}
    return FitResult(
        step=session.step,
        tokens=session.tokens,
        stopped=session.step < total,
        metrics=metrics if train_loss is None else {"train_loss": train_loss, **metrics},
        resumed_from=earlier.step if earlier else None,
    )


def _publish(session: Session, request: FitRequest, topology: Topology) -> None:
    """Rank 0 writes the final native folder; all wait until it stands."""
    if topology.is_main:
        with scratch_folder() as folder:
            save_native(session.model, folder)
            request.run.put_folder(folder)
    topology.maxima([0.0])


class _Clock:
    """Tokens per second of training alone, without validation and checkpoints; and when to look at flags."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._since = tokens, time.perf_counter()
        self._polled = self._since

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call."""
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._since, 1e-9)
        self._tokens, self._since = tokens, now
        return rate

    def is_poll_due(self) -> bool:
        """Whether POLL_S went by since the last yes."""
        now = time.perf_counter()
        if now - self._polled < POLL_S:
            return False
        self._polled = now
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the body does not count."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms where they are free (the CPU); the random state of the caller is kept."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            if device.type == "cpu":
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
