"""From one config to the identity of every artifact on the way: the whole plan, before anything is built.

    corpus → tokenizer → tokens ─┬─ teacher ─┬─────────┬─ init → run → model → scores, speed
                                 └───────────┴─ stats ─┘

Statistics are there for methods that need any, and belong to what is needed, not to the method: methods with
equal needs share them. An init whose recipe is a later stage of another starts from that one's run as well.
An address is a pure function of the config and of what the outside world says about a source (package
versions, file digests). Nothing heavy is loaded, so `krony status` and `--plan` answer at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.compress.recipe import SEEDED_METHODS, recipe_before
from model.config import ModelError
from pipeline.compress.outlook import dense_spec
from pipeline.config.identity import identity_fields
from pipeline.config.schema import BudgetConfig, HubTeacher, RunConfig, ScratchTeacher
from pipeline.config.sources import BpeTokenizer, Corpus
from pipeline.data.corpora import source_of
from pipeline.errors import ConfigError
from pipeline.evaluate.protocols import VALIDATION, Protocol, get_protocol
from pipeline.evaluate.tasks import text_identity
from pipeline.store.artifacts import Identity
from pipeline.store.copies import sha256_file
from pipeline.store.location import Location
from pipeline.store.records import KINDS

# Raised by one when a producer's results change, so that old artifacts are not mistaken for new ones.
VERSIONS: Mapping[str, int] = dict.fromkeys(KINDS, 1) | {"model": 2}

FISHER = frozenset({"row_fisher", "col_fisher", "full_fisher"})
# What a calibration setting acts on, where that is not everything: settings without effect fork no address.
ACTS_ON: Mapping[str, frozenset[str]] = {
    "fisher": FISHER,
    "labels": FISHER | {"delta_gram"},
    "delta_trim": frozenset({"delta_gram"}),
    "delta_clip": frozenset({"delta_gram"}),
}


@dataclass(frozen=True, slots=True)
class Chain:
    """The identities of all artifacts that one config asks for."""

    corpus: Identity
    tokenizer: Identity
    tokens: Identity
    teacher: Identity
    stats: Identity | None
    """None where the method needs no statistics."""
    init: Identity
    run: Identity
    model: Identity
    scores: Mapping[str, Identity]
    """Of the compressed model, by protocol id."""
    teacher_scores: Mapping[str, Identity]
    """Of the dense teacher, by protocol id."""
    speed: Identity | None = None
    """Speed and memory against the teacher; None unless the config asks for them."""
    before: "Chain | None" = None
    """Of the stage whose run the init starts from; None where it starts from the teacher."""

    def identities(self) -> list[Identity]:
        """All of them, in the order in which they are built."""
        shared = [self.corpus, self.tokenizer, self.tokens, self.teacher, *self.teacher_scores.values()]
        last = [self.speed] if self.speed else []
        return [*shared, *self.runs(), self.model, *self.scores.values(), *last]

    def runs(self) -> list[Identity]:
        """The init and the run, behind those of the stages before."""
        before = self.before.runs() if self.before else []
        return [*before, *([self.stats] if self.stats else []), self.init, self.run]


class Chains:
    """Chains of many configs: the outside world is asked once for each corpus and each published teacher."""

    def __init__(self) -> None:
        self._corpora: dict[Corpus, Identity] = {}
        self._published: dict[HubTeacher, Identity] = {}

    def of(self, config: RunConfig) -> Chain:
        """As `chain`, for a corpus and a published teacher as they were when first asked for."""
        if config.corpus not in self._corpora:
            self._corpora[config.corpus] = _corpus(config)
        teacher = config.teacher
        if isinstance(teacher, HubTeacher) and teacher not in self._published:
            self._published[teacher] = _published(teacher)
        published = self._published[teacher] if isinstance(teacher, HubTeacher) else None
        return _chain(config, self._corpora[config.corpus], published)


def chain(config: RunConfig) -> Chain:
    """The identities that `config` stands for.

    Raises DataError or ConfigError if a named source is not there.
    """
    return Chains().of(config)


def earlier(config: RunConfig) -> RunConfig | None:
    """The config of the stage whose recovered model `config` starts from; None: it starts from the teacher.

    It is the same but for its method, has no budget of its own, and is trained as `train` says, like each
    stage.
    """
    method = recipe_before(config.method)
    if method is None:
        return None
    return replace(config, method=method, budget=BudgetConfig(), name=f"{config.name}-before")


def train_tokens(config: RunConfig) -> int:
    """Tokens of recovery training up to the model that `config` asks for, earlier stages included."""
    before = earlier(config)
    return config.train.total_tokens + (train_tokens(before) if before else 0)


def _chain(config: RunConfig, corpus: Identity, published: Identity | None) -> Chain:
    tokenizer = _tokenizer(config, corpus)
    tokens = Identity(
        "tokens",
        f"{corpus.name}-{tokenizer.name}",
        identity_fields(config.data),
        {"corpus": corpus, "tokenizer": tokenizer},
        VERSIONS["tokens"],
    )
    teacher = published or _teacher(config, tokens)
    stats = _stats(config, teacher, tokens)
    earlier_stage = earlier(config)
    before = _chain(earlier_stage, corpus, published) if earlier_stage else None
    init = _init(config, teacher, stats, before)
    run = Identity(
        "run",
        f"{init.name}-s{config.seed}",
        {"train": identity_fields(config.train), "seed": config.seed},
        {"init": init, "tokens": tokens},
        VERSIONS["run"],
    )
    model = Identity("model", run.name, {}, {"run": run, "tokenizer": tokenizer}, VERSIONS["model"])
    return Chain(
        corpus,
        tokenizer,
        tokens,
        teacher,
        stats,
        init,
        run,
        model,
        scores=_scores(config, model, tokens),
        teacher_scores=_scores(config, teacher, tokens),
        speed=speed_identity(config, model, teacher) if config.speed.enabled else None,
        before=before,
    )


def protocols(config: RunConfig) -> list[Protocol]:
    """The protocols that a config names, as its model can follow them and as far as it reads them."""
    return [
        named.at_context(_context(config))
        .at_tokens(config.eval.max_tokens or named.limit)
        .at_precision("bf16" if config.eval.precision == "bf16" else named.precision)
        for named in map(get_protocol, config.eval.protocols)
    ]


def scores_identity(protocol: Protocol, model: Identity, tokens: Identity, *, tasks: str = "") -> Identity:
    """The identity of one protocol's scores of one model or teacher; `tasks` is `eval.tasks`."""
    settings = {"protocol": protocol.id, "version": protocol.version}
    inputs = {"model": model}
    if protocol.text == VALIDATION:
        inputs["tokens"] = tokens
    else:
        settings["text"] = text_identity(protocol, tasks)
        inputs["tokenizer"] = tokens.inputs["tokenizer"]
    name = f"{model.name}-{protocol.id.replace('/', '.').replace('@', '.')}"
    return Identity("scores", name, settings, inputs, VERSIONS["scores"])


def _scores(config: RunConfig, model: Identity, tokens: Identity) -> Mapping[str, Identity]:
    """Of one model or teacher, by protocol id."""
    wanted = protocols(config)
    return {each.id: scores_identity(each, model, tokens, tasks=config.eval.tasks) for each in wanted}


def speed_identity(config: RunConfig, model: Identity, teacher: Identity) -> Identity:
    """The identity of a measurement of speed: what is measured, not on which machine; that is in its record.

    Raises ConfigError if the prompt, or what is decoded, is longer than the model's context.
    """
    settings = identity_fields(config.speed) | {"prompt": config.speed.prompt_at(_context(config))}
    name = f"{model.name}-{config.speed.device}"
    return Identity("speed", name, settings, {"model": model, "teacher": teacher}, VERSIONS["speed"])


def _context(config: RunConfig) -> int:
    if not isinstance(config.teacher, HubTeacher):
        return config.teacher.n_ctx
    try:
        return dense_spec(config).arch.n_ctx
    except (ModelError, KeyError) as err:
        raise ConfigError(f"teacher.id={config.teacher.id!r}: its config.json is no GPT-2's ({err})") from err


def _tokenizer(config: RunConfig, corpus: Identity) -> Identity:
    fields = identity_fields(config.tokenizer)
    if isinstance(config.tokenizer, BpeTokenizer):
        # The merges are learned on training documents only, so the split takes part.
        split = {"split": config.data.split, "validation_fraction": config.data.validation_fraction}
        name = f"bpe{config.tokenizer.vocab_size}"
        return Identity("tokenizer", name, fields | split, {"corpus": corpus}, VERSIONS["tokenizer"])
    return Identity("tokenizer", "gpt2", fields, {}, VERSIONS["tokenizer"])


def _corpus(config: RunConfig) -> Identity:
    source = dict(source_of(config.corpus).identity())
    return Identity("corpus", config.corpus.name, source, {}, VERSIONS["corpus"])


def _published(teacher: HubTeacher) -> Identity:
    local = Location.of(teacher.id)
    fields: dict[str, Any] = {"id": teacher.id, "revision": teacher.revision}
    if local.exists("config.json"):  # a folder: its weights are its identity, wherever it lies
        fields = {
            key: sha256_file(local.local(key))
            for key in local.list()
            if key == "config.json" or key.endswith(".safetensors")
        }
    return Identity("teacher", teacher.id.rstrip("/").rsplit("/", 1)[-1], fields, {}, VERSIONS["teacher"])


def _teacher(config: RunConfig, tokens: Identity) -> Identity:
    teacher = config.teacher
    assert isinstance(teacher, ScratchTeacher), "a published teacher has its identity from elsewhere"
    name = f"scratch-{teacher.n_layer}x{teacher.n_embd}"
    return Identity("teacher", name, identity_fields(teacher), {"tokens": tokens}, VERSIONS["teacher"])


def _stats(config: RunConfig, teacher: Identity, tokens: Identity) -> Identity | None:
    """What the method needs at every weight matrix, whichever of them it replaces."""
    needs = sorted(set(config.method.needs))
    if not needs:
        return None
    if config.calibration.length > (context := _context(config)):
        raise ConfigError(
            f"calibration.length={config.calibration.length} is longer than the teacher's context, {context}"
        )
    settings = identity_fields(config.calibration)
    fields = {key: value for key, value in settings.items() if ACTS_ON.get(key, set(needs)) & set(needs)}
    inputs = {"teacher": teacher, "tokens": tokens}
    return Identity("stats", "-".join(needs), {"needs": needs, **fields}, inputs, VERSIONS["stats"])


def _init(config: RunConfig, teacher: Identity, stats: Identity | None, before: Chain | None) -> Identity:
    fields = {"method": identity_fields(config.method), "budget": identity_fields(config.budget)}
    if config.method.name in SEEDED_METHODS:
        fields["seed"] = config.seed
    if config.method.version > 1:
        fields["version"] = config.method.version
    inputs = {"teacher": teacher} | ({"stats": stats} if stats else {})
    inputs |= {"before": before.run} if before else {}
    return Identity("init", config.method.name, fields, inputs, VERSIONS["init"])
