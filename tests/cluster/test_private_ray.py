"""A private Ray is private: it listens on loopback alone, and asks for its token whatever is exported."""

import psutil
import pytest

DRIVER = """
import os, subprocess, sys
from pipeline.cluster import connect
from pipeline.config.schema import RayConfig

stranger = '''
import ray, sys
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
    print("in", len(ray.nodes()))
except Exception as err:
    print("out", type(err).__name__)
'''
with connect(RayConfig(), quiet=True, num_cpus=1) as ray:
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    address = ray.get_runtime_context().gcs_address
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "HOME": os.getcwd()}
    key = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": os.environ["RAY_AUTH_TOKEN_PATH"]}
    for own in ({"RAY_AUTH_MODE": "disabled"}, key):
        subprocess.run([sys.executable, "-c", stranger, address], env=kept | own, check=True)
print(os.environ["RAY_AUTH_MODE"])
"""


@pytest.mark.ray
@pytest.mark.slow
def test_all_ports_of_a_private_ray_are_on_loopback(ray_local):
    assert ray_local.get(ray_local.remote(lambda: 1).remote()) == 1  # a worker stands
    family = psutil.Process().children(recursive=True)
    (raylet,) = [process for process in family if process.name() == "raylet"]
    (gcs,) = [process for process in family if process.name() == "gcs_server"]
    several = [psutil.Process(), gcs, raylet, *raylet.children(recursive=True)]
    where = {
        (process.name(), each.laddr.ip.removeprefix("::ffff:"))
        for process in several
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    }
    assert {"gcs_server", "raylet"} <= {name for name, _ in where}
    assert {address for _, address in where} == {"127.0.0.1"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly
def test_a_private_ray_asks_for_its_token_where_the_environment_switches_that_off(python):
    done = python("-c", DRIVER, env={"RAY_AUTH_MODE": "disabled"})
    assert done.returncode == 0, done.stderr
    stranger, friend, mode = done.stdout.splitlines()
    assert stranger.startswith("out")
    assert friend == "in 1"
    assert mode == "disabled"  # for the clusters that are joined without one
