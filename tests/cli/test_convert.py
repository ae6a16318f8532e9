"""`griffin-offload convert`: names, numbers and bytes of what it writes, and how it speaks."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import quantised_reference as ref
import torch
from marks import by_turns, every_pair
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, VOCAB, write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from griffin_offload import GriffinModel
from griffin_offload.engine.convert import convert

PRECISIONS = ["int8", "int4"]
both = pytest.mark.parametrize("precision", PRECISIONS)
# Of uniform steps on normal numbers. In int4 numbers move to make up for others, most where inputs are much alike, as
# those of tiny models behind ReLU are.
LARGEST_ERROR = {"int8": 0.01, "int4": 0.9}
PROMPT = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(3))


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def layer_linears(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the decoder layers, by what the down projections are called."""
    prefix = ARCHITECTURES[name].down.partition("{i}")[0]
    linear = (nn.Linear, Conv1D)
    return {n: m for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, linear)}


def dequantised(stored: dict[str, Tensor], linear: str) -> Tensor:
    """The matrix [O, I] by the formulas of formats/int8.py and int4.py."""
    parts = ("weight", "groups", "scale", "input_scale")
    tensors = {part: stored[f"{linear}.{part}"] for part in parts if f"{linear}.{part}" in stored}
    if "groups" in tensors:
        return ref.grouped_matrix(tensors).float()
    matrix = tensors["weight"].float() * tensors["scale"][:, None]
    return matrix * tensors["input_scale"] if "input_scale" in tensors else matrix


@pytest.mark.parametrize(("name", "precision", "always_stream"), by_turns(ARCHITECTURES, PRECISIONS, (False, True)))
def test_every_architecture(cli, converted, name: str, precision: str, always_stream: bool):
    """The names are those of the model and its scales, and tokens those of dense transformers with these matrices."""
    out = converted(name, precision)
    dense, stored = ARCHITECTURES[name].build(), stored_tensors(out)
    linears, downs = layer_linears(name, dense), ARCHITECTURES[name].down_names()
    scales = {f"{linear}.scale" for linear in linears if precision == "int8" or linear not in downs}
    scales |= {f"{linear}.input_scale" for linear in downs}
    small = ref.small_ones(dense) if precision == "int4" else set()
    scales |= {f"{linear}.groups" for linear in linears if precision == "int4" and linear not in small}
    assert set(stored) == {parameter for parameter, _ in dense.named_parameters()} | scales
    assert set(downs) <= set(linears)
    for parameter, tensor in dense.named_parameters():
        if parameter.removesuffix(".weight") not in linears:
            assert torch.equal(stored[parameter], tensor), parameter
    with torch.no_grad():
        for linear, module in linears.items():
            matrix = dequantised(stored, linear)
            whole = precision == "int8" or linear in small
            assert stored[f"{linear}.weight"].nbytes * (1 if whole else 2) == matrix.numel()
            matrix = matrix.t() if isinstance(module, Conv1D) else matrix
            error = (matrix - module.weight).norm() / module.weight.norm()
            assert 0 < error < LARGEST_ERROR[precision], linear
            module.weight.copy_(matrix)
    if precision != "int8":
        ref.round_head(dense)
    expected = dense.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=5, do_sample=False)
    options = {"device": "cpu", "max_gpu_mem": "1GB", "density": 1.0, "always_stream": always_stream}
    with GriffinModel.from_pretrained(out, **options) as model:
        assert torch.equal(model.generate(PROMPT, max_new_tokens=5, do_sample=False), expected)
        assert model.plan.precision == precision


@pytest.mark.parametrize(
    ("name", "precision"),
    by_turns(("llama3", "gpt2", "phi3", "opt", "gemma3", "falcon_new", "bloom"), PRECISIONS, whole=("llama3",)),
)
def test_commands_take_the_directory(cli, converted, name: str, precision: str):
    out = converted(name, precision)
    plan = cli("plan", "-m", out, "--device", "cpu", "--json").json
    assert plan["precision"] == precision
    run = cli("run", "the cat", "-m", out, "--device", "cpu", "-n", 4, "--density", "0.5", "--json")
    assert (run.code, run.json["generated_tokens"], run.json["decode_streamed_bytes"]) == (0, 4, 0)


CHOSEN = {"all": {"density": 1.0}, "half": {"density": 0.5, "selection": "random", "seed": 5}}


@pytest.mark.parametrize(
    ("name", "options", "precision"),
    every_pair({name: name for name in ("llama3", "phi3", "gpt2", "opt")}, CHOSEN, {p: p for p in PRECISIONS}),
)
def test_residents_are_those_of_quantising_on_the_fly(tmp_path: Path, name, options, precision):
    """Where there is no tokenizer: with one, converting to int4 knows how to make up for errors."""
    write_checkpoint(name, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", precision)
    states = []
    for directory in (tmp_path / "out", tmp_path / "model"):
        common = {"device": "cpu", "max_gpu_mem": "1GB", "quantize": precision, "ctx_size": 64}
        with GriffinModel.from_pretrained(directory, **common, **options) as model:
            model.generate(PROMPT, max_new_tokens=2, do_sample=False)
            states.append({key: tensor.detach().clone() for key, tensor in model.model.named_parameters()})
    assert states[0].keys() == states[1].keys()
    assert any(tensor.dtype in (torch.int8, torch.uint8) for tensor in states[0].values())
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def test_other_software_refuses_it(converted):
    """Instead of computing with numbers that lack their scales."""
    with pytest.raises(ValueError, match="quantization config"):
        AutoModelForCausalLM.from_pretrained(converted("llama2", "int8"))


def test_the_embedded_demo(cli, tmp_path: Path):
    assert cli("convert", tmp_path / "demo", "--quantize", "int8").code == 0
    assert cli("run", "the river", "-m", tmp_path / "demo", "-n", 4, "-q").out.strip()


def test_text_goes_to_stderr(cli, llama: Path, tmp_path: Path):
    outcome = cli("convert", tmp_path / "out", "-m", llama, "--quantize", "int8")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"{tmp_path / 'out'}: int8, 279.4 kB became {size_of(tmp_path / 'out')} in 4 shards\n"
    quiet = cli("convert", tmp_path / "quiet", "-m", llama, "--quantize", "int8", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def size_of(directory: Path) -> str:
    return f"{sum(path.stat().st_size for path in directory.glob('*.safetensors')) / 1000:.1f} kB"


def test_json_is_one_object_on_stdout(cli, llama: Path, tmp_path: Path):
    outcome = cli("convert", tmp_path / "out", "-m", llama, "--quantize", "int4", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert outcome.json == {
        "directory": str(tmp_path / "out"),
        "precision": "int4",
        "shards": 4,
        "resumed_shards": 0,
        "read_bytes": 279424,  # the checkpoint has no rotary frequencies
        "written_bytes": written,
    }


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(cli, llama: Path, tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        assert cli("convert", tmp_path / "out", "-m", llama, "--quantize", "int8").code == 0
    finally:
        now = os.umask(before)
    assert now == umask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes) >= {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_links_spaces_and_letters(cli, llama: Path, tmp_path: Path):
    """A hub cache is a directory of links; names are what their owners want."""
    source, link = tmp_path / "ein Modell mit Öl", tmp_path / "链接"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).symlink_to(path)
    link.symlink_to(source)
    out = tmp_path / "new" / "größer, 8 bit"
    assert cli("convert", out, "-m", link, "--quantize", "int8", "--json").json["directory"] == str(out)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert cli("run", "the cat", "-m", out, "-n", 2, "-q").code == 0
    assert files_of(source) == files_of(llama)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_equal_conversions_are_equal_bytes(checkpoints: Callable[..., Path], cli, llama: Path, tmp_path: Path):
    """Nothing of time or place is in them; what is not weights comes along unchanged."""
    for out in ("one", "two"):
        assert cli("convert", tmp_path / out, "-m", llama, "--quantize", "int4").code == 0
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert one[name] == (llama / name).read_bytes()
    config = json.loads(one["config.json"])
    assert config.pop("quantization_config")["method"] == "griffin-offload"
    assert config == json.loads((llama / "config.json").read_bytes())


def test_another_precision_of_the_computation(cli, converted):
    out = converted("llama2", "int8", torch.bfloat16)
    stored = stored_tensors(out)
    assert {tensor.dtype for name, tensor in stored.items() if "scale" in name} == {torch.bfloat16}
    outcome = cli("run", "the cat", "-m", out, "-n", 4, "--dtype", "float32", "--density", "0.5", "--json")
    assert (outcome.code, outcome.json["generated_tokens"]) == (0, 4)
    assert cli("plan", "-m", out, "--dtype", "float32", "--json").json["precision"] == "int8"


@both
def test_layouts_have_numbers(cli, converted, precision: str):
    """int8 has the one of the first release: its copies are read as they are."""
    out = converted("llama2", precision)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["version"] == 1 + (precision == "int4")
    assert cli("run", "the cat", "-m", out, "--device", "cpu", "-n", 2, "-q").code == 0
