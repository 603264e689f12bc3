"""How long, how fast, on how much: section `[train]`, of students and teachers. Loads no torch."""

from dataclasses import dataclass, field
from typing import Literal

from model.marks import NOT_IDENTITY, UNLESS_DEFAULT
from pipeline.errors import ConfigError


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

    embedding: float = field(default=0.0, metadata=UNLESS_DEFAULT)
    """Weight of the error of what enters the first block, relative to the teacher's size (KnGPT2)."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.alpha <= 1.0 and self.temperature > 0.0):
            raise ConfigError(
                f"train.distill.alpha={self.alpha} must lie in [0, 1], "
                f"train.distill.temperature={self.temperature} above 0"
            )
        if min(self.hidden, self.attention, self.embedding) < 0:
            raise ConfigError(
                f"train.distill.hidden={self.hidden}, attention={self.attention} and "
                f"embedding={self.embedding} must be 0 or more"
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

    recompute: Literal["none", "mlp", "block"] = field(default="none", metadata=NOT_IDENTITY)
    """What the backward pass makes again instead of keeping it: less memory, more time, the same result."""

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

    @property
    def total_tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.max_steps * self.batch_tokens

    def step_at(self, tokens: int) -> int:
        """The first step after which at least so many tokens were read."""
        return -(-tokens // self.batch_tokens)
