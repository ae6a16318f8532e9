"""The stock model as it is handed out, and what transformers and programs written for it ask of a `GriffinModel`.

Its forward is the engine's, it keeps all that it needs alive and nothing keeps it, what would break it is refused by
name, and callers have it one at a time. It owns the engine, and whatever must not outlive it refers to it weakly: no
cycle, so that weights go when the last name of the model goes. Methods are replaced on a class of its own, a child of
transformers' with the same name: a method that is bound keeps its model.

`StockInterface` is an explicit list, from what pipelines, assisted decoding and common helpers use
(docs/transformers_habits.md). Anything else is an AttributeError that names `.model`.
"""

import contextlib
import functools
import inspect
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from griffin_offload.devices.memory import give_back_freed
from griffin_offload.errors import Busy, GriffinError, UsageError
from griffin_offload.kernels.gemv import rows_apart
from griffin_offload.transformers_api import StockModel, StockOutput

_OWNER, _KIND = "_griffin_offload", "_griffin_offload_kind"


StockForward = Callable[..., StockOutput]
"""transformers' forward of a model, whose arguments differ between architectures."""


def one_token_each(tokens: Tensor) -> AbstractContextManager[None]:
    """`rows_apart` where the rows of a forward over `tokens` [B, T] are sequences of their own: one token of each."""
    return rows_apart() if tokens.shape[0] > 1 and tokens.shape[1] == 1 else contextlib.nullcontext()


def stock_forward(model: StockModel) -> StockForward:
    """transformers' forward of `model`, handed out or not, which it does not keep alive."""
    weak, function = weakref.ref(model), getattr(type(model), _KIND, type(model)).forward

    def forward(*args: Any, **kwargs: Any) -> StockOutput:
        output: StockOutput = function(weak(), *args, **kwargs)
        return output

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return forward


class Owner(Protocol):
    """What a stock model's calls go through."""

    def forward(self, *args: Any, **kwargs: Any) -> StockOutput: ...

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
    def forward(self: object, *args: Any, **kwargs: Any) -> Any:
        if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
            raise UsageError(
                "a loaded model cannot be traced or exported: its forward streams weights and chooses neurons; load it "
                "with transformers for that"
            )
        return self.__dict__[_OWNER].forward(*args, **kwargs)

    def whole(name: str, what: str) -> Callable[..., Any]:
        stock = getattr(kind, name)

        @functools.wraps(stock)
        def method(self: object, *args: Any, **kwargs: Any) -> Any:
            reason = self.__dict__[_OWNER].why_not_saved()
            if reason is not None:
                raise UsageError(f"this model {what}: {reason}")
            return stock(self, *args, **kwargs)

        return method

    def copied(self: object, _: object) -> Any:
        raise UsageError("a loaded model cannot be copied or pickled: load it once more with from_pretrained")

    def train(self: object, mode: bool = True) -> Any:
        if mode:
            raise UsageError(
                "this model cannot be trained: its neurons change with every prompt; train it in transformers"
            )
        return kind.train(self, False)  # type: ignore[attr-defined]

    own: dict[str, Any] = {"forward": forward, "_apply": _unmoved, "__deepcopy__": copied, "__reduce_ex__": copied}
    own |= {"train": train} | {name: _refusing(name, instead) for name, instead in _REFUSED.items()}
    own |= {name: whole(name, "cannot be saved") for name in ("save_pretrained", "push_to_hub")}
    own["state_dict"] = whole("state_dict", "has no state_dict")
    late = "takes no adapter any more (loaded with adapter=DIR it is merged while weights pass)"
    own |= {name: whole(name, late) for name in ("add_adapter", "load_adapter")}
    named = {_KIND: kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**own, **named})


_NEW_WORDS = "give the model in transformers its new words, save it, and load that"
_REFUSED = {
    "resize_token_embeddings": _NEW_WORDS,
    "set_input_embeddings": _NEW_WORDS,
    "set_output_embeddings": _NEW_WORDS,
    "set_attn_implementation": "attention is chosen with the device, leave it out",
}
"""What would change the residents behind the plan's back, and what to do instead."""


def _refusing(name: str, instead: str) -> Callable[..., Any]:
    def method(_: object, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(f"{name} cannot be used on a loaded model: {instead}")

    method.__name__ = name
    return method


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

    def __init__(self, check: Callable[[], None], turns: "FifoLock", *, whole: bool) -> None:
        """`check` is an engine's method, which is not kept alive, for whoever has not its turn; `whole` layers can do
        without."""
        self._check, self._turns, self._whole = weakref.WeakMethod(check), turns, whole

    def __call__(self, *_: Any) -> None:
        if self._turns.mine:
            return
        check = self._check()
        if check is not None:
            check()
        elif not self._whole:
            raise GriffinError("the model that these layers belong to is gone: keep it, or load it with density=1.0")


def _closed(*_: Any, **__: Any) -> None:
    raise GriffinError("this model is closed: load it again")


def hollow(model: nn.Module) -> None:
    """Leave no weight in `model`, of which only the shapes stay, and no part that can be called: torch multiplies by a
    matrix without memory, and gives what lies around."""
    gone: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if module is not model:  # whose forward asks its owner
            module.__dict__["forward"] = _closed
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


_READ = (
    "config",
    "dtype",
    "name_or_path",
    "main_input_name",
    "base_model_prefix",
    "input_modalities",
    "output_modalities",
    "framework",
    "training",
    "_supports_logits_to_keep",
)
_CALLED = (
    "can_generate",
    "num_parameters",
    "get_memory_footprint",
    "get_input_embeddings",
    "get_output_embeddings",
    "compute_transition_scores",
    "save_pretrained",
    "push_to_hub",
    "state_dict",
)
DELEGATED = (*_READ, *_CALLED)
"""Names that a `GriffinModel` answers with what its stock model has under them."""


class StockInterface:
    """The face of a transformers model; `model` is the stock one."""

    @property
    def model(self) -> StockModel:
        raise NotImplementedError

    @property
    def _stock(self) -> StockModel:
        """The stock model, whose residents may still be on their way."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name in DELEGATED:
            return getattr(self._stock if name in _READ else self.model, name)
        if not name.startswith("__") and "_held" in self.__dict__ and hasattr(self._stock, name):
            raise AttributeError(f"a GriffinModel has no {name!r}: the stock transformers model has, use .model.{name}")
        raise AttributeError(f"a GriffinModel has no attribute {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward, as the stock model's: streamed with an empty KV cache, resident with a filled one."""
        named = {name: self._on_device(value) for name, value in kwargs.items()}
        return self.model(*map(self._on_device, args), **named)

    forward = __call__

    def _on_device(self, value: object) -> Any:
        return value.to(self._stock.device) if isinstance(value, torch.Tensor) else value

    @property
    def generation_config(self) -> GenerationConfig:
        """The defaults for `generate`: at first the checkpoint's."""
        return self._stock.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        if not isinstance(config, GenerationConfig):
            raise UsageError(f"generation_config is {config!r}: give a transformers.GenerationConfig")
        self._stock.generation_config = config

    def eval(self) -> "StockInterface":
        """Nothing: a loaded model is for inference."""
        return self

    def train(self, mode: bool = True) -> "StockInterface":
        """UsageError but for train(False), which is `eval`."""
        self._stock.train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "StockInterface":
        """UsageError but for requires_grad_(False), which is so already."""
        return self.train(requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> "StockInterface":
        """The model, if that is its device and precision; UsageError with the options that choose them otherwise."""
        self._stock.to(*args, **kwargs)
        return self

    def cpu(self) -> "StockInterface":
        """As `to`."""
        return self.to("cpu")

    def cuda(self, device: torch.device | int | str | None = None) -> "StockInterface":
        """As `to`."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def half(self) -> "StockInterface":
        """As `to`."""
        return self.to(torch.float16)

    def float(self) -> "StockInterface":
        """As `to`."""
        return self.to(torch.float32)

    def bfloat16(self) -> "StockInterface":
        """As `to`."""
        return self.to(torch.bfloat16)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The residents: of pruned layers the last prompt's neurons."""
        found: Iterator[nn.Parameter] = self.model.parameters(recurse)
        return found

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As `parameters`."""
        found: Iterator[tuple[str, nn.Parameter]] = self.model.named_parameters(*args, **kwargs)
        return found

    def __deepcopy__(self, _: object) -> Any:
        raise UsageError("a loaded model cannot be copied or pickled: load it once more with from_pretrained")

    def __reduce_ex__(self, _: object) -> Any:
        raise UsageError("a loaded model cannot be copied or pickled: load it once more with from_pretrained")
