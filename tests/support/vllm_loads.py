# ruff: noqa: E402
"""Run by an interpreter that has vLLM: what vLLM makes of the directories that are named, a line of JSON for each.

vLLM needs no compiled part for this: its config is read, its model built on the CPU, and every tensor given to its
loader. Kernels are only chosen, and here the ones that it has for CUDA (Marlin), as its CPU has none for 8 bits or for
packed experts. Nothing is computed. An install of vLLM without its extensions is enough (VLLM_TARGET_DEVICE=empty).
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

import torch
import vllm.platforms
from safetensors.torch import load_file
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # its own guess goes by the install's name

from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as experts,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16 as linears
from vllm.model_executor.model_loader.utils import initialize_model


class Marlin(MarlinLinearKernel):
    """Which needs a GPU only to run."""

    @classmethod
    def can_implement(cls, config: object) -> tuple[bool, str | None]:
        return True, None


MARLIN = int_wna16.WNA16MoEBackend.MARLIN
linears.choose_mp_linear_kernel = lambda config: Marlin
experts.select_wna16_moe_backend = lambda **_: (MARLIN, int_wna16.backend_to_kernel_cls(MARLIN)[0])


def found(directory: Path) -> dict[str, object]:
    config = ModelConfig(model=str(directory))
    whole = VllmConfig(model_config=config, device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(whole):
        ensure_model_parallel_initialized(1, 1)
        torch.set_default_dtype(config.dtype)
        model = initialize_model(whole)
        tensors = [item for file in sorted(directory.glob("*.safetensors")) for item in load_file(file).items()]
        loaded = model.load_weights(iter(tensors))
    destroy_model_parallel()  # of a dense model it lacks what experts need
    own = {name for name, _ in model.named_parameters() if ".attn." not in name}  # those are scales of a KV cache
    return {
        "architecture": config.architectures[0],
        "quantization": config.quantization,
        "unset": sorted(own - loaded),
        "packed": sum(name.endswith("_packed") for name in own),
    }


if __name__ == "__main__":
    place = f"file://{sys.argv[1]}/rendezvous"
    init_distributed_environment(1, 0, place, 0, "gloo")
    print(json.dumps([found(Path(name)) for name in sys.argv[2:]]))
