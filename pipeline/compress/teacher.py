"""Published weights become a stored teacher: from the hub at a pinned commit, or from a local folder.

A local folder is laid out as stock GPT-2 or as a native one of ours; what is stored is always native.
"""

from pathlib import Path

from model.config import ModelError
from model.export import FORMAT, load_native, save_native
from model.pretrained import load_stock, read_json
from pipeline.config.schema import HubTeacher
from pipeline.errors import CompressError, PreflightError
from pipeline.progress import say
from pipeline.store.artifacts import Artifact, Identity, Store
from pipeline.store.scratch import scratch_folder

_WANTED = ("config.json", "*.safetensors")


def import_teacher(config: HubTeacher, identity: Identity, store: Store, *, force: bool = False) -> Artifact:
    """Store the published weights as a teacher.

    A native folder may be compressed already: the method `dense` trains it further. Raises PreflightError if
    the weights cannot be had, CompressError if they are not a GPT-2.
    """
    folder = stock_folder(config)
    try:
        native = read_json(folder / "config.json").get("format") == FORMAT
        model = load_native(folder) if native else load_stock(folder)
    except ModelError as err:
        raise CompressError(f"{folder}: {err}") from err
    with store.attempt(identity, force=force) as attempt, scratch_folder() as scratch:
        save_native(model, scratch)
        attempt.location.put_folder(scratch)
        metrics = {
            "parameters": model.spec.num_parameters("tied_all"),
            "krony_parameters": model.spec.num_parameters("krony_no_wpe"),
            "dense_parameters": model.spec.num_parameters("tied_all"),
            "macs_per_token": model.spec.macs_per_token("factored"),
        }
        return attempt.publish(metrics=metrics, settings={"source": config.id})


def stock_folder(config: HubTeacher) -> Path:
    """A local folder with `config.json` and safetensors weights; downloads a pinned commit if need be."""
    local = Path(config.id)
    if (local / "config.json").is_file():
        return local
    if config.id.startswith(("/", ".", "~")):
        raise PreflightError(
            f"teacher.id={config.id!r}: no config.json there; expected a stock or native folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    say("teacher", f"fetching {config.id} at {config.revision[:12]}")
    try:
        return Path(snapshot_download(config.id, revision=config.revision, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        first = str(err).strip().splitlines()[0]
        raise PreflightError(
            f"teacher.id={config.id!r} at {config.revision[:12]}: cannot be fetched ({first}); "
            "go online, or name a local folder with config.json and safetensors weights"
        ) from err
