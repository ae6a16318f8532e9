"""Where an answer ends: checkpoints say it in up to three places, which need not agree."""

from typing import Any

from griffin_offload.errors import CheckpointError
from griffin_offload.runtime.prompts import template_end


def end_tokens(tokenizer: Any, settings: Any, vocab_size: int, *, chat: bool) -> list[int]:
    """Ids that end an answer, sorted: those of the generation `settings`, which transformers knows alone; the
    tokenizer's end of sequence, which fine-tunes change and forget to tell the settings; and for a `chat` what the
    template writes behind an answer, if that is a special token."""
    told = settings.eos_token_id
    found = set(told if isinstance(told, list) else [told]) | {tokenizer.eos_token_id}
    if chat and tokenizer.chat_template is not None:
        found |= _turn_ends(tokenizer)
    return sorted(end for end in found if end is not None and 0 <= end < vocab_size)


def _turn_ends(tokenizer: Any) -> set[int]:
    try:
        return set(template_end(tokenizer))
    except CheckpointError:  # a template that takes no such conversation says nothing here
        return set()
