"""Ray takes SIGTERM for itself when it starts; with ours a driver goes on hearing it."""

import pytest

DRIVER = """
import os, signal
from pipeline.cluster import connect
from pipeline.config.schema import RayConfig
from pipeline.interrupt import stop_on_signal

with stop_on_signal("train") as should_stop, connect(RayConfig(), quiet=True, num_cpus=1):
    assert not should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert should_stop()
print("saved")
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_notice_of_the_end_reaches_a_driver_that_is_connected_to_ray(python):
    done = python("-c", DRIVER)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "saved\n"
    assert "SIGTERM: saving the state, then stopping" in done.stderr
