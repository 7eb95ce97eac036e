"""Folders in the layouts of checkpoints: made whole or not at all, and read back before they are called done."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flexmore_ray.checkpoint import TOKENIZER_FILES, TensorFolder
from flexmore_ray.errors import CheckpointError, UsageError
from flexmore_ray.storage import AnyPath, RemotePath, StorageError, matching, output_folder

_SHARD_BYTES = 2 << 30
_MARKS = ("config.json", "adapter_config.json")  # without which a folder is no checkpoint and no adapter

TensorPlan = Mapping[str, Callable[[], Tensor]]
"""Tensor name -> how to make it; a plan is made and checked twice, when writing and when verifying."""


@contextlib.contextmanager
def new_folder(out: AnyPath) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends without an error.

    In an object store its files appear one by one, when all are made and verified here, and those without which it is
    no checkpoint last.

    Raises:
        UsageError: `out` exists and is not an empty folder.
        CheckpointError: the folder cannot be written (full disk, no permission); nothing is left.
    """
    check_new(out)
    if isinstance(out, RemotePath):
        try:
            with output_folder(out, last=_MARKS) as folder:
                yield folder
        except StorageError:
            raise
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{out}: cannot be made here: {' '.join(str(error).split())}; TMPDIR says where"
            ) from error
        return
    out = out.resolve()
    _remove_abandoned(out)
    partial = out.with_name(f".{out.name}.partial-{platform.node()}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written: {' '.join(str(error).split())}; nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(out: AnyPath) -> None:
    """Check that a folder to be made is not there yet, or is empty.

    Raises:
        UsageError: it holds something, or is a file, or has no name.
    """
    if not out.name:
        raise UsageError(f"--out: the name of a new folder is needed, got {str(out)!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists already; choose another --out or remove it")


def _remove_abandoned(out: Path) -> None:
    """Remove what a killed run on this machine left of the same folder."""
    for path in out.parent.glob(f".{out.name}.partial-{platform.node()}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


def write_tensors(folder: Path, plan: TensorPlan, stem: str = "model", shard_bytes: int = _SHARD_BYTES) -> None:
    """Write a plan's tensors as one safetensors file, or as shards of at most `shard_bytes` with an index.

    One shard is in memory at a time. The files are read back and compared with the plan.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = 0
    for name, make in plan.items():
        tensor = make().detach().cpu().contiguous()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name} is not finite in {tensor.dtype}; choose --dtype bfloat16 or float32")
        if shard and size + tensor.nbytes > shard_bytes:
            _write_shard(folder, stem, len(shards), shard)
            shards.append(list(shard))
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    _write_shard(folder, stem, len(shards), shard)
    shards.append(list(shard))
    _name_shards(folder, stem, shards)
    verify_tensors(folder, plan, stem)


def verify_tensors(folder: Path, plan: TensorPlan, stem: str = "model") -> None:
    """Read a folder's tensors back and compare them bit for bit with what the plan makes.

    Raises:
        CheckpointError: a tensor is missing or differs.
    """
    tensors = TensorFolder(folder, stem)
    if set(tensors.names()) != set(plan):
        raise CheckpointError(f"{folder}: verification failed: tensors written are not those that were planned")
    for name, make in plan.items():
        if not torch.equal(tensors.read(name), make().detach().cpu()):
            raise CheckpointError(f"{folder}: verification failed: tensor {name} reads back different")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json``."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: AnyPath, folder: Path) -> None:
    """Copy the tokenizer files of a checkpoint folder, where it has any."""
    for pattern in (*TOKENIZER_FILES, "generation_config.json"):
        for path in matching(source, pattern):
            (folder / path.name).write_bytes(path.read_bytes())


def _write_shard(folder: Path, stem: str, number: int, shard: Mapping[str, Tensor]) -> None:
    save_file(dict(shard), folder / f"{stem}-{number}.part", metadata={"format": "pt"})


def _name_shards(folder: Path, stem: str, shards: Sequence[Sequence[str]]) -> None:
    """Give shards their final names, now that their number is known, and write the index."""
    if len(shards) == 1:
        (folder / f"{stem}-0.part").rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{stem}-{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
