"""Published schemas in a compact form for tests/test_manifests.py: field names, types and rules, without prose.

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay
    pip download --no-deps kubernetes-validate==1.37.0
    python -m tests.schemas.compact kuberay/helm-chart/kuberay-operator/crds kubernetes_validate-1.37.0-py3-none-any.whl

writes kuberay.json and kubernetes.json here, both plain JSON Schema, with the SHA-256 of what they were made from. An
object admits the fields that its schema names and no others, and what is alike is written once.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
KUBERAY = {"repository": "https://github.com/ray-project/kuberay", "tag": "v1.7.0"}
KUBERNETES = {"package": "kubernetes-validate", "version": "1.37.0", "kubernetes": "1.37.0"}
CUSTOM_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
CORE_KINDS = {
    "ConfigMap": "core.v1",
    "Namespace": "core.v1",
    "NetworkPolicy": "networking.v1",
    "PersistentVolumeClaim": "core.v1",
    "PodDisruptionBudget": "policy.v1",
    "Secret": "core.v1",
    "Service": "core.v1",
    "ServiceAccount": "core.v1",
    "StatefulSet": "apps.v1",
}
RULES = "x-kubernetes-validations"
"""Keyword of rules in the Common Expression Language; kept as a list of their texts."""
_KEPT = (
    *("$ref", "type", "enum", "required", "pattern", "minimum", "maximum", "minItems", "minLength", "maxLength"),
    *("anyOf", "oneOf"),
)
_SHARED_BYTES = 60  # a schema of fewer is written where it stands


def compact(schema: Mapping[str, Any]) -> dict[str, Any]:
    """An OpenAPI schema as JSON Schema that refuses unknown fields."""
    kept = {key: schema[key] for key in _KEPT if key in schema}
    for key in ("anyOf", "oneOf"):
        if key in kept:
            kept[key] = [compact(option) for option in kept[key]]
    if schema.get("nullable") and isinstance(kept.get("type"), str):
        kept["type"] = [kept["type"], "null"]
    if isinstance(kept.get("type"), list) and kept["type"][-1] == "null" and not schema.get("nullable"):
        kept["type"] = kept["type"][0]  # the package admits null everywhere, for clients that write it for "not set"
    if "properties" in schema:
        kept["properties"] = {name: compact(field) for name, field in schema["properties"].items() if name != "status"}
    if rules := [rule["rule"] for rule in schema.get(RULES, [])]:
        kept[RULES] = rules
    if "items" in schema:
        kept["items"] = compact(schema["items"])
    more = schema.get("additionalProperties")
    if isinstance(more, Mapping):
        kept["additionalProperties"] = compact(more)
    elif "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    return kept


def share(schemas: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Schemas by name, in which what is alike has become one definition."""
    definitions: dict[str, Any] = {}

    def shared(schema: dict[str, Any]) -> dict[str, Any]:
        schema = dict(schema)
        if "properties" in schema:
            schema["properties"] = {name: shared(field) for name, field in schema["properties"].items()}
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                schema[key] = shared(schema[key])
        text = json.dumps(schema, sort_keys=True)
        if len(text) < _SHARED_BYTES:
            return schema
        name = hashlib.sha256(text.encode()).hexdigest()[:8]
        definitions[name] = schema
        return {"$ref": f"#/$defs/{name}"}

    kinds = {name: shared(schema) for name, schema in schemas.items()}
    return {"kinds": kinds, "$defs": dict(sorted(definitions.items()))}


def kuberay(folder: Path) -> dict[str, Any]:
    """The v1 schemas of KubeRay's resources.

    Args:
        folder: of the CRDs, as the Helm chart has them.
    """
    texts = {kind: (folder / f"ray.io_{plural}.yaml").read_bytes() for kind, plural in CUSTOM_KINDS.items()}
    schemas = {}
    for kind, text in texts.items():
        versions = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
        [schema] = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
        schemas[kind] = compact(schema)
    digests = {f"ray.io_{CUSTOM_KINDS[kind]}.yaml": hashlib.sha256(text).hexdigest() for kind, text in texts.items()}
    return {"source": KUBERAY | {"sha256": digests}, **share(schemas)}


def kubernetes(wheel: Path) -> dict[str, Any]:
    """The schemas of those of Kubernetes' own resources that the manifests use.

    Args:
        wheel: of the package, which holds the schemas of Kubernetes' OpenAPI document.
    """
    with zipfile.ZipFile(wheel) as files:
        folder = f"kubernetes_validate/kubernetes-json-schema/v{KUBERNETES['kubernetes']}-local-strict"
        known = json.loads(files.read(f"{folder}/_definitions.json"))["$defs"]
    kinds = {kind: f"io.k8s.api.{group}.{kind}" for kind, group in CORE_KINDS.items()}
    kinds["ObjectMeta"] = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
    definitions: dict[str, Any] = {}
    wanted = list(kinds.values())
    while wanted:
        name = wanted.pop()
        if name not in definitions:
            definitions[name] = _local(compact(known[name]))
            wanted.extend(reference.removeprefix("#/$defs/") for reference in _references(definitions[name]))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {
        "source": KUBERNETES | {"sha256": {wheel.name: digest}},
        "kinds": {kind: {"$ref": f"#/$defs/{name}"} for kind, name in kinds.items()},
        "$defs": dict(sorted(definitions.items())),
    }


def _local(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: "#" + value.partition("#")[2] if key == "$ref" else _local(value) for key, value in node.items()}
    return [_local(item) for item in node] if isinstance(node, list) else node


def _references(node: Any) -> Iterable[str]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        yield node["$ref"]
    for child in children:
        yield from _references(child)


def write(schemas: Mapping[str, Any], path: Path) -> None:
    """One definition a line, so that a new release is a readable difference."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in schemas.items() if key != "$defs"]
    definitions = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in schemas["$defs"].items()]
    lines.append('"$defs": {\n' + ",\n".join(definitions) + "\n}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    crds, package = map(Path, sys.argv[1:])
    write(kuberay(crds), FOLDER / "kuberay.json")
    write(kubernetes(package), FOLDER / "kubernetes.json")
