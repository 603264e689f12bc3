"""`krony shapes`: legal Kronecker shapes of the MLP, with parameters, ranks and MACs."""

import argparse
import json
from collections.abc import Sequence

from jobs import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Print the named sizes of Krony-PT, or every shape near a budget."""
    parser = argparse.ArgumentParser(prog="krony shapes", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--near", type=int, default=0, help="only models within 0.2 %% below this many parameters"
    )
    parser.add_argument("--terms", type=int, default=1, help="up to this many terms (default 1)")
    parser.add_argument("--full-rank", action="store_true", help="only shapes that can reach full rank")
    parser.add_argument("--size", default="gpt2", choices=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    options = parser.parse_args(argv)
    from model.compress.presets import as_dicts, presets, search, table
    from model.config import SIZES, ModelError
    from pipeline.errors import ConfigError

    try:
        if options.near or options.full_rank or options.terms > 1 or options.size != "gpt2":
            size = SIZES[options.size]
            rows = search(size, near=options.near, max_terms=options.terms, full_rank=options.full_rank)
        else:
            rows = presets()
    except ModelError as err:
        raise ConfigError(str(err)) from err
    print(json.dumps(as_dicts(rows), indent=1) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("shapes"))
