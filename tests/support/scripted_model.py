"""A model that writes one text, whatever it is asked: each token of a chain is followed by the next one."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

_HIDDEN = 64
PAD, BOS, EOS = 0, 1, 2
_SPECIAL = ["<pad>", "<s>", "</s>"]


def llama2_tokenizer(words: Sequence[str] = (), decoder: decoders.Decoder | None = None) -> hf.PreTrainedTokenizerFast:
    """As Llama 2's: "▁" for a space, one in front of every text, bytes by name; all `words` are tokens."""
    letters = [chr(code) for code in range(0x21, 0x7F)]
    vocabulary = list(dict.fromkeys([*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *words]))
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, [], byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(bpe)


def byte_tokenizer(special: Sequence[str] = ()) -> hf.PreTrainedTokenizerFast:
    """One token for every byte, and the usual special ones; `special` are more of them."""
    words = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    return _wrapped(bpe)


def _wrapped(bpe: Tokenizer) -> hf.PreTrainedTokenizerFast:
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_scripted(directory: Path, tokenizer: hf.PreTrainedTokenizerFast, chain: Sequence[int]) -> Path:
    """Save the model and its tokenizer: after the first token of `chain`, which nothing else writes, come the others,
    none of them twice. Behind the last one it writes the unused token 0."""
    vocab = len(tokenizer)
    config = hf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=_HIDDEN,
        intermediate_size=2 * _HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = hf.LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(_HIDDEN))
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # embedding and head alone decide
        directions = torch.nn.functional.normalize(torch.randn(vocab, _HIDDEN, generator=generator), dim=1)
        model.model.embed_tokens.weight.copy_(directions)
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(chain):
            model.lm_head.weight[following] = 3 * directions[token]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
