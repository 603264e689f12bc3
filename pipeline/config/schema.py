"""The configuration of everything, as frozen dataclasses.

One `RunConfig` names one compressed model and every artifact on the way to it. The docstring under a field is
its help. A field marked `metadata=NOT_IDENTITY` cannot change a result (workers, intervals, places), so it
never forks an address. Values that make no sense cannot exist: checks that span fields live in
`__post_init__`. Loads no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from model.compress.kron_recipe import KronVL
from model.compress.recipe import MethodRecipe
from pipeline.errors import ConfigError

NOT_IDENTITY: Mapping[str, Any] = {"identity": False}


# --- corpus -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PydocsCorpus:
    """Documentation text of the installed Python and its packages: the embedded default."""

    name: Literal["pydocs"] = "pydocs"

    packages: tuple[str, ...] = ("python", "numpy")
    """Distributions to read; `python` is the standard library, `*` is everything installed."""

    max_megabytes: float = 0.0
    """Stop after this much text, in MB (10^6 bytes); 0 takes all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesCorpus:
    """Text files of yours: .txt, .jsonl, .parquet, each also .xz, .gz or .zst."""

    name: Literal["files"] = "files"

    paths: tuple[str, ...] = ()
    """Files, folders or glob patterns, relative to the config file that names them."""

    validation_paths: tuple[str, ...] = ()
    """Files whose documents are all validation; empty splits by content hash."""

    text_field: str = "text"
    """Field of a JSON line or column of a parquet file that holds the text."""

    max_megabytes: float = 0.0
    """Stop after this much text, in MB; 0 takes all of it."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("corpus.paths is empty; name at least one file, folder or glob pattern")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenWebTextCorpus:
    """OpenWebText from the Hugging Face hub, or from a local folder laid out as the hub lays it."""

    name: Literal["openwebtext"] = "openwebtext"

    repo: str = "Skylion007/openwebtext"
    """Hub dataset id, or a local folder that holds its parquet files."""

    revision: str = "79d93d786212f7344586290adb811d4ae6a1762c"
    """Pinned commit of the dataset repository; ignored for a local folder."""

    max_files: int = 0
    """Take only the first parquet files; 0 takes all."""


Corpus = Annotated[PydocsCorpus | FilesCorpus | OpenWebTextCorpus, Field(discriminator="name")]


# --- tokenizer and shards -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class BpeTokenizer:
    """Byte-level BPE with GPT-2's pattern, trained on the corpus."""

    name: Literal["bpe"] = "bpe"

    vocab_size: int = 4096
    """Tokens, the end-of-text token included; at most 65,536, so that a token is a uint16."""

    train_megabytes: float = 16.0
    """Text that the merges are learned on, in MB, from the start of the training split."""

    def __post_init__(self) -> None:
        if not 257 < self.vocab_size <= 65_536:
            raise ConfigError(f"tokenizer.vocab_size={self.vocab_size:,} must lie between 258 and 65,536")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpt2Tokenizer:
    """GPT-2's own BPE, 50,257 tokens."""

    name: Literal["gpt2"] = "gpt2"

    path: str = field(default="", metadata=NOT_IDENTITY)
    """Folder with `vocab.bpe` and `encoder.json`; empty lets tiktoken fetch them. Their hashes are
    checked.
    """


Tokenizer = Annotated[BpeTokenizer | Gpt2Tokenizer, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How documents become shards of tokens."""

    split: Literal["hash", "nanogpt"] = "hash"
    """`hash`: by content hash, stable as a corpus grows. `nanogpt`: nanoGPT's split by position
    (OpenWebText).
    """

    validation_fraction: float = 0.02
    """Share of the documents that is validation, for `hash`; `nanogpt` fixes its own 0.0005."""

    dedup: bool = True
    """Drop exact repeats of a document; counted. `nanogpt` keeps them."""

    shard_tokens: int = 100_000_000
    """Upper bound on tokens per shard; an estimate from bytes decides the plan, so real shards are
    smaller.
    """

    tokenize_workers: int = field(default=0, metadata=NOT_IDENTITY)
    """Tokenizing tasks at once; 0 uses every core of the cluster."""

    def __post_init__(self) -> None:
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1")
        if self.shard_tokens < 1024:
            raise ConfigError(f"data.shard_tokens={self.shard_tokens:,} must be at least 1,024")


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class LrMultipliers:
    """Learning-rate factors per parameter group, relative to `train.lr`."""

    factor_big: float = 1.0
    """The larger factor of each Kronecker or low-rank product."""

    factor_small: float = 1.0
    """The smaller factor."""

    embedding: float = 1.0
    """Token and position tables."""

    dense: float = 1.0
    """Everything else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """What a student learns from its teacher; only for `train.objective = "kd"`."""

    alpha: float = 0.5
    """Share of next-token cross-entropy; the rest is T^2 KL(teacher || student) of the logits."""

    temperature: float = 2.0
    """T: both models' logits are divided by it inside the KL."""

    hidden: float = 0.0
    """Weight of the error of each block's output, relative to the teacher's size, averaged over blocks."""

    attention: float = 0.0
    """Weight of KL(teacher || student) of attention rows, averaged over heads and blocks."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.alpha <= 1.0 and self.temperature > 0.0):
            raise ConfigError(
                f"train.distill.alpha={self.alpha} must lie in [0, 1], "
                f"train.distill.temperature={self.temperature} above 0"
            )
        if min(self.hidden, self.attention) < 0:
            raise ConfigError(
                f"train.distill.hidden={self.hidden} and attention={self.attention} must be 0 or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, how fast, on how much. The whole state of data and randomness is the step."""

    max_steps: int = 200
    """Optimizer steps; 0 leaves the initial weights (one-shot)."""

    batch_tokens: int = 16_384
    """Tokens per optimizer step over all workers; a multiple of `seq_len`."""

    seq_len: int = 256
    """Tokens per row; at most the context of the model."""

    micro_batch: int = field(default=8, metadata=NOT_IDENTITY)
    """Rows per forward pass and worker; changes memory and speed, not the result beyond float order."""

    lr: float = 6e-4
    """Peak learning rate."""

    min_lr_ratio: float = 0.1
    """Learning rate at the end, relative to the peak."""

    warmup_steps: int = 20
    """Steps of linear warm-up."""

    weight_decay: float = 0.1
    """Decoupled decay of matrices; never of biases, scales or LayerNorm."""

    beta1: float = 0.9
    """AdamW: decay of the first moment."""

    beta2: float = 0.95
    """AdamW: decay of the second moment."""

    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""

    objective: Literal["ce", "kd"] = "ce"
    """`ce`: next-token cross-entropy. `kd`: distillation from the teacher, as `distill` says."""

    distill: DistillConfig = field(default_factory=DistillConfig)
    """Weights of distillation."""

    lr_multipliers: LrMultipliers = field(default_factory=LrMultipliers)
    """Per-group factors."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast precision of the forward pass; weights and optimizer stay fp32."""

    compile: bool = field(default=False, metadata=NOT_IDENTITY)
    """Compile the model; worth it for runs longer than a few minutes."""

    val_every: int = field(default=50, metadata=NOT_IDENTITY)
    """Steps between validations; the last step is always validated."""

    val_tokens: int = 65_536
    """Validation tokens per measurement during training, from the start of the validation split."""

    checkpoint_every: int = field(default=100, metadata=NOT_IDENTITY)
    """Steps between checkpoints; at a stop one is always written."""

    keep_checkpoints: int = field(default=2, metadata=NOT_IDENTITY)
    """Newest checkpoints that are kept."""

    log_every: int = field(default=10, metadata=NOT_IDENTITY)
    """Steps between two progress lines and two points in the history."""

    device: Literal["auto", "cpu", "cuda", "mps"] = field(default="auto", metadata=NOT_IDENTITY)
    """Where to train; `auto` takes CUDA, then MPS, then the CPU."""

    def __post_init__(self) -> None:
        if self.batch_tokens % self.seq_len:
            raise ConfigError(
                f"train.batch_tokens={self.batch_tokens:,} must be a multiple of "
                f"train.seq_len={self.seq_len:,}"
            )
        positive = (
            "batch_tokens",
            "seq_len",
            "micro_batch",
            "val_tokens",
            "log_every",
            "val_every",
            "checkpoint_every",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.max_steps < 0 or self.lr <= 0:
            raise ConfigError(
                f"train.max_steps={self.max_steps} and train.lr={self.lr} must not be negative or zero"
            )


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
    """Published GPT-2 weights: from the hub at a pinned revision, or a local folder in the same layout."""

    name: Literal["hub"] = "hub"

    id: str = "openai-community/gpt2"
    """Hub model id, or a local folder with `config.json` and safetensors weights."""

    revision: str = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    """Pinned commit; ignored for a local folder, whose digest is its identity."""


Teacher = Annotated[ScratchTeacher | HubTeacher, Field(discriminator="name")]


# --- compression --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """The cap that a compressed model must keep; never exceeded, never rounded up."""

    params: int = 0
    """Largest number of unique parameters; 0 sets no cap."""

    convention: Literal["tied_all", "krony_no_wpe", "non_embedding"] = "tied_all"
    """What is counted: everything once, or without the position table, or without both tables."""

    tolerance: float = 0.002
    """How far below the cap the result may lie, relative; further below is an error."""

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

    batch: int = field(default=8, metadata=NOT_IDENTITY)
    """Windows per forward pass."""

    device: Literal["auto", "cpu", "cuda", "mps"] = field(default="auto", metadata=NOT_IDENTITY)
    """Where to evaluate."""


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

    ray: RayConfig = field(default_factory=RayConfig, metadata=NOT_IDENTITY)
    """Workers."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=NOT_IDENTITY)
    """MLflow."""

    def __post_init__(self) -> None:
        allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
        if not self.name or self.name.startswith(".") or not set(self.name) <= allowed:
            raise ConfigError(
                f"name={self.name!r} must be letters, digits, '-', '_' or '.', and not start with '.'"
            )
        if isinstance(self.teacher, ScratchTeacher) and self.train.seq_len > self.teacher.n_ctx:
            raise ConfigError(
                f"train.seq_len={self.train.seq_len} is longer than teacher.n_ctx={self.teacher.n_ctx}"
            )
