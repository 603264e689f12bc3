"""cluster.yaml: Ray's own schema accepts it, and what keeps strangers out stays in it."""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "cluster.yaml").read_text())


def accept(config: dict[str, Any]) -> dict[str, Any]:
    """The config as `ray up` completes it; raises where Ray would refuse it. Private API: Ray is pinned."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete = prepare_config(copy.deepcopy(config))
    validate_config(complete)
    return complete


def test_ray_accepts_it(cluster: dict[str, Any]):
    assert set(accept(cluster)["available_node_types"]) == {"head", "cpu", "gpu"}


@pytest.mark.parametrize(
    "typo", [{"idle_timeout_minuets": 5}, {"max_workers": "many"}, {"head_node_type": "heda"}]
)
def test_ray_would_notice_a_typo(cluster: dict[str, Any], typo: dict[str, Any]):
    with pytest.raises(Exception, match=next(iter(typo)) + "|heda|many"):
        accept(cluster | typo)


def test_idle_machines_are_given_back(cluster: dict[str, Any]):
    groups = cluster["available_node_types"]
    assert groups["cpu"]["min_workers"] == groups["gpu"]["min_workers"] == 0
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    assert cluster["max_workers"] == groups["cpu"]["max_workers"] + groups["gpu"]["max_workers"]


def test_nobody_else_gets_in(cluster: dict[str, Any]):
    # A node without a group gets one from Ray, which opens port 22 to 0.0.0.0/0 whatever else it is told.
    assert all(node["node_config"]["SecurityGroupIds"] for node in cluster["available_node_types"].values())
    starts = [
        line for line in cluster["head_start_ray_commands"] if "ray start" in line or "mlflow server" in line
    ]
    assert len(starts) == 2
    for line in starts:
        assert "127.0.0.1" in line
        assert "0.0.0.0" not in line
    for line in (*starts[:1], *cluster["worker_start_ray_commands"][1:]):
        assert "RAY_AUTH_MODE=token" in line
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_nodes_get_every_package_and_not_what_lies_about(cluster: dict[str, Any]):
    packages = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    sent = {to: path for to, path in cluster["file_mounts"].items() if to.startswith("~/krony")}
    assert all(to == f"~/krony/{path}" and (PROJECT / path).exists() for to, path in sent.items())
    read_by_bootstrap = {".ci", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert (
        set(sent.values()) == {each.rstrip("*") for each in packages["find"]["include"]} | read_by_bootstrap
    )


def test_what_the_autoscaler_needs_is_not_what_work_needs(cluster: dict[str, Any]):
    profiles = {
        name: node["node_config"]["IamInstanceProfile"]["Name"]
        for name, node in cluster["available_node_types"].items()
    }
    assert profiles == {"head": "krony-head", "cpu": "krony", "gpu": "krony"}
    page = (PROJECT / "docs" / "cluster.md").read_text()
    (made,) = re.findall(r"^for name in ([\w -]+); do$", page, re.MULTILINE)
    assert set(made.split()) == set(profiles.values())


def test_a_check_for_mlflow_does_not_find_itself(cluster: dict[str, Any]):
    (line,) = (each for each in cluster["head_start_ray_commands"] if "mlflow server" in each)
    assert "pgrep" not in line
    check, _, rest = line.partition("||")
    assert "/dev/tcp/127.0.0.1/5000" in check
    assert "--host 127.0.0.1 --port 5000" in rest


def test_nodes_get_the_lock_and_no_version_of_their_own(cluster: dict[str, Any]):
    commands = " ".join(
        [*cluster["setup_commands"], *cluster["head_setup_commands"], *cluster["worker_setup_commands"]]
    )
    assert "sh .ci/bootstrap" in commands
    assert "pip install" not in commands


@pytest.mark.parametrize("own_group", [True, False])
def test_port_22_is_open_to_the_world_only_where_ray_makes_the_group(
    own_group: bool, cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    # What `ray up` does before it starts a machine, on the EC2 of moto. False is the trap itself.
    import boto3
    import moto

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    region = cluster["provider"]["region"]
    with moto.mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws

        ec2 = boto3.client("ec2", region_name=region)
        made = ec2.create_security_group(GroupName="own", Description="own")["GroupId"]
        mine = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.7/32"}]}
        ec2.authorize_security_group_ingress(GroupId=made, IpPermissions=[mine])
        for node in cluster["available_node_types"].values():
            node["node_config"]["SecurityGroupIds"] = [made]
            if not own_group:
                del node["node_config"]["SecurityGroupIds"]
        done = bootstrap_aws(accept(cluster))
        used = {
            group
            for node in done["available_node_types"].values()
            for group in node["node_config"]["SecurityGroupIds"]
        }
        found = ec2.describe_security_groups(GroupIds=sorted(used))["SecurityGroups"]
        rules = [rule for group in found for rule in group["IpPermissions"]]
        world = [
            place["CidrIp"] for rule in rules for place in rule["IpRanges"] if place["CidrIp"] == "0.0.0.0/0"
        ]
    assert (used == {made}) is own_group
    assert bool(world) is not own_group
