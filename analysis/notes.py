"""The notes below a comparison table: what each column measures, what words mean, which rows carry a mark."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis import names

GPT2_PARAMETERS = 124_439_808
DRIFTED, DIRTY, GONE = "†", "‡", "§"
MEANING = {
    DRIFTED: "an artifact on the path was rebuilt after it was used.",
    DIRTY: "made from code with changes that no commit holds.",
    GONE: "an artifact on the path has no record any more.",
}
BEST = (
    "best (*, bold): best at its size (parameters within 0.5 %) and track, with all not significantly worse: "
    "paired bootstrap over the text (Student's t below 30 units, McNemar for accuracy), Holm, 5 %. Where no "
    "mark is, there is no significant difference. Seed noise is not in it where a model has one seed."
)
TRACK = (
    "track: M changes MLP weights alone, A any matrix but the embeddings. The two are never ranked together; "
    "what is on none (–: dense, or with another embedding table) is ranked with nobody."
)
SEEDS = (
    "seeds: models that differ in seeds alone (of training, compression, calibration) are one row: the mean, "
    "for perplexity of the loss. Their noise is in the interval (Student's t) as the text is (bootstrap)."
)


def marks_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """What is wrong with the paths of these cells, as marks."""
    hits = {DRIFTED: False, DIRTY: False, GONE: False}
    for row in rows:
        hits[DRIFTED] |= bool(row["drifted"])
        hits[DIRTY] |= row["dirty"] is True
        hits[GONE] |= bool(row["missing"])
    return "".join(mark for mark, hit in hits.items() if hit)


def notes(
    rows: Sequence[dict[str, Any]], measures: Sequence[str], *, marks_best: bool, brief: bool
) -> tuple[str, ...]:
    """What stands below a table: each measure, each word and each mark; `brief` leaves out descriptions."""
    found = []
    for number, measure in enumerate(measures, start=1):
        row = next(row for row in rows if row["measure"] == measure)
        counts = f"{names.count(row['tokens'])} tokens, {names.count(row['windows'])} {row['unit']}s"
        if row["unit"] == "document":
            counts = f"{names.count(row['tokens'])} tokens, {names.count(row['windows'])} windows"
        about = f" {row['description']}" if row["description"] and not brief else ""
        found.append(
            f"[{number}] {row['protocol']} v{row['version']}: {counts}.{about}{_gate(rows, measure)}"
        )
    if not brief:
        found.append("without wpe: parameters as Krony-PT counts them, the position table left out.")
    if any(not row["is_dense"] for row in rows):
        found.append(
            "recovery: perplexity of the dense teacher over that of the model; accuracy over accuracy."
        )
    if any(row["track"] for row in rows):
        found.append(TRACK)
    if any(row["seeds"] > 1 for row in rows):
        found.append(SEEDS)
    if marks_best:
        found.append(BEST)
    said = {mark: [row for row in rows if mark in marks_of([row])] for mark in MEANING}
    for mark, marked in said.items():
        if marked:
            found.append(f"{'All rows:' if len(marked) == len(rows) else mark} {MEANING[mark]}")
    return tuple(found)


def _gate(rows: Sequence[dict[str, Any]], measure: str) -> str:
    """What published dense GPT-2 scores, beside what it scored here; nothing for another teacher."""
    for row in rows:
        published = row["measure"] == measure and row["is_dense"] and names.is_number(row["gate"])
        if published and row["parameters"] == GPT2_PARAMETERS and row["tokenizer"] == "gpt2":
            holds = abs(row["value"] - row["gate"]) <= row["gate_tolerance"]
            return (
                f" Gate: dense GPT-2 is published as {row['gate']:g} ± {row['gate_tolerance']:g}, here "
                f"{row['value']:.4g}: {'holds' if holds else 'FAILS, so do not compare with published rows'}."
            )
    return ""
