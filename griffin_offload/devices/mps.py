"""Apple's GPUs, by torch's Metal backend: without asynchronous copies, and without a measure of their own memory."""

import torch

from griffin_offload.devices.base import Device
from griffin_offload.devices.memory import host_bytes


class MpsDevice(Device):
    """The machine's one GPU. Its memory is physically the host's, but tensors are copied to it as to another's."""

    name = "mps"

    @classmethod
    def available(cls) -> bool:
        return torch.backends.mps.is_available()

    def memory_bytes(self) -> tuple[int, int]:
        return host_bytes()

    def synchronize(self) -> None:
        torch.mps.synchronize()
