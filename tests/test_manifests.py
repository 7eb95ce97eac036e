"""cluster/kubernetes, the image and Serve's configs: against the published schemas, and against each other.

The schemas are those of KubeRay's resources and of Kubernetes (tests/schemas), and of Serve's config. That every field
exists and that the files agree is shown here, without a Kubernetes; that a cluster comes up is not.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from flexmore_ray.plan import read_plan
from tests.command_lines import ROOT, flexmore_parser, pinned
from tests.schemas.compact import RULES

CLUSTER = ROOT / "cluster"
KUBERNETES = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
SPECS = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
FREE = {  # mappings whose keys are the user's own
    *("labels", "annotations", "matchLabels", "nodeSelector", "data", "stringData", "metadata"),
    *("requests", "limits", "rayStartParams"),
}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def every_document(*kinds: str) -> list[Any]:
    found = [(path.stem, document) for path in KUBERNETES for document in documents(path)]
    return [
        pytest.param(document, id=f"{stem}-{document['kind']}-{document['metadata']['name']}")
        for stem, document in found
        if not kinds or document["kind"] in kinds
    ]


def named(name: str, kind: str) -> dict[str, Any]:
    [document] = [d for d in documents(CLUSTER / "kubernetes" / f"{name}.yaml") if d["kind"] == kind]
    return document


def ray_cluster(document: dict[str, Any]) -> dict[str, Any]:
    """The description of the Ray cluster in one of KubeRay's resources."""
    for key in SPECS[document["kind"]]:
        document = document[key]
    return document


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's group and those of the workers."""
    cluster = ray_cluster(document)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates that a document writes out."""
    if document["kind"] == "StatefulSet":
        return [document["spec"]["template"]]
    if document["kind"] not in SPECS:
        return []
    submitter = document["spec"].get("submitterPodTemplate")
    return [*(group["template"] for group in groups(document)), *([submitter] if submitter else [])]


# ----------------------------------------------------------------------------------------------------- schemas


@cache
def _schemas() -> dict[str, tuple[dict[str, Any], jsonschema.Validator]]:
    def rules(validator: Any, texts: list[str], instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
        """Rules on a change hold for new objects; any other would have to be evaluated, which this test cannot."""
        yield from (jsonschema.ValidationError(f"has a rule: {text}") for text in texts if "oldSelf" not in text)

    strict = jsonschema.validators.extend(jsonschema.Draft202012Validator, {RULES: rules})
    found = {}
    for file in ("kuberay", "kubernetes"):
        schemas = json.loads((ROOT / "tests" / "schemas" / f"{file}.json").read_text(encoding="utf-8"))
        for kind, reference in schemas["kinds"].items():
            schema = {"$defs": schemas["$defs"], **reference}
            found[kind] = (schemas["source"], strict(schema))
    return found


def problems(document: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a Kubernetes resource by its schema; an unknown field is."""
    kind = document.get("kind", "")
    if kind not in _schemas():
        yield f"kind: unknown: {kind!r}"
        return
    versions = {"ray.io/v1"} if kind in SPECS else {"v1", "apps/v1", "networking.k8s.io/v1", "policy/v1"}
    if document.get("apiVersion") not in versions:
        yield f"apiVersion: {document.get('apiVersion')!r}"
    for validator, part in ((_schemas()["ObjectMeta"][1], document["metadata"]), (_schemas()[kind][1], document)):
        yield from (f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(part))


@pytest.mark.parametrize("document", every_document())
def test_manifests_follow_the_published_schemas(document):
    assert list(problems(document)) == []


def fields(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all fields that a schema names."""
    if isinstance(node, dict):
        for key, child in node.items():
            yield (*place, key)
            selects_pods = key == "selector" and all(isinstance(value, str) for value in child.values())  # of a Service
            if (key not in FREE and not selects_pods) or (*place, key) == ("metadata",):
                yield from fields(child, (*place, key))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from fields(child, (*place, index))


@pytest.mark.parametrize("document", every_document())
def test_a_typo_in_any_field_is_found(document):
    places = [place for place in fields(document) if isinstance(place[-1], str) and place != ("metadata",)]
    assert len(places) >= 4
    for *parents, key in places:
        wrong = copy.deepcopy(document)
        node = wrong
        for parent in parents:
            node = node[parent]
        node[f"{key}x"] = node.pop(key)
        assert any(problems(wrong)), f"{parents}: {key}x went unnoticed"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("authOptions", "mode"), "tokens"),
        (("autoscalerOptions", "version"), "v3"),
        (("workerGroupSpecs", 0, "minReplicas"), "1"),
        (("headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"), "16GB"),
        (("headGroupSpec", "template", "spec", "containers"), {}),
        (("workerGroupSpecs", 0, "labels", "pool"), 1),
    ],
)
def test_a_wrong_value_is_found(place, value):
    document = copy.deepcopy(named("raycluster", "RayCluster"))
    node: Any = document["spec"]
    for key in place[:-1]:
        node = node[key]
    assert place[-1] in node if isinstance(node, dict) else True
    node[place[-1]] = value
    assert any(problems(document))


def test_upgrades_step_by_step_are_what_the_comment_says():
    document = copy.deepcopy(named("serve", "RayService"))
    options = {"gatewayClassName": "istio", "stepSizePercent": 10, "intervalSeconds": 30, "maxSurgePercent": 50}
    document["spec"]["upgradeStrategy"] = {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": options,
    }
    assert list(problems(document)) == []


def test_the_volume_fits_every_pod():
    text = (CLUSTER / "kubernetes" / "storage.yaml").read_text(encoding="utf-8")
    lines = yaml.safe_load("\n".join(line[2:] for line in text.splitlines() if line.startswith("#|")))
    claim = lines["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == named("storage", "PersistentVolumeClaim")["metadata"]["name"]
    for name, kind in (("raycluster", "RayCluster"), ("grid", "RayJob"), ("search", "RayJob"), ("serve", "RayService")):
        document = copy.deepcopy(named(name, kind))
        for group in groups(document):
            group["template"]["spec"]["volumes"] += lines["volumes"]
            group["template"]["spec"]["containers"][0]["volumeMounts"] += lines["containers"][0]["volumeMounts"]
        assert list(problems(document)) == []


def test_schemas_say_where_they_come_from():
    for kind, (source, _) in _schemas().items():
        assert source["sha256"], kind
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in source["sha256"].values())
    assert "--version " + _schemas()["RayCluster"][0]["tag"].removeprefix("v") in KUBERNETES[0].read_text("utf-8")


# -------------------------------------------------------------------------- what the files say of one another


def project_version() -> str:
    return re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)[0]


def test_one_version_of_ray_everywhere():
    ray = pinned("ray")
    for parameter in every_document(*SPECS):
        assert ray_cluster(parameter.values[0])["rayVersion"] == ray
    for file in (CLUSTER / "Dockerfile", CLUSTER / "aws.yaml"):
        assert re.findall(r"\bray==(\S+)", file.read_text("utf-8")) == [ray]
    assert f"ray[serve,tune]=={ray}" in (ROOT / "pyproject.toml").read_text("utf-8")


def test_images_are_those_of_this_version():
    images = [
        (container["image"], "nvidia.com/gpu" in container.get("resources", {}).get("limits", {}))
        for parameter in every_document(*SPECS)
        for pod in pods(parameter.values[0])
        for container in pod["spec"]["containers"]
    ]
    assert len(images) > 10
    for image, gpu in images:
        assert image == f"registry.example/flexmore:{project_version()}-{'gpu' if gpu else 'cpu'}"
        assert f"--tag {image}" in (CLUSTER / "Dockerfile").read_text("utf-8")


@pytest.mark.parametrize("document", every_document(*SPECS, "StatefulSet"))
def test_pods_are_admitted_to_a_restricted_namespace(document):
    enforced = named_in_base("Namespace", "flexmore")["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"
    confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in pods(document):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert confined.items() <= container["securityContext"].items()
            assert container["resources"]["limits"]["memory"]
        kinds = {key for volume in pod["spec"].get("volumes", []) for key in volume if key != "name"}
        assert kinds <= {"emptyDir", "secret", "configMap", "persistentVolumeClaim"}
    if document["kind"] in SPECS:
        assert confined.items() <= ray_cluster(document)["autoscalerOptions"]["securityContext"].items()


def named_in_base(kind: str, name: str) -> dict[str, Any]:
    [document] = [
        d for d in documents(CLUSTER / "kubernetes" / "base.yaml") if (d["kind"], d["metadata"]["name"]) == (kind, name)
    ]
    return document


@pytest.mark.parametrize("document", every_document(*SPECS))
def test_clusters_ask_for_a_token_and_scale(document):
    cluster = ray_cluster(document)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["maxReplicas"]
        assert "restartPolicy" not in group["template"]["spec"]  # which autoscaler v2 sets
    assert len(document["metadata"]["name"]) <= 47  # which KubeRay asks, for what it appends


@pytest.mark.parametrize("document", every_document(*SPECS))
def test_pods_of_a_group_are_the_same_in_every_file(document):
    def bare(pod: dict[str, Any]) -> dict[str, Any]:
        pod = copy.deepcopy(pod["spec"])
        pod.pop("topologySpreadConstraints", None)
        for part, key in ((pod, "volumes"), (pod["containers"][0], "volumeMounts"), (pod["containers"][0], "ports")):
            part[key] = [item for item in part[key] if item["name"] not in ("plan", "keys", "serve")]
        return pod

    known = {group.get("groupName", "head"): group for group in groups(named("raycluster", "RayCluster"))}
    for group in groups(document):
        assert bare(group["template"]) == bare(known[group.get("groupName", "head")]["template"])


@pytest.mark.parametrize("document", every_document(*SPECS, "StatefulSet"))
def test_what_pods_refer_to_exists(document):
    everything = [parameter.values[0] for parameter in every_document()]
    names = {kind: {d["metadata"]["name"]: d for d in everything if d["kind"] == kind} for kind in _schemas()}
    text = json.dumps(document)
    for name in re.findall(r'"serviceAccountName": "([^"]+)"', text):
        assert name in names["ServiceAccount"]
    for name in re.findall(r'"configMap": {"name": "([^"]+)"', text):
        assert name in names["ConfigMap"]
    for name in re.findall(r'"secretName": "([^"]+)"', text):
        assert name in names["Secret"]
    for reference in re.findall(r'"secret(?:Key)?Ref": ({[^}]+})', text):
        secret = json.loads(reference)
        assert secret["name"] in names["Secret"]
        assert secret.get("key", "password") in names["Secret"][secret["name"]]["stringData"] or "key" not in secret
    if address := ray_cluster(document).get("gcsFaultToleranceOptions") if document["kind"] in SPECS else None:
        assert address["redisAddress"].split(":")[0] in names["Service"]


def test_examples_of_secrets_hold_none():
    for parameter in every_document("Secret"):
        assert not any(parameter.values[0]["stringData"].values())


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))


def test_the_network_is_closed_but_to_a_clusters_own_pods():
    policies = [parameter.values[0] for parameter in every_document("NetworkPolicy")]
    [deny] = [policy for policy in policies if policy["spec"]["podSelector"] == {}]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for parameter in every_document(*SPECS):
        document = parameter.values[0]
        name = document["metadata"]["name"]
        [own] = [policy["spec"] for policy in policies if policy["metadata"]["name"] == name]
        mine = {"podSelector": {"matchLabels": {"app.kubernetes.io/instance": name}}}
        assert {"from": [mine]} in own["ingress"]
        assert own["egress"] == [{"to": [mine]}]
        for pod in pods(document):
            assert matches(own["podSelector"], pod["metadata"]["labels"])
            assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "flexmore"
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            assert all("podSelector" in peer or "namespaceSelector" in peer for peer in rule["from"])
            ports = [port["port"] for port in rule.get("ports", [])]
            assert ports or rule["from"] == [{"podSelector": policy["spec"]["podSelector"]}]


def test_the_service_of_redis_finds_its_pod():
    selected = named("redis", "Service")["spec"]["selector"]
    stateful = named("redis", "StatefulSet")["spec"]
    labels = stateful["template"]["metadata"]["labels"]
    assert matches({"matchLabels": selected}, labels)
    assert matches(stateful["selector"], labels)


def test_the_budget_of_disruptions_counts_the_serving_nodes():
    budget = named("serve", "PodDisruptionBudget")["spec"]["selector"]
    [worker] = groups(named("serve", "RayService"))[1:]
    assert matches(budget, worker["template"]["metadata"]["labels"] | {"ray.io/node-type": "worker"})


# --------------------------------------------------------------------------------------------- jobs and serving


def test_jobs_have_room_for_what_they_ask():
    for name in ("grid", "search"):
        job = named(name, "RayJob")
        args = flexmore_parser().parse_args(job["spec"]["entrypoint"].split()[1:])
        by_pool = {group["labels"]["pool"]: group for group in ray_cluster(job)["workerGroupSpecs"]}
        assert {pin.partition("=")[2] for pin in args.pin} == {"pool=experts"}
        assert "nodeSelector" not in by_pool["experts"]["template"]["spec"], "experts stand on nodes that stay"
        assert by_pool["experts"]["minReplicas"] >= 1
        assert args.workers == by_pool["work"]["maxReplicas"]
        assert (
            args.gpus == by_pool["work"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        )
        assert job["spec"]["backoffLimit"] > 0
        assert job["spec"]["metadata"]["job_name"].split()[0] == args.command


def test_the_plan_of_the_grid_can_be_read(tmp_path):
    text = named("grid", "ConfigMap")["data"]["plan.yaml"]
    file = tmp_path / "plan.yaml"
    file.write_text(text, encoding="utf-8")
    plan = read_plan(file)
    entrypoint = named("grid", "RayJob")["spec"]["entrypoint"]
    assert {pin.partition("=")[0] for pin in flexmore_parser().parse_args(entrypoint.split()[1:]).pin} == set(
        (plan.experts or ())[1:]
    )


def serve_configs() -> list[Any]:
    own = (ROOT / "serve" / "config.yaml").read_text(encoding="utf-8")
    return [
        pytest.param(yaml.safe_load(own), id="config"),
        pytest.param(yaml.safe_load(named("serve", "RayService")["spec"]["serveConfigV2"]), id="RayService"),
    ]


def serve_problems(config: dict[str, Any]) -> list[str]:
    """What Serve, and the application, find wrong with a config; Serve itself ignores what it does not know."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    from flexmore_ray.errors import UsageError
    from serve.settings import read_settings

    try:
        schema = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        return [str(error)]

    def unknown(given: Any, read: Any, where: str) -> Iterator[str]:
        if isinstance(given, dict):
            fields = type(read).model_fields if hasattr(type(read), "model_fields") else None
            for key, value in given.items():
                if fields is not None and key not in fields:
                    yield f"{where}{key}: unknown"
                elif fields is not None:
                    yield from unknown(value, getattr(read, key), f"{where}{key}.")
        elif isinstance(given, list) and isinstance(read, list):
            for index, (one, other) in enumerate(zip(given, read, strict=True)):
                yield from unknown(one, other, f"{where}{index}.")

    found = list(unknown(config, schema, ""))
    for application in config["applications"]:
        try:
            read_settings(application.get("args", {}))
        except UsageError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("config", serve_configs())
def test_serve_configs_follow_the_schema_of_serve_and_the_settings(config):
    assert serve_problems(config) == []
    [application] = config["applications"]
    assert application["import_path"] == "serve.app:build_app"
    for wrong in ("applicationss", "http_option"):
        assert serve_problems(config | {wrong: {}})
    for place in ("name", "import_path", "route_prefix", "args"):
        other = copy.deepcopy(config)
        other["applications"][0][f"{place}x"] = other["applications"][0].pop(place)
        assert serve_problems(other)
    for setting in application["args"]:
        other = copy.deepcopy(config)
        args = other["applications"][0]["args"]
        args[f"{setting}x"] = args.pop(setting)
        assert serve_problems(other), setting


@pytest.mark.parametrize("config", serve_configs())
def test_serve_configs_build(config, tmp_path):
    from serve.app import build_app
    from serve.settings import Settings

    keys = tmp_path / "keys"
    keys.write_text("a-key-that-is-long-enough\n", encoding="utf-8")
    here = {"mixture": "zoo://nano", "device": "cpu", "api_key_file": str(keys), "admin_key_file": str(keys)}
    application = build_app(Settings(**config["applications"][0]["args"] | here))
    assert application._bound_deployment.name == "ingress"


def test_keys_are_mounted_where_the_service_reads_them():
    service = named("serve", "RayService")
    args = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    [secret] = [d for d in documents(CLUSTER / "kubernetes" / "secrets.example.yaml") if "api-keys" in d["stringData"]]
    for group in groups(service):  # any of them may be where the application is built
        spec = group["template"]["spec"]
        [volume] = [
            v["name"] for v in spec["volumes"] if v.get("secret", {}).get("secretName") == secret["metadata"]["name"]
        ]
        [mount] = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == volume]
        for setting in ("api_key_file", "admin_key_file"):
            folder, _, file = args[setting].rpartition("/")
            assert (folder, mount["readOnly"]) == (mount["mountPath"], True)
            assert file in secret["stringData"]


# -------------------------------------------------------------------------------------------------------- image


def test_the_image(tmp_path):
    parser = DockerfileParser(path=str(tmp_path), cache_content=True)
    parser.content = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    steps = [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]
    sources = [word for kind, value in steps if kind == "COPY" for word in value.split()[:-1]]
    assert len(sources) == 7
    for source in sources:
        assert (ROOT / source).exists()
    assert [value for kind, value in steps if kind == "USER"] == ["1000:1000"]
    assert all(
        re.fullmatch(r"python:3\.11\.\d+-slim-\w+( AS wheel)?", value) for kind, value in steps if kind == "FROM"
    )
    installs = [value for kind, value in steps if kind == "RUN" and "pip install" in value]
    assert ["torch==" in value for value in installs] == [True, False], "torch first and alone"
    for value in installs:
        assert "--no-cache-dir" in value
        assert "--constraint /etc/flexmore/constraints.txt" in value
        for package, version in re.findall(r"\b(\w+)==([\w.]+)", value):
            assert version == pinned(package)
    environment = dict(item.split("=", 1) for kind, value in steps if kind == "ENV" for item in value.split())
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_SERVE_USE_GRPC_BY_DEFAULT"] == "1"
