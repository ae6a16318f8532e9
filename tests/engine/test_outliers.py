"""Models with outlier weights and channels, as trained ones have them: every quantised path keeps them."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import quantised_reference as ref
import torch
from marks import every_pair
from reference import masked_after_prefill
from safetensors.torch import load_file
from tiny_models import SUPER_WEIGHT, VOCAB, with_outliers, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from griffin_offload import GriffinModel
from griffin_offload.engine.convert import convert
from griffin_offload.formats import compensation, grouped
from griffin_offload.transformers_api import CACHE

DOWN = "model.layers.{i}.mlp.down_proj"
PROMPT = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(4))
NEW_TOKENS = 6
# Of the logits' norm. What one scale a row makes of the int4 models is far beyond it: see the last test.
LARGEST_ERROR = {"int8": 0.1, "int4": 0.35, "int3": 0.7, "int2": 1.2}
# Of a large weight.
MOST_OFF = {"int8": 0.1, "int4": 0.1, "int3": 0.2, "int2": 0.25}

PRECISIONS = {precision: precision for precision in LARGEST_ERROR}
WAYS = {"on the way": False, "converted": True}
DENSITIES, STREAMED = {"1.0": 1.0, "0.5": 0.5}, {"False": False, "True": True}
DTYPES = {"dtype0": torch.float32, "dtype1": torch.bfloat16}


def _save(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    write_tokenizer(directory)  # so that inputs are measured, and errors count by them
    return directory


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`outliers(precision)` is the directory of the model, as it is or converted."""
    root = tmp_path_factory.mktemp("outliers")
    _save(with_outliers(), root / "none")

    def directory(precision: str = "none") -> Path:
        if not (root / precision).exists():
            convert(root / "none", root / precision, precision)
        return root / precision

    return directory


@pytest.fixture(scope="module")
def dense(outliers: Callable[..., Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(outliers(), dtype=torch.float32)


def _load(path: Path, precision: str, density: float, **options: object) -> GriffinModel:
    options = {"max_gpu_mem": "100MB", "ctx_size": 64, "quantize": precision, "density": density} | options
    return GriffinModel.from_pretrained(path, device="cpu", **options)


@torch.no_grad()
def _dense_logits(model: PreTrainedModel, tokens: Tensor, sets: list[Tensor]) -> Tensor:
    """Of the last token of the prompt and of those after it, which pass the chosen neurons alone."""
    with masked_after_prefill(model, DOWN, sets) if sets else contextlib.nullcontext():
        out = model(PROMPT, use_cache=True)
        logits = [out.logits[:, -1]]
        for token in tokens[0, PROMPT.shape[1] : -1]:
            out = model(token.view(1, 1), use_cache=True, **{CACHE: out[CACHE]})
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("always_stream", "density", "converted", "precision"),
    every_pair(STREAMED, DENSITIES, WAYS, PRECISIONS, odd=True, quick=6),
)
def test_logits_stay_near_those_of_16_bit(precision, converted, density, always_stream, outliers, dense):
    path = outliers(precision if converted else "none")
    model = _load(path, precision, density, always_stream=always_stream)
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for _ in range(2 if always_stream else 1):  # a second prompt finds what the first has left
        output = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, **options)
        sets = list(model.selected.values()) if density < 1 else []
        expected = _dense_logits(dense, output.sequences, sets)
        assert _error(torch.stack(output.logits), expected) < LARGEST_ERROR[precision]


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_where_tokens_are_huge_down_projections_lie_in_rows(density, outliers, dense, tmp_path, monkeypatch):
    assert not any(name.endswith("down_proj.scale") for name in _stored(outliers("int4")))
    monkeypatch.setattr(compensation, "HUGE", 0.5)  # so that every token is
    convert(outliers(), tmp_path / "rows", "int4")
    names = {name.removesuffix(".groups") for name in _stored(tmp_path / "rows") if name.endswith("down_proj.groups")}
    assert {f"{name}.scale" for name in names} < set(_stored(tmp_path / "rows"))
    model = _load(tmp_path / "rows", "int4", density)
    output = model.generate(
        PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert model.resident_bytes == model.plan.resident_bytes
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
    expected = _dense_logits(dense, output.sequences, list(model.selected.values()) if density < 1 else [])
    assert _error(torch.stack(output.logits), expected) < LARGEST_ERROR["int4"]


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_on_the_way_all_neurons_rest_in_rows_and_chosen_ones_in_strips(density, outliers):
    model = _load(outliers(), "int4", density)
    model.generate(PROMPT, max_new_tokens=2, do_sample=False)
    downs = [module for name, module in model.model.named_modules() if name.endswith("down_proj")]
    assert {module.layout.name for module in downs} == {"int4_rows" if density == 1 else "int4_strips"}
    assert model.resident_bytes == model.plan.resident_bytes


def _stored(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_one_scale_a_row_would_lose_them(outliers):
    """What is asked above tells formats apart."""
    dense = AutoModelForCausalLM.from_pretrained(outliers(), dtype=torch.float32)
    tokens = torch.cat([PROMPT, PROMPT[:, :NEW_TOKENS]], dim=1)
    expected = _dense_logits(dense, tokens, [])
    with torch.no_grad():
        for name, matrix in ref.layer_matrices(dense).items():
            rows = matrix.t() if name.endswith("down_proj") else matrix
            step = 0.34 * rows.square().mean(1, keepdim=True).sqrt()
            rows.copy_(((rows / step + 7.5).round().clamp(0, 15) - 7.5) * step)
    assert _error(_dense_logits(dense, tokens, []), expected) > 2 * LARGEST_ERROR["int4"]


# Beginning and end of rows and of groups; two in a row, of either sign.
PLACES = ((0, 0, 1), (7, 31, -1), (40, 32, 1), (63, -1, -1), (-1, 100, 1), (-1, -33, -1))


@torch.no_grad()
def _with_super_weights() -> PreTrainedModel:
    """In every matrix of a layer, and not beside channels that count hundreds of times as much."""
    model = with_outliers(gain=1.0)
    for matrix in ref.layer_matrices(model).values():
        size = float(matrix.square().mean().sqrt())
        for row, column, sign in PLACES:
            matrix[row, column] = sign * SUPER_WEIGHT * size
    return model


def _resident(tensors: dict[str, Tensor]) -> Tensor:
    """The matrix [O, I] that decoding multiplies by, of a module's tensors."""
    if tensors["weight"].dtype == torch.int8:
        columns = tensors.get("input_scale", torch.ones(tensors["weight"].shape[1])).double()
        return tensors["weight"].double() * tensors["scale"].double()[:, None] * columns
    if tensors["weight"].dim() == 3:
        rows = ref.strips_as_rows(tensors["weight"], tensors["groups"])
        tensors = {"weight": rows[0], "groups": rows[1], "input_scale": tensors["input_scale"]}
    return ref.grouped_matrix(tensors)


@pytest.mark.parametrize(("dtype", "converted", "precision"), every_pair(DTYPES, WAYS, PRECISIONS))
def test_weights_of_30_rms_come_back(precision: str, converted: bool, dtype: torch.dtype, tmp_path: Path):
    model = _with_super_weights().to(dtype)
    path = _save(model, tmp_path / "none")
    if converted:
        path = tmp_path / precision
        convert(tmp_path / "none", path, precision)
        stored = _stored(path)
        decode = lambda t: ref.grouped_matrix(t) if "groups" in t else _resident(t)  # noqa: E731
        _check_places(model, stored, decode, MOST_OFF[precision])
    loaded = _load(path, precision, 1.0)
    loaded.generate(PROMPT, max_new_tokens=2, do_sample=False)
    _check_places(model, dict(loaded.model.named_parameters()), _resident, MOST_OFF[precision])


def _check_places(
    model: PreTrainedModel, tensors: dict[str, Tensor], decode: Callable[[dict[str, Tensor]], Tensor], off: float
) -> None:
    matrices = ref.layer_matrices(model)
    assert len(matrices) == 2 * 7
    for name, matrix in matrices.items():
        parts = ("weight", "groups", "scale", "input_scale")
        found = decode({part: tensors[f"{name}.{part}"].detach() for part in parts if f"{name}.{part}" in tensors})
        for row, column, _ in PLACES:
            expected = float(matrix[row, column].detach())
            assert float(found[row, column]) == pytest.approx(expected, rel=off), (name, row, column)


def test_large_weights_that_are_missed_are_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """How many, where the worst is, and by how much: as the stored files have it."""
    monkeypatch.setattr(grouped, "LARGE", 4.0)
    monkeypatch.setattr(grouped, "OFF", 0.05)
    model = with_outliers()
    path = _save(model, tmp_path / "model")
    with pytest.warns(UserWarning, match="large weights come back from int4") as warned:
        convert(path, tmp_path / "int4", "int4")
    stored = _stored(tmp_path / "int4")
    count, worst = 0, (0.0, "")
    for name, matrix in ref.layer_matrices(model).items():
        parts = ("weight", "groups", "scale", "input_scale")
        tensors = {part: stored[f"{name}.{part}"] for part in parts if f"{name}.{part}" in stored}
        scale = tensors["input_scale"] if "input_scale" in tensors else tensors["scale"][:, None]
        off = (ref.grouped_matrix(tensors) / matrix.detach().double() - 1).abs()[matrix.detach().abs() > 4 * scale]
        count += int((off > 0.05).sum())
        worst = max(worst, (float(off.max()) if off.numel() else 0.0, name))
    assert count > 1
    assert len(warned) == 1
    assert str(warned[0].message).startswith(f"{count} large weights come back from int4 more than ")
    assert f"the worst by {worst[0]:.0%}, in {worst[1]}" in str(warned[0].message)


def test_nothing_is_said_where_nothing_is_missed(tmp_path: Path):
    """Warnings are errors here."""
    path = _save(_with_super_weights(), tmp_path / "model")
    for precision in ("int4", "int8"):
        convert(path, tmp_path / precision, precision)
