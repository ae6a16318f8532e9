"""The kinds of devices by name: which of them are here, and which one is meant. The CPU and Apple's GPUs (torch's Metal
backend: no asynchronous copies, and no measure of their own memory) take a few lines each, and are here, too."""

import torch
from torch import Tensor

from griffin_offload.config import DEVICE_NAMES
from griffin_offload.devices.base import Device
from griffin_offload.devices.gpu import CudaDevice, XpuDevice
from griffin_offload.devices.memory import block_buffer, host_bytes
from griffin_offload.errors import UsageError


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


# Those first that "auto" prefers.
_kinds: dict[str, type[Device]] = {kind.name: kind for kind in (CudaDevice, XpuDevice, MpsDevice, CpuDevice)}


def register_device(kind: type[Device]) -> None:
    """Let `kind` be chosen by its name from now on; "auto" prefers all others. UsageError if the name is taken."""
    if kind.name in DEVICE_NAMES:
        raise UsageError(f"a device is named {kind.name!r} already")
    DEVICE_NAMES.append(kind.name)
    _kinds[kind.name] = kind


def unregister_device(kind: type[Device]) -> None:
    """Undo `register_device`."""
    DEVICE_NAMES.remove(kind.name)
    del _kinds[kind.name]


def device_kind(name: str) -> type[Device]:
    """The kind named `name`, here or not; UsageError for none."""
    if name not in _kinds:
        raise UsageError(f"no device is named {name!r}: choose one of {', '.join(_kinds)}")
    return _kinds[name]


def devices_here() -> list[str]:
    """The devices of this machine, those first that "auto" prefers."""
    return [name for name, kind in _kinds.items() if kind.available()]


def choose_device(name: str) -> Device:
    """The device meant by "auto" or a name; UsageError when it is not there."""
    here = devices_here()
    if name == "auto":
        name = here[0]
    if name not in here:
        raise UsageError(f"device {name} is not available here: use --device {', '.join(here)}")
    return device_kind(name).current()
