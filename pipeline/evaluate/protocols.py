"""Protocols: what a number means. A table cell without a protocol id does not exist.

A protocol fixes the text, how it is cut into windows, what is scored and how windows are averaged; two
numbers may share a column only if they share the id. A changed meaning is a new version. A model whose
context is shorter than the window cannot follow the protocol as written: `at_context` gives the variant it
can follow, under an id of its own (`krony/wt103@ctx256`); `at_tokens` the variant that reads only the first
tokens of a text (`corpus/val@first131072`); `at_precision` the variant that the model computes in bf16
(`corpus/val@bf16`). `lm_eval/<task>` is any task of lm-evaluation-harness; those listed here are bound to
texts of ours. The `gate` is what published dense GPT-2 must score before anything is compared.
Loads no torch.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.errors import ConfigError

Metric = Literal["perplexity", "accuracy"]
Targets = Literal["inside", "shifted", "last-word", "harness"]
Weighting = Literal["windows", "tokens", "words", "passages"]
Precision = Literal["fp32", "bf16"]

VALIDATION = "corpus-validation"
"""The text name that stands for the validation shards of a tokens artifact."""

HARNESS = "lm_eval/"
"""How the ids begin under which lm-evaluation-harness asks and counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """What published dense GPT-2 (124M) scores under a protocol."""

    value: float
    tolerance: float
    source: str

    def holds(self, value: float) -> bool:
        """Whether a measurement of dense GPT-2 agrees."""
        return abs(value - self.value) <= self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way to turn a model into a number."""

    id: str
    """Name in tables and records."""

    text: str
    """Name of the evaluation text (`texts.TEXTS`), `VALIDATION`, or nothing: a task brings its own."""

    about: str
    """One sentence for the page, with `{window}` and `{stride}` where they are said."""

    version: int = 1
    """Raised when the meaning changes."""

    metric: Metric = "perplexity"
    """What `value` is; a perplexity is better lower, an accuracy better higher."""

    window: int = 1024
    """Tokens that the model sees at once."""

    stride: int = 1024
    """Tokens between the starts of two windows; what overlaps is read again and not scored again."""

    targets: Targets = "inside"
    """`inside`: the first token of a window has no prediction. `shifted`: targets cross the window edge.
    `harness`: as the task of lm-evaluation-harness says."""

    weighting: Weighting = "tokens"
    """`windows`: mean of the window means, a short last one counting fully. `tokens`: every token alike.
    `words`: losses of tokens, divided by the words of the text."""

    gpt2_tokens: int | None = None
    """Tokens of the whole text, rows joined, under GPT-2's BPE; another count is another text."""

    limit: int = 0
    """Only the first tokens of the text are read, so many; 0 reads all of it."""

    precision: Precision = "fp32"
    """What the model computes in; softmax and sums are fp32 and fp64 in any case."""

    gate: Gate | None = None
    """Published value of dense GPT-2, where one exists."""

    @property
    def task(self) -> str:
        """The name of the task in lm-evaluation-harness; empty for a protocol that is measured without it."""
        if self.targets != "harness":
            return ""
        return str(_MARKS.fullmatch(self.id)["base"]).removeprefix(HARNESS)  # type: ignore[index]

    @property
    def description(self) -> str:
        """One sentence for the page."""
        part = f" Only the first {self.limit:,} tokens." if self.limit else ""
        half = " Computed in bf16." if self.precision == "bf16" else ""
        return self.about.format(window=f"{self.window:,}", stride=f"{self.stride:,}") + part + half

    def at_context(self, n_ctx: int) -> "Protocol":
        """The protocol for a model that sees `n_ctx` tokens: itself, or its `@ctx` variant."""
        if n_ctx >= self.window:
            return self
        return replace(
            self,
            id=_variant(self.id, ctx=n_ctx),
            window=n_ctx,
            stride=max(1, self.stride * n_ctx // self.window),
            gate=None,
        )

    def at_tokens(self, limit: int) -> "Protocol":
        """The protocol on the first `limit` tokens of its text, for a quick look; 0 is all of them.

        What scores passages, and a task of the harness, keeps all of them: there the text is the benchmark.
        """
        if limit == 0 or self.targets in ("last-word", "harness"):
            return self
        return replace(self, id=_variant(self.id, first=limit), limit=limit, gate=None)

    def at_precision(self, precision: Precision) -> "Protocol":
        """The protocol for a model that computes so: its numbers differ a little, so it is another column."""
        if precision == self.precision:
            return self
        return replace(self, id=_variant(self.id, half=precision), precision=precision, gate=None)


def _variant(
    protocol_id: str, *, ctx: int | None = None, first: int | None = None, half: Precision | None = None
) -> str:
    """The id with its marks in one order, a given one replacing the one that stands there."""
    marks = _MARKS.fullmatch(protocol_id).groupdict()  # type: ignore[union-attr]
    given = {"ctx": ctx and f"ctx{ctx}", "first": first and f"first{first}", "half": half}
    kept = (given[name] or marks[name] for name in given)
    return "@".join([str(marks["base"]), *(str(mark) for mark in kept if mark)])


def _krony(name: str, *, text: str, title: str, tokens: int, gate: float) -> tuple[Protocol, Protocol]:
    """A Krony-PT protocol and its `@shifted` variant, which the original selects checkpoints with."""
    about = (
        f"Test split of {title}, rows joined by a blank line, no BOS; windows of {{window}} tokens without "
        "overlap, {edge}; exp of the unweighted mean of the window means (Krony-PT)."
    )
    plain = Protocol(
        id=f"krony/{name}",
        text=text,
        about=about.replace("{edge}", "the first token of each window never scored"),
        weighting="windows",
        gpt2_tokens=tokens,
        gate=Gate(value=gate, tolerance=0.05, source="Krony-PT README; arXiv 2412.12351v2 Table V"),
    )
    shifted = replace(
        plain,
        id=f"krony/{name}@shifted",
        targets="shifted",
        about=about.replace("{edge}", "targets shifted across the window edge"),
        gate=None,
    )
    return plain, shifted


def _last_word(name: str, *, text: str, title: str, gate: Gate | None) -> Protocol:
    return Protocol(
        id=f"lambada/{name}_last_word",
        text=text,
        about=f"{title}: share of 5,153 passages whose last word is the greedy continuation (lm-eval).",
        metric="accuracy",
        targets="last-word",
        weighting="passages",
        gate=gate,
    )


def _harness(task: str, about: str, *, text: str = "", gate: Gate | None = None) -> Protocol:
    return Protocol(
        id=f"{HARNESS}{task}",
        text=text,
        about=about,
        metric="accuracy",
        targets="harness",
        weighting="passages",
        gate=gate,
    )


_LAMBADA = Gate(value=0.3256, tolerance=0.0065, source="lm-evaluation-harness issue 2159")
_ALL: tuple[Protocol, ...] = (
    *_krony("wt103", text="wikitext-103-v1", title="WikiText-103 (with <unk>)", tokens=286_657, gate=29.16),
    *_krony("wt2", text="wikitext-2-v1", title="WikiText-2 (with <unk>)", tokens=297_300, gate=24.67),
    *_krony("lambada_text", text="lambada", title="LAMBADA, whole passages", tokens=429_710, gate=45.28),
    Protocol(
        id="raw/wt2@1024",
        text="wikitext-2-raw-v1",
        about="Test split of raw WikiText-2, token-weighted, windows of {window} tokens without overlap.",
        gpt2_tokens=287_644,
        gate=Gate(value=29.9, tolerance=0.1, source="Sparsebit issue 125 reports 29.96"),
    ),
    Protocol(
        id="raw/wt2@512",
        text="wikitext-2-raw-v1",
        about="Test split of raw WikiText-2, token-weighted, windows of {window} tokens at stride {stride}; "
        "the overlap is context only.",
        stride=512,
        gpt2_tokens=287_644,
    ),
    Protocol(
        id="corpus/val",
        text=VALIDATION,
        about="Validation split of the training corpus, token-weighted, windows of {window} tokens; "
        "every token but the first is scored once.",
        targets="shifted",
    ),
    _last_word(
        "openai",
        text="lambada-openai",
        title="LAMBADA, OpenAI's text",
        gate=_LAMBADA,
    ),
    _last_word("standard", text="lambada", title="LAMBADA, standard text", gate=None),
    _harness(
        "lambada_openai",
        "LAMBADA, OpenAI's text, asked and counted by lm-evaluation-harness: accuracy and perplexity.",
        text="lambada-openai",
        gate=_LAMBADA,
    ),
    _harness(
        "lambada_standard",
        "LAMBADA, standard text, asked and counted by lm-evaluation-harness: accuracy and perplexity.",
        text="lambada",
    ),
    replace(
        _harness(
            "wikitext",
            "Test split of raw WikiText-2 by lm-evaluation-harness: 62 pages, detokenised, in windows of "
            "{window} tokens that score each once; perplexity per word of the text before that.",
            text="wikitext-2-raw-v1",
        ),
        metric="perplexity",
        weighting="words",
    ),
)

PROTOCOLS: Mapping[str, Protocol] = {protocol.id: protocol for protocol in _ALL}
"""Every protocol by id."""

_MARKS = re.compile(r"(?P<base>.+?)(?:@(?P<ctx>ctx\d+))?(?:@(?P<first>first\d+))?(?:@(?P<half>bf16))?")


_TASK = re.compile(re.escape(HARNESS) + r"[A-Za-z0-9][\w.-]*")


def get_protocol(protocol_id: str) -> Protocol:
    """The protocol of an id with all its marks (`@ctx…`, `@first…`, `@bf16`); raises ConfigError for others.

    Whether the harness has a task is not known here: that is found out where it is asked.
    """
    match = _MARKS.fullmatch(protocol_id)
    if match and (match["base"] in PROTOCOLS or _TASK.fullmatch(match["base"])):
        base = PROTOCOLS.get(match["base"]) or _other_task(match["base"])
        n_ctx = int((match["ctx"] or f"ctx{base.window}").removeprefix("ctx"))
        limit = int((match["first"] or "first0").removeprefix("first"))
        if match["ctx"] and not 1 < n_ctx < base.window:
            raise ConfigError(
                f"protocol {protocol_id!r}: the context must lie between 2 and {base.window - 1:,} tokens"
            )
        return base.at_context(n_ctx).at_tokens(limit).at_precision("bf16" if match["half"] else "fp32")
    near = difflib.get_close_matches(protocol_id, PROTOCOLS, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"unknown protocol {protocol_id!r}{hint} Known: {', '.join(PROTOCOLS)}")


def _other_task(protocol_id: str) -> Protocol:
    task = protocol_id.removeprefix(HARNESS)
    return _harness(task, f"Task {task} of lm-evaluation-harness, on the documents that the task names.")
