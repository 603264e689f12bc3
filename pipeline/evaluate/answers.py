"""From what lm-evaluation-harness found out to `Scores`: one unit per document, its numbers as it gives them.

Two kinds of task have a place in a table: those whose documents are answered right or wrong, and those that
give a perplexity per word. Does not import the harness.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from pipeline.errors import EvaluateError
from pipeline.evaluate.protocols import Protocol
from pipeline.evaluate.result import Scores, UnitLosses
from pipeline.evaluate.sequences import ids_sha256
from pipeline.evaluate.tasks import HarnessTask

RIGHT = ("acc", "exact_match")
"""Metrics that say of each document whether the answer is right; the first that a task has is the value."""

Sample = Mapping[str, Any]
"""What the harness keeps of one document: `arguments`, `metrics` (names) and a number for each name."""


def scores_of(
    found: Mapping[str, Any],
    protocol: Protocol,
    task: HarnessTask,
    *,
    scored: Sequence[int],
    rows: int,
    ids: Sequence[int],
    settings: Mapping[str, Any],
) -> Scores:
    """The scores of `found`, the harness's results of one task, whatever it ran them on.

    `scored` are the scored tokens of each request, `ids` all tokens that were read and `rows` in how many
    sequences. Raises EvaluateError for a task that gives neither right answers nor a perplexity per word.
    """
    everything: Sequence[Sample] = found["samples"][task.name]
    kept = everything[0]["filter"]
    samples = [sample for sample in everything if sample["filter"] == kept]
    results = {
        key.removesuffix(f",{kept}"): float(value)
        for key, value in found["results"][task.name].items()
        if key.endswith(f",{kept}") and isinstance(value, int | float)
    }
    requests = iter(scored)
    counts = [sum(next(requests) for _ in sample["arguments"]) for sample in samples]
    common: dict[str, Any] = {
        "tokens": len(ids),
        "scored": sum(counts),
        "text": task.text.name if task.text else task.name,
        "text_sha256": task.text.sha256 if task.text else _digest(samples),
        "tokens_sha256": ids_sha256(ids),
        "settings": {**settings, "results": results},
    }
    names = samples[0]["metrics"]
    if "word_perplexity" in names:
        return _per_word(samples, protocol, counts, results, common | {"windows": rows})
    metric = next((name for name in RIGHT if name in names), "")
    if not metric:
        raise EvaluateError(
            f"{protocol.id}: the task gives {', '.join(names)}; a table needs {' or '.join(RIGHT)} of each "
            "document, or word_perplexity"
        )
    return _right(samples, protocol, counts, results, common | {"windows": len(samples)}, metric=metric)


def _per_word(
    samples: Sequence[Sample],
    protocol: Protocol,
    counts: Sequence[int],
    results: Mapping[str, float],
    common: Mapping[str, Any],
) -> Scores:
    nll = np.array([-float(sample["word_perplexity"][0]) for sample in samples])
    words = np.array([int(sample["word_perplexity"][1]) for sample in samples], dtype=np.int64)
    return Scores(
        protocol=_as(protocol, "perplexity"),
        value=results["word_perplexity"],
        loss=float(nll.sum() / words.sum()),
        token_loss=float(nll.sum() / sum(counts)),
        bits_per_byte=results.get("bits_per_byte"),
        unit="document",
        units=UnitLosses(index=np.arange(len(nll)), tokens=words, nll=nll),
        **common,
    )


def _right(
    samples: Sequence[Sample],
    protocol: Protocol,
    counts: Sequence[int],
    results: Mapping[str, float],
    common: Mapping[str, Any],
    *,
    metric: str,
) -> Scores:
    given = [sample[metric] for sample in samples]
    answers = [float(each) if isinstance(each, bool | int | float) else math.nan for each in given]
    count, value = len(answers), results[metric]
    if not set(answers) <= {0.0, 1.0} or not math.isclose(value, sum(answers) / count):
        raise EvaluateError(
            f"{protocol.id}: {metric} of this task is not the share of documents answered right; a table has "
            "no place for it"
        )
    one_ending = "perplexity" in samples[0]["metrics"]
    nll = np.array([-float(sample["perplexity"]) if one_ending else np.nan for sample in samples])
    tokens = np.array(counts, dtype=np.int64)
    return Scores(
        protocol=_as(protocol, "accuracy"),
        value=value,
        loss=float(nll.mean()) if one_ending else None,
        token_loss=float(nll.sum() / tokens.sum()) if one_ending else None,
        perplexity=results["perplexity"] if one_ending else None,
        stderr=math.sqrt(value * (1 - value) / max(1, count - 1)),
        unit="passage",
        units=UnitLosses(
            index=np.arange(count), tokens=tokens, nll=nll, correct=np.array(answers, dtype=np.bool_)
        ),
        **common,
    )


def _as(protocol: Protocol, metric: Literal["accuracy", "perplexity"]) -> Protocol:
    """The protocol with what the task turned out to measure."""
    return replace(protocol, metric=metric, weighting="passages" if metric == "accuracy" else "words")


def _digest(samples: Sequence[Sample]) -> str:
    """Of the documents of a task that is bound to no text of ours, in order."""
    return hashlib.sha256("".join(str(sample["doc_hash"]) for sample in samples).encode()).hexdigest()
