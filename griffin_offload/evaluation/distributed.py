"""Several processes that share an evaluation: torchrun or accelerate start them, each has its own model and budget."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from griffin_offload.config import LoadConfig
from griffin_offload.devices.memory import budget_bytes
from griffin_offload.devices.registry import choose_device


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int = 0
    size: int = 1
    accelerator: Any = None
    """accelerate's, when there are several. They exchange counts and metrics alone, so gloo serves every device."""

    @classmethod
    def launched(cls) -> "Processes":
        """As the launcher's environment says; waits for the others."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        patience = InitProcessGroupKwargs(timeout=timedelta(weeks=1))  # one rank may have far longer requests
        accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
        return cls(accelerator.process_index, accelerator.num_processes, accelerator)

    @property
    def first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def all_agree(self, ok: bool) -> bool:
        """Whether `ok` holds in every process."""
        if self.size == 1:
            return ok
        return bool(self.accelerator.gather(torch.tensor([int(ok)], dtype=torch.long, device="cpu")).all())

    def gather(self, own: Any) -> list[Any]:
        """What every process has, in order."""
        if self.size == 1:
            return [own]
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([own])
        return found

    def share(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options for this process's model: a GPU of its own, or its part of the free memory where the CPU computes and
        nobody said how much."""
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if self.size == 1:
            return options
        device = choose_device(options.get("device", LoadConfig.device))
        if device.give_processes_their_own(on_this_machine, int(os.environ.get("LOCAL_RANK", "0"))):
            return options
        if options.get("max_gpu_mem", LoadConfig.max_gpu_mem) == "auto" and not options.get("max_cpu_mem"):
            free = budget_bytes(LoadConfig(**options), device)
            self.accelerator.wait_for_everyone()
            options = options | {"max_gpu_mem": free // on_this_machine}
        return options

    def end(self) -> None:
        """Wait until all have come this far, and close what connects them: gloo's threads abort a process that finds
        another one gone while it ends."""
        if self.size > 1:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
