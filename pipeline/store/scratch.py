"""Folders for files on their way: on this node, gone afterwards, and a full disk under them is one line."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pipeline.store.objects import StoreAccessError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder where TMPDIR says. Raises StoreAccessError if it fills up or cannot be written."""
    try:
        with tempfile.TemporaryDirectory(prefix="krony-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except (OSError, SafetensorError) as err:
        number = _number(err)
        if number not in _FULL:
            raise
        raise StoreAccessError(
            f"{tempfile.gettempdir()}: cannot be written ({os.strerror(number)}); free some space, or "
            "set TMPDIR to a folder on another disk"
        ) from err


def _number(err: OSError | SafetensorError) -> int:
    """The errno of an error; safetensors has it in its words alone."""
    if isinstance(err, OSError):
        return err.errno or 0
    found = re.search(r"os error (\d+)", str(err))
    return int(found[1]) if found else 0
