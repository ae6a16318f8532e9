"""Rotary positions whose angles depend on how long a sequence is: where they change, and how far positions reach."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import GenerationMixin, PretrainedConfig

# Kinds that stretch the positions a model was trained with; others say what they reach in max_position_embeddings.
_STRETCHING = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class RopeBorder:
    """Up to `tokens` a sequence is turned by one set of angles, beyond by others, all of its positions."""

    tokens: int
    kind: str
    moving: bool
    """Whether beyond the border the angles change with every token (dynamic), not once (longrope)."""
    rereads: bool
    """Whether transformers gives the model all tokens again when an answer crosses the border (Phi-3)."""

    def crossed(self, before: int, after: int) -> bool:
        """Whether a sequence that grows so is beyond the border in the end alone."""
        return before <= self.tokens < after

    def goes_on(self, known: int, entries: int, tokens: int) -> bool:
        """Whether the first `known` KV entries of a sequence of `entries` tokens are those of one of `tokens`."""
        if max(entries, tokens) <= self.tokens:
            return True
        # One more: behind exactly as many, Phi-3 is given everything again.
        return not self.moving and min(known, entries, tokens) > self.tokens + 1


def rope_border(config: PretrainedConfig, model_class: type | None = None) -> RopeBorder | None:
    """The border of `config`'s positions, or None where every length is turned alike; of several the first one."""
    text = config.get_text_config()
    borders = []
    for rope in _ropes(text):
        kind = str(rope.get("rope_type", ""))
        if "dynamic" in kind:
            borders.append(RopeBorder(text.max_position_embeddings, kind, moving=True, rereads=False))
        elif kind == "longrope":
            tokens = rope.get("original_max_position_embeddings") or text.max_position_embeddings
            borders.append(RopeBorder(int(tokens), kind, moving=False, rereads=_rereads(text, model_class)))
    return min(borders, key=lambda border: border.tokens, default=None)


def positions_reached(config: PretrainedConfig) -> int:
    """Tokens that `config`'s positions reach: max_position_embeddings, or what one rope of all layers stretches the
    trained length to."""
    most = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in _STRETCHING:
        return int(most)
    trained = rope.get("original_max_position_embeddings") or most
    return max(int(most), int(trained * (rope.get("factor") or 1)))


def begin_anew(model: Any) -> None:
    """Let positions that grow with the sequence (dynamic) forget the longest one that has passed: a prompt's angles are
    its own then, as they are of a model that was just loaded."""
    for module in model.modules():
        original = getattr(module, "original_inv_freq", None)
        if original is not None and getattr(module, "max_seq_len_cached", 0) > module.original_max_seq_len:
            module.register_buffer("inv_freq", original.to(module.inv_freq.device), persistent=False)
            module.max_seq_len_cached = module.original_max_seq_len


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """Rope parameters: one set of all layers, or one of each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in found:
        yield found
    yield from (value for value in found.values() if isinstance(value, dict))


def _rereads(config: Any, model_class: type | None) -> bool:
    own = getattr(model_class, "prepare_inputs_for_generation", None)
    stock = GenerationMixin.prepare_inputs_for_generation
    return hasattr(config, "original_max_position_embeddings") and own not in (None, stock)
