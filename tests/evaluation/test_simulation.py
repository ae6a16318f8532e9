"""The simulation against generation, against dense transformers, and what it leaves behind."""

from pathlib import Path

import pytest
import torch
from marks import by_turns
from reference import dense_forward
from tiny_models import KINDS, VOCAB, WINDOW
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload import DoesNotFit, GriffinModel, UsageError
from griffin_offload.blocks.base import hooks_on
from griffin_offload.engine.convert import convert
from griffin_offload.evaluation import simulated_pass
from griffin_offload.evaluation.samples import Sample
from griffin_offload.evaluation.simulation import simulate
from griffin_offload.method.variants import Variant

NEW_TOKENS = 7
LENGTHS = (40, 1, 23, 33)  # past the windows of gemma2, and a prompt of one token
HALF = Variant(0.5)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def _load(path: Path, **options: object) -> GriffinModel:
    return GriffinModel.from_pretrained(
        path, **{"device": "cpu", "max_gpu_mem": "100MB", "density": 0.5, "ctx_size": 64, **options}
    )


def _prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (1, length), generator=generator) for length in LENGTHS]


def _generated(model: GriffinModel, prompt: Tensor) -> tuple[Sample, Tensor]:
    """Greedy generation of the runtime as a sample, and the log-probabilities [G] it gave its tokens."""
    output = model.generate(
        prompt, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    continuation = output.sequences[0, prompt.shape[1] :]
    log_probs = torch.stack(output.logits)[:, 0].log_softmax(-1)
    return Sample.generation(prompt[0], continuation), log_probs.gather(-1, continuation[:, None])[:, 0]


@pytest.mark.parametrize(("name", "pieces"), by_turns(KINDS, ("all rows", "few rows and positions")))
def test_equals_generation(checkpoints, monkeypatch: pytest.MonkeyPatch, name: str, pieces: str):
    """Greedy continuations of one prompt each, re-scored alone and all together, padded: the same log-probabilities."""
    if pieces != "all rows":
        monkeypatch.setattr(simulated_pass, "TOKENS_AT_ONCE", 160)
        monkeypatch.setattr(simulated_pass, "POSITIONS_AT_ONCE", 5)
    assert max(LENGTHS) > WINDOW
    model = _load(checkpoints(name), ff_chunk_tokens=16)
    samples, expected = zip(*(_generated(model, prompt) for prompt in _prompts()), strict=True)
    together = simulate(model, samples, [HALF])
    for sample, log_probs, found in zip(samples, expected, together, strict=True):
        alone = simulate(model, [sample], [HALF])[0]
        for scores in (alone.variants[0], found.variants[0]):
            torch.testing.assert_close(scores.log_probs, log_probs, **CLOSE)
            assert scores.greedy.all()
        assert found.variants[0].log_probs[0] == found.full.log_probs[0]  # the prompt's own prediction
        assert (found.variants[0].log_probs - found.full.log_probs).abs().max() > 0.05


@pytest.mark.parametrize("selection", ["output_aware", "sample", "topk_sample", "random", "magnitude"])
def test_equals_generation_with_every_selection(checkpoints, selection: str):
    model = _load(checkpoints("llama3"), selection=selection, seed=3)
    samples, expected = zip(*(_generated(model, prompt) for prompt in _prompts()), strict=True)
    found = simulate(model, samples, [Variant(0.5, selection)])
    for scores, log_probs in zip(found, expected, strict=True):
        torch.testing.assert_close(scores.variants[0].log_probs, log_probs, **CLOSE)


def test_activation_kept_is_that_of_the_run(checkpoints):
    model = _load(checkpoints("llama3"))
    sample, _ = _generated(model, _prompts()[0])
    found = simulate(model, [sample], [HALF])[0]
    assert found.variants[0].activation_kept == pytest.approx(model.last_prefill.activation_kept, abs=1e-6)
    assert found.full.activation_kept == 1


@pytest.mark.parametrize("name", ["llama2", "gemma2", "opt", "gpt2", "falcon_alibi", "bloom"])
def test_full_model_and_density_one_equal_dense_transformers(checkpoints, name: str):
    path = checkpoints(name)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    samples = [Sample.generation(prompt[0, :-8], prompt[0, -8:]) for prompt in _prompts() if prompt.shape[1] > 8]
    for sample, found in zip(samples, simulate(_load(path), samples, [Variant(1.0), HALF]), strict=True):
        expected = dense_forward(dense, sample.ids[None, :-1])[0, sample.scored_from - 1 :].log_softmax(-1)
        targets = sample.ids[sample.scored_from :, None]
        for scores in (found.full, found.variants[0]):
            torch.testing.assert_close(scores.log_probs, expected.gather(-1, targets)[:, 0], **CLOSE)
            assert torch.equal(scores.greedy, expected.argmax(-1) == targets[:, 0])
            assert scores.agrees.all()
            assert scores.kl.abs().max() < 1e-5
            assert scores.activation_kept == pytest.approx(1)


def test_divergence_is_that_of_the_distributions(checkpoints):
    """KL and agreement from the runtime's own logits, and the dense model's on the same tokens."""
    path = checkpoints("llama2")
    model, prompt = _load(path), _prompts()[0]
    output = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True,
                            return_dict_in_generate=True)  # fmt: skip
    own = torch.stack(output.logits)[:, 0].double().log_softmax(-1)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    full = dense_forward(dense, output.sequences[:, :-1])[0, prompt.shape[1] - 1 :].double().log_softmax(-1)
    sample = Sample.generation(prompt[0], output.sequences[0, prompt.shape[1] :])
    found = simulate(model, [sample], [HALF])[0].variants[0]
    torch.testing.assert_close(found.kl.double(), (full.exp() * (full - own)).sum(-1), **CLOSE)
    assert torch.equal(found.agrees, full.argmax(-1) == own.argmax(-1))
    assert not found.agrees.all()


def test_several_variants_are_each_as_alone_and_weights_are_fetched_once(checkpoints):
    model = _load(checkpoints("qwen3"))
    variants = [Variant(0.25), Variant(0.5, "magnitude"), Variant(0.5, "output_aware"), Variant(0.75, "random")]
    samples = [Sample.generation(prompt[0], prompt[0]) for prompt in _prompts()]
    before = model.engine.loaded.layers.fetched_bytes
    together = simulate(model, samples, variants)
    assert model.engine.loaded.layers.fetched_bytes - before == model.plan.streamed_bytes
    for place, variant in enumerate(variants):
        for found, alone in zip(together, simulate(model, samples, [variant]), strict=True):
            ours, theirs = found.variants[place], alone.variants[0]
            torch.testing.assert_close(ours.log_probs, theirs.log_probs, **CLOSE)
            torch.testing.assert_close(ours.kl, theirs.kl, **CLOSE)
            assert ours.activation_kept == pytest.approx(theirs.activation_kept, abs=1e-6)


def test_what_was_selected_stays(checkpoints):
    model = _load(checkpoints("llama3"))
    prompt = _prompts()[0]
    output = model.model(prompt, use_cache=True)
    selected = model.selected
    simulate(model, [Sample.generation(_prompts()[3][0], prompt[0])], [Variant(0.25)])
    assert all(torch.equal(selected[index], model.selected[index]) for index in selected)
    step = model.model(prompt[:, :1], past_key_values=output.past_key_values).logits
    fresh = model.model(prompt, use_cache=True)
    again = model.model(prompt[:, :1], past_key_values=fresh.past_key_values).logits
    assert torch.equal(step, again)


def _instance_forwards(model: GriffinModel) -> list[str]:
    """Modules whose forward is not their class's, the model's own aside."""
    return [name for name, module in model.model.named_modules() if name and "forward" in module.__dict__]


def _shapes(model: GriffinModel) -> list[torch.Size]:
    return [parameter.shape for parameter in model.model.parameters()]


def _hooks(model: GriffinModel) -> int:
    return sum(len(hooks_on(module)) for module in model.model.modules())


@pytest.mark.parametrize("name", ["llama2", "opt"])
@pytest.mark.parametrize("moment", ["choosing", "a layer", "the head"])
def test_nothing_stays_behind_after_an_exception(checkpoints, name: str, moment: str, monkeypatch: pytest.MonkeyPatch):
    model = _load(checkpoints(name))
    hooks, forwards, shapes = _hooks(model), _instance_forwards(model), _shapes(model)
    sample = Sample.generation(_prompts()[0][0], _prompts()[2][0])
    expected = simulate(model, [sample], [HALF])[0]
    output = model.generate(_prompts()[0], max_new_tokens=8, do_sample=False)
    assert (_hooks(model), _instance_forwards(model)) == (hooks, forwards)

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "choosing":
            patch.setattr("griffin_offload.evaluation.simulation.choose", broken)
        elif moment == "a layer":
            patch.setattr(model.engine.loaded.layers.decoder[1].self_attn, "forward", broken)
        else:
            patch.setattr(model.model.get_output_embeddings(), "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            simulate(model, [sample], [HALF])
    assert (_hooks(model), _instance_forwards(model), _shapes(model)) == (hooks, forwards, shapes)
    assert torch.equal(simulate(model, [sample], [HALF])[0].variants[0].log_probs, expected.variants[0].log_probs)
    assert torch.equal(model.generate(_prompts()[0], max_new_tokens=8, do_sample=False), output)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama2"])
def test_columns_beyond_the_context_are_nobodys(checkpoints, name: str):
    """A long prompt beside a long continuation: their columns are more than the model has positions."""
    model = _load(checkpoints(name))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (505,), generator=generator)
    samples = [Sample.generation(ids[:500], ids[:5]), Sample.generation(ids[:5], ids[:100])]
    for sample, found in zip(samples, simulate(model, samples, [HALF]), strict=True):
        alone = simulate(model, [sample], [HALF])[0]
        torch.testing.assert_close(found.variants[0].log_probs, alone.variants[0].log_probs, **CLOSE)


def test_passes_are_as_large_as_the_budget_allows(checkpoints):
    """Less memory: more passes, the same figures, and the ledger stays inside."""
    path = checkpoints("llama2")
    samples = [Sample.generation(prompt[0], prompt[0]) for prompt in _prompts()]
    expected = simulate(_load(path), samples, [HALF, Variant(0.25)])
    peak = _load(path, density=0.0, ctx_size=8).plan.peak_bytes
    passes = set()
    for budget in (peak + 350_000, peak + 700_000, peak + 2_000_000):
        model = _load(path, density=0.0, ctx_size=8, max_gpu_mem=budget)
        found = simulate(model, samples, [HALF, Variant(0.25)])
        layers = model.engine.loaded.layers
        passes.add(layers.fetched_bytes // model.plan.streamed_bytes)
        assert model.engine.loaded.ledger.peak_bytes <= budget
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.variants[1].log_probs, theirs.variants[1].log_probs, **CLOSE)
    assert len(passes) == 3
    assert min(passes) == 1


def test_one_sample_that_does_not_fit_is_refused_with_numbers(checkpoints):
    path = checkpoints("llama2")
    peak = _load(path, density=0.0, ctx_size=8).plan.peak_bytes
    model = _load(path, density=0.0, ctx_size=8, max_gpu_mem=peak)
    sample = Sample.generation(torch.arange(3, 303), torch.arange(3, 103))
    with pytest.raises(DoesNotFit, match=r"one sample of 399 tokens under 2 variants.* needs .*B, budget .*larger"):
        simulate(model, [sample], [HALF])


def test_what_cannot_be_simulated_is_refused(checkpoints):
    model = _load(checkpoints("llama2"))
    ids = torch.arange(3, 303)
    with pytest.raises(UsageError, match="no samples"):
        simulate(model, [], [HALF])
    with pytest.raises(UsageError, match="599 tokens is more than the model's context, 512"):
        simulate(model, [Sample.generation(ids, ids)], [HALF])
    with pytest.raises(UsageError, match="prompt of 0 tokens"):
        Sample.generation(ids[:0], ids)
    with pytest.raises(UsageError, match="continuation of 0"):
        Sample.generation(ids, ids[:0])
    with pytest.raises(UsageError, match="none that could choose"):
        Sample.classification(ids[:1], ids[:1])
    with pytest.raises(UsageError, match="prior"):
        simulate(model, [Sample.generation(ids[:9], ids[:9])], [Variant(0.5, prior="energy")])


def test_a_model_whose_layers_all_fit_is_simulated_as_well(checkpoints):
    path = checkpoints("llama2")
    resident, streamed = _load(path, density=1.0), _load(path)
    assert not resident.plan.streamed
    sample = Sample.generation(_prompts()[0][0], _prompts()[2][0])
    ours, theirs = (simulate(model, [sample], [Variant(0.5, "magnitude")])[0] for model in (resident, streamed))
    torch.testing.assert_close(ours.variants[0].log_probs, theirs.variants[0].log_probs, **CLOSE)
    quantised = _load(path, density=1.0, quantize="int8")
    with pytest.raises(UsageError, match="always_stream"):
        simulate(quantised, [sample], [Variant(0.5, "magnitude")])


def test_progress_counts_the_layers_of_all_passes(checkpoints):
    model, seen = _load(checkpoints("llama2")), []
    sample = Sample.generation(_prompts()[0][0], _prompts()[2][0])
    for variant in (HALF, Variant(0.5, allocation="global")):
        simulate(model, [sample], [variant], progress=lambda done, layers: seen.append((done, layers)))
    assert seen == [(1, 3), (2, 3), (3, 3), *((done, 6) for done in range(1, 7))]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_converted_checkpoints_are_simulated_in_their_precision(checkpoints, tmp_path: Path, precision: str):
    """Quantised neurons are closed under gathering: the same numbers, masked or gathered."""
    convert(checkpoints("llama2"), tmp_path / precision, precision)
    model = _load(tmp_path / precision)
    sample, log_probs = _generated(model, _prompts()[0])
    found = simulate(model, [sample], [HALF, Variant(0.5, "magnitude"), Variant(0.5, "output_aware")])[0]
    # A token by itself passes int4 as 15 bits, all of them at once as floats.
    close = CLOSE if precision == "int8" else {"atol": 3e-3, "rtol": 1e-3}
    torch.testing.assert_close(found.variants[0].log_probs, log_probs, **close)
