"""What a training run is asked for and what it answers: plain values that travel between processes.

Loads no torch, so that a driver can build a request and hand it to a worker group elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pipeline.config.training import TrainConfig
from pipeline.store.location import Location

Row = Mapping[str, float]
"""One point of the history: step, tokens, loss, lr, grad_norm, tokens_per_s, and val_loss where one was made.

The first row, step 0, is the validation before training: it has only step, tokens and val_loss."""

OnLog = Callable[[Row], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """Who drives a training in place of signals, a tracker and progress lines: the trial of a sweep."""

    on_row: OnLog
    """Gets each new row after it is in the history; the run waits for its return."""

    should_stop: ShouldStop
    """One yes makes the run save its state and leave."""

    validate_at: tuple[int, ...] = ()
    """Steps that are validated beside those of `train.val_every`."""

    on_leader: Callable[[bytes], None] | None = None
    """Gets the id of the actor that leads a training on several workers."""

    on_wait: Callable[[], None] = lambda: None
    """Called again and again while another process is at work on the same run."""

    on_queue: Callable[[], None] = lambda: None
    """Called again and again while nothing is trained because the workers wait for their place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRequest:
    """One training run, completely: the same request continues where an earlier one was cut off."""

    train: TrainConfig
    """How long, how fast, on how much."""

    seed: int
    """Seed of the batches."""

    init: Location
    """Native folder of the model to train (`config.json`, `model.safetensors`)."""

    tokens: Location
    """Payload of the tokens artifact."""

    shards: tuple[str, ...]
    """Keys of the training shards, in order."""

    val_shards: tuple[str, ...]
    """Keys of the validation shards, in order."""

    run: Location
    """Where checkpoints and the final native folder go."""

    fingerprint: str
    """Identity of the run; a checkpoint of another identity is refused."""

    teacher: Location | None = None
    """Native folder of the dense model, for `train.objective = "kd"`; read only then."""

    validate_at: tuple[int, ...] = ()
    """Steps that are validated beside those of `train.val_every`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """How far a run came. Unless `stopped`, the final weights stand at the run's location."""

    step: int
    """Optimizer steps done since the beginning of the run, earlier sessions included."""

    tokens: int
    """Training tokens seen, likewise."""

    stopped: bool
    """Asked to stop before the end; a checkpoint was written."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """train_loss, val_loss_initial, val_loss: nats per token."""

    resumed_from: int | None = None
    """Step of the checkpoint that this session started from."""
