"""What transformers' generate takes: decoding strategies, streamers, caches, pipelines."""

import gc

import pytest
import torch
from tiny_models import HIDDEN, LAYERS, VOCAB
from transformers import StoppingCriteria, TextStreamer, pipeline

from griffin_offload import GriffinError, GriffinModel, UsageError
from griffin_offload.engine import prefill
from griffin_offload.offload.layer_stream import LayerStream
from griffin_offload.transformers_api import CACHE


@pytest.fixture(scope="module")
def model(checkpoints) -> GriffinModel:
    return GriffinModel.from_pretrained(
        checkpoints("llama3"), device="cpu", max_gpu_mem="100MB", density=0.5, ctx_size=128, batch_size=4
    )


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))


def _greedy(model: GriffinModel, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=12, do_sample=False, **kwargs)


def test_static_cache_gives_the_same_tokens(model: GriffinModel, ids: torch.Tensor):
    expected = _greedy(model, ids)
    assert torch.equal(_greedy(model, ids, cache_implementation="static"), expected)
    assert model.last_report.decode_streamed_bytes == 0


def test_prompt_lookup_gives_the_same_tokens(model: GriffinModel, ids: torch.Tensor):
    """Its first forward carries drafts behind the prompt: they must not choose neurons."""
    repeated = ids.repeat(1, 2)
    expected = _greedy(model, repeated)
    selected = model.selected
    drafted = _greedy(model, repeated, prompt_lookup_num_tokens=3)
    assert all(torch.equal(selected[i], model.selected[i]) for i in selected)
    assert model.last_prefill.prompt_tokens == repeated.shape[1]
    # Drafts accepted in the first forward were computed with full FFs, so only the set-up is comparable.
    assert drafted.shape[1] == expected.shape[1]


@pytest.mark.parametrize(
    "strategy",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
)
def test_strategies_are_transformers_own(model: GriffinModel, ids: torch.Tensor, strategy: dict[str, object]):
    """The same strategy on a hand-made forward loop is not possible; that one prefill happens and none later is."""
    torch.manual_seed(0)
    first = model.generate(ids, max_new_tokens=10, **strategy)
    assert model.last_report.prefill_streamed_bytes == model.plan.streamed_bytes
    assert model.last_report.decode_streamed_bytes == 0
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, max_new_tokens=10, **strategy), first)
    assert first.shape[0] == strategy.get("num_return_sequences", 1)


def test_streamer_and_stopping_criteria(model: GriffinModel, ids: torch.Tensor, capsys):
    class AfterFive(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= ids.shape[1] + 5)

    streamer = TextStreamer(model.tokenizer, skip_prompt=True)
    output = _greedy(model, ids, streamer=streamer, stopping_criteria=[AfterFive()])
    assert output.shape[1] == ids.shape[1] + 5
    assert model.last_report.generated_tokens == 5
    assert capsys.readouterr().out.strip() == model.tokenizer.decode(output[0, ids.shape[1] :]).strip()


def test_pipeline_on_the_stock_model(model: GriffinModel):
    generate = pipeline("text-generation", model=model.model, tokenizer=model.tokenizer)
    text = "the cat sat on the mat"
    result = generate(text, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    tokens = model.tokenizer(text, return_tensors="pt").input_ids
    own = _greedy(model, tokens)[0, tokens.shape[1] : tokens.shape[1] + 8]
    assert result == model.tokenizer.decode(own, skip_special_tokens=True)


def test_forward_streams_with_an_empty_cache_and_decodes_with_a_filled_one(model: GriffinModel, ids: torch.Tensor):
    output = model.model(ids, use_cache=True)
    fetched = model.last_prefill.streamed_bytes
    assert fetched == model.plan.streamed_bytes
    before = model.engine.loaded.layers.fetched_bytes
    step = model.model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values)
    assert model.engine.loaded.layers.fetched_bytes == before
    assert step.logits.shape == (1, 1, VOCAB)


def test_a_filled_cache_before_any_prompt_is_refused(checkpoints, model: GriffinModel, ids: torch.Tensor):
    fresh = GriffinModel.from_pretrained(
        checkpoints("llama3"), device="cpu", max_gpu_mem="100MB", density=0.5, ctx_size=64
    )
    cache = model.model(ids, use_cache=True).past_key_values
    with pytest.raises(GriffinError, match="no prompt was streamed"):
        fresh.model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", ["opt", "opt_no_bias", "gpt2", "phi3", "bloom"])
def test_one_token_prompts_at_every_density(checkpoints, name: str, density: float):
    model = GriffinModel.from_pretrained(
        checkpoints(name), device="cpu", max_gpu_mem="100MB", density=density, ctx_size=32
    )
    output = model.generate(torch.tensor([[5]]), max_new_tokens=4, do_sample=False)
    assert output.shape == (1, 5)
    report = model.last_report
    assert report.activation_kept_heldout is None or density == 1
    assert 0 <= report.activation_kept <= 1


def test_density_zero_is_the_model_without_feed_forwards(checkpoints, ids: torch.Tensor):
    """Bias of the down projection stays (b2 is kept whole): equal to masking every neuron."""
    from reference import masked_generate
    from tiny_models import ARCHITECTURES
    from transformers import AutoModelForCausalLM

    path = checkpoints("opt")
    model = GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="100MB", density=0, ctx_size=64)
    nothing = [torch.empty(0, dtype=torch.long)] * 3
    dense = AutoModelForCausalLM.from_pretrained(path)
    expected, _ = masked_generate(dense, ARCHITECTURES["opt"].down, ids, None, nothing, 12)
    assert torch.equal(_greedy(model, ids), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_cache": False}, "use_cache"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"max_new_tokens": 1000}, "the context is 128"),
    ],
)
def test_what_cannot_work_is_refused(model: GriffinModel, ids: torch.Tensor, kwargs: dict, message: str):
    with pytest.raises(UsageError, match=message):
        model.generate(ids, **kwargs)


def test_a_filled_cache_is_refused_by_generate(model: GriffinModel, ids: torch.Tensor):
    cache = model.model(ids, use_cache=True).past_key_values
    with pytest.raises(UsageError, match=f"{CACHE} holds"):
        model.generate(ids, past_key_values=cache)


def test_without_a_length_the_answer_fits_the_context(model: GriffinModel):
    ids = torch.randint(3, VOCAB, (1, 120))
    assert model.generate(ids, do_sample=False).shape[1] <= 128


def test_unknown_options_are_refused(checkpoints):
    with pytest.raises(UsageError, match="unknown option 'max_gpu_memory'"):
        GriffinModel.from_pretrained(checkpoints("llama3"), max_gpu_memory="1GB")


def test_no_cycle_keeps_what_is_large_alive(model: GriffinModel, ids: torch.Tensor):
    """KV caches and the slots of a stream are large: after generate none may be left for the garbage collector, beside
    which the next prompt would allocate its own."""
    from transformers import Cache

    def large() -> list[object]:
        return [o for o in gc.get_objects() if issubclass(type(o), (Cache, LayerStream))]

    gc.collect()
    gc.disable()
    try:
        others = large()  # of models that other tests share
        _greedy(model, ids)
        assert not [o for o in large() if all(o is not other for other in others)]
    finally:
        gc.enable()


def test_a_pass_over_many_tokens_gives_freed_memory_back(model: GriffinModel, ids: torch.Tensor, monkeypatch):
    """As often as hidden states of the limit have passed a layer, and never after a pass that is shorter."""
    given = list[int]()
    monkeypatch.setattr(prefill, "give_back_freed", lambda: given.append(1))
    _greedy(model, ids)
    assert not given
    monkeypatch.setattr(prefill, "GIVE_BACK_BYTES", LAYERS * ids.numel() * HIDDEN * 4)
    _greedy(model, ids)
    assert len(given) == 1
