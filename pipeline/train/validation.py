"""Validation loss during training: nats per token over the first `val_tokens` of the validation split.

Windows stand end to end, the last one may be shorter, so every token is predicted once. Ranks take contiguous
shares; sums of losses and of tokens are added up, never means.
"""

from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.data.batches import TokenStream
from pipeline.errors import DataError
from pipeline.train.schedule import micro_batches
from pipeline.train.topology import Topology

_PROBE_WINDOWS = 4


def require_known(tokens: npt.NDArray[np.integer], *, vocabulary: int, where: str) -> None:
    """Raise DataError if a token is none of the model's."""
    largest = int(tokens.max(initial=0))
    if largest >= vocabulary:
        raise DataError(
            f"{where}: holds token {largest:,}, the model knows {vocabulary:,}; "
            "the shards were made with another tokenizer than the model's"
        )


class Validation:
    """The windows to be predicted, and the loss on them."""

    def __init__(self, stream: TokenStream, *, seq_len: int, tokens: int, micro_batch: int) -> None:
        """At most `tokens` predicted tokens in windows of `seq_len`, `micro_batch` windows at once."""
        self._stream, self._micro_batch = stream, micro_batch
        predicted = min(tokens, len(stream) - 1)
        if predicted < 1:
            raise DataError(
                f"the validation shards hold {len(stream):,} tokens, at least 2 are needed; "
                "take a larger data.validation_fraction or more text"
            )
        self._windows = [(start, min(seq_len, predicted - start)) for start in range(0, predicted, seq_len)]
        self.tokens = predicted

    def read(self) -> npt.NDArray[np.integer]:
        """Every token of the windows, the last target included."""
        return self._stream.read(0, self.tokens + 1)

    def loss(self, model: nn.Module, topology: Topology, *, autocast: AbstractContextManager[None]) -> float:
        """Token-weighted mean loss in nats, the same on every rank."""
        count = len(self._windows)
        share = self._windows[
            count * topology.rank // topology.world : count * (topology.rank + 1) // topology.world
        ]
        total = self._sum(model, share, topology.device, autocast)
        topology.sum_(total)
        return float(total.item()) / self.tokens

    def probe(
        self, model: nn.Module, device: torch.device, *, autocast: AbstractContextManager[None]
    ) -> float:
        """Mean loss on the first few windows, without other ranks: cheap, and comparable across a restart."""
        windows = self._windows[:_PROBE_WINDOWS]
        total = self._sum(model, windows, device, autocast)
        return float(total.item()) / sum(length for _, length in windows)

    def _sum(
        self,
        model: nn.Module,
        windows: list[tuple[int, int]],
        device: torch.device,
        autocast: AbstractContextManager[None],
    ) -> Tensor:
        exact = torch.float32 if device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=exact, device=device)
        full = [window for window in windows if window[1] == windows[0][1]]
        model.eval()
        with torch.no_grad():
            for group in (full, windows[len(full) :]):  # the last window may be shorter: on its own
                for part in micro_batches(len(group), self._micro_batch):
                    rows = np.stack([self._stream.read(start, length + 1) for start, length in group[part]])
                    held = torch.from_numpy(rows.astype(np.int64)).to(device)
                    with autocast:
                        total += model(held[:, :-1], held[:, 1:]).to(exact)
        model.train()
        return total
