"""Where stop strings end a sequence, against cutting the text of all its tokens."""

import pytest
import torch
from scripted_model import llama2_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from griffin_offload.engine.generation import StopStrings, cut
from griffin_offload.serving.text_stream import whole_text


def word_pieces() -> PreTrainedTokenizerFast:
    """Of BERT's kind, and set to take spaces in front of marks away where nobody says otherwise."""
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "##s", "cat", ".", "'"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=True)


@pytest.mark.parametrize(
    ("tokenizer", "words", "stop"),
    [
        (word_pieces(), ["the", "cat", ".", "the", "cat"], "t ."),
        (word_pieces(), ["the", "cat", "'", "##s", "the"], "cat 's"),
        (llama2_tokenizer(["▁the", "s"]), ["▁the", "s", "▁the", "s"], " the"),
        (llama2_tokenizer(["▁the", "s"]), ["s", "<0xE2>", "<0x9C>", "<0x93>", "▁the"], "✓"),
    ],
    ids=["a mark", "an apostrophe", "a space", "a letter of bytes"],
)
def test_a_sequence_ends_with_the_token_that_completes_a_stop_string(tokenizer, words: list[str], stop: str):
    ids = tokenizer.convert_tokens_to_ids(words)
    text = whole_text(tokenizer, ids)
    assert stop in text
    criterion = StopStrings(tokenizer, [stop], 0)
    ends = next(n for n in range(1, len(ids) + 1) if bool(criterion(torch.tensor([ids[:n]]), None)))
    assert (stop in whole_text(tokenizer, ids[:ends]), stop in whole_text(tokenizer, ids[: ends - 1])) == (True, False)
    assert cut(whole_text(tokenizer, ids[:ends]), [stop]) == text[: text.index(stop)]
