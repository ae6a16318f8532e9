"""The same promises on a GPU. Skipped, visibly, where there is none."""

import pytest
import torch
from reference import dense_generate
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ARCHITECTURES = ["llama3", "gemma2", "phi3", "opt", "gpt2", "falcon_new"]


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offload", ["ram", "disk"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_density_one_equals_dense_on_the_device(checkpoints, name: str, offload: str):
    path = checkpoints(name)
    model = GriffinModel.from_pretrained(
        path, device="cuda", max_gpu_mem="4GB", density=1.0, always_stream=True, offload=offload, ctx_size=80
    )
    dense = AutoModelForCausalLM.from_pretrained(path).cuda()
    tokens = model.generate(_ids(), max_new_tokens=32, do_sample=False)
    assert torch.equal(tokens, dense_generate(dense, _ids().cuda(), None, 32)[0])
    assert model.last_report.prefill_streamed_bytes == model.plan.streamed_bytes
    assert model.last_report.decode_streamed_bytes == 0


@pytest.mark.parametrize("offload", ["ram", "disk"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_density_half_chooses_what_the_cpu_chooses(checkpoints, offload: str, dtype: str):
    path = checkpoints("llama2")
    options = {"density": 0.5, "ctx_size": 64, "dtype": dtype}
    on_cpu = GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="1GB", **options)
    on_gpu = GriffinModel.from_pretrained(path, device="cuda", max_gpu_mem="4GB", offload=offload, **options)
    for model in (on_cpu, on_gpu):
        model.generate(_ids(), max_new_tokens=8, do_sample=False)
    for layer, chosen in on_cpu.selected.items():
        same = torch.isin(on_gpu.selected[layer].cpu(), chosen).float().mean()
        assert same > (0.99 if dtype == "auto" else 0.9)


def test_the_peak_stays_within_the_budget(checkpoints):
    model = GriffinModel.from_pretrained(
        checkpoints("llama2"), device="cuda", max_gpu_mem="2GB", density=0.5, ctx_size=64
    )
    for _ in range(3):
        model.generate(_ids(), max_new_tokens=16, do_sample=False)
        assert model.last_report.peak_device_bytes <= 2 * 10**9


def test_embeddings_on_the_host(checkpoints):
    """The rows move, the table does not."""
    path = checkpoints("mistral")
    roomy = GriffinModel.from_pretrained(path, device="cuda", max_gpu_mem="4GB", density=0.5, ctx_size=64)
    tight = GriffinModel.from_pretrained(
        path, device="cuda", max_gpu_mem=roomy.plan.peak_bytes - 1000, density=0.5, ctx_size=64
    )
    assert tight.plan.embeddings == "host"
    assert tight.model.get_input_embeddings().weight.device.type == "cpu"
    expected = roomy.generate(_ids(), max_new_tokens=8, do_sample=False)
    assert torch.equal(tight.generate(_ids(), max_new_tokens=8, do_sample=False), expected)
    assert tight.last_report.decode_embedding_bytes > 0
