"""Hundreds of trials with an invented training: memory, processes, files and resources stay what they were.

    python benchmarks/sweep_soak.py [--trials 200] [--slots 2] [--rows 20] [--seconds 0.5] [--every 20]

Everything is real but the training: campaign, ledger, Tune, actors, verdicts (asha) and the board. A trial
sends rows for a while and ends; one of 40 fails, one of 50 takes its process down. The table counts, after
every so many trials, what the driver and the processes of Ray hold; at the end nothing may be left.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.cluster import connect
from pipeline.config.schema import RayConfig, RunConfig, TrackingConfig
from pipeline.config.sweep import StopRule, SweepConfig
from pipeline.config.training import TrainConfig
from pipeline.progress import Progress
from pipeline.store.artifacts import Store
from pipeline.store.location import Location
from pipeline.sweep.campaign import Campaign
from pipeline.sweep.ledger import Book, Ledger
from pipeline.sweep.space import TrialSpec
from pipeline.sweep.window import Window

STEPS = 64


@dataclass(frozen=True)
class Reading:
    """What is held at one moment; MB are resident."""

    over: int
    driver_mb: float
    ray_mb: float
    trial_mb: float
    processes: int
    files: int
    threads: int

    @staticmethod
    def take(over: int) -> "Reading":
        """Read it now."""
        me, ray_mb, trial_mb, count = psutil.Process(), 0.0, 0.0, 0
        for process in me.children(recursive=True):
            try:
                size, words = process.memory_info().rss / 1e6, " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            ray_mb, count = ray_mb + size, count + 1
            trial_mb = max(trial_mb, size if "Trial" in words else 0.0)
        return Reading(
            over, me.memory_info().rss / 1e6, ray_mb, trial_mb, count, me.num_fds(), me.num_threads()
        )


def specs(count: int, rows: int, seconds: float) -> list[TrialSpec]:
    """Trials that differ by their learning rate; choices carry how long the invented training takes."""
    train = TrainConfig(max_steps=STEPS, batch_tokens=64, seq_len=64)
    config = RunConfig(train=train, tracking=TrackingConfig(uri="off"), ray=RayConfig(cpus_per_worker=1.0))
    choices = {"rows": rows, "seconds": seconds}
    return [TrialSpec(f"{i:010d}", f"trial {i}", f"arm {i}", choices, i, config) for i in range(count)]


def soak(options: argparse.Namespace, folder: Path) -> tuple[list[Reading], Book, dict[str, object]]:
    """Run all trials; what was held meanwhile, what came of them, and what is left at the end."""
    with connect(RayConfig(), quiet=True, num_cpus=options.slots) as ray:
        from pipeline.sweep.job import Channel, Job, Outcome
        from pipeline.sweep.trial import Trial
        from pipeline.sweep.tuning import run_jobs

        rows, seconds = options.rows, options.seconds

        class InventedTrial(Trial):
            """A trial whose training is a sleep."""

            @staticmethod
            def do(job: Job, channel: Channel) -> Outcome:
                """Send rows whose losses depend on the trial alone."""
                number = int(job.key)
                for i in range(rows):
                    time.sleep(seconds / rows)
                    tokens = job.total_tokens * (i + 1) // rows
                    row = {"step": i + 1, "tokens": tokens, "val_loss": 3.0 + number % 7 + 1 / (i + 1)}
                    channel.row(row, wait=job.waits and tokens < job.total_tokens)
                    if channel.why:
                        channel.leave()
                        return Outcome(state="stopped", tokens=tokens)
                    if i == 1 and number % 50 == 49 and not Path(folder / job.key).exists():
                        (folder / job.key).touch()
                        os._exit(1)
                channel.leave()
                if number % 40 == 39:
                    return Outcome(state="failed", reason="invented")
                return Outcome(state="finished", tokens=job.total_tokens, val_loss=3.0, train_s=seconds)

        stop = StopRule(name="asha", grace_tokens=1024, reduction=3) if options.stop else None
        sweep = SweepConfig(stop=stop, retries=2)
        campaign = Campaign(
            sweep,
            Ledger(Location(str(folder / "ledger"))),
            specs(options.trials, rows, seconds),
            ray=RayConfig(),
        )
        window = Window(
            TrackingConfig(uri=options.tracking),
            Store(folder / "store"),
            run_id="sweep/soak/1",
            name="soak",
            asks={},
        )
        readings, end = [Reading.take(0)], threading.Event()

        def watch() -> None:
            while not end.wait(0.2):
                over = campaign.book.count("finished", "stopped", "failed")
                if over >= readings[-1].over + options.every:
                    readings.append(Reading.take(over))

        watcher = threading.Thread(target=watch)
        watcher.start()
        campaign.ledger.tell("session", slots=options.slots)
        try:
            with Progress("soak", 0, unit="tokens", quiet=False) as progress:
                run_jobs(
                    campaign,
                    window,
                    progress,
                    slots=options.slots,
                    should_stop=lambda: False,
                    silence_s=120.0,
                    trainable=InventedTrial,
                )
        finally:
            end.set()
            watcher.join()
            campaign.ledger.tell("end")
            window.close("FINISHED")
        time.sleep(3.0)
        readings.append(Reading.take(options.trials))
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        left: dict[str, object] = {
            "placement_groups": len(groups),
            "free_cpus": ray.available_resources().get("CPU", 0.0),
            "cpus": ray.cluster_resources()["CPU"],
        }
    return readings, campaign.book, left


def main() -> None:
    """Print the table, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20, help="validations per trial")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a trial")
    parser.add_argument("--every", type=int, default=20, help="trials between two readings")
    parser.add_argument("--stop", action=argparse.BooleanOptionalAction, default=True, help="asha or nothing")
    parser.add_argument("--tracking", default="off", help="MLflow, as tracking.uri")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="krony-soak-") as folder:
        readings, book, left = soak(options, Path(folder))
    names = ("driver MB", "Ray MB", "trial MB", "processes", "files", "threads")
    print(f"{'over':>6}" + "".join(f"{name:>11}" for name in names))
    for r in readings:
        values = (r.driver_mb, r.ray_mb, r.trial_mb, r.processes, r.files, r.threads)
        print(f"{r.over:>6}" + "".join(f"{value:>11,.0f}" for value in values))
    counts = {state: book.count(state) for state in ("finished", "stopped", "failed")}
    crashes = sum(entry.crashes for entry in book.entries.values())
    result = {
        **counts,
        "crashes": crashes,
        "wall_s": round(book.wall_s, 1),
        "train_s": round(book.train_s, 1),
        **left,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
