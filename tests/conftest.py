"""Settings of the whole suite: one thread for tiny tensors, and no file outside the test's own folders."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")  # the same examples in every run; --hypothesis-profile=default draws new ones


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decompositions that no test named a folder for go into a folder of this run."""
    os.environ["FLEXMORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray's token file goes into a home of this run, and its environment variables do not stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def local_ray(ray_home: None) -> Iterator[None]:
    """A small Ray cluster of this process, for the tests of one file."""
    from flexmore_ray.runtime import cluster

    with cluster(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def loopback() -> Iterator[None]:
    """Simulated clusters (`ray.cluster_utils.Cluster`) listen on the loopback address, as ``ray.init`` does here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        yield


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The URL of an S3-compatible server with an empty bucket."""
    from tests.object_store import s3_server

    with s3_server() as url:
        yield url
