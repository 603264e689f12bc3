"""What a measurement of speed and memory does: section `[speed]`. Loads no torch.

The settings that say what is measured are the protocol, and part of the address; how long it may take is not.
"""

from dataclasses import dataclass, field
from typing import Literal

from model.marks import NOT_IDENTITY
from pipeline.errors import ConfigError

FEWEST_ROUNDS = 6
"""Made however long they take: the outermost of five hold the median in 94 % of cases, of six in 97 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedConfig:
    """How fast a model reads and writes, on what."""

    enabled: bool = field(default=False, metadata=NOT_IDENTITY)
    """Whether `krony run` measures it too, last; `krony speed` does in any case."""

    prompt: int = 0
    """Tokens of the one sequence that prefill reads; 0 is half of the model's context."""

    past: int = 32
    """Tokens per sequence that decoding begins behind."""

    tokens: int = 32
    """Tokens decoded one by one behind the past, before decoding goes back to it."""

    batches: tuple[int, ...] = (1, 32)
    """Sequences that are decoded at once: one measurement of each."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to measure; there is no `auto`, because the address says it."""

    threads: int = 1
    """Threads of the CPU that one call may use."""

    rounds: int = field(default=100, metadata=NOT_IDENTITY)
    """Most calls of each side for one quantity."""

    seconds: float = field(default=3.0, metadata=NOT_IDENTITY)
    """Longest time for one quantity, warm-up left out; six rounds are made in any case."""

    def __post_init__(self) -> None:
        if self.prompt < 0 or min(self.past, self.tokens, self.threads) < 1:
            raise ConfigError(
                f"speed.prompt={self.prompt} must be 0 or more; speed.past={self.past}, speed.tokens="
                f"{self.tokens} and speed.threads={self.threads} at least 1"
            )
        if self.rounds < FEWEST_ROUNDS:
            raise ConfigError(f"speed.rounds={self.rounds} must be {FEWEST_ROUNDS} or more")
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise ConfigError(f"speed.batches={list(self.batches)} must be different numbers, 1 or more each")
        if not 0.0 <= self.seconds < float("inf"):
            raise ConfigError(f"speed.seconds={self.seconds} must be 0 or more, and finite")

    def prompt_at(self, context: int) -> int:
        """Tokens of the prompt for a model of this context; raises ConfigError if something does not fit."""
        prompt = self.prompt or max(1, context // 2)
        if prompt > context:
            raise ConfigError(f"speed.prompt={prompt} is longer than the model's context, {context}")
        if self.past + self.tokens > context:
            raise ConfigError(
                f"speed.past={self.past} and speed.tokens={self.tokens} are together longer than the model's "
                f"context, {context}"
            )
        return prompt
