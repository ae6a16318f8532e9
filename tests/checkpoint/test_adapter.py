"""LoRA adapters: the model with one is peft's own merged model, streamed, resident, quantised and converted."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_formats import FORMATS, write_foreign
from safetensors.torch import load_file, save_file

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.cli.main import main
from griffin_offload.engine.build import build
from griffin_offload.engine.convert import convert
from griffin_offload.errors import CheckpointError, GriffinError
from griffin_offload.formats.translated import TranslatedTensor, in_memory

peft = pytest.importorskip("peft")
OPTIONS: dict[str, Any] = {"device": "cpu", "ctx_size": 64, "max_gpu_mem": "1GB"}
IDS = torch.arange(5, 45)[None]
TARGETS = {
    "llama2": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],  # Conv1D: matrices that lie the other way
    "phi3": ["qkv_proj", "gate_up_proj"],
}


def write_adapter(source: Path, directory: Path, targets: list[str], **options: Any) -> Path:
    """An adapter, all of whose numbers are random; beside it, as the returned path says, peft's merged model."""
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator, merged = torch.Generator().manual_seed(4), directory.with_name(f"{directory.name} merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about transformers
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, **options))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(directory)
        model.merge_and_unload().save_pretrained(merged)
    return merged


@pytest.fixture(params=TARGETS)
def parts(request: pytest.FixtureRequest, checkpoints, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint, an adapter for it, and both merged by peft."""
    source = checkpoints(request.param)
    more = {"fan_in_fan_out": True} if request.param == "gpt2" else {}
    return source, tmp_path / "adapter", write_adapter(source, tmp_path / "adapter", TARGETS[request.param], **more)


def numbers(checkpoint: Any) -> dict[str, torch.Tensor]:
    return {name: in_memory(tensor.detach()) for name, tensor in build(checkpoint).named_parameters()}


def answer(directory: Path, **options: object) -> list[int]:
    with GriffinModel.from_pretrained(directory, **{**OPTIONS, **options}) as model:
        tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        return tokens[0, IDS.shape[1] :].tolist()


def test_matrices_are_those_that_peft_merges(parts: tuple[Path, Path, Path]):
    source, adapter, merged = parts
    found, wanted, plain = (
        numbers(one)
        for one in (open_checkpoint(source, adapter=adapter), open_checkpoint(merged), open_checkpoint(source))
    )
    changed = [name for name in wanted if not torch.equal(wanted[name], plain[name])]
    assert len(changed) == 3 * (len(load_file(adapter / "adapter_model.safetensors")) // 6)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    assert open_checkpoint(source, adapter=adapter).fingerprint() != open_checkpoint(source).fingerprint()


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        *((name, {"density": 0.5, "quantize": "none"}) for name in TARGETS),
        ("phi3", {"density": 1.0, "quantize": "none"}),
        ("llama2", {"density": 0.5, "quantize": "none", "offload": "ram"}),
        ("gpt2", {"density": 0.5, "quantize": "int8"}),
        ("llama2", {"density": 0.5, "quantize": "int8"}),
    ],
    indirect=["parts"],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_answers_are_those_of_the_merged_model(parts: tuple[Path, Path, Path], options: dict[str, object]):
    source, adapter, merged = parts
    if "gpt2" in source.name:  # a matrix that lies the other way is turned around once, whole, for int8
        warnings.filterwarnings("ignore", message=".* were converted while loading and rest in RAM")
    wanted = answer(merged, **options)
    assert answer(source, adapter=str(adapter), **options) == wanted
    assert answer(source, **options) != wanted


def test_root_of_ranks_and_bytes_in_half(checkpoints, tmp_path: Path):
    """rslora's scale, and an adapter that is stored in 16 bits."""
    source, adapter = checkpoints("llama2"), tmp_path / "adapter"
    merged = write_adapter(source, adapter, ["o_proj", "gate_proj"], use_rslora=True)
    found, wanted = numbers(open_checkpoint(source, adapter=adapter)), numbers(open_checkpoint(merged))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    for name, tensor in numbers(open_checkpoint(source, adapter=adapter)).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0.1, atol=0.02)


def test_over_packed_matrices(checkpoints, tmp_path: Path):
    """The adapter of an FP8 checkpoint: both are decoded at once."""
    packed = tmp_path / "packed"
    plain = write_foreign(checkpoints("llama2", torch.float32, 1), packed, FORMATS["fp8 blocks"])
    merged = write_adapter(plain, tmp_path / "adapter", TARGETS["llama2"])
    warnings.filterwarnings("ignore", message=".* weights only: ")
    checkpoint, wanted = open_checkpoint(packed, adapter=tmp_path / "adapter"), numbers(open_checkpoint(merged))
    assert isinstance(build(checkpoint).model.layers[0].mlp.up_proj.weight.detach(), TranslatedTensor)
    for name, tensor in numbers(checkpoint).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)


def test_converted_copies_have_it(parts: tuple[Path, Path, Path], tmp_path: Path):
    source, adapter, merged = parts
    made = convert(source, tmp_path / "made", "int8", adapter=adapter).directory
    wanted = convert(merged, tmp_path / "wanted", "int8").directory
    tensors = [
        {n: t for file in sorted(d.glob("*.safetensors")) for n, t in load_file(file).items()} for d in (made, wanted)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor.float(), tensors[1][name].float(), rtol=1e-5, atol=1.01)  # a code may tip
    assert answer(made, density=0.5) == answer(wanted, density=0.5)
    with pytest.raises(GriffinError, match="is converted to int8: give the adapter when it is converted"):
        open_checkpoint(made, adapter=adapter)


def test_the_command_line_takes_one(checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = checkpoints("llama2")
    merged = write_adapter(source, tmp_path / "adapter", TARGETS["llama2"])
    texts = []
    for model in (["-m", str(source), "--adapter", str(tmp_path / "adapter")], ["-m", str(merged)]):
        shutil.copyfile(source / "tokenizer.json", merged / "tokenizer.json")
        assert main(["run", "the cat", "-n", "6", "--temperature", "0", "-q", "--device", "cpu", *model]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


CONFIGS = [
    ({"use_dora": True}, "has use_dora = True, which is not merged here: merge it with peft"),
    ({"modules_to_save": ["lm_head"]}, r"has modules_to_save = \['lm_head'\]"),
    ({"alpha_pattern": {"q_proj": 3}}, "has alpha_pattern"),
    ({"bias": "all"}, "has bias = all"),
    ({"init_lora_weights": "pissa"}, "has init_lora_weights = pissa"),
    ({"peft_type": "IA3"}, "is a IA3 adapter: only LoRA is merged"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x': it has to be a number"),
    ({"lora_alpha": None}, "lora_alpha is None"),
]


def test_what_is_not_merged_is_named(checkpoints, tmp_path: Path):
    source, adapter = checkpoints("llama2"), tmp_path / "adapter"
    write_adapter(source, adapter, ["q_proj"])
    config, file = json.loads((adapter / "adapter_config.json").read_text()), adapter / "adapter_model.safetensors"
    for change, message in CONFIGS:
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(GriffinError, match=message):
            open_checkpoint(source, adapter=adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no peft_type: no adapter of peft"):
        open_checkpoint(source, adapter=adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors, first = load_file(file), "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = tensors[f"{first}.lora_A.weight"], tensors[f"{first}.lora_B.weight"]
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": a}
    head = {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": b}
    other = {f"{first.replace('q_proj', 'x_proj')}.lora_{x}.weight": one for x, one in (("A", a), ("B", b))}
    wrong = {f"{first}.lora_A.weight": a[:, :5].contiguous()}
    for change, message in (
        (embedding, "embed_tokens.lora_embedding_A, which is no matrix of a layer"),
        (head, "it changes base_model.model.lm_head.lora_A.weight, which is no matrix of a layer"),
        (other, r"self_attn.x_proj.weight, .* has no such matrix"),
        (wrong, r"does not fit .*: matrix, lora_A and lora_B are \[32, 32\], \[4, 5\], \[32, 4\]"),
    ):
        save_file({name: tensor.clone() for name, tensor in (tensors | change).items()}, file)
        with pytest.raises(GriffinError, match=message):
            open_checkpoint(source, adapter=adapter)
    save_file({name: tensor for name, tensor in tensors.items() if name != f"{first}.lora_B.weight"}, file)
    with pytest.raises(GriffinError, match="lacks lora_A or lora_B of"):
        open_checkpoint(source, adapter=adapter)
    file.unlink()
    with pytest.raises(GriffinError, match="pickled adapters can run code"):
        open_checkpoint(source, adapter=adapter)
    with pytest.raises(GriffinError, match=r"has no adapter_config\.json: give the directory of an adapter"):
        open_checkpoint(source, adapter=tmp_path)
