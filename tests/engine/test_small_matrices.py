"""Keys' and values' matrices of grouped queries rest in int8 beside int4 and less, and are stored so."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import quantised_reference as ref
import torch
from safetensors import safe_open
from tiny_models import HIDDEN, LAYERS, MAX_POSITIONS, VOCAB, randomised, write_tokenizer
from transformers import LlamaConfig

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.checkpoint.safetensors import UNFINISHED
from griffin_offload.cli.main import main
from griffin_offload.config import LoadConfig
from griffin_offload.engine import convert as conversion
from griffin_offload.engine.convert import convert
from griffin_offload.engine.spec import examine, plan_for
from griffin_offload.errors import CheckpointError, UsageError
from griffin_offload.formats import get

SMALL_MATRICES = ("self_attn.k_proj", "self_attn.v_proj")
Ask = dict[str, Any]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose four queries share one key and value."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
    )
    directory = tmp_path_factory.mktemp("grouped")
    randomised(config, seed=3).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def copies(grouped: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("copies")

    def copy(precision: str) -> Path:
        if not (root / precision).exists():
            convert(grouped, root / precision, precision)
        return root / precision

    return copy


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _load(path: Path, **asked: Any) -> GriffinModel:
    return GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="100MB", ctx_size=64, **asked)


def _check(model: GriffinModel, stored: dict[str, torch.Tensor], form: str) -> None:
    """Products are those of the rounded matrices, and bytes the plan's."""
    products: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for index, layer in enumerate(model.model.model.layers):
        assert layer.self_attn.q_proj.layout.format is get("int4")
        for name in SMALL_MATRICES:
            module, key = layer.get_submodule(name), f"model.layers.{index}.{name}.weight"
            assert module.layout.format is get(form)
            module.register_forward_hook(lambda _, x, y, key=key: products.setdefault(key, []).append((x[0], y)))
    model.generate(torch.randint(3, VOCAB, (1, 20)), max_new_tokens=4, do_sample=False)
    assert len(products) == LAYERS * len(SMALL_MATRICES)
    for key, found in products.items() if form == "int8" else ():
        rounded = ref.stored_values(stored[key], "int8", torch.float32, is_down=False).float()
        assert len(found) >= 4
        for x, y in found:
            expected = torch.nn.functional.linear(x, rounded)
            assert (y - expected).norm() < 2e-4 * expected.norm()
    assert model.resident_bytes == model.plan.resident_bytes
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        (None, {"quantize": "int4", "density": 0.5}),
        (None, {"quantize": "int4", "density": 1.0}),
        (None, {"quantize": "tiers", "bits": 3.0}),
        ("int4", {"density": 0.5}),
        ("int4", {"density": 0.5, "exact": True}),
        ("tiers", {"quantize": "tiers", "bits": 3.0}),
        ("int8", {"quantize": "tiers", "bits": 3.0}),
    ],
    ids=str,
)
def test_products_and_bytes(grouped: Path, copies: Callable[[str], Path], source: str | None, asked: Ask):
    model = _load(grouped if source is None else copies(source), **asked)
    _check(model, dict(_tensors(grouped)), "int8")


@pytest.mark.parametrize("precision", ["int4", "tiers"])
def test_a_copy_has_them_so(grouped: Path, copies: Callable[[str], Path], precision: str):
    """And says so; what is known of it is what is read."""
    copy, originals = copies(precision), dict(_tensors(grouped))
    found = dict(_tensors(copy))
    assert json.loads((copy / "config.json").read_text())["quantization_config"]["small"] == "int8"
    checkpoint = open_checkpoint(copy)
    for index in range(LAYERS):
        for name in SMALL_MATRICES:
            key = f"model.layers.{index}.{name}"
            assert f"{key}.groups" not in found
            values = found[f"{key}.weight"].double() * found[f"{key}.scale"].double()[:, None]
            expected = ref.stored_values(originals[f"{key}.weight"], "int8", torch.float32, is_down=False)
            torch.testing.assert_close(values, expected)
            assert checkpoint.tensors()[f"{key}.weight"].format is get("int8")
        assert checkpoint.tensors()[f"model.layers.{index}.self_attn.q_proj.weight"].format is checkpoint.precision
    spec = examine(copy, LoadConfig(device="cpu", quantize="int4", max_gpu_mem="100MB"))
    original = examine(grouped, LoadConfig(device="cpu", quantize="int4", max_gpu_mem="100MB"))
    assert plan_for(spec).resident_bytes == plan_for(original).resident_bytes
    attention = sum(tensor.nbytes for name, tensor in found.items() if ".self_attn." in name)
    assert sum(layer.attention_bytes for layer in spec.shape.layers) == attention


def test_copies_of_before_stay_as_they_are(grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing becomes 8 bits that was stored in 4, and no copy is half of one and half of the other."""
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "small_beside", lambda *_: None)
        convert(grouped, tmp_path / "before", "int4")
    mark = json.loads((tmp_path / "before" / "config.json").read_text())["quantization_config"]
    assert "small" not in mark
    _check(_load(tmp_path / "before", density=0.5), dict(_tensors(grouped)), "int4")
    del mark["method"]
    (tmp_path / "before" / UNFINISHED).write_text(json.dumps(mark))
    with pytest.raises(UsageError, match="unfinished conversion of another model or precision"):
        convert(grouped, tmp_path / "before", "int4")


def test_a_damaged_mark_is_refused(copies: Callable[[str], Path], tmp_path: Path):
    config = json.loads((copies("int4") / "config.json").read_text())
    config["quantization_config"]["small"] = "int2"
    for path in copies("int4").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="damaged quantization_config"):
        open_checkpoint(tmp_path)


def test_no_other_precision_has_them(grouped: Path, copies: Callable[[str], Path]):
    for path, quantize in ((grouped, "int8"), (grouped, "none"), (copies("int8"), "auto")):
        spec = examine(path, LoadConfig(device="cpu", quantize=quantize, max_gpu_mem="100MB"))
        assert all(shape.finer is None for shape in spec.shapes if shape.precision.bits >= 8)


def test_plans_tell_it(grouped: Path, copies: Callable[[str], Path], capsys: pytest.CaptureFixture[str]):
    names = ", ".join(SMALL_MATRICES)
    for path, asked, told in (
        (grouped, ["--quantize", "int4"], True),
        (copies("int4"), [], True),
        (grouped, ["--quantize", "int8"], False),
    ):
        flags = ["plan", "--model", str(path), "--device", "cpu", "--max-gpu-mem", "100MB", *asked]
        assert main([*flags, "-v"]) == 0
        assert (f"{names} in int8" in capsys.readouterr().out.splitlines()) == told
        assert main([*flags, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["small_matrices"] == ({"int8": list(SMALL_MATRICES)} if told else {})
