"""Speed and memory of one model against its dense teacher: the verb behind `krony speed`.

Three sides: `dense` is the teacher, `factored` the model as it is, `materialised` the same multiplied out, as
its stock export is. All are run by the code of the factored export, take turns in one process, and must give
the logits of the models that they stand for before a clock starts. What counts is the ratio to dense.
"""

# B sequences · T tokens

import io
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.export import to_dense
from model.gpt2 import GPT2
from pipeline.compress.folders import check_logits
from pipeline.compress.load import NATIVE_FILES, load_model
from pipeline.compress.served import serve
from pipeline.config.speed import FEWEST_ROUNDS, SpeedConfig
from pipeline.errors import EvaluateError, PreflightError
from pipeline.evaluate.memory import Load, Weights, cuda_peak, resident_peaks
from pipeline.evaluate.turns import Action, Decoding, Spread, Turns, take_turns
from pipeline.progress import Progress, say
from pipeline.store.artifacts import Artifact, Identity, Store

TURNS = "turns.parquet"
WEIGHTS = "model.safetensors"

Side = Literal["dense", "factored", "materialised"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number of one side, and what it is over that of the dense side."""

    side: Side
    quantity: str
    """`prefill`, `decode@B` for B sequences at once, `memory` or `checkpoint`."""

    unit: Literal["tokens/s", "s/token", "bytes"]
    """s/token: between two tokens of one sequence."""

    value: float
    """Median of the calls."""

    low: float | None = None
    high: float | None = None
    """Quartiles of the calls."""

    ratio: float
    """Of a speed: how many times as fast as dense. Of bytes: share of dense."""

    ratio_low: float | None = None
    ratio_high: float | None = None
    """95 % interval of the median ratio of one round."""

    rounds: int | None = None


def speed_artifact(
    identity: Identity,
    config: SpeedConfig,
    *,
    model: Artifact,
    teacher: Artifact,
    store: Store,
    force: bool = False,
    quiet: bool = False,
) -> Artifact:
    """Measure a `model` and its `teacher`, and publish it as `identity`.

    Raises PreflightError if the device is not there, CompressError if a side does not give the logits of the
    model that it stands for, EvaluateError if memory runs out.
    """
    require_device(config)
    compressed, dense = load_model(model), load_model(teacher)
    models: dict[Side, GPT2] = {"dense": dense, "factored": compressed, "materialised": to_dense(compressed)}
    load = Load(
        prompt=config.prompt_at(compressed.spec.arch.n_ctx),
        past=config.past,
        tokens=config.tokens,
        batch=max(config.batches),
        dtype=config.dtype,
        threads=config.threads,
    )
    try:
        with _threads(config.threads):
            networks = _networks(models, config, where=model.record.address)
            took = _turns(networks, config, load, quiet=quiet)
            peaks = _memory(networks, config, load, model=model, teacher=teacher, quiet=quiet)
    except torch.OutOfMemoryError as err:
        raise EvaluateError(
            f"{model.record.address}: no memory for speed.batches={list(config.batches)} and "
            f"speed.prompt={load.prompt}; lower them"
        ) from err
    figures = [*_speeds(took, load.prompt), *_bytes("memory", peaks)]
    figures += _bytes("checkpoint", _checkpoints(model, teacher))
    spec = compressed.spec
    with store.attempt(identity, force=force) as attempt:
        attempt.location.put_bytes(TURNS, _parquet(took))
        return attempt.publish(
            metrics={
                "figures": [asdict(figure) for figure in figures],
                "parameters": spec.num_parameters("tied_all"),
                "parameters_by_side": {
                    side: each.spec.num_parameters("tied_all") for side, each in models.items()
                },
                "n_embd": spec.arch.n_embd,
                "held": {quantity: turns.held for quantity, turns in took.items()},
            },
            settings={"place": place(config.device), "seconds": config.seconds, "rounds": config.rounds},
        )


def require_device(config: SpeedConfig) -> None:
    """Raise PreflightError if the device is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise PreflightError("speed.device='cuda' is not there; choose 'cpu'")


def place(device: Literal["cpu", "cuda"]) -> dict[str, str | int]:
    """What a reader must know of the machine before comparing two measurements."""
    chip = torch.cuda.get_device_name() if device == "cuda" else _processor()
    cpus = os.cpu_count() or 0
    return {"chip": chip, "cpus": cpus, "machine": platform.machine(), "torch": str(torch.__version__)}


def _networks(models: Mapping[Side, GPT2], config: SpeedConfig, *, where: str) -> dict[Side, Any]:
    """Each side as it is run, once its logits are those of the model that it stands for."""
    networks: dict[Side, Any] = {}
    for side, each in models.items():
        network = serve(each)
        expected = models["dense" if side == "dense" else "factored"]
        check_logits(expected, network, where=f"{where}, {side}", so="nothing was measured")
        networks[side] = network.to(device=config.device, dtype=getattr(torch, config.dtype))
    return networks


@torch.inference_mode()
def _turns(networks: Mapping[Side, Any], config: SpeedConfig, load: Load, *, quiet: bool) -> dict[str, Turns]:
    """Every call, by quantity."""
    quantities = ["prefill", *(f"decode@{batch}" for batch in config.batches)]
    took: dict[str, Turns] = {}
    with Progress("speed", 100, unit="%", quiet=quiet) as progress:
        for number, quantity in enumerate(quantities):
            tell = partial(_tell, progress, quantity, number, len(quantities))
            tell(0.0)
            sides: dict[str, Action] = {
                side: _action(network, quantity, load, config) for side, network in networks.items()
            }
            for action in sides.values():
                for _ in range(2):
                    action()
            took[quantity] = take_turns(
                sides,
                rounds=config.rounds,
                fewest=FEWEST_ROUNDS,
                seconds=config.seconds,
                device=config.device,
                on_round=tell,
            )
            tell(1.0)
    return took


def _tell(progress: Progress, quantity: str, before: int, total: int, share: float) -> None:
    progress.update(int(100 * (before + share) / total), of=quantity)


def _action(network: Any, quantity: str, load: Load, config: SpeedConfig) -> Action:
    """One call: reading the prompt, or writing one more token in every sequence."""
    generator = torch.Generator().manual_seed(0)
    rows, length = (1, load.prompt) if quantity == "prefill" else (int(quantity.split("@")[1]), load.past)
    ids = torch.randint(network.config.vocab_size, (rows, length), generator=generator).to(config.device)
    if quantity == "prefill":
        return partial(network, input_ids=ids, use_cache=True, logits_to_keep=1)
    return Decoding(network, ids, tokens=load.tokens)


def _memory(
    networks: dict[Side, Any],
    config: SpeedConfig,
    load: Load,
    *,
    model: Artifact,
    teacher: Artifact,
    quiet: bool,
) -> dict[str, int]:
    """Bytes at the peak of each side. On CUDA the networks leave the device, and return one by one."""
    if not quiet:
        say("speed", "peak memory, each side alone")
    if config.device == "cpu":
        native = str(model.folder("native"))
        return resident_peaks(
            {
                "dense": Weights(str(teacher.folder(only=NATIVE_FILES)), is_materialised=False),
                "factored": Weights(native, is_materialised=False),
                "materialised": Weights(native, is_materialised=True),
            },
            load,
        )
    for network in networks.values():
        network.to("cpu")
    peaks: dict[str, int] = {}
    for side, network in networks.items():
        peaks[side] = cuda_peak(network.to("cuda"), load)
        network.to("cpu")
    return peaks


def _checkpoints(model: Artifact, teacher: Artifact) -> dict[str, int]:
    """Bytes of the weights of each side, as its folder holds them."""
    files = model.record.files
    return {
        "dense": teacher.record.files[WEIGHTS].bytes,
        "factored": files[f"factored/{WEIGHTS}"].bytes,
        "materialised": files[f"stock/{WEIGHTS}"].bytes,
    }


def _speeds(took: Mapping[str, Turns], prompt: int) -> Iterator[Figure]:
    for quantity, turns in took.items():
        sides = turns.seconds
        is_prefill = quantity == "prefill"
        for side in SIDES:
            calls = Spread.quartiles(sides[side])
            ratio = Spread.of_ratio(sides["dense"], sides[side])
            value, low, high = calls.middle, calls.low, calls.high
            if is_prefill:
                value, low, high = prompt / calls.middle, prompt / calls.high, prompt / calls.low
            yield Figure(
                side=side,
                quantity=quantity,
                unit="tokens/s" if is_prefill else "s/token",
                value=value,
                low=low,
                high=high,
                ratio=ratio.middle,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
                rounds=len(sides[side]),
            )


def _bytes(quantity: str, sizes: Mapping[str, int]) -> Iterator[Figure]:
    for side in SIDES:
        ratio = sizes[side] / sizes["dense"]
        yield Figure(side=side, quantity=quantity, unit="bytes", value=sizes[side], ratio=ratio)


def _parquet(took: Mapping[str, Turns]) -> bytes:
    """Every call: columns `quantity`, `side`, `round`, `seconds`."""
    rows = [
        {"quantity": quantity, "side": side, "round": number, "seconds": float(seconds)}
        for quantity, turns in took.items()
        for side, calls in turns.seconds.items()
        for number, seconds in enumerate(calls)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    return sink.getvalue()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    """The name of the processor, as far as the system tells."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
