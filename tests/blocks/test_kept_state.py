"""Models whose past is not where decoding needs it are refused by the true reason, before a weight is read."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

from griffin_offload.blocks.layouts import build_on_meta, find_feed_forwards
from griffin_offload.blocks.model_shape import model_shape
from griffin_offload.engine.build import build_unfilled
from griffin_offload.errors import UnsupportedModel
from griffin_offload.kv_cache.workload import width_of

_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64}
_HEADS: dict[str, Any] = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
_GRIFFIN = {"attention_window_size": 8, "block_types": ["recurrent", "attention"], "head_dim": 8}
_REASONS = {
    "no KV cache at all": (hf.OpenAIGPTConfig(n_embd=32, n_head=4, n_layer=2, vocab_size=64), "has no KV cache: decod"),
    "a past that is no KV cache": (
        hf.RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64),
        "RwkvForCausalLM keeps its past in state, not in a KV cache",
    ),
}


@pytest.mark.parametrize("name", list(_REASONS))
def test_the_true_reason_is_named(name: str):
    config, words = _REASONS[name]
    with pytest.raises(UnsupportedModel, match=words):
        model_shape(build_on_meta(config, torch.float32))


def test_layers_without_a_feed_forward_and_those_of_another_one():
    """Attention or a recurrence alone has no neurons; what takes no KV cache is a feed-forward that nobody knows."""
    kinds = ["mamba", "mlp", "attention"]
    config = hf.NemotronHConfig(**_HEADS, layers_block_type=kinds, mamba_num_heads=4, mamba_head_dim=8, n_groups=2)
    model = build_on_meta(config, torch.float32)
    _, blocks = find_feed_forwards(model, 3)
    assert [block.neurons for block in blocks] == [0, 64, 0]
    shape = model_shape(model)
    assert shape.with_neurons == (1,)
    assert [layer.ff_bytes for layer in shape.layers] == [0, 2 * 32 * 64 * 4, 0]
    for layer, sizes in zip(model.model.layers, shape.layers, strict=True):
        every = sum(parameter.nbytes for parameter in layer.parameters())
        assert sizes.attention_bytes + sizes.norm_bytes + sizes.ff_bytes == every
    mixer = model.model.layers[1].mixer
    mixer.widen = mixer.up_proj
    del mixer.up_proj
    with pytest.raises(UnsupportedModel, match=r"layer 1 has 0 FF blocks .* mixer\.widen"):
        find_feed_forwards(model, 3)


def test_layers_of_different_heads_are_counted_one_by_one():
    config = hf.Gemma4TextConfig(
        **_HEADS,
        head_dim=8,
        global_head_dim=16,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    )
    shape = model_shape(build_on_meta(config, torch.float32))
    assert [width_of(shape, layer) for layer in shape.layers] == [2 * 2 * 8, 2 * 2 * 16]
    assert [layer.window for layer in shape.layers] == [16, None]
    assert (shape.kv_width, shape.attention_width) == (64, 4 * 16)


_LATENT: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "sizes", "width"),
    [
        (hf.FalconConfig, {"multi_query": True, "alibi": False}, 2 * 8),  # keys and values of one head
        (hf.DeepseekV3Config, {**_LATENT, "v_head_dim": 16, "first_k_dense_replace": 2}, 16 + 8),
    ],
    ids=["falcon", "deepseek_v3"],
)
@pytest.mark.parametrize("rope", ["dynamic", "default"])
def test_positions_that_change_with_the_length_change_nothing_of_what_is_kept(kind: Any, sizes: Any, width: int, rope):
    """Angles that grow with the text cannot be computed before it is there; the KV entries are as large as ever."""
    turned = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0}
    config = kind(**{**_SIZES, "num_attention_heads": 4, **sizes}, rope_parameters=turned)
    model = build_on_meta(config, torch.float32)
    shape = model_shape(model)
    assert [width_of(shape, layer) for layer in shape.layers] == [width, width]
    assert {part.rope_type for part in model.modules() if hasattr(part, "rope_type")} == {rope}


def test_the_text_decoder_is_found_beside_a_tower_of_as_many_layers():
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4}
    text = {**_HEADS, "head_dim": 8}
    config = hf.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    model = build_on_meta(config, torch.float32)
    decoder, _ = find_feed_forwards(model, 2)
    assert {type(layer).__name__ for layer in decoder} == {"Gemma3DecoderLayer"}


class _Operators(TorchDispatchMode):
    """The names of those that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config", [hf.LlamaConfig(**_HEADS), hf.GPTNeoXConfig(**_SIZES, num_attention_heads=4), hf.FalconH1Config(**_HEADS)]
)
@pytest.mark.parametrize("build", [build_on_meta, build_unfilled])
def test_no_random_numbers_are_made_for_weights_that_come_from_files(build, config: hf.PreTrainedConfig):
    """torch works out their shapes on the meta device in Python: seconds for a large model."""
    state = torch.get_rng_state()
    with _Operators() as operators:
        model = build(config, torch.bfloat16)
    assert not {"normal_", "uniform_", "random_"} & set(operators.seen)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
