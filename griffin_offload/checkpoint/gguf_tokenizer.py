"""The tokenizer that the header of a GGUF file describes: words, merges and kinds of tokens, and llama.cpp's rules.

transformers builds one, too, and leaves out rules that change tokens: how digits are cut (SmolLM, StarCoder), words
that are not merged (Llama 3), the space in front of a text.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from griffin_offload.checkpoint.gguf_file import GgufFile
from griffin_offload.errors import CheckpointError, one_line

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# What ends an answer beside the end of the text, as llama.cpp finds it: by keys, and by the names of control tokens.
_END_KEYS = ("eos", "eot", "eom")
_END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<turn|>", "<|eot|>", "<|eom|>",
)  # fmt: skip

# How texts are cut before anything is merged, by tokenizer.ggml.pre: llama.cpp, src/llama-vocab.cpp.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Marks belong to the letters before them.
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{M}\p{N}]+")
_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_SHORTENED}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_SHORTENED}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
CUTS: dict[str, tuple[str, ...]] = (
    dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), (_GPT2,))
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2))
    | dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe"),
        (_LLAMA3,),
    )
    | dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "kormo", "megrez"), (_QWEN2,))
    | dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (_GPT4O,))
    | {"tekken": (_TEKKEN,), "falcon": _FALCON, "qwen35": (_QWEN35,)}
)  # fmt: skip
CUTS |= dict.fromkeys(
    ("bloom", "gpt3-finnish", "poro-chat"), (r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",)
)
# Words that are in the vocabulary as a whole are not made of merges there, and texts begin with BOS.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")

Ids = list[int]


def merges_whole_words(name: str) -> bool:
    """Whether texts cut by the rule `name` are looked up as words before their letters are merged."""
    return name in _WHOLE_WORDS


def end_tokens(header: GgufFile) -> Ids:
    """Ids of the tokens that end an answer, the end of the text first."""
    metadata = header.metadata
    keys = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _END_KEYS)
    found = [key for key in keys if isinstance(key, int) and key < 2**31]
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        return list(dict.fromkeys(found))
    names = header.texts("tokenizer.ggml.tokens")
    ends = [i for i, name in enumerate(names[: len(kinds)]) if kinds[i] == _CONTROL and name in _END_NAMES]
    return list(dict.fromkeys(found + ends))


def tokenizer_from(header: GgufFile, where: Path) -> Any:
    """A tokenizer of transformers' with the file's template and rules. CheckpointError where there is none that can be
    made."""
    tokens = header.texts("tokenizer.ggml.tokens")
    kind = header.metadata.get("tokenizer.ggml.model")
    if not tokens or kind not in _BUILDERS:
        raise CheckpointError(
            f"{where} has no tokenizer that can be read ({kind or 'none'}; read are {' and '.join(_BUILDERS)}): use "
            "the Python API with token ids, or set model.tokenizer"
        )
    try:
        backend = _BUILDERS[kind](header, tokens, where)
        _add_tokens(backend, header, tokens)
        special = _special_tokens(header, tokens, where)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            add_bos_token=_adds_bos(header.metadata, kind),
            add_eos_token=header.metadata.get("tokenizer.ggml.add_eos_token") is True,
            chat_template=_text(header.metadata, "tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            padding_side="left",
            **special,
        )
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # a panic of native code is no Exception
        raise CheckpointError(f"{where} has a tokenizer that cannot be built: {one_line(error)}") from error


def _text(metadata: Mapping[str, object], key: str) -> str | None:
    found = metadata.get(key)
    return found if isinstance(found, str) else None


def _adds_bos(metadata: Mapping[str, object], kind: str) -> bool:
    """llama.cpp's rule where the file has none."""
    said = metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(said, bool):
        return said
    return kind == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS


def _special_tokens(header: GgufFile, tokens: Sequence[str], where: Path) -> dict[str, str]:
    found = {}
    for name, key in _SPECIAL.items():
        token = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is None or token == 2**32 - 1:
            continue
        if not isinstance(token, int) or not 0 <= token < len(tokens):
            raise CheckpointError(f"{where} says {key}_token_id is {token!r} of {len(tokens)} tokens")
        found[name] = tokens[token]
    return found


def _add_tokens(backend: Tokenizer, header: GgufFile, tokens: Sequence[str]) -> None:
    """Tokens that are found whole in a text before it is cut."""
    kinds, there = header.metadata.get("tokenizer.ggml.token_type", ()), backend.get_vocab()
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        special = kind == _CONTROL
        whole = [tokens[i] for i in range(min(len(kinds), len(tokens))) if kinds[i] == kind and tokens[i] in there]
        add([AddedToken(token, normalized=False, special=special) for token in whole])


def _byte_level(header: GgufFile, tokens: Sequence[str], where: Path) -> Tokenizer:
    """Of GPT-2 and its like: bytes, cut by expressions, merged by a list."""
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name not in CUTS:
        warnings.warn(
            f"{where.name} says that texts are cut as {str(name)[:40]!r} does, which is not known: they are cut as for "
            "GPT-2, and tokens may differ",
            stacklevel=4,
        )
    pairs = (merge.partition(" ") for merge in header.texts("tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in pairs]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=merges_whole_words(str(name))))
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in CUTS.get(str(name), (_GPT2,))]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(header: GgufFile, tokens: Sequence[str], where: Path) -> Tokenizer:
    """Of Llama 2 and Gemma: pairs are joined by the score of what they become, or (Gemma 4) by a list."""
    scores, pairs = header.metadata.get("tokenizer.ggml.scores"), header.texts("tokenizer.ggml.merges")
    if not pairs and (scores is None or len(scores) != len(tokens)):
        raise CheckpointError(f"{where} has {0 if scores is None else len(scores)} scores for {len(tokens)} tokens")
    gemma = str(header.metadata.get("general.architecture")).startswith("gemma")
    if gemma:  # words of spaces are written as spaces there
        tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    listed = [(left, right) for left, _, right in (pair.partition(" ") for pair in pairs)]
    merges = listed or _merges(vocabulary, tokens, None if gemma else scores)
    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    front = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", _SPACE)])
    behind = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *behind]
    )
    return backend


# No word is longer; every place in it is tried.
_MOST_LETTERS = 512


def _merges(vocabulary: Mapping[str, int], tokens: Sequence[str], scores: Any) -> list[tuple[str, str]]:
    """Pairs of words that are a word together, the best first: by score, or (Gemma's scores say nothing) by place."""
    found = []
    for place, token in enumerate(tokens):
        if len(token) > _MOST_LETTERS:
            raise ValueError(f"a word of {len(token)} letters")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                rank = place if scores is None else -float(scores[place])
                found.append((rank, vocabulary[left], vocabulary[right], left, right))
    found.sort(key=lambda pair: pair[:3])
    return [pair[3:] for pair in found]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _sentencepiece}
