"""Floor 3: what things cost in bytes. Pure arithmetic."""

from griffin_offload.pricing.kv_cache import (
    KV_PIECE_TOKENS,
    KV_SLACK_TOKENS,
    MAX_MARKS,
    Usage,
    kv_bytes,
    kv_tokens_kept,
)
from griffin_offload.pricing.price import Placement, Plan, price
from griffin_offload.pricing.request import PlanRequest, planned_use, statistics_kept
from griffin_offload.pricing.workspace import (
    CHUNK_MULTIPLE,
    MAX_GRAPHS,
    logits_bytes,
    scratch_bytes,
    statistics_bytes,
    workspace_bytes,
)

__all__ = [
    "CHUNK_MULTIPLE",
    "KV_PIECE_TOKENS",
    "KV_SLACK_TOKENS",
    "MAX_GRAPHS",
    "MAX_MARKS",
    "Placement",
    "Plan",
    "PlanRequest",
    "Usage",
    "kv_bytes",
    "kv_tokens_kept",
    "logits_bytes",
    "planned_use",
    "price",
    "scratch_bytes",
    "statistics_bytes",
    "statistics_kept",
    "workspace_bytes",
]
