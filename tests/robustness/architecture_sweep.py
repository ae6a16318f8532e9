"""Every causal language model that transformers knows, in miniature: does it work, or by which words is it refused?

    python tests/robustness/architecture_sweep.py                             # all of them, lines and the counts
    python tests/robustness/architecture_sweep.py lfm2 phi3                   # some
    python tests/robustness/architecture_sweep.py --out docs/architectures.md # as a page

Not part of the test suite: it takes minutes. "works" means that greedy tokens at density 1, streamed, are those of
dense transformers, and at density .5 those of dense transformers whose other neurons are zeroed behind the prompt (of
experts: that they run). Each model has a process of its own (forked, so that nothing is imported twice): one that dies
is a line, too.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import multiprocessing
import os
import tempfile
import warnings
from collections import Counter
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from griffin_offload import GriffinModel
from griffin_offload.errors import GriffinError

_SECONDS = 120
_PROMPT, _NEW = 24, 12
_VOCAB = 320

# What most configs call their sizes; each takes those that it knows.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab", "unpadded_vocab_size"), _VOCAB),
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
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Written as encoders, they decode when they are told to.
_ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
)
_GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
_OF_TYPE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "axk1"), _GROUPS),
    **{kind: {"is_decoder": True} for kind in _ENCODERS},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
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
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3},
    "kolibri1_1": {
        "layer_types": ["sliding_attention", *["indexed_attention"] * 3],
        **{"index_layers": [1, 3], "kv_source_layers": [0, 1, 1, 3], "mlp_only_layers": [0]},
        **{"index_num_heads": 2, "index_topk": 4, "index_pool_size": 16, "index_compression": 4},
        **{"index_num_local_tokens": 4, "index_num_sink_tokens": 2, "mlp_only_intermediate_size": 128},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        **{"linear_head_dim": 16, "linear_num_heads": 4, "kv_lora_rank": 16, "v_head_dim": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    },
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "opt": {"word_embed_proj_dim": 64},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "whisper": {"begin_suppress_tokens": None, "suppress_tokens": None},
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


class Outcome(NamedTuple):
    """Of one type: "works", "differs", "refused", "traceback" or "not buildable", what was said, and what it is."""

    word: str
    said: str = ""
    family: str = ""


def outcome(kind: str) -> Outcome:
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
        family = _family(kind, model, ids)
    except Exception as error:
        return Outcome("not buildable", _line(error))
    try:
        options = {"device": "cpu", "max_gpu_mem": "1GB", "ctx_size": _PROMPT + _NEW, "quantize": "none"}
        with GriffinModel.from_pretrained(directory, density=1.0, always_stream=True, **options) as ours:
            given = ours.generate(ids, **greedy)
            chooses = any(block.neurons for block in ours.engine.blocks)
        half = wanted = given
        if chooses:
            with GriffinModel.from_pretrained(directory, density=0.5, **options) as ours:
                half = ours.generate(ids, **greedy)
                wanted = half if ours.plan.experts else _masked(model, ours, ids, greedy)
    except GriffinError as error:
        return Outcome("refused", f"{type(error).__name__}: {_line(error)}".replace(directory, "DIR"), family)
    except Exception as error:
        return Outcome("traceback", f"{type(error).__name__}: {_line(error)}", family)
    if not torch.equal(given, expected):
        return Outcome("differs", f"density 1: {given[0, _PROMPT:].tolist()}", family)
    if not torch.equal(half, wanted):
        return Outcome("differs", f"density .5: {half[0, _PROMPT:].tolist()}", family)
    return Outcome("works", "", family)


@torch.no_grad()
def _family(kind: str, model: Any, ids: Tensor) -> str:
    """Whether there is any feed-forward, whether a token sees those behind it, whether there are experts, and whether
    an encoder stands beside it."""
    if kind in _WITHOUT_FEED_FORWARD:
        return "no feed-forward"
    later = torch.cat([ids[:, :-1], (ids[:, -1:] + 7) % _VOCAB], dim=1)
    with contextlib.suppress(Exception):
        first, second = (model(input_ids=tokens).logits[:, :-1] for tokens in (ids, later))
        if not torch.allclose(first, second, atol=1e-4):
            return "encoder"
    if any("expert" in type(module).__name__.casefold() for module in model.modules()):
        return "experts"
    with contextlib.suppress(Exception):
        if CONFIG_MAPPING[kind]().is_encoder_decoder:
            return "decoder of two"
    return "dense decoder"


def _masked(model: Any, ours: GriffinModel, ids: Tensor, greedy: dict[str, Any]) -> Tensor:
    """What the dense `model` says when, behind the prompt, only the neurons that `ours` has chosen are not zero."""
    names = {id(module): name for name, module in ours.model.named_modules()}

    def leave_out(keep: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> Any:
        z = args[0]
        return None if z.numel() > z.shape[-1] else (z * keep, *args[1:])

    for layer, chosen in ours.selected.items():
        block: Any = ours.engine.blocks[layer]
        keep = torch.zeros(block.neurons)
        keep[chosen] = 1
        model.get_submodule(names[id(block.watched)]).register_forward_pre_hook(partial(leave_out, keep))
    wanted: Tensor = model.generate(ids, **greedy)
    return wanted


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:220]


def _child(kind: str, end: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    end.send(outcome(kind))


def in_its_own_process(kind: str) -> Outcome:
    """`outcome`, or "dies" with the signal, or "takes too long"."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(_SECONDS):
            return Outcome("takes too long", f"more than {_SECONDS} s")
        found: Outcome = ours.recv()
        return found
    except EOFError:
        process.join()
        return Outcome("dies", f"exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


_WITHOUT_FEED_FORWARD = ("falcon_mamba", "mamba", "mamba2", "xlstm")
_BEFORE = (
    "Before hybrids, experts and checkpoints that see were read (the same sweep at density 1): 67 worked, 68 did not."
)


def page(found: dict[str, Outcome]) -> str:
    """A page of docs/: what works by family, what is refused by which words, what could not be tried."""
    works = {kind: one for kind, one in found.items() if one.word == "works"}
    tried = {kind: one for kind, one in found.items() if one.word != "not buildable"}
    dense = {k: o for k, o in tried.items() if o.family == "dense decoder"}
    share = sum(one.word == "works" for one in dense.values()) / max(len(dense), 1)
    lines = [
        "# Every architecture",
        "",
        "Written by `python tests/robustness/architecture_sweep.py --out docs/architectures.md`: every type of causal",
        f"language model in transformers {hf.__version__}, tiny and random. A type works when greedy tokens at density",
        "1 are those of dense transformers, and at .5 those of dense transformers with the other neurons zeroed",
        "(mixtures of experts: when they run; without a feed-forward: at 1 alone). Reasons are the program's own",
        "words. A decoder of two has an encoder beside it, which is left out.",
        "",
        f"{len(found)} types: {len(works)} work, {len(tried) - len(works)} do not, {len(found) - len(tried)} could not",
        f"be built in small. Of decoders with a dense feed-forward {sum(o.word == 'works' for o in dense.values())} of "
        f"{len(dense)} work ({share:.1%}).",
        _BEFORE,
        "",
    ]
    for family in sorted({one.family for one in works.values()}):
        names = [kind for kind, one in works.items() if one.family == family]
        lines += [f"## Works: {family} ({len(names)})", "", *_wrapped(names), ""]
    for title, words in (("Refused", {o.word for o in tried.values()} - {"works"}), ("Not built", {"not buildable"})):
        rows = [(kind, one) for kind, one in found.items() if one.word in words]
        lines += [f"## {title} ({len(rows)})", "", "| type | family | said |", "|---|---|---|"]
        lines += [f"| {kind} | {one.family or '-'} | {_cell(one)} |" for kind, one in rows] + [""]
    return "\n".join(lines[:-1]) + "\n"


def _cell(one: Outcome) -> str:
    said = one.said.replace("|", "/")
    said = said if len(said) <= 160 else said[:157] + "..."
    return said if one.word in ("refused", "not buildable") else f"**{one.word}**: {said}"


def _wrapped(names: list[str]) -> list[str]:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 120:
            lines.append("")
        lines[-1] += f"{name}, " if name != names[-1] else name
    return [line.rstrip() for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="types to try (default: all)")
    parser.add_argument("--out", type=Path, help="a page to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    found = {}
    for kind in arguments.kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found[kind] = in_its_own_process(kind)
        print(f"{kind:<28}{found[kind].word:<16}{found[kind].family:<16}{found[kind].said}", flush=True)
    print(json.dumps(Counter(one.word for one in found.values())))
    if arguments.out is not None:
        arguments.out.write_text(page(found))


if __name__ == "__main__":
    main()
