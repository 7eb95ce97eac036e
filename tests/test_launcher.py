"""cluster/aws.yaml and its stack: against the schemas of Ray's launcher and of EC2, and on a simulated EC2."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.command_lines import ROOT, pinned

AWS = ROOT / "cluster" / "aws.yaml"
STACK = ROOT / "cluster" / "aws-stack.yaml"


@cache
def prepared() -> dict[str, Any]:
    """The configuration with Ray's defaults, as `ray up` validates it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(AWS.read_text(encoding="utf-8")))
    validate_config(config)
    return config


def instance_problems(node_config: dict[str, Any]) -> str:
    """What EC2's description of RunInstances has against the configuration of a node."""
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    model = ServiceModel(Loader().load_service_model("ec2", "service-2"))
    shape = model.operation_model("RunInstances").input_shape
    return ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, shape).generate_report()


def test_the_launcher_takes_the_configuration():
    config = prepared()
    assert config["head_node_type"] in config["available_node_types"]
    for wrong in ("head_node_typ", "file_mount", "setup_command"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(config | {wrong: "x"}, _ray_schema())
    for field in ("min_worker", "label", "instance"):
        other = copy.deepcopy(config)
        other["available_node_types"]["gpu"][field] = {}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(other, _ray_schema())


def _ray_schema() -> dict[str, Any]:
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))


def test_instances_are_as_ec2_describes_them():
    nodes = {name: node["node_config"] for name, node in prepared()["available_node_types"].items()}
    for node in nodes.values():
        assert instance_problems(node) == ""
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert "Spott" in instance_problems(nodes["gpu"] | {"InstanceMarketOptions": {"Spott": {}}})
    assert "InstanceTyp" in instance_problems({"InstanceTyp": "m7i.large"})


def test_only_workers_of_grids_and_searches_are_on_spot():
    nodes = prepared()["available_node_types"]
    spot = {name for name, node in nodes.items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == {"gpu-spot"}
    assert {nodes[name]["labels"]["pool"] for name in spot} == {"work"}
    assert nodes["experts"]["labels"] == {"pool": "experts"}
    assert nodes["experts"]["min_workers"] >= 1  # a pin must find a node


def test_nodes_get_what_the_repository_has_and_the_lock_file_says():
    config = prepared()
    copied = config["file_mounts"]
    for remote, local in copied.items():
        assert local == "~/.ray/auth_token" or (ROOT / local).exists()
        assert remote.endswith(local.removeprefix("~/"))
    installs = [
        line for key in ("setup_commands", "head_setup_commands") for line in config[key] if "pip install" in line
    ]
    assert len(installs) >= 3
    for line in installs:
        assert "--constraint ~/flexmore/constraints.txt" in line
        for package, version in re.findall(r"(\w+)==([\w.]+)", line):
            assert version == pinned(package)
    for line in (*config["setup_commands"], *config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        subprocess.run(["bash", "-n", "-c", line], check=True)
    assert "RAY_AUTH_MODE=token" in config["setup_commands"][-1]


@pytest.mark.slow
def test_the_launcher_starts_every_kind_of_node_on_a_simulated_ec2(tmp_path, monkeypatch):
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    stack = STACK.read_text(encoding="utf-8")
    with mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        region = prepared()["provider"]["region"]
        ec2, stacks = (boto3.client(name, region_name=region) for name in ("ec2", "cloudformation"))
        parameters = {
            "Vpc": ec2.describe_vpcs()["Vpcs"][0]["VpcId"],
            "Bucket": "my-bucket",
            "SshFrom": "203.0.113.7/32",
        }
        stacks.create_stack(
            StackName="flexmore",
            TemplateBody=stack,
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        )

        def rules() -> Any:
            groups = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["flexmore"]}])
            [group] = groups["SecurityGroups"]
            return group["IpPermissions"]

        before = rules()
        config = AWSNodeProvider.fillout_available_node_types_resources(prepared())
        config = bootstrap_aws(config)
        assert rules() == before, "Ray leaves the security group of the stack as it is"
        assert [rule["IpRanges"] for rule in before if rule["IpRanges"]] == [[{"CidrIp": "203.0.113.7/32"}]]
        assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 1
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, node in config["available_node_types"].items():
            tags = {"ray-node-kind": "worker", "ray-launch-config": "x", "ray-user-node-type": name}
            assert len(provider.create_node(dict(node["node_config"]), tags, 1)) == 1
        profiles = boto3.client("iam").list_instance_profiles()["InstanceProfiles"]
        wanted = {node["node_config"]["IamInstanceProfile"]["Name"] for node in config["available_node_types"].values()}
        assert wanted == {profile["InstanceProfileName"] for profile in profiles}


@pytest.mark.slow
def test_the_stack_follows_the_schema_of_cloudformation():
    from cfnlint.api import lint

    text = STACK.read_text(encoding="utf-8")
    assert [str(found) for found in lint(text)] == []
    assert lint(text.replace("InstanceProfileName", "ProfileName"))


def test_the_stack_has_no_aliases():
    text = STACK.read_text(encoding="utf-8")
    assert not [
        token for token in yaml.scan(text) if isinstance(token, yaml.AnchorToken | yaml.AliasToken)
    ]  # AWS knows none
