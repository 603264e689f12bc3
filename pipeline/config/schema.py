"""The configuration of everything, as frozen dataclasses.

One `RunConfig` names one compressed model and every artifact on the way to it. The docstring under a field is
its help. A field marked `metadata=NOT_IDENTITY` cannot change a result (workers, intervals, places), so it
never forks an address. Values that make no sense cannot exist: checks that span fields live in
`__post_init__`. Loads no torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from model.compress.kron_recipe import KronVL
from model.compress.recipe import MethodRecipe
from model.marks import NOT_IDENTITY, UNLESS_DEFAULT
from pipeline.config.sources import BpeTokenizer, Corpus, DataConfig, PydocsCorpus, Tokenizer
from pipeline.config.speed import SpeedConfig
from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError

# --- teacher ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ScratchTeacher:
    """A GPT-2 of any size, pretrained here by the same training code."""

    name: Literal["scratch"] = "scratch"

    n_layer: int = 4
    """Blocks."""

    n_head: int = 4
    """Attention heads per block."""

    n_embd: int = 128
    """Width of the residual stream; the MLP is four times as wide."""

    n_ctx: int = 256
    """Longest context, in tokens."""

    seed: int = 0
    """Seed of its weights and its batches."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is pretrained."""

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"teacher.n_embd={self.n_embd} must be a multiple of teacher.n_head={self.n_head}"
            )
        if self.train.objective != "ce":
            raise ConfigError("teacher.train.objective='kd': a teacher has no teacher; set it to 'ce'")
        if self.train.seq_len > self.n_ctx:
            raise ConfigError(
                f"teacher.train.seq_len={self.train.seq_len} is longer than teacher.n_ctx={self.n_ctx}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HubTeacher:
    """Published GPT-2 weights: from the hub at a pinned revision, or a local folder, stock or native."""

    name: Literal["hub"] = "hub"

    id: str = "openai-community/gpt2"
    """Hub model id, or a local folder with `config.json` and safetensors weights."""

    revision: str = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    """Pinned commit; ignored for a local folder, whose digest is its identity."""


Teacher = Annotated[ScratchTeacher | HubTeacher, Field(discriminator="name")]


# --- compression --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """The caps that a compressed model must keep, all that are set; never exceeded, never rounded up."""

    params: int = 0
    """Largest number of unique parameters; 0 sets no cap."""

    macs: int = field(default=0, metadata=UNLESS_DEFAULT)
    """Largest number of multiply-accumulates per token, factored, without attention scores; 0 sets no cap."""

    kv_bytes: int = field(default=0, metadata=UNLESS_DEFAULT)
    """Most bytes of keys and values per token of the past, in bf16; 0 sets no cap."""

    convention: Literal["tied_all", "krony_no_wpe", "non_embedding"] = "tied_all"
    """What is counted: everything once, or without the position table, or without both tables."""

    tolerance: float = 0.002
    """How far below its caps the result may lie, relative; it must be as near as that to one of them."""

    allocate: Literal["uniform", "modegpt_bi", "greedy_gain"] = "uniform"
    """How the cap is spread over layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """The tokens that statistics are collected on, always of the training split."""

    sequences: int = 128
    """Sequences, each of `length` tokens."""

    length: int = 256
    """Tokens per sequence; learned positions make statistics depend on it."""

    seed: int = 0
    """Which sequences."""

    skip_first_tokens: int = 0
    """Leave out the first positions of every sequence."""

    fisher: Literal["sequence", "token"] = "sequence"
    """Squares of the gradient of a sequence, or sums of the squares of the gradients of its tokens."""

    labels: Literal["observed", "sampled"] = "observed"
    """Gradients of the loss of the text's next token, or of one drawn from the teacher (true Fisher)."""

    delta_trim: float = 0.125
    """Share of positions at each end of a sequence that `delta_gram` leaves out."""

    delta_clip: float = 10.0
    """Longest output gradient of a token in `delta_gram`, in mean lengths over its sequence."""

    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=NOT_IDENTITY)
    """Where to measure; sums are float64."""

    def __post_init__(self) -> None:
        if self.sequences < 1 or not 0 <= self.skip_first_tokens <= self.length - 2:
            raise ConfigError(
                f"calibration.sequences={self.sequences} must be at least 1, and calibration.length="
                f"{self.length} exceed calibration.skip_first_tokens={self.skip_first_tokens} by 2"
            )
        if not 0.0 <= self.delta_trim < 0.5 or self.delta_clip <= 0.0:
            raise ConfigError(
                f"calibration.delta_trim={self.delta_trim} must lie in [0, 0.5), "
                f"calibration.delta_clip={self.delta_clip} above 0"
            )


# --- evaluation, Ray, tracking ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Which protocols, on which texts."""

    protocols: tuple[str, ...] = ("corpus/val",)
    """Protocol ids, see `krony eval --list`."""

    texts: str = ""
    """Folder with local evaluation texts; empty lets `datasets` fetch pinned revisions."""

    tasks: str = field(default="", metadata=NOT_IDENTITY)
    """Folder with task files of lm-evaluation-harness, for `lm_eval/<task>`; empty: its own tasks alone."""

    max_tokens: int = 0
    """Read only the first tokens of each text, and say so in the protocol's id (`@first…`); 0 reads all."""

    precision: Literal["fp32", "bf16"] = field(default="fp32", metadata=UNLESS_DEFAULT)
    """What models compute in; with `bf16` the protocol's id says so (`@bf16`), and it is another column."""

    batch: int = field(default=8, metadata=NOT_IDENTITY)
    """Windows per forward pass."""

    device: Literal["auto", "cpu", "cuda", "mps"] = field(default="auto", metadata=NOT_IDENTITY)
    """Where to evaluate."""

    def __post_init__(self) -> None:
        if self.max_tokens != 0 and self.max_tokens < 2:
            raise ConfigError(f"eval.max_tokens={self.max_tokens} must be 0 (all) or at least 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """Where work runs; never identity."""

    workers: int = 0
    """Ray Train workers; 0 trains in this process without Ray Train."""

    address: str = ""
    """Cluster to join; empty takes RAY_ADDRESS, and starts a private local Ray where that is unset."""

    cpus_per_worker: float = 1.0
    """CPUs that one training worker holds."""

    gpus_per_worker: float = 0.0
    """GPUs that one training worker holds."""

    max_failures: int = 3
    """Restarts of a training group before the run fails."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"ray.workers={self.workers} must be 0 (no Ray Train) or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """The window on the numbers. Records and JSONL stay the truth."""

    uri: str = "auto"
    """MLflow: `auto` is SQLite beside a local store, or `http://…`, `postgresql://…`, `sqlite:///…`; `off`
    for none.
    """

    experiment: str = "krony"
    """MLflow experiment."""


# --- the whole ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One compressed model, and every artifact on the way to it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    name: str = "run"
    """A word for people; letters, digits, `-`, `_`, `.`."""

    store: str = field(default="runs/store", metadata=NOT_IDENTITY)
    """Where artifacts live: a path, or `s3://bucket/prefix`."""

    seed: int = 0
    """Seed of compression and recovery training."""

    corpus: Corpus = field(default_factory=PydocsCorpus)
    """Text."""

    tokenizer: Tokenizer = field(default_factory=BpeTokenizer)
    """Tokens."""

    data: DataConfig = field(default_factory=DataConfig)
    """Shards."""

    teacher: Teacher = field(default_factory=ScratchTeacher)
    """The model to compress."""

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Statistics."""

    method: Annotated[MethodRecipe, Field(discriminator="name")] = field(default_factory=KronVL)
    """How its matrices are replaced."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """How many parameters may remain."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """Recovery training."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measurements."""

    speed: SpeedConfig = field(default_factory=SpeedConfig, metadata=NOT_IDENTITY)
    """Measurements of speed and memory; they decide their own address alone."""

    ray: RayConfig = field(default_factory=RayConfig, metadata=NOT_IDENTITY)
    """Workers."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=NOT_IDENTITY)
    """MLflow."""

    def __post_init__(self) -> None:
        allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
        if not 0 < len(self.name) <= 100 or self.name.startswith(".") or not set(self.name) <= allowed:
            raise ConfigError(
                f"name={self.name!r:.120} must be letters, digits, '-', '_' or '.', at most 100 of them, and "
                "not start with '.'"
            )
        if isinstance(self.teacher, ScratchTeacher) and self.train.seq_len > self.teacher.n_ctx:
            raise ConfigError(
                f"train.seq_len={self.train.seq_len} is longer than teacher.n_ctx={self.teacher.n_ctx}"
            )
