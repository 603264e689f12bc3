"""A checkpoint that is cut short, damaged or foreign never becomes the one that training continues from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.errors import TrainError
from pipeline.store.location import Location
from pipeline.train.checkpoint import Checkpoints, CheckpointState

FINGERPRINT = "ab" * 32


class Crash(BaseException):
    """The process dies here."""


def state(step: int, fingerprint: str = FINGERPRINT) -> CheckpointState:
    return CheckpointState(
        step=step,
        tokens=step * 100,
        seed=3,
        fingerprint=fingerprint,
        train_loss=2.0 / step,
        val_loss_initial=5.7,
        val_loss=2.1,
        probe=2.2,
        history=(
            {"step": 0, "tokens": 0, "val_loss": 5.7},
            {"step": step, "tokens": step * 100, "loss": 0.1},
        ),
    )


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"a.weight": torch.randn(5, 3, generator=generator), "b": torch.randn((), generator=generator)}


def save(location: Location, step: int, *, keep: int = 2, fingerprint: str = FINGERPRINT) -> None:
    Checkpoints(location, fingerprint=fingerprint, keep=keep).save(
        state(step, fingerprint), weights=tensors(step), optimizer=tensors(step + 1000)
    )


def newest_step(location: Location) -> tuple[int | None, list[str]]:
    lines: list[str] = []
    found = Checkpoints(location, fingerprint=FINGERPRINT, keep=2).newest(on_skip=lines.append)
    if found is None:
        return None, lines
    step = found.state.step
    assert found.state == state(step)
    for got, expected in ((found.weights, tensors(step)), (found.optimizer, tensors(step + 1000))):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
    return step, lines


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> Iterator[None]:
    """Call `before(n)` ahead of write or delete number n of every Location."""
    calls = iter(range(10_000))
    with monkeypatch.context() as patch:
        for name in ("put_bytes", "put_file", "delete"):
            real = getattr(Location, name)

            def wrapped(self, *args, _real=real, **kwargs):
                before(next(calls))
                return _real(self, *args, **kwargs)

            patch.setattr(Location, name, wrapped)
        yield


def test_a_checkpoint_comes_back_to_the_bit_and_only_the_newest_are_kept(tmp_path: Path):
    location = Location(str(tmp_path))
    assert newest_step(location) == (None, [])
    for step in (10, 20, 30):
        save(location, step)
    assert newest_step(location) == (30, [])
    steps = {key.split(".")[0] for key in location.list()}
    assert steps == {"checkpoints/step-00000020", "checkpoints/step-00000030"}


def test_a_crash_at_any_write_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def crash_at(fail_at: int) -> Callable[[int], None]:
        def before(n: int) -> None:
            if n == fail_at:
                raise Crash

        return before

    writes: list[int] = []
    counted = Location(str(tmp_path / "counted"))
    save(counted, 10, keep=1)
    with counting(monkeypatch, writes.append):
        save(counted, 20, keep=1)
    assert len(writes) >= 6  # three puts, then the three deletes of the one before

    for fail_at in range(len(writes)):
        location = Location(str(tmp_path / str(fail_at)))
        save(location, 10, keep=1)
        with counting(monkeypatch, crash_at(fail_at)), pytest.raises(Crash):
            save(location, 20, keep=1)
        step, lines = newest_step(location)
        assert step == (10 if fail_at < 3 else 20)
        assert all("step-00000020" in line for line in lines)
        save(location, 30, keep=1)  # and the next one cleans up
        assert newest_step(location) == (30, [])
        assert len(location.list()) == 3


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "json"])
@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "empty"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, part: str, damage: str):
    location = Location(str(tmp_path))
    save(location, 10)
    save(location, 20)
    path = tmp_path / f"checkpoints/step-00000020.{part}"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped" and part == "json":
        path.write_bytes(data.replace(b'"step": 20', b'"step": 40'))
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        path.write_bytes({"short": data[: len(data) // 2], "flipped": flipped, "empty": b""}[damage])
    step, lines = newest_step(location)
    assert step == 10
    (line,) = lines
    assert f"step-00000020.{part}" in line
    assert "\n" not in line
    assert line.endswith("passed over")


def test_when_nothing_is_whole_training_begins_anew(tmp_path: Path):
    location = Location(str(tmp_path))
    for step in (10, 20):
        save(location, step)
        (tmp_path / f"checkpoints/step-{step:08d}.model.safetensors").write_bytes(b"")
    step, lines = newest_step(location)
    assert step is None
    assert len(lines) == 2


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    location = Location(str(tmp_path))
    save(location, 10, fingerprint="cd" * 32)
    with pytest.raises(TrainError, match=r"belongs to run cdcdcdcdcdcd…, this is abababababab…"):
        newest_step(location)


def test_what_a_later_version_wrote_is_refused_and_not_passed_over(tmp_path: Path):
    location = Location(str(tmp_path))
    save(location, 10)
    path = tmp_path / "checkpoints/step-00000010.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(TrainError, match="format 2, this version reads 1"):
        newest_step(location)
