"""The figures of a run: broken promises are said, rates are of what they claim."""

import dataclasses

import pytest
import torch
from tiny_models import VOCAB

from griffin_offload import BudgetExceeded, GriffinModel, RunReport


def _report(checkpoints) -> tuple[GriffinModel, RunReport]:
    model = GriffinModel.from_pretrained(
        checkpoints("llama2"), device="cpu", max_gpu_mem="10MB", density=0.5, ctx_size=64
    )
    model.generate(torch.randint(3, VOCAB, (1, 32)), max_new_tokens=8, do_sample=False)
    assert model.last_report is not None
    return model, model.last_report


def test_kept_promises_are_silent_and_broken_ones_are_named(checkpoints):
    _, report = _report(checkpoints)
    assert report.broken_promises(None) == []
    over = dataclasses.replace(report, peak_device_bytes=10**7 + 1)
    assert over.broken_promises(None) == ["the ledger reached 10000001 bytes, 10000000 were allowed"]
    grown = dataclasses.replace(report, host_growth_bytes=10**7 + 501)
    assert grown.broken_promises(None) == []
    assert "growth reached" in grown.broken_promises(500)[0]


def test_a_budget_that_was_exceeded_warns(checkpoints, monkeypatch: pytest.MonkeyPatch):
    model, _ = _report(checkpoints)
    monkeypatch.setattr(type(model.engine.loaded.ledger), "peak_bytes", property(lambda self: 10**9))
    with pytest.warns(BudgetExceeded, match="the ledger reached 1000000000 bytes"):
        model.generate(torch.randint(3, VOCAB, (1, 32)), max_new_tokens=2, do_sample=False)


def test_rates(checkpoints):
    _, report = _report(checkpoints)
    assert report.prompt_tokens == 32
    assert report.generated_tokens == 8
    assert report.prefill_tokens_per_s == pytest.approx(32 / report.prefill_s)
    assert report.decode_tokens_per_s == pytest.approx(7 / report.decode_s)  # prefill gave the first
    assert report.to_json()["decode_tokens_per_s"] == report.decode_tokens_per_s


def test_beams_count_a_prompt_once(checkpoints):
    model, _ = _report(checkpoints)
    model.generate(torch.randint(3, VOCAB, (1, 32)), max_new_tokens=4, num_beams=3, do_sample=False)
    assert model.last_report.prompt_tokens == 32
