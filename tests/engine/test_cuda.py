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


def _generate(model: GriffinModel, seed: int = 0, new_tokens: int = 72, **options: object) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(seed))
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **options)


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        *(
            (name, "none")
            for name in ("llama3", "mistral", "gemma2", "qwen2", "cohere2", "phi3", "opt", "gpt2", "gptj")
        ),
        ("llama3", "int8"),
        ("mistral", "int8"),
        ("llama3", "int4"),
        ("mistral", "int4"),
    ],
)
def test_graphs_give_what_the_stock_forward_gives(checkpoints, name: str, quantize: str):
    """Two prompts, many lengths; windows, learned positions, drafts: replayed what the CPU tests replay."""
    options = {"density": 0.5, "ctx_size": 128, "quantize": quantize, "max_gpu_mem": "4GB"}
    plain = GriffinModel.from_pretrained(checkpoints(name), device="cuda", cuda_graphs=False, **options)
    graphs = GriffinModel.from_pretrained(checkpoints(name), device="cuda", **options)
    for seed in (0, 1):
        outputs = [
            _generate(model, seed, output_logits=True, return_dict_in_generate=True).logits for model in (plain, graphs)
        ]
        torch.testing.assert_close(*(torch.stack(logits) for logits in outputs), rtol=1e-3, atol=1e-3)
        assert graphs.last_report.graphs.replayed >= 69
    assert plain.last_report.graphs is None


def test_captures_survive_prompts_and_serve_them_all(checkpoints):
    model = GriffinModel.from_pretrained(
        checkpoints("llama2"), device="cuda", max_gpu_mem="4GB", density=0.5, ctx_size=128
    )
    plain = GriffinModel.from_pretrained(
        checkpoints("llama2"), device="cuda", max_gpu_mem="4GB", density=0.5, ctx_size=128, cuda_graphs=False
    )
    for seed in range(4):
        assert torch.equal(_generate(model, seed), _generate(plain, seed))
        report = model.last_report.graphs
        assert (report.captured, report.replayed) == ((1, 70) if seed == 0 else (0, 71))
        assert model.last_report.peak_device_bytes <= model.plan.budget_bytes


def test_what_is_captured_costs_what_was_planned(checkpoints):
    model = GriffinModel.from_pretrained(
        checkpoints("llama2"), device="cuda", max_gpu_mem="4GB", density=0.5, ctx_size=128
    )
    _generate(model, new_tokens=1)
    before = torch.cuda.mem_get_info()[0]
    _generate(model)
    assert before - torch.cuda.mem_get_info()[0] <= model.plan.parts["graphs"] + 2**25  # the cached KV cache's segments


@pytest.mark.parametrize("options", [{"exact": True, "draft_tokens": 4}, {"refresh": 5}])
def test_drafts_are_replayed_between_streamed_passes(checkpoints, options: dict[str, object]):
    settings = {"device": "cuda", "max_gpu_mem": "4GB", "density": 0.5, "ctx_size": 128, "quantize": "none"}
    model = GriffinModel.from_pretrained(checkpoints("mistral"), **settings, **options)
    plain = GriffinModel.from_pretrained(checkpoints("mistral"), **settings, **options, cuda_graphs=False)
    assert torch.equal(_generate(model), _generate(plain))
    assert model.last_report.graphs.replayed > 20


def test_a_ring_that_is_refilled_while_it_computes(checkpoints):
    """Many layers through two slots, many times: a slot that was written too early would change a choice."""
    options = {"device": "cuda", "max_gpu_mem": "4GB", "density": 0.5, "ctx_size": 512, "quantize": "none"}
    ids = torch.randint(3, VOCAB, (1, 400), generator=torch.Generator().manual_seed(0))
    chosen = []
    for offload in ("ram", "disk"):
        model = GriffinModel.from_pretrained(checkpoints("llama2"), offload=offload, **options)
        for _ in range(10):
            model.generate(ids, max_new_tokens=2, do_sample=False)
            chosen.append(torch.cat([model.selected[layer].cpu() for layer in sorted(model.selected)]))
    assert all(torch.equal(chosen[0], other) for other in chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_int8_kernel_is_ours_and_right(dtype: torch.dtype):
    from griffin_offload.kernels import by_blocks, table, triton_gemv

    device = torch.device("cuda", torch.cuda.current_device())
    x, weight = torch.ones(1, 64, dtype=dtype, device=device), torch.ones(8, 64, dtype=torch.int8, device=device)
    first = table.products("int8", 1, x, dtype, True)[0]
    assert first.function is by_blocks.triton_product
    assert first.takes(x, {"weight": weight})
    triton_gemv.check_kernel(device, dtype)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "deepseek_v3"])
def test_experts_that_the_cpu_computes(checkpoints, name: str, quantize: str):
    """The answer of `fetch`, up to how the two round; no weight goes to the device for it."""
    options = {"device": "cuda", "max_gpu_mem": "4GB", "density": 0.25, "ctx_size": 128, "quantize": quantize}
    found = []
    for missing in ("fetch", "host"):
        with GriffinModel.from_pretrained(checkpoints(name), missing_experts=missing, **options) as model:
            output = _generate(model, new_tokens=24, output_logits=True, return_dict_in_generate=True)
            assert model.last_report.peak_device_bytes <= model.plan.budget_bytes
            found.append(torch.stack(output.logits))
    report = model.last_report
    assert report.decode_streamed_bytes == 0 < report.experts.by_host == report.experts.misses
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
