"""One config at work on one store: what the stages share, and the two lines they say.

A stage that is done says so once per process, however many variants of a study share it; a stage that was
forced is built once per process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pipeline.chain import Chain, chain
from pipeline.config.schema import RunConfig
from pipeline.progress import say
from pipeline.store.artifacts import Artifact, Identity, Store
from pipeline.train.request import Driver


@dataclass(frozen=True, slots=True)
class Work:
    """A config, its identities and its store."""

    config: RunConfig
    chain: Chain
    store: Store
    force: frozenset[str] = frozenset()
    """Kinds that are built again even where they are done."""
    quiet: bool = False
    driver: Driver | None = None
    """Drives the training of a student; without one it listens to signals and writes to the tracker."""
    _seen: set[str] = field(default_factory=set)

    @staticmethod
    def on(
        config: RunConfig,
        *,
        force: frozenset[str] = frozenset(),
        quiet: bool = False,
        driver: Driver | None = None,
    ) -> "Work":
        """Work on the store that the config names. Raises DataError if a source is not there."""
        return Work(config, chain(config), Store(config.store), force, quiet, driver)

    def variant(self, config: RunConfig) -> "Work":
        """The same work for another config; what was built or reported is remembered."""
        return replace(self, config=config, chain=chain(config))

    def done(self, identity: Identity) -> Artifact | None:
        """The finished artifact, unless it has to be built."""
        if identity.kind in self.force and identity.address not in self._seen:
            return None
        artifact = self.store.find(identity)
        if artifact and identity.address not in self._seen:
            self._seen.add(identity.address)
            self.say(identity.kind, f"done already · {identity.address}")
        return artifact

    def forces(self, kind: str) -> bool:
        """Whether artifacts of this kind are built again."""
        return kind in self.force

    def once(self, identity: Identity, build: Callable[[], Artifact]) -> Artifact:
        """The finished artifact, or what `build` publishes."""
        artifact = self.done(identity)
        if artifact is None:
            artifact = build()
            self._seen.add(identity.address)
            size = sum(info.bytes for info in artifact.record.files.values())
            self.say(identity.kind, f"built · {identity.address} · {size / 1e6:,.1f} MB")
        return artifact

    def say(self, label: str, text: str) -> None:
        """One line, unless quiet."""
        if not self.quiet:
            say(label, text)
