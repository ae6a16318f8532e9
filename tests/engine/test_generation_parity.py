"""What transformers' generate promises, asked of a GriffinModel at density 1: the tokens, scores and objects of the
stock model, strategy by strategy, on architectures of several kinds. What is refused is refused by name; nothing else
may fail."""

import functools
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import VOCAB
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from griffin_offload import GriffinModel, UsageError
from griffin_offload.transformers_api import CACHE

ARCHITECTURES = (
    "llama3", "mistral", "gemma3", "gpt2", "opt", "falcon_alibi", "cohere2", "phi3", "bloom", "qwen2",
    "glm4", "starcoder2",
)  # fmt: skip


class _Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class _After(StoppingCriteria):
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.tokens)


class _Even(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


def _ids(tokens: int = 20, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _padded() -> dict[str, torch.Tensor]:
    ids, mask = _ids(batch=2), torch.ones(2, 20, dtype=torch.long)
    ids[1, :7], mask[1, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _streamed(model: Any) -> Any:
    streamer = _Kept()
    model.generate(_ids(), streamer=streamer, max_new_tokens=8, do_sample=False)
    return torch.tensor(streamer.tokens)


def _everything(model: Any, **options: Any) -> Any:
    """Tokens, scores, logits and hidden states, as transformers returns them."""
    return model.generate(
        _ids(), max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True,
        output_logits=True, output_hidden_states=True, **options,
    )  # fmt: skip


def _goes_on(model: Any, **options: Any) -> Any:
    """A second answer from the first one's cache: the whole sequence, or what is new alone with a mask over all."""
    first = model.generate(_ids(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **options)
    whole, cache = torch.cat([first.sequences, _ids(6, seed=1)], 1), first[CACHE]
    given = whole[:, cache.get_seq_length() :] if options.get("use_cache") else whole
    more = model.generate(
        given, attention_mask=torch.ones_like(whole), max_new_tokens=5, do_sample=False, **{CACHE: cache}
    )
    return torch.cat([first.sequences, more], 1)


def _assisted(model: Any, **options: Any) -> Any:
    """By another model of the same vocabulary, a copy of one that is given."""
    assistant = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    with torch.no_grad():
        next(iter(assistant.parameters())).mul_(1.05)  # some drafts are wrong
    return model.generate(_ids(), assistant_model=assistant, max_new_tokens=10, do_sample=False, **options)


def _own_loop(model: Any, input_ids: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
    """A decoding method of the caller's: the second likeliest token each time."""
    for _step in range(generation_config.max_new_tokens):
        second = model(input_ids).logits[:, -1].topk(2).indices[:, 1:]
        input_ids = torch.cat([input_ids, second], 1)
    return input_ids


def _config_is_left_alone(model: Any) -> Any:
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, repetition_penalty=1.2)
    before = config.to_dict()
    output = model.generate(_ids(), generation_config=config)
    assert config.to_dict() == before
    return output


def _tokenizer(model: Any) -> Any:
    return AutoTokenizer.from_pretrained(model.name_or_path)


UNABLE = {("static cache", "falcon")}
"""What transformers cannot do itself."""
Check = Callable[[Any], Any]
_OF_CACHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    "beams sampled": {"num_beams": 2, "do_sample": True},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 1.5},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "prompt_lookup sampled": {"prompt_lookup_num_tokens": 2, "do_sample": True},
    "own decoding method": {"custom_generate": _own_loop},
}
_OF_LOGITS: dict[str, dict[str, Any]] = {
    "sample": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min_p and typical_p": {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
    "epsilon and eta": {"do_sample": True, "epsilon_cutoff": 0.001, "eta_cutoff": 0.002},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7]]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 160))},
    "sequence_bias": {"sequence_bias": [[[9], 5.0]]},
    "forced_eos": {"forced_eos_token_id": 2, "eos_token_id": 2},
    "ends early": {"eos_token_id": list(range(3, 200))},
    "ends not before": {"eos_token_id": list(range(3, 200)), "min_new_tokens": 5},
    "max_length": {"max_new_tokens": None, "max_length": 27},
    "stopping_criteria": {"stopping_criteria": [_After(23)]},
    "logits_processor": {"logits_processor": LogitsProcessorList([_Even()])},
    "prefix_allowed": {"prefix_allowed_tokens_fn": lambda batch, ids: [4, 5, 6 + len(ids)]},
    "renormalised": {"num_beams": 2, "renormalize_logits": True},
    "forced_bos": {"forced_bos_token_id": 7},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 200))},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 9},
    "encoder penalties": {"encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 3},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=2.0)},
    "remove_invalid_values": {"remove_invalid_values": True},
    "max_time": {"max_time": 600.0},
    "top_h": {"do_sample": True, "top_h": 0.5},
    "an end given twice": {"eos_token_id": [5, 5, 9], "min_length": 23},
    "early_stopping never": {"num_beams": 3, "early_stopping": "never", "eos_token_id": list(range(3, 60))},
    "beams with n-grams": {"num_beams": 3, "no_repeat_ngram_size": 2, "eos_token_id": 9},
}
"""What works on logits or counts tokens, and does not know of which model."""
CHECKS: dict[str, Check] = {
    name: (
        lambda model, settings=settings: model.generate(
            _ids(), **({"max_new_tokens": 8, "do_sample": False} | settings)
        )
    )
    for name, settings in (_OF_CACHES | _OF_LOGITS).items()
}
CHECKS |= {
    "padded batch": lambda model: model.generate(**_padded(), max_new_tokens=8, do_sample=False),
    "padded beams": lambda model: model.generate(**_padded(), max_new_tokens=6, num_beams=2),
    "one token": lambda model: model.generate(_ids(1), max_new_tokens=8, do_sample=False),
    "embeddings": lambda model: model.generate(
        inputs_embeds=model.get_input_embeddings()(_ids()), max_new_tokens=8, do_sample=False
    ),
    "ids by name": lambda model: model.generate(input_ids=_ids(), max_new_tokens=8, do_sample=False),
    "streamer": _streamed,
    "goes on": _goes_on,
    "goes on with new tokens": lambda model: _goes_on(model, use_cache=True),
    "assisted": _assisted,
    "assisted, everything": lambda model: _assisted(model, return_dict_in_generate=True, output_scores=True),
    "padded samples": lambda model: model.generate(
        **_padded(), max_new_tokens=6, do_sample=True, num_return_sequences=2
    ),
    "embeddings and ids": lambda model: model.generate(
        input_ids=_ids(), inputs_embeds=model.get_input_embeddings()(_ids()), max_new_tokens=6, do_sample=False
    ),
    "stop strings": lambda model: model.generate(
        _ids(), stop_strings=["the", "a"], tokenizer=_tokenizer(model), max_new_tokens=30, do_sample=False
    ),
    "everything": _everything,
    "everything of beams": lambda model: _everything(model, num_beams=2),
    "config": _config_is_left_alone,
    "forward": lambda model: model(_ids(batch=2), use_cache=True).logits,
}  # fmt: skip
REFUSED: dict[str, tuple[Check, str]] = {
    name: (lambda model, settings=settings: model.generate(_ids(), **({"max_new_tokens": 4} | settings)), why)
    for name, settings, why in (
        ("contrastive search", {"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha.*use num_beams or do_sample"),
        ("DoLa", {"dola_layers": "high"}, "dola_layers.*use num_beams or do_sample"),
        ("diverse beams", {"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups.*use num_beams or do_sample"),
        ("constrained beams", {"num_beams": 2, "force_words_ids": [[5]]}, "force_words_ids.*use num_beams"),
        ("code of the hub", {"custom_generate": "me/mine"}, "custom_generate.*give a function, or exact=True"),
        ("chunked prompt", {"prefill_chunk_size": 4}, "prefill_chunk_size.*ff_chunk_tokens"),
        ("early exit", {"assistant_early_exit": 1}, "assistant_early_exit.*exact=True"),
        ("compile config", {"compile_config": CompileConfig()}, "compile_config.*cuda_graphs"),
        ("constraints", {"constraints": [object()]}, "constraints.*use num_beams"),
        ("token healing", {"token_healing": True}, "token_healing.*heal_tokens"),
        ("no cache", {"use_cache": False}, "use_cache=False.*KV cache"),
        ("quantised cache", {"cache_implementation": "quantized"}, "kv_bits=8"),
        ("offloaded cache", {"cache_implementation": "offloaded"}, "kv_bits=8"),
        ("paged cache", {"cache_implementation": "paged"}, "threads wait"),
        ("attentions", {"output_attentions": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
        ("negative prompt", {"negative_prompt_ids": torch.tensor([[4]]), "guidance_scale": 1.5}, "generate twice"),
        ("several processes", {"synced_gpus": True}, "one process"),
        ("config of another kind", {"generation_config": {"max_new_tokens": 3}}, "GenerationConfig"),
    )
}  # fmt: skip


Both = tuple[Any, GriffinModel]
"""The stock model, and ours with all its neurons."""


@pytest.fixture(scope="module")
def pairs(checkpoints) -> Callable[[str], Both]:
    """By architecture. No fixture with a parameter: those are made anew whenever the next test has another one."""

    @functools.cache
    def pair(name: str) -> Both:
        path = checkpoints(name)
        options = {"device": "cpu", "max_gpu_mem": "100MB", "density": 1.0, "ctx_size": 64, "batch_size": 4}
        ours = GriffinModel.from_pretrained(path, quantize="none", **options)
        return AutoModelForCausalLM.from_pretrained(path), ours

    return pair


@pytest.fixture
def both(pairs: Callable[[str], Both], architecture: str) -> Both:
    return pairs(architecture)


def _assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_same(one, other)
    elif hasattr(expected, "keys"):
        assert type(found) is type(expected)
        assert found.keys() == expected.keys()
        for name in set(expected.keys()) - {"past_key_values"}:
            _assert_same(found[name], expected[name])


def _pairs() -> Iterator[Any]:
    """One architecture with everything; the others in turn, with what has to do with caches and positions a twelfth of
    them each."""
    first, *others = ARCHITECTURES
    for at, name in enumerate(CHECKS):
        yield pytest.param(first, name)
        if name not in _OF_LOGITS:
            for place, other in enumerate(others):
                if (at + place) % 12 == 0:
                    yield pytest.param(other, name)


@pytest.mark.parametrize(("architecture", "name"), list(_pairs()))
def test_it_gives_what_transformers_gives(both: Both, name: str):
    stock, model = both
    torch.manual_seed(0)
    try:
        expected = CHECKS[name](stock)
    except RuntimeError as error:  # Falcon's ALiBi is made for the prompt, a static cache is longer
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            CHECKS[name](model)
        assert (name, model.config.model_type) in UNABLE
        return
    torch.manual_seed(0)
    _assert_same(CHECKS[name](model), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_possible_is_refused_by_name(pairs: Callable[[str], Both], name: str):
    call, why = REFUSED[name]
    with pytest.raises(UsageError, match=why):
        call(pairs("llama3")[1])


def test_an_iterator_streams_from_another_thread(pairs: Callable[[str], Both]):
    _, model = pairs("llama3")
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60)
    options = {"streamer": streamer, "max_new_tokens": 8, "do_sample": False}
    thread = threading.Thread(target=model.generate, args=(_ids(),), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    tokens = model.generate(_ids(), max_new_tokens=8, do_sample=False)[0, 20:]
    assert text == model.tokenizer.decode(tokens)
