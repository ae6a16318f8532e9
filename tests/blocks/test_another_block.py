"""A kind of block that the package does not know, registered at run time: its neurons come in groups of four, which are
kept or left out together. Everything that a model does has to work with it by the contract alone."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import quantised_reference as quantised
import torch
import transformers as hf
from evaluation.direct import simulated_directly
from reference import collect_z, masked_generate, select_direct, statistic_float64
from tiny_models import HIDDEN, LAYERS, VOCAB, write_tokenizer
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from griffin_offload import GriffinModel
from griffin_offload.blocks import layouts
from griffin_offload.blocks.base import ActivationCallback, Activations, Block
from griffin_offload.blocks.feedforward import FeedForward
from griffin_offload.blocks.layouts import find_feed_forwards, register_block, self_check
from griffin_offload.cli.main import main
from griffin_offload.engine.convert import convert
from griffin_offload.errors import UnsupportedModel
from griffin_offload.evaluation.samples import Sample
from griffin_offload.evaluation.simulation import simulate
from griffin_offload.formats import Format
from griffin_offload.formats.base import Spec
from griffin_offload.method.allocation import Counts
from griffin_offload.method.variants import Variant

GROUP, NEURONS, DOWN = 4, 128, "model.layers.{i}.mlp.shrink"
PROMPT, NEW = 40, 8


class GroupedConfig(hf.LlamaConfig):
    model_type = "grouped_llama"


class _GroupedMLP(nn.Module):
    """Gated, under names that no layout has."""

    def __init__(self) -> None:
        super().__init__()
        self.expand_gate, self.expand_up = (nn.Linear(HIDDEN, NEURONS, bias=False) for _ in range(2))
        self.shrink = nn.Linear(NEURONS, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shrink(nn.functional.silu(self.expand_gate(x)) * self.expand_up(x))


class GroupedForCausalLM(hf.LlamaForCausalLM):
    config_class = GroupedConfig

    def __init__(self, config: GroupedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = _GroupedMLP()
        self.post_init()


class _GroupActivations(Activations):
    def values(self) -> Tensor:
        return self.z.float().unflatten(-1, (-1, GROUP)).norm(dim=-1)

    def leave_out(self, kept: Tensor, instead: Tensor | None = None) -> None:
        super().leave_out(_each(kept), instead)


class GroupBlock(Block):
    """Every call goes to a block of single neurons, four for each of these."""

    def __init__(self, module: nn.Module) -> None:
        self.single = FeedForward(module, ("expand_gate", "expand_up"), "shrink", inline=False)
        self.module, self.inline, self.linears = module, False, self.single.linears
        self.hidden, self.width = self.single.hidden, self.single.neurons
        self.neurons = self.width // GROUP

    @property
    def gated(self) -> bool:
        return True

    @property
    def formats(self) -> tuple[Format, ...]:
        return self.single.formats

    @property
    def read_numbers(self) -> int:
        return self.single.read_numbers

    def is_down(self, linear: nn.Module) -> bool:
        return self.single.is_down(linear)

    def full(self) -> list[Tensor]:
        return self.single.full()

    def full_specs(self, precision: Format | None = None) -> list[Spec]:
        return self.single.full_specs(precision)

    def compact_specs(self, counts: Counts, formats: Sequence[Format] | None = None) -> list[Spec]:
        return self.single.compact_specs(tuple(kept * GROUP for kept in counts), formats)

    def multiple(self, precision: Format) -> int:
        return max(self.single.multiple(precision) // GROUP, 1)

    def install_full(self, tensors: Sequence[Tensor]) -> None:
        self.single.install_full(tensors)

    def install_compact(self, tensors: Sequence[Tensor]) -> None:
        self.single.install_compact(tensors)

    def gather(self, full: Sequence[Tensor], chosen: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        self.single.gather(full, [_members(own) for own in chosen], out)

    def rows_needed(self, chosen: Tensor) -> list[Tensor | None]:
        return self.single.rows_needed(_members(chosen))

    def neuron_norms(self, full: Sequence[Tensor]) -> Tensor:
        return self.single.neuron_norms(full).view(-1, GROUP).norm(dim=1)

    def output_norms(self, full: Sequence[Tensor]) -> Tensor:
        return self.single.output_norms(full).view(-1, GROUP).norm(dim=1)

    def observe(self, callback: ActivationCallback) -> None:
        self.single.observe(lambda found: callback(_GroupActivations(found.z, found.start)))

    def chunked(self, limit: int) -> None:
        self.single.chunked(limit)

    def unhook(self) -> None:
        self.single.unhook()

    def run(self, x: Tensor) -> Tensor:
        return self.single.run(x)


def _each(kept: Tensor) -> Tensor:
    return kept.repeat_interleave(GROUP, -1)


def _members(chosen: Tensor) -> Tensor:
    return (chosen[:, None] * GROUP + torch.arange(GROUP)).flatten()


def _find(layer: nn.Module, where: str) -> Block | None:
    return GroupBlock(layer.mlp) if isinstance(layer.mlp, _GroupedMLP) else None


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of such a model, known to transformers while its tests run."""
    hf.AutoConfig.register(GroupedConfig.model_type, GroupedConfig)
    hf.AutoModelForCausalLM.register(GroupedConfig, GroupedForCausalLM)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GroupedConfig.model_type] = GroupedForCausalLM.__name__
    config = GroupedConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = GroupedForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape) * 2 / HIDDEN**0.5)
    directory = tmp_path_factory.mktemp("grouped")
    model.save_pretrained(directory)
    write_tokenizer(directory)
    yield directory
    del MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GroupedConfig.model_type]
    CONFIG_MAPPING._extra_content.pop(GroupedConfig.model_type)
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(GroupedConfig)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "FINDERS", [])
    register_block(_find)


def _ids() -> Tensor:
    return torch.randint(3, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(5))


def _dense(directory: Path) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _load(directory: Path, **options: object) -> GriffinModel:
    return GriffinModel.from_pretrained(directory, device="cpu", max_gpu_mem="20MB", ctx_size=64, **options)


def _chosen_groups(z: Tensor) -> Tensor:
    """Half of the groups, by the root of the sum of their neurons' squares: from the formula."""
    scores = (statistic_float64(z) ** 2).view(-1, GROUP).sum(1).sqrt()
    return select_direct("topk", len(scores) // 2, scores)


def test_it_is_found_when_it_is_registered(grouped, monkeypatch: pytest.MonkeyPatch):
    model = _dense(grouped)
    _, blocks = find_feed_forwards(model, LAYERS)
    assert all(isinstance(block, GroupBlock) for block in blocks)
    self_check(blocks[0])
    monkeypatch.setattr(layouts, "FINDERS", [])
    with pytest.raises(UnsupportedModel, match=r"mlp\.shrink, .*; register"):
        find_feed_forwards(model, LAYERS)


@pytest.mark.parametrize("options", [{}, {"ff_chunk_tokens": 16}, {"offload": "ram"}], ids=str)
def test_the_streamed_pass_and_decoding(grouped, options: dict[str, object]):
    dense, ids = _dense(grouped), _ids()
    expected = [_chosen_groups(z[0]) for z in collect_z(dense, DOWN, ids)]
    tokens, logits = masked_generate(dense, DOWN, ids, None, [_members(chosen) for chosen in expected], NEW)
    model = _load(grouped, density=0.5, **options)
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert all(torch.equal(model.selected[i], chosen) for i, chosen in enumerate(expected))
    assert torch.equal(found.sequences, tokens)
    torch.testing.assert_close(torch.stack(found.logits), logits, rtol=1e-4, atol=1e-4)
    report = model.last_report
    assert report.decode_streamed_bytes == 0
    assert report.peak_device_bytes <= model.plan.peak_bytes
    compact = [block.module.shrink.weight.shape[1] for block in model.engine.blocks]
    assert compact == [NEURONS // 2] * LAYERS == [GROUP * kept for kept in model.plan.kept]
    model.close()


def test_chosen_groups_are_gathered_again_from_where_they_rest(grouped):
    """Two contexts take turns; the second one's groups are read back by rows."""
    model = _load(grouped, density=0.5, keep_prompts=True)
    first, second = model.new_context(), model.new_context()
    ids, other = _ids(), _ids().flip(1)
    answer = model.generate(ids, max_new_tokens=NEW, do_sample=False, context=first)
    model.generate(other, max_new_tokens=NEW, do_sample=False, context=second)
    longer = torch.cat([answer, torch.full((1, 2), 7)], 1)
    again = model.generate(longer, max_new_tokens=NEW, do_sample=False, context=first)
    alone = _load(grouped, density=0.5, keep_prompts=True)
    context = alone.new_context()
    assert torch.equal(alone.generate(ids, max_new_tokens=NEW, do_sample=False, context=context), answer)
    assert torch.equal(alone.generate(longer, max_new_tokens=NEW, do_sample=False, context=context), again)


def test_the_plan_counts_groups(grouped, capsys: pytest.CaptureFixture[str]):
    arguments = ["-m", str(grouped), "--device", "cpu", "--max-gpu-mem", "20MB", "--density", "0.5", "--json"]
    assert main(["plan", *arguments, "--ctx-size", "64"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["density"] == 0.5
    assert plan["parts"]["feed_forward"] == LAYERS * 3 * HIDDEN * NEURONS // 2 * 4
    assert plan["streamed_bytes"] == LAYERS * 3 * HIDDEN * NEURONS * 4


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_what_is_planned_is_what_is_allocated(grouped, quantize: str):
    """Twelve groups: quantised neurons come in blocks of 64, which are 16 groups."""
    model = _load(grouped, density=0.4, quantize=quantize)
    allocated = sum(p.nbytes for compact in model.engine.loaded.layers.compact.values() for p in compact)
    assert model.plan.kept == (12,) * LAYERS
    assert allocated == model.plan.resident_parts["feed_forward"]
    model.close()


@pytest.mark.parametrize("compensate", [False, True])
def test_simulation(grouped, compensate: bool):
    dense, ids, prompt = _dense(grouped), _ids()[0], 25

    def kept(_: int, z: Tensor) -> Tensor:
        return _members(_chosen_groups(z))

    model = _load(grouped, density=0.0, ff_chunk_tokens=16)
    sample = Sample(ids, prompt, prompt)
    (found,) = simulate(model, [sample], [Variant(0.5, compensate=compensate)])
    expected = simulated_directly(dense, DOWN, ids[:-1], prompt, kept, compensate=compensate)
    log_probs = expected[prompt - 1 :].gather(-1, ids[prompt:, None])[:, 0]
    torch.testing.assert_close(found.variants[0].log_probs, log_probs, rtol=1e-4, atol=1e-4)
    model.close()


@pytest.mark.parametrize("precision", ["int8"])
def test_a_converted_copy(grouped, tmp_path: Path, precision: str):
    convert(grouped, tmp_path / "copy", precision)
    model, ids = _load(tmp_path / "copy", density=0.5), _ids()
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    dense = _dense(grouped)
    for feed_forward in (False, True):
        quantised.round_layers(dense, DOWN, NEURONS, precision, feed_forward=feed_forward)
    chosen = list(model.selected.values())
    assert [kept.numel() for kept in chosen] == [NEURONS // GROUP // 2] * LAYERS
    tokens, logits = masked_generate(dense, DOWN, ids, None, [_members(kept) for kept in chosen], NEW)
    torch.testing.assert_close(torch.stack(found.logits), logits, rtol=1e-2, atol=1e-2)
    assert torch.equal(found.sequences, tokens)
    model.close()
