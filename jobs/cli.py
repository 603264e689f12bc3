"""`krony <verb> …`: dispatch by name, one line per error, the documented exit codes.

A verb is a module of this folder with `main(argv) -> int`; it is imported only when it is called, so help
stays light.
"""

import importlib
import keyword
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from pipeline.errors import KronyError
from pipeline.interrupt import is_abandoned

VERBS = {
    "run": "the whole chain: corpus to comparison table",
    "doctor": "is this machine, cluster, store and tracker ready?",
    "prepare": "corpus to tokenizer and shards of tokens",
    "compress": "teacher to compressed model",
    "train": "recovery training of a compressed model",
    "export": "trained model to folders that others can load",
    "eval": "model to scores, by protocol",
    "speed": "models to speed and memory, against their teacher",
    "sweep": "many runs over axes and seeds: plan, train, compare",
    "report": "records to tables, plots and one page",
    "compare": "two models or runs side by side",
    "status": "what is done, running and left",
    "shapes": "legal Kronecker shapes with parameters, ranks and MACs",
    "plan": "every method at a budget: exact parameters and MACs, or why it cannot",
    "import": "a Krony-PT or nanoGPT checkpoint to folders of ours",
    "submit": "any of these as a job on a Ray cluster",
    "job": "the jobs on a Ray cluster: list, follow, stop",
}

_HELP = (
    "usage: krony <verb> [CONFIG.toml] [options]\n\n{verbs}\n\nEach verb has --help.  "
    "Exit codes: 0 done, 1 failed, 2 usage or config, 3 not ready, 130 interrupted."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP.format(verbs="\n".join(f"  {verb:<10}{about}" for verb, about in VERBS.items())))
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"krony {version('krony')}")
        return 0
    return run(words[0], words[1:])


def run(verb: str, argv: Sequence[str] | None = None) -> int:
    """Run `jobs.<verb>` : a KronyError is one line and its exit code, a bug of ours keeps its traceback."""
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(VERBS)}"
        return _fail(f"krony: unknown verb {verb!r}; {hint}", 2)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        module = f"{verb}_" if keyword.iskeyword(verb) else verb
        return int(importlib.import_module(f"jobs.{module}").main(argv))
    except KronyError as err:
        return _fail(f"krony {verb}: {err.line}", err.exit_code)
    except KeyboardInterrupt:
        return _fail(
            f"krony {verb}: interrupted; what is finished is kept, the same command goes on from there", 130
        )
    except BrokenPipeError:  # `krony report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    if is_abandoned():
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
