"""The door of formats: one that is registered at run time passes everything, and facts of formats live nowhere else."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import quantised_reference as ref
import torch
from tiny_models import ARCHITECTURES, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM

import griffin_offload
from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import FORMAT_NAMES, LoadConfig
from griffin_offload.engine.convert import convert
from griffin_offload.engine.spec import examine
from griffin_offload.errors import UnsupportedModel, UsageError
from griffin_offload.formats import Format, every, forget_format, get, planned_as, register_format
from griffin_offload.formats.base import Tensors
from griffin_offload.formats.int8 import RowScaled
from griffin_offload.kernels import table
from griffin_offload.kv_cache.sequence_file import options_of

NEW_TOKENS = 6
PROMPT = torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))


class FP8(RowScaled):
    """Floats of 8 bits (e4m3): torch rounds and translates them, no kernel multiplies them."""

    name, number_type, largest = "fp8", torch.float8_e4m3fn, 448.0


VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
VALUES = VALUES[VALUES.isfinite()]


def _fp8_values(weight: Tensor, dtype: torch.dtype, *, is_down: bool) -> Tensor:
    """What `weight` becomes: the nearest of all 254 numbers, tried one by one."""
    columns = ref.int8_input_scale(weight).to(dtype) if is_down else torch.ones(weight.shape[1], dtype=dtype)
    largest = (weight.float() / ref.divisor(columns).float()).abs().amax(1)
    rows = (largest / 448).to(dtype)
    quotient = weight.float() / ref.divisor(columns).float() / ref.divisor(rows).float()[:, None]
    nearest = (quotient[..., None] - VALUES).abs().argmin(-1)
    return VALUES[nearest].double() * rows.double()[:, None] * columns.double()


@pytest.fixture
def fp8() -> Iterator[Format]:
    format = FP8()
    register_format(format)
    yield format
    forget_format(format)


def _load(path: Path, **options: object) -> GriffinModel:
    settings = {"device": "cpu", "max_gpu_mem": "100MB", "ctx_size": 64, "keep_prompts": True}
    return GriffinModel.from_pretrained(path, **(settings | options))


def _check(model: GriffinModel, path: Path, name: str) -> None:
    """Logits and tokens against a dense model whose matrices were rounded by the formula."""
    output = model.generate(
        PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    down, neurons = ARCHITECTURES[name].down, ARCHITECTURES[name].neurons
    inputs, sets = (PROMPT, torch.ones_like(PROMPT)), list(model.selected.values()) or None
    tokens, expected = ref.quantised_generate(dense, down, neurons, _fp8_values, inputs, sets, NEW_TOKENS, head=False)
    logits = torch.stack(output.logits)
    assert (logits - expected).norm() < 1e-3 * expected.norm()
    assert torch.equal(output.sequences, tokens)


@pytest.mark.parametrize("name", ["llama2", "phi3", "gpt2"])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_format_of_ones_own_runs(name: str, density: float, fp8: Format, checkpoints):
    """Gate and up apart and in one, and matrices that are stored the other way around."""
    path = checkpoints(name)
    model = _load(path, quantize="fp8", density=density)
    assert model.plan.precision == "fp8"
    assert model.resident_bytes == model.plan.resident_bytes
    _check(model, path, name)
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


def test_it_is_converted_to(fp8: Format, checkpoints, tmp_path: Path):
    """A copy runs as what is quantised on the way."""
    path, copy = checkpoints("llama2"), tmp_path / "copy"
    convert(path, copy, "fp8")
    assert open_checkpoint(copy).precision is fp8
    sources = [(copy, {}), (path, {"quantize": "fp8"})]
    logits = [_logits(_load(source, density=1.0, **options)) for source, options in sources]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)  # multiplied in other blocks
    streamed = _load(copy, density=0.5)
    assert torch.isfinite(_logits(streamed)).all()
    assert streamed.last_report.decode_streamed_bytes == 0


def test_a_saved_prompt_says_what_it_needs(fp8: Format, checkpoints, tmp_path: Path):
    path, file = checkpoints("llama2"), tmp_path / "saved"
    model = _load(path, quantize="fp8", density=0.5)
    context = model.new_context()
    told = model.generate(PROMPT, context=context, max_new_tokens=NEW_TOKENS, do_sample=False)
    model.save_context(context, file)
    options = options_of(file, model=open_checkpoint(path).fingerprint())
    assert options["quantize"] == "fp8"
    later = _load(path, **{**options, "ctx_size": 64})
    longer = torch.cat([told, PROMPT[:, :5]], dim=1)
    again = later.generate(longer, context=later.load_context(file)[0], max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = model.generate(longer, context=context, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(again, expected)
    forget_format(fp8)
    try:
        with pytest.raises(UnsupportedModel, match="fp8 is no weight format here, there are none, int8, int4, int3"):
            options_of(file, model=open_checkpoint(path).fingerprint())
    finally:
        register_format(fp8)


def _logits(model: GriffinModel) -> Tensor:
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    return torch.stack(model.generate(PROMPT, max_new_tokens=NEW_TOKENS, **options).logits)


def test_it_is_planned(fp8: Format, checkpoints):
    """ "auto" tries it between those of more and of fewer bits, at the bytes of its own tensors."""
    assert FORMAT_NAMES == ["none", "int8", "fp8", "int4", "int3", "int2"]
    spec = examine(checkpoints("llama2"), LoadConfig(device="cpu", max_gpu_mem="100MB"))
    sizes = {shape.precision.name: shape.layers[0] for shape in spec.shapes}
    assert list(sizes) == ["none", "int8", "fp8", "int4"]
    assert sizes["fp8"].neuron_bytes == sizes["int8"].neuron_bytes > sizes["int4"].neuron_bytes


class Foreign(FP8):
    """Stored as FP8 is, and not closed: its neurons rest as int4."""

    name = "foreign"

    def rests_as(self) -> Format:
        return get("int4")

    def floats(self, full: Tensors, dtype: torch.dtype, *, is_down: bool) -> Tensor:
        weight = full["weight"].to(dtype) * full["scale"][:, None]
        return weight * full["input_scale"] if is_down else weight


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_format_that_is_not_closed_rests_as_another(density: float, checkpoints, tmp_path: Path):
    """Its copy against int4 residents of the matrices that it stands for."""
    format, path, copy = Foreign(), checkpoints("llama2"), tmp_path / "copy"
    register_format(format)
    try:
        convert(path, copy, "foreign")
        model = _load(copy, density=density, keep_prompts=False)
        assert model.plan.precision == "int4"
        assert model.resident_bytes == model.plan.resident_bytes
        found = _logits(model)
        dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        down, neurons = ARCHITECTURES["llama2"].down, ARCHITECTURES["llama2"].neurons
        for feed_forward in (False, True):
            ref.round_layers(dense, down, neurons, _fp8_values, feed_forward=feed_forward)
        inputs, sets = (PROMPT, torch.ones_like(PROMPT)), list(model.selected.values()) or None
        _, expected = ref.quantised_generate(dense, down, neurons, "int4", inputs, sets, NEW_TOKENS)
        assert (found - expected).norm() < 5e-3 * expected.norm()
        with pytest.raises(UsageError, match="exact mode needs residents in the stored precision"):
            _load(copy, exact=True)
    finally:
        forget_format(format)


def test_names_are_known_once(fp8: Format):
    with pytest.raises(UsageError, match="there is a weight format fp8 already"):
        register_format(FP8())
    with pytest.raises(UsageError, match=r"no weight format int5: give one of none, int8, fp8, int4, int3"):
        get("int5")
    assert pickle.loads(pickle.dumps(fp8)) is fp8
    assert planned_as("bfloat16").is_plain
    assert planned_as("fp8") is fp8
    forget_format(fp8)
    assert "fp8" not in FORMAT_NAMES
    assert not any(kernel.layout == "fp8" for kernel in table.rows())
    register_format(fp8)


# Facts of formats live nowhere else.

PACKAGE = Path(griffin_offload.__file__).parent
# Words of others: of OpenAI's API, of uvicorn, of bitsandbytes, peft and GGUF.
OTHERS = {
    ("serving/requests.py", "none"),
    ("serving/server.py", "none"),
    ("serving/tools.py", "none"),
    ("serving/tokenization.py", "none"),
    ("serving/messages_api.py", "none"),
    ("checkpoint/quantisation_config.py", "int8"),
    ("checkpoint/adapter.py", "none"),
    ("checkpoint/gguf_config.py", "none"),
    ("checkpoint/gguf_architectures.py", "none"),
    ("checkpoint/gguf_tokenizer.py", "none"),
}
# Where names of formats are listed, for what starts without torch.
LISTED = {"config.py"}


def _outside() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if name.split("/")[0] not in ("formats", "kernels"):
            yield name, ast.parse(path.read_text())


def test_no_name_of_a_format_or_layout_is_written_elsewhere():
    names = {format.name for format in every()} | {layout.name for f in every() for layout in f.layouts()}
    found = {
        (name, node.value)
        for name, tree in _outside()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert {(name, value) for name, value in found - OTHERS if name not in LISTED} == set()


def test_not_quantised_is_asked_of_the_format():
    """A tensor's type says it of no format of 8-bit floats. Where it is asked, ids are told from what is no id, and
    tables of integers from floats of another precision."""
    asked = {
        name
        for name, tree in _outside()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "is_floating_point"
    }
    integers = {"checkpoint/registry.py", "checkpoint/decoding.py", "checkpoint/adapter.py", "engine/build.py"}
    assert asked == {"engine/options.py", "engine/decode_graph.py", "kv_cache/sequence_file.py"} | integers


def test_every_layout_can_be_multiplied_by_torch():
    for format in every():
        for layout in format.layouts():
            products = [k for k in table.rows() if k.layout == layout.name and k.operation in ("gemv", "gemm")]
            last = products[-1]
            assert (last.operation, last.device, last.takes, last.numbers) == ("gemm", None, None, None)
            assert not last.ours
