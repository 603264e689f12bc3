"""lm-evaluation-harness over our models: its questions and its counting, our network, tokenizer and records.

The one file that imports `lm_eval`. `KronyLM` answers what the harness asks of any model (how likely is this
continuation, how likely is this document, go on from here); `evaluate_task` lets it ask, and makes of its
answers the same `Scores` as every other protocol, one unit per document, so that intervals and tests work.
"""

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tiktoken
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from model.gpt2 import GPT2
from pipeline.errors import EvaluateError
from pipeline.evaluate.answers import scores_of
from pipeline.evaluate.protocols import Protocol
from pipeline.evaluate.result import LARGEST_LOSS, Scores
from pipeline.evaluate.tails import Tail, score_tails
from pipeline.evaluate.tasks import (
    HarnessTask,
    harness_version,
    is_group,
    own_task_file,
    require_known_version,
    task_file,
    write_bound,
)
from pipeline.evaluate.texts import hub_without_bars
from pipeline.progress import Progress

FEWSHOT_SEED = 1234
"""The harness's own default: which examples stand before a question."""

Pair = tuple[tuple[str, str], list[int], list[int]]
"""A request in words, its context in tokens, its continuation in tokens."""


class KronyLM(TemplateLM):  # type: ignore[misc]  # the harness has no type information
    """A model of ours as the harness wants one; keeps the tokens of what it was asked.

    A context that is too long is cut from the left, trailing spaces of a context belong to the continuation
    and an empty context is one end-of-text token: all as the harness's own class for transformers has it.
    Text is text: `<|endoftext|>` in a document is not the special token.
    """

    def __init__(
        self, model: GPT2, encoding: tiktoken.Encoding, *, batch: int, window: int, name: str, quiet: bool
    ) -> None:
        """`window` and `name` are the protocol's; the model stays on its device."""
        super().__init__()
        self._model, self._encoding, self._batch = model, encoding, batch
        self._progress, self._window = (name, quiet), window
        self._device = next(model.parameters()).device
        self.ids: list[int] = []
        """Everything that was read, in the order of the documents."""
        self.scored: list[int] = []
        """Scored tokens of each request, in order."""
        self.rows = 0
        """Sequences that went through the model."""

    @property
    def eot_token_id(self) -> int:
        """What stands before a document."""
        return self._encoding.eot_token

    @property
    def max_length(self) -> int:
        """Tokens that the protocol lets the model see at once."""
        return self._window

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Tokens of a text; GPT-2 puts none of its own around it."""
        return self._encoding.encode_ordinary(string)

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, is it the greedy continuation) of every (context, continuation)."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        tails = [self._tail(before + target, len(target), text) for text, before, target in requests]
        self.ids += [token for tail in tails for token in tail.ids]
        self.scored += [tail.targets for tail in tails]
        nll, greedy = self._score(tails)
        return [(-loss, right) for loss, right in zip(nll, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Log-likelihood of whole documents: each token once, its window as full as the document allows."""
        tails: list[Tail] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(
                tokens, prefix_token=self.eot_token_id, max_seq_len=self.max_length, context_len=1
            )
            for before, target in map(make_disjoint_window, cut):
                tails.append(self._tail(before + target, len(target), request.args))
                owners.append(owner)
            self.ids += tokens
            self.scored.append(len(tokens))
        nll = self._score(tails)[0]
        totals = [0.0] * len(requests)
        for owner, loss in zip(owners, nll, strict=True):
            totals[owner] -= loss
        return totals

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Greedy continuations, each up to one of its stop words or its number of tokens; no cache."""
        name, quiet = self._progress
        answers = []
        with Progress("eval", len(requests), unit=f"answers of {name}", quiet=quiet) as progress:
            for request in requests:
                answers.append(self._go_on(*request.args))
                progress.update(len(answers))
        return answers

    def _go_on(self, context: str, settings: Mapping[str, Any]) -> str:
        options = normalize_gen_kwargs(dict(settings))
        if options["do_sample"]:
            raise EvaluateError(
                f"{self._progress[0]}: the task draws its answers; only greedy ones are comparable"
            )
        stops = [stop for stop in handle_stop_sequences(options.get("until"), eos=None) if stop]
        room = int(options["max_gen_toks"])
        if room >= self.max_length:
            raise EvaluateError(
                f"{self._progress[0]}: the task asks for up to {room:,} tokens, the model sees "
                f"{self.max_length:,} in all; set max_gen_toks in a task file of yours, or "
                "evaluate a model with a longer context"
            )
        ids = self.tok_encode(context)[-(self.max_length - room) :] or [self.eot_token_id]
        self.ids += ids
        self.scored.append(0)
        self.rows += 1
        answer: list[int] = []
        self._model.eval()
        while len(answer) < room:
            row = torch.tensor([ids + answer], device=self._device)
            token = int(self._model(row)[0, -1].argmax())
            if token == self.eot_token_id:
                break
            answer.append(token)
            if any(stop in self._encoding.decode(answer) for stop in stops):
                break
        text = self._encoding.decode(answer)
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def _tail(self, ids: list[int], targets: int, text: Sequence[str]) -> Tail:
        if not 0 < targets < len(ids) or targets > self.max_length:
            raise EvaluateError(
                f"{self._progress[0]}: {targets:,} tokens to score in a request of {len(ids):,}, the model "
                f"sees {self.max_length:,}: {str(text[-1])[-60:]!r}"
            )
        return Tail(tuple(ids[-(self.max_length + 1) :]), targets)

    def _score(self, tails: Sequence[Tail]) -> tuple[list[float], list[bool]]:
        name, quiet = self._progress
        self.rows += len(tails)
        with Progress("eval", len(tails), unit=f"requests of {name}", quiet=quiet) as progress:
            nll, greedy = score_tails(self._model, tails, batch=self._batch, progress=progress)
        if not all(
            loss < LARGEST_LOSS * tail.targets for loss, tail in zip(nll, tails, strict=True)
        ):  # NaN too
            raise EvaluateError(
                f"{name}: the model gives no finite loss for a request; its weights diverged or are damaged: "
                "look at the loss curve of its run"
            )
        return nll.tolist(), greedy.tolist()


def evaluate_task(
    model: GPT2,
    protocol: Protocol,
    task: HarnessTask,
    encoding: tiktoken.Encoding,
    *,
    batch: int,
    quiet: bool = False,
) -> Scores:
    """Let the harness ask `task`; raises EvaluateError for one that is not there or gives no number of ours.

    The value is the perplexity per word, or the share of right answers; all that the harness says of the task
    stands in the settings.
    """
    lm = KronyLM(model, encoding, batch=batch, window=protocol.window, name=protocol.id, quiet=quiet)
    hub_without_bars()
    with _quiet_harness(), TemporaryDirectory(prefix="krony-lm-eval-") as folder:
        asked = _load(task, Path(folder))
        if asked.get_config("num_fewshot") is None:
            asked.set_config(key="num_fewshot", value=0)
        asked.set_fewshot_seed(seed=FEWSHOT_SEED)
        try:
            found = evaluate(lm, {"tasks": {task.name: asked}, "groups": {}}, bootstrap_iters=0)
        except (ValueError, ImportError, OSError) as err:  # a bug of ours stays one
            raise EvaluateError(f"{protocol.id}: the harness cannot run this task here: {err}") from err
    require_known_version(task, found["versions"][task.name])
    settings = {
        "lm_eval": harness_version(),
        "task_version": found["versions"][task.name],
        "num_fewshot": found["n-shot"][task.name],
    }
    return scores_of(found, protocol, task, scored=lm.scored, rows=lm.rows, ids=lm.ids, settings=settings)


def _load(task: HarnessTask, folder: Path) -> Any:
    """The task and its data: written to `folder` if bound to our text, else the user's, else its own."""
    if task.text is not None:
        write_bound(task, folder)
        file: Path | None = folder / f"{task.name}.yaml"
    else:
        file = (task_file(task.name, task.folder) if task.folder else None) or own_task_file(task.name)
    if file is None:
        raise EvaluateError(
            f"lm_eval/{task.name}: lm-evaluation-harness {harness_version()} has no such task, and no file "
            "in eval.tasks defines it; `lm-eval ls tasks` lists its own"
        )
    if is_group(file):
        raise EvaluateError(
            f"lm_eval/{task.name}: a group of tasks, and a number is of one task; name its tasks one by one"
        )
    manager = TaskManager(include_path=file.parent, include_defaults=False)
    try:
        asked = manager.load([task.name])["tasks"][task.name]
    except Exception as err:  # a task's file, its functions and the hub have families of their own
        raise EvaluateError(
            f"lm_eval/{task.name}: the task or its data cannot be read ({' '.join(str(err).split())[:160]}); "
            "with no network, name a folder in eval.tasks with a task file whose data_files are local"
        ) from err
    _without_bar(asked)
    return asked


def _without_bar(asked: Any) -> None:
    """Building the requests of a task draws a bar on stderr, whatever it is told."""
    build: Callable[..., None] = asked.build_all_requests

    def quietly(**settings: Any) -> None:
        with redirect_stderr(io.StringIO()):
            build(**settings)

    asked.build_all_requests = quietly


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Only errors of the harness are said: its warnings are about settings that people here never see."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
