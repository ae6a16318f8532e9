"""What is right whatever else the process does: defaults that others set, before or meanwhile, and models side by side.

Each answer is compared with the same model's where nothing was set.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from marks import mostly_slow
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.demo import demo_directory
from griffin_offload.engine.convert import convert
from griffin_offload.formats import base
from griffin_offload.formats.compensation import Packed
from griffin_offload.formats.int4 import INT4
from griffin_offload.formats.int8 import INT8
from griffin_offload.kernels import attention, gemv, small_operators
from griffin_offload.kernels.library import library

OTHER_TYPES = (torch.bfloat16, torch.float16, torch.float64)
PRECISIONS = ("none", "int8", "int4")
PROMPT = torch.arange(5, 60)[None]
other_types = pytest.mark.parametrize("default", OTHER_TYPES, ids=str)
precisions = pytest.mark.parametrize("precision", mostly_slow(PRECISIONS, 1))


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _default_type_as_before() -> Iterator[None]:
    """Two threads that set and restore it, as transformers does, may leave it as neither found it."""
    with default_type(torch.float32):
        yield


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """`work` over and over in another thread."""
    stop, failures = threading.Event(), list[Exception]()

    def repeat() -> None:
        try:
            while not stop.is_set():
                work()
                stop.wait(0.001)  # others want the interpreter, too
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failures


def build_on_meta() -> None:
    """As transformers does it."""
    for dtype in OTHER_TYPES:
        with default_type(dtype), torch.device("meta"):
            nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "demo"
    convert(demo_directory(), target, "int8")
    return target


def load(precision: str, directory: Path | None = None, **options: Any) -> GriffinModel:
    options = {"density": 0.5, "device": "cpu", "max_gpu_mem": "100MB", "ctx_size": 256, **options}
    if directory is None:
        directory, options["quantize"] = demo_directory(), precision
    return GriffinModel.from_pretrained(directory, **options)


def answer(model: GriffinModel) -> list[int]:
    tokens: list[int] = model.generate(PROMPT, max_new_tokens=12, do_sample=False)[0].tolist()
    return tokens


def answer_of(precision: str, directory: Path | None = None) -> list[int]:
    with load(precision, directory) as model:
        return answer(model)


@pytest.fixture(scope="module")
def right(converted: Path) -> dict[str, list[int]]:
    """Answers where nobody does anything else."""
    found = {precision: answer_of(precision) for precision in PRECISIONS}
    return found | {"converted": answer_of("int8", converted)}


@pytest.mark.parametrize(
    ("precision", "default"), list(zip(("none", "int4", "int8"), OTHER_TYPES, strict=True)), ids=str
)
def test_a_default_type_that_was_set_before(default: torch.dtype, precision: str, right: dict[str, list[int]]):
    with default_type(default):
        assert answer_of(precision) == right[precision]


@other_types
def test_a_converted_checkpoint_under_a_default_type(
    default: torch.dtype, converted: Path, right: dict[str, list[int]]
):
    with default_type(default):
        assert answer_of("int8", converted) == right["converted"]


@precisions
def test_beside_a_thread_that_builds_models(precision: str, right: dict[str, list[int]]):
    with meanwhile(build_on_meta):
        assert answer_of(precision) == right[precision]


def test_a_converted_checkpoint_beside_a_thread_that_builds_models(converted: Path, right: dict[str, list[int]]):
    with meanwhile(build_on_meta):
        assert answer_of("int8", converted) == right["converted"]


@pytest.mark.parametrize("row", [("int8", "int8"), ("none", "int8", "int4")], ids="-".join)
def test_models_loaded_in_a_row_while_the_others_arrive(row: tuple[str, ...], right: dict[str, list[int]]):
    models = [load(precision) for precision in row]
    try:
        assert [answer(model) for model in models] == [right[precision] for precision in row]
    finally:
        for model in models:
            model.close()


def test_a_stock_model_loaded_while_residents_arrive(right: dict[str, list[int]]):
    with load("int8") as model:
        AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.bfloat16)
        assert answer(model) == right["int8"]


@precisions
def test_loading_while_another_one_generates(precision: str, converted: Path, right: dict[str, list[int]]):
    """The converted one is built with parameters on the meta device: those of others stay where they are."""
    with load(precision) as model, meanwhile(lambda: load("int8", converted).close()):
        for _ in range(2):
            assert answer(model) == right[precision]


def test_loads_in_several_threads_leave_the_default_type(right: dict[str, list[int]]):
    found: list[list[int]] = []

    def one(dtype: str) -> None:
        with load("int8", dtype=dtype) as model:
            found.append(answer(model))

    threads = [threading.Thread(target=one, args=(dtype,)) for dtype in ("bfloat16", "float32", "float16", "bfloat16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert torch.get_default_dtype() == torch.float32


def test_parameters_that_others_send_to_the_meta_device(right: dict[str, list[int]]):
    """accelerate's replaces what registers parameters for all threads."""
    with load("int8") as model, init_empty_weights():
        assert answer(model) == right["int8"]
    with init_empty_weights():
        stock = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo_directory()))
    assert all(parameter.is_meta for parameter in stock.parameters())


def test_modules_of_other_threads_stay_real_while_a_converted_one_loads(converted: Path):
    on_meta: list[bool] = []
    with meanwhile(lambda: on_meta.append(nn.Linear(4, 4).weight.is_meta)):
        for _ in range(2):
            load("int8", converted).close()
    assert on_meta
    assert not any(on_meta)


@precisions
def test_a_default_device_and_filled_memory(precision: str, right: dict[str, list[int]]):
    """Residents lie on the model's device, and nothing depends on what new memory holds."""
    with torch.device("meta"):
        model = load(precision)
        assert model.model.device.type == "cpu"  # all residents are there
    with model:
        assert answer(model) == right[precision]
        torch.use_deterministic_algorithms(True)
        try:
            assert answer(model) == right[precision]
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("loading", "generating", "precision"),
    mostly_slow(
        [
            (True, False, "int8"),
            (False, True, "int4"),
            (True, True, "none"),
            (True, False, "none"),
            (False, True, "int8"),
        ],
        2,
    ),
)
def test_inference_mode(precision: str, loading: bool, generating: bool, right: dict[str, list[int]]):
    """It is a thread's own, and ours work in several."""
    with torch.inference_mode(loading):
        model = load(precision)
    with model, torch.inference_mode(generating):
        assert answer(model) == right[precision]
        assert answer(model) == right[precision]


def _strips(neurons: Packed) -> Packed:
    stored = neurons[0].shape[0]
    strips = torch.zeros(1, stored, 32, dtype=torch.uint8), torch.zeros(2, stored, 2, dtype=torch.uint8)
    INT4.gather_neurons(neurons, torch.arange(stored, dtype=torch.long), strips, 0)
    return strips


@pytest.mark.skipif(library() is None, reason="another processor, or no compiler")
@other_types
def test_kernels_under_a_default_type(default: torch.dtype):
    """Shapes whose buffers would be half as large."""
    results: list[list[Tensor]] = []
    for dtype in (torch.float32, default):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(70, 96, generator=generator, dtype=torch.float32)
        x, ones = weight[:3].bfloat16(), torch.ones(96, dtype=torch.float32)
        query = torch.randn(2, 4, 1, 16, generator=generator, dtype=torch.float32).bfloat16()
        key = torch.randn(2, 2, 200, 16, generator=generator, dtype=torch.float32).bfloat16()
        seen = torch.arange(200)[None, None, None] > 20
        numbers = torch.empty(70, 96, dtype=torch.int8)
        with default_type(dtype):
            scale = INT8.scale_of(weight, torch.bfloat16)
            INT8.write(weight, scale, numbers)
            kernels = gemv.kernels()
            assert kernels is not None
            results.append(
                [
                    scale,
                    numbers,
                    base.neuron_scale(weight, torch.float32),
                    base.row_scale(weight, torch.float32),
                    *(rows := INT4.quantize_rows(weight, ones[:70], ones)),
                    *(neurons := INT4.quantize_neurons(weight[:64], ones, ones[:64])),
                    kernels.multiply_rows(x, *rows, ones[:70]),
                    kernels.multiply_strips(x, *_strips(neurons), ones.bfloat16()),
                    kernels.multiply_int8(x, numbers, scale),
                    kernels.multiply_floats(x, weight.bfloat16()),
                    attention.attend(query, key, key, seen, 0.25),
                    small_operators.rms_norm(x, ones.bfloat16(), 1e-6),
                ]
            )
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
