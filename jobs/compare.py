"""`krony compare A B`: two models or runs side by side, from their records alone."""

import argparse
from collections.abc import Sequence

from jobs import cli
from pipeline.config.arguments import LineParser
from pipeline.config.schema import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """What differs in how they were made, their sizes, their scores with paired intervals, their matrices."""
    parser = LineParser(prog="krony compare", description=__doc__, allow_abbrev=False)
    about = "address, the beginning of one, name of a variant, or path"
    parser.add_argument("first", metavar="A", help=f"a model, run, teacher or init: {about}")
    parser.add_argument("second", metavar="B", help="the other one")
    parser.add_argument("--store", default=RunConfig().store, help="where they lie (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options: argparse.Namespace = parser.parse_args(argv)
    from analysis.versus import versus
    from analysis.versus_text import versus_text

    found = versus(options.first, options.second, store=options.store)
    print(found.json() if options.json else versus_text(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("compare"))
