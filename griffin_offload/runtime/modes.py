"""Modes of torch that a caller may be in and that must not reach the weights or what outlives a call."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """No gradients, no inference mode, no autocast inside, whatever the caller's are.

    Tensors made in inference mode (residents, KV caches) could not be written to outside of it; and autocast would
    compute in another precision than the one that was planned and loaded (`dtype`).
    """
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield
