"""What a new token passes beside its matrices: attention over 16-bit keys and values (attention.c), norms (rms_norm.c),
and small operators (replay.c).

torch's kernel of attention is made for many queries: for one it reads keys and values at a tenth of the memory's rate,
and emulates every product where the processor has no instructions for 16 bits (benchmarks/NOTES.md).
"""

import functools
import struct
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from griffin_offload.kernels.library import HALVES, NUMBER_TYPES, check, library, needs_gradient

_FLOAT_BYTES = 4
_ATTENTION = struct.Struct("@7P17qf0q")
"""The struct Attention of attention.c."""
_COUNT = struct.Struct("@q")
"""Of the struct Rows, before as many of them."""


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
        *[0 if part is None else part.data_ptr() for part in (floats, key, value, added, sinks, scores, output)],
        *(batch, kv_heads, heads // kv_heads, tokens, size, value.shape[3], NUMBER_TYPES[key.dtype]),
        torch.get_num_threads(),
        *(*key.stride()[:3], *value.stride()[:3], *mask_strides),
        scaling,
    )
    found.call("attend_to", job)
    return output.to(query.dtype)


def takes_each(module: Any, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], **options: Any) -> bool:
    """Whether `each_token` takes these: as `takes_token` of every row."""
    alike = all(part.dtype == query.dtype and part.stride(3) == 1 for part in (*keys, *values))
    return alike and takes_token(module, query, keys[0], values[0], None, **options)


class SeenTokens(NamedTuple):
    """What one token attends to: of keys [1, kv heads, S, D] and values [1, kv heads, S, D'], numbers of a token side
    by side, those of the tokens from `first` to `end`."""

    key: Tensor
    value: Tensor
    first: int
    end: int


def each_token(
    module: Any,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    jobs: list["EachTokenJob"] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`one_token` of every row of query [N, heads, 1, D], over keys and values of its own, [1, kv heads, S, D], by one
    call. Its job is added to `jobs`, for who wants it to attend to others when it is replayed."""
    found = library()
    assert found is not None, "the table was not asked"
    scaling = options.get("scaling")
    (count, heads, _, size), kv_heads, width = query.shape, keys[0].shape[1], values[0].shape[3]
    scaling = size**-0.5 if scaling is None else scaling
    floats, sinks = query.float().contiguous(), _float_sinks(options.get("s_aux"), heads)
    rows = [SeenTokens(key, value, 0, key.shape[2]) for key, value in zip(keys, values, strict=True)]
    output, scores = floats.new_empty(count, 1, heads, width), floats.new_empty(heads * sum(row.end for row in rows))
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
        self.packed = bytearray(_COUNT.pack(sizes[0]) + bytes(sizes[0] * _ATTENTION.size))

    def attend_to(self, rows: Sequence[SeenTokens], scores: Tensor) -> None:
        """The next call is over these, and writes to `scores`, of which there is one for each head and token seen."""
        count, kv_heads, shared, size, width = self._sizes
        queries, results = self._places
        score, tokens = scores.data_ptr(), sum(row.end - row.first for row in rows)
        if len(rows) != count or scores.numel() < self.heads * tokens:
            raise ValueError(f"{scores.numel()} scores of {len(rows)} rows for {count} of {self.heads} heads, {tokens}")
        for row, (key, value, first, end) in enumerate(rows):
            by_key, by_value = key.stride(), value.stride()
            _check_seen(key, by_key, kv_heads, size)
            _check_seen(value, by_value, kv_heads, width)
            item = key.itemsize
            _ATTENTION.pack_into(
                *(self.packed, _COUNT.size + row * _ATTENTION.size, queries + row * self.heads * size * _FLOAT_BYTES),
                *(key.data_ptr() + first * by_key[2] * item, value.data_ptr() + first * by_value[2] * item),
                *(0, self._sinks, score, results + row * self.heads * width * _FLOAT_BYTES),
                *(1, kv_heads, shared, end - first, size, width, NUMBER_TYPES[key.dtype], self._threads),
                *(*by_key[:3], *by_value[:3], 0, 0, 0),
                self._scaling,
            )
            score += self.heads * (end - first) * _FLOAT_BYTES


def _check_seen(states: Tensor, strides: tuple[int, ...], kv_heads: int, size: int) -> None:
    one, heads, _, own = states.shape
    if one != 1 or heads != kv_heads or own != size or strides[3] != 1:
        raise ValueError(f"keys or values {tuple(states.shape)} in steps of {strides}: {kv_heads} heads of {size}")


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


# Root mean square norm of a few 16-bit rows (rms_norm.c): one call in place of eight small ones.


ROWS = 32
"""Up to so many rows one thread is faster than torch's operators."""
_NORM = struct.Struct("@3P3qf")
"""The struct Norm of rms_norm.c."""


def takes_rows(x: Tensor, weight: Tensor, *beside: object) -> bool:
    """Whether `rms_norm` takes these: a few rows of 16 bits on the CPU."""
    alike = x.dtype == weight.dtype and weight.is_contiguous() and x.is_contiguous()
    few = 0 < x.numel() <= ROWS * weight.numel() and x.shape[-1:] == weight.shape
    return alike and few and not needs_gradient(x)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *beside: object) -> Tensor:
    """x [..., H] over the root of its mean square and `epsilon`, rounded, times `weight` [H]: as x."""
    found = library()
    assert found is not None, "the table was not asked"
    if x.dtype not in HALVES or x.shape[-1:] != weight.shape:
        raise ValueError(f"x, {tuple(x.shape)} of {x.dtype}, must be of 16-bit rows of {weight.numel()}")
    check(x, x.shape, name="x")
    check(weight, weight.shape, x.dtype, "the weight")
    normed, size = torch.empty_like(x), weight.numel()
    where = (x.data_ptr(), weight.data_ptr(), normed.data_ptr())
    found.call("rms_norm", _NORM.pack(*where, x.numel() // size, size, NUMBER_TYPES[x.dtype], epsilon))
    return normed


# Copies, sums and products of a few numbers (replay.c), for who has to do without torch's operators.


_AXES = 4
_ELEMENTWISE = struct.Struct(f"@3P3q{4 * _AXES}q")
"""The struct Elementwise of replay.c."""
COPY, NEGATE, ADD, MULTIPLY = range(4)
_aten = torch.ops.aten
OPERATIONS = {_aten.neg.default: NEGATE, _aten.add.Tensor: ADD, _aten.mul.Tensor: MULTIPLY}
"""Of torch's operators, which give the same."""


def elementwise_knows(*tensors: Any) -> bool:
    """Whether a kernel reads and writes these."""
    plain = all(type(own) in (Tensor, nn.Parameter) for own in tensors) and library() is not None
    return plain and all(own.dtype in NUMBER_TYPES and own.dim() <= _AXES and own.is_cpu for own in tensors)


def elementwise_job(operation: int, out: Tensor, *given: Tensor) -> bytearray:
    """Of replay.c: `out` becomes what `operation` makes of what is `given`, which broadcasts to it."""
    filled = (1,) * (_AXES - out.dim()) + out.shape
    steps = [own.expand(out.shape).stride() for own in (*given, *given[:1], out)]
    if len(given) == 2:
        del steps[2]
    addresses = [own.data_ptr() for own in (*given, *given[:1])][:2]
    padded = [step for own in steps for step in ((0,) * (_AXES - out.dim()) + own)]
    types = NUMBER_TYPES[given[0].dtype], NUMBER_TYPES[out.dtype]
    return bytearray(_ELEMENTWISE.pack(*addresses, out.data_ptr(), operation, *types, *filled, *padded))


def point_copy(job: bytearray, address: int, head_step: int) -> None:
    """Have the copy of `job`, whose result is [heads, D], go to an address, in so many numbers from head to head."""
    _TARGET.pack_into(job, _TARGET_AT, address)
    _STEP.pack_into(job, _HEADS_AT, head_step)


_TARGET, _STEP = struct.Struct("@P"), struct.Struct("@q")
_TARGET_AT, _HEADS_AT = 2 * _TARGET.size, _ELEMENTWISE.size - 2 * _STEP.size


# Functions of one 16-bit number (replay.c): looked up in a table of all 65,536, which torch's own operator has filled.


OF_ONE_NUMBER = (_aten.silu, _aten.gelu, _aten.sigmoid, _aten.tanh, _aten.relu)
_LOOKUP = struct.Struct("@3P2q")
"""The struct Lookup of replay.c."""
_LOOKED_UP_FROM = 4096  # numbers: fewer torch computes in about as long as its call takes
_VECTOR, _ONE_THREAD = 64, 32768  # numbers: torch computes whole vectors, and so many by one thread
MOST_TABLES = 2
"""Of one computation: most models have one function."""


class Table(NamedTuple):
    """What a function gives for each number of 16 bits."""

    numbers: Tensor
    """[65536], as torch computes them by vectors."""
    everywhere: bool
    """Whether it computes the same one by one, which it does behind the last whole vector of a thread."""


def may_be_looked_up(out: Tensor, given: Tensor) -> bool:
    """Whether a function of so many numbers is worth a table."""
    many = out.dtype in HALVES and given.dtype == out.dtype and out.numel() >= _LOOKED_UP_FROM
    return many and elementwise_knows(out, given)


def lookup_knows(out: Tensor, given: Tensor, table: Table) -> bool:
    """Whether what a function gives is what is looked up."""
    by_vectors = out.numel() % _VECTOR == 0 and out.numel() <= _ONE_THREAD
    return (table.everywhere or by_vectors) and given.is_contiguous() and out.is_contiguous()


@functools.lru_cache(2 * MOST_TABLES)
def table_of(function: Any, dtype: torch.dtype, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Table:
    """`args` and `kwargs` are those beside the number."""
    every = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.uint16).view(dtype)
    parts = every.split(_ONE_THREAD)
    numbers = torch.cat([function(part, *args, **dict(kwargs)) for part in parts])
    one_by_one = function(every.repeat_interleave(2)[::2], *args, **dict(kwargs))  # in steps there are no vectors
    return Table(numbers, torch.allclose(numbers, one_by_one, rtol=0, atol=0, equal_nan=True))


def lookup_job(table: Table, out: Tensor, given: Tensor) -> bytearray:
    """Of replay.c: `out` becomes what `table` has for what is `given`."""
    addresses = table.numbers.data_ptr(), given.data_ptr(), out.data_ptr()
    return bytearray(_LOOKUP.pack(*addresses, out.numel(), torch.get_num_threads()))


def tables_bytes(numbers: int) -> int:
    """Of the tables that a computation keeps whose functions take up to so many numbers."""
    return MOST_TABLES * 2**16 * 2 if numbers >= _LOOKED_UP_FROM else 0
