"""Settings of the whole suite: one thread for tiny tensors, and no file outside the test's own folders."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decompositions that no test named a folder for go into a folder of this run."""
    os.environ["FLEXMORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
