"""What preparing a corpus will take, in words: shards, disk, memory, time. For `krony prepare --plan`.

Counts of a stored corpus are exact; before that they are estimates from file sizes, and say so.
"""

from dataclasses import dataclass

from pipeline.progress import duration

BYTES_PER_TOKEN = 4.2
"""English under GPT-2's BPE; a small vocabulary has less."""

TOKENS_PER_CORE_S = {"gigatoken": 6.0e6, "tiktoken": 2.0e6}
"""What one core encodes, reading, writing and Ray included (6.2 M measured with gigatoken 0.10)."""

START_S = 15.0
"""What Ray and its workers need to start."""

WORKER_BYTES = 700e6
"""Resident size of one encoding worker, for any size of the corpus; gigatoken remembers pieces of text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensOutlook:
    """The cost of a tokens artifact that is not there yet."""

    address: str
    exact: bool
    """Whether the corpus is stored, so that documents and shards are known."""

    documents: int
    text_bytes: int
    shards: int
    cores: int
    dedup: bool

    engine: str
    """Library that encodes."""

    @property
    def tokens(self) -> int:
        """Estimate of the tokens."""
        return int(self.text_bytes / BYTES_PER_TOKEN)

    @property
    def disk_bytes(self) -> int:
        """Two bytes per token; an extracted corpus takes about a third of its text besides."""
        return 2 * self.tokens

    @property
    def memory_bytes(self) -> int:
        """All workers on one machine, and the keys that deduplication sorts."""
        return int(self.cores * WORKER_BYTES + (48 * min(self.documents, 1 << 22) if self.dedup else 0))

    @property
    def seconds(self) -> float:
        """On so many cores like the one that was measured, without fetching or extracting text."""
        return START_S + self.tokens / (TOKENS_PER_CORE_S[self.engine] * self.cores)

    def __str__(self) -> str:
        known = f"{self.documents:,} documents" if self.exact else "corpus not stored yet: estimates"
        return "\n".join(
            (
                f"{self.address}",
                f"text      {self.text_bytes / 1e6:,.1f} MB, {known}",
                f"tokens    about {self.tokens:,}",
                f"shards    {self.shards:,} for training and as many for validation",
                f"disk      about {self.disk_bytes / 1e6:,.0f} MB",
                f"memory    about {self.memory_bytes / 1e9:,.1f} GB on {self.cores} cores",
                f"time      about {duration(self.seconds)} on {self.cores} cores, by {self.engine}",
            )
        )
