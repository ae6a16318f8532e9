"""Every architecture against dense transformers: bit for bit at density 1, against a masked reference below."""

from pathlib import Path

import pytest
import torch
from marks import by_turns
from reference import collect_z, dense_forward, dense_generate, masked_generate, select_direct, shared_statistic_float64
from tiny_models import ARCHITECTURES, VOCAB, every_architecture
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel

NEW_TOKENS = 8
PROMPT_TOKENS = 40  # past the window of 16


def _prompt(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, T]; with a batch, samples are padded on the left."""
    ids = torch.randint(3, VOCAB, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for i in range(batch):
        mask[i, : 7 * i] = 0
    return ids * mask, mask


def _load(path: Path, **options: object) -> GriffinModel:
    return GriffinModel.from_pretrained(
        path, device="cpu", max_gpu_mem="1GB", ctx_size=PROMPT_TOKENS + NEW_TOKENS, **options
    )


def _generate(model: GriffinModel, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits)


@pytest.mark.parametrize("architecture", every_architecture())
def test_density_one_is_dense_bit_for_bit(architecture: str, checkpoints):
    """Streamed on purpose, and in chunks: at density 1 nothing needs to be, and this is about the streamed pass.
    (In one chunk: test_hybrids.py.)"""
    path = checkpoints(architecture)
    dense = AutoModelForCausalLM.from_pretrained(path)
    ids, mask = _prompt(1)
    model = _load(path, density=1.0, always_stream=True, ff_chunk_tokens=16)
    logits = model.model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits, dense_forward(dense, ids, mask))
    tokens, _ = _generate(model, ids, mask)
    assert torch.equal(tokens, dense_generate(dense, ids, mask, NEW_TOKENS)[0][:, -NEW_TOKENS:])
    assert model.last_report.prefill_streamed_bytes == model.plan.streamed_bytes > 0
    assert model.last_report.activation_kept == pytest.approx(1)


@pytest.mark.parametrize(("architecture", "batch"), by_turns(ARCHITECTURES, (1, 3)))
def test_density_half_equals_the_masked_reference(architecture: str, batch: int, checkpoints):
    path = checkpoints(architecture)
    dense, down = AutoModelForCausalLM.from_pretrained(path), ARCHITECTURES[architecture].down
    neurons = ARCHITECTURES[architecture].neurons
    ids, mask = _prompt(batch)
    activations = collect_z(dense, down, ids, mask)
    sets = [select_direct("topk", neurons // 2, shared_statistic_float64(z, mask)) for z in activations]
    expected_tokens, expected = masked_generate(dense, down, ids, mask, sets, NEW_TOKENS)
    model = _load(path, density=0.5, batch_size=batch)
    tokens, logits = _generate(model, ids, mask)
    assert [chosen.tolist() for chosen in model.selected.values()] == [chosen.tolist() for chosen in sets]
    error = (logits - expected).norm() / expected.norm()
    assert error < 1e-5
    assert torch.equal(tokens, expected_tokens[:, -NEW_TOKENS:])
