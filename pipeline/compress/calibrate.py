"""Statistics of a teacher over windows of its training tokens, in this process or over Ray tasks.

Which windows is a pure function of the seed and the shards. Each is computed alone, and parts are added in
their order, so one worker and many agree up to the rounding of float64 sums. A Ray task streams how far it
is, and then its sums matrix by matrix.
"""

import itertools
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from model.compress.calibration import Collector, Measurement
from model.compress.contract import Stats, StatsSpec
from model.compress.stats_file import half_correlation, save_stats
from model.config import ModelError
from pipeline.cluster import connect
from pipeline.compress.load import load_model
from pipeline.config.schema import CalibrationConfig, RayConfig
from pipeline.data.batches import Batches, TokenStream
from pipeline.errors import CompressError, DataError, KronyError, PreflightError
from pipeline.progress import Progress
from pipeline.room import require_resources
from pipeline.store.artifacts import Artifact, Identity, Store
from pipeline.store.scratch import scratch_folder


def calibrate(
    config: CalibrationConfig,
    identity: Identity,
    teacher: Artifact,
    tokens: Artifact,
    store: Store,
    *,
    ray: RayConfig,
    force: bool = False,
    quiet: bool = False,
) -> Artifact:
    """Collect what `identity` asks for and publish it.

    Raises CompressError if the teacher cannot be measured so, DataError if there are too few tokens.
    """
    began = time.monotonic()
    needs = tuple(identity.config["needs"])
    whole = Part(config, needs, teacher, tokens, start=0, stop=config.sequences)
    workers = min(ray.workers, config.sequences)
    with Progress("stats", config.sequences, unit="sequences", quiet=quiet) as progress:
        progress.update(0)
        stats = _on_ray(whole, workers, ray, progress, quiet=quiet) if workers else _here(whole, progress)
    with store.attempt(identity, force=force) as attempt, scratch_folder() as scratch:
        save_stats(stats, scratch)
        attempt.location.put_folder(scratch)
        settings = {"calibrate_s": round(time.monotonic() - began, 2), "workers": ray.workers}
        return attempt.publish(metrics=_metrics(stats), settings=settings)


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive sequences of a calibration, and all that is needed to measure them elsewhere."""

    config: CalibrationConfig
    needs: tuple[str, ...]
    teacher: Artifact
    tokens: Artifact
    start: int
    stop: int

    def split(self, count: int) -> list["Part"]:
        """`count` parts that follow each other and differ by one sequence at most."""
        total = self.stop - self.start
        ends = [self.start + total * i // count for i in range(count + 1)]
        return [replace(self, start=a, stop=b) for a, b in itertools.pairwise(ends)]

    def rows(self) -> Iterator[torch.Tensor]:
        """The windows (1, length) of this part, in order."""
        config, length = self.config, self.config.length
        shards = sorted(k for k in self.tokens.record.files if k.startswith("train-") and k.endswith(".bin"))
        stream = TokenStream(self.tokens.paths(shards))
        windows = Batches(stream, seq_len=length, batch_tokens=length, seed=config.seed)
        if config.sequences > windows.rows_per_epoch:
            raise DataError(
                f"calibration asks for {config.sequences:,} sequences of {length:,} tokens, "
                f"{self.tokens.record.address} holds {windows.rows_per_epoch:,} for training; lower "
                "calibration.sequences or calibration.length"
            )
        for number in range(self.start, self.stop):
            yield torch.from_numpy(windows.batch(number)[0])

    def collector(self, device: torch.device) -> Collector:
        """The teacher on a device, ready to be measured."""
        model = load_model(self.teacher).to(device)
        config = self.config
        how = Measurement(
            skip_first_tokens=config.skip_first_tokens,
            fisher=config.fisher,
            labels=config.labels,
            seed=config.seed,
            delta_trim=config.delta_trim,
            delta_clip=config.delta_clip,
        )
        return Collector(model, StatsSpec.everywhere(self.needs, model.spec), how)

    def measure(self, device: torch.device) -> Generator[int, None, Stats]:
        """Yield how many sequences are done after each, and return what was found."""
        try:
            collector = self.collector(device)
            with collector.attached():
                for number, row in enumerate(self.rows(), start=self.start):
                    collector.measure(row, first=number)
                    yield collector.sequences
        except ModelError as err:
            raise CompressError(f"{self.teacher.record.address}: {err}") from err
        return collector.stats()


def _here(part: Part, progress: Progress) -> Stats:
    steps = part.measure(_device(part.config))
    while True:
        try:
            progress.update(next(steps))
        except StopIteration as end:
            found: Stats = end.value
            return found


def _device(config: CalibrationConfig) -> torch.device:
    """CUDA where it is there and wanted; Metal has no float64."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise PreflightError("calibration.device='cuda' is not there; choose 'auto' or 'cpu'")
    return torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")


def _metrics(stats: Stats) -> dict[str, Any]:
    """What a reader should know of the sums: how stable they are, and whether a few coordinates rule them."""
    metrics: dict[str, Any] = {"sequences": stats.sequences, "tokens": stats.tokens}
    if halves := half_correlation(stats):
        metrics["row_fisher_rank_correlation"] = sum(halves.values()) / len(halves)
        metrics["row_fisher_rank_correlation_min"] = min(halves.values())
    shares = {
        key.partition("/")[2]: float(gram.diagonal().max() / gram.trace())
        for key, gram in stats.sums.items()
        if key.startswith("gram/")
    }
    if shares:
        metrics["gram_top_share"], metrics["gram_top_module"] = max((v, k) for k, v in shares.items())
    influence = {
        int(key.partition("/h.")[2]): 1.0 - float(stats.mean(key))
        for key in stats.sums
        if key.startswith("block_influence/")
    }
    if influence:
        metrics["block_influence"] = [influence[i] for i in sorted(influence)]
    return metrics


# --- Ray --------------------------------------------------------------------------------------------------


def _on_ray(whole: Part, workers: int, ray: RayConfig, progress: Progress, *, quiet: bool) -> Stats:
    """One part per worker, added in the order of the parts."""
    asked = {"cpus": workers * ray.cpus_per_worker, "gpus": workers * ray.gpus_per_worker}
    with connect(ray, quiet=quiet) as library:
        what = f"calibration with {workers} workers"
        require_resources(library, cpus=asked["cpus"], gpus=asked["gpus"], what=what, workers=workers)
        task = library.remote(_task).options(num_cpus=ray.cpus_per_worker, num_gpus=ray.gpus_per_worker)
        streams = [task.remote(part, gpu=ray.gpus_per_worker > 0) for part in whole.split(workers)]
        try:
            counts = _follow(library, streams, progress)
            sums: dict[str, torch.Tensor] = {}
            for stream in streams:
                for key, value in map(library.get, stream):
                    part = torch.tensor(value)
                    sums[key] = sums[key].add_(part) if key in sums else part
        except library.exceptions.RayTaskError as err:
            if isinstance(err.cause, KronyError):
                raise err.cause from err  # as it was raised there, without Ray's traceback
            raise
        except library.exceptions.RayError as err:
            first = str(err).strip().splitlines()[0]
            raise CompressError(
                f"a calibration worker was lost ({type(err).__name__}: {first}); run the same command again"
            ) from err
        finally:
            for stream in streams:
                library.cancel(stream)
        return Stats(tokens=sum(t for t, _ in counts), sequences=sum(s for _, s in counts), sums=sums)


def _follow(library: ModuleType, streams: list[Any], progress: Progress) -> list[tuple[int, int]]:
    """Listen to all parts until each has said its counts (tokens, sequences)."""
    done, counts = [0] * len(streams), dict[int, tuple[int, int]]()
    while len(counts) < len(streams):
        (ready, *_), _ = library.wait([s for i, s in enumerate(streams) if i not in counts], num_returns=1)
        number, event = streams.index(ready), library.get(next(ready))
        if isinstance(event, int):
            done[number] = event
            progress.update(sum(done))
        else:
            counts[number] = event
    return [counts[number] for number in range(len(streams))]


def _task(part: Part, *, gpu: bool) -> Iterator[Any]:
    """In a worker: sequences done so far, then (tokens, sequences), then (key, sum) by (key, sum)."""
    stats = yield from part.measure(_device(part.config) if gpu else torch.device("cpu"))
    yield stats.tokens, stats.sequences
    for key, value in stats.sums.items():
        yield key, value.numpy()
