"""What a mixture reports to have read while it decoded, beside what the kernel says this process had the disk read."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import VOCAB, randomised
from torch import Tensor
from transformers import LogitsProcessorList

from griffin_offload import GriffinModel
from griffin_offload.blocks.routing import RouterGuess
from griffin_offload.checkpoint import direct_io
from griffin_offload.engine import load as loading
from griffin_offload.engine.convert import convert
from griffin_offload.formats.expert_form import BLOCK_BYTES

# An expert is a record of whole blocks with nothing that fills it up, so that what is read is what it is.
HIDDEN, INNER, EXPERTS, NEW = 256, 768, 8, 24
EXPERT_BYTES = 3 * HIDDEN * INNER * 2


def _disk_bytes() -> int:
    """That this process has had the disk read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _check_that_the_kernel_counts(path: Path) -> None:
    """Skips where it does not: no such file, a file system in memory, or one that is not read past the page cache."""
    try:
        before, descriptor = _disk_bytes(), os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError, KeyError) as error:
        pytest.skip(f"bytes of the disk cannot be counted here: {error!r}")
    buffer = direct_io.block_buffer(BLOCK_BYTES)
    try:
        found = os.preadv(descriptor, [memoryview(buffer.numpy())], 0)
    except OSError as error:
        pytest.skip(f"{path} cannot be read past the page cache: {error!r}")
    finally:
        os.close(descriptor)
    if _disk_bytes() - before != found:
        pytest.skip(f"of {found} bytes read from {path} the kernel counted {_disk_bytes() - before}")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose experts are records; none of it is in the page cache."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "eos_token_id": None}
    place = tmp_path_factory.mktemp("reads")
    randomised(hf.MixtralConfig(**sizes, **heads), 0).to(torch.bfloat16).save_pretrained(place / "source")
    convert(place / "source", place / "copy", "none")
    for path in (place / "copy").glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        _check_that_the_kernel_counts(path)
    return place / "copy"


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_decoding_has_the_disk_read_its_misses_and_nothing_else(
    copy: Path, monkeypatch: pytest.MonkeyPatch, density: float
):
    monkeypatch.setattr(loading, "evicts", lambda model_spec: True)
    monkeypatch.setattr(RouterGuess, "__call__", lambda self, hidden: [])  # one that is cancelled has read a part
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(4))
    marks: list[int] = []

    def after_the_prompt(_: Tensor, scores: Tensor) -> Tensor:
        if not marks:
            marks.append(_disk_bytes())
        return scores

    options: dict[str, Any] = {"device": "cpu", "ctx_size": 64, "quantize": "none", "max_gpu_mem": "60MB"}
    with GriffinModel.from_pretrained(copy, density=density, **options) as model:
        assert model.engine.loaded.layers.expert_store.expert_bytes(0) == EXPERT_BYTES
        more = []  # beside the experts: pages of residents and of libraries, the first time
        while len(more) < 4 and 0 not in more:
            marks.clear()
            processors = LogitsProcessorList([after_the_prompt])
            model.generate(ids, max_new_tokens=NEW, do_sample=False, logits_processor=processors)
            report = model.last_report
            more.append(_disk_bytes() - marks[0] - report.decode_streamed_bytes)
            assert report.decode_streamed_bytes == report.experts.misses * EXPERT_BYTES > 0
    assert min(more) == 0
