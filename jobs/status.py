"""`krony status`: what is done and what is left, from records alone."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from pipeline.config.arguments import parse_words
from pipeline.config.load import load_study, read_toml


def main(argv: Sequence[str] | None = None) -> int:
    """One line per artifact that a config asks for, or per trial of a sweep; nothing heavy is loaded."""
    options, overrides = parse_words("status", argv, about=__doc__)
    if options.config and "sweep" in read_toml(options.config):
        return _sweep(options.config, overrides, as_json=options.json)
    from pipeline.plan import statuses

    rows = statuses(load_study(options.config, overrides=overrides))
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(f"{row['state']:<11}{row['address']:<58}{row['note']}")
    left = sum(row["state"] != "done" for row in rows)
    print(f"{len(rows) - left} of {len(rows)} done" + ("" if left else "; nothing is left to do"))
    return 0


def _sweep(config: Path, overrides: Sequence[str], *, as_json: bool) -> int:
    from pipeline.config.sweep import load_sweep
    from pipeline.progress import duration
    from pipeline.sweep.identity import standing

    found = standing(load_sweep(config, overrides=overrides))
    entries = found.book.entries.values()
    if as_json:
        rows = [entry.to_json() for entry in entries]
        print(
            json.dumps({"address": found.address, "published": found.is_published, "trials": rows}, indent=1)
        )
        return 0
    done = [f"{entry.tokens:,}/{entry.total_tokens:,} tokens" for entry in entries]
    wide, long = (max(map(len, words), default=0) for words in ([entry.name for entry in entries], done))
    for entry, tokens in zip(entries, done, strict=True):
        loss = f"{entry.val_loss:.4f}" if entry.val_loss is not None else "–"
        print(f"{entry.state:<10}{entry.name:<{wide}}  {tokens:>{long}}{loss:>10}  {entry.reason}".rstrip())
    if not entries:
        print(f"{found.address}: not begun; `krony sweep {config} --plan` shows its trials")
        return 0
    over = sum(entry.is_over for entry in entries)
    failed = found.book.count("failed")
    notes = [f"{failed} failed (--retry-failed runs them again)"] if failed else []
    if not found.is_published and not found.book.heard_at:
        notes.append("none has started yet: what they share comes first")
    elif not found.is_published:
        notes.append(f"last heard of {duration(max(0.0, time.time() - found.book.heard_at))} ago")
    print(" · ".join([f"{found.address}: {over} of {len(entries)} trials are over", *notes]))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("status"))
