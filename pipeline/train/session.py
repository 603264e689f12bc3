"""One rank's state of a training run and what can be done to it: step, validate, save, restore.

Plain torch. Each rank adds up the loss of its rows over the *global* token count and gradients are summed, so
the same step follows from any number of ranks and any micro-batch, up to the order of floating-point sums.
Nothing waits for the device except where a number is asked for.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.config import ModelError
from model.export import load_native
from model.gpt2 import GPT2, set_recompute
from pipeline.compress.load import NATIVE_FILES
from pipeline.data.batches import Batches, Rows, TokenStream
from pipeline.errors import DataError, TrainError
from pipeline.store.location import Location
from pipeline.train.checkpoint import Checkpoints, CheckpointState, restore_weights, weight_tensors
from pipeline.train.distill import with_teacher
from pipeline.train.gradients import GradientBuffer
from pipeline.train.optimizer import build_optimizer, optimizer_tensors, restore_optimizer, set_rate
from pipeline.train.request import FitRequest, Row
from pipeline.train.schedule import micro_batches, rate_at
from pipeline.train.topology import Topology
from pipeline.train.validation import Validation, require_known

CONTINUITY = 0.02
"""Nats that the probe may differ by across a restart, on other hardware or in bf16; a real jump is larger."""


class Reading(NamedTuple):
    """Numbers of the last step, the same on every rank."""

    loss: float
    """Nats per token over the global batch."""

    grad_norm: float
    """Global norm before clipping."""

    lr: float
    """Learning rate that was applied, before group multipliers."""


class Losses(NamedTuple):
    """What is known of the losses, in nats per token."""

    val_initial: float
    """Validation before the first step."""

    val: float
    """Latest validation."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """Numbers of a step that still lie on the device."""

    loss: Tensor
    norm: Tensor
    lr: float


class Session:
    """Model, optimizer, data and the step they are at."""

    def __init__(self, request: FitRequest, topology: Topology) -> None:
        """Load the initial model on this rank's device and open the shards; step 0."""
        config = request.train
        self._request, self._config, self._topology = request, config, topology
        self.model = _load(request.init).to(topology.device)
        arch = self.model.spec.arch
        if config.seq_len > arch.n_ctx:
            raise TrainError(
                f"train.seq_len={config.seq_len} is longer than the model's context of {arch.n_ctx}; lower it"
            )
        self._vocabulary = arch.vocab_size
        self.model.train()
        set_recompute(self.model, config.recompute)
        objective = with_teacher(request, self.model)
        # (inputs (B, T), targets (B, T)) -> sum of the losses of all tokens
        self._objective: Callable[[Tensor, Tensor], Tensor] = (
            torch.compile(objective) if config.compile else objective
        )
        self._buffer = GradientBuffer(self.model.parameters())
        self._optimizer = build_optimizer(self.model, config, device=topology.device)
        self._batches = Batches(
            TokenStream(_paths(request.tokens, request.shards)),
            seq_len=config.seq_len,
            batch_tokens=config.batch_tokens,
            seed=request.seed,
        )
        self._validation = Validation(
            TokenStream(_paths(request.tokens, request.val_shards)),
            seq_len=config.seq_len,
            tokens=config.val_tokens,
            micro_batch=config.micro_batch,
        )
        windows = self._validation.read()
        require_known(windows, vocabulary=self._vocabulary, where=request.tokens.uri)
        self._checkpoints = Checkpoints(
            request.run, fingerprint=request.fingerprint, keep=config.keep_checkpoints
        )
        self.step = 0
        self._last: _Pending | None = None
        self._first_bad = torch.tensor(-1, device=topology.device)  # first step without a finite loss or norm
        self._first_bad_here = self._first_bad.clone()  # the same of this rank's own share

    @property
    def tokens(self) -> int:
        """Training tokens seen since the beginning of the run."""
        return self.step * self._config.batch_tokens

    def advance(self) -> None:
        """One optimizer step. Numbers stay on the device until `reading` asks for them."""
        inputs, targets = self._rows()
        torch.manual_seed(_step_seed(self._request.seed, self.step, self._topology.rank))
        self._buffer.zero_()
        for part in micro_batches(len(inputs), self._config.micro_batch):
            self._accumulate(inputs[part], targets[part])
        if self._topology.world > 1:
            self._first_bad_here = self._bad_since(~self._buffer.is_finite(), self._first_bad_here)
        loss = self._buffer.reduce_(self._topology)
        norm = self._buffer.clip_(self._config.grad_clip)
        lr = rate_at(self.step, self._config)
        set_rate(self._optimizer, lr)
        self._optimizer.step()
        self._first_bad = self._bad_since(~torch.isfinite(loss + norm), self._first_bad)
        self._last = _Pending(loss, norm, lr)
        self.step += 1

    def reading(self) -> Reading:
        """Numbers of the last step; waits for the device. Raises TrainError if any step was not finite."""
        if self._last is None:
            raise TrainError("no step was made yet, so there is no loss to read")
        self.require_finite()
        return Reading(float(self._last.loss), float(self._last.norm), self._last.lr)

    def require_finite(self) -> None:
        """Raise TrainError naming the first step that was not finite; alike on every rank."""
        first = int(self._first_bad)
        if first >= 0:
            raise self._diverged(first, "the loss or its gradient", where=self._where(first))

    def validate(self) -> float:
        """Validation loss in nats per token; the same on every rank."""
        loss = self._validation.loss(self.model, self._topology, autocast=self._autocast())
        if not np.isfinite(loss):
            raise self._diverged(self.step, "the validation loss")
        return loss

    def save(self, losses: Losses, history: Sequence[Row]) -> None:
        """Rank 0 writes a checkpoint of this step; weights that are not finite are never saved."""
        self.require_finite()
        probe = self._probe()  # on every rank, so that all leave if the last step broke the weights
        if not np.isfinite(probe):
            raise self._diverged(self.step, "the loss after it")
        if not self._topology.is_main:
            return
        state = CheckpointState(
            step=self.step,
            tokens=self.tokens,
            seed=self._request.seed,
            fingerprint=self._request.fingerprint,
            train_loss=self.reading().loss,
            val_loss_initial=losses.val_initial,
            val_loss=losses.val,
            probe=probe,
            history=tuple(history),
        )
        self._checkpoints.save(
            state,
            weights=weight_tensors(self.model),
            optimizer=optimizer_tensors(self._optimizer, self.model),
        )

    def restore(self, *, on_note: Callable[[str], None]) -> CheckpointState | None:
        """Continue from the newest whole checkpoint, if there is one, and return what else it knew.

        Rank 0 chooses, all load. Its loss on a few validation windows is held against the one at the save.
        """
        main = self._topology.is_main
        newest = self._checkpoints.newest(on_skip=on_note) if main else None
        step = self._topology.from_main(newest.state.step if newest else 0)
        if step == 0:
            self._require_equal_weights()
            return None
        snapshot = newest or self._checkpoints.load(step)
        restore_weights(self.model, snapshot.weights)
        restore_optimizer(self._optimizer, self.model, snapshot.optimizer)
        self.step = step
        self._require_equal_weights()
        before = snapshot.state.probe
        after = self._topology.maxima([self._probe() if main else -np.inf])[0]
        if main:
            on_note(f"continues at step {step:,}: probe loss {before:.6f} at the save, {after:.6f} now")
        if not abs(after - before) <= CONTINUITY:
            raise TrainError(
                f"{self._request.run.uri}: the loss jumps from {before:.4f} to {after:.4f} across the "
                f"restart at step {step:,}; code or data have changed since: run again with --force"
            )
        return snapshot.state

    def close(self) -> None:
        """Let go of the gradient buffer."""
        self._buffer.release()

    # --- inside ---------------------------------------------------------------------------------------------

    def _bad_since(self, bad: Tensor, first: Tensor) -> Tensor:
        """The first bad step, where this one may be it; negative if there was none."""
        return torch.where(bad & (first < 0), self.step, first)

    def _where(self, step: int) -> str:
        """The ranks whose own share was not finite at `step`, where others' was; empty elsewhere."""
        world, here = self._topology.world, int(self._first_bad_here) == step
        bad = self._topology.maxima([float(here and rank == self._topology.rank) for rank in range(world)])
        ranks = [str(rank) for rank, is_bad in enumerate(bad) if is_bad]
        if not 0 < len(ranks) < world:
            return ""
        return f" on rank {', '.join(ranks)} of {world} (if that repeats, look at its device and memory)"

    def _diverged(self, step: int, what: str, *, where: str = "") -> TrainError:
        config = self._config
        return TrainError(
            f"step {step:,}: {what} is not a finite number{where}; lower train.lr (now {config.lr:g}) or "
            f"train.grad_clip (now {config.grad_clip:g}), "
            f"or raise train.warmup_steps (now {config.warmup_steps})"
        )

    def _accumulate(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward and backward of one micro-batch."""
        config = self._config
        try:
            with self._autocast():
                loss = self._objective(inputs, targets)
            self._buffer.backward(loss / config.batch_tokens)
        except (RuntimeError, MemoryError) as err:
            first = next(iter(str(err).strip().splitlines()), type(err).__name__)
            if isinstance(err, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in first:
                rows, length, device = *inputs.shape, self._topology.device
                raise TrainError(
                    f"step {self.step:,}: out of memory with {rows} rows of {length} tokens on {device}; "
                    f"lower train.micro_batch (now {config.micro_batch})"
                ) from err
            if not config.compile or self._last is not None:  # a compiler fails in the first step, or never
                raise
            raise TrainError(
                f"train.compile: the compiler failed on this model or machine ({first}); "
                "set train.compile=false, the result is the same"
            ) from err

    def _rows(self) -> tuple[Tensor, Tensor]:
        topology = self._topology
        inputs, targets = self._batches.batch(self.step, rank=topology.rank, world=topology.world)
        for rows in (inputs, targets):
            require_known(rows, vocabulary=self._vocabulary, where=self._request.tokens.uri)
        return _on(topology.device, inputs), _on(topology.device, targets)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(
            self._topology.device.type, dtype=torch.bfloat16, enabled=self._config.precision == "bf16"
        )

    def _probe(self) -> float:
        return self._validation.probe(self.model, self._topology.device, autocast=self._autocast())

    def _require_equal_weights(self) -> None:
        sums = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in self.model.parameters()]
        if not self._topology.are_equal(int(torch.stack(sums).sum()) % 2**50):
            raise TrainError(
                f"ranks hold different weights at step {self.step:,}; {self._request.init.uri} must be the "
                "same folder on every node"
            )


def _load(init: Location) -> GPT2:
    try:
        return load_native(init.local_folder(only=NATIVE_FILES))
    except (ModelError, FileNotFoundError) as err:
        raise TrainError(f"{init.uri}: {err}") from err


def _paths(location: Location, keys: tuple[str, ...]) -> list[Path]:
    try:
        return location.local_files(keys)
    except FileNotFoundError as err:
        raise DataError(f"shard {err} is missing; run `krony prepare … --force`") from err


def _on(device: torch.device, rows: Rows) -> Tensor:
    held = torch.from_numpy(rows)
    if device.type != "cuda":
        return held.to(device)
    return held.pin_memory().to(device, non_blocking=True)  # a pageable copy would wait for the step before


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_000_003 + rank
