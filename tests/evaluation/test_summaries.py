"""Summaries: generated as dense transformers generate them, ended where they are cut, told apart by their seeds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from marks import mostly_slow
from tiny_models import write_tokenizer
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.evaluation.config import SummariesConfig
from griffin_offload.evaluation.summaries import Article, Row, means, summarise
from griffin_offload.method.variants import Variant

ARTICLES = [Article(i, torch.tensor([5 + i, 40, 41, 42, 60, 61, 62]), "the cat sat") for i in range(1, 4)]
CONFIG = SummariesConfig(max_new_tokens=16, end="\0\0\0")


def summaries(directory: Path, articles: list[Article], config: SummariesConfig, density: float = 0.5) -> list[Row]:
    with GriffinModel.from_pretrained(
        directory, device="cpu", max_gpu_mem="10MB", density=density, ctx_size=64
    ) as model:
        return list(summarise(model, articles, Variant(density), config))


@pytest.mark.parametrize("temperature", mostly_slow([1.5, 0.0], 1))
def test_the_full_model_writes_what_dense_transformers_write(checkpoints, temperature: float):
    """Drawn from all tokens, as the reference does, not from transformers' first 50."""
    directory, config = checkpoints("llama2"), replace(CONFIG, temperature=temperature)
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = write_tokenizer(directory)
    for article, row in zip(ARTICLES, summaries(directory, ARTICLES, config, density=1.0), strict=True):
        torch.manual_seed(config.seed + article.number)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        output = dense.generate(article.ids[None], max_new_tokens=16, **drawn)
        assert row["summary"] == tokenizer.decode(output[0, 7:], skip_special_tokens=True).strip()


def test_a_summary_ends_where_it_is_cut(checkpoints, monkeypatch: pytest.MonkeyPatch):
    """What would be thrown away is not generated; the text is that of a generation that went on."""
    lengths = []
    generate = GriffinModel.generate

    def counted(self, *arguments, **options):
        output = generate(self, *arguments, **options)
        lengths.append(output.shape[1] - 7)
        return output

    monkeypatch.setattr(GriffinModel, "generate", counted)
    [whole] = summaries(checkpoints("llama2"), ARTICLES[:1], CONFIG)
    text = whole["summary"]
    end = text[len(text) // 2 :][:2]
    [ended] = summaries(checkpoints("llama2"), ARTICLES[:1], replace(CONFIG, end=end))
    assert ended["summary"] == text[: text.index(end)].strip()
    assert lengths[1] < lengths[0] == 16


def test_a_summary_depends_on_no_other(checkpoints):
    together = summaries(checkpoints("llama2"), ARTICLES, replace(CONFIG, temperature=1.5))
    [alone] = summaries(checkpoints("llama2"), ARTICLES[2:], replace(CONFIG, temperature=1.5))
    assert together[2]["summary"] == alone["summary"]


def test_means_leave_out_what_could_not_be_told():
    row = {"rouge1": 1, "rouge2": 2, "rougeL": 3, "activation_kept": 0.5, "seconds": 4}
    rows = [row | {"activation_kept_heldout": None}, row | {"activation_kept_heldout": 0.25, "rouge1": 3}]
    assert means(rows) == row | {"rouge1": 2, "activation_kept_heldout": 0.25}
    assert "activation_kept_heldout" not in means(rows[:1])
    assert means([]) == {}
