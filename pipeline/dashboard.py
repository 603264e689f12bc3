"""The dashboard of a Ray cluster, as far as jobs need it: who answers, and what is refused, in one line.

It is asked over HTTP and may be gone between any two questions; whatever Ray's client then raises becomes one
line that says what was not done.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PreflightError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


def dashboard_address(given: str) -> str:
    """The URL of the cluster's dashboard, from the flag or RAY_ADDRESS."""
    address = given or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise PreflightError(
            f"cluster address {address!r} is no URL of a dashboard; give --address http://127.0.0.1:8265 "
            "or set RAY_ADDRESS to it (`ray attach -p 8265 cluster.yaml` brings a remote one there)"
        )
    return address


def client_of(address: str) -> "JobSubmissionClient":
    """A client of the dashboard at `address`; PreflightError if nobody is there, for a token, another Ray."""
    prepare()
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it names every ignore file several times
    try:
        client = JobSubmissionClient(address)
        theirs = client._server_ray_version  # noqa: SLF001  (get_version is the version of the API)
    except AuthenticationError as err:
        raise _no_token(address) from err
    except (ConnectionError, RuntimeError, OSError) as err:
        raise PreflightError(
            f"{address}: no dashboard of Ray answers ({reason_of(err)}); start a head, or open the tunnel"
        ) from err
    if theirs != ray.__version__:
        raise PreflightError(
            f"{address}: runs Ray {theirs}, this is {ray.__version__}; install constraints.txt on the cluster"
        )
    return client


def list_jobs(address: str) -> list[Any]:
    """All jobs that the cluster at `address` remembers, as Ray describes them. Raises as `client_of`."""
    client = client_of(address)
    with said(address, "its jobs cannot be listed"):
        return list(client.list_jobs())


@contextmanager
def said(address: str, what: str) -> Iterator[None]:
    """What Ray's client raises, as one PreflightError: `what` was not done, and why."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as err:
        raise _no_token(address) from err
    except (OSError, RuntimeError, ValueError) as err:  # ValueError: an answer that is no answer of Ray
        raise PreflightError(f"{address}: {what} ({reason_of(err)}); the same command tries again") from err


def prepare() -> None:
    """Set what Ray reads at its import: a client sends its token in one mode alone, and must have it then."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    has_token = bool(named) or (Path.home() / ".ray" / "auth_token").is_file()
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def reason_of(err: Exception) -> str:
    """The first line of an error of Ray, not too long."""
    lines = str(err).strip().splitlines()
    return lines[0][:300] if lines else type(err).__name__


def _no_token(address: str) -> PreflightError:
    return PreflightError(
        f"{address}: refused, it asks for a token; put the token of the cluster into a file and set "
        "RAY_AUTH_TOKEN_PATH, or copy it to ~/.ray/auth_token"
    )
