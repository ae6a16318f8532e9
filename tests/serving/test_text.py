"""Tokens to text piece by piece, against the tokenizer's own decoding of all of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marks import mostly_slow
from scripted_model import BOS, EOS, llama2_tokenizer
from tiny_models import VOCAB, write_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from griffin_offload.serving.logprobs import LogprobRecorder, TokenLogprob, token_bytes
from griffin_offload.serving.responses import by_label, label
from griffin_offload.serving.text_stream import Detokeniser, whole_text


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


SPACES = ["▁", "▁▁", "▁the", "the", "▁a", "s", ".", "'", "<0x0A>", "é", "<s>", "</s>"]
LLAMA2 = {
    "strip": llama2_tokenizer([*SPACES, "é"]),
    "metaspace": llama2_tokenizer([*SPACES, "é"], decoders.Metaspace("▁", "always")),
    "metaspace first": llama2_tokenizer([*SPACES, "é"], decoders.Metaspace("▁", "first")),
    "word pieces": llama2_tokenizer(["▁", "the", "##s", "a", ".", "é"], decoders.WordPiece("##", cleanup=False)),
}


@pytest.mark.parametrize("kind", LLAMA2)
@given(st.data())
def test_pieces_make_the_whole_with_marked_spaces(kind: str, data: st.DataObject):
    """Spaces at the start of a text and of every piece, special tokens in between."""
    tokenizer = LLAMA2[kind]
    words = [*tokenizer.convert_tokens_to_ids(SPACES[:9]), BOS, EOS]
    tokens = data.draw(st.lists(st.sampled_from(words), max_size=12))
    tokens = [token for token in tokens if token is not None]
    assert "".join(pieces(Detokeniser(tokenizer), tokens)) == whole_text(tokenizer, tokens)


@pytest.mark.parametrize("kind", mostly_slow(LLAMA2, 2))
@pytest.mark.parametrize("begins", [True, False], ids=["chat", "completion"])
@given(st.data())
def test_logprob_tokens_join_to_the_text(kind: str, begins: bool, data: st.DataObject):
    tokenizer = LLAMA2[kind]
    words = [token for token in tokenizer.convert_tokens_to_ids(SPACES) if token is not None]
    tokens = data.draw(st.lists(st.sampled_from(words), max_size=10))
    recorder = LogprobRecorder(tokenizer, 3, begins=begins)
    recorder.observe(torch.zeros(1, len(tokenizer)))
    text = "".join(pieces(Detokeniser(tokenizer, () if begins else [BOS]), tokens))
    records = [recorder.record(token, 0) for token in tokens]
    assert b"".join(bytes(record.bytes) for record in records).decode() == text
    spoken = [record for record, token in zip(records, tokens, strict=True) if token not in (BOS, EOS)]
    assert "".join(record.text for record in spoken) == "".join(map(label, spoken)) == text


def test_words_with_and_without_a_space_have_names_of_their_own():
    tokenizer = LLAMA2["strip"]
    logits = torch.full((1, len(tokenizer)), -20.0)
    likely = tokenizer.convert_tokens_to_ids(["▁the", "the", "<0xC3>", "<0xA9>"])
    logits[0, likely] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    recorder = LogprobRecorder(tokenizer, 4)
    recorder.observe(logits)
    named = by_label(recorder.record(likely[1], 0))
    assert list(named) == [" the", "the", "bytes:\\xc3", "bytes:\\xa9"]
    assert list(named.values()) == sorted(named.values(), reverse=True)


def test_of_two_tokens_with_one_name_the_likelier_is_told():
    one, other = TokenLogprob("A", (65,), -0.5), TokenLogprob("A", (65,), -3.0)  # "A" and <0x41>
    assert by_label(TokenLogprob("A", (65,), -3.0, (one, other))) == {"A": -0.5}
