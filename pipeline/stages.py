"""The stages of the chain, as functions that build an artifact or find it done.

A verb of the command line, a sweep trial and `krony run` call the same functions, so there is one way to
build each kind. A stage that is done loads nothing: no Ray, no torch.
"""

from collections.abc import Mapping
from pathlib import Path

from pipeline.chain import earlier, protocols, speed_identity
from pipeline.config.schema import HubTeacher
from pipeline.evaluate.protocols import Protocol
from pipeline.evaluate.tasks import harness_version
from pipeline.store.artifacts import Artifact
from pipeline.work import Work


def corpus(work: Work) -> Artifact:
    """The documents, or the list of files that hold them."""

    def build() -> Artifact:
        from pipeline.data.corpora import build_corpus

        return build_corpus(
            work.config.corpus,
            work.chain.corpus,
            work.store,
            ray=work.config.ray,
            force=work.forces("corpus"),
            quiet=work.quiet,
        )

    return work.once(work.chain.corpus, build)


def tokenizer(work: Work) -> Artifact:
    """The tokenizer; a trained one needs the corpus, a published one does not."""

    def build() -> Artifact:
        from pipeline.data.tokenizer import build_tokenizer

        return build_tokenizer(
            work.config, work.chain.tokenizer, corpus(work), work.store, force=work.forces("tokenizer")
        )

    return work.once(work.chain.tokenizer, build)


def tokens(work: Work) -> Artifact:
    """The shards of tokens."""

    def build() -> Artifact:
        from pipeline.data.prepare import prepare_tokens

        return prepare_tokens(
            work.config.data,
            work.chain.tokens,
            corpus(work),
            tokenizer(work),
            work.store,
            ray=work.config.ray,
            force=work.forces("tokens"),
            quiet=work.quiet,
        )

    return work.once(work.chain.tokens, build)


def teacher(work: Work) -> Artifact:
    """The dense model: published weights, or pretrained here by the same training code."""

    def build() -> Artifact:
        if isinstance(work.config.teacher, HubTeacher):
            from pipeline.compress.teacher import import_teacher

            return import_teacher(
                work.config.teacher, work.chain.teacher, work.store, force=work.forces("teacher")
            )
        from pipeline.training import train_teacher

        return train_teacher(work, tokens(work), tokenizer(work), force=work.forces("teacher"))

    return work.once(work.chain.teacher, build)


def stats(work: Work) -> Artifact | None:
    """The statistics that the method needs; None where it needs none."""
    identity = work.chain.stats
    if identity is None:
        return None

    def build() -> Artifact:
        from pipeline.compress.calibrate import calibrate

        return calibrate(
            work.config.calibration,
            identity,
            teacher(work),
            tokens(work),
            work.store,
            ray=work.config.ray,
            force=work.forces("stats"),
            quiet=work.quiet,
        )

    return work.once(identity, build)


def init(work: Work) -> Artifact:
    """The compressed model before training, with the report of every replaced matrix.

    A later stage of a method is made from the run of the stage before, which is trained first.
    """

    def build() -> Artifact:
        from pipeline.compress.build import build_init

        before = earlier(work.config)
        return build_init(
            work.config,
            work.chain.init,
            teacher(work),
            work.store,
            stats=stats(work),
            before=run(work.variant(before)) if before else None,
            force=work.forces("init"),
        )

    return work.once(work.chain.init, build)


def run(work: Work) -> Artifact:
    """The compressed model after recovery training, with its history and checkpoints."""

    def build() -> Artifact:
        from pipeline.training import train_student

        return train_student(work, init(work), tokens(work), force=work.forces("run"))

    return work.once(work.chain.run, build)


def model(work: Work) -> Artifact:
    """The folders that others can load."""

    def build() -> Artifact:
        from pipeline.compress.export import export_model

        return export_model(
            work.chain.model, run(work), tokenizer(work), work.store, force=work.forces("model")
        )

    return work.once(work.chain.model, build)


def hand_out(work: Work, folder: Path, *, nanogpt: bool = False) -> None:
    """Copy the model's folders to `folder`, with model cards that hold the scores that are known by now."""
    from pipeline.compress.export import hand_out as copy

    copy(model(work), run(work), tokenizer(work), work.store, folder, nanogpt=nanogpt)
    work.say("export", f"written · {folder}")


def scores(work: Work, *, of_teacher: bool = False) -> Mapping[str, Artifact]:
    """The scores of the compressed model, or of its teacher, by protocol id."""
    identities = work.chain.teacher_scores if of_teacher else work.chain.scores
    result = {}
    wanted = protocols(work.config)
    if any(protocol.task and work.done(identities[protocol.id]) is None for protocol in wanted):
        harness_version()  # said before a teacher is trained, not after
    for protocol in wanted:

        def build(protocol: Protocol = protocol) -> Artifact:
            from pipeline.evaluate.score import score_artifact

            return score_artifact(
                identities[protocol.id],
                protocol,
                model=teacher(work) if of_teacher else model(work),
                tokens=tokens(work),
                tokenizer=tokenizer(work),
                config=work.config.eval,
                store=work.store,
                force=work.forces("scores"),
                quiet=work.quiet,
            )

        result[protocol.id] = work.once(identities[protocol.id], build)
    return result


def require_speed(work: Work) -> None:
    """Raise PreflightError if the device of `speed` is not there: before anything is built."""
    if work.config.speed.enabled:
        from pipeline.evaluate.speed import require_device

        require_device(work.config.speed)


def speed(work: Work) -> Artifact:
    """Speed and memory of the compressed model against its teacher, measured here and now."""
    identity = speed_identity(work.config, work.chain.model, work.chain.teacher)

    def build() -> Artifact:
        from pipeline.evaluate.speed import speed_artifact

        return speed_artifact(
            identity,
            work.config.speed,
            model=model(work),
            teacher=teacher(work),
            store=work.store,
            force=work.forces("speed"),
            quiet=work.quiet,
        )

    return work.once(identity, build)
