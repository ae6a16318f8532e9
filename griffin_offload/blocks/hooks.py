"""What is put on stock modules for one pass, and known by its type, so that none can stay behind."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_MULTIPLE = 16
"""Chunks of tokens come in multiples of this: the GEMM kernels' row blocks."""


class PassHook:
    """A hook of a pass: known by its type, so that none can stay behind, whenever an interrupt comes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class PassForward:
    """A forward that stands in for a module's own during a pass, around which it is made."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward


def hooks_on(module: nn.Module) -> list[Any]:
    """All forward hooks of `module`, whoever put them there, those before it last."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def unhook(module: nn.Module) -> None:
    """Take every hook and forward of a pass off `module`."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, PassHook)]:
            del hooks[key]
    if isinstance(module.__dict__.get("forward"), PassForward):
        del module.forward


class ChunkedForward(PassForward):
    """The forward of an FF module during a pass: the stock one, over a chunk of tokens at a time."""

    def __init__(self, forward: Callable[..., Tensor], limit: int) -> None:
        super().__init__(forward)
        self._limit = limit
        self.start = 0
        """Number of the first token of the chunk that passes."""

    def __call__(self, *args: Tensor) -> Tensor:
        self.start = 0
        return self.in_chunks(args)

    def in_chunks(self, args: tuple[Tensor, ...]) -> Tensor:
        """At most `limit` tokens at a time; all arguments are [B, T, H] and so is the result."""
        tokens = args[0].shape[1]
        if tokens <= self._limit:
            output: Tensor = self._forward(*args)
            return output
        chunk = chunk_of(tokens, self._limit)
        output = torch.empty_like(args[0])
        for start in range(0, tokens, chunk):
            self.start = start
            output[:, start : start + chunk] = self._forward(
                *(arg[:, start : start + chunk].contiguous() for arg in args)
            )
        return output


def chunk_of(tokens: int, limit: int) -> int:
    """Tokens of one of the equal chunks that `tokens`, more than `limit`, are divided into: a short last one would take
    another path through the GEMM kernels and round differently."""
    chunk = -(-tokens // -(-tokens // limit))
    return min(-(-chunk // CHUNK_MULTIPLE) * CHUNK_MULTIPLE, limit) if limit >= CHUNK_MULTIPLE else chunk


def whole_chunk(fitting: int) -> int:
    """The largest chunk of at most `fitting` tokens, but at least the smallest that the kernels like."""
    return max(fitting // CHUNK_MULTIPLE * CHUNK_MULTIPLE, CHUNK_MULTIPLE)
