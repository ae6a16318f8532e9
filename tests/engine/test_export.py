"""`export`: what is written is an ordinary checkpoint that computes what the chosen neurons compute."""

from pathlib import Path

import pytest
import torch
from foreign_formats import FORMATS, write_foreign
from reference import collect_z, masked_after_prefill, statistic_float64
from tiny_models import ARCHITECTURES, VOCAB, every_architecture
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.engine import export as runtime
from griffin_offload.engine.convert import convert
from griffin_offload.errors import CheckpointError, UnsupportedModel, UsageError

OPTIONS = {"device": "cpu", "max_gpu_mem": "1GB", "always_stream": True, "density": 0.5, "keep_prompts": True}
NO_NUMBER = "bloom"


def prompts(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (9 + 3 * i,), generator=generator) for i in range(count)]


def chosen_on(path: Path) -> runtime.Choice:
    with GriffinModel.from_pretrained(path, **OPTIONS, ctx_size=40) as model:
        return runtime.choose(model, prompts())


def sets_of(path: Path, down: str, kept: int) -> list[torch.Tensor]:
    """By the formula, in float64: every fourth prompt does not choose."""
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    total: list[torch.Tensor] = []
    for number, ids in enumerate(prompts(), start=1):
        if number % 4:
            shares = [statistic_float64(z[0]) ** 2 for z in collect_z(dense, down, ids[None])]
            shares = [share / share.sum() for share in shares]
            total = [a + b for a, b in zip(total, shares, strict=True)] if total else shares
    return [share.topk(kept).indices.sort().values for share in total]


@pytest.mark.parametrize("name", every_architecture())
def test_transformers_loads_it_and_computes_with_the_chosen_neurons(checkpoints, tmp_path: Path, name: str):
    path, down = checkpoints(name), ARCHITECTURES[name].down
    dense = AutoModelForCausalLM.from_pretrained(path)
    if name == NO_NUMBER:
        with pytest.raises(UnsupportedModel, match="its config has no number for the neurons"):
            runtime.check(path, tmp_path / "out", 0.5)
        return
    found = runtime.export(path, tmp_path / "out", chosen_on(path), 0.5)
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


@pytest.mark.parametrize("selection", ["magnitude", "output_aware", "random"])
def test_other_selections(checkpoints, tmp_path: Path, selection: runtime.SelectionMethod):
    path = checkpoints("llama3")
    choice = chosen_on(path)
    shares = [
        runtime.export(path, tmp_path / name, choice, 0.5, selection=name).activation_kept
        for name in ("topk", selection)
    ]
    assert shares[0] > shares[1]


def test_an_interrupted_export_goes_on(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = checkpoints("llama3")
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
    with pytest.raises(CheckpointError, match="unfinished"):
        GriffinModel.from_pretrained(tmp_path / "out", device="cpu")
    with pytest.raises(UsageError, match="holds an unfinished export of another model"):
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
    with pytest.raises(UnsupportedModel, match="a mixture of experts is not exported yet"):
        runtime.check(checkpoints("mixtral"), tmp_path / "out", 0.5)
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
