"""Every offloaded byte is fetched once per prompt and none while decoding, in every tier and precision."""

import os
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB

from griffin_offload import GriffinError, GriffinModel
from griffin_offload.devices.registry import CpuDevice
from griffin_offload.offload.layer_stream import LayerStream, StreamConfig
from griffin_offload.offload.weight_store import HostStore, MmapStore

CPU = CpuDevice.current()


def _model(path: Path, **options: object) -> GriffinModel:
    return GriffinModel.from_pretrained(
        path, **{"device": "cpu", "max_gpu_mem": "1GB", "density": 0.5, "ctx_size": 64} | options
    )


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, 32), generator=torch.Generator().manual_seed(1))


class _CountingSource(MmapStore):
    """Counts how often each layer is fetched and dropped."""

    def __init__(self, layers: dict[int, list[torch.Tensor]]) -> None:
        super().__init__(layers, evict=False)
        self.fetched: list[int] = []
        self.dropped: list[int] = []

    def fetch(self, layer: int) -> list[torch.Tensor]:
        self.fetched.append(layer)
        return super().fetch(layer)

    def drop(self, layer: int) -> None:
        self.dropped.append(layer)
        super().drop(layer)


@pytest.mark.parametrize("keeps_pages", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 2, 3, 9])
def test_order_content_and_bounds(slots: int, dtype: torch.dtype, keeps_pages: bool):
    """In place (same precision) and through slots (another one): the values are those of the source."""
    layers = {i: [torch.randn(8, 4), torch.randn(4)] for i in range(6)}
    source = _CountingSource(layers)
    config = StreamConfig(CPU, dtype, slots, keeps_pages=keeps_pages)
    with LayerStream(source, list(layers), config) as stream:
        for i in layers:
            tensors = stream.acquire(i)
            assert not keeps_pages or i not in source.dropped
            assert len(source.fetched) <= i + slots
            for tensor, original in zip(tensors, layers[i], strict=True):
                assert tensor.dtype == dtype
                assert torch.equal(tensor, original.to(dtype))
            stream.release()
    assert source.fetched == list(layers)
    assert sorted(source.dropped) == list(layers)
    layer_bytes = (32 + 4) * dtype.itemsize
    copied = slots if keeps_pages else 1  # pages of the layer that is just being copied, or of all
    copied_from = 0 if dtype == torch.float32 else copied * 36 * 4
    assert layer_bytes <= stream.peak_in_flight_bytes <= slots * layer_bytes + copied_from
    assert source.fetched_bytes == 6 * 36 * 4


def test_a_failing_reader_is_reported_and_joined():
    class Broken(_CountingSource):
        def fetch(self, layer: int) -> list[torch.Tensor]:
            if layer == 2:
                raise OSError("the disk is gone")
            return super().fetch(layer)

    def run() -> None:
        with LayerStream(source, [0, 1, 2, 3], StreamConfig(CPU, torch.float32, 2)) as stream:
            for i in range(4):
                stream.acquire(i)
                stream.release()

    source = Broken({i: [torch.zeros(4)] for i in range(4)})
    with pytest.raises(GriffinError, match="layer 2 cannot be read: the disk is gone"):
        run()
    assert not [t for t in threading.enumerate() if t.name == "griffin-offload-reader"]


def test_leaving_early_stops_the_reader():
    source = _CountingSource({i: [torch.zeros(4)] for i in range(50)})
    with LayerStream(source, list(range(50)), StreamConfig(CPU, torch.float32, 2)) as stream:
        stream.acquire(0)
    assert len(source.fetched) <= 3
    assert sorted(source.dropped) == sorted(source.fetched)
    assert not [t for t in threading.enumerate() if t.name == "griffin-offload-reader"]


def test_ram_weights_are_copies_in_the_precision_of_the_computation():
    original = {0: [torch.randn(5, 3), torch.randn(7)]}
    source = HostStore(MmapStore(original, evict=False), [0], torch.bfloat16, CPU)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(source.fetch(0), original[0], strict=True))
    assert source.fetched_bytes == 22 * 2
    assert source.nbytes >= 22 * 2


@pytest.mark.parametrize("name", ["llama2", "gpt2", "opt"])
@pytest.mark.parametrize("offload", ["disk", "ram"])
def test_each_tensor_is_fetched_once_per_prompt(checkpoints, name: str, offload: str):
    model = _model(checkpoints(name), offload=offload)
    full = sum(t.nbytes for i in model.plan.streamed for t in model.engine.loaded.layers.source.tensors(i))
    for prompts in (1, 2):
        model.generate(_ids(), max_new_tokens=8, do_sample=False)
        assert model.last_report.prefill_streamed_bytes == full == model.plan.streamed_bytes
        assert model.last_report.decode_streamed_bytes == 0
        assert model.engine.loaded.layers.fetched_bytes == prompts * full


def test_tiers_and_slot_copies_give_the_same_tokens(checkpoints):
    path = checkpoints("llama2", torch.bfloat16)
    expected = _model(path).generate(_ids(), max_new_tokens=16, do_sample=False)
    in_ram = _model(path, offload="ram").generate(_ids(), max_new_tokens=16, do_sample=False)
    assert torch.equal(in_ram, expected)


def test_another_precision_streams_through_slots(checkpoints):
    """A bfloat16 checkpoint computed in float32 equals the float32 model with the same (rounded) weights."""
    from transformers import AutoModelForCausalLM

    path = checkpoints("llama2", torch.bfloat16)
    model = _model(path, dtype="float32", density=1.0, always_stream=True)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(model.model(_ids()).logits, dense(_ids()).logits)
    assert model.last_prefill.streamed_bytes == model.plan.streamed_bytes // 2


def test_embeddings_left_on_the_host_are_read_row_by_row(checkpoints):
    """When the budget is short of the table, its rows are counted, apart from weights, and the tokens stay."""
    path = checkpoints("mistral")  # its head is not tied
    roomy = _model(path)
    tight = _model(path, max_gpu_mem=roomy.plan.peak_bytes - 1000)
    assert (roomy.plan.embeddings, tight.plan.embeddings) == ("device", "host")
    expected = roomy.generate(_ids(), max_new_tokens=8, do_sample=False)
    assert torch.equal(tight.generate(_ids(), max_new_tokens=8, do_sample=False), expected)
    row_bytes = tight.model.config.hidden_size * 4
    assert tight.last_report.decode_embedding_bytes == 7 * row_bytes  # the first token comes from prefill
    assert roomy.last_report.decode_embedding_bytes == 0
    assert tight.model.get_input_embeddings().weight.data_ptr() not in {p.data_ptr() for p in tight.model.parameters()}
    assert tight.resident_bytes == roomy.resident_bytes - VOCAB * row_bytes
    assert tight.last_report.decode_streamed_bytes == 0


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def evict(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads are counted by Linux alone")
def test_the_disk_is_read_while_streaming_and_never_while_decoding(tmp_path):
    """Cross-check of our own counter with the kernel's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="10MB")
    model = _model(tmp_path)
    model.engine.loaded.layers.source.pages.evict = True
    model.generate(_ids(), max_new_tokens=2, do_sample=False)  # code and tables are in memory afterwards
    for layer in model.plan.streamed:
        model.engine.loaded.layers.source.drop(layer)
    evict(tmp_path)
    marks = [_read_bytes()]
    model.progress = lambda done, layers: marks.append(_read_bytes()) if done == layers else None
    model.generate(_ids(), max_new_tokens=16, do_sample=False)
    marks.append(_read_bytes())
    streamed = model.last_report.prefill_streamed_bytes
    if marks[1] == marks[0]:
        pytest.skip("this file system does not count reads (tmpfs, overlay)")
    assert 0.9 * streamed <= marks[1] - marks[0] <= 1.3 * streamed
    assert marks[2] == marks[1]
