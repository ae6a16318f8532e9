"""Which experts should stay: hit rates of caches, and what routing among residents loses, on real text.

The full model runs over windows of text, and its routing is written down. Behind each prompt, caches of a share of each
layer's experts are asked for what the tokens were sent to: ours (`ExpertCache`, seeded by the prompt's statistic, then
following use), one that drops what was used least recently, from empty or filled by the prompt, and fixed sets. Then
routing is kept to fixed sets, by the simulation that `eval ppl` is made of. The ceiling of hit rates is the fixed set
that is best for the very tokens, and of losses the full model.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_variants import documents_of
from report import markdown_table, origin_lines, provenance, write
from score_variants import cut
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.evaluation.perplexity import Row, rows_of
from griffin_offload.evaluation.samples import Sample
from griffin_offload.evaluation.simulation import observe, prompt_prior, simulate
from griffin_offload.method.variants import Variant
from griffin_offload.offload.expert_buffers import ExpertBuffers
from griffin_offload.offload.expert_cache import ExpertCache
from griffin_offload.offload.expert_store import ExpertStore

SHARES = (0.25, 0.5, 0.75)
SEEDS = 3
"""Draws of random experts."""


@dataclass(frozen=True)
class Routing:
    """Of one window and layer: what its T tokens were sent to."""

    index: Tensor
    """[T, k]."""
    weights: Tensor
    """[T, k]."""
    shares: Tensor
    """Of what a token's experts add, [T, E]: squares of norms over their sum."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="a mixture of experts")
    add("--text", type=Path, action="append", required=True, help=".txt or .txt.xz, documents between <|endoftext|>")
    add("--prompt-tokens", type=int, default=128)
    add("--generate-tokens", type=int, default=128)
    add("--windows", type=int, default=16, help="of each text, spread evenly")
    add("--threads", type=int)
    add("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def load(args: argparse.Namespace, seed: int = 0) -> GriffinModel:
    options = {"device": "cpu", "density": 0.0, "always_stream": True, "seed": seed, "threads": args.threads}
    return GriffinModel.from_pretrained(args.dir, **options, ctx_size=args.prompt_tokens + args.generate_tokens)


def routings(model: GriffinModel, windows: Sequence[Tensor]) -> list[list[Routing]]:
    """By window and layer of experts."""
    blocks = [(layer, block) for layer, block in enumerate(model.engine.blocks) if block.active]
    calls: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer, _ in blocks}
    shares = {layer: torch.zeros(len(windows), windows[0].numel(), block.neurons) for layer, block in blocks}

    def look(layer: int, place: int, start: int, z: Tensor) -> None:
        if layer in shares:
            squares = z.double().square()
            shares[layer][place, start : start + len(z)] = squares / squares.sum(-1, keepdim=True).clamp_min(1e-30)

    hooks = [
        block.module.register_forward_pre_hook(lambda _, args, layer=layer: calls[layer].append(args[1:]))
        for layer, block in blocks
    ]
    for window, ids in enumerate(windows):  # one at a time: calls come in the order of windows
        observe(model, [ids], lambda layer, _, start, z, window=window: look(layer, window, start, z))
    for hook in hooks:
        hook.remove()
    return [
        [Routing(*calls[layer][window], shares[layer][window]) for layer, _ in blocks] for window in range(len(windows))
    ]


def hits_of_ours(routing: Routing, prompt: int, places: int) -> tuple[int, int]:
    """(hits, all) of the runtime's own cache; experts are numbers here."""
    experts = routing.shares.shape[1]
    store = ExpertStore({0: [torch.zeros(experts, 1)]}, evict=False)
    cache = ExpertCache(0, store, [torch.zeros(places, 1)], ExpertBuffers(experts), experts)

    def tokens(part: slice) -> None:
        index = routing.index[part]
        needed = index.unique().tolist()
        cache.begin(needed, index, routing.weights[part])
        for expert in needed:
            cache.tensors(expert)

    cache.start_pass()
    tokens(slice(0, prompt))
    cache.settle(best(routing.shares[:prompt].sum(0), places))
    cache.end_pass()
    for token in range(prompt, len(routing.index)):
        tokens(slice(token, token + 1))
    store.close()
    return cache.hits, cache.hits + cache.misses


def hits_of_recent(routing: Routing, start: int, prompt: int, places: int) -> tuple[int, int]:
    """The least recently used one gives way; counted behind the prompt."""
    recent: list[int] = []
    hits = asked = 0
    for token in range(start, len(routing.index)):
        for expert in routing.index[token].tolist():
            hits += token >= prompt and expert in recent
            asked += token >= prompt
            recent = [expert, *(other for other in recent if other != expert)][:places]
    return hits, asked


def hits_of_fixed(routing: Routing, prompt: int, kept: Sequence[int]) -> tuple[int, int]:
    behind = routing.index[prompt:]
    return int(torch.isin(behind, torch.tensor(list(kept))).sum()), behind.numel()


def best(scores: Tensor, places: int) -> list[int]:
    return sorted(scores.topk(places).indices.tolist())


def shares_of_hits(routing: Routing, prompt: int, places: int, prior: list[int]) -> dict[str, float]:
    """By cache, of one window and layer; `prior` are the experts that other windows use most."""
    chosen = best(routing.shares[:prompt].sum(0), places)
    behind = torch.bincount(routing.index[prompt:].flatten(), minlength=routing.shares.shape[1])
    counts = {
        "the prompt's statistic, then use (ours)": hits_of_ours(routing, prompt, places),
        "least recently used, filled by the prompt": hits_of_recent(routing, 0, prompt, places),
        "least recently used, from empty": hits_of_recent(routing, prompt, prompt, places),
        "fixed: the prompt's statistic": hits_of_fixed(routing, prompt, chosen),
        "fixed: global prior": hits_of_fixed(routing, prompt, prior),
        "fixed: best for these tokens (ceiling)": hits_of_fixed(routing, prompt, best(behind, places)),
    }
    return {name: hits / asked for name, (hits, asked) in counts.items()}


def hit_rates(found: list[list[Routing]], prompt: int, share: float) -> dict[str, float]:
    """By cache: mean over windows and layers. A window's prior is that of all the others."""
    total = [sum(window[layer].shares.sum(0) for window in found) for layer in range(len(found[0]))]
    rates = []
    for window in found:
        for layer, routing in enumerate(window):
            places = round(share * routing.shares.shape[1])
            rates.append(shares_of_hits(routing, prompt, places, best(total[layer] - routing.shares.sum(0), places)))
    return {name: statistics.mean(each[name] for each in rates) for name in rates[0]}


def losses(args: argparse.Namespace, model: GriffinModel, windows: Sequence[Tensor]) -> dict[str, list[Row]]:
    """A row for each share, by what the residents are chosen by; the prior is of the prompts of all windows."""
    prior = prompt_prior(model, [Sample.prompt_alone(ids[: args.prompt_tokens]) for ids in windows])
    samples = [Sample.generation(ids[: args.prompt_tokens], ids[args.prompt_tokens :]) for ids in windows]

    def rows(model: GriffinModel, **variant: Any) -> list[Row]:
        variants = [Variant(share, **variant) for share in SHARES]
        return rows_of(simulate(model, samples, variants, prior=prior), variants, args.prompt_tokens)

    found = {
        "the prompt's statistic": rows(model),
        "global prior": rows(model, prior="rank", prior_share=1.0),
        "magnitude of weights": rows(model, selection="magnitude"),
    }
    for seed in range(SEEDS):
        with load(args, seed) as other:
            found[f"random, draw {seed + 1}"] = rows(other, selection="random")
    return found


def page(record: dict[str, Any]) -> str:
    heads = [f"{share:.0%}" for share in SHARES]
    parts = [f"# Which experts stay: {record['model']}", origin_lines(record)]
    for name, found in record["texts"].items():
        names = list(found["hit_rates"][str(SHARES[0])])
        hits = [[way, *(f"{found['hit_rates'][str(share)][way]:.1%}" for share in SHARES)] for way in names]
        full = found["losses"]["the prompt's statistic"][0]["ppl_full"]
        lost = [
            [way, *(f"{row['ppl'] / row['ppl_full'] - 1:+.1%}, {row['kl']:.3f}, {row['top1']:.3f}" for row in rows)]
            for way, rows in found["losses"].items()
        ]
        parts += [
            f"## {name}",
            "Experts of decoded tokens that are resident, by the share of each layer's experts that has a place:",
            markdown_table([["cache", *heads], *hits]),
            f"Routed among a fixed set: perplexity over the full model's {full:.2f}, KL in nats, same first choice:",
            markdown_table([["residents", *heads], *lost]),
        ]
    return "\n\n".join(parts)


def main() -> None:
    args = parse_arguments()
    texts: dict[str, Any] = {}
    with load(args) as model:
        tokens = args.prompt_tokens + args.generate_tokens
        windows = {path.name.split(".")[0]: cut(model, documents_of(path), tokens, args.windows) for path in args.text}
        found = {name: routings(model, own) for name, own in windows.items()}
        if len(windows) > 1:
            windows["all together"] = [ids for own in windows.values() for ids in own]
            found["all together"] = [window for own in found.values() for window in own]
        for name, own in windows.items():
            rates = {str(share): hit_rates(found[name], args.prompt_tokens, share) for share in SHARES}
            rows = {way: [row.to_json() for row in of] for way, of in losses(args, model, own).items()}
            texts[name] = {"hit_rates": rates, "losses": rows}
    sizes = {"prompt_tokens": args.prompt_tokens, "generate_tokens": args.generate_tokens, "windows": args.windows}
    record = {**provenance(Path(__file__).name, sys.argv[1:]), "model": args.dir.name, **sizes, "texts": texts}
    write(args.out, f"expert_cache-{args.dir.name}", page(record), record)
    print(page(record))


if __name__ == "__main__":
    main()
