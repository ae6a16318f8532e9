"""All kernels, from a library built with a sanitizer, called from several threads at once: odd shapes, rows that lie
apart, numbers of threads that change in between. Run by test_sanitizers.py, in a process of its own.

    LD_PRELOAD=<runtime of the sanitizer> python hammer.py LIBRARY SECONDS | overflow | race

The last two do what a sanitizer has to see.
"""

import ctypes
import random
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from griffin_offload.kernels import attention, gemm, gemv, gguf_blocks, quantize, recording, small_operators
from griffin_offload.kernels import gather as gathering
from griffin_offload.kernels import library as compiled
from griffin_offload.kv_cache.store import DequantBuffer, Int4Keys, Int4Values, Int8Store, Store

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
CALLERS = 3
Call = Callable[[random.Random, compiled.Library], object]


def _numbers(r: random.Random, rows: int, columns: int, dtype: torch.dtype, *, apart: bool = False) -> Tensor:
    """Of a memory block of exactly their size, or rows apart in one that ends with the last."""
    step = columns + (r.randrange(1, 9) if apart else 0)
    whole = torch.randn((rows - 1) * step + columns, dtype=torch.float32).to(dtype)
    return whole.as_strided((rows, columns), (step, 1))


def _bytes(rows: int, columns: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, (rows, columns), dtype=torch.int16).to(dtype)


def few(r: random.Random, library: compiled.Library) -> None:
    kernels = gemv.GemvKernels(library, wide=r.random() < 0.6, ahead=r.random() < 0.5)
    rows, outputs = r.randint(1, 9), r.randint(1, 140)
    # More than 4,096 numbers of x crowd the first cache: weights are read ahead, and outputs share what is read.
    inputs = r.randint(1, 300) if r.random() < 0.8 else r.randint(4097, 4400)
    dtype = r.choice(DTYPES)
    bias = torch.randn(outputs).to(dtype) if r.random() < 0.5 else None
    scaled = torch.randn(inputs).to(dtype) if r.random() < 0.5 else None
    x = _numbers(r, rows, inputs, dtype)
    kernels.multiply_int8(
        x, _bytes(outputs, inputs, torch.int8), torch.rand(outputs).to(r.choice(DTYPES)), bias, scaled
    )
    tensors = {"weight": _bytes(outputs, inputs, torch.int8), "scale": torch.rand(outputs), "input_scale": scaled}
    matrix = gemv.checked_matrix("int8", tensors, outputs, dtype)
    kernels.multiply_several(x, [matrix, matrix, matrix], [(0, 1), (0, 1), (rows - 1, 1)])
    half = r.choice(HALVES)
    kernels.multiply_floats(x.to(half), _numbers(r, outputs, inputs, half), None if bias is None else bias.to(half))


def many(r: random.Random, library: compiled.Library) -> None:
    rows, inputs, outputs = r.choice([1, 7, 33, 250]), 2 * r.randint(1, 300), r.randint(1, 140)
    pairs = library.sums_pairs and r.random() < 0.5
    dtype = torch.bfloat16 if pairs else r.choice(DTYPES)
    kernels = gemm.GemmKernels(library, torch.bfloat16 if pairs else torch.float32)
    bias = torch.randn(outputs).to(dtype) if r.random() < 0.5 else None
    x, scale = _numbers(r, rows, inputs, dtype), torch.rand(outputs).to(r.choice(DTYPES))
    kernels.multiply("int8", x, _bytes(outputs, inputs, torch.int8), scale, bias)
    if not pairs and dtype in HALVES:
        kernels.multiply("float", x, _numbers(r, outputs, inputs, dtype), None, bias)


def attend(r: random.Random, library: compiled.Library) -> None:
    batch, kv_heads, shared, tokens = r.randint(1, 3), r.randint(1, 3), r.randint(1, 4), r.randint(1, 150)
    size, value_size, dtype = r.randint(1, 70), r.randint(1, 70), r.choice(HALVES)
    query = torch.randn(batch, kv_heads * shared, 1, size).to(dtype)
    # As the KV cache has them: a part of longer stores.
    key = torch.randn(batch, kv_heads, tokens + 3, size).to(dtype)[:, :, 3:]
    value = torch.randn(batch, kv_heads, tokens + 5, value_size).to(dtype)[:, :, 5:]
    masks = [None, torch.rand(batch, 1, 1, tokens) < 0.7, torch.randn(1, kv_heads * shared, 1, tokens)]
    sinks = torch.randn(kv_heads * shared).to(dtype) if r.random() < 0.5 else None
    attention.attend(query, key, value, r.choice(masks), 0.3, sinks)


def norms(r: random.Random, library: compiled.Library) -> None:
    size, dtype = r.randint(1, 300), r.choice(HALVES)
    small_operators.rms_norm(_numbers(r, r.randint(1, 5), size, dtype), torch.randn(size).to(dtype), 1e-6)


def quantise(r: random.Random, library: compiled.Library) -> None:
    rows, columns = r.randint(1, 70), r.choice([r.randint(1, 100), 511, 513, 2049])
    weight = _numbers(r, rows, columns, r.choice(DTYPES), apart=r.random() < 0.5)
    divisor = torch.rand(columns) + 0.1 if r.random() < 0.5 else None
    quantize.largest_of_rows(weight, divisor)
    quantize.column_norms(weight, torch.rand(rows) + 0.1 if r.random() < 0.5 else None)
    apart = r.randrange(3)
    out = torch.empty(rows * (columns + apart) - apart, dtype=torch.int8).as_strided(
        (rows, columns), (columns + apart, 1)
    )
    quantize.quantize_int8(weight, torch.rand(rows) + 0.1, out, divisor)


def blocks(r: random.Random, library: compiled.Library) -> None:
    """As files have them: as numbers, and as codes of four bits that become those of int4."""
    kind, rows = r.choice(gguf_blocks.KINDS), r.randint(1, 20)
    nbytes, numbers = gguf_blocks.SIZES[kind]
    count = r.randint(1, 3)
    stored = _bytes(rows, count * nbytes)
    gguf_blocks.numbers(kind, stored, torch.empty(rows, count * numbers, dtype=r.choice(DTYPES)))
    if kind not in gguf_blocks.ON_GRIDS:
        return
    codes, steps, lowest = gguf_blocks.codes(kind, stored)
    quantize.norms_of_codes(codes, steps, lowest)
    quantize.pairs_of_codes(codes, steps, lowest, torch.rand(rows) + 0.1)


def gather(r: random.Random, library: compiled.Library) -> None:
    rows, columns = r.randint(1, 70), r.randint(1, 400)
    chosen = torch.tensor(sorted(r.sample(range(columns), r.randint(0, columns))), dtype=torch.long)
    source = _numbers(r, rows, columns, r.choice(HALVES), apart=r.random() < 0.5)
    for matrix in (source, _bytes(rows, columns, torch.int8)) if library.leaves_out else ():
        gathering.gather_columns(matrix, chosen, torch.empty(rows, chosen.numel(), dtype=matrix.dtype))


def in_groups(r: random.Random, library: compiled.Library) -> None:
    """The forms of 2 to 4 bits: quantised, gathered into strips, multiplied by few and many rows."""
    bits = r.choice([4, 3, 2])
    outputs, inputs = 32 * r.randint(1, 5), 32 * (r.randint(1, 9) if r.random() < 0.8 else r.randint(129, 140))
    weight = _numbers(r, outputs, inputs, r.choice(DTYPES), apart=r.random() < 0.5)
    importance = torch.rand(inputs) if r.random() < 0.5 else None
    quantize.row_norms(weight)
    feedback = torch.rand(2, inputs) if r.random() < 0.5 else None
    order = torch.randperm(inputs // 32).int() if r.random() < 0.5 else None
    rows = quantize.quantize_rows(bits, weight, torch.rand(outputs) + 0.1, importance, feedback, order)
    carried = torch.rand(outputs) if r.random() < 0.5 else None
    neurons = quantize.quantize_neurons(bits, weight, torch.rand(inputs) + 0.1, None, feedback, order, carried)
    assert rows is not None
    assert neurons is not None
    lanes = library.sums_bytes and r.random() < 0.4
    few = gemv.GemvKernels(library, wide=lanes or r.random() < 0.6, ahead=r.random() < 0.5, lanes=lanes)
    scale, dtype = torch.rand(outputs).to(r.choice(DTYPES)), r.choice(DTYPES)
    few.multiply_rows(_numbers(r, r.randint(1, 9), inputs, dtype), *rows, scale, bits=bits)
    named = {"weight": rows[0], "groups": rows[1], "scale": scale}
    if bits == 4:
        some = torch.randint(0, inputs, (r.randint(0, 99),))
        gathering.columns_of_int4(*rows, scale.float(), some, torch.empty(outputs, some.numel(), dtype=dtype))
    matrix = gemv.checked_matrix(f"int{bits}_rows", named, None, dtype)
    few.multiply_several(_numbers(r, 5, inputs, dtype), (matrix, matrix, matrix), ((0, 2), (0, 2), (2, 3)))
    kept, features = 16 * r.randint(1, 8), r.randint(1, outputs)
    index = torch.tensor([r.randrange(inputs) for _ in range(r.randint(1, kept))], dtype=torch.long)
    strips = (
        _bytes(-(-outputs // 64) * kept, 8 * bits).view(-1, kept, 8 * bits),
        _bytes(-(-outputs // 64) * 2 * kept, 2),
    )
    strips = strips[0], strips[1].view(-1, kept, 2)
    gathering.gather_neurons_to_strips(neurons, index, strips, kept - index.numel())
    few.multiply_strips(
        _numbers(r, r.randint(1, 9), kept, dtype), *strips, torch.rand(kept).to(dtype), features=features, bits=bits
    )
    pairs = library.sums_pairs and r.random() < 0.5
    many = gemm.GemmKernels(library, torch.bfloat16 if pairs else torch.float32)
    count = r.choice([3, 40])
    x = _numbers(r, count, inputs, torch.bfloat16)
    many.multiply(f"int{bits}_rows", x, rows[0], scale, None, rows[1])
    many.multiply(f"int{bits}_neurons", x, neurons[0], None, None, neurons[1])
    chosen = _numbers(r, count, kept, torch.bfloat16)
    many.multiply(f"int{bits}_strips", chosen, strips[0], None, None, strips[1], features)


def _in_steps(r: random.Random, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """Numbers in memory that ends with the last of them, whose axes lie in any order, and may lie apart."""
    axes, steps, step = r.sample(range(len(sizes)), len(sizes)), [0] * len(sizes), r.choice([1, 1, 2])
    for axis in axes:
        steps[axis] = step
        step *= sizes[axis] + r.choice([0, 0, 3])
    extent = 1 + sum((size - 1) * own for size, own in zip(sizes, steps, strict=True)) if all(sizes) else 0
    return torch.randn(extent, dtype=torch.float32).to(dtype).as_strided(sizes, steps)


def replays(r: random.Random, library: compiled.Library) -> None:
    """Copies, sums and products of a few numbers, one by one and as one call, and attention in its turn."""
    sizes, dtype = [r.randint(0 if r.random() < 0.1 else 1, 20) for _ in range(r.randint(0, 4))], r.choice(DTYPES)
    calls, kept = list[recording.KernelCall](), list[Tensor]()
    for operation in range(small_operators.MULTIPLY + 1):
        out = _in_steps(r, sizes, r.choice(DTYPES) if operation == small_operators.COPY else dtype)
        spread = [[size if r.random() < 0.8 else 1 for size in sizes] for _ in range(2)]
        given = [_in_steps(r, own, dtype) for own in spread][: 2 if operation > small_operators.NEGATE else 1]
        job = small_operators.elementwise_job(operation, out, *given)
        library.call("elementwise", job)
        calls.append(recording.KernelCall(library.functions.elementwise, job))
        kept += [out, *given]
    with compiled.note_calls(lambda kernel, job: calls.append(recording.KernelCall(kernel, job))):
        kept += _attend_to_each(r)
    function, args, _ = recording.in_turn(library, calls)
    function(*args)


def _attend_to_each(r: random.Random) -> list[Tensor]:
    """Attention of a token of some sequences, as steps are recorded; what it reads and writes."""
    count, kv_heads, shared, dtype = r.randint(1, 4), r.randint(1, 3), r.randint(1, 7), r.choice(HALVES)
    size, width = (r.choice((16, 48, r.randint(1, 70))) for _ in range(2))
    heads = kv_heads * shared
    seen = [_seen(r, kv_heads, size, width, dtype) for _ in range(count)]
    rows, written = [row for row, _ in seen], [states for _, read in seen for states in read]
    scores = torch.empty(heads * sum(row.end - row.first for row in rows))
    query, output = torch.randn(count, heads, size), torch.empty(count, heads, width)
    places, sizes = (query.data_ptr(), output.data_ptr()), (count, kv_heads, shared, size, width)
    job = attention.EachTokenJob(places, 0, sizes, 0.3, torch.get_num_threads())
    job.attend_to(rows, scores)
    found = attention.library()
    assert found is not None
    found.call("attend_to_each", job.packed)
    parts = [part for row in rows for own in (row.key, row.value) for part in own.parts]
    return [query, output, scores, *written, *parts]


def _seen(
    r: random.Random, kv_heads: int, size: int, width: int, dtype: torch.dtype
) -> tuple[attention.SeenTokens, list[Tensor]]:
    """In 16 bits, or in codes, where a size can be, to which a token is written; and what that is read from."""
    first, tokens = r.randint(0, 5), r.randint(1, 90)
    kept, read = [], list[Tensor]()
    for own, stores in ((size, (Int8Store, Int4Keys)), (width, (Int8Store, Int4Values))):
        states = torch.randn(1, kv_heads, first + tokens, own).to(dtype)
        store = (
            r.choice(stores)(states, first + tokens, DequantBuffer())
            if own % 16 == 0
            else Store(states, first + tokens)
        )
        store.write(0, states)
        kept.append(store.kept_states)
        if own % 16 == 0:
            attention.KeptToken(states[0, :, -1], kept[-1], first + tokens - 1)
            read.append(states)
    return attention.SeenTokens(*kept, first, first + tokens), read


CALLS: tuple[Call, ...] = (few, many, attend, norms, quantise, blocks, gather, in_groups, replays)


def load(path: str) -> compiled.Library:
    """The library at `path` in place of the installed one, on threads that sanitizers understand."""
    library = compiled.Library(path)
    library.parallel = ctypes.cast(library.functions.plain_threads, ctypes.c_void_p)
    for module in (attention, gathering, gguf_blocks, quantize, small_operators):
        module.library = lambda: library  # type: ignore[attr-defined]
    return library


def overflow(library: compiled.Library) -> None:
    """What happened where torch's default type was bfloat16: float32 numbers in memory of half the size."""
    quantize.run("quantize_largest", torch.ones(64, 64), torch.empty(64, dtype=torch.bfloat16))


def race(library: compiled.Library) -> None:
    """Two threads write the same number, and nothing orders them."""
    library.functions.write_twice()


def hammer(library: compiled.Library, seconds: float) -> None:
    # torch itself stays on one thread: sanitizers take its OpenMP for races.
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: random.randint(1, 4)
    end, failures, counts = time.monotonic() + seconds, list[BaseException](), dict.fromkeys(CALLS, 0)

    def caller(seed: int) -> None:
        r = random.Random(seed)
        torch.manual_seed(seed)
        try:
            while time.monotonic() < end or not all(counts.values()):
                call = r.choice(CALLS)
                call(r, library)
                counts[call] += 1
        except BaseException as error:
            failures.append(error)
            raise

    callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(CALLERS)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    if failures:
        raise SystemExit(1)
    print("hammered", *(f"{call.__name__} {count}" for call, count in counts.items()))


if __name__ == "__main__":
    wrong = {"overflow": overflow, "race": race}.get(sys.argv[2])
    if wrong is not None:
        wrong(load(sys.argv[1]))
    else:
        hammer(load(sys.argv[1]), float(sys.argv[2]))
