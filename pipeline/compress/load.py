"""From an artifact to a torch module: teachers, inits, runs and exported models open alike."""

from model.config import ModelError
from model.export import load_native
from model.gpt2 import GPT2
from pipeline.errors import CompressError
from pipeline.store.artifacts import Artifact

NATIVE_FILES = ("config.json", "model.safetensors")


def load_model(artifact: Artifact) -> GPT2:
    """The model of a `teacher`, `init`, `run` or `model` artifact, on the CPU, in evaluation mode.

    Raises CompressError, naming the artifact, if its payload is not a model.
    """
    prefix = "native/" if artifact.record.kind == "model" else ""
    for name in NATIVE_FILES:
        artifact.require(prefix + name)
    try:
        return load_native(artifact.folder(prefix.rstrip("/"), only=NATIVE_FILES)).eval()
    except ModelError as err:
        raise CompressError(f"{artifact.record.address}: {err}") from err
