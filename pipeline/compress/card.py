"""The model card: what a stranger must know about an exported model, from records alone.

What it is, how it was made, what was measured, where its limits are, how to open it. No number is typed by
hand; what no record holds is not in the card, or is said to be missing.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import jinja2

from model.config import ModelSpec, Site
from pipeline.store.artifacts import Artifact, Store
from pipeline.store.records import Record

CardForm = Literal["stock", "factored"]

OPENAI = ("gpt2", "openai-community/gpt2")
"""How teachers are called whose licence we know; the larger sizes add a suffix."""

OBJECTIVES = {"ce": "next token", "kd": "distillation from the teacher"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CardScore:
    """One protocol's number."""

    protocol: str
    metric: str
    value: str
    teacher: str
    """The same of the dense teacher, or empty."""
    meaning: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What both cards of a model have in common."""

    name: str
    """A word for people."""

    spec: ModelSpec

    making: tuple[tuple[str, str], ...]
    """How it was made: what, and its value as Markdown."""

    scores: tuple[CardScore, ...] = ()

    licence: Literal["mit", ""] = ""
    """Where it follows from the teacher; else empty."""

    teacher: str = ""
    """Hub id of the published model that it was made from, where there is one."""

    has_tokenizer: bool = True
    """Whether tokenizer files lie beside the card."""


def card_of(run: Artifact, tokenizer: Artifact, store: Store) -> Card:
    """The card of a trained model as its records tell it, without scores."""
    init = _input(run.record, "init", store)
    teacher = _input(init, "teacher", store)
    tokens = _input(run.record, "tokens", store)
    source = str(teacher.settings.get("source", "")) if teacher else ""
    # Not the digest of the run: its history holds speeds, and equal models shall have equal cards.
    weights = run.record.files["model.safetensors"].sha256
    rows = [*_method(init), *_teacher(teacher), *_training(run.record), *_data(tokens, tokenizer.record)]
    return Card(
        name=str(run.record.settings.get("name", run.record.name)),
        spec=ModelSpec.from_json(json.loads(run.path("config.json").read_bytes())["model"]),
        making=(*rows, ("record", f"`{run.record.address}`, weights `{weights[:12]}`")),
        licence="mit" if source.startswith(OPENAI) else "",
        teacher=source if source.startswith(OPENAI) else "",
    )


def with_scores(card: Card, run: Artifact, store: Store) -> Card:
    """The same card with the scores that the store holds by now."""
    # One run may have been exported more than once: the weights, and so the scores, are the same.
    models = store.records("model")
    exports = {record.address for record in models if _address(record, "run") == run.record.address}
    init = _input(run.record, "init", store)
    scores = store.records("scores")
    ours, theirs = _by_protocol(scores, exports), _by_protocol(scores, {_address(init, "teacher")})
    return replace(
        card, scores=tuple(_score(name, score, theirs.get(name)) for name, score in sorted(ours.items()))
    )


def render(card: Card, form: CardForm, *, size_bytes: int) -> str:
    """The card of one folder, whose weights take `size_bytes`, as Markdown."""
    spec = card.spec
    dense = ModelSpec.dense(replace(spec.arch, n_layer=len(spec.blocks)), tied=spec.tied)
    return _template().render(
        card=card,
        form=form,
        macs=(spec if form == "factored" else dense).macs_per_token(),
        size_bytes=size_bytes,
        spec=spec,
        structure=list(_structure(spec)),
    )


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(  # noqa: S701 - Markdown, not HTML
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.undefined = jinja2.StrictUndefined
    return environment.get_template("card.md.j2")


def _method(init: Record | None) -> Iterator[tuple[str, str]]:
    if init is None:
        return
    method, budget = dict(init.config["method"]), init.config["budget"]
    yield "method", f"`{method.pop('name')}` {_code(method)}"
    yield "budget", f"at most {budget['params']:,} ({budget['convention']})" if budget["params"] else "none"
    if dense := init.metrics.get("dense_parameters"):
        yield "share of the teacher", f"{init.metrics['parameters'] / dense:.1%} of {dense:,} parameters"


def _teacher(teacher: Record | None) -> Iterator[tuple[str, str]]:
    if teacher is None:
        return
    if source := teacher.settings.get("source"):
        revision = str(teacher.config.get("revision", ""))
        name = source if revision else Path(source).name  # of a local folder only its name leaves the house
        yield "teacher", f"published weights `{name}`" + (f" at `{revision[:12]}`" if revision else "")
    else:
        yield "teacher", f"`{teacher.address}`, pretrained on {teacher.metrics.get('tokens', 0):,} tokens"


def _training(run: Record) -> Iterator[tuple[str, str]]:
    train = dict(run.config["train"])
    objective = OBJECTIVES.get(train["objective"], train["objective"])
    tokens, steps = run.metrics.get("tokens", 0), run.metrics.get("steps", 0)
    yield "recovery training", f"{tokens:,} tokens in {steps:,} steps, {objective}, seed {run.config['seed']}"
    yield "training settings", _code(train)
    if "val_loss" in run.metrics:
        before, after = run.metrics.get("val_loss_initial"), run.metrics["val_loss"]
        started = "" if before is None else f"{before:.4f} before, "
        yield "validation loss", f"{started}{after:.4f} after training, nats per token"


def _data(tokens: Record | None, tokenizer: Record) -> Iterator[tuple[str, str]]:
    if tokens is not None:
        train, val = (tokens.metrics.get(f"{side}_tokens", 0) for side in ("train", "val"))
        yield "text", f"`{_address(tokens, 'corpus')}`: {train:,} training, {val:,} validation tokens"
    yield "tokenizer", f"`{tokenizer.address}`, {tokenizer.metrics.get('vocab_size', 0):,} tokens"


def _score(protocol: str, score: Record, teacher: Record | None) -> CardScore:
    return CardScore(
        protocol=protocol,
        metric=str(score.metrics.get("metric", "value")),
        value=f"{score.metrics['value']:.5g}",
        teacher=f"{teacher.metrics['value']:.5g}" if teacher else "",
        meaning=str(score.settings.get("description", "")),
    )


def _by_protocol(scores: list[Record], of: set[str]) -> dict[str, Record]:
    """Those of the models at some addresses; the newest where there are several."""
    found = [record for record in scores if _address(record, "model") in of]
    return {str(record.config["protocol"]): record for record in sorted(found, key=lambda r: r.finished)}


def _structure(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """What stands at each kind of weight matrix, equal blocks counted together."""

    def role(site: Site) -> str:
        return site.name.split(".", 2)[2]

    count = len(spec.blocks)
    for name, group in groupby(sorted(spec.sites(), key=role), key=role):
        kinds: dict[str, int] = {}
        for site in group:
            text = f"{site.matrix.describe()} of {site.n_in}x{site.n_out}".replace("x", "×")
            kinds[text] = kinds.get(text, 0) + 1
        yield name, "; ".join(f"{text}, in {number} of {count} blocks" for text, number in kinds.items())
    head = "also the output head" if spec.tied else "the output head is a dense matrix of its own"
    yield "wte", f"{spec.embedding.describe().replace('x', '×')}; {head}"


def _code(values: Mapping[str, Any]) -> str:
    return f"`{json.dumps(values, sort_keys=True)}`" if values else ""


def _address(record: Record | None, role: str) -> str:
    return record.inputs[role].address if record and role in record.inputs else ""


def _input(record: Record | None, role: str, store: Store) -> Record | None:
    """What went in, if anything did and it is still on record; its payload may be gone."""
    try:
        return store.record(_address(record, role)) if _address(record, role) else None
    except FileNotFoundError:
        return None
