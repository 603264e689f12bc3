"""Sides that take turns, call by call, in one process: what else the machine does meets all of them alike.

A second measured today is no second measured tomorrow, so what counts is the ratio of two calls of one round,
and its median over the rounds. Knows no store and no config.
"""

# B sequences · T tokens

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Action = Callable[[], object]
Seconds = NDArray[np.float64]

_QUANTILE = 1.959964
"""Of the normal distribution, for 95 %."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with what lies around it: quartiles of a measurement, or the interval of a ratio."""

    middle: float
    low: float
    high: float

    @staticmethod
    def quartiles(values: Seconds) -> "Spread":
        """Median and quartiles."""
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        return Spread(float(middle), float(low), float(high))

    @staticmethod
    def of_ratio(above: Seconds, below: Seconds) -> "Spread":
        """Median of the ratios of each round, and its 95 % interval by order statistics.

        The interval takes the rounds as independent; it is about this measurement, not about other machines.
        """
        ratios = np.sort(above / below)
        count = len(ratios)
        reach = _QUANTILE * math.sqrt(count) / 2
        first = max(0, math.floor(count / 2 - reach))
        last = min(count - 1, math.ceil(count / 2 + reach))
        return Spread(float(np.median(ratios)), float(ratios[first]), float(ratios[last]))


@dataclass(frozen=True, eq=False, slots=True)
class Turns:
    """What `take_turns` found."""

    seconds: Mapping[str, Seconds]
    """Of each call of each side, (rounds,)."""

    held: float
    """Processor time of this process over time that went by: near 1 for one thread on an idle machine."""


class Decoding:
    """Reads the prompt, then writes one token at each call; after `tokens` of them it goes back."""

    def __init__(self, model: Any, prompt: torch.Tensor, *, tokens: int) -> None:
        """`prompt` (B, T); the model is one of transformers."""
        self._model, self._tokens, self._past = model, tokens, prompt.shape[1]
        found = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        self._cache = found.past_key_values
        self._first = self._last = found.logits[:, -1:].argmax(-1)

    def __call__(self) -> torch.Tensor:
        """The next token of every sequence, (B, 1)."""
        if self._cache.get_seq_length() >= self._past + self._tokens:
            self._cache.crop(self._past - self._cache.get_seq_length())
            self._last = self._first
        found = self._model(
            input_ids=self._last, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        last: torch.Tensor = found.logits[:, -1:].argmax(-1)
        self._last = last
        return last


def take_turns(
    sides: Mapping[str, Action],
    *,
    rounds: int,
    fewest: int = 1,
    seconds: float = math.inf,
    device: str = "cpu",
    on_round: Callable[[float], None] = lambda _: None,
) -> "Turns":
    """Time each call of each side; a round calls every side, and each begins in turn.

    Ends after `rounds`, or with the first round beyond `seconds`, but not before `fewest`. Call every side
    beforehand: first calls are slower. `on_round` hears which share of the work, or of the time, is over.
    """
    names = list(sides)
    took: dict[str, list[float]] = {name: [] for name in names}
    began, had = time.perf_counter(), time.process_time()
    for number in range(rounds):
        if number >= fewest and time.perf_counter() - began >= seconds:
            break
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            took[name].append(_timed(sides[name], device))
        spent = (time.perf_counter() - began) / seconds if seconds else 1.0
        on_round(min(1.0, (number + 1) / fewest, max((number + 1) / rounds, spent)))
    held = (time.process_time() - had) / (time.perf_counter() - began)
    return Turns({name: np.array(values) for name, values in took.items()}, held)


def _timed(action: Action, device: str) -> float:
    began = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
