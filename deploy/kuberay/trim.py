"""The part of KubeRay's schemas that our manifests can be held against, small enough to be committed.

    python deploy/kuberay/trim.py FOLDER_OF_CRDS VERSION > deploy/kuberay/schema.json

FOLDER_OF_CRDS is `ray-operator/config/crd/bases` of github.com/ray-project/kuberay at the tag VERSION.
What is short stays whole; of what is long (pod templates above all) only the fields that a manifest of this
folder uses stay. A field that KubeRay does not know is refused here; a field that is not in the copy, by the
tests: then run this again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SHORT = 300
"""Characters of JSON up to which a schema stays as it is."""


def main() -> None:
    """Read both definitions, print the copy."""
    folder, version = Path(sys.argv[1]), sys.argv[2]
    texts = [path.read_text() for path in sorted(HERE.glob("*.yaml"))]
    manifests = [each for text in texts for each in yaml.safe_load_all(text)]
    copy: dict[str, Any] = {
        "source": f"https://github.com/ray-project/kuberay/tree/{version}/ray-operator/config/crd/bases",
        "notice": "Copyright the KubeRay authors, Apache License 2.0; trimmed by deploy/kuberay/trim.py",
    }
    specs: dict[str, Any] = {}
    for kind, file in (("RayCluster", "ray.io_rayclusters.yaml"), ("RayJob", "ray.io_rayjobs.yaml")):
        versions = yaml.safe_load((folder / file).read_text())["spec"]["versions"]
        (whole,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
        specs[kind] = whole["properties"]["spec"]
    assert specs["RayJob"]["properties"]["rayClusterSpec"] == specs["RayCluster"], "one schema of a cluster"
    clusters = [_cluster(each) for each in manifests if each["kind"] in specs]
    copy["RayCluster"] = trimmed(specs["RayCluster"], clusters, "RayCluster")
    specs["RayJob"]["properties"]["rayClusterSpec"] = {"$ref": "#/RayCluster"}
    jobs = [each["spec"] | {"rayClusterSpec": {}} for each in manifests if each["kind"] == "RayJob"]
    copy["RayJob"] = trimmed(specs["RayJob"], jobs, "RayJob")
    sys.stdout.write(json.dumps(copy, indent=1, sort_keys=True) + "\n")


def trimmed(schema: dict[str, Any], used: list[Any], where: str) -> dict[str, Any]:
    """`schema` without what is long and in none of the values `used`; other fields are then refused."""
    if "items" in schema:
        inside = [item for each in used for item in each]
        return schema | {"items": trimmed(schema["items"], inside, f"{where}[]")}
    if "properties" not in schema:
        return schema
    names = {name for each in used for name in each}
    if unknown := names - set(schema["properties"]):
        raise SystemExit(f"{where}: KubeRay knows no {', '.join(sorted(unknown))}")
    kept = {
        name: trimmed(each, [value[name] for value in used if name in value], f"{where}.{name}")
        for name, each in schema["properties"].items()
        if name in names or len(json.dumps(each)) < SHORT
    }
    return schema | {"properties": kept, "additionalProperties": False}


def _cluster(manifest: dict[str, Any]) -> Any:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


if __name__ == "__main__":
    main()
