"""A real disk that is full, and one that is read-only: a script for a mount namespace of its own.

    unshare --mount python tests/disk_lab.py SCENE FOLDER

The disk is a tmpfs of a few hundred kilobytes on FOLDER/disk. Prints what happened as one JSON object.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from crash_lab import End, Publishing, forked

from pipeline.store.location import Location
from pipeline.store.scratch import scratch_folder


def mount(disk: Path, *options: str) -> None:
    """A tmpfs on `disk`, or another option for the one that is there."""
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", disk], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return ballast


def told(work: Callable[[], object]) -> dict[str, object]:
    """How a process of its own ended that did it."""
    end: End = forked(lambda: str(work()))
    return {"code": end.code, "text": end.text}


def full_store(disk: Path) -> dict[str, object]:
    """An artifact is to be replaced on a disk that has no room for the new one."""
    writer, root = Publishing(), str(disk)
    mount(disk, "size=1m")
    writer.prepare(root)
    found = {}
    for room in ("none", "some"):  # for one of the new files, not for all
        ballast = fill(disk)
        with ballast.open("r+b") as file:
            file.truncate(ballast.stat().st_size - (0 if room == "none" else 160_000))
        found[room] = told(lambda: writer.write(root))
        found[f"{room} left"] = told(lambda: writer.read(root))
        ballast.unlink()
    found["again"] = told(lambda: writer.write(root))
    found["after"] = told(lambda: writer.read(root))
    return found


def full_scratch(disk: Path) -> dict[str, object]:
    """The store has room, the folder for files on their way has none."""
    writer, root = Publishing(), str(disk.parent / "elsewhere")
    writer.prepare(root)
    mount(disk, "size=100k")
    tempfile.tempdir = str(disk)
    found = {"first": told(lambda: writer.write(root)), "left": told(lambda: writer.read(root))}
    found["model"] = told(save_model)
    tempfile.tempdir = str(disk.parent)
    found["again"] = told(lambda: writer.write(root))
    found["after"] = told(lambda: writer.read(root))
    return found


def save_model() -> None:
    """A model on its way to the store, 160 kB."""
    from train_lab import SPECS

    from model.export import save_native
    from model.gpt2 import GPT2

    with scratch_folder() as folder:
        save_native(GPT2(SPECS["dense"]).init_weights(seed=1), folder)


def full_training(disk: Path) -> dict[str, object]:
    """A run's disk fills up between two checkpoints."""
    from train_lab import Lab

    import_module("torch._inductor.config")  # training loads it, and here every fork would
    lab = Lab.build(disk.parent / "lab")
    request = lab.request(disk / "run", max_steps=20, checkpoint_every=5, log_every=5, val_every=20)
    quiet = lab.request(disk.parent / "quiet", max_steps=20, checkpoint_every=5, log_every=5, val_every=20)
    found = {"quiet": told(lambda: lab.fit(quiet).result.step)}
    mount(disk, "size=4m")
    found["begun"] = told(lambda: lab.fit(request, stop_at=5).result.step)
    ballast = fill(disk)
    found["full"] = told(lambda: lab.fit(request).result.step)
    ballast.unlink()
    found["again"] = told(lambda: lab.fit(request).result.resumed_from)
    same = all(
        weight.equal(lab.weights(disk.parent / "quiet")[name])
        for name, weight in lab.weights(disk / "run").items()
    )
    return found | {"same": same}


def read_only(disk: Path) -> dict[str, object]:
    """A store that was made elsewhere and may only be read."""
    writer, root = Publishing(), str(disk)
    mount(disk, "size=2m")
    writer.prepare(root)
    mount(disk, "remount", "ro")
    found = {"read": told(lambda: writer.read(root)), "written": told(lambda: writer.write(root))}
    for verb, flags in (("report", ["--out", str(disk.parent / "out")]), ("doctor", ["--no-ray"])):
        words = [sys.executable, "-m", "jobs.cli", verb, "--store", f"{root}/store", "--tracking.uri", "off"]
        words += flags
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        found[verb] = {"code": done.returncode, "text": done.stdout + done.stderr}
    return found


def another_mount(disk: Path) -> dict[str, object]:
    """A store on the disk of the temporary folder, mounted once more, as a volume of a container is."""
    (disk.parent / "volume").mkdir()
    disk.mkdir()
    subprocess.run(["mount", "--bind", disk.parent / "volume", disk], check=True)
    text = disk.parent / "text"
    text.write_text("moved")
    same = text.stat().st_dev == disk.stat().st_dev
    moved = told(lambda: Location.of(disk).put_file("text", text, move=True))
    found = {"same device": same, "moved": moved, "text": (disk / "text").read_text()}
    return found | {"left": text.exists()}


SCENES = {
    "another_mount": another_mount,
    "full_store": full_store,
    "full_scratch": full_scratch,
    "full_training": full_training,
    "read_only": read_only,
}

if __name__ == "__main__":
    scene, folder = sys.argv[1:]
    tempfile.tempdir = folder
    print(json.dumps(SCENES[scene](Path(folder) / "disk")))
