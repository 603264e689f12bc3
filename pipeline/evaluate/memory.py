"""How much memory a model takes while it reads and writes: weights, keys and values, activations.

On the CPU a process of its own is asked: how far its resident memory rises above what it had before the
model was loaded, libraries and their first use left out, the loading itself too. It is a figure of the
operating system, good to a megabyte or two. On CUDA it is the most that torch had allocated.
"""

import gc
import resource
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from ctypes import CDLL
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from model.config import GPT2Config, Kron, LowRank, ModelSpec
from model.export import load_native, to_dense
from model.gpt2 import GPT2
from pipeline.allocator import give_back
from pipeline.compress.served import serve
from pipeline.errors import EvaluateError
from pipeline.evaluate.turns import Decoding

_PEAK = Path("/proc/self/clear_refs")
"""Linux: writing 5 sets the peak of this process back to what it holds now."""

_MAPPED = (-3, 1 << 16)
"""glibc's M_MMAP_THRESHOLD: tensors beyond 64 KiB leave when freed, so what counts is what is in use."""

_TINY = ModelSpec.dense(GPT2Config(n_layer=1, n_head=2, n_embd=64, n_ctx=8, vocab_size=64)).with_matrices(
    {"h.0.mlp.c_fc": Kron(m1=8, n1=16, m2=8, n2=16, terms=2), "h.0.mlp.c_proj": LowRank(rank=8)}
)
"""Uses every kind of matrix: the code of libraries that it touches is no memory of the models behind it."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model that another process can load."""

    folder: str
    """Native folder."""

    is_materialised: bool
    """Whether it is multiplied out first."""

    def load(self) -> GPT2:
        """The model, on the CPU."""
        model = load_native(Path(self.folder))
        return to_dense(model) if self.is_materialised else model


@dataclass(frozen=True, slots=True)
class Load:
    """What a model is given to do."""

    prompt: int
    past: int
    tokens: int
    batch: int
    """Sequences decoded at once."""

    dtype: str
    threads: int


def resident_peaks(sides: Mapping[str, Weights], load: Load) -> dict[str, int]:
    """Bytes of resident memory that each side adds at its peak, each in a fresh process of its own.

    Raises EvaluateError if such a process is lost, for instance because memory ran out.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])
    found = {}
    for name, weights in sides.items():
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                found[name] = pool.submit(_resident_peak, weights, load).result()
            except BrokenProcessPool as err:
                raise EvaluateError(
                    f"{weights.folder}: the process that measures memory was lost, most likely because there "
                    "was no more; make speed.batches or speed.past smaller"
                ) from err
    return found


def cuda_peak(model: Any, load: Load) -> int:
    """Most bytes that torch allocated on the device while `model`, which lies there alone, worked."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work(model, load)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


@torch.inference_mode()
def work(model: Any, load: Load) -> None:
    """Read one prompt, then write `tokens` tokens in `batch` sequences at once."""
    device = model.device
    model(torch.zeros(1, load.prompt, dtype=torch.long, device=device), use_cache=True, logits_to_keep=1)
    step = Decoding(
        model, torch.zeros(load.batch, load.past, dtype=torch.long, device=device), tokens=load.tokens
    )
    for _ in range(load.tokens):
        step()


def _resident_peak(weights: Weights, load: Load) -> int:
    if sys.platform == "linux":
        CDLL(None).mallopt(*_MAPPED)
    torch.set_num_threads(load.threads)
    dtype = getattr(torch, load.dtype)
    for tiny in (GPT2(_TINY), to_dense(GPT2(_TINY))):  # what every model pays once
        work(serve(tiny).to(dtype), Load(4, 4, 2, 2, load.dtype, load.threads))
    before = _resident("VmRSS")
    model = serve(weights.load()).to(dtype)
    _forget_loading()
    work(model, load)
    return max(0, _resident("VmHWM") - before)


def _forget_loading() -> None:
    """Give back what loading left behind, and let the peak begin from here; Linux alone can do that."""
    gc.collect()
    give_back()
    if sys.platform == "linux":
        _PEAK.write_text("5")


def _resident(what: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of resident memory now, or at the peak; off Linux always at the peak, with loading."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS
