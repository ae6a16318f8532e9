"""Every causal language model that transformers knows, in miniature: does it work, or by which words is it refused?

    python tests/robustness/architecture_sweep.py            # all of them, a table and the counts
    python tests/robustness/architecture_sweep.py lfm2 phi3  # some

Not part of the test suite: it takes minutes. "works" means that greedy tokens at density 1, streamed, are those of
dense transformers. Each model has a process of its own (forked, so that nothing is imported twice): one that dies is a
line of the table, too.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from griffin_offload import GriffinModel
from griffin_offload.errors import GriffinError

_SECONDS = 120
_PROMPT, _NEW = 24, 12
_VOCAB = 320

# What most configs call their sizes; each takes those that it knows.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab"), _VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "dim_feedforward"), 128),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_intermediate_size"), 48),
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "n_groups": 1,
    "ssm_state_size": 16,
    "lru_width": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
_OF_TYPE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "axk1"), _GROUPS),
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8},
    "codegen": {"rotary_dim": 4},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 4},
    "falcon": {"new_decoder_architecture": False},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "opt": {"word_embed_proj_dim": 64},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
}


def tiny_config(kind: str) -> Any:
    """A config of `kind` with the sizes above, as far as it knows them."""
    config_class = CONFIG_MAPPING[kind]
    sizes = {**_SIZES, **_OF_TYPE.get(kind, {})}
    known = set(inspect.signature(config_class).parameters) | set(getattr(config_class, "attribute_map", {}))
    if not known - {"args", "kwargs", "self"}:
        known = set(sizes)
    if "kv_lora_rank" in known:  # keys and values of every head from one vector
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    config = config_class(**{name: value for name, value in sizes.items() if name in known})
    for name, nested in list(vars(config).items()):  # towers of multimodal models, and the text they hold
        if isinstance(nested, hf.PreTrainedConfig) and nested.model_type in CONFIG_MAPPING:
            with contextlib.suppress(Exception):
                setattr(config, name, tiny_config(nested.model_type))
    return config


def outcome(kind: str) -> tuple[str, str]:
    """("works" | "differs" | "refused" | "traceback" | "not buildable", what was said)."""
    try:
        torch.manual_seed(0)
        config = tiny_config(kind)
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        model.generation_config.eos_token_id = None
        directory = tempfile.mkdtemp()
        model.save_pretrained(directory)
        model = hf.AutoModelForCausalLM.from_pretrained(directory).eval()
        ids = torch.randint(5, _VOCAB - 20, (1, _PROMPT))
        greedy = {"max_new_tokens": _NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(ids, **greedy)
    except Exception as error:
        return "not buildable", _line(error)
    try:
        options = {"device": "cpu", "max_gpu_mem": "1GB", "ctx_size": _PROMPT + _NEW, "quantize": "none"}
        with GriffinModel.from_pretrained(directory, density=1.0, always_stream=True, **options) as ours:
            given = ours.generate(ids, **greedy)
    except GriffinError as error:
        return "refused", f"{type(error).__name__}: {_line(error)}".replace(directory, "DIR")
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {_line(error)}"
    return ("works", "") if torch.equal(given, expected) else ("differs", f"{given[0, _PROMPT:].tolist()}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:220]


def _child(kind: str, end: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    end.send(outcome(kind))


def in_its_own_process(kind: str) -> tuple[str, str]:
    """`outcome`, or "dies" with the signal, or "takes too long"."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(_SECONDS):
            return "takes too long", f"more than {_SECONDS} s"
        found: tuple[str, str] = ours.recv()
        return found
    except EOFError:
        process.join()
        return "dies", f"exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def main(kinds: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    found = {}
    for kind in kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found[kind] = in_its_own_process(kind)
        print(f"{kind:<28}{found[kind][0]:<16}{found[kind][1]}", flush=True)
    print(json.dumps(Counter(word for word, _ in found.values())))


if __name__ == "__main__":
    main(sys.argv[1:])
