"""Score one model under one protocol, and publish it: the verb behind `krony eval`.

The same code measures the dense teacher and every compressed model. What is read (text or validation
shards), how it becomes tokens and how it is scored follow from the protocol alone.
"""

import hashlib
from dataclasses import asdict
from typing import Literal

import tiktoken
import torch

from model.gpt2 import GPT2
from pipeline.allocator import keeping_memory
from pipeline.compress.load import load_model
from pipeline.config.schema import EvalConfig
from pipeline.data.batches import TokenStream
from pipeline.data.tokenizer import load_tokenizer, require_vocabulary
from pipeline.errors import EvaluateError, PreflightError
from pipeline.evaluate.lambada import evaluate_last_word
from pipeline.evaluate.perplexity import evaluate_perplexity
from pipeline.evaluate.protocols import VALIDATION, Protocol
from pipeline.evaluate.result import LOSSES, Scores
from pipeline.evaluate.sequences import TokenSequence, document_ends, encode_text, token_bytes
from pipeline.evaluate.tasks import HarnessTask, harness_version
from pipeline.evaluate.texts import Text, read_text
from pipeline.store.artifacts import Artifact, Identity, Store


def score_artifact(
    identity: Identity,
    protocol: Protocol,
    *,
    model: Artifact,
    tokens: Artifact,
    tokenizer: Artifact,
    config: EvalConfig,
    store: Store,
    force: bool = False,
    quiet: bool = False,
) -> Artifact:
    """Measure `model` (a model, run, init or teacher) under `protocol` and publish it as `identity`."""
    encoding = load_tokenizer(tokenizer.folder())
    source = source_of(protocol, config, tokens=tokens, encoding=encoding)
    network = load_model(model)
    device = choose_device(config.device)
    scores = evaluate(network, encoding, protocol, source, batch=config.batch, device=device, quiet=quiet)
    with store.attempt(identity, force=force) as attempt:
        attempt.location.put_bytes(LOSSES, scores.units.to_parquet())
        return attempt.publish(
            metrics=scores.metrics() | size_metrics(network),
            settings={
                "device": str(device),
                "batch": config.batch,
                "tokenizer": encoding.name,
                "description": scores.protocol.description,
                "gate": asdict(scores.protocol.gate) if scores.protocol.gate else {},
                **scores.settings,
            },
        )


def source_of(
    protocol: Protocol, config: EvalConfig, *, tokens: Artifact, encoding: tiktoken.Encoding
) -> Text | TokenSequence | HarnessTask:
    """What a protocol scores; raises PreflightError for one of the harness where that is not installed."""
    if protocol.text == VALIDATION:
        return validation_sequence(tokens, encoding)
    if not protocol.task:
        return read_text(protocol.text, config.texts)
    harness_version()
    text = read_text(protocol.text, config.texts) if protocol.text else None
    return HarnessTask(protocol.task, text, config.tasks)


def evaluate(
    model: GPT2,
    encoding: tiktoken.Encoding,
    protocol: Protocol,
    source: Text | TokenSequence | HarnessTask,
    *,
    batch: int = 8,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> Scores:
    """One number with everything that it means. The model is moved to `device` and put into evaluation mode.

    A model with a shorter context follows the protocol's `@ctx` variant, and the scores say so. Raises
    DataError if model and tokenizer do not belong together.
    """
    arch = model.spec.arch
    require_vocabulary(encoding, arch.vocab_size, what="the model")
    network = model.to(device)
    followed = protocol.at_context(arch.n_ctx)
    kind = torch.device(device).type
    half = followed.precision == "bf16"
    with keeping_memory(kind), torch.autocast(kind, dtype=torch.bfloat16, enabled=half):
        if isinstance(source, HarnessTask):
            from pipeline.evaluate.harness import evaluate_task  # an extra, and seconds of imports

            return evaluate_task(network, followed, source, encoding, batch=batch, quiet=quiet)
        if followed.targets == "last-word":
            if not isinstance(source, Text):
                raise EvaluateError(f"{protocol.id} scores passages of a text, not {source.name!r}")
            return evaluate_last_word(network, followed, source, encoding, batch=batch, quiet=quiet)
        whole = encode_text(source, encoding, followed) if isinstance(source, Text) else source
        sequence = whole.first(followed.limit)
        return evaluate_perplexity(network, followed, sequence, batch=batch, quiet=quiet)


def size_metrics(model: GPT2) -> dict[str, int]:
    """What a table says about the size of a scored model, counted from its spec in every convention."""
    spec = model.spec
    return {
        "parameters": spec.num_parameters("tied_all"),
        "krony_parameters": spec.num_parameters("krony_no_wpe"),
        "non_embedding_parameters": spec.num_parameters("non_embedding"),
        "macs_per_token": spec.macs_per_token("factored"),
        "n_layer": spec.arch.n_layer,
        "n_embd": spec.arch.n_embd,
        "n_ctx": spec.arch.n_ctx,
        "vocab_size": spec.arch.vocab_size,
    }


def validation_sequence(tokens: Artifact, encoding: tiktoken.Encoding) -> TokenSequence:
    """The validation shards of a tokens artifact, in order, with the ends of their documents."""
    shards = sorted(key for key in tokens.record.files if key.startswith("val-") and key.endswith(".bin"))
    if not shards:
        raise EvaluateError(
            f"{tokens.record.address} has no validation shards; raise data.validation_fraction, prepare again"
        )
    stream = TokenStream(tokens.paths(shards))
    ids = stream.read(0, len(stream))
    digest = hashlib.sha256("".join(tokens.record.files[key].sha256 for key in shards).encode()).hexdigest()
    ends = document_ends(ids, end_token=encoding.eot_token)
    return TokenSequence(VALIDATION, ids, token_bytes(encoding), digest, ends)


def choose_device(name: Literal["auto", "cpu", "cuda", "mps"]) -> torch.device:
    """The device that a config names; `auto` takes CUDA, then MPS, then the CPU."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if not present[name]:
        raise PreflightError(f"eval.device={name!r} is not there; choose 'auto' or 'cpu'")
    return torch.device(name)
