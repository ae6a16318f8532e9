"""The streamed pass: the stock model runs over all new tokens once while each layer visits the device in full.

While layer i is on the device with its full FF, three things happen before its slot is reused: its own forward
runs over all tokens, the GRIFFIN statistic of its activations is summed, and the chosen neurons are gathered into
the layer's compact parameters. The tokens are a prompt, a conversation's next turn, or tokens that the residents
drafted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_offload.blocks.base import Activations, Block
from griffin_offload.config import WEIGHT_NORMS
from griffin_offload.devices.memory import give_back_freed
from griffin_offload.engine.layer_pass import DecoderLayers, LayerPass, Progress, StreamFeed, Visitor
from griffin_offload.engine.report import PrefillReport
from griffin_offload.kv_cache.sequence import Statistic
from griffin_offload.method.selection import (
    layer_generator,
    score_of,
    select_neurons,
    share_kept,
    shared_score,
    split_at,
    split_levels,
    split_tokens,
)

# After so many bytes of hidden states, on the CPU, freed memory is given back: it costs a few ms then.
GIVE_BACK_BYTES = 32 * 2**20
# Below this many tokens the last quarter is too little to measure on.
SHORT_PROMPT_TOKENS = 16


class StatisticSum(Visitor):
    """Sums s^2 [B, G, F] of each layer over the tokens of each of `groups` [B, G, T]; `keep` keeps it in `sums`."""

    def __init__(self, groups: Tensor, *, keep: bool) -> None:
        self.groups, self._keep = groups, keep
        self.squared = torch.empty(0, dtype=torch.float32, device="cpu")
        self.sums: dict[int, Tensor] = {}

    def start(self, index: int, block: Block, full: list[Tensor]) -> None:
        samples, groups = self.groups.shape[:2]
        self.squared = torch.zeros(samples, groups, block.neurons, dtype=torch.float32, device=self.groups.device)

    def see(self, index: int, found: Activations) -> None:
        own = found.by_sample(self.groups.shape[0])
        self.squared += own.squared(self.groups[:, :, own.start : own.start + own.tokens])

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        if self._keep:
            self.sums[index] = self.squared


@dataclass(frozen=True)
class PromptGroups:
    """Which of a pass's groups of tokens are one prompt's, in the order of their sums: from `start` to `end`. Those
    behind `first` measure the choice of those before (`start`: nothing is measured)."""

    start: int
    first: int
    end: int

    def own(self, table: Tensor) -> Tensor:
        """Of a table [B, G, ...] the part of this prompt."""
        return table[:, self.start : self.end]


class GatherChosen(Visitor):
    """Chooses each layer's neurons by the statistic and gathers them into its compact parameters.

    Chosen is by all tokens of all `prompts`; for each of these, by its first groups in their place, too, to measure the
    choice on the rest."""

    def __init__(
        self,
        layers: DecoderLayers,
        statistic: StatisticSum,
        earlier: Mapping[int, Tensor],
        beside: Sequence[Mapping[int, Tensor]],
        prompts: Sequence[PromptGroups],
    ) -> None:
        self._layers, self._statistic = layers, statistic
        self._earlier, self._beside, self._prompts = earlier, beside, prompts
        self.kept_shares: list[list[Tensor]] = [[] for _ in prompts]
        self.held_out_shares: list[list[Tensor]] = [[] for _ in prompts]

    def begin(self) -> None:
        self._layers.selected = {}

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        chosen = self._select(index, block, full)
        self._layers.gather(index, full, chosen)
        self._layers.selected[index] = chosen

    def _select(self, index: int, block: Block, full: list[Tensor]) -> Tensor:
        summed, earlier = self._statistic.squared, self._earlier.get(index, 0)
        formula, norms = self._layers.config.batch_statistic, _norms(self._layers, index, block, full)
        own = [prompt.own(summed).sum(1) + earlier for prompt in self._prompts]
        chosen = self._choose(index, own, norms)
        for number, prompt in enumerate(self._prompts):
            self.kept_shares[number].append(share_kept(shared_score(own[number], formula), chosen))
            if prompt.first > prompt.start:
                first = summed[:, prompt.start : prompt.first].sum(1) + earlier
                last = summed[:, prompt.first : prompt.end].sum(1)
                without = self._choose(index, [*own[:number], first, *own[number + 1 :]], norms)
                self.held_out_shares[number].append(share_kept(shared_score(last, formula), without))
        return chosen

    def _choose(self, index: int, own: Sequence[Tensor], norms: Tensor | None) -> Tensor:
        """By the statistics of the pass's own prompts, [B, F] each, and by those of the sequences beside it."""
        return choose_together(self._layers, index, [*own, *(squared[index] for squared in self._beside)], norms)


def choose_together(layers: DecoderLayers, index: int, squared: Sequence[Tensor], norms: Tensor | None) -> Tensor:
    """What sequences with the statistics `squared`, [B, F] each, choose together in a layer: by the mean of s^2 / S,
    so that a long prompt weighs as much as a short one, whatever samples of one batch do."""
    formula = "mean" if len(squared) > 1 else layers.config.batch_statistic
    return _choose(layers, index, shared_score(torch.cat(list(squared)), formula), norms)


def _choose(layers: DecoderLayers, index: int, squared: Tensor, norms: Tensor | None) -> Tensor:
    config = layers.config
    generator = layer_generator(config.seed, index)
    counts = layers.counts[index]
    chosen = select_neurons(squared, sum(counts), config.selection, generator, norms)
    return split_levels(score_of(squared, config.selection, norms), chosen, counts)


def _norms(layers: DecoderLayers, index: int, block: Block, full: list[Tensor]) -> Tensor | None:
    """Norms of the weights [F], if the selection asks for them."""
    if layers.config.selection not in WEIGHT_NORMS:
        return None
    if index not in layers.norms:
        layers.norms[index] = block.weight_norms(layers.config.selection, full)
    return layers.norms[index]


class GiveBack(Visitor):
    """Gives freed memory back now and then, on the CPU."""

    def __init__(self) -> None:
        self._since_bytes = 0

    def done(self, hidden: Tensor) -> None:
        self._since_bytes += hidden.nbytes if hidden.is_cpu else 0
        if self._since_bytes >= GIVE_BACK_BYTES:
            self._since_bytes = 0
            give_back_freed()


class StreamedPass(LayerPass):
    """A context manager: inside it, one forward of the stock model is a streamed pass.

    `groups` [B, G, T] on the device say which tokens choose, in G groups whose statistics are summed apart: the parts
    of a prompt, of which those behind the first `choosing_groups` measure the choice of these (0: nothing is measured);
    or each token for itself. Of several prompts behind each other, [1, T] of all, `prompts` says which are whose.
    `earlier` is the statistic of passes before, s^2 [B, F] of each streamed layer: it
    chooses, too, and so do those of sequences that decode `beside`. Without `choose` the compact parameters stay as
    they are. `keep` keeps the sums of each group in `sums`.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        groups: Tensor,
        *,
        earlier: Mapping[int, Tensor] | None = None,
        beside: Sequence[Mapping[int, Tensor]] = (),
        choose: bool = True,
        choosing_groups: int = 0,
        prompts: Sequence[PromptGroups] | None = None,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._layers, self._stream = layers, StreamFeed(layers)
        self._prompts = prompts or [PromptGroups(0, choosing_groups, groups.shape[1])]
        self._statistic = StatisticSum(groups, keep=keep)
        self._chosen = GatherChosen(layers, self._statistic, earlier or {}, beside, self._prompts)
        visitors = [self._statistic, *([self._chosen] if choose else []), GiveBack()]
        super().__init__(
            layers.decoder,
            layers.blocks,
            self._stream,
            visitors,
            chunk_tokens=layers.ff_chunk_tokens,
            progress=progress,
        )
        self._fetched_before, self._waited_before = layers.fetched_bytes, layers.arrival_wait_s

    @property
    def sums(self) -> dict[int, Tensor]:
        """s^2 [B, G, F] of each streamed layer, of this pass alone."""
        return self._statistic.sums

    @property
    def unvisited(self) -> int:
        """Streamed layers that the forward did not run: their compact parameters hold nothing."""
        return len(self._layers.compact) - self.visited

    @property
    def peak_in_flight_bytes(self) -> int:
        return self._stream.peak_in_flight_bytes

    def reports(self) -> list[PrefillReport]:
        """Figures of the finished pass of each prompt; waits for the device. All took the seconds of the whole pass,
        whose bytes they share."""
        dense = self._layers.feed_forwards - len(self._layers.compact)
        streamed, count = self._layers.fetched_bytes - self._fetched_before, len(self._prompts)
        found = []
        for number, prompt in enumerate(self._prompts):
            tokens = prompt.own(self._statistic.groups).sum((1, 2))
            too_short = int(tokens.min()) < SHORT_PROMPT_TOKENS
            held_out = None if too_short else _mean(self._chosen.held_out_shares[number], dense)
            found.append(
                PrefillReport(
                    prompt_tokens=int(tokens.sum()),
                    seconds=self.seconds,
                    streamed_bytes=streamed * (number + 1) // count - streamed * number // count,
                    wait_s=self._layers.arrival_wait_s - self._waited_before + self._stream.wait_s,
                    select_s=self.end_s,
                    statistic_s=self.see_s,
                    activation_kept=_mean(self._chosen.kept_shares[number], dense),
                    activation_kept_heldout=held_out,
                )
            )
        return found


def _mean(shares: list[Tensor], dense_layers: int) -> float:
    """Mean over layers; a layer with all its neurons keeps everything."""
    total = float(torch.stack(shares).sum()) if shares else 0.0
    counted = len(shares) + dense_layers
    return (total + dense_layers) / counted if counted else 1.0  # nothing is left out of a model without neurons


def grouped(mask: Tensor, seams: list[int]) -> tuple[Tensor, int]:
    """The parts of a prompt that are summed apart, float32 [B, G, T], and how many of them choose for those held out;
    with `seams`, of one sequence without padding, none goes across one."""
    if not seams:
        return split_tokens(mask), 1
    halves = split_tokens(torch.ones(1, mask.shape[1], dtype=torch.int64, device="cpu"))
    groups = split_at(halves, seams)
    choosing = int((groups[0].sum(1).cumsum(0) <= halves[0, 0].sum()).sum())
    return groups.to(mask.device), choosing


def sums_until(sums: Statistic, groups: Tensor, seams: list[int]) -> list[Statistic]:
    """s^2 [1, F] of the first tokens up to each of `seams`, by layer."""
    ends = groups[0].sum(1).cumsum(0).tolist()
    counts = [sum(end <= seam for end in ends) for seam in seams]
    return [{index: table[:, :count].sum(1) for index, table in sums.items()} for count in counts]
