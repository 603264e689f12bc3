"""`krony plan`: every method at a budget, with exact parameters and MACs, or the reason why it cannot."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs import cli
from pipeline.config.arguments import LineParser

if TYPE_CHECKING:
    from model.compress.at_budget import Track


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table per budget and track; nothing is read, nothing is built."""
    from model.compress.named_budgets import MAIN_BUDGETS, NAMED_BUDGETS, named_cap
    from model.config import SIZES, ModelSpec
    from pipeline.errors import ConfigError

    parser = LineParser(prog="krony plan", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--budget", nargs="+", choices=tuple(NAMED_BUDGETS), help=f"default: {' '.join(MAIN_BUDGETS)}")
    add("--params", type=int, help="a cap of your own: most unique parameters, wpe included")
    add("--track", choices=("M", "A"), help="M: MLP weights alone may change, A: any (default: both)")
    add("--model", default="gpt2", choices=tuple(SIZES), help="what is compressed (default: gpt2)")
    add("--json", action="store_true", help="print tables as JSON, each row with its [method] table")
    options = parser.parse_args(argv)
    spec = ModelSpec.dense(SIZES[options.model])
    own = options.params
    if own is not None and not 0 < own <= spec.num_parameters():
        raise ConfigError(
            f"--params {own:,} must be above 0 and at most {spec.num_parameters():,}, all of {options.model}"
        )
    names = options.budget or (() if own else MAIN_BUDGETS)
    caps = [(name, named_cap(name, spec)) for name in names] + ([("", own)] if own else [])
    from model.compress.budget_table import budget_table

    tracks: tuple[Track, ...] = (options.track,) if options.track else ("M", "A")
    tables = [budget_table(spec, cap, track=track, name=name) for name, cap in caps for track in tracks]
    if options.json:
        print(json.dumps([table.as_dict() for table in tables], indent=1))
    else:
        print("\n\n".join(map(str, tables)))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("plan"))
