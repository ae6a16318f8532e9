"""The contract of a feed-forward (FF) block: all that the rest of the program knows of what a layer's neurons are.

A block is a part of a decoder layer whose neurons are scored while a prompt passes, kept or left out. What a neuron is
belongs to the block: an FF neuron (`FeedForward`), several that stay together, an expert, a neuron of an expert.
Passes, sizes, residents, conversion and the check at load ask the contract; a new kind is a class and a finder
(`layouts.register_block`). How experts are to fill it: docs/how_it_works.md.

What a pass puts on stock modules for as long as it lasts is here, too: hooks and forwards, known by their types, so
that none can stay behind.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.devices.memory import untouched_zeros
from griffin_offload.formats.base import Format, Spec
from griffin_offload.method.allocation import Counts
from griffin_offload.method.selection import squared_statistic, weighted_sum

ALIGNMENT = 256  # of each tensor in a flat buffer: what CUDA copies and vector units like


class Activations:
    """What a block's neurons say to some tokens of every sequence: inside a call of an observer, as its model has it.

    The model's own tensor, [B * T, W] or [B, T, W], W numbers a token; F neurons are made of them. Here W is F.
    """

    def __init__(self, z: Tensor, start: int, *, copied: bool = False) -> None:
        self.z = z
        self.start = start
        """Number of the first of these tokens in each sequence of the pass."""
        self._copied = copied

    def by_sample(self, samples: int) -> "Activations":
        """The same as [B, T, W], for B `samples`."""
        z = self.z.reshape(samples, -1, self.z.shape[-1])
        return type(self)(z, self.start, copied=z.data_ptr() != self.z.data_ptr())

    @property
    def tokens(self) -> int:
        """Of each sequence; asked by sample, as what follows."""
        return self.z.shape[1]

    def part(self, rows: slice, columns: slice) -> "Activations":
        """Those of some samples and tokens, without a copy; `columns` has a start."""
        return type(self)(self.z[rows, columns], self.start + columns.start, copied=self._copied)

    def values(self) -> Tensor:
        """One number for every neuron, [B, T, F]: what it adds to its token's output, or how much."""
        return self.z

    def squared(self, weights: Tensor) -> Tensor:
        """Sum over tokens of weights * value^2 / ||values||^2: float32 [B, G, F] for weights [B, G, T]."""
        return squared_statistic(self.values(), weights)

    def summed(self, weights: Tensor) -> Tensor:
        """Sum over tokens of weights * z: float32 [B, G, W] for weights [B, G, T]."""
        return weighted_sum(self.z, weights)

    def leave_out(self, kept: Tensor, instead: Tensor | None = None) -> None:
        """In the model's own tensor, set all but the neurons `kept` (booleans [F]) to zero, or to `instead` [W]."""
        assert not self._copied, "not the model's own tensor"
        if instead is None:
            self.z.mul_(kept)
        else:
            self.z.copy_(torch.where(kept, self.z, instead.to(self.z.dtype)))


ActivationCallback = Callable[[Activations], None]


class Block(ABC):
    """The FF block of one decoder layer: what its neurons are, how they are installed, gathered and watched.

    Tensors travel as lists, in the order of `full_specs` and `compact_specs`.
    """

    module: nn.Module
    """Whose forward the block is."""
    inline: bool
    """Whether `module` is the decoder layer itself, whose forward does more than the FF (OPT)."""
    neurons: int
    """F: what a statistic has numbers for, and what is kept or left out."""
    hidden: int
    """H."""
    width: int
    """W, numbers of one token that `Activations` hold: F unless a neuron is several of them."""
    linears: tuple[nn.Module, ...]
    """The linear layers that it consists of: they are quantised as a part of it."""
    active: int = 0
    """To how many of its neurons a router sends a token. 0: there is none, and all of them compute."""

    @property
    @abstractmethod
    def gated(self) -> bool:
        """Whether two activations exist for each of W (gate and up), in one matrix or in two."""

    @property
    @abstractmethod
    def formats(self) -> tuple[Format, ...]:
        """Of the resident neurons, from the most bits to the fewest: one, or one for each tier of them."""

    @abstractmethod
    def is_down(self, linear: nn.Module) -> bool:
        """Whether the inputs of `linear` are neurons, whose numbers then stand in its columns."""

    @abstractmethod
    def full(self) -> list[Tensor]:
        """The installed tensors, which are the full ones until compact ones are installed."""

    @property
    def neuron_axis(self) -> int | None:
        """Of the last of its full tensors, which maps neurons to hidden states; None where that is no one matrix."""
        return None

    @abstractmethod
    def full_specs(self, precision: Format | None = None) -> list[Spec]:
        """Tensors as they are stored; `precision` asks about another one."""

    @abstractmethod
    def compact_specs(self, counts: Counts, formats: Sequence[Format] | None = None) -> list[Spec]:
        """Tensors that hold so many neurons in each of `formats` (None: its own), filled up to whole multiples
        (`multiple`); linear in these."""

    @abstractmethod
    def multiple(self, precision: Format) -> int:
        """Compact tensors hold multiples of so many neurons."""

    @abstractmethod
    def install_full(self, tensors: Sequence[Tensor]) -> None:
        """Make `tensors` the block's; nothing is copied."""

    @abstractmethod
    def install_compact(self, tensors: Sequence[Tensor]) -> None:
        """Make `tensors` the block's; nothing is copied."""

    @abstractmethod
    def gather(self, full: Sequence[Tensor], chosen: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Write the `chosen` neurons (sorted indices [K] for each of its formats) of `full` into `out`, the compact
        tensors."""

    @abstractmethod
    def rows_needed(self, chosen: Tensor) -> list[Tensor | None]:
        """For every tensor of `full_specs`, the rows that gathering `chosen` reads; None: all of it."""

    @abstractmethod
    def neuron_norms(self, full: Sequence[Tensor]) -> Tensor:
        """Static score of "magnitude" [F]: product of the norms of each neuron's input rows."""

    @abstractmethod
    def output_norms(self, full: Sequence[Tensor]) -> Tensor:
        """What a neuron's activation weighs in the output [F]: the norms of the down projection's columns."""

    @abstractmethod
    def observe(self, callback: ActivationCallback) -> None:
        """Until `unhook`, call `callback` with the activations of every token that passes, each token once; what it
        changes in them goes on."""

    @abstractmethod
    def chunked(self, limit: int) -> None:
        """Until `unhook`, let at most `limit` tokens of each sequence pass at once. Nothing where the block is inline:
        the plan counts such ones unchunked."""

    @abstractmethod
    def unhook(self) -> None:
        """Take off what `observe` and `chunked` put on, also where they were interrupted."""

    @abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """The block as a function of hidden states [B, T, H], with what is installed."""

    @property
    def is_plain(self) -> bool:
        """Whether resident neurons are not quantised."""
        return all(format.is_plain for format in self.formats)

    @property
    def rounds_again(self) -> bool:
        """Whether stored numbers are of a format whose gathered neurons rest in another one."""
        return False

    @property
    def in_rows(self) -> bool:
        """Whether a down projection is stored in rows of outputs of a few bits, so that neurons that are chosen of it
        are rounded again."""
        return False

    @property
    def rests_as_stored(self) -> bool:
        """Whether all neurons, when they stay, are copies of what is stored."""
        return self.is_plain

    def check(self, precision: Format) -> None:  # noqa: B027
        """UnsupportedModel when what is not of `linears` cannot be in `precision`."""

    @property
    @abstractmethod
    def read_numbers(self) -> int:
        """Numbers of matrices that one token is multiplied by."""

    def weight_norms(self, kind: str, full: Sequence[Tensor]) -> Tensor:
        """The norms [F] that a selection of `kind`, one of WEIGHT_NORMS, asks for."""
        return self.neuron_norms(full) if kind == "magnitude" else self.output_norms(full)

    def allocate(self, counts: Counts, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
        """Compact tensors; what `gather` never writes is zero."""
        return [
            nn.Parameter(untouched_zeros(shape, own or dtype, device), requires_grad=False)
            for shape, own in self.compact_specs(counts)
        ]


class NoFeedForward(Block):
    """In the place of the block of a layer that is attention or a recurrence alone: no neurons, and no tensors. Nothing
    of such a layer is streamed or chosen; its matrices are residents as attention's are everywhere."""

    inline, neurons, hidden, width, linears, gated, formats, read_numbers = False, 0, 0, 0, (), False, (), 0

    def __init__(self, layer: nn.Module) -> None:
        self.module = layer

    def is_down(self, linear: nn.Module) -> bool:
        return False

    def full(self) -> list[Tensor]:
        return []

    def full_specs(self, precision: Format | None = None) -> list[Spec]:
        return []

    def compact_specs(self, counts: Counts, formats: Sequence[Format] | None = None) -> list[Spec]:
        return []

    def multiple(self, precision: Format) -> int:
        return 1

    def install_full(self, tensors: Sequence[Tensor]) -> None:
        """Nothing, as whatever else is done to a block."""

    def install_compact(self, tensors: Sequence[Tensor]) -> None: ...

    def gather(self, full: Sequence[Tensor], chosen: Sequence[Tensor], out: Sequence[Tensor]) -> None: ...

    def rows_needed(self, chosen: Tensor) -> list[Tensor | None]:
        return []

    def neuron_norms(self, full: Sequence[Tensor]) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu")

    output_norms = neuron_norms

    def observe(self, callback: ActivationCallback) -> None: ...

    def chunked(self, limit: int) -> None: ...

    def unhook(self) -> None: ...

    def run(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


Finder = Callable[[nn.Module, str], Block | None]
"""Finds the block of a decoder layer, which an error calls by the text; None where it is of another kind."""


def padded(kept: int, multiple: int) -> int:
    """Neurons that compact tensors have room for when `kept` are chosen."""
    return kept if multiple == 1 else max(-(-kept // multiple), 1) * multiple


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

    @property
    def wrapped(self) -> Callable[..., Any]:
        """The forward that was in this one's place."""
        return self._forward


def hooks_on(module: nn.Module) -> list[Any]:
    """All forward hooks of `module`, whoever put them there, those before it last."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def unhook(module: nn.Module) -> None:
    """Take every hook and forward of a pass off `module`."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, PassHook)]:
            del hooks[key]
    given = module.__dict__.get("forward")
    if isinstance(given, PassForward):
        del module.forward
        if getattr(given.wrapped, "__self__", None) is not module:  # somebody's, who had put it there before
            module.__dict__["forward"] = given.wrapped


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
