"""The door `Device`: one that is registered at run time runs whole prompts and answers, by asynchronous copies."""

import ast
import gc
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import mostly_slow
from threaded_device import Counts, ThreadedDevice
from tiny_models import VOCAB

import griffin_offload
from griffin_offload import GriffinModel, UsageError
from griffin_offload.config import DEVICE_NAMES, LoadConfig
from griffin_offload.devices import gpu
from griffin_offload.devices.base import Device
from griffin_offload.devices.gpu import CudaDevice, GpuDevice, XpuDevice
from griffin_offload.devices.memory import budget_bytes
from griffin_offload.devices.registry import CpuDevice, MpsDevice, choose_device, device_kind, devices_here
from griffin_offload.engine.spec import examine
from griffin_offload.evaluation.ceilings import host_copy_rate
from griffin_offload.evaluation.distributed import Processes
from griffin_offload.offload.layer_stream import LayerStream, StreamConfig
from griffin_offload.offload.weight_store import HostStore, MmapStore, Source

Register = Callable[[type[Device]], None]


@pytest.fixture
def threaded(register_device: Register) -> type[ThreadedDevice]:
    """A kind of its own counts."""
    kind = type("ThreadedDevice", (ThreadedDevice,), {"counts": Counts()})
    register_device(kind)
    return kind


def _model(path: Path, device: str, **options: object) -> GriffinModel:
    defaults = {"max_gpu_mem": "20MB", "density": 0.5, "ctx_size": 96, "quantize": "none"}
    return GriffinModel.from_pretrained(path, device=device, **(defaults | options))


def _ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, 32), generator=torch.Generator().manual_seed(seed))


def _answer(model: GriffinModel, seed: int = 1) -> torch.Tensor:
    return model.generate(_ids(seed), max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize(
    ("name", "options", "offload"),
    mostly_slow(
        [
            ("llama3", {}, "ram"),
            ("gpt2", {}, "disk"),
            ("opt", {"dtype": "bfloat16"}, "ram"),
            ("llama2", {"quantize": "int8"}, "disk"),
            ("mistral", {"quantize": "int4"}, "ram"),
            ("mistral", {"exact": True, "draft_tokens": 4}, "disk"),
            ("llama3", {}, "disk"),
            ("mistral", {"exact": True, "draft_tokens": 4}, "ram"),
        ],
        6,
    ),
)
def test_tokens_and_bytes_are_those_of_the_cpu(
    checkpoints, threaded: type[ThreadedDevice], name: str, options: dict[str, object], offload: str
):
    here, there = (_model(checkpoints(name), device, offload=offload, **options) for device in ("cpu", "threaded"))
    counts, streamed = threaded.counts, there.plan.streamed_bytes
    for seed in (1, 2):
        copied = counts.copied_bytes
        assert torch.equal(_answer(there, seed), _answer(here, seed))
        mine, other = there.last_report, here.last_report
        assert mine.prefill_streamed_bytes == other.prefill_streamed_bytes > 0
        assert mine.decode_streamed_bytes == other.decode_streamed_bytes
        if not options.get("exact"):
            assert mine.decode_streamed_bytes == 0
            aligned = 64 * 3 * len(there.plan.streamed)  # tensors of a host buffer begin at multiples of 64
            assert streamed <= counts.copied_bytes - copied <= streamed + aligned
        assert all(torch.equal(there.selected[layer], chosen) for layer, chosen in here.selected.items())
        assert mine.peak_device_bytes <= there.plan.peak_bytes
    assert counts.readers == {"griffin-offload-reader"}
    here.close()
    there.close()


@pytest.mark.parametrize("offload", ["ram", "disk"])
def test_what_a_device_is_asked_for(checkpoints, threaded: type[ThreadedDevice], offload: str):
    """Its memory is apart from the host's: offloaded weights are no part of its budget. It gets back what it gave."""
    counts = threaded.counts
    model = _model(checkpoints("llama2"), "threaded", offload=offload)
    budget, overhead = model.plan.budget_bytes, threaded.assumed_overhead_bytes
    assert counts.capped == [budget - overhead]
    assert model.plan.parts["overhead"] == overhead
    assert "offloaded" not in model.plan.parts
    assert len(counts.registered) == (len(model.plan.streamed) if offload == "ram" else 0)
    _answer(model)
    assert len(counts.slot_bytes) == min(model.plan.slots, len(model.plan.streamed))
    assert sum(counts.slot_bytes) == model.plan.parts["slots"]
    assert counts.peaks_reset == 1
    # What the computation had used was waited for before it was written over; the last slots are not filled again.
    waited = [event.waited > 0 for event in counts.freed]
    assert len(waited) == 1 + len(model.plan.streamed)
    assert all(waited[: -model.plan.slots])
    model.close()
    assert counts.capped[1:] == [None]
    assert counts.registered == {}


@pytest.mark.parametrize("staging_bytes", [16, 64, 2**20])
@pytest.mark.parametrize("in_ram", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_asynchronous_copies(threaded: type[ThreadedDevice], slots: int, in_ram: bool, staging_bytes: int):
    """In pieces, through few staging buffers, of another precision: what is acquired is what the source holds."""
    device = threaded.current()
    layers = {i: [torch.randn(8, 4).double(), torch.randn(5).double()] for i in range(6)}
    mapped = MmapStore(layers, evict=False)
    source: Source = HostStore(mapped, list(layers), torch.float32, device) if in_ram else mapped
    seen = []
    with LayerStream(source, list(layers), StreamConfig(device, torch.float32, slots, staging_bytes)) as stream:
        for i in layers:
            seen.append([tensor.clone() for tensor in stream.acquire(i)])
            stream.release()
    assert all(
        torch.equal(found, original.float()) for i in layers for found, original in zip(seen[i], layers[i], strict=True)
    )
    counts = threaded.counts
    assert len(counts.slot_bytes) == slots
    if not in_ram:
        assert counts.copied_bytes == 6 * (32 + 5) * 4
        assert len(counts.copies) == 6 * (-(-128 // staging_bytes) + -(-20 // staging_bytes))
        assert len(counts.pinned) == min(3, len(counts.copies))
    source.close()
    assert counts.registered == {}
    assert source.fetched_bytes == 6 * (32 + 5) * (4 if in_ram else 8)


def test_leaving_early_waits_for_copies_under_way(threaded: type[ThreadedDevice]):
    layers = {i: [torch.randn(8, 4)] for i in range(20)}
    with LayerStream(MmapStore(layers, evict=False), list(layers), StreamConfig(threaded.current(), torch.float32, 2)):
        pass
    assert all(copy.done() for copy in threaded.counts.copies)


def test_its_facts_reach_the_request(checkpoints, threaded: type[ThreadedDevice]):
    """The budget's percentage is of its memory; embeddings may stay on the host; nothing is captured or translated."""
    spec = examine(checkpoints("llama2"), LoadConfig(device="threaded", max_gpu_mem="50%", dtype="bfloat16"))
    assert spec.request.budget_bytes == threaded.memory[1] // 2
    assert (spec.request.host_embeddings, spec.request.stored_share, spec.request.graphs) == (True, 0.0, None)
    on_cpu = examine(checkpoints("llama2"), LoadConfig(device="cpu", max_gpu_mem="1GB", dtype="bfloat16"))
    assert (on_cpu.request.host_embeddings, on_cpu.request.stored_share) == (False, 2.0)
    spec = examine(checkpoints("llama2"), LoadConfig(device="threaded", max_gpu_mem="1GB", max_cpu_mem="1MB"))
    assert spec.request.budget_bytes == 10**9


def test_embeddings_that_stay_on_the_host(checkpoints, threaded: type[ThreadedDevice]):
    roomy = _model(checkpoints("mistral"), "threaded")
    tight = _model(checkpoints("mistral"), "threaded", max_gpu_mem=roomy.plan.peak_bytes - 1000)
    assert (roomy.plan.embeddings, tight.plan.embeddings) == ("device", "host")
    assert torch.equal(_answer(tight), _answer(roomy))
    assert tight.last_report.decode_embedding_bytes > 0


def test_a_model_that_is_dropped_gives_back_what_is_registered(checkpoints, threaded: type[ThreadedDevice]):
    model = _model(checkpoints("llama2"), "threaded", offload="ram")
    _answer(model)
    del model
    gc.collect()
    assert threaded.counts.registered == {}


def test_copies_from_the_host_are_measured_where_they_are_asynchronous(threaded: type[ThreadedDevice]):
    assert host_copy_rate(threaded.current(), pinned=True) > 0
    assert threaded.counts.pinned
    assert host_copy_rate(CpuDevice.current(), pinned=True) is None


class _Gpu:
    """Stands in for torch.cuda or torch.xpu on a machine that has none: 10 GB, of which `held` are another's."""

    def __init__(self, held: int) -> None:
        self.held, self.shares = held, list[float]()

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 10**10 - self.held, 10**10

    def memory_reserved(self, device: torch.device) -> int:
        return 2**20

    def set_per_process_memory_fraction(self, share: float, device: torch.device) -> None:
        self.shares.append(share)


@pytest.mark.parametrize("kind", [CudaDevice, XpuDevice])
@pytest.mark.parametrize(("held", "overhead"), [(600_000_000, 998_951_424), (3_000_000_000, 1_100_000_000)])
def test_a_gpu_s_context_is_measured_where_that_can_be_it(
    monkeypatch: pytest.MonkeyPatch, kind: type[GpuDevice], held: int, overhead: int
):
    stand_in, zeros = _Gpu(held), torch.zeros
    monkeypatch.setattr(kind, "api", stand_in)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    device = kind(torch.device(kind.name, 0))
    assert device.memory_bytes() == (10**10 - held, 10**10)
    assert device.overhead_bytes() == overhead
    for nbytes in (4 * 10**9, 2 * 10**10, -1):
        device.cap(nbytes)
    device.uncap()
    assert stand_in.shares == [0.4, 1.0, 0.0, 1.0]


def test_older_torch_cannot_cap_intel_s(monkeypatch: pytest.MonkeyPatch):
    stand_in = _Gpu(0)
    monkeypatch.setattr(XpuDevice, "api", stand_in)
    monkeypatch.delattr(_Gpu, "set_per_process_memory_fraction")
    XpuDevice(torch.device("xpu", 0)).cap(10**9)
    assert stand_in.shares == []


@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_what_torch_is_asked_of_a_gpu_is_there(name: str):
    """Both makers' modules have every name that the door uses."""
    names = set(re.findall(r"\b_?api\.(\w+)", inspect.getsource(gpu)))
    assert {"Event", "Stream", "stream", "current_stream", "mem_get_info"} < names
    names -= {"set_per_process_memory_fraction"} if name == "xpu" else set()  # which is asked for first
    assert names <= set(dir(getattr(torch, name)))


def test_an_integrated_gpu_that_cannot_say_what_is_free_is_refused(monkeypatch: pytest.MonkeyPatch):
    """As torch has them: the question itself raises."""

    def ask(*_: object) -> tuple[int, int]:
        raise RuntimeError("The device (Some Graphics) doesn't support\nquerying the available free memory.")

    monkeypatch.setattr(_Gpu, "mem_get_info", ask)
    monkeypatch.setattr(XpuDevice, "api", _Gpu(0))
    said = "xpu cannot be used here: .*Some Graphics.* support querying .*; choose --device cpu"
    with pytest.raises(UsageError, match=said):
        XpuDevice(torch.device("xpu", 0)).memory_bytes()


def test_names(register_device: Register):
    """Those that users may write, those of the kinds, and torch's are the same."""
    for name, kind in {"cuda": CudaDevice, "xpu": XpuDevice, "mps": MpsDevice, "cpu": CpuDevice}.items():
        assert device_kind(name) is kind
        assert kind.absent().torch_device == torch.device(name)
    assert DEVICE_NAMES == ["auto", "cuda", "xpu", "mps", "cpu"]
    register_device(ThreadedDevice)
    assert DEVICE_NAMES == ["auto", "cuda", "xpu", "mps", "cpu", "threaded"]
    assert devices_here()[-1] == "threaded"
    assert choose_device("auto").name != "threaded"
    with pytest.raises(UsageError, match="a device is named 'threaded' already"):
        register_device(ThreadedDevice)
    with pytest.raises(UsageError, match="no device is named 'tpu': choose one of cuda, xpu, mps, cpu, threaded"):
        device_kind("tpu")


def test_names_end_with_their_registration(register_device: Register):
    with pytest.raises(UsageError, match="device is 'threaded': choose one of auto, cuda, xpu, mps, cpu"):
        LoadConfig(device="threaded")
    register_device(ThreadedDevice)
    assert LoadConfig(device="threaded").device == "threaded"


def test_what_a_device_does_not_have_is_not_asked_for():
    device = CpuDevice.current()
    assert not device.asynchronous_copies
    assert not device.captures
    for ask in (device.copy_stream, device.recorder, device.record, lambda: device.pinned(1)):
        with pytest.raises(AssertionError, match="cpu"):
            ask()


class _Counted:
    """accelerate's, of which `share` needs the wait alone."""

    def wait_for_everyone(self) -> None:
        pass


def test_processes_share_a_device_or_take_their_own(register_device: Register, monkeypatch: pytest.MonkeyPatch):
    taken = []

    class Several(ThreadedDevice):
        name = "several"

        def give_processes_their_own(self, processes: int, rank: int) -> bool:
            taken.append((processes, rank))
            return True

    register_device(Several)
    register_device(ThreadedDevice)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    processes = Processes(1, 4, _Counted())
    assert processes.share({"device": "several"}) == {"device": "several"}
    assert taken == [(2, 1)]
    free = budget_bytes(LoadConfig(device="threaded"), ThreadedDevice.current())
    assert processes.share({"device": "threaded"})["max_gpu_mem"] == free // 2
    named = {"device": "threaded", "max_gpu_mem": "1GB"}
    assert processes.share(named) == named


# Facts of devices stand in devices/ alone.

_TORCH = re.compile(r"torch\.(?:backends\.)?(?:cuda|mps|xpu|accelerator)\b")
# Kernels and formats ask where a tensor lies; the engine where int4 and kernels in C were tried.
_MOST_TESTS_OF_A_TYPE = 10


def _elsewhere() -> dict[str, str]:
    """Path and text of every file of the package outside devices/."""
    package = Path(griffin_offload.__file__).parent
    paths = [path.relative_to(package) for path in package.rglob("*.py")]
    return {str(path): (package / path).read_text() for path in paths if path.parts[0] != "devices"}


def _tests_of_a_type(text: str) -> list[str]:
    """Comparisons with the name of a device's type."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            parts = [inner for side in (node.left, *node.comparators) for inner in getattr(side, "elts", [side])]
            values = {part.value for part in parts if isinstance(part, ast.Constant)}
            found += [ast.unparse(node)] * bool(values & {"cpu", "cuda", "xpu", "mps"})
    return found


def test_torch_is_asked_about_devices_in_one_room():
    assert {path: found for path, text in _elsewhere().items() if (found := _TORCH.findall(text))} == {}


def test_the_type_of_a_device_is_hardly_asked_elsewhere():
    found = {path: tests for path, text in _elsewhere().items() if (tests := _tests_of_a_type(text))}
    assert sum(map(len, found.values())) <= _MOST_TESTS_OF_A_TYPE, found
    rooms = {path.split("/")[0] for path in found if path != "serving/cluster.py"}  # Ray has GPUs alone
    assert rooms <= {"formats", "kernels", "engine"}, found
