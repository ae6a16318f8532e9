"""Decode by captured steps equals decode kernel by kernel; on the CPU, with a recorder that forbids what CUDA does."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from marks import mostly_slow
from op_recorder import OpRecorder
from tiny_models import VOCAB

from griffin_offload import GriffinModel
from griffin_offload.engine import decode_graph
from griffin_offload.engine.decode_graph import bucket_of
from griffin_offload.kernels import table

# Windows, learned positions, positions by ids, shared and separate heads, types of layers, scores made in Python.
ARCHITECTURES = ["llama3", "mistral", "gemma2", "opt", "gpt2", "gptj"]
NEW = 72  # behind 24 tokens: more than a layer with a window of 16 has room for
FEWER = 26  # where that was asked already


@pytest.fixture(autouse=True)
def _short_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "SMALLEST_BUCKET", 32)


@pytest.fixture(autouse=True)
def _kernels_of_torch() -> Iterator[None]:
    """The processor's own are no operators that a recorder sees, and none of CUDA's."""
    with table.leaving_out(lambda kernel: kernel.ours and kernel.operation in ("gemv", "gemm", "attention")):
        yield


def _ids(tokens: int = 24, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _load(path: Any, **options: Any) -> GriffinModel:
    settings = {"device": "cpu", "max_gpu_mem": "100MB", "density": 0.5, "ctx_size": 128, "dtype": "float64"}
    return GriffinModel.from_pretrained(path, **(settings | {"quantize": "none"} | options))


def _pair(path: Any, **options: Any) -> tuple[GriffinModel, GriffinModel]:
    """The same model twice; the second one decodes by what is recorded."""
    plain, graphs = _load(path, **options), _load(path, **options)
    graphs.engine.capture_with(OpRecorder())
    return plain, graphs


def _generate(model: GriffinModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids, **({"max_new_tokens": NEW, "do_sample": False} | options))


def _logits(model: GriffinModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    output = _generate(model, ids, output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(output.logits)


@pytest.mark.parametrize("name", mostly_slow(ARCHITECTURES, 2))
def test_replayed_logits_are_those_of_the_stock_forward(checkpoints, name: str):
    plain, graphs = _pair(checkpoints(name))
    for seed, tokens, new in ((0, 24, NEW if name in ("mistral", "gemma2") else FEWER), (1, 40, 12)):
        ids = _ids(tokens, seed)
        found, expected = (_logits(model, ids, max_new_tokens=new) for model in (graphs, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        report = graphs.last_report.graphs
        assert report.replayed == new - 1 - sum(report.eager.values())
        assert set(report.eager) == {"first token of a length"}


def test_captures_survive_prompts(checkpoints):
    plain, graphs = _pair(checkpoints("gemma2"))
    for seed in range(2):
        assert torch.equal(_generate(graphs, _ids(seed=seed)), _generate(plain, _ids(seed=seed)))
        report = graphs.last_report.graphs
        # 25 to 96 tokens: read as 32, 48, 64 and 96.
        assert (report.captured, report.replayed) == ((4, NEW - 1 - 4) if seed == 0 else (0, NEW - 1))
    assert plain.last_report.graphs is None


def test_buckets_are_few_and_close():
    taken = {bucket_of(tokens, 10**6) for tokens in range(1, 4097)}
    assert sorted(taken) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert bucket_of(1000, 1010) == 1010


@pytest.mark.parametrize(
    ("options", "strategy"),
    mostly_slow(
        [
            ({"kv_bits": 8}, {"max_new_tokens": NEW}),
            ({"kv_bits": 4}, {}),
            ({"kv_bits": 8, "batch_size": 2}, {"num_return_sequences": 2, "do_sample": True}),
            ({"batch_size": 3}, {"num_beams": 3}),
            ({"quantize": "int8", "dtype": "float32"}, {}),
            ({"quantize": "int4", "dtype": "float32"}, {}),
            ({}, {"repetition_penalty": 1.3}),
        ],
        quick=3,
    ),
)
def test_precisions_and_strategies(checkpoints, options: dict[str, Any], strategy: dict[str, Any]):
    plain, graphs = _pair(checkpoints("mistral"), **options)
    results = []
    for model in (plain, graphs):
        torch.manual_seed(0)
        results.append(_generate(model, _ids(), **{"max_new_tokens": FEWER} | strategy))
    assert torch.equal(*results)
    assert graphs.last_report.graphs.replayed > FEWER // 2


@pytest.mark.slow
def test_drafts_are_replayed_and_passes_are_not(checkpoints):
    for options in ({"exact": True, "draft_tokens": 4}, {"refresh": 5}):
        plain, graphs = _pair(checkpoints("mistral"), **options)
        assert torch.equal(*(_generate(model, _ids(), max_new_tokens=30) for model in (graphs, plain)))
        assert graphs.last_report.graphs.replayed > 10
        assert graphs.last_report.drafting.passes == plain.last_report.drafting.passes


def test_contexts_keep_their_captures(checkpoints):
    plain, graphs = _pair(checkpoints("llama2"), keep_prompts=True)
    contexts = [model.new_context() for model in (plain, graphs)]
    prompt = _ids()
    for turn in range(3):
        answers = [
            _generate(model, prompt, context=context, max_new_tokens=16)
            for model, context in zip((plain, graphs), contexts, strict=True)
        ]
        assert torch.equal(*answers)
        report = graphs.last_report.graphs
        assert report.replayed + sum(report.eager.values()) == 15
        prompt = torch.cat([answers[0], _ids(3, seed=turn)], dim=1)


def test_embeddings_on_the_host_are_looked_up_before_the_step(checkpoints):
    path = checkpoints("mistral")
    tight = _load(path, dtype="auto").plan.peak_bytes - 1000
    plain, graphs = _pair(path, max_gpu_mem=tight, dtype="auto")
    assert graphs.plan.embeddings == "host"
    assert torch.equal(*(_generate(model, _ids(), max_new_tokens=FEWER) for model in (graphs, plain)))
    assert graphs.last_report.graphs.replayed > FEWER // 2
    assert graphs.last_report.decode_embedding_bytes == plain.last_report.decode_embedding_bytes > 0


def _reasons(model: GriffinModel) -> set[str]:
    report = model.last_report.graphs
    assert report.replayed == report.captured == 0
    return set(report.eager)


def test_what_cannot_be_captured_is_named(checkpoints):
    plain, graphs = _pair(checkpoints("llama2"), batch_size=2)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    padded = {"attention_mask": mask}
    assert torch.equal(_generate(graphs, _ids(batch=2), **padded), _generate(plain, _ids(batch=2), **padded))
    assert _reasons(graphs) == {"padded prompts"}
    _generate(graphs, _ids(), cache_implementation="static")
    assert _reasons(graphs) == {"a KV cache of the caller's"}
    _generate(graphs, _ids(), output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=4)
    assert _reasons(graphs) == {"the argument output_hidden_states"}
    seen = []
    handle = graphs.model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    _generate(graphs, _ids(), max_new_tokens=4)
    handle.remove()
    assert _reasons(graphs) == {"hooks on the model's modules"}
    assert len(seen) == 4
    _generate(graphs, _ids(), max_new_tokens=4)
    assert graphs.last_report.graphs.replayed == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bloom", "ALiBi"), ("falcon_alibi", "ALiBi"), ("falcon_new", "Falcon"), ("llama4", "attention")],
)
def test_models_that_cannot_be_captured_are_known(checkpoints, name: str, reason: str):
    _, graphs = _pair(checkpoints(name))
    _generate(graphs, _ids(), max_new_tokens=4)
    assert [found.split()[0] for found in _reasons(graphs)] == [reason]


def test_a_capture_that_fails_is_said_and_costs_nothing_else(checkpoints, monkeypatch: pytest.MonkeyPatch):
    plain, graphs = _pair(checkpoints("llama2"))
    original = decode_graph.StaticDecodeStep.masks

    def reading(self: Any) -> Any:
        int(self._positions[0, 0])
        return original(self)

    monkeypatch.setattr(decode_graph.StaticDecodeStep, "masks", reading)
    with pytest.warns(UserWarning, match="decoding kernel by kernel, capturing failed: .*not permitted"):
        tokens = _generate(graphs, _ids())
    assert torch.equal(tokens, _generate(plain, _ids()))
    report = graphs.last_report.graphs
    assert (report.replayed, sum(report.eager.values())) == (0, NEW - 1)
    assert "capturing failed" in report.line()


def test_captures_go_with_their_kv_cache(checkpoints):
    _, graphs = _pair(checkpoints("llama2"), batch_size=2)
    _generate(graphs, _ids(), max_new_tokens=8)
    assert len(graphs.engine.graphs.caches) == 1
    _generate(graphs, _ids(batch=2), max_new_tokens=8)  # of another size: the first is released
    gc.collect()
    assert [cache.batch for cache in graphs.engine.graphs.caches] == [2]
    output = _generate(graphs, _ids(), max_new_tokens=8, return_dict_in_generate=True)
    kept = output.past_key_values.layers[0].saved()[0].clone()
    _generate(graphs, _ids(seed=1), max_new_tokens=8)  # the caller's stays the caller's
    assert torch.equal(output.past_key_values.layers[0].saved()[0], kept)
    graphs.close()
    del output
    gc.collect()
    assert not graphs.engine.graphs.caches
