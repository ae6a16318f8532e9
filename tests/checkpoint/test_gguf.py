"""GGUF files: every architecture's model is the one that was written, every block type's the one that transformers
makes of it, streamed, resident and converted."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from support.gguf_files import write_gguf
from support.tiny_models import ARCHITECTURES, FURTHER, HYBRIDS

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.gguf_blocks import BlockDecoder, block_types
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import LoadConfig
from griffin_offload.engine.build import build
from griffin_offload.engine.convert import convert
from griffin_offload.engine.spec import examine, plan_for
from griffin_offload.errors import CheckpointError, UnsupportedModel, UsageError
from griffin_offload.formats.translated import in_memory

IDS = torch.arange(5, 45)[None]
OPTIONS = {"device": "cpu", "ctx_size": 64, "max_gpu_mem": "1GB", "quantize": "none"}
NAMES = ["llama2", "llama3", "llama_bias", "mistral", "gemma", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "stablelm"]
NAMES += ["starcoder2", "falcon_multi_query", "falcon_new", "gpt2", "bloom", "lfm2", "qwen3_5", "gemma4"]
TABLE = ARCHITECTURES | HYBRIDS | FURTHER


def model_of(name: str) -> Any:
    """As GGUF names it: Mistral's files are Llama's."""
    model = TABLE[name].build()
    if name == "mistral":
        settings = {key: value for key, value in model.config.to_dict().items() if key in _COMMON_KEYS}
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
        llama.load_state_dict(model.state_dict())
        return llama
    return model


_COMMON_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
)  # fmt: skip


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits[0].float()


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_one_that_was_written(name: str, tmp_path: Path):
    model = model_of(name)
    checkpoint = open_checkpoint(write_gguf(model, tmp_path / "tiny.gguf"))
    assert checkpoint.dtype == torch.float32
    torch.testing.assert_close(logits_of(build(checkpoint)), logits_of(model), rtol=1e-5, atol=2e-5)


def test_factors_of_frequencies_are_kept_beyond_the_trained_length(tmp_path: Path):
    """transformers drops them; they are all that tells Llama 3.1 from Llama 3."""
    model = TABLE["llama3"].build()
    ids = torch.arange(300)[None] % 311
    found = build(open_checkpoint(write_gguf(model, tmp_path / "tiny.gguf")))
    torch.testing.assert_close(logits_of(found, ids), logits_of(model, ids), rtol=1e-5, atol=2e-5)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    plain = type(model)(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(logits_of(found, ids), logits_of(plain, ids), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_double_wide_mlp": True, "num_kv_shared_layers": 3},
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    ],
)
def test_layers_of_gemma_4_differ(settings: dict[str, Any], tmp_path: Path):
    """As in its smaller and in its larger models: wider ones that share keys, whole ones of other heads."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"intermediate_size": 64, "num_hidden_layers": 6, "max_position_embeddings": 256, "sliding_window": 8}
    sizes |= {"global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**sizes | settings, layer_types=kinds)).eval()
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.7)
    found = build(open_checkpoint(write_gguf(model, tmp_path / "tiny.gguf")))
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=1e-5, atol=2e-5)
    assert found.config.layer_types == kinds


def test_layers_that_draft_are_left_aside(tmp_path: Path):
    """Qwen3.5's files may have llama.cpp's drafting layer behind the others, which transformers has no place for."""
    model = TABLE["qwen3_5"].build()
    layers = model.config.num_hidden_layers
    plain = open_checkpoint(write_gguf(model, tmp_path / "plain.gguf"))
    kinds = [*model.config.layer_types, "full_attention"]
    settings = model.config.to_dict() | {"num_hidden_layers": layers + 1, "layer_types": kinds}
    longer = type(model)(type(model.config)(**settings))
    more = {"qwen35.nextn_predict_layers": 1}
    path = write_gguf(longer, tmp_path / "drafts.gguf", more=more)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.num_hidden_layers == layers
    assert checkpoint.weight_bytes == plain.weight_bytes
    assert checkpoint.tensors().keys() == plain.tensors().keys()


@pytest.mark.parametrize("value_size", [32, 48])
def test_columns_in_another_order_keep_their_codes(value_size: int, tmp_path: Path):
    """Of linear attention's output: heads of whole groups on a grid keep their codes, others become numbers alone."""
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": value_size}
    config = transformers.Qwen3_5TextConfig(
        **TABLE["qwen3_5"].build().config.to_dict() | sizes | {"hidden_size": 64, "intermediate_size": 96}
    )
    torch.manual_seed(0)
    path = write_gguf(transformers.Qwen3_5ForCausalLM(config).eval(), tmp_path / "tiny.gguf", "Q4_1")
    checkpoint = open_checkpoint(path)
    stored = checkpoint.tensors()["model.layers.0.linear_attn.out_proj.weight"]
    assert isinstance(stored.decode, BlockDecoder)
    assert stored.decode.on_grids == (value_size % 32 == 0)
    exact = torch.empty(stored.shape, dtype=torch.float32)
    parts = [torch.from_numpy(np.fromfile(p.path, np.uint8, p.nbytes, offset=p.offset)) for p in stored.parts]
    stored.decode(parts, 0, stored.shape[0], exact)
    if stored.decode.on_grids:
        rows = torch.tensor([5, 2, 3])
        codes = stored.decode.coded(parts, stored.shape[0], rows)
        torch.testing.assert_close(codes.numbers(), exact[rows], rtol=0, atol=1e-6)


BLOCKS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
"""What the package can write."""


def wide_model(neurons: int = 512) -> Any:
    """Rows of whole blocks of 256."""
    sizes = {"hidden_size": 256, "intermediate_size": neurons, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=320, num_key_value_heads=2, max_position_embeddings=512, **sizes)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def by_transformers(path: Path) -> Any:
    plain = transformers.GgufConfig(dequantize=True)
    settings = {"gguf_file": path.name, "dtype": torch.float32, "quantization_config": plain}
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **settings).eval()


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_what_transformers_makes_of_them(kind: str, tmp_path: Path):
    path = write_gguf(wide_model(), tmp_path / "tiny.gguf", kind)
    expected = by_transformers(path)
    checkpoint = open_checkpoint(path).in_precision(torch.float32)
    torch.testing.assert_close(logits_of(build(checkpoint).float()), logits_of(expected), rtol=1e-5, atol=1e-5)


def test_every_type_that_the_package_reads_is_decoded_by_row(tmp_path: Path):
    """Rows, one at a time and out of order, against all at once."""
    generator = np.random.default_rng(0)
    for kind in block_types().values():
        row = kind.nbytes * (256 // min(kind.numbers, 256) or 1) * 2
        stored = generator.integers(0, 60, (6, row), dtype=np.uint8)
        if kind.name == "F64":
            continue
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(kind.id))))
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        decode = BlockDecoder(kind, 6, expected.shape[1], order)
        into = torch.empty(2, expected.shape[1], dtype=torch.float64)
        decode([torch.from_numpy(stored).flatten()], 2, 4, into)
        assert torch.equal(torch.nan_to_num(into), torch.nan_to_num(expected[order[2:4]].double())), kind.name
        turned = BlockDecoder(kind, 6, expected.shape[1], transposed=True)
        into = torch.empty(7, 6, dtype=torch.float64)
        turned([torch.from_numpy(stored).flatten()], 3, 10, into)
        assert torch.equal(torch.nan_to_num(into), torch.nan_to_num(expected[:, 3:10].t().double())), kind.name


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file in Q8_0, and the directory with the same numbers."""
    place = tmp_path_factory.mktemp("pair")
    path = write_gguf(wide_model(), place / "tiny.gguf", "Q8_0")
    by_transformers(path).save_pretrained(place / "plain")
    return path, place / "plain"


def answer(path: Path, **options: Any) -> tuple[list[int], Any]:
    with GriffinModel.from_pretrained(path, **{**OPTIONS, **options}) as model:
        tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        assert model.resident_bytes == model.plan.resident_bytes
        return tokens[0, IDS.shape[1] :].tolist(), model.last_prefill


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_answers_are_those_of_the_same_numbers_in_a_directory(pair: tuple[Path, Path], density: float, dtype: str):
    plain = {"float32": "float32", "auto": "bfloat16"}[dtype]
    found, prefill = answer(pair[0], density=density, dtype=dtype)
    assert found == answer(pair[1], density=density, dtype=plain)[0]
    stored = sum(t.stored_bytes for name, t in open_checkpoint(pair[0]).tensors().items() if ".mlp." in name)
    assert prefill.streamed_bytes == (stored if density < 1 else 0)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma4"])
def test_layers_that_differ_stream_and_convert(name: str, tmp_path: Path):
    """Heads in another order and keys that are shared, in blocks: as the same numbers in a directory."""
    sizes = {"hidden_size": 64, "intermediate_size": 128} | ({"linear_value_head_dim": 32} if name == "qwen3_5" else {})
    torch.manual_seed(0)
    config = TABLE[name].build().config
    for key, size in sizes.items():
        setattr(config, key, size)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    file = write_gguf(model, tmp_path / "tiny.gguf", "Q8_0")
    exact = dict(build(open_checkpoint(file).in_precision(torch.float32)).named_parameters())
    for own, parameter in model.named_parameters():
        parameter.data = in_memory(exact[own]).detach().float()
    model.save_pretrained(tmp_path / "plain")
    for density in (1.0, 0.5):
        found = [answer(path, density=density, dtype="float32")[0] for path in (file, tmp_path / "plain")]
        assert found[0] == found[1]
    convert(file, tmp_path / "copy", "int8")
    assert answer(tmp_path / "copy", quantize="int8")[0] == answer(file, quantize="int8")[0]


def test_a_plan_counts_the_numbers_that_are_made(pair: tuple[Path, Path]):
    options = LoadConfig(**{**OPTIONS, "dtype": "float32"}, density=0.5, max_cpu_mem=None)
    ours, plain = (plan_for(examine(path, options)) for path in pair)
    assert ours.full_bytes == plain.full_bytes
    assert ours.resident_bytes == plain.resident_bytes
    assert ours.prefill_parts["slots"] > plain.prefill_parts["slots"]  # stored bytes beside what is made of them


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_converted_copies_are_those_of_the_same_numbers(precision: str, tmp_path: Path, checkpoints):
    tokens = checkpoints("llama2")
    file = write_gguf(wide_model(), tmp_path / "tiny.gguf", "F32", tokenizer=tokens)
    wide_model().save_pretrained(tmp_path / "plain")
    transformers.AutoTokenizer.from_pretrained(tokens).save_pretrained(tmp_path / "plain")  # int4 calibrates with text
    made, plain = (convert(source, tmp_path / f"{source.name}-out", precision) for source in (file, tmp_path / "plain"))
    found = [build(open_checkpoint(one.directory)).state_dict() for one in (made, plain)]
    assert [name for name, tensor in found[0].items() if not torch.equal(tensor, found[1][name])] == []
    assert answer(made.directory, quantize=precision)[0] == answer(plain.directory, quantize=precision)[0]
    text = "the cat sat on the mat 123 </s> river"
    expected = transformers.AutoTokenizer.from_pretrained(tokens)(text)["input_ids"]
    assert open_checkpoint(file).tokenizer()(text)["input_ids"] == expected
    assert transformers.AutoTokenizer.from_pretrained(made.directory)(text)["input_ids"] == expected


def test_shards_and_a_directory_of_one_file_are_one_model(pair: tuple[Path, Path], tmp_path: Path):
    write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q8_0", shard=8)
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) > 2
    expected = answer(pair[0], density=0.5)[0]
    assert answer(shards[1], density=0.5)[0] == expected
    assert answer(tmp_path, density=0.5)[0] == expected
    write_gguf(wide_model(), tmp_path / "other.gguf")
    with pytest.raises(UsageError, match="holds 2 models as GGUF files: give one of them"):
        open_checkpoint(tmp_path)
    (tmp_path / "other.gguf").unlink()
    shards[2].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[2].name} is absent"):
        open_checkpoint(tmp_path)


def test_a_file_without_a_tokenizer_is_named_with_what_to_do(tmp_path: Path):
    """Also where a directory was given that holds it; a model is loaded, and takes another's tokenizer."""
    path = write_gguf(TABLE["llama2"].build(), tmp_path / "tiny.gguf")
    words = (
        rf"^{re.escape(str(path))} has no tokenizer that can be read \(none; .*: use the Python API with token ids, or "
    )
    for model in (path, tmp_path):
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(model).tokenizer()
    with GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="100MB", ctx_size=64) as loaded:
        with pytest.raises(CheckpointError, match=r"or set model\.tokenizer$"):
            _ = loaded.tokenizer
        loaded.tokenizer = tokenizer = object()
        assert loaded.tokenizer is tokenizer


def test_end_tokens_begin_and_template_come_from_the_file(checkpoints, tmp_path: Path):
    tokens = checkpoints("llama2")
    more = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ messages[0]['content'] }}!"}
    path = write_gguf(TABLE["llama2"].build(), tmp_path / "tiny.gguf", tokenizer=tokens, more=more)
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer("the cat")["input_ids"][0] == tokenizer.bos_token_id == 1
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
    assert chat == "the cat!"
    model = build(checkpoint)
    assert model.generation_config.eos_token_id == [2]
    assert model.generation_config.bos_token_id == 1


def test_digits_are_cut_as_the_file_says(checkpoints, tmp_path: Path):
    """SmolLM's and StarCoder's words hold no two digits; transformers cuts all such files as GPT-2 does."""
    tokens = checkpoints("llama2")
    said = json.loads((tokens / "tokenizer.json").read_text())
    vocabulary = [*sorted(said["model"]["vocab"], key=said["model"]["vocab"].__getitem__), "12"]
    merges = [*(" ".join(merge) for merge in said["model"]["merges"]), "1 2"]
    more = {"tokenizer.ggml.tokens": vocabulary, "tokenizer.ggml.merges": merges}
    found = {}
    for kind in ("gpt-2", "smollm"):
        said_kind = more | {"tokenizer.ggml.pre": kind, "tokenizer.ggml.token_type": [1] * len(vocabulary)}
        path = write_gguf(TABLE["llama2"].build(), tmp_path / f"{kind}.gguf", tokenizer=tokens, more=said_kind)
        tokenizer = open_checkpoint(path).tokenizer()
        found[kind] = tokenizer.convert_ids_to_tokens(tokenizer("12")["input_ids"])
    assert found == {"gpt-2": ["12"], "smollm": ["1", "2"]}


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [  # what the makers' own tokenizer.json cut: o200k at capitals, Qwen3.5 no marks off their letters
        ("gpt-4o", "HelloWorld don't 12345 a/\n", ["Hello", "World", " don't", " ", "123", "45", " a", "/\n"]),
        ("llama4", "XMLParser CamelCase's", ["XMLParser", " Camel", "Case's"]),
        ("qwen35", "e\u0301te\u0301 don't 12", ["e\u0301te\u0301", " don", "'t", " ", "1", "2"]),
        ("qwen2", "e\u0301te", ["e", "\u0301te"]),
    ],
)
def test_texts_are_cut_as_their_makers_cut_them(kind: str, text: str, words: list[str], checkpoints, tmp_path: Path):
    """Files of gpt-oss say gpt-4o."""
    tokens, path = checkpoints("llama2"), tmp_path / "tiny.gguf"
    write_gguf(TABLE["llama2"].build(), path, tokenizer=tokens, more={"tokenizer.ggml.pre": kind})
    backend = open_checkpoint(path).tokenizer().backend_tokenizer
    cut = [text[first:end] for _, (first, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == words


def test_sentencepiece_words_are_joined_by_score(tmp_path: Path):
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "a", "b", "ab", "ba", "\u2581a", "aba"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 7
    more = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": kinds}
    more |= {"tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    path = write_gguf(TABLE["llama2"].build(), tmp_path / "tiny.gguf", more=more)
    tokenizer = open_checkpoint(path).tokenizer()
    ids = tokenizer("aba bé")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "\u2581a", "ba", "\u2581", "b", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "aba bé"


def test_words_of_gemma_4_are_merged_by_its_list(tmp_path: Path):
    """Spaces are letters, what is no word falls back to bytes, nothing is put in front."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "a", "b", "\n", "ab", "\u2581a", "\u2581ab", "\n\n"]
    more = {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": words, "tokenizer.ggml.add_bos_token": True}
    more |= {"tokenizer.ggml.merges": ["a b", "\u2581 ab", "\u2581 a", "\n \n"], "tokenizer.ggml.scores": [0.0] * 268}
    more |= {"tokenizer.ggml.token_type": [3, 3, 3, 2] + [6] * 256 + [1] * 8, "tokenizer.ggml.bos_token_id": 2}
    more |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.unknown_token_id": 3}
    tokenizer = open_checkpoint(write_gguf(TABLE["gemma4"].build(), tmp_path / "tiny.gguf", more=more)).tokenizer()
    ids = tokenizer("ab ab a\n\n\u00e9")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<bos>", "ab", "\u2581ab", "\u2581a", "\n\n", "<0xC3>", "<0xA9>"),
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab a\n\n\u00e9"


def test_mixtures_and_unknown_architectures_are_refused_by_name(tmp_path: Path):
    model = TABLE["llama2"].build()
    path = write_gguf(model, tmp_path / "tiny.gguf", architecture="deepseek2", more={"deepseek2.expert_count": 8})
    with pytest.raises(UnsupportedModel, match=r"is a mixture of 8 experts of the architecture deepseek2, "):
        open_checkpoint(path)
    write_gguf(model, path, architecture="mamba")
    with pytest.raises(UnsupportedModel, match=r"is of the architecture mamba, .* \(read are bloom, "):
        open_checkpoint(path)


def test_what_is_lacking_or_too_much_is_named(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    write_gguf(TABLE["llama2"].build(), path, drop=("llama.block_count",))
    with pytest.raises(CheckpointError, match=r"does not say llama\.block_count"):
        open_checkpoint(path)
    write_gguf(TABLE["llama2"].build(), path, more={"llama.block_count": 2})
    with pytest.raises(UnsupportedModel, match=r"has no place for, first blk\.2\.attn_k\.weight"):
        open_checkpoint(path)
    write_gguf(TABLE["llama2"].build(), path, more={"llama.block_count": 4})
    with pytest.raises(CheckpointError, match=r"missing tensors, first model\.layers\.3\."):
        build(open_checkpoint(path))
    write_gguf(TABLE["llama2"].build(), path, more={"llama.attention.head_count_kv": 2})
    with pytest.raises(CheckpointError, match=r"attn_k\.weight has 32 rows, by its heads it should have 16"):
        open_checkpoint(path).tensors()


def test_rows_that_no_memory_could_count_are_named(tmp_path: Path):
    """Before their order is made."""
    path = tmp_path / "tiny.gguf"
    sizes = dict.fromkeys(("llama.attention.key_length", "llama.rope.dimension_count"), 2**31)
    write_gguf(TABLE["llama2"].build(), path, more=sizes)
    with pytest.raises(CheckpointError, match=r"attn_\w\.weight has \d+ rows, by its heads it should have \d{10,}"):
        open_checkpoint(path).tensors()
