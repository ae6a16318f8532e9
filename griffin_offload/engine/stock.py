"""The stock model as it is handed out: its forward is the engine's, it keeps all that it needs alive and nothing keeps
it, what would break it is refused by name, and callers have it one at a time.

The stock model owns the engine, and whatever must not outlive the stock model refers to it weakly: no cycle, so that
weights go when the last name of the model goes. Methods are replaced on a class of its own, a child of transformers'
with the same name: a method that is bound keeps its model.
"""

import contextlib
import functools
import inspect
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from griffin_offload.devices.memory import give_back_freed
from griffin_offload.errors import Busy, GriffinError, UsageError
from griffin_offload.transformers_api import CACHE, StockModel, with_own_name

_OWNER, _KIND = "_griffin_offload", "_griffin_offload_kind"


StockForward = Callable[..., Any]
"""transformers' forward of a model, whose arguments differ between architectures."""


def stock_forward(model: StockModel) -> StockForward:
    """transformers' forward of `model`, handed out or not, which it does not keep alive."""
    weak, function = weakref.ref(model), getattr(type(model), _KIND, type(model)).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(weak(), *args, **kwargs)

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return forward


class Owner(Protocol):
    """What a stock model's calls go through."""

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def why_not_saved(self) -> str | None:
        """Why the stock model's parameters are no checkpoint; None if they are one."""


def hand_out(model: StockModel, owner: Owner) -> None:
    """Let calls of `model` go through `owner`, which it keeps alive."""
    model.__class__ = _handed_out(type(model))  # type: ignore[arg-type]  # a class is hashable
    model.__dict__[_OWNER] = owner
    model.__dict__["_griffin_offload_last"] = _Last()  # behind the owner: freed after it


@functools.cache
def _handed_out(kind: type) -> type:
    """A child of the stock class `kind`, with its name."""

    @functools.wraps(kind.forward)  # type: ignore[attr-defined]  # a PreTrainedModel; generate reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_OWNER].forward(*args, **kwargs)

    def saving(name: str, what: str) -> Callable[..., Any]:
        stock = getattr(kind, name)

        @functools.wraps(stock)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            reason = self.__dict__[_OWNER].why_not_saved()
            if reason is not None:
                raise UsageError(f"this model {what}: {reason}")
            return stock(self, *args, **kwargs)

        return method

    def copied(self: Any, _: Any) -> Any:
        raise UsageError("a loaded model cannot be copied or pickled: load it once more with from_pretrained")

    own: dict[str, Any] = {"forward": forward, "_apply": _unmoved, "__deepcopy__": copied, "__reduce_ex__": copied}
    own |= {name: saving(name, "cannot be saved") for name in ("save_pretrained", "push_to_hub")}
    own["state_dict"] = saving("state_dict", "has no state_dict")
    named = {_KIND: kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**own, **named})


def _unmoved(model: StockModel, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """`model`, if `function`, which `to`, `half`, `cuda` and their like would apply to every tensor, changes none."""
    probe = torch.empty(1, dtype=model.dtype, device=model.device)
    try:
        changed = function(probe)
    except (AssertionError, RuntimeError):  # torch was built without such a device, or the machine has none
        changed = probe.to("meta")
    moved = (changed.dtype, changed.device.type) != (probe.dtype, probe.device.type)
    moved = moved or (changed.device.index or 0) != (probe.device.index or 0)
    if moved or (probe.is_cpu and changed.is_shared()):
        raise UsageError(
            f"the model's residents are {str(model.dtype).removeprefix('torch.')} on {model.device} and stay so: load "
            "it with the dtype= and device= that are wanted (in a pipeline, give device=model.device)"
        )
    return model


class _Last:
    """The last of a stock model's attributes: when it goes, what was before it has gone."""

    def __init__(self) -> None:
        weakref.finalize(self, give_back_freed).atexit = False


class Guard:
    """A hook in front of the first layer: parts of the model run only inside a forward of the whole."""

    def __init__(self, check: Callable[[], None], *, whole: bool) -> None:
        """`check` is an engine's method, which is not kept alive; `whole` layers can do without."""
        self._check, self._whole = weakref.WeakMethod(check), whole

    def __call__(self, *_: Any) -> None:
        check = self._check()
        if check is not None:
            check()
        elif not self._whole:
            raise GriffinError("the model that these layers belong to is gone: keep it, or load it with density=1.0")


def hollow(model: nn.Module) -> None:
    """Leave no weight in `model`, of which only the shapes stay."""
    gone: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                module._parameters[name] = gone.setdefault(id(parameter), empty)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")


# Turns: what one thread at a time may use, and others wait for in the order in which they came.


# Waiting is looked at anew after so long: a turn whose end was interrupted twice cannot be told of.
_LOOK_S = 1.0


def check_wait(wait_s: object) -> None:
    """UsageError unless this is a time to wait: seconds from 0 on, or None."""
    if wait_s is not None and (not isinstance(wait_s, int | float) or not wait_s >= 0):
        raise UsageError(f"wait_s is {wait_s!r}: give seconds, 0 or more, or None to wait as long as it takes")


class _Ticket:
    """A caller's place in the row."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.called = threading.Event()


class FifoLock:
    """A row of callers, of whom the first has its turn.

    No lock: a Ctrl-C between taking one and `try` would leave it taken. Every step is one atomic call of a deque.
    """

    def __init__(self) -> None:
        self._row: deque[_Ticket] = deque()

    @property
    def callers(self) -> int:
        """In the row, the one that has its turn among them."""
        return len(self._row)

    @property
    def mine(self) -> bool:
        """Whether this thread has its turn."""
        with contextlib.suppress(IndexError):  # an empty row
            return self._row[0].thread == threading.get_ident()
        return False

    @contextlib.contextmanager
    def turn(self, nested: str, wait_s: float | None) -> Iterator[None]:
        """Wait for a turn, at most `wait_s` seconds (None: as long as it takes), and have it inside. Busy when the time
        is up, GriffinError with the message `nested` where this thread has its turn already: it would wait forever."""
        if self.mine:
            raise GriffinError(nested)
        ticket = _Ticket()
        try:
            self._row.append(ticket)
            self._wait(ticket, wait_s)
            yield
        finally:
            try:
                self._leave(ticket)
            except KeyboardInterrupt:  # a second Ctrl-C must not leave everybody waiting
                self._leave(ticket)
                raise

    def _wait(self, ticket: _Ticket, wait_s: float | None) -> None:
        end = None if wait_s is None else time.monotonic() + wait_s
        while self._row[0] is not ticket:
            left = _LOOK_S if end is None else min(end - time.monotonic(), _LOOK_S)
            if left <= 0:
                before = max(list(self._row).index(ticket), 1)
                calls = "1 call is" if before == 1 else f"{before} calls are"
                raise Busy(
                    f"waited {wait_s:g} s for this model and {calls} still before this one: wait longer (wait_s), or "
                    "load the model once more"
                )
            ticket.called.wait(left)

    def _leave(self, ticket: _Ticket) -> None:
        with contextlib.suppress(ValueError):  # it never came into the row, or left it already
            self._row.remove(ticket)
        with contextlib.suppress(IndexError):
            self._row[0].called.set()


# What is given as a prompt.


def checked_prompt(prompt: Any, vocab_size: int) -> Tensor:
    """`prompt`; UsageError unless it holds token ids [B, T] of the vocabulary, or embeddings [B, T, H]."""
    if prompt is not None and not isinstance(prompt, Tensor):
        raise UsageError(f"the prompt is {_described(prompt)}")
    if prompt is not None and prompt.dim() == 1:
        raise UsageError("the prompt has one dimension: give a batch, a tensor of [batch, tokens], as in ids[None]")
    if prompt is None or prompt.dim() < 2 or 0 in prompt.shape[:2]:
        raise UsageError("the prompt is empty: give at least one token, as a tensor of [batch, tokens]")
    if prompt.dim() > 3 or (prompt.dim() == 3 and not prompt.is_floating_point()):
        raise UsageError(f"the prompt is of {list(prompt.shape)}: give token ids as a tensor of [batch, tokens]")
    if prompt.dim() == 2 and (prompt.is_floating_point() or prompt.dtype == torch.bool):
        raise UsageError(f"the prompt's ids are {prompt.dtype}: give whole numbers, as a tensor of [batch, tokens]")
    least, largest = (int(prompt.min()), int(prompt.max())) if prompt.dim() == 2 else (0, 0)
    if least < 0 or largest >= vocab_size:
        raise UsageError(
            f"the prompt has token ids from {least} to {largest}, the vocabulary ends at {vocab_size - 1}: the "
            "tokenizer is of another model"
        )
    return prompt


# Of each the least that it may be: where transformers compares with nothing, an answer would be another one's.
_WHOLE = {"max_new_tokens": None, "max_length": None, "min_new_tokens": 0, "min_length": 0}
_WHOLE |= {"num_beams": 1, "num_return_sequences": 1}


def checked_arguments(kwargs: dict[str, Any], prompt: Tensor) -> dict[str, Any]:
    """`kwargs` of a generate for `prompt`, the KV cache by the installed release's name, and whole numbers, in whatever
    form they are written, as Python's own. UsageError for other numbers, single processors and criteria, and a mask of
    another size."""
    kwargs = with_own_name(kwargs)
    config = kwargs.get("generation_config")
    for name, least in _WHOLE.items():
        value = kwargs.get(name, getattr(config, name, None))
        if value is not None and type(value) is not int:
            kwargs[name] = value = _whole(name, value)
        if value is not None and least is not None and value < least:
            raise UsageError(f"{name} is {value}: give a whole number of at least {least}")
    for name in ("logits_processor", "stopping_criteria"):
        if kwargs.get(name) is not None and not isinstance(kwargs[name], list | tuple):
            raise UsageError(f"{name} is of type {type(kwargs[name]).__name__}: give a list, even of one")
    mask = kwargs.get("attention_mask")
    alone = kwargs.get(CACHE) is None and kwargs.get("inputs_embeds") is None
    if isinstance(mask, Tensor) and alone and mask.shape != prompt.shape[:2]:
        raise UsageError(
            f"the attention mask is of {list(mask.shape)}, the prompt of {list(prompt.shape[:2])}: give both as "
            "[batch, tokens]"
        )
    return kwargs


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, str | bool) or number != value:
        raise UsageError(f"{name} is {value!r}: give a whole number")
    return number


def _described(prompt: Any) -> str:
    """What was given in a prompt's place, and what to do."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], str)):
        return (
            "a text: give its token ids, a tensor of [batch, tokens], as in generate(**tokenizer(text, "
            "return_tensors='pt')); the tokenizer is .tokenizer"
        )
    if hasattr(prompt, "keys"):
        return "what a tokenizer returns: give its parts as arguments, generate(**tokens), tensors of [batch, tokens]"
    return f"of type {type(prompt).__name__}: give a tensor of [batch, tokens]"
