"""deploy/: KubeRay accepts the manifests, what keeps strangers out stays in them, the image is the lock."""

import copy
import json
import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.cli import VERBS

PROJECT = Path(__file__).resolve().parents[2]
DEPLOY = PROJECT / "deploy"
SCHEMA = json.loads((DEPLOY / "kuberay" / "schema.json").read_text())
MANIFESTS = {
    each["kind"]: each
    for path in sorted((DEPLOY / "kuberay").glob("*.yaml"))
    for each in yaml.safe_load_all(path.read_text())
}
CLUSTERS = {
    "RayCluster": MANIFESTS["RayCluster"]["spec"],
    "RayJob": MANIFESTS["RayJob"]["spec"]["rayClusterSpec"],
}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
TYPOS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("RayCluster", ("autoscalerOptions", "idleTimeoutSecond"), 5),
    ("RayCluster", ("autoscalerOptions", "upscalingMode"), "Often"),
    ("RayCluster", ("authOptions", "mode"), "tokens"),
    ("RayCluster", ("workerGroupSpecs", 1, "template", "spec", "containers", 0, "resource"), {}),
    ("RayCluster", ("headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ("RayCluster", ("workerGroupSpecs", 0, "maxReplicas"), "8"),
    ("RayJob", ("rayClusterSpec", "workerGroupSpecs", 0, "groupNames"), "cpu"),
    ("RayJob", ("submisionMode",), "SidecarMode"),
    ("RayJob", ("backoffLimit",), "two"),
]


def hold(kind: str, spec: dict[str, Any]) -> None:
    """Raise where the API server would refuse `spec`, unknown fields included."""
    jsonschema.Draft202012Validator({"$ref": f"#/{kind}", **SCHEMA}).validate(spec)


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("kind", CLUSTERS)
def test_kuberay_accepts_the_manifest(kind: str):
    hold(kind, MANIFESTS[kind]["spec"])
    assert MANIFESTS[kind]["apiVersion"] == "ray.io/v1"


@pytest.mark.parametrize(("kind", "path", "value"), TYPOS, ids=lambda each: str(each)[-40:])
def test_kuberay_would_notice_a_typo(kind: str, path: tuple[Any, ...], value: Any):
    spec = copy.deepcopy(MANIFESTS[kind]["spec"])
    inside = spec
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=str(path[-1]) + "|is not"):
        hold(kind, spec)


def test_the_copy_of_the_schema_says_where_it_comes_from():
    assert re.search(r"github\.com/ray-project/kuberay/tree/v\d+\.\d+\.\d+/", SCHEMA["source"])
    assert "Apache License 2.0" in SCHEMA["notice"]


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_nobody_else_gets_into_the_pods(cluster: dict[str, Any]):
    assert cluster["authOptions"] == {"mode": "token", "secretName": "krony-ray-token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for pod in pods(cluster):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert f"USER {spec['securityContext']['runAsUser']}\n" in DOCKERFILE
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
            assert not [each for each in container.get("env", []) if "TOKEN" in each["name"]]
    assert {group["groupName"] for group in cluster["workerGroupSpecs"]} == {"cpu", "gpu"}
    assert all(group["minReplicas"] == 0 for group in cluster["workerGroupSpecs"])


def test_dashboard_and_mlflow_of_a_standing_cluster_are_on_loopback():
    head = CLUSTERS["RayCluster"]["headGroupSpec"]
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    (mlflow,) = (each for each in head["template"]["spec"]["containers"] if each["name"] == "mlflow")
    assert mlflow["command"][mlflow["command"].index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize("file", ["raycluster.yaml", "rayjob.yaml"])
def test_only_pods_of_the_cluster_reach_its_ports(file: str):
    texts = list(yaml.safe_load_all((DEPLOY / "kuberay" / file).read_text()))
    ray, policy = texts[0]["spec"], texts[-1]
    assert policy["kind"] == "NetworkPolicy"
    own = {"matchLabels": policy["spec"]["podSelector"]["matchLabels"]}
    for pod in pods(ray.get("rayClusterSpec", ray)):
        assert pod["metadata"]["labels"].items() >= own["matchLabels"].items()
    first, *others = policy["spec"]["ingress"]
    assert first == {"from": [{"podSelector": own}]}
    assert len(others) == (file == "rayjob.yaml")  # the operator asks how the job is
    assert all(rule["ports"] == [{"port": 8265, "protocol": "TCP"}] for rule in others)


def test_the_version_of_ray_is_that_of_the_lock():
    locked = re.search(r"^ray==(.+)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    assert locked
    assert {cluster["rayVersion"] for cluster in CLUSTERS.values()} == {locked[1]}


def test_a_ray_job_runs_a_verb_of_ours_on_a_config_of_ours():
    krony, verb, config, *_ = MANIFESTS["RayJob"]["spec"]["entrypoint"].split()
    assert krony == "krony"
    assert verb in VERBS
    assert (PROJECT / Path(config).relative_to("/opt/krony")).is_file()


def test_the_image_is_the_lock_and_runs_as_nobody():
    installs = [line for line in DOCKERFILE.replace("\\\n", " ").splitlines() if "pip install" in line]
    assert (
        sum("-c constraints.txt" in line or "--no-deps" in line or "uv==" in line for line in installs) == 3
    )
    assert len(installs) == 3
    assert re.findall(r"^(?:USER|CMD) .*$", DOCKERFILE, re.MULTILINE)[0] == "USER 10001"
    assert not re.search(r"--(extra-)?index-url|--find-links", DOCKERFILE)
    assert "0.0.0.0" not in DOCKERFILE
    bootstrap = (PROJECT / ".ci" / "bootstrap").read_text()
    assert re.findall(r"uv==[\d.]+", DOCKERFILE) == re.findall(r"uv==[\d.]+", bootstrap)


def test_the_image_holds_every_package_and_nothing_that_is_not_sent_to_the_builder():
    packages = {
        each.removesuffix("*")
        for each in tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"][
            "find"
        ]["include"]
    }
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert copied >= packages | {"configs", "constraints.txt", "pyproject.toml"}
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((PROJECT / each).exists() for each in copied)


def test_hadolint_finds_nothing():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    command = [hadolint, "--no-color", "-"]
    done = subprocess.run(command, input=DOCKERFILE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    careless = DOCKERFILE + "RUN apt-get install curl\n"
    done = subprocess.run(command, input=careless, capture_output=True, text=True, check=False)
    assert "DL3008" in done.stdout  # no version pinned: it does look
