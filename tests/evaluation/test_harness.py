"""`GriffinLM` against lm-eval's own HFLM on the dense model, and against the modes' definitions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.direct import gated, kept_by, simulated_directly
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from marks import by_turns, mostly_slow
from tiny_models import ARCHITECTURES, BOS
from transformers import AutoModelForCausalLM

from griffin_offload.evaluation.lm_eval_model import GriffinLM
from griffin_offload.evaluation.lm_eval_tasks import quiet_harness
from griffin_offload.method.variants import Variant

PAIRS = [
    ("the cat sat on the", " mat"),
    ("the cat sat on the ", "mat and thought of another"),
    ("they thought of another", " river"),
    ("they thought of another", " boat"),
    ("nothing was left in their boats while the cat sat", "\nriver"),
    ("the", " cat"),
    ("", "the mat"),
]
PROMPTS = ["the cat sat on", "nothing was left in their boats and", "river"]
TEXTS = ["the cat sat on the mat and thought of another river " * 4, "boats", "nothing was left"]
CLOSE = {"abs": 1e-5, "rel": 1e-6}
# Whether texts of the harness begin with BOS: Gemma's always do.
WITH_BOS = {"llama2": False, "gemma": True, "opt": False, "qwen3_moe": False}


def _requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


LIKELIHOODS = _requests("loglikelihood", PAIRS)
ROLLING = _requests("loglikelihood_rolling", [(text,) for text in TEXTS])
GENERATIONS = _requests("generate_until", [(text, {"until": ["q"], "max_gen_toks": 9}) for text in PROMPTS])


def _griffin(path: Path, **options: Any) -> GriffinLM:
    with quiet_harness():
        return GriffinLM(path, device="cpu", max_gpu_mem="200MB", offline=True, **options)


def _dense(path: Path, bos: bool | None, **options: Any) -> HFLM:
    """Without lm-eval's cache of logits: of requests with equal inputs it scores the shorter answer at the first
    position of the longer one, as here "the" + " cat" and, behind BOS, "" + "the mat"."""
    with quiet_harness():
        settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 1, "logits_cache": False}
        return HFLM(str(path), add_bos_token=bos, **settings, **options)


@pytest.mark.parametrize(("name", "mode"), by_turns(WITH_BOS, ("gen", "class", "strict"), whole=("llama2",)))
@pytest.mark.filterwarnings("ignore:.* too few tokens")
def test_density_one_is_hflm(checkpoints, name: str, mode: str):
    """Log-likelihoods, windows of whole texts and generations, as the full model and as a variant that keeps all."""
    path = checkpoints(name)
    ours = _griffin(path, mode=mode, density=1.0, max_length=24)
    dense = _dense(path, WITH_BOS[name], max_length=24)
    with quiet_harness():
        expected = dense.loglikelihood(LIKELIHOODS), dense.loglikelihood_rolling(ROLLING)
        generated = dense.generate_until(GENERATIONS)
    assert len(set(generated)) == len(PROMPTS)
    for ours.row in (0, 1):
        found = ours.loglikelihood(LIKELIHOODS)
        assert [answer.log_likelihood for answer in found] == pytest.approx([lp for lp, _ in expected[0]], **CLOSE)
        assert [answer.greedy for answer in found] == [greedy for _, greedy in expected[0]]
        assert ours.loglikelihood_rolling(ROLLING) == pytest.approx(expected[1], **CLOSE)
        assert ours.generate_until(GENERATIONS) == generated
    ours.close()


def test_the_tokenizers_own_bos_rule(checkpoints, tmp_path: Path):
    """With `bos` "tokenizer" a tokenizer that begins texts with BOS does so, with "paper" it does not."""
    import shutil

    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    path = Path(shutil.copytree(checkpoints("llama2"), tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save_pretrained(path)
    encoded = {bos: _griffin(path, bos=bos).tok_encode("the cat") for bos in ("paper", "tokenizer")}
    assert encoded["tokenizer"] == [BOS, *encoded["paper"]] == _dense(path, None).tok_encode("the cat")


def test_one_pass_serves_all_variants_and_batches_change_nothing(checkpoints, monkeypatch: pytest.MonkeyPatch):
    from griffin_offload.evaluation import lm_eval_model

    calls: list[int] = []
    simulate = lm_eval_model.simulate

    def counted(model: Any, samples: list[Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(samples))
        return simulate(model, samples, *args, **kwargs)

    monkeypatch.setattr(lm_eval_model, "simulate", counted)
    lm = _griffin(checkpoints("llama2"), mode="strict", variants=[Variant(0.5), Variant(0.5, "magnitude")])
    usable = LIKELIHOODS[:5]
    together: dict[int, list[float]] = {}
    for lm.row in (0, 1, 2):
        together[lm.row] = [answer.log_likelihood for answer in lm.loglikelihood([*usable, *usable])]
    assert calls == [len(usable)]
    assert len({tuple(values) for values in together.values()}) == 3
    lm.forget()
    for lm.row in (0, 1, 2):
        alone = [lm.loglikelihood([request])[0].log_likelihood for request in usable]
        assert alone * 2 == pytest.approx(together[lm.row], **CLOSE)
    assert calls[1:] == [1] * len(usable)


@pytest.mark.parametrize("mode", ["gen", "class", "strict"])
def test_modes_are_their_definitions(checkpoints, mode: str):
    """Which tokens choose, and which pass through the chosen neurons: written again by hand, on a dense model."""
    path = checkpoints("llama2")
    lm, dense = _griffin(path, mode=mode, density=0.25), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for request, answer in zip(LIKELIHOODS[:5], lm.loglikelihood(LIKELIHOODS[:5]), strict=True):
        context, continuation = lm._encode_pair(*request.args)
        ids = torch.tensor(context + continuation)
        prompt = {"gen": len(context), "class": len(ids) - 2, "strict": len(context) - 1}[mode]
        kept = kept_by("topk", 0.25, gated(dense))
        log_probs = simulated_directly(dense, ARCHITECTURES["llama2"].down, ids[:-1], prompt, kept)
        expected = log_probs[len(context) - 1 :].gather(-1, ids[len(context) :, None]).sum()
        assert answer.log_likelihood == pytest.approx(float(expected), abs=1e-4)


def test_requests_with_too_few_tokens_are_the_full_models(checkpoints):
    """One token of context and one to predict (BOS stands for an empty context): no neurons can be chosen."""
    shortest = _requests("loglikelihood", [("", "a"), ("the cat sat", " on")])
    for mode, short in (("class", 1), ("strict", 1)):
        lm = _griffin(checkpoints("llama2"), mode=mode, density=0.25)
        with pytest.warns(UserWarning, match=f"{short} of 2 requests have too few tokens"):
            pruned = lm.loglikelihood(shortest)
        lm.row = 0
        full = lm.loglikelihood(shortest)
        assert pruned[0].log_likelihood == pytest.approx(full[0].log_likelihood, **CLOSE)
        assert pruned[1].log_likelihood != pytest.approx(full[1].log_likelihood, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "kept"), mostly_slow([("llama2", {}), ("qwen3_moe", {"missing_experts": "route"})], 1)
)
def test_generations_are_the_runtimes(checkpoints, name: str, kept: dict[str, Any]):
    """A variant's generations are those of a model loaded at its density, and differ from the full model's; of experts
    none that was left out stands in for it."""
    from griffin_offload import GriffinModel

    path = checkpoints(name)
    lm = _griffin(path, density=0.25)
    model = GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="200MB", density=0.25, ctx_size=64, **kept)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([lm.tok_encode(prompt)])
        new = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        expected.append(lm.tok_decode(new.tolist()).split("q")[0])
    pruned = lm.generate_until(GENERATIONS)
    assert pruned == expected
    lm.row = 0
    assert lm.generate_until(GENERATIONS) != pruned


@pytest.mark.slow
def test_a_full_model_that_does_not_fit_generates_in_exact_mode():
    """The demo in float32: 11 MB hold less than half of its neurons."""
    from griffin_offload.demo import demo_directory

    found = {}
    for budget in ("40MB", "11MB"):
        with quiet_harness():
            lm = GriffinLM(demo_directory(), device="cpu", dtype="float32", max_gpu_mem=budget, density=0.25)
        lm.row = 0
        found[budget] = lm.generate_until(GENERATIONS)
        model = lm.slot.model
        assert model is not None
        assert (model.plan.kept[0] < 1024) == (budget == "11MB")
    assert found["11MB"] == found["40MB"]


def test_lm_evals_own_way_to_make_a_model(checkpoints):
    import lm_eval.api.registry

    made = lm_eval.api.registry.get_model("griffin")
    assert made is GriffinLM
    with quiet_harness():
        settings = f"pretrained={checkpoints('llama2')},mode=class,density=0.5,device=cpu,max_gpu_mem=200MB"
        lm = made.create_from_arg_string(settings, {"batch_size": 1})
    assert lm.variants == [Variant(0.5)]
    assert lm.model_args(1)["density"] == 0.5
    assert lm.model_args(0)["density"] == 1
