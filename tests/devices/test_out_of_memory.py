"""Memory that is refused, in a pass or while loading: one error with numbers, nothing kept, and less can be asked."""

import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import by_turns, mostly_slow
from tiny_models import VOCAB

from griffin_offload import GriffinModel
from griffin_offload.blocks.base import ChunkedForward, hooks_on
from griffin_offload.checkpoint import renaming
from griffin_offload.engine import load as loading
from griffin_offload.engine.model_interface import Guard
from griffin_offload.errors import DoesNotFit, GriffinError, OutOfMemory, memory_refused
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.offload.layer_stream import BackgroundLoader

CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
HOST = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
REFUSALS: dict[str, tuple[Callable[[], BaseException], str]] = {
    "CUDA": (lambda: torch.OutOfMemoryError(CUDA), r"the device refused 21\.0 MB, \S+ \w+ are free"),
    "torch": (lambda: RuntimeError(HOST), r"the machine refused 4\.10 kB, \S+ \w+ are free"),
    "Python": (lambda: MemoryError(), r"the machine refused \(MemoryError\)"),
    "the kernel": (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), r"the machine refused \(.*Cannot allocate"),
}


def make(directory: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "10MB", "density": 0.5, "ctx_size": 64}
    return GriffinModel.from_pretrained(directory, **(defaults | options))


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def answer(model: GriffinModel, tokens: int) -> torch.Tensor:
    return model.generate(ids(tokens), max_new_tokens=8, do_sample=False)


def refusing(original: Callable[..., Any], refusal: Callable[[], BaseException], tokens: int) -> Callable[..., Any]:
    """Refuses prompts of more than `tokens`."""

    def call(*arguments: Any, **options: Any) -> Any:
        if any(
            isinstance(a, torch.Tensor) and a.dim() == 3 and a.shape[1] > tokens for a in (*arguments, *arguments[-1])
        ):
            raise refusal()
        return original(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("kind", "options"),
    mostly_slow(
        [
            *((kind, {}) for kind in REFUSALS),
            *zip(REFUSALS, ({"dtype": "bfloat16"}, {"keep_prompts": True}), strict=False),
        ],
        4,
    ),
)
def test_in_a_pass(checkpoints, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]):
    """The pass, its slots and its KV cache are gone, while the error is still held; a shorter prompt is answered."""
    refusal, words = REFUSALS[kind]
    expected = answer(make(checkpoints("llama2"), **options), 20)
    model = make(checkpoints("llama2"), **options)
    forwards = [m for m in model.model.modules() if "forward" in vars(m)]
    caches: list[weakref.ref[KVCache]] = []
    original = KVCache.__init__

    def remembered(self: KVCache, *arguments: Any, **settings: Any) -> None:
        caches.append(weakref.ref(self))
        original(self, *arguments, **settings)

    monkeypatch.setattr(KVCache, "__init__", remembered)
    monkeypatch.setattr(ChunkedForward, "in_chunks", refusing(ChunkedForward.in_chunks, refusal, 30))
    message = f"^out of memory while generating: {words}.*; the budget is 10.0 MB: ask for less"
    context = model.new_context() if options.get("keep_prompts") else None
    threads = set(threading.enumerate())
    with pytest.raises(OutOfMemory, match=message) as raised:
        model.generate(ids(40), max_new_tokens=8, do_sample=False, context=context)
    assert isinstance(raised.value, DoesNotFit)
    assert raised.value.exit_code == 3
    modules = list(model.model.modules())
    hooks = [hook for m in modules for hook in hooks_on(m)]
    assert [type(hook) for hook in hooks] == [Guard]
    assert [m for m in modules if "forward" in vars(m)] == forwards
    assert not set(threading.enumerate()) - threads
    assert context is None or (context.tokens, context.covered) == ([], 0)
    assert torch.equal(answer(model, 20), expected)
    del context
    if not options.get("keep_prompts"):
        gc.collect()
        assert [cache() for cache in caches if cache() is not None] == []
    model.close()


def test_a_bare_forward(checkpoints, monkeypatch: pytest.MonkeyPatch):
    model = make(checkpoints("llama2"))
    expected = model.model(ids(20)).logits
    monkeypatch.setattr(ChunkedForward, "in_chunks", refusing(ChunkedForward.in_chunks, REFUSALS["torch"][0], 30))
    with pytest.raises(OutOfMemory, match="while generating"):
        model.model(ids(40))
    assert torch.equal(model.model(ids(20)).logits, expected)


@pytest.mark.parametrize(
    ("place", "kind"),
    by_turns(("build", "compact_blocks", "place_residents"), REFUSALS, each=2, whole=("place_residents",)),
)
def test_while_loading(checkpoints, monkeypatch: pytest.MonkeyPatch, kind: str, place: str):
    refusal, words = REFUSALS[kind]

    def refuse(*_: Any, **__: Any) -> Any:
        raise refusal()

    before = sorted(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(loading, place, refuse)
        with pytest.raises(OutOfMemory, match=f"^out of memory while loading: {words}.*10.0 MB: close other programs"):
            make(checkpoints("llama2"))
    assert sorted(os.listdir("/proc/self/fd")) == before
    answer(make(checkpoints("llama2")), 20)


def test_residents_that_arrive_in_the_background(checkpoints, monkeypatch: pytest.MonkeyPatch):
    """Told by whoever waits for them; only loading again helps."""

    def refuse(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(BackgroundLoader, "do", refuse)
        model = make(checkpoints("llama2"))
        for _ in range(2):
            with pytest.raises(OutOfMemory, match="while generating"):
                answer(model, 20)
    assert model.engine.broken
    model.close()


def test_transformers_is_not_blamed(checkpoints, monkeypatch: pytest.MonkeyPatch):
    """What it raises for want of memory is no fault of the checkpoint."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(HOST)

    monkeypatch.setattr(renaming, "get_model_conversion_mapping", refuse)
    with pytest.raises(OutOfMemory, match=r"the machine refused 4\.10 kB"):
        make(checkpoints("llama2"))


def test_other_errors_are_what_they_are(checkpoints, monkeypatch: pytest.MonkeyPatch):
    error = ValueError("something else")
    assert not memory_refused(error)
    assert not memory_refused(GriffinError("out of memory, says a user's path"))
    monkeypatch.setattr(loading, "place_residents", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match="something else"):
        make(checkpoints("llama2"))


LIMITED = """
import resource, sys, torch
from pathlib import Path
from griffin_offload import GriffinModel
from griffin_offload.errors import OutOfMemory
torch.set_num_threads(1)
model = GriffinModel.from_pretrained(sys.argv[1], device="cpu", max_gpu_mem="4GB", density=0.5, ctx_size=450, threads=1)
small, large = torch.full((1, 20), 5), torch.full((8, 440), 5)
expected = model.generate(small, max_new_tokens=4, do_sample=False)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 12_000_000, taken + 12_000_000))
try:
    model.generate(large.repeat(16, 1), max_new_tokens=4, do_sample=False)
except OutOfMemory as error:
    print(error)
    print(torch.equal(model.generate(small, max_new_tokens=4, do_sample=False), expected))
"""


def test_a_process_under_a_limit(forks, checkpoints):
    """The system's own refusal, and while the error is still held, a smaller request."""
    found = forks.run("-c", LIMITED, checkpoints("llama2"))
    assert found.returncode == 0, found.err
    message, again = found.out.splitlines()
    assert message.startswith("out of memory while generating: the machine refused ")
    assert " of addresses (ulimit -v); the budget is 4.00 GB: ask for less (a shorter prompt, fewer seq" in message
    assert "are free" not in message  # which has nothing to do with it
    assert again == "True"
