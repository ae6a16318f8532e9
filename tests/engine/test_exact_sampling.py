"""Sampling in exact mode: tokens are distributed as the full model's (arXiv 2211.17192), by a chi-square test."""

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from griffin_offload import GriffinModel

VOCAB, DRAWS = 5, 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tokens, so that three of them have 125 outcomes."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlamaConfig(**sizes, intermediate_size=32, max_position_embeddings=32, pad_token_id=0, bos_token_id=1)
    torch.manual_seed(5)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.6)
    model.generation_config.eos_token_id = None
    directory = tmp_path_factory.mktemp("five")
    model.save_pretrained(directory)
    return directory


PROMPT = torch.tensor([[1, 2, 3, 4, 2, 1]])


def _expected(path: Path, temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of every three tokens, by the dense model."""
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    answers = list(product(range(VOCAB), repeat=3))
    with torch.no_grad():
        logits = model(torch.cat([PROMPT.repeat(len(answers), 1), torch.tensor(answers)], dim=1)).logits
    steps = (logits[:, PROMPT.shape[1] - 1 : -1] / temperature).softmax(-1).double()
    chances = steps.gather(2, torch.tensor(answers)[:, :, None]).prod(1)[:, 0]
    return dict(zip(answers, chances.tolist(), strict=True))


def _p_value(path: Path, temperature: float, draws: int = DRAWS, at_once: int = 1, **options: Any) -> float:
    """Of the drawn answers under the full model's distribution; rare answers are one cell."""
    sizes = {"max_gpu_mem": "100MB", "density": 0.25, "ctx_size": 16, "batch_size": at_once}
    model = GriffinModel.from_pretrained(path, device="cpu", always_stream=True, threads=1, exact=True, **sizes)
    torch.manual_seed(0)
    drawn: Counter[tuple[int, ...]] = Counter()
    settings = {"max_new_tokens": 3, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    for _ in range(draws // at_once):
        output = model.generate(PROMPT, num_return_sequences=at_once, **settings, **options)
        drawn.update(map(tuple, output[:, PROMPT.shape[1] :].tolist()))
    chances = _expected(path, temperature)
    cells = [(chance * draws, drawn[answer]) for answer, chance in chances.items() if chance * draws >= 5]
    rare = (draws - sum(cell[0] for cell in cells), draws - sum(cell[1] for cell in cells))
    cells += [rare] if rare[0] >= 5 else []
    statistic = sum((found - wanted) ** 2 / wanted for wanted, found in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.mark.slow
def test_three_tokens_are_distributed_as_the_full_models(tiny: Path):
    assert _p_value(tiny, 0.7, draft_tokens=2) > 1e-3


@pytest.mark.slow
def test_the_pruned_model_alone_fails_the_same_test(tiny: Path):
    assert _p_value(tiny, 0.7, at_once=20, exact=False) < 1e-6
