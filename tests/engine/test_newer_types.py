"""Types whose own classes do otherwise than all others', of which older releases of transformers have none: norms of
single experts, keys that are chosen, layers that pass several times."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from alive_bytes import AliveBytes
from tiny_models import VOCAB, randomised

from griffin_offload import GriffinModel
from griffin_offload.errors import UnsupportedModel

LAYERS, PROMPT, NEW = 4, 24, 12
_SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": LAYERS, "max_position_embeddings": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 48},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
_ERGO: dict[str, Any] = {
    **{"num_experts": 8, "first_dense_intermediate_size": 96, "shared_intermediate_size": 32},
    "global_attention_every_n_layers": 2,
    "global_attention_scale": 1.5,
}
# The second and third layer attend to the same keys, of which an indexer chooses some for each token.
_KOLIBRI: dict[str, Any] = {
    "layer_types": ["sliding_attention", *["indexed_attention"] * 3],
    **{"num_experts": 8, "shared_expert_intermediate_size": 48},
    **{"mlp_only_layers": [0], "mlp_only_intermediate_size": 96},
    **{"index_layers": [1, 3], "kv_source_layers": [0, 1, 1, 3], "index_num_heads": 2},
    **{"index_topk": 4, "index_num_local_tokens": 4, "index_num_sink_tokens": 2},
    **{"index_pool_size": 16, "index_compression": 4},
}
_LOOP: dict[str, Any] = {
    **{"unpadded_vocab_size": VOCAB, "n_routed_experts": 4, "n_layers_per_attn_res_block": 1},
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "conv_kernel_size": 4},
    **{"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2},
}
_SPARSE: dict[str, Any] = {
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "intermediate_size": 96},
    **{"num_key_value_heads": 4, "index_topk": 6, "index_n_heads": 4, "index_head_dim": 32, "n_shared_experts": 1},
}
_MIXTURES = {"ErgoConfig": _ERGO, "Kolibri1_1Config": _KOLIBRI}


def _tiny(name: str, sizes: dict[str, Any], directory: Path) -> Path:
    """A checkpoint of the config class `name`; skipped where the installed transformers has none."""
    kind = getattr(hf, name, None)
    if kind is None:
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    randomised(kind(**{**_SIZES, **sizes}), 0).save_pretrained(directory)
    return directory


def _load(directory: Path, **options: Any) -> GriffinModel:
    sizes = {"max_gpu_mem": "80MB", "ctx_size": 64, "device": "cpu", "quantize": "none"}
    return GriffinModel.from_pretrained(directory, **{**sizes, **options})


def _greedy(batch: int = 1) -> dict[str, Any]:
    """Prompts padded on the left, all but the first one."""
    ids = torch.randint(5, VOCAB - 8, (batch, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1:, :7] = 0
    settings = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    return {"inputs": ids.masked_fill(mask == 0, 0), "attention_mask": mask, **settings}


def _away(found: Any, expected: Any) -> float:
    """Largest difference of logits, of the largest logit."""
    ours, theirs = torch.stack(list(found)), torch.stack(list(expected))
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", _MIXTURES)
def test_answers_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    directory = _tiny(name, _MIXTURES[name], tmp_path)
    dense: Any = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for batch, options in ((1, {"density": 1.0, "always_stream": True}), (2, {"density": 0.25})):
        asked = _greedy(batch)
        expected = dense.generate(**asked)
        with _load(directory, batch_size=batch, **options) as model:
            found = model.generate(**asked)
            assert torch.equal(found.sequences, expected.sequences)
            assert _away(found.logits, expected.logits) < 1e-5
            assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


def test_experts_are_ranked_by_what_their_own_norms_leave(tmp_path: Path) -> None:
    """An expert of Ergo that most tokens are sent to, and whose norm leaves nothing, is not kept."""
    directory = _tiny("ErgoConfig", _ERGO, tmp_path)
    with _load(directory, density=0.25) as model:
        model.generate(**_greedy())
        kept: list[int] = model.selected[1].tolist()
    dense: Any = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    dense.model.layers[1].mlp.experts.post_expert_norm.weight.data[kept[0]] = 1e-6
    dense.save_pretrained(directory)
    with _load(directory, density=0.25) as model:
        model.generate(**_greedy())
        assert kept[0] not in model.selected[1].tolist()


def test_layers_that_ask_for_a_type_have_it_of_codes_too(tmp_path: Path) -> None:
    directory = _tiny("ErgoConfig", _ERGO, tmp_path)
    dense: Any = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = dense.generate(**_greedy())
    with _load(directory, quantize="int8") as model:
        found = model.generate(**_greedy())
    assert _away(found.logits[:1], expected.logits[:1]) < 0.15  # of whole numbers it would be all of them


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_16_bits_pass_residuals_and_a_head_of_float32(tmp_path: Path, dtype: str) -> None:
    """Ergo's, whose head has more numbers than all of its layers: no copy of it is made, which no plan has."""
    directory = _tiny("ErgoConfig", {**_ERGO, "vocab_size": 60_000}, tmp_path / "floats")
    exact: Any = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    exact.save_pretrained(tmp_path / "rounded")
    dense: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype=getattr(torch, dtype)).eval()
    asked = {**_greedy(), "max_new_tokens": 1}
    with _load(tmp_path / "rounded", dtype=dtype) as model:
        found = model.generate(**asked)
        head, hidden = model.model.lm_head, torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), AliveBytes() as alive:
            logits = head(hidden)
        products = hidden.to(head.weight.dtype).double() @ head.weight.double().T
        assert _away([logits], [products]) < 1e-6
        assert alive.peak < head.weight.nbytes + logits.nbytes + 2**20  # views of the matrix count, too
    assert found.logits[0].dtype == torch.float32
    assert _away(found.logits, dense.generate(**asked).logits) < (0.02 if dtype == "bfloat16" else 1e-5)


def test_heads_that_choose_keys_are_given_hidden_states_in_floats(tmp_path: Path) -> None:
    """By what transformers' indexers ask their weights for."""
    directory = _tiny("DeepseekV32Config", _SPARSE, tmp_path)
    with _load(directory, quantize="int8") as model:
        given = list[torch.dtype]()
        for layer in model.model.model.layers:
            own = layer.self_attn.indexer.weights_proj
            own.register_forward_pre_hook(lambda _, args: given.append(args[0].dtype))
        model.generate(**_greedy())
    assert set(given) == {torch.float32}


def test_layers_that_pass_several_times_are_refused(tmp_path: Path) -> None:
    directory = _tiny("Inkling2LoopTextConfig", _LOOP, tmp_path)
    with pytest.raises(UnsupportedModel, match=r"^\w+ passes layer 1 several times a token: once is streamed here$"):
        _load(directory)
