"""Tokens to text piece by piece, against the tokenizer's own decoding of all of them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB, write_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from griffin_offload.serving.logprobs import token_bytes
from griffin_offload.serving.text import Detokeniser


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return write_tokenizer(Path(tmp_path_factory.mktemp("byte level")))


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: words with a mark for their space, and bytes by name; the first space is dropped."""
    words = ["<unk>", "▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def pieces(detokeniser: Detokeniser, tokens: list[int]) -> list[str]:
    return [detokeniser.feed(token) for token in tokens] + [detokeniser.flush()]


@given(st.lists(st.integers(0, VOCAB - 9), max_size=30))
def test_pieces_make_the_whole_byte_level(byte_level, tokens: list[int]):
    assert "".join(pieces(Detokeniser(byte_level), tokens)) == byte_level.decode(tokens, skip_special_tokens=True)


@given(st.text(st.sampled_from("aé✓😀漢 \n"), max_size=12))
def test_letters_come_whole(byte_level, text: str):
    tokens = byte_level(text)["input_ids"]
    shown = pieces(Detokeniser(byte_level), tokens)
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)


@given(st.text(st.sampled_from("é✓😀漢"), max_size=12))
def test_letters_come_whole_with_bytes_by_name(byte_fallback, text: str):
    """Several letters of bytes in a row: a half one behind them must not spoil those that are complete."""
    tokens = [byte_fallback.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    shown = pieces(Detokeniser(byte_fallback), tokens)
    assert ("".join(shown), shown[-1]) == (text, "")


def test_a_space_at_the_start_stays_when_the_text_goes_on(byte_fallback):
    the, cat, s = 1, 2, 3
    assert pieces(Detokeniser(byte_fallback, [the]), [cat, s, the]) == [" cat", "s", " the", ""]
    assert pieces(Detokeniser(byte_fallback), [cat, the]) == ["cat", " the", ""]


def test_bytes_that_never_become_a_letter_come_in_the_end(byte_level):
    tokens = byte_level("✓")["input_ids"][:2]
    assert pieces(Detokeniser(byte_level), tokens)[:2] == ["", ""]
    assert set(Detokeniser(byte_level).flush() + "".join(pieces(Detokeniser(byte_level), tokens))) == {"\ufffd"}


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
def test_bytes_of_tokens_are_those_of_the_text(byte_level, byte_fallback, text: str):
    tokens = byte_level(text)["input_ids"]
    found = [token_bytes(byte_level, token, byte_level.decode([token])) for token in tokens]
    assert bytes(byte for part in found for byte in part or ()) == text.encode()
    half = byte_fallback.convert_tokens_to_ids("<0xE2>")
    assert token_bytes(byte_fallback, half, byte_fallback.decode([half])) == (0xE2,)
