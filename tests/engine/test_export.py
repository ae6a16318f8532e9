"""`export`: what is written is an ordinary checkpoint that computes what the chosen neurons compute."""

import contextlib
import functools
import json
import shutil
import unittest.mock
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from exports import chosen_on, prompts, sets_of
from foreign_formats import FORMATS, write_foreign
from gguf_files import write_gguf
from marks import mostly_slow
from packed_experts import write_mxfp4
from reference import masked_after_prefill
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, HYBRIDS, KINDS, MIXTURE_KINDS, MIXTURES, VOCAB, quick_first, write_tokenizer
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.engine import export as runtime
from griffin_offload.engine import export_files
from griffin_offload.engine.build import build
from griffin_offload.engine.convert import convert
from griffin_offload.errors import CheckpointError, UnsupportedModel, UsageError
from griffin_offload.formats.translated import in_memory

NO_NUMBER = "bloom"


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], runtime.Export]:
    """What is written of half of a checkpoint's neurons or experts, once for all tests that read it."""

    @functools.cache
    def of(name: str) -> runtime.Export:
        path = checkpoints(name)
        return runtime.export(path, tmp_path_factory.mktemp(name) / "out", chosen_on(path), 0.5)

    return of


@pytest.mark.parametrize("name", [*quick_first(KINDS), NO_NUMBER, "nemotron_h"])
def test_transformers_loads_it_and_computes_with_the_chosen_neurons(checkpoints, exported, tmp_path: Path, name: str):
    path, down = checkpoints(name), (ARCHITECTURES | HYBRIDS)[name].down
    dense = AutoModelForCausalLM.from_pretrained(path)
    if name == NO_NUMBER:
        with pytest.raises(UnsupportedModel, match="its config has no number for the neurons"):
            runtime.check(path, tmp_path / "out", 0.5)
        return
    found = exported(name)
    assert 0 < found.neurons < found.of_neurons
    smaller, info = AutoModelForCausalLM.from_pretrained(found.directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(smaller) is type(dense)
    ids = torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), masked_after_prefill(dense, down, sets_of(path, down, found.neurons)):
        dense(ids)  # masked from the second forward on
        expected = dense(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(smaller(ids).logits, expected, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def without_experts(model: Any, layers: Mapping[int, list[int]], routers: Collection[str]) -> Iterator[None]:
    """The `routers` give the experts of `layers` that are named no chance: their scores and biases are -inf."""
    rows: dict[int, list[int]] = {}
    for index, gone in layers.items():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if f"layers.{index}." in name and name in routers:
                rows[tensor.data_ptr()] = gone
                if tensor.dim() == 1:
                    tensor.data[gone] = -torch.inf
    linear = torch.nn.functional.linear

    def masked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found = linear(x, weight, bias)
        if weight.data_ptr() in rows:
            found[..., rows[weight.data_ptr()]] = -torch.inf
        return found

    with unittest.mock.patch("torch.nn.functional.linear", masked):
        yield


@pytest.mark.parametrize("name", mostly_slow(MIXTURE_KINDS, 3))
def test_experts_that_the_prompts_use_and_a_router_for_them(checkpoints, exported, tmp_path: Path, name: str):
    """Written as transformers saves such a model, and the same as where the others have no chance."""
    path = checkpoints(name)
    choice, found = chosen_on(path), exported(name)
    assert (found.unit, found.neurons, found.of_neurons) == ("experts", 4, 8)
    smaller, info = AutoModelForCausalLM.from_pretrained(found.directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    smaller.save_pretrained(tmp_path / "saved")
    written, saved = (
        {key: tuple(t.shape) for file in place.glob("*.safetensors") for key, t in load_file(file).items()}
        for place in (found.directory, tmp_path / "saved")
    )
    assert written == saved
    assert "griffin" not in (found.directory / "config.json").read_text()
    dense = AutoModelForCausalLM.from_pretrained(path)
    sizes = {key: tensor.shape for key, tensor in smaller.state_dict().items()}
    routers = {key for key, t in dense.state_dict().items() if t.shape != sizes[key] and ".experts." not in key}
    groups = getattr(dense.config, "n_group", None) or 1
    gone = {}
    for index, squared in choice.chosen_on.items():
        if squared.numel() == 8:
            weakest = squared.view(groups, -1).topk(4 // groups, largest=False).indices
            gone[index] = (weakest + 8 // groups * torch.arange(groups)[:, None]).flatten().tolist()
    ids = torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        full = dense(ids).logits
        with without_experts(dense, gone, routers):
            expected = dense(ids).logits
        assert (full - expected).abs().max() > 1e-3
        torch.testing.assert_close(smaller(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with GriffinModel.from_pretrained(found.directory, device="cpu", max_gpu_mem="1GB", density=1.0) as ours:
        torch.testing.assert_close(logits(ours.model, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selection", ["magnitude", "output_aware", "random"])
def test_other_selections(checkpoints, tmp_path: Path, selection: runtime.SelectionMethod):
    path = checkpoints("llama3")
    choice = chosen_on(path)
    shares = [
        runtime.export(path, tmp_path / name, choice, 0.5, selection=name).activation_kept
        for name in ("topk", selection)
    ]
    assert shares[0] > shares[1]


@pytest.mark.parametrize("name", ["llama3", "mixtral"])
def test_an_interrupted_export_goes_on(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    path = checkpoints(name)
    choice, written = chosen_on(path), []
    whole = runtime.export(path, tmp_path / "whole", choice, 0.5)
    with monkeypatch.context() as patch:
        write = runtime.CopyDirectory.write_shard

        def failing(self: runtime.CopyDirectory, name: str, tensors: dict[str, torch.Tensor]) -> None:
            if written:
                raise KeyboardInterrupt
            written.append(name)
            write(self, name, tensors)

        patch.setattr(runtime.CopyDirectory, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            runtime.export(path, tmp_path / "out", choice, 0.5)
    with pytest.raises(CheckpointError, match="is an unfinished export: run the same export command again"):
        GriffinModel.from_pretrained(tmp_path / "out", device="cpu")
    with pytest.raises(UsageError, match="holds an unfinished export of another model, form or choice: remove it"):
        runtime.export(path, tmp_path / "out", choice, 0.25)
    again = runtime.export(path, tmp_path / "out", choice, 0.5)
    assert (again.written_bytes, again.activation_kept) == (whole.written_bytes, whole.activation_kept)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_what_cannot_be_exported(checkpoints, tmp_path: Path):
    path = checkpoints("llama3")
    for density, words in ((1.0, "keeps 128 of 128"), (0.001, "keeps 0 of 128")):
        with pytest.raises(UsageError, match=f"{words} neurons: give a share between 0 and 1"):
            runtime.check(path, tmp_path / "out", density)
    with pytest.raises(UnsupportedModel, match="gpt_oss has all experts of a layer in one tensor, and w8a16 packs mat"):
        runtime.check(checkpoints("gpt_oss"), tmp_path / "out", 0.5, "w8a16")
    for name, needs in (("mixtral", "needs 2: give 0.25"), ("deepseek_v3", "needs 4: give 0.5")):
        with pytest.raises(UsageError, match=f"and the router {needs} or more"):
            runtime.check(checkpoints(name), tmp_path / "out", 0.25 if name == "deepseek_v3" else 0.2)
    convert(path, tmp_path / "int8", "int8")
    with pytest.raises(UsageError, match="is converted to int8: give the original"):
        runtime.check(tmp_path / "int8", tmp_path / "out", 0.5)
    with pytest.raises(UsageError, match="exists already"):
        runtime.check(path, tmp_path / "int8", 0.5)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        runtime.check(path, tmp_path / "file", 0.5)


@pytest.mark.filterwarnings("ignore:.*weights only")
def test_what_others_quantised_is_exported_as_plain(checkpoints, tmp_path: Path):
    """Its config says no more of a quantisation that the export has not."""
    packed = tmp_path / "packed"
    write_foreign(checkpoints("llama3", shards=1), packed, FORMATS["fp8 blocks"])
    found = runtime.export(packed, tmp_path / "out", chosen_on(packed), 0.5)
    assert "quantization_config" not in (found.directory / "config.json").read_text()
    smaller, info = AutoModelForCausalLM.from_pretrained(found.directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with GriffinModel.from_pretrained(found.directory, device="cpu", max_gpu_mem="1GB", density=1.0) as model:
        ids = prompts()[0][None]
        assert torch.equal(model.model(ids).logits, smaller(ids).logits)


# Forms of other engines.


def logits(model: object, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", [pytest.param("w8a16", marks=pytest.mark.slow), "w4a16"])
def test_packed_as_compressed_tensors_reads_it(checkpoints, exported, tmp_path: Path, form: runtime.ExportForm):
    """transformers with that library computes what ours reads, and packs the same numbers the same way."""
    path, ids = checkpoints("llama3"), prompts()[1][None]
    choice = chosen_on(path)
    plain = AutoModelForCausalLM.from_pretrained(exported("llama3").directory)
    found = runtime.export(path, tmp_path / "out", choice, 0.5, form=form)
    assert found.neurons == 64
    theirs, options = AutoModelForCausalLM.from_pretrained(found.directory), {"device": "cpu", "max_gpu_mem": "1GB"}
    with GriffinModel.from_pretrained(found.directory, density=1.0, quantize="none", **options) as ours:
        torch.testing.assert_close(logits(ours.model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    if form == "w4a16":  # unasked it rests in int4, of the same numbers
        with GriffinModel.from_pretrained(found.directory, **options) as ours:
            ours.generate(ids, max_new_tokens=1)
            for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
                linear, numbers = (model.get_submodule(f"model.layers.1.{name}") for model in (ours.model, theirs))
                back = linear(torch.eye(linear.in_features)).t()
                assert (back - numbers.weight).norm() < 0.025 * numbers.weight.norm(), name
    one, other = (model.get_parameter("model.layers.1.mlp.down_proj.weight") for model in (plain, theirs))
    assert 0 < (one - other).norm() / one.norm() < {"w8a16": 0.01, "w4a16": 0.12}[form]


# One of each kind of MIXTURE_KINDS whose experts are matrices, and of each name that gates have.
PACKED = [
    *(("mixtral", "w4a16"), ("qwen2_moe", "w8a16"), ("mixtral", "w8a16"), ("deepseek_v3", "w4a16")),
    *(("qwen3_next", "w8a16"), ("nemotron_3", "w4a16"), ("hunyuan_v1_moe", "w4a16"), ("lfm2_moe", "w8a16")),
]


@pytest.fixture(scope="module")
def unpacked_experts(exported) -> Callable[[str], dict[str, torch.Tensor]]:
    """What a mixture's export holds that is not packed."""

    @functools.cache
    def tensors(name: str) -> dict[str, torch.Tensor]:
        plain = AutoModelForCausalLM.from_pretrained(exported(name).directory)
        return {key: tensor for key, tensor in plain.state_dict().items() if ".experts." in key}

    return tensors


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "form"), mostly_slow(PACKED, 2))
def test_experts_are_packed_as_transformers_reads_them(
    checkpoints, unpacked_experts, tmp_path: Path, name: str, form: runtime.ExportForm
):
    """One by one; routers and the gates of shared experts stay as they are, also by other software's names of them."""
    path, ids = checkpoints(name), prompts()[1][None]
    found = runtime.export(path, tmp_path / "out", chosen_on(path), 0.5, form=form)
    assert (found.unit, found.neurons) == ("experts", 4)
    theirs, info = AutoModelForCausalLM.from_pretrained(found.directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits(theirs, ids)
    whole = {"device": "cpu", "max_gpu_mem": "1GB", "density": 1.0}
    with GriffinModel.from_pretrained(found.directory, **whole, quantize="none") as ours:
        torch.testing.assert_close(logits(ours.model, ids), expected, rtol=1e-4, atol=1e-4)
    stored = {key: t for file in found.directory.glob("*.safetensors") for key, t in load_file(file).items()}
    unpacked = {key.removesuffix(".weight") for key, t in stored.items() if t.dim() == 2 and key.endswith(".weight")}
    ignored = json.loads((found.directory / "config.json").read_text())["quantization_config"]["ignore"]
    gates = {key for key in unpacked if ".layers." in key and "conv" not in key}
    assert gates
    assert gates <= set(ignored)
    assert all(key.endswith(("gate", "router", "gate.wg")) for key in gates)
    plain = unpacked_experts(name)
    assert plain
    for key, parameter in plain.items():
        error = (theirs.get_parameter(key) - parameter).norm() / parameter.norm()
        assert 0 < error < {"w8a16": 0.01, "w4a16": 0.12}[form]


GGUF_NAMES = ["llama2", "gemma", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "stablelm", "starcoder2"]
GGUF_NAMES += ["falcon_multi_query", "falcon_new", "gpt2", "lfm2", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]


def with_windows(path: Path, out: Path) -> Path:
    """gpt-oss at `path` as files can say it: every other layer sees a window."""
    shutil.copytree(path, out)
    said = json.loads((out / "config.json").read_text())
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(said["num_hidden_layers"])]
    (out / "config.json").write_text(json.dumps(said | {"layer_types": kinds, "sliding_window": 8}))
    return out


def stored(path: Path) -> dict[str, tuple[str, list[int], object]]:
    """Bytes; of factors of rope, which are computed in two ways, numbers."""
    found = {}
    for t in gguf.GGUFReader(path).tensors:
        numbers = [round(float(x), 5) for x in t.data] if t.name.startswith("rope_") else t.data.tobytes()
        found[t.name] = (t.tensor_type.name, t.shape.tolist(), numbers)
    return found


@pytest.mark.parametrize("name", ["llama3", *(pytest.param(name, marks=pytest.mark.slow) for name in GGUF_NAMES)])
def test_gguf_files_hold_what_their_converter_writes(checkpoints, exported, tmp_path: Path, name: str):
    path = checkpoints(name) if name != "gpt_oss" else with_windows(checkpoints(name), tmp_path / "windows")
    choice = chosen_on(path)
    plain = exported(name) if name != "gpt_oss" else runtime.export(path, tmp_path / "plain", choice, 0.5)
    smaller, ids = AutoModelForCausalLM.from_pretrained(plain.directory), prompts()[1][None]
    found = runtime.export(path, tmp_path / "gguf", choice, 0.5, form="gguf").directory / "model.gguf"
    theirs = write_gguf(smaller, tmp_path / "theirs.gguf", "F32", tokenizer=path)
    assert stored(found) == stored(theirs)
    said, wanted = (gguf.GGUFReader(file).fields for file in (found, theirs))
    for key in set(wanted) & set(said) - {"GGUF.kv_count", "general.name"}:
        ours, value = said[key].contents(), wanted[key].contents()
        ours = ours[: len(value)] if key.startswith("tokenizer.ggml.token") else ours  # filled up to the embeddings
        assert ours == pytest.approx(value), key
    if name == "llama3" or name in MIXTURES:  # such files of the others are read in tests/checkpoint/test_gguf.py
        with GriffinModel.from_pretrained(found, device="cpu", max_gpu_mem="1GB", density=1.0) as read:
            torch.testing.assert_close(logits(read.model, ids), logits(smaller, ids), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [pytest.param("Q8_0", marks=pytest.mark.slow), "Q4_0"])
def test_gguf_files_in_blocks(checkpoints, exported, tmp_path: Path, kind: str):
    """Tables have 8 bits at least. What such a file is made of is exported again with the file's own tokenizer."""
    path = checkpoints("llama2")
    choice = chosen_on(path)
    smaller = AutoModelForCausalLM.from_pretrained(exported("llama2").directory)
    form: runtime.ExportForm = "gguf-q8_0" if kind == "Q8_0" else "gguf-q4_0"
    found = runtime.export(path, tmp_path / "out", choice, 0.5, form=form)
    expected = stored(write_gguf(smaller, tmp_path / "theirs.gguf", kind))
    eight = stored(write_gguf(smaller, tmp_path / "eight.gguf", "Q8_0"))
    tables = ("token_embd.weight", "output.weight")
    assert stored(found.directory / "model.gguf") == expected | {name: eight[name] for name in tables}
    assert found.written_bytes == (found.directory / "model.gguf").stat().st_size
    again = runtime.export(found.directory, tmp_path / "again", chosen_on(found.directory), 0.5, form="gguf")
    one, two = (gguf.GGUFReader(e.directory / "model.gguf").fields for e in (found, again))
    assert all(one[key].contents() == two[key].contents() for key in one if key.startswith("tokenizer."))


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_experts_in_blocks_and_routers_in_float32(checkpoints, tmp_path: Path, name: str):
    """As llama.cpp's converter has routers whatever the rest is in: small sums decide who is chosen."""
    path = checkpoints(name) if name != "gpt_oss" else with_windows(checkpoints(name), tmp_path / "windows")
    found = runtime.export(path, tmp_path / "out", chosen_on(path), 0.5, form="gguf-q8_0").directory / "model.gguf"
    kinds = {key.split(".", 2)[-1]: kind for key, (kind, *_) in stored(found).items() if key.startswith("blk.0.")}
    assert {kinds[f"ffn_{own}_exps.weight"] for own in ("gate", "up", "down")} == {"Q8_0"}
    assert {kind for key, kind in kinds.items() if "inp" in key or "norm" in key or "bias" in key} == {"F32"}


def test_experts_that_came_packed_are_written_as_transformers_has_them(tmp_path: Path):
    """gpt-oss as its makers publish it, in MXFP4: read as rows, and turned back."""
    packed = tmp_path / "packed"
    packed.mkdir()
    write_tokenizer(write_mxfp4(packed))
    found = runtime.export(packed, tmp_path / "out", chosen_on(packed), 0.5)
    smaller, info = AutoModelForCausalLM.from_pretrained(found.directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = build(open_checkpoint(packed)).state_dict(keep_vars=True), smaller.state_dict()
    layer = "model.layers.1.mlp"
    for own in ("gate_up_proj", "down_proj"):
        matrices = [matrix.t() for matrix in in_memory(before[f"{layer}.experts.{own}"])]
        for expert, router in zip(after[f"{layer}.experts.{own}"], after[f"{layer}.router.weight"], strict=True):
            number = next(i for i, matrix in enumerate(matrices) if torch.equal(matrix, expert))
            assert torch.equal(router, before[f"{layer}.router.weight"][number])


def test_an_interrupted_gguf_file_goes_on(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = checkpoints("llama2")
    choice = chosen_on(path)
    whole = runtime.export(path, tmp_path / "whole", choice, 0.5, form="gguf").directory / "model.gguf"
    write, written = export_files.GgufLayout.write_group, []
    for left in (3, 1, 9):  # it is interrupted in a layer's middle, and its last whole layer is written again

        def failing(self: export_files.GgufLayout, file: Path, index: int, tensors: dict[str, torch.Tensor]) -> None:
            write(self, file, index, tensors)
            written.append(index)
            if len(written) == left:  # noqa: B023
                with file.open("r+b") as cut:
                    cut.truncate(file.stat().st_size - 100)
                raise KeyboardInterrupt

        written.clear()
        monkeypatch.setattr(export_files.GgufLayout, "write_group", failing)
        with contextlib.suppress(KeyboardInterrupt):
            runtime.export(path, tmp_path / "out", choice, 0.5, form="gguf")
        if left < 9:
            with pytest.raises(CheckpointError, match="unfinished"):
                GriffinModel.from_pretrained(tmp_path / "out", device="cpu")
    assert written == [0, 1, 2, 3] or written == [1, 2, 3]
    assert (tmp_path / "out" / "model.gguf").read_bytes() == whole.read_bytes()


def test_experts_that_no_prompt_chooses_are_not_cut(checkpoints, tmp_path: Path):
    """JetMoE's attention has as many, by the same number of its config."""
    words = "jetmoe: model.layers.0.self_attention.experts.input_linear.weight has as many experts"
    with pytest.raises(UnsupportedModel, match=words):
        runtime.check(checkpoints("jetmoe"), tmp_path / "out", 0.5, "unquantized")


def test_what_a_form_cannot_hold_is_refused_before_prompts_pass(checkpoints, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(UnsupportedModel, match="a GGUF file cannot say that layer_types is"):
        runtime.check(checkpoints("gpt_oss"), out, 0.5, "gguf")
    for name in ("opt", "deepseek_v3"):
        with pytest.raises(UnsupportedModel, match=f"{name} is not written as GGUF"):
            runtime.check(checkpoints(name), out, 0.5, "gguf")
    with pytest.raises(UnsupportedModel, match=r"its matrices are no nn\.Linear, w4a16 packs only those"):
        runtime.check(checkpoints("gpt2"), out, 0.5, "w4a16")
    with pytest.raises(UsageError, match="keeps 0 of 128 neurons"):
        runtime.check(checkpoints("llama3"), out, 0.2, "gguf-q4_0")
    changed = tmp_path / "changed"
    shutil.copytree(checkpoints("llama3"), changed)
    said = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(said | {"hidden_act": "relu"}))
    with pytest.raises(UnsupportedModel, match=r"a GGUF file cannot say that hidden_act is relu \(it would be silu\)"):
        runtime.check(changed, out, 0.5, "gguf")
