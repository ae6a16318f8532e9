"""GGUF files of mixtures of experts: the model that was written, what transformers reads, streamed and converted."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from loaded_model import ids
from marks import mostly_slow
from support.gguf_files import write_gguf
from tiny_models import LAYERS, MIXTURES, VOCAB
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.engine.build import build
from griffin_offload.engine.convert import convert
from griffin_offload.errors import CheckpointError

NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4", "qwen3_5_moe", "minimax_m2"]
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 8}
_PROMPT = ids(tokens=20) % (VOCAB - 8)


# As published: a layer with experts, then one without; every fourth has no positions.
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_OWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama4": (
        hf.Llama4TextConfig,
        {"intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 8, "num_hidden_layers": 4}
        | {"interleave_moe_layer_step": 2, "max_position_embeddings": 512, "rope_parameters": _LLAMA3},
    ),
    "qwen3_5_moe": (
        hf.Qwen3_5MoeTextConfig,
        {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 8, "num_hidden_layers": 4}
        | {"num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 6}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "max_position_embeddings": 512},
    ),
}


def model_of(name: str, **more: Any) -> Any:
    """As its files can say it: every other layer of gpt-oss sees a window, the others have none."""
    if name in _OWN:
        config_class, settings = _OWN[name]
        torch.manual_seed(0)
        config = config_class(**{**_SIZES, **settings, **more})
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():  # experts of some are zeros otherwise
            torch.nn.init.normal_(parameter.data, std=0.1)
        return model
    windows = {"gpt_oss": {"layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(LAYERS)]}}
    settings = MIXTURES[name].build().config.to_dict() | windows.get(name, {})
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**settings), dtype=torch.float32).eval()
    model.load_state_dict(MIXTURES[name].build().state_dict())
    return model


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(_PROMPT).logits[0].float()


def _answer(path: Path, **options: Any) -> tuple[Tensor, Tensor]:
    sizes = {"max_gpu_mem": "60MB", "ctx_size": 64}
    with GriffinModel.from_pretrained(path, device="cpu", **sizes, **options) as model:
        found = model.generate(_PROMPT, attention_mask=torch.ones_like(_PROMPT), **GREEDY)
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        assert model.resident_bytes == model.plan.resident_bytes
        store = model.engine.loaded.layers.expert_store
        assert store is None or store.unmapped_bytes == 0
        return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_one_that_was_written(name: str, tmp_path: Path):
    model = model_of(name)
    path = write_gguf(model, tmp_path / "tiny.gguf")
    torch.testing.assert_close(logits_of(build(open_checkpoint(path))), logits_of(model), rtol=1e-5, atol=2e-5)
    expected = model.generate(_PROMPT, attention_mask=torch.ones_like(_PROMPT), **GREEDY)
    for density in (0.25, 1.0):
        sequences, logits = _answer(path, quantize="none", density=density)
        assert torch.equal(sequences, expected.sequences)
        theirs = torch.stack(expected.logits)
        assert (logits - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("name", "kind"),
    mostly_slow([*(("qwen3_moe", kind) for kind in ("Q8_0", "MXFP4", "Q4_0", "BF16")), ("qwen2_moe", "BF16")], 4),
)
def test_blocks_are_what_transformers_makes_of_them(name: str, kind: str, tmp_path: Path):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    config = model_of(name).config
    for key, size in sizes.items():
        if hasattr(config, key):
            setattr(config, key, size)
    torch.manual_seed(0)
    path = write_gguf(hf.AutoModelForCausalLM.from_config(config).eval(), tmp_path / "tiny.gguf", kind)
    # transformers does not read the neurons of an expert out of the file: the config is the one that was written.
    settings = {"gguf_file": path.name, "dtype": torch.float32, "quantization_config": hf.GgufConfig(dequantize=True)}
    expected = hf.AutoModelForCausalLM.from_pretrained(path.parent, config=config, **settings).eval()
    if kind == "BF16":  # such files are loaded as what they are, with norms and the shared expert's gate
        for parameter in expected.parameters():
            parameter.data = parameter.data.bfloat16().float()
    checkpoint = open_checkpoint(path).in_precision(torch.float32)
    torch.testing.assert_close(logits_of(build(checkpoint).float()), logits_of(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "precision"),
    mostly_slow(
        [*(("gpt_oss", precision) for precision in ("none", "int8", "int4")), ("mixtral", "int4")]
        + [(name, "int4") for name in ("llama4", "qwen3_5_moe", "minimax_m2")],
        3,
    ),
)
def test_fetched_resident_and_converted(name: str, precision: str, tmp_path: Path):
    path = write_gguf(model_of(name), tmp_path / "tiny.gguf", "Q8_0")
    expected = _answer(path, quantize=precision, density=1.0)[1]
    assert torch.equal(_answer(path, quantize=precision, density=0.25)[1], expected)
    convert(path, tmp_path / "copy", precision)
    assert torch.equal(_answer(tmp_path / "copy", quantize=precision, density=0.5)[1], expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"interleave_moe_layer_step": 1, "num_hidden_layers": 5, "num_experts_per_tok": 2},
        {"num_local_experts": 128, "use_qk_norm": False},  # by the number of experts alone files tell
    ],
)
def test_llama_4_is_of_the_config_that_was_written(settings: dict[str, Any], tmp_path: Path):
    model = model_of("llama4", **settings)
    found = open_checkpoint(write_gguf(model, tmp_path / "tiny.gguf")).config
    ours, theirs = found.to_dict(), model.config.to_dict()
    aside = {"rope_parameters", "architectures", "dtype", "bos_token_id", "eos_token_id", "initializer_range"}
    assert ours.pop("rms_norm_eps") == pytest.approx(theirs.pop("rms_norm_eps"))
    assert {key: ours[key] for key in theirs if key not in aside} == {
        key: value for key, value in theirs.items() if key not in aside
    }


def test_a_dense_llama_4_has_positions_everywhere(tmp_path: Path):
    """As small ones of its makers: no experts, no chunks, no layer without positions."""
    layers = {
        "num_hidden_layers": 4,
        "moe_layers": [],
        "no_rope_layers": [1] * 4,
        "layer_types": ["full_attention"] * 4,
    }
    model = model_of("llama4", **layers)
    more = {"llama4.interleave_moe_layer_step": 0, "llama4.attention.sliding_window": 0}
    path = write_gguf(model, tmp_path / "tiny.gguf", more=more, drop=("llama4.expert_count",))
    found = build(open_checkpoint(path))
    assert found.config.no_rope_layers == [1] * 4
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=1e-5, atol=2e-5)


def test_a_matrix_of_experts_that_is_not_there(tmp_path: Path):
    import gguf

    path = write_gguf(model_of("qwen3_moe"), tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(path, "r+")
    place = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up_exps.weight")
    name = place.field.parts[1]
    name[:] = memoryview(b"blk.1.ffn_xx_exps.weight")
    del reader
    with pytest.raises(Exception, match=r"ffn_xx_exps|ffn_up_exps") as found:
        _answer(path, density=0.5)
    assert isinstance(found.value, CheckpointError) or "no place for" in str(found.value)
