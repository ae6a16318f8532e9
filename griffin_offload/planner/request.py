"""What is asked of the planner, and one use of a planned model."""

from dataclasses import dataclass
from typing import Literal

from griffin_offload.config import CacheKind, Density, KVBits
from griffin_offload.kv_cache.sequence import snapshots_kept
from griffin_offload.kv_cache.workload import Workload


@dataclass(frozen=True)
class GraphCosts:
    """What captured decode steps keep, beside the workspace of a token, which they hold for good."""

    most: int
    """Captures that are kept at once."""
    pool_bytes: int
    """Of the pool that they have in common."""
    layer_bytes: int
    """Of the kernels of one layer, in each."""


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of the planner."""

    budget_bytes: int
    ctx_tokens: int | None = None
    """None: solved, see `plan.solve`."""
    prompt_tokens: int | None = None
    """Longest prompt; None: the whole context."""
    batch: int = 1
    sequences: int = 1
    """Answers at once, each with a KV cache of its own (`serve --parallel`); prompts that pass together have no more
    tokens than a planned one."""
    density: Density | Literal["auto"] = "auto"
    bits: float | Literal["auto"] = "auto"
    """Of a number of the FFs, that tiers take at most."""
    overhead_bytes: int = 0
    """What the device's own runtime takes (a CUDA context); 0 on the CPU."""
    offloaded_in_budget: bool = False
    """The full FF weights of streamed layers rest inside the budget (CPU device, --offload ram)."""
    converted_ff: tuple[int, ...] = ()
    """Of each layer, full FF weights that no file backs because loading converts them: inside the budget while the
    layer is streamed. Empty where the budget is not that of the host."""
    converted_bytes: int = 0
    """Other weights that loading converts: in memory until the first prompt has passed."""
    ff_chunk_tokens: int | None = None
    expert_slots: int | None = None
    """Experts of a layer beside its residents while a prompt passes; None: as many as there is room for."""
    host_computes: bool = False
    """What tokens miss of experts is computed by the CPU, in host memory beside the device's."""
    always_stream: bool = False
    host_embeddings: bool = True
    """Whether the embeddings may stay on the host where that helps."""
    stored_share: float = 0.0
    """On the CPU in another precision than the stored one: pages of the source beside a slot, per byte of it."""
    kv_bits: KVBits = 16
    halves_kv: bool = False
    """The KV cache may be in 8 bits where a precision or neurons do not fit beside 16."""
    cache: CacheKind = "ours"
    """The KV cache that `generate` uses when not told otherwise: ours, unless the model's layers need another."""
    pass_tokens: int = 0
    """Tokens of the streamed passes between two tokens of an answer (exact mode, refresh); 0: there are none."""
    verifies: bool = False
    """Those passes give logits for each of their tokens."""
    continued: bool = False
    """Prompts are kept, and later ones go on from their KV cache and statistic."""
    session_bytes: int = 0
    """Set aside for contexts that are kept beside the one in use."""
    weight_norms: bool = False
    """A table of norms is kept, one for every neuron of the streamed layers."""
    on_grids: bool = False
    """Whether what is streamed may lie on grids in its file, which quantising reads again."""
    translated: bool = False
    """Linear layers multiply in float32, block by block (engine/build.py)."""
    graphs: GraphCosts | None = None
    replays: int = 0
    """Decode steps that are recorded and kept, each with a token's workspace of its own; 0 but on the CPU."""
    """What captured decode steps cost; None where none are captured."""


def planned_use(request: PlanRequest, prompt_tokens: int, ctx_tokens: int) -> Workload:
    """The use that `request` plans for."""
    return Workload(
        batch=request.batch,
        together=request.sequences,
        prompt_tokens=prompt_tokens,
        ctx_tokens=ctx_tokens,
        cache=request.cache,
        pass_tokens=request.pass_tokens,
        logit_positions=request.pass_tokens if request.verifies else 1,
        statistics=statistics_kept(request.pass_tokens, request.verifies, request.continued),
        marks=snapshots_kept(continued=request.continued),
    )


def statistics_kept(pass_tokens: int, verifies: bool, continued: bool) -> int:
    """Tables of s^2 that outlive a pass: the sum so far, and of a verifying pass every token's own."""
    return bool(pass_tokens or continued) + verifies * pass_tokens
