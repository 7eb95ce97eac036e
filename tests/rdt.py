"""A direct transport for tensors on the CPU, to run on any machine the code that serves GPUs."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from ray.experimental import CommunicatorMetadata, TensorTransportManager, TensorTransportMetadata


@dataclasses.dataclass
class FileMetadata(TensorTransportMetadata):
    path: str = ""


class FileTransport(TensorTransportManager):
    """One-sided, like `cuda_ipc` and `nixl`: the sender leaves tensors in a file, the receiver reads it."""

    received: ClassVar[int] = 0
    broken: ClassVar[bool] = False

    def tensor_transport_backend(self) -> str:
        return "FILE"

    @staticmethod
    def is_one_sided() -> bool:
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        return False

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        return True

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[torch.Tensor]) -> FileMetadata:
        path = Path(tempfile.mkdtemp()) / "tensors"
        torch.save([tensor.clone() for tensor in rdt_object], path)
        about = [(tensor.shape, tensor.dtype) for tensor in rdt_object]
        return FileMetadata(tensor_meta=about, tensor_device="cpu", path=str(path))

    def get_communicator_metadata(self, src_actor: Any, dst_actor: Any, backend: str | None = None) -> Any:
        return CommunicatorMetadata()

    def recv_multiple_tensors(
        self, obj_id: str, tensor_transport_metadata: Any, communicator_metadata: Any, target_buffers: Any = None
    ) -> list[torch.Tensor]:
        if FileTransport.broken:
            raise ValueError("the sender's memory cannot be read from here")
        tensors = torch.load(tensor_transport_metadata.path)
        FileTransport.received += len(tensors)
        return tensors

    def send_multiple_tensors(self, *arguments: Any) -> None:
        raise AssertionError("a one-sided transport does not send")

    def garbage_collect(self, obj_id: str, tensor_transport_meta: Any, tensors: Any) -> None:
        Path(tensor_transport_meta.path).unlink(missing_ok=True)

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None:
        raise AssertionError("transfers end by themselves")
