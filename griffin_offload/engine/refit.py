"""What kept neurons can say for those that an export leaves out: least squares over a set of prompts.

With the full model's activations Z [T, F] on the set, the moments G = Z^T Z and the down projection W [H, F], the kept
neurons S get the columns W_S + D, where D is the least of |Z_S D^T - Z_R W_R^T|^2 + a |D|^2 over those that go, R:
D = W_R G_RS (G_SS + a)^-1. The moments are of one layer at a time, [F, F] in float32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from griffin_offload.blocks.base import Activations, Block
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.engine.calibration import visit_layers
from griffin_offload.engine.layer_pass import Visitor
from griffin_offload.transformers_api import StockModel

RIDGE = 0.1
"""a, in mean squares of a kept neuron over the set. benchmarks/NOTES.md has what others gave."""
_MOST_TOKENS, _LONGEST, _AT_ONCE = 2**14, 512, 2**11


def visit_moments(
    checkpoint: Checkpoint,
    model: StockModel,
    decoder: nn.ModuleList,
    blocks: Sequence[Block],
    prompts: Sequence[Tensor],
    visit: Callable[[int, Tensor | None], None],
) -> None:
    """Call `visit` with the index of every layer, in order, and the moments [F, F] of its activations on `prompts` [T],
    or on as much of them, from all over, as passes at once; None where there is no feed-forward. `model` is mapped and
    as stored."""
    ids, real = _sequences(prompts)
    chunk = max(_AT_ONCE // len(ids), 1)
    visit_layers(checkpoint, model, decoder, blocks, ids, _Moments(real, visit), chunk)


def _sequences(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pieces of prompts, filled up behind, where nothing sees it; and which tokens are theirs. Both [S, T]."""
    pieces = [piece for ids in prompts for piece in ids.split(_LONGEST)]
    longest = max(len(piece) for piece in pieces)
    pieces = pieces[:: -(-len(pieces) * longest // _MOST_TOKENS)]
    ids = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64, device="cpu")
    return ids, torch.arange(ids.shape[1], dtype=torch.int64, device="cpu") < lengths[:, None]


class _Moments(Visitor):
    def __init__(self, real: Tensor, visit: Callable[[int, Tensor | None], None]) -> None:
        self._real, self._visit = real, visit
        self._found: Tensor | None = None

    def see(self, index: int, found: Activations) -> None:
        own = found.by_sample(len(self._real))
        z = own.values()[self._real[:, own.start : own.start + own.tokens]].float()
        if self._found is None:
            self._found = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float32, device="cpu")
        self._found.addmm_(z.t(), z)

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        found, self._found = self._found, None
        assert found is not None or not block.neurons, "every feed-forward is passed"
        self._visit(index, found)


def refitted(down: Tensor, moments: Tensor, chosen: Tensor) -> Tensor:
    """The columns [H, K] of `down` [H, F] for the neurons `chosen` [K], in its type."""
    gone = torch.ones(down.shape[1], dtype=torch.bool, device="cpu").index_fill_(0, chosen, False).nonzero()[:, 0]
    across = moments[:, chosen]
    known = across[chosen].double()
    known.diagonal().add_(RIDGE * known.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    wanted = (down[:, gone].float() @ across[gone]).double()
    change = torch.cholesky_solve(wanted.t(), torch.linalg.cholesky(known)).t()
    return (down[:, chosen].double() + change).to(down.dtype)
