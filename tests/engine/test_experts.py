"""Mixtures of experts: an expert that is missing is fetched, or routing is kept to those that are there."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from marks import mostly_slow
from safetensors.torch import load_file, save_file
from tiny_models import MIXTURE_KINDS, MIXTURES, VOCAB
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.errors import (
    CheckpointError,
    DoesNotFit,
    GriffinError,
    UnsupportedModel,
    UsageError,
)
from griffin_offload.transformers_api import CACHE

NEW, EXPERTS, ACTIVE = 6, 8, 2


def _ids(batch: int = 1, tokens: int = 20) -> Tensor:
    return torch.randint(5, VOCAB - 8, (batch, tokens), generator=torch.Generator().manual_seed(1))


def _greedy(ids: Tensor, mask: Tensor | None = None, new: int = NEW) -> dict[str, Any]:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return {"inputs": ids, "attention_mask": mask, "max_new_tokens": new, **settings}


def _close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Up to the order of sums: against the largest logit."""
    ours, theirs = torch.stack(list(found)), torch.stack(list(expected))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp_min(1)


def _load(directory: Path, **options: Any) -> GriffinModel:
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 64, "batch_size": 1}
    return GriffinModel.from_pretrained(directory, device="cpu", **{**sizes, **options})


def _dense(directory: Path) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _experts_of(model: Any, name: str) -> dict[int, Any]:
    """The modules of experts by layer: dense layers have none."""
    named = dict(model.named_modules())
    paths = {i: MIXTURES[name].down.format(i=i) for i in range(model.config.num_hidden_layers)}
    return {i: named[path] for i, path in paths.items() if path in named}


def _asked(hidden: Tensor, index: Any = None, weights: Tensor | None = None) -> list[int]:
    """Numbers of the experts that a call needs; Llama 4 gives each all tokens, as zeros where it is not asked, and
    JetMoE says how many each is given."""
    if index is None:
        return hidden.view(EXPERTS, -1).any(1).nonzero().flatten().tolist()
    if isinstance(index, list):
        return [expert for expert, tokens in enumerate(index) if tokens]
    return sorted(set(index.flatten().tolist()))


@contextmanager
def _routed(experts: dict[int, Any]) -> Iterator[dict[int, list[list[int]]]]:
    """Inside, the experts that each call of each layer was sent to."""
    seen: dict[int, list[list[int]]] = {index: [] for index in experts}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, i=i: seen[i].append(_asked(*args)))
        for i, module in experts.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", mostly_slow(MIXTURES, 2))
def test_fetch_is_the_full_model(mixtures, name: str):
    dense, ids = _dense(mixtures(name)), _ids()
    experts = _experts_of(dense, name)
    with _routed(experts) as seen:
        expected = dense.generate(**_greedy(ids))
    logits = []
    in_chunks = [{"density": 0.5, "ff_chunk_tokens": 16}] if name in MIXTURE_KINDS else []
    for options in ({"density": 0.25}, *in_chunks, {"density": 1.0}):
        with _load(mixtures(name), **options) as model:
            found = model.generate(**_greedy(ids))
            assert torch.equal(found.sequences, expected.sequences)
            _close(found.logits, expected.logits)
            report = model.last_report
            assert report.peak_device_bytes <= model.plan.peak_bytes
            logits.append(torch.stack(found.logits))
        if options["density"] < 1:
            times = 3 if name == "jetmoe" else 1  # what goes in has another matrix of twice the size
            sizes = {i: times * sum(p[0].nbytes for p in module.parameters()) for i, module in experts.items()}
            assert report.prefill_streamed_bytes == sum(len(seen[i][0]) * size for i, size in sizes.items())
            assert report.experts.hits + report.experts.misses == sum(len(call) for i in seen for call in seen[i][1:])
            needed = report.decode_streamed_bytes - report.experts.wrong_bytes
            assert needed == report.experts.misses * next(iter(sizes.values())) > 0
    assert torch.equal(logits[0], logits[-1])  # whether an expert was read or had stayed


@pytest.mark.parametrize("name", mostly_slow(("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "llama4"), 2))
def test_fetch_of_a_padded_batch(mixtures, name: str):
    ids = _ids(3)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :3] = 0, 0
    expected = _dense(mixtures(name)).generate(**_greedy(ids.masked_fill(mask == 0, 0), mask))
    with _load(mixtures(name), density=0.375, batch_size=3) as model:
        found = model.generate(**_greedy(ids.masked_fill(mask == 0, 0), mask))
        assert torch.equal(found.sequences, expected.sequences)
        _close(found.logits, expected.logits)
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


# Each router's own way: scores, and what is done to the weights of those that were chosen; of which some choose by
# scores and a bias, and some in one of two groups. "-inf": whether router logits of -inf would be the same.
_ROUTERS = {
    "mixtral": ("softmax", "sum", "-inf"),
    "gpt_oss": ("none", "softmax", "-inf"),
    "deepseek_v3": ("sigmoid", "sum", "bias", "groups"),
    "qwen3_moe": ("softmax", "sum", "-inf"),
    "qwen2_moe": ("softmax", "none"),
    "olmoe": ("softmax", "none"),
    "minimax_m2": ("sigmoid", "sum", "bias"),
    "ernie4_5_moe": ("softmax", "sum", "bias"),
    "hunyuan_v1_moe": ("softmax", "sum", "-inf"),
    "deepseek_v2": ("softmax", "none"),
    "glm4_moe": ("sigmoid", "sum", "bias", "groups"),
    "granitemoe": ("none", "softmax", "-inf"),
    "flex_olmo": ("softmax", "none"),
    "lfm2_moe": ("sigmoid", "sum", "bias"),
    "qwen3_next": ("softmax", "sum", "-inf"),
    "nemotron_3": ("sigmoid", "sum", "bias"),
    "llama4": ("sigmoid", "none", "-inf"),
    "jetmoe": ("none", "softmax", "-inf"),
}


def _choice(name: str, logits: Tensor, bias: Tensor, allowed: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the experts of one token, written down from what each router is said to do."""
    kind, last, *how = _ROUTERS[name]
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "none": logits}[kind]
    by = (scores + bias).tolist()
    candidates = list(allowed)
    if "groups" in how:  # two groups, of which the one counts whose two best are better together
        groups = [range(0, 4), range(4, 8)]
        best = max(groups, key=lambda group: sum(sorted(by[e] for e in group)[-2:]))
        candidates = [expert for expert in allowed if expert in best]
    chosen = sorted(candidates, key=lambda expert: -by[expert])[:ACTIVE]
    weights = scores[chosen]
    if last == "sum":
        weights = weights / weights.sum()
    elif last == "softmax":
        weights = weights.softmax(-1)
    return weights * scale, torch.tensor(chosen)


def _bias_of(parent: Any, router: Any) -> Tensor:
    holders = [parent, router, *([router.moe_statics] if hasattr(router, "moe_statics") else [])]
    found = [getattr(holder, name, None) for holder in holders for name in ("e_score_correction_bias", "expert_bias")]
    return next((bias.flatten() for bias in found if bias is not None), torch.zeros(EXPERTS))


def _restrict(model: Any, name: str, residents: dict[int, list[int]], on: list[bool]) -> None:
    """Have the routers of a dense model choose among `residents` while `on` says so."""
    for index, path in ((i, MIXTURES[name].down.format(i=i)) for i in residents):
        parent = model.get_submodule(path.rpartition(".")[0])
        router = parent.gate if hasattr(parent, "gate") else parent.router
        bias, own = _bias_of(parent, router), router.forward
        assert bool(bias.any()) == ("bias" in _ROUTERS[name])

        def forward(*args: Any, i: int = index, bias: Tensor = bias, own: Any = own) -> Any:
            given = own(*args)
            if not on[0]:
                return given
            logits = given[{"llama4": 1, "jetmoe": 4}.get(name, 0)]
            scale = getattr(model.config, "routed_scaling_factor", 1.0)
            found = [_choice(name, row, bias, residents[i], scale) for row in logits.float()]
            weights, chosen = torch.stack([w for w, _ in found]).to(logits), torch.stack([c for _, c in found])
            if name == "llama4":  # weights of all experts, and logits
                return torch.zeros_like(logits).scatter(1, chosen, weights), logits
            if name == "jetmoe":  # tokens in the order of their experts
                order = chosen.flatten().sort(stable=True).indices
                counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
                return order, order // ACTIVE, weights.flatten()[order], counts, logits
            return logits, weights, chosen

        router.forward = forward


@pytest.mark.parametrize("name", _ROUTERS)
def test_where_logits_of_minus_infinity_are_no_restriction(name: str):
    """Of tokens that would choose others: they change the sum that weights are shares of, groups, and leave a bias."""
    generator, same = torch.Generator().manual_seed(0), []
    for _ in range(200):
        logits, bias = torch.randn(2, EXPERTS, generator=generator)
        bias = bias * ("bias" in _ROUTERS[name])
        allowed = torch.randperm(EXPERTS, generator=generator)[:6].sort().values.tolist()
        if any(len(set(allowed) & set(group)) < ACTIVE for group in (range(0, 4), range(4, 8))):
            continue
        masked = torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(allowed), logits[allowed])
        ours, theirs = _choice(name, logits, bias, allowed, 1), _choice(name, masked, bias, range(EXPERTS), 1)
        if set(_choice(name, logits, bias, range(EXPERTS), 1)[1].tolist()) <= set(allowed):
            continue
        same.append(torch.equal(ours[1], theirs[1]) and torch.allclose(ours[0], theirs[0]))
    assert len(same) > 20
    assert all(same) == ("-inf" in _ROUTERS[name])


@pytest.mark.parametrize("name", mostly_slow(_ROUTERS, 3))
def test_route_is_each_routers_own_choice_among_residents(mixtures, name: str):
    ids = _ids()
    with _load(mixtures(name), density=0.75, missing_experts="route") as model:
        found = model.generate(**_greedy(ids, new=12))
        residents = {i: cache.residents for i, cache in model.engine.loaded.layers.experts.items()}
        report = model.last_report
        assert model.generate(**_greedy(ids, new=12)).sequences.equal(found.sequences)
    assert all(len(kept) == 6 for kept in residents.values())
    assert report.decode_streamed_bytes == 0 < report.experts.redirected_share < 1
    dense, on = _dense(mixtures(name)), [False]
    _restrict(dense, name, residents, on)
    output = dense(ids, use_cache=True, logits_to_keep=1)
    on[0] = True
    for token, logits in zip(found.sequences[0, 20:], found.logits, strict=True):
        torch.testing.assert_close(output.logits[:, -1], logits, rtol=1e-4, atol=1e-4)
        output = dense(token[None, None], **{CACHE: output[CACHE]}, use_cache=True)


def test_residents_run_out_of_a_routers_groups(mixtures):
    """Two of eight: the group that is chosen may hold none of them."""
    with _load(mixtures("deepseek_v3"), density=0.25, missing_experts="route") as model:
        model.generate(**_greedy(_ids()))
        assert model.last_report.decode_streamed_bytes == 0


def test_a_router_that_cannot_be_restricted(mixtures):
    with (
        _load(mixtures("phimoe"), density=0.5, missing_experts="route") as model,
        pytest.raises(GriffinError, match=r"layer 0: this model's router .*missing_experts='fetch'"),
    ):
        model.generate(**_greedy(_ids()))


def _added(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """(weight x norm of the output)^2 of each expert of one token."""
    one = torch.ones(1, 1, dtype=torch.float64)
    outputs = [type(module).forward(module, hidden[None], expert.view(1, 1), one) for expert in index]
    return torch.stack([(w * o.norm()) ** 2 for w, o in zip(weights, outputs, strict=True)])


@pytest.mark.parametrize(("name", "options"), [("mixtral", {}), ("gpt_oss", {"ff_chunk_tokens": 16})], ids=str)
@torch.no_grad()
def test_the_statistic_is_the_formula(mixtures, name: str, options: dict[str, Any]):
    """Sum over tokens of (weight x norm of the output)^2, over the same of all experts of the token."""
    dense, ids, sums = _dense(mixtures(name)).double(), _ids(tokens=40), {}
    calls: dict[int, tuple[Tensor, ...]] = {}
    experts = _experts_of(dense, name)
    dense.set_experts_implementation("eager")  # the one that takes float64
    hooks = [
        module.register_forward_pre_hook(lambda _, args, i=i: calls.update({i: args})) for i, module in experts.items()
    ]
    dense(ids)
    for hook in hooks:
        hook.remove()
    for i, module in experts.items():
        sums[i] = torch.zeros(EXPERTS, dtype=torch.float64)
        for hidden, index, weights in zip(*calls[i], strict=True):
            added = _added(module, hidden, index, weights)
            sums[i].index_add_(0, index, added / added.sum())
    with _load(mixtures(name), density=0.5, keep_prompts=True, **options) as model:
        context = model.new_context()
        model.generate(**_greedy(ids, new=2), context=context)
        for i, expected in sums.items():
            torch.testing.assert_close(context.squared[i][0].double(), expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(model.selected[i], expected.topk(4).indices.sort().values)
        kept = [float(table.topk(4).values.sum() / table.sum()) for table in sums.values()]
        assert model.last_report.activation_kept == pytest.approx(sum(kept) / len(kept), abs=1e-4)


@pytest.mark.parametrize("missing", ["fetch", "route"])
def test_a_conversation_goes_on(mixtures, missing: str):
    """Two contexts take turns; fetched, each is the full model's, whatever is resident."""
    first, second = _ids(), _ids().flip(1)
    options = {"density": 0.5, "keep_prompts": True, "missing_experts": missing}
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with _load(mixtures("qwen3_moe"), **options) as model:
        contexts = [model.new_context(), model.new_context()]
        answer = model.generate(first, **greedy, context=contexts[0])
        model.generate(second, **greedy, context=contexts[1])
        longer = torch.cat([answer, torch.full((1, 4), 7)], 1)
        again = model.generate(longer, **greedy, context=contexts[0], refresh="never")
    if missing == "fetch":
        dense = _dense(mixtures("qwen3_moe"))
        assert torch.equal(again, dense.generate(longer, **greedy, attention_mask=torch.ones_like(longer)))
        return
    with _load(mixtures("qwen3_moe"), **options) as alone:
        context = alone.new_context()
        alone.generate(first, **greedy, context=context)
        assert torch.equal(again, alone.generate(longer, **greedy, context=context, refresh="never"))


def test_loading_merges_nothing(mixtures):
    """One tensor of all experts, in the files one by one: none of it is in memory but the residents."""
    with _load(mixtures("mixtral"), density=0.5) as model:
        store = model.engine.loaded.layers.expert_store
        assert store.unmapped_bytes == 0
        assert {type(tensor).__name__ for tensor in store.tensors(0)} == {"JoinedTensor"}
        assert model.resident_bytes == model.plan.resident_bytes


def test_more_memory_is_more_experts(mixtures):
    kept, sizes = [], {"max_gpu_mem": "40MB", "ctx_size": 64, "quantize": "none"}
    with _load(mixtures("mixtral"), density=0.25) as model:
        least = model.plan.peak_bytes
    for budget in range(least, least + 600_000, 120_000):
        with _load(mixtures("mixtral"), **{**sizes, "max_gpu_mem": budget}) as model:
            model.generate(**_greedy(_ids(), new=4))
            assert model.last_report.peak_device_bytes <= model.plan.peak_bytes <= budget
            assert model.resident_bytes == model.plan.resident_bytes
            kept.append(model.plan.kept[0])
    assert kept == sorted(kept)
    assert ACTIVE <= kept[0] < kept[-1]
    with pytest.raises(DoesNotFit, match=r"budget 150.* 2 of 8 experts a layer, as many as a token is sent to,.*--max"):
        _load(mixtures("mixtral"), max_gpu_mem=150_000)
    with pytest.raises(UsageError, match=r"layer 0 would keep 1 of 8 experts, and a token is sent to 2: .* 0\.25"):
        _load(mixtures("mixtral"), density=0.2)


def _damaged(source: Path, directory: Path, change: Any) -> Path:
    tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


@pytest.mark.parametrize("expert", [0, 7])
def test_an_expert_that_is_missing_or_of_another_shape(mixtures, tmp_path: Path, expert: int):
    name = f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"
    directory = _damaged(mixtures("mixtral"), tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"1 missing keys, first .*experts\.{expert}\.w3\.weight"):
        _load(directory, density=0.5)
    directory = _damaged(mixtures("mixtral"), tmp_path, lambda tensors: tensors.update({name: torch.zeros(95, 32)}))
    with pytest.raises(CheckpointError, match=rf"1 mismatched keys, first .*experts\.{expert}\."):
        _load(directory, density=0.5)


def test_a_router_that_asks_for_more_experts_than_there_are(mixtures, tmp_path: Path):
    directory = _damaged(mixtures("mixtral"), tmp_path, lambda tensors: None)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    with pytest.raises(CheckpointError, match=r"layer 0: its router sends a token to 9 experts, there are 8"):
        _load(directory, density=0.5)


_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ram": ({"offload": "ram"}, "offload='ram' holds no experts"),
    "selection": ({"selection": "magnitude"}, "selection='magnitude' is by norms of neurons"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_does_not_work_yet_is_refused(mixtures, name: str):
    options, words = _REFUSED[name]
    with pytest.raises((UsageError, UnsupportedModel), match=words):
        _load(mixtures("mixtral"), **options)


def test_a_dense_model_has_no_experts_to_miss(checkpoints):
    with pytest.raises(UsageError, match="is for mixtures of experts, and llama is none"):
        _load(checkpoints("llama2"), missing_experts="route")


def _as_fp8(tensors: dict[str, Tensor], *, decoded: bool) -> None:
    """Matrices of experts and attention in FP8, one scale each; or the numbers that these stand for."""
    for name in [name for name in tensors if "experts." in name or "_proj." in name]:
        scale = tensors[name].abs().max() / 448
        codes = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name] = codes.float() * scale if decoded else codes
        if not decoded:
            tensors[f"{name}_scale_inv"] = scale.view(1, 1)


def test_experts_that_others_quantised_are_read_as_they_lie(mixtures, tmp_path: Path):
    source, found = mixtures("qwen3_moe"), {}
    for kind in ("decoded", "packed"):
        (tmp_path / kind).mkdir()
        directory = _damaged(source, tmp_path / kind, lambda t, kind=kind: _as_fp8(t, decoded=kind == "decoded"))
        config = json.loads((directory / "config.json").read_text())
        method = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "gate"]}
        if kind == "packed":
            (directory / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
        with _load(directory, density=0.5, dtype="float32") as model:
            found[kind] = (model.generate(**_greedy(_ids(), new=8)), model.last_report)
    (plain, wide), (packed, narrow) = found["decoded"], found["packed"]
    assert torch.equal(packed.sequences, plain.sequences)
    _close(packed.logits, plain.logits)
    assert narrow.experts.misses == wide.experts.misses > 0
    needed, floats = (report.decode_streamed_bytes - report.experts.wrong_bytes for report in (narrow, wide))
    assert needed < 0.26 * floats  # a byte in the place of four, and scales
