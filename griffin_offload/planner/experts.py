"""What a plan means for a mixture of experts: parameters in all, for a token and resident; hits and bytes expected.

How often an expert that a token needs is resident depends on the prompt: here routing is assumed to fall off as Zipf's
law with an exponent, and the residents to be the experts that are used most.
"""

from dataclasses import asdict, dataclass
from typing import Any

from griffin_offload.blocks.sizes import LayerSizes, ModelSizes
from griffin_offload.planner.plan import Plan

ASSUMED_SKEW = 0.8
"""Exponent of Zipf's law: the r-th most used expert of a layer gets 1 / r^0.8 of what the first gets."""


@dataclass(frozen=True)
class ExpertForecast:
    """Of one plan."""

    parameters: int
    active_parameters: int
    """That one token is computed with."""
    resident_parameters: int
    expected_hit_rate: float
    """Of the experts that a token is sent to, those that are resident."""
    read_bytes_per_token: float
    """Weight bytes in memory that a token is multiplied by, residents and fetched ones."""
    fetched_bytes_per_token: float
    """As files hold them, of experts that are not resident."""
    host_bytes_per_token: float
    """The same where they are not fetched, but computed by the CPU for a device."""
    assumed_skew: float = ASSUMED_SKEW

    def to_json(self) -> dict[str, Any]:
        """Part of what `griffin-offload plan --json` prints."""
        return asdict(self)


def forecast(shape: ModelSizes, plan: Plan, stored_share: float = 1.0) -> ExpertForecast:
    """Of `plan`, whose model is `shape`, a mixture of experts; `stored_share` are stored bytes for each of the model's,
    where files are packed."""
    pairs = [(layer, kept) for layer, kept in zip(shape.layers, plan.kept, strict=True) if layer.experts]
    total = _parameters(shape)
    idle = sum((layer.neurons - layer.experts) * _numbers(shape, layer) for layer, _ in pairs)
    away = sum((layer.neurons - kept) * _numbers(shape, layer) for layer, kept in pairs)
    rates = [hit_rate(kept, layer.neurons) for layer, kept in pairs]
    needed = sum(layer.experts for layer, _ in pairs)
    missed = [layer.experts * (1 - rate) for (layer, _), rate in zip(pairs, rates, strict=True)]
    away_bytes = sum(
        count * layer.ff_bytes / layer.neurons * stored_share for count, (layer, _) in zip(missed, pairs, strict=True)
    )
    resting = sum((kept - layer.experts) * layer.neuron_bytes for layer, kept in pairs)
    return ExpertForecast(
        parameters=total,
        active_parameters=total - idle,
        resident_parameters=total - away,
        expected_hit_rate=1 - sum(missed) / needed,
        read_bytes_per_token=plan.decoded_bytes - resting,
        fetched_bytes_per_token=0.0 if plan.host_bytes else away_bytes,
        host_bytes_per_token=away_bytes if plan.host_bytes else 0.0,
    )


def hit_rate(kept: int, experts: int, skew: float = ASSUMED_SKEW) -> float:
    """Share of routing that goes to the `kept` most used of `experts`."""
    shares: list[float] = [rank**-skew for rank in range(1, experts + 1)]
    return sum(shares[:kept]) / sum(shares)


def _numbers(shape: ModelSizes, layer: LayerSizes) -> int:
    """Parameters of one expert."""
    return layer.plain_neuron_bytes // shape.item_bytes


def _parameters(shape: ModelSizes) -> int:
    layers = sum(
        layer.neurons * layer.plain_neuron_bytes + layer.plain_attention_bytes + layer.norm_bytes
        for layer in shape.layers
    )
    return (layers + shape.plain_embedding_bytes + shape.plain_head_bytes + shape.other_bytes) // shape.item_bytes
