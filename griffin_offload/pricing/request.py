"""What is asked of the planner, and one use of a planned model."""

from dataclasses import dataclass
from typing import Literal

from griffin_offload.config import MIN_AUTO_DENSITY, CacheKind, Density, KVBits


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of the planner."""

    budget_bytes: int
    ctx_tokens: int | None = None
    """None: the largest of MAX_AUTO_CTX, halved until it fits."""
    prompt_tokens: int | None = None
    """Longest prompt; None: the whole context."""
    batch: int = 1
    density: Density | Literal["auto"] = "auto"
    min_density: float = MIN_AUTO_DENSITY
    """The smallest that "auto" considers."""
    overhead_bytes: int = 0
    """What the device's own runtime takes (a CUDA context); 0 on the CPU."""
    offloaded_in_budget: bool = False
    """The full FF weights of streamed layers rest inside the budget (CPU device, --offload ram)."""
    ff_chunk_tokens: int | None = None
    always_stream: bool = False
    host_embeddings: bool = True
    """Whether the embeddings may stay on the host where that helps."""
    stored_share: float = 0.0
    """On the CPU in another precision than the stored one: pages of the source beside a slot, per byte of it."""
    kv_bits: KVBits = 16
    cache: CacheKind = "ours"
    """The KV cache that `generate` uses when not told otherwise: ours, unless the model's layers need another."""
    translated: bool = False
    """Linear layers multiply in float32, block by block (runtime/cpu_linear.py)."""


@dataclass(frozen=True)
class Usage:
    """One use of a planned model: what the KV cache and the workspace depend on."""

    batch: int
    prompt_tokens: int
    ctx_tokens: int
    cache: CacheKind = "ours"
    """Allocated for the whole context before decode ("ours", "static"), or growing with every token ("dynamic")."""
    drafts: int = 0
    """Tokens of prompt lookup that are in the KV cache behind the context before they are rolled back."""
    logit_positions: int = 1
    """Positions per sequence whose logits exist at once: drafts of prompt lookup, all of them in a bare forward."""
    kept_scores: int = 0
    """float32 scores that are kept for the caller (output_scores, output_logits), per sequence."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that our KV cache is made for."""
        return self.ctx_tokens + self.drafts
