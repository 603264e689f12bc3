"""How long a training step takes here: measured on the very structure, with random weights and random tokens.

A probe runs a few micro-batches forward and backward and one update in this process, with the threads that a
trial gets, and needs no artifact. Each (structure, batch) is measured once; when the time for probing is used
up, what is left is scaled by multiply-accumulates from the nearest that was measured, and says so. Compiling
is left out, and so are the sums between workers.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.config import ModelSpec
from model.gpt2 import GPT2
from pipeline.config.training import TrainConfig
from pipeline.train.distill import Distillation
from pipeline.train.gradients import GradientBuffer
from pipeline.train.optimizer import build_optimizer
from pipeline.train.topology import choose_device

REPEATS = 3
"""Measured micro-batches, after one to warm up."""

_SMALL_FLOP = 4e9  # on a CPU, a larger micro-batch is measured by fewer rows
_PER_PARAMETER = 16  # bytes in fp32: weight, gradient and two moments


@dataclass(frozen=True, slots=True)
class Question:
    """What one worker does in one step: everything that decides its speed."""

    spec: ModelSpec
    train: TrainConfig
    rows: int
    """Rows of one worker in one step."""
    threads: int
    """CPU threads of one worker."""
    teacher: ModelSpec | None = None
    """The dense model beside it, for distillation."""

    @staticmethod
    def of(spec: ModelSpec, train: TrainConfig, *, workers: int, cpus: float, dense: ModelSpec) -> "Question":
        """The question for a training of `workers` (0 and 1 are one), each with `cpus`.

        What cannot change the speed is set to its default, so trials that differ there share an answer.
        """
        size = (
            "batch_tokens",
            "seq_len",
            "micro_batch",
            "val_tokens",
            "objective",
            "distill",
            "precision",
            "device",
        )
        kept = TrainConfig(**{name: getattr(train, name) for name in size})
        rows = -(-train.batch_tokens // train.seq_len // max(1, workers))
        return Question(spec, kept, rows, max(1, int(cpus)), dense if train.objective == "kd" else None)

    @property
    def macs(self) -> float:
        """Multiply-accumulates of a forward pass of one row, by which pace is scaled."""
        per_token = self.spec.macs_per_token("factored", context=self.train.seq_len)
        return self.train.seq_len * (per_token + (self.teacher.macs_per_token() if self.teacher else 0))


@dataclass(frozen=True, slots=True)
class Pace:
    """The answer, for one worker."""

    step_s: float
    """Seconds per optimizer step."""
    validation_s: float
    """Seconds per validation of `val_tokens`."""
    memory_bytes: int
    """Weights, gradients, optimizer and the activations of one micro-batch; without the process itself."""
    busy: float = 1.0
    """Wall time over processor time of what was measured."""
    is_measured: bool = True
    """False where it was scaled from another structure."""

    def scaled(self, ratio: float) -> "Pace":
        """The pace of `ratio` times the work; memory is taken as it is."""
        return replace(
            self, step_s=self.step_s * ratio, validation_s=self.validation_s * ratio, is_measured=False
        )


def probe(questions: Sequence[Question], *, within_s: float) -> Mapping[Question, Pace]:
    """Answer every question, the extremes of the sizes first; measuring stops after about `within_s`.

    At least one question is measured for each batch, however long it takes.
    """
    began = time.monotonic()
    answers: dict[Question, Pace] = {}
    later: list[Question] = []
    for question in _spread(dict.fromkeys(questions)):
        known = any(_alike(question, other) for other in answers)
        if known and time.monotonic() - began > within_s:
            later.append(question)
        else:
            answers[question] = measure(question)
    measured = dict(answers)
    for question in later:
        near = min(
            (other for other in measured if _alike(question, other)),
            key=lambda other: abs(other.macs - question.macs),
        )
        answers[question] = measured[near].scaled(question.macs / near.macs)
    return answers


def measure(question: Question) -> Pace:
    """The best of a few micro-batches and one update, scaled to a whole step."""
    config, device = question.train, choose_device(question.train.device)
    with _threads(question.threads if device.type == "cpu" else 0):
        student = GPT2(question.spec).init_weights(seed=0).to(device)
        objective: nn.Module = student
        if question.teacher:
            teacher = GPT2(question.teacher).init_weights(seed=0).to(device)
            objective = Distillation(student, teacher, config.distill)
        buffer = GradientBuffer(student.parameters())
        optimizer = build_optimizer(student, config, device=device)
        rows = min(config.micro_batch, question.rows)
        if device.type == "cpu":
            rows = max(1, min(rows, int(_SMALL_FLOP // (6 * question.macs))))
        vocabulary = question.spec.arch.vocab_size
        tokens = torch.randint(vocabulary, (rows, config.seq_len), device=device)
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")

        def forward() -> Tensor:
            with autocast:
                loss: Tensor = objective(tokens, tokens)
            return loss / config.batch_tokens

        def update() -> None:
            buffer.clip_(config.grad_clip)
            optimizer.step()
            buffer.zero_()

        held = _saved_bytes(forward, student)
        clock = _Clock(device, threads=question.threads)
        micro_s = clock.best(lambda: buffer.backward(forward()))
        update()  # the first one allocates the moments
        update_s = clock.best(update)
        with torch.no_grad():
            forward_s = clock.best(forward)
        buffer.release()
    state = _PER_PARAMETER * question.spec.num_parameters() + (
        4 * question.teacher.num_parameters() if question.teacher else 0
    )
    full = min(config.micro_batch, question.rows) / rows
    return Pace(
        step_s=micro_s * question.rows / rows + update_s,
        validation_s=forward_s * config.val_tokens / (rows * config.seq_len),
        memory_bytes=int(state + held * full),
        busy=clock.busy,
    )


def _spread(questions: Mapping[Question, None]) -> Iterator[Question]:
    """The smallest, the largest, then what lies between."""
    ordered = sorted(questions, key=lambda question: question.macs)
    while ordered:
        yield ordered.pop(0)
        if ordered:
            yield ordered.pop()


def _alike(first: Question, second: Question) -> bool:
    return (first.train, first.rows, first.threads, first.teacher) == (
        second.train,
        second.rows,
        second.threads,
        second.teacher,
    )


def _saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(seen.values())


class _Clock:
    """Times work. With one thread on a CPU it counts processor time, which other processes do not stretch."""

    def __init__(self, device: torch.device, *, threads: int) -> None:
        self._device, self._counts_cpu = device, device.type == "cpu" and threads == 1
        self._wall = self._cpu = 0.0

    @property
    def busy(self) -> float:
        """Wall time over processor time; 1 where that is not counted."""
        return self._wall / self._cpu if self._counts_cpu and self._cpu > 0 else 1.0

    def best(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest of a few, after one to warm up; a long warm-up is itself the answer."""
        first = self._time(work)
        return first if first > REPEATS else min(self._time(work) for _ in range(REPEATS))

    def _time(self, work: Callable[[], object]) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self._wall, self._cpu = self._wall + wall, self._cpu + cpu
        return cpu if self._counts_cpu else wall


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
