"""Layers of the KV cache that hold states of convolutions and recurrences, and how such states go back.

A state knows nothing of single tokens, so none can be taken out of it. Copies of states are kept instead: at the ends
of prompts, and before tokens that may be taken back. Between two copies the part of a layer that writes its states,
which is resident, runs once more over what it was given.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from griffin_offload.blocks.base import PassForward
from griffin_offload.blocks.states import states_in
from griffin_offload.errors import GriffinError

States = list[dict[str, Tensor]]
"""Copies of what the layers with states held, in their order, by name: "conv.0", "recurrent.0"."""


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """The states of one layer, as transformers' models read and write them."""

    def held(self) -> dict[str, Tensor]:
        """What is there, by name; nothing before tokens have passed."""
        return states_in(self)

    def put_back(self, states: dict[str, Tensor]) -> None:
        """Hold copies of these."""
        self.forget()
        for name, state in states.items():
            kind, number = name.split(".")
            getattr(self, f"{kind}_states")[int(number)] = state.clone()
            getattr(self, f"is_{kind}_states_initialized")[int(number)] = True
            self.has_previous_state[int(number)] = True
            if kind == "conv":
                self.conv_kernel_size[int(number)] = state.shape[-1]
                self.dtype, self.device = state.dtype, state.device

    def forget(self) -> None:
        """Hold nothing."""
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)

    def grow(self, ctx_tokens: int) -> None:
        """States have no length."""

    def reset(self) -> None:
        self.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: the KV cache puts copies back."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample `repeats` times, one after the other."""
        self._replace(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the samples `indices` of the batch."""
        self._replace(lambda state: state[indices])

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.put_back({name: change(state) for name, state in self.held().items()})


def copies(layers: Sequence[StateLayer]) -> States:
    """Of what they hold now."""
    return [{name: state.clone() for name, state in layer.held().items()} for layer in layers]


def copies_bytes(states: States) -> int:
    return sum(state.nbytes for held in states for state in held.values())


# Parts of layers that write states, during one pass.


class RecordedWriter(PassForward):
    """The forward of a part that writes states: what it is given for `tokens` tokens is kept, to be run again."""

    def __init__(self, part: nn.Module, tokens: int) -> None:
        super().__init__(part.forward)
        self._tokens = tokens
        self._given: tuple[Any, Any] = ((), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._given = (args, kwargs)
        return self._forward(*args, **kwargs)

    @property
    def nbytes(self) -> int:
        args, kwargs = self._given
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return sum(value.nbytes for value in given)

    @torch.no_grad()
    def again(self, tokens: int) -> None:
        """Write the states once more, of the first `tokens`, behind what was put back."""
        args, kwargs = _of_tokens(self._given, 0, tokens, self._tokens)
        self._forward(*args, **kwargs)


class SplitWriter(PassForward):
    """The forward of a part that writes states, over a prompt of `tokens` tokens: first those in front of `seam`, then
    the rest inside of `behind`."""

    def __init__(
        self, part: nn.Module, tokens: int, seam: int, behind: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__(part.forward)
        self._tokens, self._seam, self._behind = tokens, seam, behind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, rest = (
            _of_tokens((args, kwargs), *part, self._tokens) for part in ((0, self._seam), (self._seam, self._tokens))
        )
        outputs = [self._forward(*first[0], **first[1])]
        with self._behind():
            outputs.append(self._forward(*rest[0], **rest[1]))
        if not all(isinstance(output, Tensor) for output in outputs):
            raise GriffinError(f"a part that writes states gave {type(outputs[0]).__name__}: hidden states are known")
        return torch.cat(outputs, dim=1)


def _of_tokens(value: Any, start: int, end: int, tokens: int) -> Any:
    """Of arguments what belongs to these of `tokens` tokens: tensors with a row for each are cut."""
    if isinstance(value, Tensor):
        return value[:, start:end] if value.dim() > 1 and value.shape[1] == tokens else value
    if isinstance(value, tuple):
        return tuple(_of_tokens(item, start, end, tokens) for item in value)
    if type(value) is dict:
        return {name: _of_tokens(item, start, end, tokens) for name, item in value.items()}
    return value
