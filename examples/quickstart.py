"""The Python API in one screen: plan, load, generate, look at the figures.

python examples/quickstart.py [MODEL_DIRECTORY [BUDGET]]      without arguments: the embedded demo, in 6.35 MB
"""

import sys

from griffin_offload import GriffinModel
from griffin_offload.demo import PROMPT, demo_directory


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else demo_directory()
    budget = sys.argv[2] if len(sys.argv) > 2 else "6.35MB"
    # Without `quantize` the planner would rather keep every neuron in 8 bit than drop some.
    model = GriffinModel.from_pretrained(path, max_gpu_mem=budget, quantize="none", ctx_size=160, prompt_tokens=80)
    print(f"density {model.plan.density:.2f}: {model.resident_bytes} of {model.plan.full_bytes} bytes stay resident")

    tokens = model.tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=64, do_sample=False)
    print(model.tokenizer.decode(output[0], skip_special_tokens=True))

    report = model.last_report
    print(
        f"prefill streamed {report.prefill_streamed_bytes} bytes, decode {report.decode_streamed_bytes}; "
        f"peak {report.peak_device_bytes} of {report.budget_bytes}"
    )


if __name__ == "__main__":
    main()
