"""Files whose matrices lie on grids of four bits: they rest in int4 by their own codes, and what they hold in more bits
rests in more."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from support.gguf_files import write_gguf

from griffin_offload import GriffinModel
from griffin_offload.blocks.layouts import find_feed_forwards
from griffin_offload.checkpoint.gguf_blocks import BlockDecoder, block_types
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import LoadConfig
from griffin_offload.engine import shards
from griffin_offload.engine.build import build
from griffin_offload.engine.convert import convert
from griffin_offload.engine.residents import materialise
from griffin_offload.engine.spec import examine, plan_for
from griffin_offload.errors import SavedContextError
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.int4 import INT4
from griffin_offload.formats.int8 import INT8
from griffin_offload.formats.translated import TranslatedTensor, in_memory, stacked
from griffin_offload.kv_cache.sequence_file import options_of
from griffin_offload.planner.tiers import expected_error

IDS = torch.arange(5, 45)[None]
OPTIONS = {"device": "cpu", "ctx_size": 64, "max_gpu_mem": "1GB", "dtype": "bfloat16"}
IN_MORE_BITS = {f"blk.{layer}.{matrix}": "Q8_0" for layer, matrix in ((0, "attn_output"), (1, "ffn_down"))}
"""As llama.cpp's Q4_K_M has some in Q6_K."""


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory, checkpoints) -> tuple[Path, Path]:
    """A file in Q4_0 with a tokenizer, and its copy in int4."""
    root = tmp_path_factory.mktemp("four")
    file = write_gguf(wide_model(), root / "tiny.gguf", "Q4_0", tokenizer=checkpoints("llama2"))
    return file, convert(file, root / "out", "int4").directory


def wide_model(neurons: int = 512) -> Any:
    """Rows of whole blocks of 256."""
    sizes = {"hidden_size": 256, "intermediate_size": neurons, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=320, num_key_value_heads=2, max_position_embeddings=512, **sizes)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_int4_takes_over_the_codes_of_rows_in_four_bits(kind: str):
    """Byte for byte, where a row's grids are the nearest that int4 has; counted downwards where a step is below 0."""
    of = getattr(gguf.GGMLQuantizationType, kind)
    numbers, nbytes = gguf.GGML_QUANT_SIZES[of]
    drawn = np.random.default_rng(0)
    if kind == "Q4_K":  # the package only reads it: codes and 6-bit steps of any kind, around 0
        blocks = drawn.integers(0, 256, (48, 512 // numbers, nbytes), dtype=np.uint8)
        blocks[..., :4] = np.array([0.002, 0.014], dtype=np.float16).view(np.uint8)
        blocks[..., 4:16] = np.array([40, 41, 42, 43, 44, 45, 46, 47] + [0x88] * 4, dtype=np.uint8)
        stored = blocks.reshape(48, -1)
    else:
        stored = gguf.quants.quantize(drawn.standard_normal((48, 512), dtype=np.float32), of)
    exact = torch.from_numpy(gguf.quants.dequantize(stored, of))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    decode = BlockDecoder(block_types()[int(of)], 48, 512, order)
    parts = (torch.from_numpy(stored).flatten(),)
    tensor = TranslatedTensor((48, 512), torch.float32, parts, decode)
    stored = tensor.codes()
    _, steps, lowest = stored
    codes = ((exact[order].view(48, -1, 32) - lowest[..., None]) / steps[..., None]).round()
    torch.testing.assert_close((codes * steps[..., None] + lowest[..., None]).flatten(1), exact[order])
    down = torch.where(steps[..., None] < 0, 15 - codes, codes).to(torch.uint8)
    found = INT4.taken_over(stored, torch.bfloat16)
    assert torch.equal(found["weight"].view(48, -1, 16), down[..., :16] | (down[..., 16:] << 4))
    anew = INT4.quantize(exact[order], torch.bfloat16, is_down=False)
    missed = []
    for tensors in (found, anew):
        back = INT4.unpack(tensors["weight"], tensors["groups"], torch.empty(48, 512)) * tensors["scale"][:, None]
        missed.append(float((back - exact[order]).norm() / exact.norm()))
    assert missed[0] < 0.02
    assert missed[0] < 1.01 * missed[1]
    assert kind == "Q4_1" or missed[0] < 0.6 * missed[1]  # of the others a group's ends are not its grid's
    transposed = BlockDecoder(block_types()[int(of)], 48, 512, transposed=True)
    assert TranslatedTensor((512, 48), torch.float32, parts, transposed).codes() is None


def test_a_copy_has_the_codes_of_its_file(four_bits: tuple[Path, Path]):
    full, copy = map(open_checkpoint, four_bits)
    parameters = dict(build(full).named_parameters())
    found = dict(build(copy).state_dict())
    taken = []
    for name, parameter in parameters.items():
        if f"{name.removesuffix('weight')}groups" in found:
            _, steps, lowest = parameter.codes()
            numbers = full.in_precision(torch.float32)
            exact = in_memory(dict(build(numbers).named_parameters())[name]).detach().view(*steps.shape, 32)
            codes = ((exact - lowest[..., None]) / steps[..., None]).round()
            codes = torch.where(steps[..., None] < 0, 15 - codes, codes).to(torch.uint8)
            taken.append(name)
            assert torch.equal(found[name].view(*steps.shape, 16), codes[..., :16] | (codes[..., 16:] << 4)), name
    assert {name.split(".")[-2] for name in taken} >= {"gate_proj", "down_proj", "o_proj"}


@pytest.mark.parametrize("asked", [{"density": 1.0}, {"density": 0.5}, {"quantize": "tiers", "bits": 3.5}], ids=str)
def test_on_the_way_are_the_codes_of_a_copy(asked: dict[str, Any], four_bits: tuple[Path, Path]):
    """Bit by bit, of whole layers and of neurons that a prompt chose; attention's in int8 are the same, too."""
    file, copy = four_bits
    stored = build(open_checkpoint(copy)).state_dict()
    options = {**OPTIONS, "dtype": "bfloat16", "quantize": "int4"} | asked
    with GriffinModel.from_pretrained(file, **options) as model:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        selected, found = model.engine.loaded.layers.selected, dict(model.model.named_parameters())
        assert bool(selected) == (asked != {"density": 1.0})
        counts = model.plan.counts
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
    compared = 0
    for name, tensor in found.items():
        if ".layers." not in name or "norm" in name or "down_proj" in name:
            continue
        index, whole = int(name.split(".")[2]), name.replace("._registered.0.", ".")
        if "_registered" in whole:
            continue  # in int3 and int2
        expected = stored[whole]
        if ".mlp." in name and selected:
            chosen = selected[index][: counts[index][0]]
            expected, tensor = expected[chosen], tensor[: len(chosen)]
        compared += 1
        assert torch.equal(tensor, expected), name
    assert compared >= 2 * 3 * 6


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_file_in_four_bits_rests_as_it_lies(kind: str, tmp_path: Path):
    """Unasked, however much memory there is: every matrix of the layers is the file's, but for what a second rounding
    of its grids takes, down projections too. One byte of a step more would be 6 % off."""
    file = write_gguf(wide_model(), tmp_path / "tiny.gguf", kind)
    exact = dict(build(open_checkpoint(file).in_precision(torch.float32)).named_parameters())
    options = OPTIONS | {"dtype": "bfloat16", "quantize": "auto"}
    with GriffinModel.from_pretrained(file, **options) as model:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        assert (model.plan.precision, model.plan.density, model.plan.streamed) == ("int4", 1.0, ())
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        modules = {n: m for n, m in model.model.named_modules() if getattr(m, "resident", None) is not None}
        found = {name: module for name, module in modules.items() if module.layout.format is INT4}
        assert {name.rpartition(".")[2] for name in found} >= {"gate_proj", "up_proj", "down_proj", "q_proj", "o_proj"}
        for name, module in found.items():
            numbers = in_memory(exact[f"{name}.weight"]).detach()
            back = module(torch.eye(numbers.shape[1], dtype=torch.float32)).t()
            assert (back - numbers).norm() < 0.025 * numbers.norm(), name


@pytest.mark.parametrize(
    ("kind", "neurons", "asked", "precision", "in_rows"),
    [
        ("Q4_0", 512, {"quantize": "auto", "density": 0.5}, "int4", False),
        ("Q4_0", 512, {"quantize": "layers", "bits": 6.5}, "layers", True),
        ("Q4_0", 480, {}, "int4", False),  # no whole strips of 64
        ("Q5_0", 512, {}, "bfloat16", False),
        ("Q4_0", 512, {"exact": True}, "bfloat16", False),
        ("Q4_0", 512, {"quantize": "none"}, "bfloat16", False),
    ],
    ids=str,
)
def test_what_else_becomes_of_files_in_blocks(
    kind: str, neurons: int, asked: dict[str, Any], precision: str, in_rows: bool, tmp_path: Path
):
    """Down projections rest in rows where all neurons stay, by whole strips, and lie on grids."""
    file = write_gguf(wide_model(neurons), tmp_path / "tiny.gguf", kind)
    options = {**OPTIONS, "dtype": "bfloat16", "quantize": "auto"} | asked
    with GriffinModel.from_pretrained(file, **options) as model:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        assert model.plan.precision == precision
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        downs = [module for name, module in model.model.named_modules() if name.endswith("down_proj")]
        assert any(getattr(down, "layout", None) is INT4.stored(is_down=False) for down in downs) == in_rows


def test_without_kernels_for_it_four_bits_are_as_others(tmp_path: Path):
    file = write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_0")
    found = {}
    for device in ("cpu", "cuda"):
        config = LoadConfig(device=device, max_gpu_mem="4GB", ctx_size=64, dtype="bfloat16")
        found[device] = plan_for(examine(file, config, anywhere=True)).precision
    assert found == {"cpu": "int4", "cuda": "bfloat16"}


@torch.no_grad()
def logits_of(file: Path, **options: Any) -> tuple[torch.Tensor, Any]:
    with GriffinModel.from_pretrained(file, **OPTIONS | options) as model:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        forms = {
            name: module.layout.format
            for name, module in model.model.named_modules()
            if ".layers." in name and getattr(module, "resident", None) is not None
        }
        return model.model(IDS).logits[0].float(), (model.plan, model.resident_bytes, forms)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_what_a_file_of_four_bits_holds_in_more_rests_in_int8(density: float, tmp_path: Path):
    """In the feed-forward and outside it, and in these layers alone."""
    file = write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_1", others=IN_MORE_BITS)
    exact, _ = logits_of(file, quantize="none", dtype="float32", density=density)
    finer, (plan, nbytes, forms) = logits_of(file, density=density)
    assert (plan.precision, plan.as_held) == ("int4", True)
    assert nbytes <= plan.resident_bytes <= 1.001 * nbytes  # rows of a down projection share a scale, neurons have one
    in_int8 = {name.split(".layers.")[1] for name, form in forms.items() if form is INT8}
    assert in_int8 == {"0.self_attn.o_proj", "1.mlp.down_proj"}
    if density == 1:
        coarse, (other, fewer, _) = logits_of(file, prefer="speed")
        assert (other.precision, other.as_held) == ("int4", False)
        assert fewer < 0.95 * nbytes
        assert (finer - exact).norm() < 0.7 * (coarse - exact).norm()


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_so_does_a_copy_of_it(density: float, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    """With nothing to say; the copy has as many bytes as are promised, and its residents, too."""
    file, copy = write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_1", others=IN_MORE_BITS), tmp_path / "copy"
    convert(file, copy, "int4")
    assert not [one for one in recwarn if "in more than four bits" in str(one.message)]
    exact, _ = logits_of(file, quantize="none", dtype="float32", density=density)
    finer, (plan, nbytes, forms) = logits_of(copy, density=density)
    assert (plan.precision, plan.as_held) == ("int4", True)
    assert nbytes <= plan.resident_bytes <= 1.001 * nbytes
    in_int8 = {name.split(".layers.")[1] for name, form in forms.items() if form is INT8}
    assert in_int8 == {"0.self_attn.o_proj", "1.mlp.down_proj"}
    if density == 1:
        convert(write_gguf(wide_model(), tmp_path / "even.gguf", "Q4_1"), tmp_path / "even", "int4")
        coarse, (_, fewer, _) = logits_of(tmp_path / "even")
        assert fewer < 0.95 * nbytes
        assert (finer - exact).norm() < 0.8 * (coarse - exact).norm()


@pytest.mark.parametrize("others", [{}, IN_MORE_BITS], ids=["even", "mixed"])
def test_a_copy_answers_as_its_file(others: dict[str, str], tmp_path: Path):
    """Bit for bit with all neurons. Of chosen ones both round down projections once more, and the prompt passes the
    file's in 16 bits: whoever rounds them for the copy alone is further off."""
    file = write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_0", others=others)
    convert(file, tmp_path / "copy", "int4")
    at_once = {"ff_chunk_tokens": 64}  # kernels sum otherwise for fewer
    found = [logits_of(path, **at_once) for path in (file, tmp_path / "copy")]
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1][1] == found[1][1][1]
    assert found[0][1][0].precision == found[1][1][0].precision
    kl = [expected_error(spec.shape, plan.counts) for spec, plan in map(planned, (file, tmp_path / "copy"))]
    assert kl[0] == kl[1]
    few = {"density": 0.5, "selection": "random", **at_once}  # the same neurons
    exact, *near = (logits_of(path, **few)[0] for path in (file, file, tmp_path / "copy"))
    assert torch.equal(exact, near[0])
    assert (near[1] - exact).norm() < 0.05 * exact.norm()


def planned(path: Path) -> tuple[Any, Any]:
    spec = examine(path, LoadConfig(**OPTIONS))
    return spec, plan_for(spec)


def test_neurons_of_a_copy_are_rounded_as_those_of_its_file(tmp_path: Path):
    """Of the numbers in its rows; into the same strips again where an earlier prompt comes back."""
    convert(write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_0"), tmp_path / "copy", "int4")
    full = build(open_checkpoint(tmp_path / "copy")).get_submodule("model.layers.1.mlp.down_proj")
    rows = {name: parameter.detach() for name, parameter in full.named_parameters()}
    floats = INT4.chosen_floats(rows, torch.arange(512), torch.bfloat16, is_down=True)
    with GriffinModel.from_pretrained(tmp_path / "copy", **OPTIONS, density=0.5, selection="output_aware") as model:
        down = model.model.get_submodule("model.layers.1.mlp.down_proj")
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        layers = model.engine.loaded.layers
        chosen = dict(layers.selected)
        assert down.layout is INT4.resident(is_down=True)
        expected = {name: torch.zeros_like(parameter) for name, parameter in down.named_parameters()}
        INT4.gather({"weight": floats}, FLOATS.stored(is_down=True), chosen[1], expected, is_down=True)
        for again in (False, True):
            for name, parameter in down.named_parameters():
                assert torch.equal(parameter, expected[name]), (name, again)
                parameter.detach().zero_()
            materialise(layers, chosen, torch.bfloat16)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_an_earlier_copy_loads_as_it_is(density: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its down projections lie as neurons, and rest in strips."""
    file = write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_0")
    with monkeypatch.context() as earlier:
        earlier.setattr(shards, "fits_rows", lambda *_: False)
        convert(file, tmp_path / "copy", "int4")
    shape = examine(tmp_path / "copy", LoadConfig(**OPTIONS)).shape
    _, blocks = find_feed_forwards(build(open_checkpoint(tmp_path / "copy")), 2)
    assert shape.layers[0].ff_bytes == sum(tensor.nbytes for tensor in blocks[0].full())
    with GriffinModel.from_pretrained(tmp_path / "copy", **OPTIONS, density=density) as model:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        down = model.model.get_submodule("model.layers.1.mlp.down_proj")
        assert (down.full, down.layout) == (INT4.stored(is_down=True), INT4.resident(is_down=True))
        assert model.resident_bytes == model.plan.resident_bytes


def test_every_plan_of_such_a_copy_counts_what_it_streams(tmp_path: Path):
    """To the byte, whatever the residents are in."""
    convert(write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_1", others=IN_MORE_BITS), tmp_path / "copy", "int4")
    _, blocks = find_feed_forwards(build(open_checkpoint(tmp_path / "copy")), 2)
    stored = [sum(tensor.nbytes for tensor in block.full()) for block in blocks]
    shapes = examine(tmp_path / "copy", LoadConfig(**OPTIONS)).shapes
    assert {shape.precision_name for shape in shapes} >= {"int4", "tiers"}
    assert [[layer.ff_bytes for layer in shape.layers] for shape in shapes] == len(shapes) * [stored]
    assert stored[1] > 1.1 * stored[0]


def test_in_exact_mode_such_a_copy_answers_as_with_all_neurons(tmp_path: Path):
    convert(write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_1", others=IN_MORE_BITS), tmp_path / "copy", "int4")
    answers = []
    for asked in ({"density": 1.0}, {"density": 0.5, "exact": True}):
        with GriffinModel.from_pretrained(tmp_path / "copy", **OPTIONS, **asked) as model:
            answers.append(model.generate(IDS, max_new_tokens=12, do_sample=False))
            assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
    assert torch.equal(*answers)


def test_tiers_of_such_a_copy_are_made_of_what_it_holds(tmp_path: Path):
    """Of int8 where that is what it has; what is no feed-forward stays in int8. The bytes are as planned."""
    convert(write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_1", others=IN_MORE_BITS), tmp_path / "copy", "int4")
    with GriffinModel.from_pretrained(tmp_path / "copy", **OPTIONS, quantize="tiers", bits=3.5) as model:
        model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert model.plan.precision == "tiers"
        assert model.resident_bytes == model.plan.resident_bytes
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        down, o_proj = (
            model.model.get_submodule(f"model.layers.{name}") for name in ("1.mlp.down_proj", "0.self_attn.o_proj")
        )
        assert (down.full.format, o_proj.resident.format) == (INT8, INT8)
        assert {tier.resident.format.name for tier in down.tiers} <= {"int4", "int3", "int2"}


def test_with_less_memory_comes_four_bits_for_all(tmp_path: Path):
    """Before any neuron is left out or in fewer."""
    file = write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_1", others=IN_MORE_BITS)
    config = LoadConfig(**OPTIONS, kv_bits=16)
    plan = plan_for(examine(file, config))
    while plan.as_held:
        assert (plan.precision, plan.density) == ("int4", 1.0)
        plan = plan_for(examine(file, replace(config, max_gpu_mem=str(plan.peak_bytes - 1))))
    assert (plan.precision, plan.density) == ("int4", 1.0)
    _, (found, _, forms) = logits_of(file, max_gpu_mem=str(plan.budget_bytes), kv_bits=16)
    assert found == plan
    assert INT8 not in forms.values()


def test_a_saved_context_belongs_to_one_of_the_two(tmp_path: Path):
    file, saved = write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q4_1", others=IN_MORE_BITS), tmp_path / "saved"
    with GriffinModel.from_pretrained(file, **OPTIONS) as model:
        context = model.new_context()
        model.generate(IDS, max_new_tokens=2, do_sample=False, context=context)
        model.save_context(context, saved)
        again = options_of(saved, model=open_checkpoint(file).fingerprint())
    assert again["quantize"] == "int4"
    with GriffinModel.from_pretrained(file, **OPTIONS | again) as model:
        assert len(model.load_context(saved)[0].tokens) == IDS.shape[1] + 1  # the last one has not passed
    with (
        GriffinModel.from_pretrained(file, **OPTIONS, prefer="speed") as model,
        pytest.raises(SavedContextError, match=r'another precision \("int4 and more", now "int4"\)'),
    ):
        model.load_context(saved)


def test_of_files_in_more_bits_int4_is_all_in_four(tmp_path: Path):
    """Where it is asked for: it would be int8 by another name."""
    file = write_gguf(wide_model(), tmp_path / "tiny.gguf", "Q8_0", others=dict.fromkeys(IN_MORE_BITS, "Q4_1"))
    _, (plan, _, forms) = logits_of(file, quantize="int4")
    assert not plan.as_held
    assert INT8 not in forms.values()


# Experts: of a file that has all of a layer in one tensor, and of one that has each by itself.


def test_a_stack_of_matrices_has_the_codes_of_each():
    """Of gate and up of an expert, one above the other; None where one lies on no grid."""
    matrices = []
    for seed, kind in enumerate(("Q4_0", "Q4_1", "Q4_1", "Q8_0")):
        of = gguf.GGMLQuantizationType[kind]
        stored = gguf.quants.quantize(np.random.default_rng(seed).standard_normal((8, 64), dtype=np.float32), of)
        decode = BlockDecoder(block_types()[int(of)], 8, 64)
        matrices.append(TranslatedTensor((8, 64), torch.float32, (torch.from_numpy(stored).flatten(),), decode))
    tensor = stacked((2, 16, 64), torch.float32, [matrices[:2], matrices[2:]])
    found = tensor.codes_of(0)
    torch.testing.assert_close(found.numbers(), tensor.translated()[0])
    assert tensor.codes_of(1) is None
