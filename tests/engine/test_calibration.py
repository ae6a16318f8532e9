"""How much errors count: what is known of inputs against hooks on dense transformers, their cache, and what is left
behind."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import quantised_reference as ref
import torch
from marks import by_turns, mostly_slow
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, MAX_POSITIONS, write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from griffin_offload.blocks.base import hooks_on
from griffin_offload.blocks.layouts import find_feed_forwards
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.engine import calibration
from griffin_offload.engine.build import build
from griffin_offload.engine.calibration import CACHE_VARIABLE, Importance, Inputs, importance_of, visit_inputs
from griffin_offload.engine.calibration_text import CALIBRATION_TEXT
from griffin_offload.engine.convert import convert
from griffin_offload.formats import get
from griffin_offload.formats.compensation import known_of

SEQUENCES, TOKENS = 16, 128


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every forward that measures."""
    seen: list[int] = []
    measured = calibration.measure
    monkeypatch.setattr(calibration, "measure", lambda *args: (seen.append(1), measured(*args))[1])
    return seen


def _importance(directory: Path, *, evict: bool = False) -> tuple[Importance, nn.Module]:
    checkpoint = open_checkpoint(directory)
    model = build(checkpoint)
    decoder, blocks = find_feed_forwards(model, checkpoint.config.num_hidden_layers)
    return importance_of(checkpoint, model, decoder, blocks, evict=evict), model


@torch.no_grad()
def _expected(directory: Path, name: str) -> dict[str, Tensor]:
    """Inputs [T, I] by "layer.name", of a dense model in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(CALIBRATION_TEXT).input_ids
    begin = [ids.pop(0)] if ids[0] == tokenizer.bos_token_id else []  # of every sequence
    tokens = min(TOKENS, MAX_POSITIONS)
    own = tokens - len(begin)
    start, inputs = ARCHITECTURES[name].down.partition("{i}")[0], {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and path.startswith(start):
            layer = path.removeprefix(start)

            def keep(_: nn.Module, args: tuple[Tensor, ...], layer: str = layer) -> None:
                inputs.setdefault(layer, []).append(args[0].reshape(tokens, -1))

            module.register_forward_pre_hook(keep)
    for sequence in range(SEQUENCES):  # one at a time: there is no padding
        model(torch.tensor([begin + ids[sequence * own : (sequence + 1) * own]]), use_cache=False)
    return {layer: torch.cat(parts) for layer, parts in inputs.items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    by_turns(
        ("llama2", "gpt2", "phi3", "opt", "falcon_new", "gpt_neox", "gemma3", "bloom"),
        (torch.float32, torch.bfloat16),
        whole=("gpt2",),
    ),
)
def test_what_is_known_of_inputs(checkpoints: Callable[..., Path], name: str, dtype: torch.dtype):
    """Also of axes that are swapped, of fused matrices, and of numbers that the processor has no instructions for."""
    directory = checkpoints(name, dtype)
    found, _ = _importance(directory, evict=dtype == torch.bfloat16)
    expected = _expected(directory, name)
    assert found.keys() == expected.keys()
    for layer, x in expected.items():
        known, (counts, leading, _) = known_of(x), found[layer]
        assert found[layer].dtype == torch.float32
        assert found[layer].shape == known.shape
        if dtype == torch.float32:
            torch.testing.assert_close(counts, known[0], rtol=1e-3, atol=1e-6)
        else:  # rounded on the way, layer by layer
            assert (counts - known[0]).norm() < 0.1 * known[0].norm(), layer
        # Where two components are as large neither leads; and each is one in both directions.
        energies = [
            (x / known[0].sqrt() @ (of / known[0].sqrt())).norm() / (of / known[0].sqrt()).norm()
            for of in (leading, known[1])
        ]
        assert energies[0] > 0.95 * energies[1], layer


@torch.no_grad()
def _visited(directory: Path) -> tuple[list[dict[str, Tensor]], nn.Module]:
    checkpoint = open_checkpoint(directory)
    model = build(checkpoint)
    decoder, blocks = find_feed_forwards(model, checkpoint.config.num_hidden_layers)
    found: list[dict[str, Tensor]] = []

    def visit(index: int, inputs: Inputs) -> None:
        assert index == len(found)
        found.append(dict(inputs))

    visit_inputs(checkpoint, model, decoder, blocks, visit)
    return found, model


@pytest.mark.parametrize("name", ["llama2", "gpt2", "phi3", "opt", "gemma3"])
def test_inputs_layer_by_layer(checkpoints: Callable[..., Path], name: str):
    """Of the same text of which something is known for every prompt."""
    directory = checkpoints(name, torch.float32)
    found, model = _visited(directory)
    _stock(model)
    expected, down = _expected(directory, name), ARCHITECTURES[name].down.partition("{i}.")[2]
    assert {f"{i}.{name}" for i, inputs in enumerate(found) for name in inputs} == expected.keys()
    length = min(TOKENS, MAX_POSITIONS)
    for index, inputs in enumerate(found):
        assert down in inputs
        assert len({len(x) for x in inputs.values()}) == 1
        for linear, x in inputs.items():
            assert x.shape[0] == SEQUENCES * length
            torch.testing.assert_close(x, expected[f"{index}.{linear}"], rtol=1e-3, atol=1e-4)


def test_modules_with_the_same_inputs_share_them(checkpoints: Callable[..., Path]):
    inputs = _visited(checkpoints("llama2"))[0][1]
    attention, feed_forward = (f"self_attn.{name}_proj" for name in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
    for names in (attention, feed_forward):
        assert len({id(inputs[name]) for name in names}) == 1
    assert len({id(x) for x in inputs.values()}) == 4


def test_converting_makes_up_for_errors(checkpoints: Callable[..., Path], tmp_path: Path):
    """Products with the inputs of the page err less than those of matrices that were rounded to the nearest."""
    directory = checkpoints("llama2", torch.float32)
    convert(directory, tmp_path / "out", "int4")
    shard = load_file(tmp_path / "out" / "model-00002-of-00004.safetensors")
    stored = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for name, x in _visited(directory)[0][1].items():
        weight = stored[f"model.layers.1.{name}.weight"]
        tensors = {key: shard[f"model.layers.1.{name}.{key}"] for key in ("weight", "groups")}
        kind = "input_scale" if name.endswith("down_proj") else "scale"
        tensors[kind] = shard[f"model.layers.1.{name}.{kind}"]
        plain = get("int4").quantize(weight, torch.float32, is_down=kind == "input_scale")
        errors = [(x.double() @ (ref.grouped_matrix(of) - weight).t()).norm() for of in (tensors, plain)]
        assert errors[0] < 0.95 * errors[1], name


def test_nothing_is_left_behind(checkpoints: Callable[..., Path]):
    """Neither hooks nor forwards of ours, whether it succeeds or fails."""
    directory = checkpoints("llama2", torch.bfloat16)
    with mock.patch.object(calibration, "emulates_halves", return_value=True):
        _, model = _importance(directory)
        _stock(model)
        checkpoint = open_checkpoint(directory)
        model = build(checkpoint)
        decoder, blocks = find_feed_forwards(model, checkpoint.config.num_hidden_layers)
        shutil.rmtree(os.environ[CACHE_VARIABLE])
        with (
            mock.patch.object(type(decoder[1]), "forward", side_effect=RuntimeError("in the middle")),
            pytest.raises(RuntimeError, match="in the middle"),
        ):
            importance_of(checkpoint, model, decoder, blocks, evict=False)
        _stock(model)


def _stock(model: nn.Module) -> None:
    for path, module in model.named_modules():
        assert not hooks_on(module), path
        assert "forward" not in vars(module), path


def test_the_cache_is_used(checkpoints: Callable[..., Path], cache: Path, passes: list[int]):
    first, _ = _importance(checkpoints("llama2"))
    again, _ = _importance(checkpoints("llama2"))
    assert passes == [1]
    assert len(list(cache.iterdir())) == 1
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    other, _ = _importance(checkpoints("reglu"))  # of another checkpoint
    assert passes == [1, 1]
    assert len(list(cache.iterdir())) == 2
    assert not torch.equal(other["1.mlp.gate_proj"], first["1.mlp.gate_proj"])


def test_loading_shares_it_and_converting_needs_none(checkpoints, tmp_path: Path, passes: list[int]):
    from griffin_offload import GriffinModel

    for _ in range(2):
        GriffinModel.from_pretrained(checkpoints("llama2"), device="cpu", max_gpu_mem="100MB", quantize="int4").close()
    convert(checkpoints("llama2"), tmp_path / "out", "int4")
    assert passes == [1]
    GriffinModel.from_pretrained(tmp_path / "out", device="cpu", max_gpu_mem="100MB").close()
    assert passes == [1]


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _other_names(file: Path) -> None:
    save_file({f"x{name}": tensor for name, tensor in load_file(file).items()}, file)


def _other_sizes(file: Path) -> None:
    save_file({name: tensor[:, :-1].clone() for name, tensor in load_file(file).items()}, file)


def _a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = {
    "cut": _cut,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no numbers"),
    "other names": _other_names,
    "other sizes": _other_sizes,
    "other types": lambda file: save_file({n: t.half() for n, t in load_file(file).items()}, file),
    "a folder": _a_folder,
}


@pytest.mark.parametrize("damage", mostly_slow(DAMAGES, 3))
def test_a_damaged_file_is_measured_again(checkpoints, cache: Path, passes: list[int], damage: str):
    first, _ = _importance(checkpoints("llama2"))
    DAMAGES[damage](next(cache.iterdir()))
    again, _ = _importance(checkpoints("llama2"))
    assert passes == [1, 1]
    assert all(torch.equal(again[name], first[name]) for name in first)
    if damage != "a folder":  # and written again
        _importance(checkpoints("llama2"))
        assert passes == [1, 1]


@pytest.mark.parametrize("kind", ["file", "inside a file", "/proc"])
def test_a_cache_that_cannot_be_written_is_no_error(
    checkpoints, cache: Path, passes: list[int], kind: str, monkeypatch
):
    """Whoever runs the tests may write to folders that are read-only."""
    if kind == "/proc":
        monkeypatch.setenv(CACHE_VARIABLE, "/proc/nowhere")
    else:
        cache.write_text("")
        monkeypatch.setenv(CACHE_VARIABLE, str(cache if kind == "file" else cache / "inside"))
    for _ in range(2):
        assert _importance(checkpoints("llama2"))[0]
    assert passes == [1, 1]


def test_without_a_tokenizer_all_inputs_count_alike(tmp_path: Path, passes: list[int]):
    write_checkpoint("llama2", tmp_path / "model")
    assert _importance(tmp_path / "model")[0] == {}
    assert passes == []
    assert _visited(tmp_path / "model")[0] == [{}] * 3
    convert(tmp_path / "model", tmp_path / "out", "int4")


def test_a_tokenizer_of_another_model_is_not_used(checkpoints, tmp_path: Path, passes: list[int]):
    """Whose ids lie past the embeddings."""
    path = tmp_path / "model"
    model = ARCHITECTURES["llama2"].build()
    model.resize_token_embeddings(100)
    model.save_pretrained(path)
    for file in checkpoints("llama2").glob("tokenizer*"):
        shutil.copy(file, path)
    assert _importance(path)[0] == {}
    assert passes == []


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, checkpoints, tmp_path: Path):
    checkpoint = open_checkpoint(checkpoints("llama2"))
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert calibration.cache_path(checkpoint).parent == tmp_path / "xdg" / "griffin-offload"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibration.cache_path(checkpoint).parent == tmp_path / ".cache" / "griffin-offload"


def test_the_same_weights_without_a_tokenizer_have_none(checkpoints, tmp_path: Path):
    """What was measured with a tokenizer is not theirs."""
    path = checkpoints("llama2")
    assert _importance(path)[0]
    bare = Path(shutil.copytree(path, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    assert open_checkpoint(bare).fingerprint() == open_checkpoint(path).fingerprint()
    assert _importance(bare)[0] == {}
