"""`export --refit`: what neurons that stay say for those that go."""

from pathlib import Path

import pytest
import torch
from exports import chosen_on, prompts, sets_of
from reference import collect_z
from tiny_models import ARCHITECTURES, KINDS, quick_first
from transformers import AutoModelForCausalLM

from griffin_offload.engine import export as runtime
from griffin_offload.engine.calibration import RIDGE
from griffin_offload.errors import UsageError


@pytest.mark.parametrize("name", quick_first(KINDS))
def test_a_refit_is_the_least_squares_one(checkpoints, tmp_path: Path, name: str):
    """By a solver of float64, on the activations of the dense model: of each prompt that chooses, and of no other."""
    path, down = checkpoints(name), ARCHITECTURES[name].down
    given = prompts()
    choice = chosen_on(path)
    plain = runtime.export(path, tmp_path / "plain", choice, 0.5)
    found = runtime.export(path, tmp_path / "out", choice, 0.5, refit=given)
    assert found.neurons == plain.neurons
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    of_layers = [collect_z(dense, down, ids[None]) for number, ids in enumerate(given, start=1) if number % 4]
    one, other = (AutoModelForCausalLM.from_pretrained(e.directory).state_dict() for e in (plain, found))
    changed = [key for key in one if not torch.equal(one[key], other[key])]
    assert len(changed) == dense.config.num_hidden_layers
    for layer, (key, kept) in enumerate(zip(changed, sets_of(path, down, found.neurons), strict=True)):
        turned = name == "gpt2"  # its matrices lie the other way round
        full = dense.get_parameter(key).detach()
        full = full.t() if turned else full
        z = torch.cat([by_layer[layer][0].double() for by_layer in of_layers])
        gone = torch.tensor(sorted(set(range(full.shape[1])) - set(kept.tolist())))
        ridge = (RIDGE * z[:, kept].square().sum(0).mean()).sqrt()
        sides = torch.cat([z[:, kept], ridge * torch.eye(len(kept), dtype=torch.float64)])
        wanted = torch.cat([z[:, gone] @ full[:, gone].t(), torch.zeros(len(kept), len(full), dtype=torch.float64)])
        expected = full[:, kept] + torch.linalg.lstsq(sides, wanted).solution.t()
        assert (expected - full[:, kept]).norm() > 0.01 * full[:, kept].norm()
        torch.testing.assert_close(other[key].t() if turned else other[key], expected.float(), rtol=1e-4, atol=1e-5)


def test_a_refit_goes_on_and_is_of_neurons(checkpoints, tmp_path: Path):
    path, given = checkpoints("llama3"), prompts()
    choice = chosen_on(path)
    whole = runtime.export(path, tmp_path / "out", choice, 0.5, refit=given)
    with pytest.raises(UsageError, match="exists already"):
        runtime.export(path, tmp_path / "out", choice, 0.5)
    with pytest.raises(UsageError, match="a refit is of neurons, not of experts: leave --refit out"):
        runtime.check(checkpoints("mixtral"), tmp_path / "more", 0.5, refit=True)
    again = runtime.export(path, tmp_path / "again", choice, 0.5, refit=given, form="w8a16")
    assert again.activation_kept == whole.activation_kept
