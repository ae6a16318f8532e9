"""Experts that the CPU computes for a device: the answer of the full model, and what travels for it.

The device is `ThreadedDevice`, CPU tensors behind the door of a GPU: the same kernels multiply here and there, so that
answers are compared to the last bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from marks import by_turns, mostly_slow
from threaded_device import Counts, ThreadedDevice
from tiny_models import MIXTURE_KINDS, VOCAB
from torch import Tensor

from griffin_offload import GriffinModel, UsageError
from griffin_offload.blocks.expert_products import HostExperts
from griffin_offload.config import LoadConfig
from griffin_offload.devices.base import Device
from griffin_offload.engine import load as loading
from griffin_offload.engine.convert import convert
from griffin_offload.engine.spec import examine, plan_for
from griffin_offload.errors import DoesNotFit
from griffin_offload.formats.expert_form import ExpertForm
from griffin_offload.offload.expert_cache import ExpertCache

NEW = 5
QUICKLY = MIXTURE_KINDS[:2]
SETTINGS: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def kind(register_device: Callable[[type[Device]], None]) -> type[ThreadedDevice]:
    """A device of its own counts."""
    made = type("ThreadedDevice", (ThreadedDevice,), {"counts": Counts()})
    register_device(made)
    return made


def _ids(batch: int = 1, tokens: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(5, VOCAB - 8, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _load(directory: Path, device: str = "threaded", **options: Any) -> GriffinModel:
    own = {"missing_experts": "host"} if device == "threaded" else {}
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 64, "density": 0.25, "device": device}
    return GriffinModel.from_pretrained(directory, **{**sizes, **own, **options})


def _answer(model: Any, ids: Tensor, mask: Tensor | None = None, new: int = NEW, **settings: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    found = model.generate(ids, attention_mask=mask, max_new_tokens=new, **{**SETTINGS, **settings})
    if isinstance(model, GriffinModel):
        report, plan = model.last_report, model.plan
        assert report.peak_device_bytes <= plan.peak_bytes
        store = model.engine.loaded.layers.expert_store
        if store is not None and not settings.get("exact"):
            # Whatever was missed was read by the CPU, or into a place that was free.
            layers = model.engine.loaded.layers
            size = store.expert_bytes(min(layers.experts))
            form, buffered = layers.blocks[min(layers.experts)].form, layers.expert_buffers.of_tokens.nbytes
            whole = buffered and form.records is not None and form.copies_records(form.records)
            host = report.experts.by_host * (form.record_bytes if whole else size)
            assert report.experts.host_bytes == host + report.experts.wrong_bytes
            assert report.decode_streamed_bytes == (report.experts.misses - report.experts.by_host) * size
    return found


def _equal(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def _close(found: Any, expected: Any) -> None:
    """Up to the order of sums: against the largest logit."""
    assert torch.equal(found.sequences, expected.sequences)
    ours, theirs = torch.stack(list(found.logits)), torch.stack(list(expected.logits))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp_min(1)


def _dense(directory: Path) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@contextmanager
def _decoded(model: GriffinModel) -> Iterator[dict[int, list[set[int]]]]:
    """Inside, the experts that tokens were sent to in each forward of each layer, the prompt's first."""
    layers = model.engine.loaded.layers
    seen: dict[int, list[set[int]]] = {i: [] for i in layers.experts}
    modules = {i: layers.blocks[i].module for i in seen}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, i=i: seen[i].append(set(args[1].flatten().tolist())))
        for i, module in modules.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", mostly_slow([*MIXTURE_KINDS, "jetmoe"], 2))
def test_the_answer_is_the_full_model_s(mixtures, name: str):
    """Dense transformers' to rounding, and that of `fetch` to the last bit; residents stay as the prompt chose them."""
    expected = _answer(_dense(mixtures(name)), _ids())
    with _load(mixtures(name), "cpu", missing_experts="fetch") as model:
        fetched = model.generate(_ids(), attention_mask=torch.ones_like(_ids()), max_new_tokens=NEW, **SETTINGS)
        slots = model.plan.decode_parts["slots"]
    for density in (0.25, 0.75) if name in QUICKLY else (0.25,):
        with _load(mixtures(name), density=density) as model, _decoded(model) as seen:
            found = _answer(model, _ids())
            _close(found, expected)
            layers, report = model.engine.loaded.layers, model.last_report
            # torch sums float32 in another order where a matrix of a file begins between two vectors.
            lie = [tensor.data_ptr() % 16 for i in seen for tensor in layers.expert_store.tensors(i)]
            (_close if any(lie) else _equal)(found, fetched)
            missed = sum(len(call - set(layers.experts[i].residents)) for i in seen for call in seen[i][1:])
            assert (report.experts.by_host, report.experts.misses) == (missed, missed)
            assert report.decode_streamed_bytes == 0 < missed
            assert {i: cache.residents for i, cache in layers.experts.items()} == {
                i: chosen.tolist() for i, chosen in model.selected.items()
            }
            assert model.plan.decode_parts["slots"] == 0 < model.plan.host_bytes
            assert layers.expert_buffers.of_tokens.nbytes <= model.plan.host_bytes <= slots


@pytest.mark.parametrize(("name", "precision"), by_turns(MIXTURE_KINDS, ("int8", "int4"), whole=QUICKLY))
def test_in_few_bits_all_are_the_same_numbers(mixtures, name: str, precision: str):
    """Whoever computes an expert, it is multiplied in the format that it would rest in."""
    with _load(mixtures(name), "cpu", quantize=precision, density=1.0) as model:
        expected = _answer(model, _ids())
    for options in ({}, {"density": 0.625}) if name in QUICKLY else ({},):
        with _load(mixtures(name), quantize=precision, **options) as model:
            _equal(_answer(model, _ids()), expected)
            assert model.last_report.experts.by_host > 0


@pytest.mark.parametrize(
    ("name", "precision"),
    by_turns(["gpt_oss", "llama4", "deepseek_v3", "qwen3_next"], ("none", "int4", "int8"), whole=("gpt_oss",)),
)
def test_several_sequences(mixtures, name: str, precision: str):
    """More experts at once than there are buffers, and tokens of one that are computed in both places."""
    ids = _ids(3)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :3] = 0, 0
    options = {"batch_size": 3, "quantize": precision, "density": 0.375}
    with _load(mixtures(name), "cpu", **options | {"density": 1.0}) as model:
        expected = _answer(model, ids.masked_fill(mask == 0, 0), mask)
    with _load(mixtures(name), **options) as model:
        _equal(_answer(model, ids.masked_fill(mask == 0, 0), mask), expected)
        assert model.last_report.experts.by_host > 0


@pytest.mark.parametrize(
    ("precision", "large"), mostly_slow([("int4", True), ("none", False), ("int4", False), ("int8", True)], 2)
)
def test_copies_are_multiplied_where_they_lie(
    mixtures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, large: bool
):
    """In the mapped file; and where the page cache has no room for that, in buffers that it is read into."""
    if large:
        monkeypatch.setattr("griffin_offload.formats.expert_form._LARGE_BYTES", 1)  # records are whole blocks
    convert(mixtures("gpt_oss"), tmp_path / "copy", precision)
    with _load(tmp_path / "copy", "cpu", density=1.0) as model:
        expected = _answer(model, _ids())
    for evicts in (False, True):
        monkeypatch.setattr(loading, "evicts", lambda model_spec, evicts=evicts: evicts)
        with _load(tmp_path / "copy") as model:
            _equal(_answer(model, _ids()), expected)
            report = model.last_report.experts
            assert bool(model.engine.loaded.layers.expert_buffers.of_tokens.nbytes) == evicts
            assert (report.guessed > 0, report.by_host > 0) == (evicts, True)


def test_hidden_states_travel_once_and_come_back_once(mixtures, kind: type[ThreadedDevice], monkeypatch):
    """Down before the device has work, back behind it, through memory that it copies from asynchronously."""
    log: list[tuple[str, Any]] = []
    down, up, multiply, begin = HostExperts.down, HostExperts.up, ExpertForm.multiply, ExpertCache.begin
    monkeypatch.setattr(ExpertCache, "begin", lambda *a: log.append(("begin", 0)) or begin(*a))
    monkeypatch.setattr(HostExperts, "down", lambda *a: log.append(("down", a[1].numel())) or down(*a))
    monkeypatch.setattr(HostExperts, "up", lambda *a: log.append(("up", sum(t.numel() for t in a[1]))) or up(*a))
    monkeypatch.setattr(ExpertForm, "multiply", lambda *a: log.append(("multiply", a[0].scratch)) or multiply(*a))
    with _load(mixtures("mixtral"), quantize="int8") as model, _decoded(model) as seen:
        _answer(model, _ids())
        own = model.engine.loaded.layers.blocks[0].form.scratch
        decoded = sum(len(call) for i in seen for call in seen[i][1:])
        report, width = model.last_report.experts, model.engine.shape.hidden_size
    starts = [at for at, (what, _) in enumerate(log) if what == "down"]
    for start in starts:
        rest = log[start:]
        end = next(at for at, (what, _) in enumerate(rest) if what == "up")
        by_device = [scratch is own for what, scratch in rest[1:end]]
        assert by_device == sorted(by_device, reverse=True)
        assert log[start - 1 : start + 1] == [("begin", 0), ("down", width)]
        assert rest[end] == ("up", by_device.count(False) // 2 * width)
    assert 0 < len(starts) <= (NEW - 1) * len(seen)
    assert sum(size for what, size in log if what == "up") == report.by_host * width < decoded * width
    assert kind.counts.pinned


def test_places_that_are_free_take_what_is_missed_first(mixtures):
    """Behind a prompt of one token; the next prompt chooses anew."""
    with _load(mixtures("mixtral"), density=0.75) as model, _decoded(model) as seen:
        _answer(model, _ids(tokens=1), new=30)
        for i, cache in model.engine.loaded.layers.experts.items():
            order = list(dict.fromkeys(one for call in seen[i] for one in sorted(call)))
            assert cache.residents == sorted(order[:6])
        report = model.last_report
        assert 0 < report.experts.by_host < report.experts.misses
        _answer(model, _ids(seed=2))
        assert model.last_report.decode_streamed_bytes == 0


@pytest.mark.parametrize("precision", mostly_slow(["none", "int8"], 1))
def test_what_a_pass_in_parts_gave_up_is_resident_all_the_same(mixtures, precision: str):
    options = {"quantize": precision, "density": 0.375}
    with _load(mixtures("mixtral"), **options) as model:
        expected, most = _answer(model, _ids()), model.plan
    budget = most.peak_bytes
    while budget:
        budget -= 20_000
        try:
            model = _load(mixtures("mixtral"), max_gpu_mem=budget, **options)
        except DoesNotFit:
            break
        with model:
            _equal(_answer(model, _ids()), expected)
            caches = model.engine.loaded.layers.experts
            assert all(caches[i].residents == chosen.tolist() for i, chosen in model.selected.items())
            assert model.last_report.decode_streamed_bytes == 0
            fewest = model.plan.expert_slots
    assert fewest < most.expert_slots


def test_exact_mode_and_back(mixtures):
    """Drafts are routed among residents, and passes verify them on the device; other answers are computed by both."""
    dense = _dense(mixtures("qwen3_moe"))
    expected = dense.generate(_ids(), attention_mask=torch.ones_like(_ids()), max_new_tokens=NEW, do_sample=False)
    with _load(mixtures("qwen3_moe"), exact=True, draft_tokens=3) as model:
        for exact in (True, False, True):
            found = _answer(model, _ids(), exact=exact, draft_tokens=3 if exact else None)
            assert torch.equal(found.sequences, expected)
            report = model.last_report
            assert bool(report.experts.by_host) != exact
            assert bool(report.decode_streamed_bytes) == exact


def test_sequences_that_are_decoded_together(mixtures):
    """Each is the full model's own, whatever its neighbours are sent to."""
    prompts = [_ids(tokens=tokens, seed=tokens) for tokens in (9, 14, 20)]
    with _load(mixtures("mixtral"), sequences=3) as model:
        assert not model.shares_neurons
        found = {a.index: a.tokens for a in model.generate_many(prompts, max_new_tokens=NEW, do_sample=False)}
    dense = _dense(mixtures("mixtral"))
    for index, prompt in enumerate(prompts):
        expected = dense.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found[index].flatten(), expected[0, prompt.shape[1] :])


def test_a_saved_prompt_brings_its_residents(mixtures, tmp_path: Path):
    """Into another process's model, which has read no expert yet."""
    with _load(mixtures("mixtral"), keep_prompts=True, ctx_size=96) as model:
        context = model.new_context()
        expected = _answer(model, _ids(), context=context, prompt_done=lambda c: model.save_context(c, tmp_path / "p"))
        first = model.last_report
    with _load(mixtures("mixtral"), keep_prompts=True, ctx_size=96) as model:
        found = _answer(model, _ids(), context=model.load_context(tmp_path / "p")[0])
        assert torch.equal(found.sequences, expected.sequences)
        again, store = model.last_report, model.engine.loaded.layers.expert_store
        assert again.experts.by_host == first.experts.by_host > 0
        assert again.prefill_streamed_bytes == sum(
            len(own) * store.expert_bytes(i) for i, own in model.selected.items()
        )


def test_the_plan_has_no_room_for_misses_on_the_device(mixtures):
    plans = {}
    for missing in ("fetch", "host"):
        config = LoadConfig(device="threaded", ctx_size=64, max_gpu_mem="40MB", density=0.5, missing_experts=missing)
        plans[missing] = plan_for(examine(mixtures("mixtral"), config))
    fetch, host = plans["fetch"], plans["host"]
    assert host.decode_parts == fetch.decode_parts | {"slots": 0}
    assert host.prefill_parts == fetch.prefill_parts
    assert (fetch.host_bytes, host.host_bytes) == (0, fetch.decode_parts["slots"])
    assert host.to_json()["host_bytes"] == host.host_bytes


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mixtral", {"device": "cpu"}, r"missing_experts='host' .* here it is the device itself: take .*'fetch'"),
        ("mixtral", {"refresh": 4}, r"refresh=4 corrects .* with missing_experts='host' every .*='route'"),
        ("llama2", {}, r"missing_experts='host' is for mixtures of experts, and llama is none"),
    ],
)
def test_what_is_refused(checkpoints, name: str, options: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        _load(checkpoints(name), **{"missing_experts": "host", **options})
