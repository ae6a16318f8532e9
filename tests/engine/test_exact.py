"""Exact mode: the tokens are the full model's, whatever is drafted; and what it reports, keeps and refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import mostly_slow
from tiny_models import KINDS, VOCAB
from transformers import AutoModelForCausalLM, StoppingCriteria

from griffin_offload import GriffinModel, UsageError
from griffin_offload.blocks.base import hooks_on
from griffin_offload.engine.convert import convert
from griffin_offload.engine.model_interface import Guard

FAMILIES = "llama2 llama3 mistral gemma2 gemma3 qwen2 phi3 opt gpt_neox falcon_alibi gpt2 bloom cohere2".split()  # noqa: SIM905
CTX, NEW = 128, 12
_KEPT: dict[tuple[str, float, str], Any] = {}


def _load(path: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "1GB", "density": 0.5, "ctx_size": CTX, "always_stream": True}
    return GriffinModel.from_pretrained(path, **{**defaults, "exact": True, **options})


def _ids(seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


def _dense(model: Any, ids: torch.Tensor, new_tokens: int, **options: Any) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **{"do_sample": False, **options}
    )


class _Forbidden(StoppingCriteria):
    """Stops when a token has come; asked about every prefix of the answer, and of nothing else."""

    def __init__(self, token: int) -> None:
        self.token, self.asked = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


@pytest.mark.slow
@settings(max_examples=8)
@given(
    name=st.sampled_from(FAMILIES),
    density=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    drafts=st.integers(1, 31),
    prompt=st.integers(1, 60),
    new_tokens=st.integers(1, 24),
    seed=st.integers(0, 2**16),
    refresh=st.sampled_from(["turn", "never"]),
    penalty=st.sampled_from([None, 1.3]),
    ngram=st.sampled_from([None, 2, 3]),
    end=st.sampled_from([None, "eos", "criterion"]),
    least=st.sampled_from([None, 5, 20]),
    drafted=st.sampled_from(["auto", "auto", "int8", "int4"]),
)
def test_greedy_is_dense_in_float64(
    checkpoints, name, density, drafts, prompt, new_tokens, seed, refresh, penalty, ngram, end, least, drafted
):
    """Any architecture (windows of 16 included), density, draft length, format of drafts, prompt and processor."""
    path = checkpoints(name)
    if (name, density, drafted) not in _KEPT:
        dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        _KEPT[name, density, drafted] = dense, _load(path, density=density, quantize=drafted, dtype="float64")
    dense, model = _KEPT[name, density, drafted]
    ids = _ids(seed, prompt)
    options: dict[str, Any] = {"repetition_penalty": penalty, "no_repeat_ngram_size": ngram}
    options = {key: value for key, value in options.items() if value is not None}
    plain = _dense(dense, ids, new_tokens, **options)[0, prompt:].tolist()
    token = plain[len(plain) // 2]
    if end == "eos":
        options |= {"eos_token_id": token, "pad_token_id": 0, "min_new_tokens": least and min(least, new_tokens)}
    criteria = [[_Forbidden(token)] if end == "criterion" else [] for _ in range(2)]
    expected = _dense(dense, ids, new_tokens, stopping_criteria=criteria[0], **options)
    found = model.generate(
        ids,
        max_new_tokens=new_tokens,
        do_sample=False,
        draft_tokens=drafts,
        refresh=refresh,
        stopping_criteria=criteria[1],
        **options,
    )
    assert torch.equal(found, expected)
    if end == "criterion":
        assert criteria[0][0].asked == criteria[1][0].asked


class _Recorder:
    """A streamer."""

    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("name", mostly_slow(KINDS, 4))
def test_architectures_in_float32(checkpoints, name: str):
    """With the draft length that suits: tokens, streamer, logits, figures."""
    path = checkpoints(name)
    dense, model, ids, recorder = AutoModelForCausalLM.from_pretrained(path), _load(path), _ids(1, 40), _Recorder()
    asked = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    expected = _dense(dense, ids, NEW, **asked)
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, streamer=recorder, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    assert recorder.got == [ids[0].tolist(), *([token] for token in expected.sequences[0, 40:].tolist())]
    assert recorder.ends == 1
    for ours, theirs in ((found.logits, expected.logits), (found.scores, expected.scores)):
        assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-3)
    report = model.last_report
    drafting = report.drafting
    assert report.decode_streamed_bytes == drafting.passes * model.plan.streamed_bytes
    assert report.decode_streamed_bytes_per_token == report.decode_streamed_bytes / NEW
    assert drafting.tokens == NEW - 1
    assert drafting.accepted == sum(drafting.accepted_by_position) <= drafting.drafted
    assert drafting.judged_by_position[0] <= drafting.passes
    assert report.peak_device_bytes <= model.plan.peak_bytes <= model.plan.budget_bytes
    modules = model.model.modules()
    hooks = [h for m in modules for h in hooks_on(m)]
    assert [type(hook) for hook in hooks] == [Guard]


def test_at_density_one_every_draft_is_accepted(checkpoints):
    model = _load(checkpoints("llama2"), density=1.0, dtype="float64")
    model.generate(_ids(0, 20), max_new_tokens=28, do_sample=False, draft_tokens=8)
    assert model.last_report.drafting.accepted_by_position == [3] * 8


@pytest.mark.parametrize("source", mostly_slow(["none", "int8"], 1))
def test_all_neurons_draft_in_fewer_bits(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str):
    """They are rounded once, by the first pass, and judged by what is stored, which attention and head are in, too."""
    path = checkpoints("llama2")
    if source != "none":
        convert(path, tmp_path / "copy", source)
        path = tmp_path / "copy"
    ids = _ids(4, 40)
    expected = _load(path, density=1.0).generate(ids, max_new_tokens=20, do_sample=False, draft_tokens=8)
    model, rounded = _load(path, quantize="int4", density=1.0, always_stream=False), []
    for block in model.engine.loaded.layers.blocks:
        gather = block.gather
        monkeypatch.setattr(block, "gather", lambda *given, gather=gather: rounded.append(gather(*given)))
    assert (model.plan.precision, model.plan.density, len(model.plan.streamed)) == ("int4", 1.0, 3)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, draft_tokens=8), expected)
    resident = [p.clone() for layer in model.engine.loaded.layers.compact.values() for p in layer]
    report = model.last_report
    assert report.drafting.passes > 1
    assert len(rounded) == 3  # each layer once
    assert report.decode_streamed_bytes == report.drafting.passes * model.plan.streamed_bytes
    assert report.resident_bytes == model.plan.resident_bytes
    assert report.peak_device_bytes <= model.plan.peak_bytes <= model.plan.budget_bytes
    again = _load(path, quantize="int4", density=1.0, always_stream=False)
    again.generate(_ids(5, 30), max_new_tokens=2, do_sample=False)
    for ours, theirs in zip(
        resident, [p for layer in again.engine.loaded.layers.compact.values() for p in layer], strict=True
    ):
        assert torch.equal(ours, theirs)  # another prompt has the same neurons
    outside = [name for name, p in model.model.named_parameters() if "mlp" not in name and p.dtype == torch.uint8]
    assert outside == []


@pytest.mark.parametrize("name", mostly_slow(["llama2", "gemma2", "gpt2", "qwen3"], 2))
def test_bfloat16_tokens_are_first_choices_within_rounding(checkpoints, name: str):
    """Against the dense model's teacher-forced logits of the same sequence: 8 bits of mantissa, some roundings deep,
    may put another token a few units in the last place ahead."""
    path = checkpoints(name, torch.bfloat16)
    dense, model, ids = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), _load(path), _ids(2, 40)
    sequence = model.generate(ids, max_new_tokens=16, do_sample=False)
    with torch.no_grad():
        logits = dense(sequence).logits[0, 39:-1].float()
    chosen = logits.gather(1, sequence[0, 40:, None])[:, 0]
    unit = torch.finfo(torch.bfloat16).eps * logits.abs().amax(1)
    assert bool((logits.amax(1) - chosen <= 4 * unit).all())


@pytest.mark.parametrize("precision", mostly_slow(["int8", "int4"], 1))
def test_a_converted_checkpoint_is_exact_to_what_it_stores(checkpoints, tmp_path: Path, precision: str):
    """Against the same weights with every neuron: its pass multiplies by blocks, as exact mode's passes of many
    tokens do."""
    convert(checkpoints("llama2"), tmp_path / "converted", precision)
    whole, model = (_load(tmp_path / "converted", density=density) for density in (1.0, 0.25))
    ids = _ids(3, 40)
    expected = whole.generate(ids, max_new_tokens=12, do_sample=False, draft_tokens=8)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, draft_tokens=8), expected)


def test_what_cannot_be_exact_is_refused(checkpoints):
    path = checkpoints("llama2")
    model, ids = _load(path), _ids(0, 20)
    one = "one sequence of token ids at a time"
    padding = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    for words, prompt, options in (
        (one, ids.repeat(2, 1), {}),
        (one, ids, {"num_beams": 2}),
        (one, ids, {"attention_mask": padding}),
        ("prompt_lookup_num_tokens cannot", ids, {"prompt_lookup_num_tokens": 3}),
        ("guidance_scale cannot", ids, {"guidance_scale": 1.5}),
        ("output_attentions cannot", ids, {"output_attentions": True}),
        ("stop_strings need the tokenizer", ids, {"stop_strings": "x"}),
        ("from 1 to 31", ids, {"draft_tokens": 32}),
        ("from 1 to 31", ids, {"draft_tokens": 0}),
        ("leave it out", ids, {"refresh": 8}),
        ("another model", ids, {"context": _load(path).new_context()}),
    ):
        with pytest.raises(UsageError, match=words):
            model.generate(prompt, max_new_tokens=4, **options)
    with pytest.raises(UsageError, match="drafts in none or int8 or int4 here, not in int3"):
        _load(path, quantize="int3")
    for bits in (8, 4):
        with pytest.raises(UsageError, match=f"leave out kv_bits={bits}"):
            _load(path, kv_bits=bits)
    with pytest.raises(UsageError, match="load with exact=True"):
        _load(path, quantize="int8", exact=False).generate(ids, exact=True)


def test_stop_strings(checkpoints):
    path = checkpoints("llama2")
    dense, model, ids = AutoModelForCausalLM.from_pretrained(path), _load(path), _ids(0, 20)
    plain = _dense(dense, ids, 24)
    string = model.tokenizer.decode(plain[0, 30:32])
    options = {"stop_strings": string, "tokenizer": model.tokenizer}
    expected = _dense(dense, ids, 24, **options)
    assert expected.shape[1] < plain.shape[1]
    assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False, **options), expected)
