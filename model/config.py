"""What a GPT-2 is made of: its sizes, what stands at each weight matrix, and the exact cost. Integers only.

A `ModelSpec` says all that is needed to build the module tree: per kept block the widths of the MLP and of
the heads, at each weight matrix `Dense`, `Kron` or `LowRank`, and how the embedding is held. Parameters and
multiply-accumulates follow before a tensor exists; `model.gpt2` builds what stands here. Loads no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, Self

from model.decode import decode

Convention = Literal["tied_all", "krony_no_wpe", "non_embedding"]
"""What is counted: every unique parameter; all but `wpe` (Krony-PT); all but `wte` and `wpe`."""

MacsMode = Literal["factored", "materialize"]
"""Products without forming W, in the cheaper order; or one dense product at every weight matrix."""


class ModelError(ValueError):
    """A model cannot be built, read or compressed as asked; the message is one clear line."""


# Beyond these a config is damaged, or made to exhaust whoever plans with it.
_LARGEST = {"n_layer": 10**4, "n_head": 10**4, "n_embd": 10**6, "vocab_size": 10**7, "n_ctx": 10**7}


@dataclass(frozen=True, kw_only=True, slots=True)
class GPT2Config:
    """Sizes of a stock GPT-2; the defaults are GPT-2 small."""

    n_layer: int = 12
    """Blocks."""

    n_head: int = 12
    """Attention heads per block."""

    n_embd: int = 768
    """Width of the residual stream; the MLP is four times as wide."""

    vocab_size: int = 50257
    """Rows of the embedding."""

    n_ctx: int = 1024
    """Longest context, in tokens."""

    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every LayerNorm."""

    activation: Literal["gelu_new", "gelu"] = "gelu_new"
    """Of the MLP: GPT-2's tanh form, or the exact `gelu` of nanoGPT and Krony-PT."""

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= largest:
                raise ModelError(f"{name}={value!r:.40} must be at least 1 and at most {largest:,}")
        if not 0.0 < self.layer_norm_epsilon < 1.0 or self.activation not in ("gelu_new", "gelu"):
            raise ModelError("layer_norm_epsilon must lie between 0 and 1, activation be gelu_new or gelu")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @property
    def n_inner(self) -> int:
        """Hidden width of the MLP."""
        return 4 * self.n_embd


SIZES: Mapping[str, GPT2Config] = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
}
"""The published sizes, by name."""


# --- what can stand at a weight matrix (n_in, n_out); biases are counted by the block -----------------------


class Cost(NamedTuple):
    """What one weight matrix costs and can do, without its bias."""

    params: int
    """Entries that are stored and trained."""

    macs: int
    """Multiply-accumulates per token, without forming W."""

    rank_bound: int
    """Largest rank that W can have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """The matrix itself."""

    kind: Literal["dense"] = "dense"

    def cost(self, n_in: int, n_out: int) -> Cost:
        """Its cost at an (n_in, n_out) weight; it fits everywhere."""
        return Cost(params=n_in * n_out, macs=n_in * n_out, rank_bound=min(n_in, n_out))

    def describe(self) -> str:
        """A few characters for a table."""
        return "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kron:
    """Sum over k of s_k A_k (x) B_k, with A_k (m1, n1), B_k (m2, n2); W is (m1*m2, n1*n2)."""

    kind: Literal["kron"] = "kron"

    m1: int
    """Rows of A."""

    n1: int
    """Columns of A."""

    m2: int
    """Rows of B."""

    n2: int
    """Columns of B."""

    terms: int = 1
    """Products that are summed."""

    scales: bool = False
    """One learned scalar per term."""

    gather_in: bool = False
    """Inputs are permuted first, by an index buffer."""

    gather_out: bool = False
    """Outputs are permuted at last, before the bias, by an index buffer."""

    decay_right: bool = True
    """Whether weight decay may act on B; a pruning start must not lose its few entries."""

    def __post_init__(self) -> None:
        if min(self.m1, self.n1, self.m2, self.n2) < 1:
            raise ModelError(f"{self.describe()}: every side of a factor must be at least 1")
        if not 1 <= self.terms <= self.max_terms:
            most = self.max_terms
            raise ModelError(f"{self.describe()}: choose 1 to {most} terms, where every weight is exact")

    @property
    def max_terms(self) -> int:
        """Terms at which every weight is represented exactly."""
        return min(self.m1 * self.n1, self.m2 * self.n2)

    def transposed(self) -> "Kron":
        """The same sum for the transposed weight."""
        turned = replace(self, m1=self.n1, n1=self.m1, m2=self.n2, n2=self.m2)
        return replace(turned, gather_in=self.gather_out, gather_out=self.gather_in)

    def cost(self, n_in: int, n_out: int) -> Cost:
        """Its cost, in the cheaper contraction order; ModelError if it makes no (n_in, n_out) weight."""
        m1, n1, m2, n2 = self.m1, self.n1, self.m2, self.n2
        if (m1 * m2, n1 * n2) != (n_in, n_out):
            raise ModelError(f"{self.describe()} is a {m1 * m2}x{n1 * n2} matrix, not {n_in}x{n_out}")
        b_first, a_first = m1 * n2 * (m2 + n1), m2 * n1 * (m1 + n2)
        return Cost(
            params=self.terms * (m1 * n1 + m2 * n2 + int(self.scales)),
            macs=self.terms * min(b_first, a_first),
            # rank A (x) B = rank A * rank B
            rank_bound=min(n_in, n_out, self.terms * min(m1, n1) * min(m2, n2)),
        )

    def describe(self) -> str:
        """A few characters for a table."""
        text = f"({self.m1}x{self.n1})({self.m2}x{self.n2})"
        return text if self.terms == 1 else f"{self.terms} {text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """`first` (n_in, rank) times `second` (rank, n_out)."""

    kind: Literal["low_rank"] = "low_rank"

    rank: int
    """Inner width."""

    def cost(self, n_in: int, n_out: int) -> Cost:
        """Its cost; ModelError unless 1 <= rank <= min(n_in, n_out)."""
        if not 1 <= self.rank <= min(n_in, n_out):
            raise ModelError(f"rank {self.rank} of a {n_in}x{n_out} matrix must be 1 to {min(n_in, n_out)}")
        entries = self.rank * (n_in + n_out)
        return Cost(params=entries, macs=entries, rank_bound=self.rank)

    def describe(self) -> str:
        """A few characters for a table."""
        return f"rank {self.rank}"


Matrix = Dense | Kron | LowRank


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitQKV:
    """Query, key and value as three matrices instead of one packed `c_attn`."""

    kind: Literal["split"] = "split"
    q: Matrix = Dense()
    k: Matrix = Dense()
    v: Matrix = Dense()


@dataclass(frozen=True, slots=True)
class Site:
    """One place where a weight matrix (n_in, n_out) stands; the first `n_bias` outputs have a bias."""

    name: str
    """Module name, such as `h.0.mlp.c_fc`."""

    n_in: int
    n_out: int
    n_bias: int
    matrix: Matrix

    @property
    def cost(self) -> Cost:
        """Parameters with the bias, multiply-accumulates, rank bound."""
        cost = self.matrix.cost(self.n_in, self.n_out)
        return cost._replace(params=cost.params + self.n_bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """One kept block: its widths and its weight matrices."""

    source: int
    """Index of the block in the model that it comes from."""

    mlp_hidden: int
    """Hidden units of the MLP."""

    head_qk: int
    """Width of a query and a key, per head."""

    head_vo: int
    """Width of a value, per head."""

    qkv_bias: Literal["all", "query"] = "all"
    """`query`: key and value biases are gone, by the exact rewrites that make them zero."""

    attn_c_attn: Matrix | SplitQKV = Dense()
    """`attn.c_attn`, with q, k and v packed along the outputs; or the three apart."""

    attn_c_proj: Matrix = Dense()
    """`attn.c_proj`, from the heads to the residual stream."""

    mlp_c_fc: Matrix = Dense()
    """`mlp.c_fc`, up."""

    mlp_c_proj: Matrix = Dense()
    """`mlp.c_proj`, down."""

    def sites(self, arch: GPT2Config) -> Iterator[Site]:
        """The weight matrices in order of use, named relative to the block."""
        d, qk, vo = arch.n_embd, arch.n_head * self.head_qk, arch.n_head * self.head_vo
        has_all = self.qkv_bias == "all"
        if isinstance(self.attn_c_attn, SplitQKV):
            yield Site("attn.q", d, qk, qk, self.attn_c_attn.q)
            yield Site("attn.k", d, qk, qk if has_all else 0, self.attn_c_attn.k)
            yield Site("attn.v", d, vo, vo if has_all else 0, self.attn_c_attn.v)
        else:
            yield Site("attn.c_attn", d, 2 * qk + vo, 2 * qk + vo if has_all else qk, self.attn_c_attn)
        yield Site("attn.c_proj", vo, d, d, self.attn_c_proj)
        yield Site("mlp.c_fc", d, self.mlp_hidden, self.mlp_hidden, self.mlp_c_fc)
        yield Site("mlp.c_proj", self.mlp_hidden, d, d, self.mlp_c_proj)

    def with_matrix(self, role: str, matrix: Matrix) -> "BlockSpec":
        """A copy with `matrix` at `role`, such as `mlp.c_fc`; `attn.q`, `attn.k`, `attn.v` split `c_attn`."""
        changes: dict[str, Any] = {role.replace(".", "_"): matrix}
        if role in ("attn.q", "attn.k", "attn.v"):
            split = self.attn_c_attn if isinstance(self.attn_c_attn, SplitQKV) else SplitQKV()
            parts: dict[str, Any] = {role[-1]: matrix}
            changes = {"attn_c_attn": replace(split, **parts)}
        elif role not in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            raise ModelError(
                f"{role!r} is no weight matrix; choose attn.c_attn, attn.c_proj, mlp.c_fc or mlp.c_proj"
            )
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A whole model: what `GPT2(spec)` builds, what `config.json` of the native folder holds."""

    arch: GPT2Config
    """Sizes of the stock model that this one stands for."""

    blocks: tuple[BlockSpec, ...]
    """The kept blocks, in order."""

    embedding: Dense | Kron = Dense()
    """The token table (vocab_size, n_embd); a Kronecker one has m2 = 1."""

    tied: bool = True
    """Whether the output head is the token table; if not, it is a dense matrix of its own."""

    def __post_init__(self) -> None:
        sources, n_layer = [block.source for block in self.blocks], self.arch.n_layer
        if not sources or sources != sorted(set(sources)) or not set(sources) <= set(range(n_layer)):
            raise ModelError(f"kept blocks {sources}: expected one or more of 0 to {n_layer - 1}, ascending")
        n_inner, head_dim = self.arch.n_inner, self.arch.head_dim
        for block in self.blocks:
            widths = (block.mlp_hidden, block.head_qk, block.head_vo)
            if min(widths) < 1 or block.mlp_hidden > n_inner or max(widths[1:]) > head_dim:
                raise ModelError(
                    f"block {block.source}: (mlp_hidden, head_qk, head_vo) = {widths} must be at least 1 "
                    f"and at most {(n_inner, head_dim, head_dim)}"
                )
        for site in self.sites():
            try:
                site.matrix.cost(site.n_in, site.n_out)
            except ModelError as err:
                raise ModelError(f"{site.name}: {err}") from err
        self.embedding.cost(self.arch.vocab_size, self.arch.n_embd)
        if isinstance(self.embedding, Kron) and (self.embedding.m2 != 1 or self.embedding.gather_in):
            raise ModelError(f"wte {self.embedding.describe()}: B must have one row, rows stay in order")

    @classmethod
    def dense(cls, arch: GPT2Config, *, tied: bool = True) -> Self:
        """The stock model."""
        head = arch.head_dim
        block = BlockSpec(source=0, mlp_hidden=arch.n_inner, head_qk=head, head_vo=head)
        blocks = tuple(replace(block, source=i) for i in range(arch.n_layer))
        return cls(arch=arch, blocks=blocks, tied=tied)

    def sites(self) -> tuple[Site, ...]:
        """Every weight matrix of the blocks, in order of use; `h.{i}` counts kept blocks."""
        return tuple(
            replace(site, name=f"h.{i}.{site.name}")
            for i, block in enumerate(self.blocks)
            for site in block.sites(self.arch)
        )

    def with_matrices(self, matrices: Mapping[str, Matrix]) -> "ModelSpec":
        """A copy with other matrices at the named sites, such as `h.3.mlp.c_fc`."""
        blocks = list(self.blocks)
        for name, matrix in matrices.items():
            head, _, rest = name.partition(".")
            index, _, role = rest.partition(".")
            if head != "h" or not index.isdecimal() or int(index) >= len(blocks):
                last = len(blocks) - 1
                raise ModelError(f"{name!r} names no weight matrix; expected h.0 to h.{last} and a role")
            blocks[int(index)] = blocks[int(index)].with_matrix(role, matrix)
        return replace(self, blocks=tuple(blocks))

    def num_parameters(self, convention: Convention = "tied_all") -> int:
        """Unique trainable parameters."""
        d, table = self.arch.n_embd, self.arch.vocab_size * self.arch.n_embd
        wte, wpe = self.embedding.cost(self.arch.vocab_size, d).params, self.arch.n_ctx * d
        body = sum(site.cost.params for site in self.sites()) + 4 * d * len(self.blocks) + 2 * d
        body += 0 if self.tied else table
        return body + {"tied_all": wte + wpe, "krony_no_wpe": wte, "non_embedding": 0}[convention]

    def macs_per_token(self, mode: MacsMode = "factored", *, context: int = 0) -> int:
        """Multiply-accumulates per token, with the output head.

        `context` > 0 adds causal attention scores and sums over a full window of that many tokens, their mean
        per token rounded down; 0 leaves them out.
        """
        v, d = self.arch.vocab_size, self.arch.n_embd
        pairs = sum(self.arch.n_head * (block.head_qk + block.head_vo) for block in self.blocks)
        scores = pairs * (context + 1) // 2 if context else 0
        if mode == "materialize":
            return sum(site.n_in * site.n_out for site in self.sites()) + v * d + scores
        embedding, head = 0, v * d
        if isinstance(self.embedding, Kron):
            embedding = self.embedding.terms * d
            head = self.embedding.transposed().cost(d, v).macs if self.tied else head
        return sum(site.cost.macs for site in self.sites()) + embedding + head + scores

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read `to_json` back; an unknown key or an impossible value raises ModelError with its path."""
        if isinstance(value, dict) and isinstance(arch := value.get("arch"), dict):
            value = value | {"arch": {"activation": "gelu_new"} | arch}  # folders from before there were two
        try:
            spec = decode(cls, value, "model")
        except ValueError as err:
            raise ModelError(str(err)) from err
        assert isinstance(spec, cls)
        return spec
