"""`krony status`: what is done and what is left, from records alone."""

import json
from collections.abc import Sequence

from jobs import cli
from pipeline.config.arguments import parse


def main(argv: Sequence[str] | None = None) -> int:
    """One line per artifact that a config asks for; nothing heavy is loaded."""
    arguments = parse("status", argv, about=__doc__)
    from pipeline.plan import statuses

    rows = statuses(arguments.study)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(f"{row['state']:<11}{row['address']:<58}{row['note']}")
    left = sum(row["state"] != "done" for row in rows)
    print(f"{len(rows) - left} of {len(rows)} done" + ("" if left else "; nothing is left to do"))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("status"))
