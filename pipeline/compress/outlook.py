"""How large a compressed model will be, exactly, before it exists: from its config alone, or with statistics.

Integers only, no weight is read. A structure that follows from statistics is exact once they are given;
before, and where it follows from the weights, only its cap is known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.config import GPT2Config, ModelError, ModelSpec
from model.decode import parse_json
from pipeline.config.schema import BudgetConfig, HubTeacher, RunConfig
from pipeline.config.sources import BpeTokenizer
from pipeline.errors import CompressError
from pipeline.store.location import Location

if TYPE_CHECKING:
    from model.compress.budget import Budget
    from model.compress.contract import Plan, Stats

    StoredStats = Callable[[], Stats | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """The size of one compressed model."""

    dense: ModelSpec
    """The teacher."""

    plan: "Plan | None"
    """What will be built; None while only the cap is known."""

    cap: int
    """Most parameters that it can have, all of them counted once."""

    @property
    def parameters(self) -> int:
        """Unique parameters; an upper bound while there is no plan."""
        return self.plan.num_parameters if self.plan else self.cap

    @property
    def share(self) -> float:
        """Parameters relative to the teacher's."""
        return self.parameters / self.dense.num_parameters("tied_all")

    @property
    def macs_per_token(self) -> int | None:
        """Multiply-accumulates per token, factored; None while there is no plan."""
        return self.plan.spec.macs_per_token("factored") if self.plan else None


def _nothing() -> None:
    """No statistics are known."""


def outlook(config: RunConfig, stats: "StoredStats" = _nothing) -> Outlook:
    """The size of the model that `config` asks for; raises CompressError if it cannot be built.

    `stats` is asked only where the structure follows from statistics.
    """
    try:
        return try_outlook(config, stats)
    except ModelError as err:
        raise CompressError(f"{config.name}: {err}") from err


def try_outlook(config: RunConfig, stats: "StoredStats" = _nothing) -> Outlook:
    """The same with the ModelError itself, for who asks whether it can be built."""
    from model.compress.contract import Unmeasured
    from model.compress.methods import make_method

    dense, budget = dense_spec(config), budget_of(config.budget)
    method, total = make_method(config.method), dense.num_parameters("tied_all")
    plan = None
    try:
        try:
            plan = method.plan(dense, budget)
        except Unmeasured:
            plan = method.plan(dense, budget, stats())
    except Unmeasured:
        uncounted = total - dense.num_parameters(budget.convention)
        return Outlook(dense=dense, plan=None, cap=budget.params + uncounted if budget.params else total)
    return Outlook(dense=dense, plan=plan, cap=plan.num_parameters)


def dense_spec(config: RunConfig) -> ModelSpec:
    """The teacher's structure, as far as it is known without building it."""
    teacher = config.teacher
    if isinstance(teacher, HubTeacher):
        folder = Location.of(teacher.id)
        if not folder.exists("config.json"):
            return ModelSpec.dense(GPT2Config())  # other published sizes are read when their folder is there
        try:
            values = parse_json(folder.read_bytes("config.json"))
        except ValueError as err:
            raise ModelError(f"not JSON: {err}") from err
        if not isinstance(values, dict):
            raise ModelError(f"holds {type(values).__name__}, expected an object")
        return _folder_spec(values)
    sizes = {name: getattr(teacher, name) for name in ("n_layer", "n_head", "n_embd", "n_ctx")}
    vocab = config.tokenizer.vocab_size if isinstance(config.tokenizer, BpeTokenizer) else 50257
    return ModelSpec.dense(GPT2Config(**sizes, vocab_size=vocab))


def budget_of(config: BudgetConfig) -> "Budget":
    """The cap of a config as the methods take it."""
    from model.compress.budget import Budget

    return Budget(
        params=config.params,
        macs=config.macs,
        kv_bytes=config.kv_bytes,
        convention=config.convention,
        tolerance=config.tolerance,
        allocate=config.allocate,
    )


def _folder_spec(values: dict[str, Any]) -> ModelSpec:
    """The structure that the `config.json` of a folder tells, stock or native; the weights are not read."""
    if "model" in values:  # native
        return ModelSpec.from_json(values["model"])
    names = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_ctx": "n_positions"}
    sizes = {ours: values[theirs] for ours, theirs in names.items()}
    activation = values.get("activation_function", "gelu_new")
    return ModelSpec.dense(GPT2Config(**sizes, vocab_size=values["vocab_size"], activation=activation))
