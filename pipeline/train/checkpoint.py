"""Checkpoints: weights and optimizer as safetensors, and a small JSON that is put last and makes them real.

    checkpoints/step-00000100.model.safetensors
    checkpoints/step-00000100.optimizer.safetensors
    checkpoints/step-00000100.json                    step, seed, identity, sizes and digests of the two above

The state of data and randomness is the step, so nothing here depends on the number of ranks. A process that
dies between any two writes leaves the checkpoint before; a damaged checkpoint is named and passed over. No
pickles.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from model.decode import parse_json
from pipeline.errors import TrainError
from pipeline.store.location import Location
from pipeline.train.request import Row

FORMAT = 1
_FOLDER = "checkpoints"
_PARTS = ("model", "optimizer")
_LOSSES = ("train_loss", "val_loss_initial", "val_loss", "probe")


class DamagedCheckpointError(TrainError):
    """A checkpoint is not what its manifest promises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointState:
    """Everything about a moment of a run but its tensors."""

    step: int
    """Optimizer steps done."""

    tokens: int
    """Training tokens seen."""

    seed: int
    """Seed of the batches."""

    fingerprint: str
    """Identity of the run."""

    train_loss: float
    """Loss of the last step, in nats per token."""

    val_loss_initial: float
    """Validation loss before the first step."""

    val_loss: float
    """Latest validation loss."""

    probe: float
    """Loss of these weights on a few validation windows; a restart must find it again."""

    history: tuple[Row, ...] = ()
    """Every row logged so far, so that a history which was cut off can be filled up."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint that was read and found whole; tensors on the CPU."""

    state: CheckpointState
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, location: Location, *, fingerprint: str, keep: int) -> None:
        """`keep` newest ones survive a save."""
        self._location, self._fingerprint, self._keep = location, fingerprint, max(1, keep)

    def save(
        self, state: CheckpointState, *, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        """Write a checkpoint, tensors first and manifest last; then drop what is no longer kept."""
        files = {}
        for part, tensors in zip(_PARTS, (weights, optimizer), strict=True):
            data = safetensors.torch.save(
                {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
            )
            files[part] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            self._location.put_bytes(_tensor_key(state.step, part), data)
        manifest = {"format": FORMAT, **asdict(state), "files": files}
        text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
        self._location.put_bytes(_manifest_key(state.step), text.encode())
        self._retain(state.step)

    def newest(self, *, on_skip: Callable[[str], None]) -> Snapshot | None:
        """The newest whole checkpoint; each one passed over is named to `on_skip`, one line with the reason.

        Raises TrainError if a whole checkpoint belongs to another run.
        """
        for step in sorted(self._steps(), reverse=True):
            try:
                return self.load(step)
            except DamagedCheckpointError as err:
                on_skip(f"{err}; passed over")
        return None

    def load(self, step: int) -> Snapshot:
        """Read and check one; raises DamagedCheckpointError, or TrainError if it is another run's."""
        where = f"{self._location.uri}/{_manifest_key(step)}"
        state, files = _parse(self._read(_manifest_key(step)), where=where)
        if state.step != step:
            raise DamagedCheckpointError(f"{where}: says it is step {state.step:,}; the file was renamed")
        if state.fingerprint != self._fingerprint:
            raise TrainError(
                f"{where}: belongs to run {state.fingerprint[:12]}…, this is {self._fingerprint[:12]}…; "
                "another configuration wrote here: use its own place or remove the checkpoints"
            )
        weights, optimizer = (self._tensors(step, part, files[part]) for part in _PARTS)
        return Snapshot(state, weights, optimizer)

    def _tensors(self, step: int, part: str, promised: "_FileInfo") -> dict[str, Tensor]:
        key = _tensor_key(step, part)
        data = self._read(key)
        if len(data) != promised.size:
            raise DamagedCheckpointError(
                f"{self._location.uri}/{key}: {len(data):,} bytes, its manifest says {promised.size:,}"
            )
        if (found := hashlib.sha256(data).hexdigest()) != promised.sha256:
            raise DamagedCheckpointError(
                f"{self._location.uri}/{key}: sha256 {found[:12]}…, its manifest says {promised.sha256[:12]}…"
            )
        try:
            return safetensors.torch.load(data)
        except SafetensorError as err:
            raise DamagedCheckpointError(f"{self._location.uri}/{key}: not safetensors ({err})") from err

    def _read(self, key: str) -> bytes:
        try:
            return self._location.read_bytes(key)
        except FileNotFoundError:
            raise DamagedCheckpointError(
                f"{self._location.uri}/{key}: missing; the checkpoint was cut short or emptied"
            ) from None

    def _steps(self) -> set[int]:
        keys = (key.removeprefix(f"{_FOLDER}/step-") for key in self._location.list(_FOLDER))
        return {int(key.split(".")[0]) for key in keys if key.split(".")[0].isdecimal()}

    def _retain(self, newest: int) -> None:
        # Anything above the step just saved was passed over as damaged, or this run would have started there.
        steps = self._steps()
        kept = set(sorted(step for step in steps if step <= newest)[-self._keep :])
        for step in sorted(steps - kept):
            self._location.delete(_manifest_key(step))  # first: from here on it is nobody's checkpoint
            for part in _PARTS:
                self._location.delete(_tensor_key(step, part))


def weight_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model by name, tied ones once. Buffers follow from its spec and are not state."""
    return dict(model.named_parameters())


def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model, in place; raises TrainError naming the first that does not fit."""
    parameters = dict(model.named_parameters())
    if differ := sorted(set(parameters) ^ set(weights)):
        raise TrainError(f"checkpoint and model disagree about {differ[0]!r} ({len(differ)} names in all)")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise TrainError(
                f"checkpoint weight {name!r} is {tuple(weights[name].shape)}, "
                f"the model's is {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(weights[name])


@dataclass(frozen=True, slots=True)
class _FileInfo:
    size: int
    sha256: str


def _tensor_key(step: int, part: str) -> str:
    return f"{_FOLDER}/step-{step:08d}.{part}.safetensors"


def _manifest_key(step: int) -> str:
    return f"{_FOLDER}/step-{step:08d}.json"


def _parse(data: bytes, *, where: str) -> tuple[CheckpointState, dict[str, _FileInfo]]:
    try:
        raw = parse_json(data)
        if raw["format"] != FORMAT:
            raise TrainError(
                f"{where}: format {raw['format']}, this version reads {FORMAT}; use the version that wrote it"
            )
        files = {
            part: _FileInfo(int(raw["files"][part]["bytes"]), str(raw["files"][part]["sha256"]))
            for part in _PARTS
        }
        state = CheckpointState(
            step=int(raw["step"]),
            tokens=int(raw["tokens"]),
            seed=int(raw["seed"]),
            fingerprint=str(raw["fingerprint"]),
            **{name: float(raw[name]) for name in _LOSSES},
            history=tuple({str(name): x + 0 for name, x in row.items()} for row in raw["history"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as err:
        raise DamagedCheckpointError(
            f"{where}: not a checkpoint manifest ({type(err).__name__}: {err})"
        ) from err
    return state, files
