"""State between prompts: nothing of one prompt reaches another, however the first one ended."""

import threading
import warnings

import pytest
import torch
from tiny_models import VOCAB
from transformers import GenerationConfig, StoppingCriteria

from griffin_offload import DoesNotFit, GriffinError, GriffinModel, UsageError
from griffin_offload.blocks.base import hooks_on
from griffin_offload.devices.registry import choose_device
from griffin_offload.engine.model_interface import Guard


def _model(checkpoints, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "100MB", "density": 0.5, "ctx_size": 96}
    return GriffinModel.from_pretrained(checkpoints("llama3"), **defaults | options)


def _ids(seed: int = 0, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


def _greedy(model: GriffinModel, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=8, do_sample=False, **kwargs)


def test_a_forward_that_leaves_layers_out_chooses_nothing(checkpoints):
    """The compact parameters of the others would be what memory held."""
    model = _model(checkpoints)
    with pytest.raises(UsageError, match="assistant_early_exit"):
        _greedy(model, _ids(), assistant_early_exit=1)
    layers, model.model.config.num_hidden_layers = model.model.config.num_hidden_layers, 1
    with pytest.raises(GriffinError, match="left out 2 layers"):
        model.model(_ids())
    model.model.config.num_hidden_layers = layers
    expected = _greedy(_model(checkpoints), _ids())
    assert torch.equal(_greedy(model, _ids()), expected)


def test_a_second_generate_at_the_same_time_is_refused(checkpoints):
    model = _model(checkpoints)
    errors: list[str] = []

    class Nested(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            try:
                _greedy(model, _ids(1))
            except GriffinError as error:
                errors.append(str(error))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    expected = _greedy(_model(checkpoints), _ids())
    assert torch.equal(_greedy(model, _ids(), stopping_criteria=[Nested()]), expected)
    assert errors
    assert all(error.startswith("this model is generating already") for error in errors)


def test_an_interrupted_prompt_leaves_no_neurons_to_decode_with(checkpoints):
    model, fresh = _model(checkpoints), _model(checkpoints)
    cache = model.model(_ids(), use_cache=True).past_key_values
    threads = set(threading.enumerate())

    def interrupt(done: int, layers: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    model.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        _greedy(model, _ids(1))
    model.progress = None
    assert model.last_report is None
    assert set(model.selected) == {0, 1}  # of the interrupted prompt; the one before it left nothing
    expected = fresh.model(_ids()[:, :1], past_key_values=fresh.model(_ids(), use_cache=True).past_key_values)
    assert torch.equal(model.model(_ids()[:, :1], past_key_values=cache).logits, expected.logits)  # its own, anew
    assert torch.equal(_greedy(model, _ids()), _greedy(_model(checkpoints), _ids()))
    assert not set(threading.enumerate()) - threads


def test_hooks_of_a_pass_that_never_ended_are_taken_off(checkpoints):
    """As after a Ctrl-C in the middle of the clean-up."""
    from griffin_offload.engine.prefill import StreamedPass

    model = _model(checkpoints)
    stale = StreamedPass(model.engine.loaded.layers, torch.ones(1, 24), progress=None)
    stale.begin()
    stale.feed.stream.__exit__(None, None, None)
    assert torch.equal(_greedy(model, _ids()), _greedy(_model(checkpoints), _ids()))
    hooks = [h for m in model.model.modules() for h in hooks_on(m)]
    assert [type(hook) for hook in hooks] == [Guard]


def test_a_bare_forward_is_checked_and_leaves_the_next_report_alone(checkpoints):
    model = _model(checkpoints, max_gpu_mem="700kB", prompt_tokens=24)
    with pytest.raises(DoesNotFit):
        model.model(_ids(tokens=90).repeat(16, 1))
    model.model(_ids())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _greedy(model, _ids())
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


def test_a_cache_of_the_whole_context_is_counted_before_prefill(checkpoints):
    """Ours and a static one are allocated while the slots are still there; a dynamic one grows when they are gone."""
    roomy = _model(checkpoints, prompt_tokens=8)
    ids = _ids(tokens=8)
    peaks = []
    roomy.generate(ids, max_new_tokens=88, do_sample=False)  # a step that is recorded stays
    for cache in ({}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}):
        roomy.generate(ids, max_new_tokens=88, do_sample=False, **cache)
        peaks.append(roomy.last_report.peak_device_bytes)
        assert peaks[-1] <= roomy.plan.peak_bytes
    assert peaks[0] >= peaks[1] > peaks[2]  # transformers knows that the last token is never cached
    tight = _model(checkpoints, max_gpu_mem=roomy.plan.peak_bytes, prompt_tokens=8)
    tight.generate(ids, max_new_tokens=88, do_sample=False)
    with pytest.raises(DoesNotFit):
        tight.generate(ids.repeat(1, 1), max_new_tokens=88, output_scores=True, return_dict_in_generate=True)


def test_limits_may_be_named_and_empty(checkpoints):
    model = _model(checkpoints)
    given = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert model.generate(_ids(), generation_config=given).shape[1] == 29
    assert given.prefill_chunk_size is None
    assert model.generate(_ids(), max_new_tokens=None, max_length=30, do_sample=False).shape[1] == 30
    assert model.generate(_ids(), prefill_chunk_size=None, max_new_tokens=2, do_sample=False).shape[1] == 26
    logits, *_ = model.model(_ids(), return_dict=False)
    assert logits.shape == (1, 24, VOCAB)
    with pytest.raises(UsageError, match="batch, tokens"):
        model.generate(_ids()[0])


def test_closing_gives_everything_back(checkpoints):
    with _model(checkpoints) as model:
        stock = model.model
        _greedy(model, _ids())
    assert all(tensor.is_meta for tensor in (*stock.parameters(), *stock.buffers()))
    for call in (_greedy, lambda *_: model.new_context(), lambda _, ids: stock(ids), lambda _, ids: stock.model(ids)):
        with pytest.raises(GriffinError, match="this model is closed"):
            call(model, _ids())
    model.close()


def test_a_cuda_device_has_its_index(monkeypatch: pytest.MonkeyPatch):
    """torch's own memory settings refuse one without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert choose_device("auto").torch_device == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device cuda is not available"):
        choose_device("cuda")
