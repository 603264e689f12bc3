"""An MLflow server behind a login: wrong passwords and foreign Hosts get nothing, our tracker its rows."""

import base64
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking.mlflow_writer import MlflowTracker, connect
from pipeline.tracking.tracker import NullTracker, open_tracker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
]  # a minute: the server hashes passwords, and starts slowly
PATIENCE_S = 120
ADMIN = "admin:an-admins-secret"
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


@pytest.fixture
def server(tmp_path: Path, free_port: int) -> Iterator[str]:
    """Address of a server, started as docs/tracking.md says."""
    settings = tmp_path / "auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = admin\n"
        f"database_uri = sqlite:///{tmp_path}/users.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    address = f"http://127.0.0.1:{free_port}"
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(free_port)]
    command += ["--allowed-hosts", f"127.0.0.1:{free_port},mlflow.example"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--artifacts-destination", str(tmp_path / "files")]
    secrets = {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN.partition(":")[2],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "0" * 64,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | secrets, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while status(f"{address}/health") != 200:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def status(url: str, *, login: str = "", body: bytes | None = None, **headers: str) -> int:
    """The answer to a request; 0 if there is none."""
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json", **headers})
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as err:
        return err.code
    except OSError:
        return 0


def test_who_may_read_and_write(server, tmp_path, monkeypatch, capsys):
    assert status(server + SEARCH) == 401
    assert status(server + SEARCH, login="admin:guess") == 401
    assert status(server + SEARCH, login=ADMIN) == 200
    assert status(server + SEARCH, login=ADMIN, Host="evil.example") == 403
    assert status(server + SEARCH, login=ADMIN, Host="mlflow.example") == 200
    create = f"{server}/api/2.0/mlflow/experiments/create"
    assert status(create, login=ADMIN, body=b'{"name": "x"}', Origin="http://evil.example") == 403
    user = b'{"username": "krony", "password": "a-users-secret"}'
    assert status(f"{server}/api/2.0/mlflow/users/create", login=ADMIN, body=user) == 200

    def track(password: str):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "krony")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        place = {"store": str(tmp_path / "store"), "experiment": "krony"}
        return open_tracker(server, run_id="run/login-1/1", name="login", **place)

    assert isinstance(track("a-wrong-secret"), NullTracker)
    tracker = track("a-users-secret")
    assert isinstance(tracker, MlflowTracker)
    tracker.metrics({"loss": 2.5}, step=1)
    tracker.close("FINISHED")
    found = connect(server, "krony", artifact_root="").client.get_run(tracker.mlflow_id)
    assert found.data.metrics == {"loss": 2.5}
    said = capsys.readouterr().err
    assert "401" in said
    assert "secret" not in said + (tmp_path / "log").read_text()
