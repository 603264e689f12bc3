"""Training one artifact: a request from its inputs, the loop where wanted, numbers to their places.

The history is written by this process, in JSONL first and then in MLflow; a stop is asked for by signal and
answered at the same step on all ranks. The trial of a sweep has a `Driver` in place of signals and MLflow.
Teacher and students are trained by the same code and differ only in where they start.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.config.identity import identity_fields
from pipeline.config.schema import RunConfig, ScratchTeacher
from pipeline.config.training import TrainConfig
from pipeline.errors import Interrupted, KronyError
from pipeline.interrupt import stop_on_signal
from pipeline.progress import Progress
from pipeline.store.alone import alone
from pipeline.store.artifacts import Artifact, Attempt
from pipeline.store.location import Location
from pipeline.store.scratch import scratch_folder
from pipeline.tracking.jsonl import HistoryWriter, read_history
from pipeline.tracking.tracker import NullTracker, Scalar, Tracker, flatten, open_tracker, replay
from pipeline.train.request import Driver, FitRequest, FitResult, Row, ShouldStop
from pipeline.work import Work

START = "start"
"""Where a teacher's random weights lie in its attempt."""


@dataclass(frozen=True, slots=True)
class _Training:
    """What differs between a teacher and a student."""

    label: str
    settings: TrainConfig
    seed: int
    origin: Location
    name: str
    tags: dict[str, Scalar]
    teacher: Location | None = None
    driver: Driver | None = None
    before: tuple[int, int] = (0, 0)
    """Steps and tokens of the stages before, which the run's own come on top of."""


def train_student(work: Work, init: Artifact, tokens: Artifact, *, force: bool) -> Artifact:
    """Recovery training of a compressed model; raises Interrupted, state saved, when asked to stop."""
    config = work.config
    tags: dict[str, Scalar] = {
        "krony.method": init.record.name,
        "krony.parameters": int(init.record.metrics["parameters"]),
        "krony.init": init.record.address,
    }
    teacher = None
    if config.train.objective == "kd":
        teacher = work.store.require(work.chain.teacher).location  # the init was made from it
        tags["krony.teacher"] = work.chain.teacher.address
    with work.store.attempt(work.chain.run, resume=True, force=force) as attempt:
        training = _Training(
            "train",
            config.train,
            config.seed,
            init.location,
            config.name,
            tags,
            teacher,
            work.driver,
            before=_earlier_stages(init),
        )
        return _train(work, attempt, tokens, training)


def _earlier_stages(init: Artifact) -> tuple[int, int]:
    steps, tokens = (int(init.record.metrics.get(f"{key}_before", 0)) for key in ("steps", "tokens"))
    return steps, tokens


def train_teacher(work: Work, tokens: Artifact, tokenizer: Artifact, *, force: bool) -> Artifact:
    """Pretrain the dense teacher that the config describes, from random weights."""
    teacher = work.config.teacher
    if not isinstance(teacher, ScratchTeacher):
        raise KronyError(f"teacher.name={teacher.name!r} is published and is not trained here")
    with work.store.attempt(work.chain.teacher, resume=True, force=force) as attempt:
        origin = attempt.location.child(START)
        if not origin.exists("config.json"):
            _random_teacher(teacher, int(tokenizer.record.metrics["vocab_size"]), origin)
        name = f"teacher-{attempt.identity.name}"
        training = _Training(
            "teacher", teacher.train, teacher.seed, origin, name, {"krony.method": "teacher"}
        )
        return _train(work, attempt, tokens, training)


def _random_teacher(teacher: ScratchTeacher, vocab_size: int, place: Location) -> None:
    from model.config import GPT2Config, ModelSpec
    from model.export import save_native
    from model.gpt2 import GPT2

    arch = GPT2Config(
        n_layer=teacher.n_layer,
        n_head=teacher.n_head,
        n_embd=teacher.n_embd,
        n_ctx=teacher.n_ctx,
        vocab_size=vocab_size,
    )
    with scratch_folder() as folder:
        save_native(GPT2(ModelSpec.dense(arch)).init_weights(seed=teacher.seed), folder)
        place.put_file("model.safetensors", folder / "model.safetensors")
        place.put_file("config.json", folder / "config.json")  # last: it says that the start is complete


def _train(work: Work, attempt: Attempt, tokens: Artifact, training: _Training) -> Artifact:
    driver = training.driver or Driver(on_row=lambda _: None, should_stop=lambda: False)
    with alone(attempt, label=training.label, should_stop=driver.should_stop, on_wait=driver.on_wait) as made:
        return made or _train_alone(work, attempt, tokens, training)


def _train_alone(work: Work, attempt: Attempt, tokens: Artifact, training: _Training) -> Artifact:
    shards = [name for name in tokens.record.files if name.endswith(".bin")]
    request = FitRequest(
        train=training.settings,
        seed=training.seed,
        init=training.origin,
        tokens=tokens.location,
        shards=tuple(sorted(name for name in shards if name.startswith("train-"))),
        val_shards=tuple(sorted(name for name in shards if name.startswith("val-"))),
        run=attempt.location,
        fingerprint=attempt.identity.fingerprint,
        teacher=training.teacher,
        validate_at=training.driver.validate_at if training.driver else (),
    )
    tracker = NullTracker() if training.driver else _open(work, attempt, tokens, training)
    replay(tracker, read_history(attempt.location))  # what a killed driver had not sent yet
    began = time.monotonic()
    try:
        result = _fit(work, request, tracker, training)
    except (KeyboardInterrupt, Interrupted):
        tracker.close("KILLED")
        raise
    except BaseException:
        tracker.close("FAILED")
        raise
    if result.stopped:
        tracker.close("KILLED")
        raise Interrupted(
            f"{attempt.identity.address}: stopped at step {result.step:,}/{training.settings.max_steps:,}, "
            "state saved; the same command goes on from there"
        )
    steps, tokens_seen = training.before[0] + result.step, training.before[1] + result.tokens
    metrics = {**sizes(attempt.location), **result.metrics, "steps": steps, "tokens": tokens_seen}
    settings = {"session_s": round(time.monotonic() - began, 1), "workers": work.config.ray.workers}
    artifact = attempt.publish(metrics=metrics, settings=settings | {"name": training.name})
    tracker.metrics(metrics, step=result.step)  # sizes among them: what the plots of MLflow can use
    tracker.link(artifact.record.kind, artifact.location.uri, digest=artifact.record.digest)
    tracker.close("FINISHED")
    return artifact


def sizes(model: Location) -> dict[str, int]:
    """Parameters in two conventions and MACs per token of the native folder at a location."""
    from model.config import ModelSpec

    spec = ModelSpec.from_json(json.loads(model.read_bytes("config.json"))["model"])
    return {
        "parameters": spec.num_parameters("tied_all"),
        "krony_parameters": spec.num_parameters("krony_no_wpe"),
        "macs_per_token": spec.macs_per_token("factored"),
    }


def _fit(work: Work, request: FitRequest, tracker: Tracker, training: _Training) -> FitResult:
    total = training.settings.max_steps
    ray = work.config.ray
    with (
        HistoryWriter(request.run) as history,
        Progress(training.label, total, unit="steps", quiet=work.quiet) as progress,
        _asked_to_stop(training) as should_stop,
    ):

        def on_log(row: Row) -> None:
            history.append(row)
            tracker.metrics(
                {key: value for key, value in row.items() if key != "step"}, step=int(row["step"])
            )
            shown = {key: row[key] for key in ("loss", "val_loss", "lr") if key in row}
            speed = {"tok/s": int(row["tokens_per_s"])} if "tokens_per_s" in row else {}
            progress.update(int(row["step"]), **shown, **speed)
            if training.driver:
                history.flush()  # the driver may act on the row: it must be on record by then
                training.driver.on_row(row)

        if ray.workers == 0:
            from pipeline.train.local import fit

            return fit(request, on_log=on_log, should_stop=should_stop)
        from pipeline.train.distributed import fit as fit_on_ray

        driver = training.driver
        return fit_on_ray(
            request,
            ray,
            on_log=on_log,
            should_stop=should_stop,
            on_leader=driver.on_leader if driver else None,
            on_queue=driver.on_queue if driver else lambda: None,
        )


@contextmanager
def _asked_to_stop(training: _Training) -> Iterator[ShouldStop]:
    if training.driver:
        yield training.driver.should_stop
        return
    with stop_on_signal(training.label) as should_stop:
        yield should_stop


def _open(work: Work, attempt: Attempt, tokens: Artifact, training: _Training) -> Tracker:
    config = work.config
    address = attempt.identity.address
    tracker = open_tracker(
        config.tracking.uri,
        store=config.store,
        experiment=config.tracking.experiment,
        run_id=f"{address}/{attempt.name}",
        name=training.name,
    )
    tracker.params(asked(config, training.label) | {"seed": training.seed})
    tracker.tags({"krony.address": address, "krony.workers": config.ray.workers, **training.tags})
    tracker.dataset(tokens.record.name, digest=tokens.record.digest, source=tokens.location.uri)
    return tracker


def asked(config: RunConfig, label: str) -> dict[str, Scalar]:
    """What a config asks of a `teacher` or of a student (`train`), by dotted name, as trackers show it."""
    sections = ("teacher", "tokenizer", "corpus") if label == "teacher" else ("method", "budget", "train")
    return flatten({section: identity_fields(getattr(config, section)) for section in sections})
