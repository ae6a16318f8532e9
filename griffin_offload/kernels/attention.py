"""Attention of a new token over keys and values where the KV cache keeps them, in 16, 8 or 4 bits (attention.c); codes,
to which it is written as well (kv_codes.c), become numbers a few tokens at a time.

torch's kernel of attention is made for many queries: for one it reads keys and values at a tenth of the memory's rate,
and emulates every product where the processor has no instructions for 16 bits (benchmarks/NOTES.md).
"""

import struct
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from griffin_offload.kernels.library import HALVES, NUMBER_TYPES, Job, check, library, needs_gradient

AS_THEY_COME, INT8, INT4_VALUES, INT4_KEYS = range(4)
"""The enum of kv_codes.h."""
_WHOLE = 16
"""Numbers of a head in codes are a multiple: whole vectors of both halves of a byte."""
_LARGEST_HEAD = 4096
"""Of which a few tokens fill the kernel's room."""
_KEPT = struct.Struct("@3P8q")
"""The struct Kept of kv_codes.h."""
_KEEP = struct.Struct("@P6q")
"""The struct Keep of kv_codes.c, before its Kept."""
_PLACE_AT = _KEEP.size - struct.calcsize("q")
_FLOAT_BYTES = 4
_ATTENTION = struct.Struct("@5P12qf0q")
"""The struct Attention of attention.c, before its keys and values."""
_ATTENTION_SIZE = _ATTENTION.size + 2 * _KEPT.size
_COUNT = struct.Struct("@q")
"""Of the struct Rows, before as many of them."""


class KeptStates(NamedTuple):
    """Keys, or values, of one sequence as they lie in a layer's KV cache."""

    parts: tuple[Tensor, ...]
    """Numbers [1, heads, room, D], as they come; or codes [1, heads, room, ...], and what it takes to read them."""
    size: int
    """D, the numbers of a head."""
    kind: int = AS_THEY_COME
    group: int = 0
    """Of 4-bit keys, the one that lies as it came."""

    @property
    def heads(self) -> int:
        return self.parts[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.parts[min(self.kind, 1)].dtype


def kernels_know(states: KeptStates, like: Tensor) -> bool:
    """Whether kernels read codes like these, and write tokens as `like` [1, heads, 1, D] to them."""
    fits = states.size % _WHOLE == 0 and states.size <= _LARGEST_HEAD
    known = library() is not None and states.dtype in HALVES and states.dtype == like.dtype
    return fits and known and all(part.is_cpu for part in (*states.parts, like)) and like.stride(-1) == 1


def packed_states(states: KeptStates) -> bytes:
    """The struct Kept. ValueError for what kernels would read wrongly."""
    numbers, *beside = states.parts
    if any(part.stride(-1) != 1 for part in states.parts):
        raise ValueError(f"keys or values in steps of {[part.stride() for part in states.parts]}: side by side")
    steps = numbers.stride()[:3]
    if not beside:
        return _KEPT.pack(numbers.data_ptr(), 0, 0, AS_THEY_COME, *steps, 0, 0, 0, -1)
    held = beside[1] if states.kind == INT4_KEYS else None
    return _KEPT.pack(
        *(numbers.data_ptr(), beside[0].data_ptr(), 0 if held is None else held.data_ptr()),
        *(states.kind, *steps, beside[0].stride(1), beside[0].stride(2)),
        *((0, -1) if held is None else (held.stride(1), states.group)),
    )


class KeptToken:
    """A token [heads, D] that a recording knows, and that goes to codes: to another place every time."""

    def __init__(self, token: Tensor, states: KeptStates, place: int) -> None:
        own = library()
        fits = token.shape == (states.heads, states.size) and token.stride(1) == 1 and token.dtype == states.dtype
        if own is None or not fits or states.kind == AS_THEY_COME or states.parts[0].shape[0] != 1:
            raise ValueError(
                f"a token {tuple(token.shape)} of {token.dtype} for codes of {states.heads} heads of {states.size} "
                f"numbers of {states.dtype}"
            )
        about = token.stride(0), *token.shape, NUMBER_TYPES[token.dtype], torch.get_num_threads(), place
        self.job: Job = bytearray(_KEEP.pack(token.data_ptr(), *about) + packed_states(states))
        own.call("keep_token", self.job)

    def go_to(self, states: KeptStates, place: int) -> None:
        """The next one goes to `place` of these."""
        struct.pack_into("@q", self.job, _PLACE_AT, place)
        self.job[_KEEP.size :] = packed_states(states)


def takes_token(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any
) -> bool:
    """Whether `attend` takes these: one token, 16 bits, on the CPU, numbers of a token side by side; and no option of
    transformers' that changes what is computed, or that the stock function refuses."""
    if not (query.dim() == key.dim() == value.dim() == 4 and query.shape[2] == 1):
        return False
    if not query.dtype == key.dtype == value.dtype or options.get("dropout"):
        return False
    asked = options.get  # one by one: this is asked in every layer for every token
    if asked("position_bias") is not None or asked("softcap") is not None or asked("cache") is not None:
        return False
    sinks = asked("s_aux")
    if sinks is not None and not (sinks.is_cpu and sinks.shape == query.shape[1:2]):
        return False
    return key.stride(3) == value.stride(3) == 1 and not any(map(needs_gradient, (query, key, value)))


def one_token(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """`attend` as transformers calls an attention."""
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, mask, scaling, options.get("s_aux")), None


FEW = 16
"""Up to so many tokens behind others are attended for one by one: each as if it came alone, to the last bit."""


def takes_few(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any
) -> bool:
    """Whether `few_tokens` takes these: what `takes_token` says of each of a few tokens of one sequence, of which a
    mask says what they see: tokens side by side."""
    if mask is None or query.shape[0] != 1 or not 1 < query.shape[2] <= FEW or key.shape[2] <= query.shape[2]:
        return False
    if mask.shape != (1, 1, query.shape[2], key.shape[2]) or not mask.is_cpu:
        return False
    return takes_token(module, query[:, :, :1], key, value, None, **options) and _seen(mask) is not None


def few_tokens(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """`attend` for each token, over what it sees, as transformers calls an attention."""
    seen, scaling, sinks = _seen(mask), options.get("scaling"), options.get("s_aux")
    assert seen is not None, "the table was not asked"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [
        attend(query[:, :, i : i + 1], key[:, :, first:last], value[:, :, first:last], None, scaling, sinks)
        for i, (first, last) in enumerate(seen)
    ]
    return torch.cat(rows, dim=1), None


_last_mask: tuple[Any, list[tuple[int, int]] | None] = (None, None)


def _seen(mask: Tensor) -> list[tuple[int, int]] | None:
    """The first token that each row of `mask` [1, 1, T, S] sees, and the one behind its last; None where others than
    all between are seen. One mask serves all layers of a kind: the last answer is remembered."""
    global _last_mask
    known, found = _last_mask
    if known is None or known() is not mask:
        found = _ranges(mask[0, 0])
        _last_mask = weakref.ref(mask), found
    return found


def _ranges(rows: Tensor) -> list[tuple[int, int]] | None:
    visible = rows if rows.dtype == torch.bool else rows == 0
    plain = rows.dtype == torch.bool or bool((visible | (rows <= torch.finfo(rows.dtype).min)).all())
    counts, first = visible.sum(1).tolist(), visible.int().argmax(1).tolist()
    found = [(start, start + many) for start, many in zip(first, counts, strict=True)]
    side_by_side = all(
        many and bool(visible[i, a:b].all()) for i, (many, (a, b)) in enumerate(zip(counts, found, strict=True))
    )
    return found if plain and side_by_side else None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, sinks: Tensor | None = None
) -> Tensor:
    """query [B, heads, 1, D], key [B, kv heads, S, D] and value [B, kv heads, S, D'] to [B, 1, heads, D'].

    `mask` broadcasts to [B, heads, 1, S]: booleans, true where a token is seen, or numbers that are added to scores.
    `sinks` [heads] are scores beside those of tokens: they take a share of the weights, and have no value.
    """
    found = library()
    assert found is not None, "the table was not asked"
    (batch, heads, _, size), (kv_heads, tokens) = query.shape, key.shape[1:3]
    if heads % kv_heads or key.shape != (batch, kv_heads, tokens, size) or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}")
    for name, part in (("key", key), ("value", value)):
        if part.dtype not in HALVES or part.dtype != key.dtype or part.stride(3) != 1 or not part.is_cpu:
            raise ValueError(
                f"the {name}, of {part.dtype} in steps of {part.stride()}, must be of 16 bits, side by side"
            )
    floats, sinks = query.float().contiguous(), _float_sinks(sinks, heads)
    check(floats, (batch, heads, 1, size), torch.float32, "the query")
    output, scores = floats.new_empty(batch, 1, heads, value.shape[3]), floats.new_empty(batch, heads, tokens)
    added, mask_strides = None, (0, 0, 0)
    if mask is not None:
        added = _added(mask).expand(batch, heads, 1, tokens)
        if not added.is_cpu:
            raise ValueError(f"the mask, on {added.device}, must be in the CPU's memory")
        mask_strides = (added.stride(0), added.stride(1), added.stride(3))
    job = _ATTENTION.pack(
        *[0 if part is None else part.data_ptr() for part in (floats, added, sinks, scores, output)],
        *(batch, kv_heads, heads // kv_heads, 0, tokens, size, value.shape[3], NUMBER_TYPES[key.dtype]),
        torch.get_num_threads(),
        *mask_strides,
        scaling,
    )
    job += packed_states(KeptStates((key,), size)) + packed_states(KeptStates((value,), value.shape[3]))
    found.call("attend_to", job)
    return output.to(query.dtype)


def takes_each(module: Any, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], **options: Any) -> bool:
    """Whether `each_token` takes these: as `takes_token` of every row."""
    alike = all(part.dtype == query.dtype and part.stride(3) == 1 for part in (*keys, *values))
    return alike and takes_token(module, query, keys[0], values[0], None, **options)


class SeenTokens(NamedTuple):
    """What one token attends to: of the keys and values of a sequence those of the tokens from `first` to `end`."""

    key: KeptStates
    value: KeptStates
    first: int
    end: int


def each_token(
    module: Any,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    jobs: list["EachTokenJob"] | None = None,
    rows: Sequence[SeenTokens] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`one_token` of every row of query [N, heads, 1, D], over keys and values of its own, [1, kv heads, S, D], by one
    call; read where they lie in KV caches, if `rows` say where. Its job is added to `jobs`, for who wants it to attend
    to others when it is replayed."""
    found = library()
    assert found is not None, "the table was not asked"
    scaling = options.get("scaling")
    (count, heads, _, size), kv_heads, width = query.shape, keys[0].shape[1], values[0].shape[3]
    scaling = size**-0.5 if scaling is None else scaling
    floats, sinks = query.float().contiguous(), _float_sinks(options.get("s_aux"), heads)
    rows = rows or [
        SeenTokens(KeptStates((key,), size), KeptStates((value,), width), 0, key.shape[2])
        for key, value in zip(keys, values, strict=True)
    ]
    tokens = sum(row.end - row.first for row in rows)
    output, scores = floats.new_empty(count, 1, heads, width), floats.new_empty(heads * tokens)
    beside = 0 if sinks is None else sinks.data_ptr()
    sizes = count, kv_heads, heads // kv_heads, size, width
    job = EachTokenJob((floats.data_ptr(), output.data_ptr()), beside, sizes, scaling, torch.get_num_threads())
    job.attend_to(rows, scores)
    found.call("attend_to_each", job.packed)
    if jobs is not None:
        jobs.append(job)
    return output.to(query.dtype), None


class EachTokenJob:
    """The call that attends for rows of queries: it stays, while keys and values are others."""

    def __init__(
        self, places: tuple[int, int], sinks: int, sizes: tuple[int, int, int, int, int], scaling: float, threads: int
    ) -> None:
        """`places` are the addresses of the queries and of the results, `sizes` rows, kv heads, heads that share one,
        and numbers of a key and of a value."""
        self._places, self._sinks, self._sizes = places, sinks, sizes
        self._scaling, self._threads = scaling, threads
        self.heads = sizes[1] * sizes[2]
        self.packed = bytearray(_COUNT.pack(sizes[0]) + bytes(sizes[0] * _ATTENTION_SIZE))

    def attend_to(self, rows: Sequence[SeenTokens], scores: Tensor) -> None:
        """The next call is over these, and writes to `scores`, of which there is one for each head and token seen."""
        count, kv_heads, shared, size, width = self._sizes
        queries, results = self._places
        score, tokens = scores.data_ptr(), sum(row.end - row.first for row in rows)
        if len(rows) != count or scores.numel() < self.heads * tokens:
            raise ValueError(f"{scores.numel()} scores of {len(rows)} rows for {count} of {self.heads} heads, {tokens}")
        for row, (key, value, first, end) in enumerate(rows):
            _check_seen(key, kv_heads, size)
            _check_seen(value, kv_heads, width)
            at = _COUNT.size + row * _ATTENTION_SIZE
            _ATTENTION.pack_into(
                *(self.packed, at, queries + row * self.heads * size * _FLOAT_BYTES, 0, self._sinks, score),
                *(results + row * self.heads * width * _FLOAT_BYTES, 1, kv_heads, shared, first, end - first),
                *(size, width, NUMBER_TYPES[key.dtype], self._threads, 0, 0, 0, self._scaling),
            )
            self.packed[at + _ATTENTION.size : at + _ATTENTION_SIZE] = packed_states(key) + packed_states(value)
            score += self.heads * (end - first) * _FLOAT_BYTES


def _check_seen(states: KeptStates, kv_heads: int, size: int) -> None:
    if states.heads != kv_heads or states.size != size or states.parts[0].shape[0] != 1:
        raise ValueError(
            f"keys or values of {states.heads} heads of {states.size}: {kv_heads} of {size}, of one sequence"
        )


def _float_sinks(sinks: Tensor | None, heads: int) -> Tensor | None:
    if sinks is None:
        return None
    floats = sinks.detach().float().contiguous()
    check(floats, (heads,), torch.float32, "the sinks")
    return floats


def _added(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, float("-inf"))


def attending_bytes(samples: int, heads: int, width: int, tokens: int) -> int:
    """What `attend` has in float32 for queries of `width` numbers over `tokens`: queries, results, scores, a mask."""
    return samples * (2 * width + 2 * heads * tokens) * _FLOAT_BYTES
