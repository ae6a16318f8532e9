"""The CPU: its memory is the host's, and everything is done when a call returns."""

import torch
from torch import Tensor

from griffin_offload.devices.base import Device
from griffin_offload.devices.memory import block_buffer, host_bytes


class CpuDevice(Device):
    """The machine's processors."""

    name = "cpu"
    shares_host_memory = True
    queues_work = False

    @classmethod
    def available(cls) -> bool:
        return True

    def memory_bytes(self) -> tuple[int, int]:
        return host_bytes()

    def slot(self, nbytes: int) -> Tensor:
        return block_buffer(nbytes)

    def gemm_dtypes(self, dtype: torch.dtype) -> set[torch.dtype]:
        return {dtype, torch.float32}
