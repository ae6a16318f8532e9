"""Decode by recorded steps on the CPU: the very tokens of steps with all of Python, and within what was planned."""

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_model import load
from marks import by_turns, mostly_slow
from tiny_models import ARCHITECTURES, FURTHER, MIXTURES, VOCAB, write_tokenizer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.engine.step_replay import StepReplays
from griffin_offload.formats.linear import QuantizedLinear
from griffin_offload.kernels import gemv
from griffin_offload.kernels.library import library
from griffin_offload.kernels.recording import Recording
from griffin_offload.kv_cache.store import Int4Keys, QuantizedStore, Store

NAMES = (*ARCHITECTURES, *FURTHER, *MIXTURES)
GREEDY = {"do_sample": False, "max_new_tokens": 12, "lookup": False}
_QUICK = 8
# Attention of their own, states, or something that is counted on the host.
NOT_REPLAYED = (
    *("falcon", "stablelm", "gptj", "bloom", "deepseek", "lfm2", "qwen3_next", "nemotron", "llama4"),
    *("gpt2", "jetmoe"),
)


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


def types_of(names: Iterable[str]) -> list[Any]:
    """(name, dtype): both of the first names, which are quick; of others one by turns."""
    both, found = (torch.float32, torch.bfloat16), list[Any]()
    for at, name in enumerate(names):
        chosen = both[at % 2 :][:1] if at >= _QUICK or name.startswith(NOT_REPLAYED) else both
        found += [pytest.param(name, dtype, marks=() if at < _QUICK else pytest.mark.slow) for dtype in chosen]
    return found


def without(monkeypatch: pytest.MonkeyPatch, compute: Any) -> Any:
    """What `compute` gives where no step is replayed."""
    with monkeypatch.context() as context:
        context.setattr(StepReplays, "why_not", property(lambda _: "a test"))
        return compute()


def alone(model: GriffinModel, ids: torch.Tensor, **options: Any) -> list[int]:
    answer: list[int] = model.generate(ids, **(GREEDY | options))[0, ids.shape[1] :].tolist()
    return answer


def replayed(model: GriffinModel) -> int:
    report = model.last_report
    assert report is not None
    assert report.replays is not None
    return report.replays.replayed


@pytest.mark.parametrize(("name", "dtype"), types_of(NAMES))
def test_tokens_are_those_of_steps_with_python(checkpoints, monkeypatch, name: str, dtype: torch.dtype):
    """A KV cache of another size, behind a shorter prompt, is no architecture's own."""
    lengths = (9, 30) if NAMES.index(name) < _QUICK else (30,)
    with load(checkpoints(name, dtype), density=1.0, quantize="none" if dtype == torch.float32 else "int8") as model:
        for tokens in lengths:
            ids = prompt(tokens, tokens)
            expected = without(monkeypatch, lambda ids=ids: alone(model, ids))
            assert alone(model, ids) == expected
        assert alone(model, ids) == expected
        report = model.last_report.replays
        assert report.captured == 0
        if not name.startswith(NOT_REPLAYED):
            assert report.replayed > 0, report.eager


@pytest.mark.parametrize(
    ("name", "bits"),
    by_turns(("llama3", "gemma2", "mistral", "gpt_oss"), (16, 8, 4), whole=("llama3",)),
)
def test_sequences_join_and_leave(checkpoints, monkeypatch, name: str, bits: int):
    """Each with a KV cache of another size, in which windows move, and in fewer bits, which kernels know of 16."""
    dtype = torch.float32 if bits == 16 else torch.bfloat16
    with load(checkpoints(name, dtype), density=1.0, kv_bits=bits, ctx_size=160) as model:
        asked = [(prompt(7 + 9 * seed, seed), GREEDY | {"max_new_tokens": 9 + 9 * seed}) for seed in range(4)]

        steps = list[int]()

        def answers() -> dict[int, list[int]]:
            found = list(model.generate_many(asked, most=3))
            steps[:] = [answer.report.replays.replayed for answer in found]
            return {answer.index: answer.tokens.tolist() for answer in found}

        expected = without(monkeypatch, answers)
        assert answers() == expected == answers()
        assert max(steps) > 0
        assert [expected[index] for index in range(4)] == [alone(model, ids, **how) for ids, how in asked]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", mostly_slow(("gemma2", "mistral", "gpt_oss"), 1))
def test_windows_move_while_a_step_is_recorded(checkpoints, monkeypatch, name: str, bits: int):
    """Behind a prompt that is longer than window and slack; no later answer moves anything in that KV cache."""
    with load(checkpoints(name, torch.bfloat16), density=1.0, ctx_size=500, sequences=3, kv_bits=bits) as model:
        long = {"max_new_tokens": 40}

        def answers() -> list[list[int]]:
            contexts, found = [model.new_context(400) for _ in range(2)], list[list[int]]()
            for turn in range(4):
                context = contexts[turn % 2]
                ids = torch.cat([torch.tensor([context.tokens], dtype=torch.long), prompt(20, turn)], dim=1)
                ids = ids if context.tokens else prompt(200, turn)
                found.append(alone(model, ids, context=context, **long))
            return found

        expected = without(monkeypatch, answers)
        assert answers() == expected
        assert replayed(model) > 0


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("bits", [8, 4])
def test_attention_reads_codes_where_they_lie(tmp_path, monkeypatch, bits: int, window: int | None):
    """Across groups of keys and moves of a window: as of numbers made of them, which no replay asks for."""
    config = MistralConfig(
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{
            "vocab_size": VOCAB,
            "intermediate_size": 64,
            "head_dim": 32,
            "sliding_window": window,
            "eos_token_id": None,
        },
    )
    torch.manual_seed(0)
    stock = MistralForCausalLM(config).to(torch.bfloat16)
    for name, parameter in stock.named_parameters():
        if "q_proj" in name or "k_proj" in name:  # sharp attention: one token's keys are another's answer
            parameter.data *= 20
    stock.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    reads = list[int]()
    stores = (QuantizedStore, Int4Keys)
    with load(tmp_path, density=1.0, quantize="none", kv_bits=bits, ctx_size=500) as model:
        ids = prompt(70, bits)
        expected = without(monkeypatch, lambda: alone(model, ids, max_new_tokens=200))
        alone(model, ids)
        for store in stores:
            read = store.read
            monkeypatch.setattr(store, "read", lambda *args, read=read: reads.append(1) or read(*args))
        assert alone(model, ids, max_new_tokens=200) == expected
        assert len(set(expected)) > 20, "an answer that repeats itself says little"
        assert replayed(model) > 190
    assert len(reads) < 20, "what moves a window"


def test_kv_caches_go_when_answers_end(checkpoints, monkeypatch):
    stores, make = list[StorageWeakRef](), Store.__init__

    def noted(store: Store, like: torch.Tensor, tokens: int) -> None:
        make(store, like, tokens)
        stores.extend(StorageWeakRef(part.untyped_storage()) for part in store.parts(tokens))

    monkeypatch.setattr(Store, "__init__", noted)
    with load(checkpoints("llama3", torch.bfloat16), density=1.0) as model:
        for tokens in (20, 30):
            alone(model, prompt(tokens))
        assert replayed(model) > 0
        gc.collect()
        assert stores
        assert all(own.expired() for own in stores)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_each_prompt_has_its_neurons(checkpoints, monkeypatch, density: float):
    with load(checkpoints("llama3"), density=density) as model:
        asked = [prompt(20, seed) for seed in range(3)]
        expected = without(monkeypatch, lambda: [alone(model, ids) for ids in asked])
        assert [alone(model, ids) for ids in asked] == expected
        assert replayed(model) > 0


def test_experts_that_come_and_go_are_python(checkpoints):
    with load(checkpoints("mixtral"), density=0.5) as model:
        alone(model, prompt(20))
        assert replayed(model) == 0


def test_weights_that_lie_elsewhere_are_recorded_anew(checkpoints):
    with load(checkpoints("llama3"), density=1.0) as model:
        expected = alone(model, prompt(9))
        head = model.model.get_output_embeddings()
        with torch.no_grad():
            head.weight = torch.nn.Parameter(head.weight.roll(1, 0), requires_grad=False)
        assert alone(model, prompt(9))[0] == expected[0] + 1
        assert model.last_report.replays.captured == 1


@pytest.mark.parametrize("name", mostly_slow(("qwen2", "starcoder2"), 1))
def test_numbers_of_another_type_are_read_anew(checkpoints, monkeypatch, name: str):
    """Kernels read a bias in float32 beside 16 bits from a copy, which Python's next step may make anew elsewhere."""
    made, stock = list[gemv.CheckedMatrix](), gemv.checked_typed

    def noted(*args: Any) -> gemv.CheckedMatrix:
        made.append(stock(*args))  # and kept: the next copy lies elsewhere
        return made[-1]

    monkeypatch.setattr(gemv, "checked_typed", noted)
    with load(checkpoints(name, torch.bfloat16), density=1.0, quantize="int8") as model:
        modules = [own for own in model.model.modules() if isinstance(own, QuantizedLinear) and own.bias is not None]
        assert modules
        for module in modules:
            module.bias = torch.nn.Parameter(module.bias.float(), requires_grad=False)
        expected = without(monkeypatch, lambda: alone(model, prompt(9)))
        assert alone(model, prompt(9)) == expected
        assert replayed(model) > 0
        assert any(own.made for own in made)
        for module in modules:  # the same numbers at the same place
            module.bias = torch.nn.Parameter(module.bias.data, requires_grad=False)
            module.bias.add_(torch.randn(module.bias.shape))
        changed = without(monkeypatch, lambda: alone(model, prompt(9)))
        assert alone(model, prompt(9)) == changed != expected


def test_weights_that_were_replaced_are_freed(checkpoints):
    """Though steps of another number of sequences were recorded with them, too."""
    with load(checkpoints("llama3"), density=1.0) as model:
        head, replaced = model.model.get_output_embeddings(), list[StorageWeakRef]()
        for _ in range(2):
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            replaced.append(StorageWeakRef(head.weight.untyped_storage()))
            list(model.generate_many([(prompt(7 + 9 * seed, seed), GREEDY) for seed in range(2)]))
            alone(model, prompt(9))
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        alone(model, prompt(9))
        assert model.last_report.replays.captured == 1
        gc.collect()
        assert all(own.expired() for own in replaced)


def test_hooks_are_called(checkpoints):
    seen = []
    with load(checkpoints("llama3"), density=1.0) as model:
        expected = alone(model, prompt(9))
        hook = model.model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        assert alone(model, prompt(9)) == expected
        hook.remove()
        assert len(seen) == GREEDY["max_new_tokens"]
        assert model.last_report.replays.eager == {"hooks on the model's modules": GREEDY["max_new_tokens"] - 1}


def test_forwards_in_the_place_of_a_modules_are_called(checkpoints):
    seen = []
    with load(checkpoints("llama3"), density=1.0) as model:
        expected = alone(model, prompt(9))
        own = model.model.model.layers[1].mlp
        stock = own.forward
        own.forward = lambda x: (seen.append(1), stock(x))[1]
        assert alone(model, prompt(9)) == expected
        del own.forward
        assert len(seen) == GREEDY["max_new_tokens"]
        with register_module_forward_hook(lambda *_: seen.append(1)):
            assert alone(model, prompt(9)) == expected
        assert replayed(model) == 0
        assert alone(model, prompt(9)) == expected
        assert replayed(model) > 0


def _scale(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 10.0


def _turn(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 4.0


def _activate(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def _drop_layer(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


@pytest.mark.parametrize("change", [_scale, _turn, _activate, _drop_layer])
def test_what_has_changed_between_answers_is_recorded_anew(checkpoints, monkeypatch, change: Any):
    """Numbers and functions of modules, of which replays see nothing; and a layer less."""
    with load(checkpoints("llama3", torch.bfloat16), density=1.0) as model:
        before = alone(model, prompt(9), max_new_tokens=24)
        assert replayed(model) > 0
        change(model.model)
        expected = without(monkeypatch, lambda: alone(model, prompt(9)))
        assert expected != before[: len(expected)]
        assert alone(model, prompt(9)) == expected == alone(model, prompt(9))
        assert replayed(model) > 0


def test_rows_that_hooks_bring_are_recorded_apart(checkpoints):
    """An embedding's hooks are called by every step, whatever was recorded before."""
    seen = []
    with load(checkpoints("llama3"), density=1.0) as model:
        expected = alone(model, prompt(9))
        hook = model.model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
        assert alone(model, prompt(9)) == expected
        hook.remove()
        assert alone(model, prompt(9)) == expected
    assert len(seen) >= GREEDY["max_new_tokens"]


def test_a_replay_that_differs_is_given_up(checkpoints, monkeypatch):
    """Here attention adds something that is another every time, where nobody knows of it."""
    with load(checkpoints("llama3"), density=1.0) as model:
        norm, added = model.model.model.norm, iter(range(10**6))
        stock = type(norm).forward
        monkeypatch.setattr(type(norm), "forward", lambda self, x: stock(self, x) + 1e-3 * next(added))
        alone(model, prompt(9))
        assert "a replay gave other numbers" in model.last_report.replays.eager


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_recording_that_fails_is_python(checkpoints, monkeypatch, sequences: int):
    """Keys and values of the layers before are forgotten, and sequences that decode together go on together."""
    with load(checkpoints("llama3"), density=1.0) as model:
        asked = [(prompt(7 + 9 * seed, seed), GREEDY) for seed in range(sequences)]

        def answers() -> dict[int, list[int]]:
            return {answer.index: answer.tokens.tolist() for answer in model.generate_many(asked)}

        expected = without(monkeypatch, answers)
        stock, left = Recording.__torch_dispatch__, iter(range(50))

        def failing(self: Recording, func: Any, *args: Any) -> Any:
            if next(left, None) is None:
                raise RuntimeError("no")
            return stock(self, func, *args)

        monkeypatch.setattr(Recording, "__torch_dispatch__", failing)
        assert answers() == expected
        assert "no" in str(next(iter(model.generate_many(asked))).report.replays.eager)


@pytest.mark.skipif(library() is None, reason="the kernels are not compiled")
@pytest.mark.parametrize(
    ("name", "quantize"),
    by_turns(
        ("llama3", "gemma2", "phi3", "opt_350m", "gpt_oss", "mixtral"),
        ("none", "int8", "int4"),
        whole=("llama3", "mixtral"),
    ),
)
def test_memory_is_as_planned(checkpoints, name: str, quantize: str):
    options = {"density": 1.0, "quantize": quantize, "sequences": 3}
    with load(checkpoints(name, torch.bfloat16), **options) as model:
        alone(model, prompt(9), max_new_tokens=24)
        reports = [model.last_report]
        asked = [(prompt(20, seed), GREEDY | {"max_new_tokens": 12 + 8 * seed}) for seed in range(3)]
        reports += [answer.report for answer in model.generate_many(asked)]
        kept = [report.replays.kept_bytes for report in reports]
        assert 0 < max(kept) <= model.plan.parts["graphs"]
        assert all(report.peak_device_bytes <= model.plan.budget_bytes for report in reports)


@pytest.mark.skipif(library() is None, reason="the kernels are not compiled")
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_memory_of_tables_is_as_planned(tmp_path: Path, quantize: str):
    """Of four sequences: 1,024 neurons each are looked up, as are those of int8 that are filled up to them."""
    planned, kept = list[int](), list[int]()
    for neurons in (960, 961, 1024):
        config = LlamaConfig(
            **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": None},
            **{"vocab_size": VOCAB, "intermediate_size": neurons},
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
        write_tokenizer(tmp_path)
        with load(tmp_path, density=1.0, quantize=quantize, sequences=4) as model:
            asked = [(prompt(9, seed), GREEDY) for seed in range(4)]
            reports = [answer.report for answer in model.generate_many(asked)]
            planned.append(model.plan.parts["graphs"])
            kept.append(max(report.replays.kept_bytes for report in reports))
    table, filled = 2**16 * 2, quantize == "int8"
    assert [own - kept[0] >= table for own in kept] == [False, filled, True]
    assert [own - planned[0] >= 2 * table for own in planned] == [False, filled, True]
    rows, activations = (
        1 + 2 + 3 + 4,
        4 * (1024 - 960) * 2,
    )  # of all steps; bytes of one row
    assert filled or planned[2] - planned[0] - 2 * table < 6 * rows * activations
