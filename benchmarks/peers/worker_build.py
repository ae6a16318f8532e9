"""Another build of this project, installed in an environment of its own, which answers one request after the other as
its server does where it knows nothing else. For `parallel.py --beside`:

    ENV/bin/python -m peers.worker_build DIR --quantize int4 --density 0.5
"""

import argparse
import json
import sys
import time

import torch

from griffin_offload import GriffinModel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--max-mem", default="auto")
    args = parser.parse_args()
    model = GriffinModel.from_pretrained(
        args.dir,
        quantize=args.quantize,
        density=args.density,
        device="cpu",
        max_gpu_mem=args.max_mem,
        threads=args.threads,
    )
    model.generation_config.eos_token_id = None  # answers are as long as they may be, as in parallel.py
    print(json.dumps({"ready": args.dir}), flush=True)
    for line in sys.stdin:
        count, prompt_tokens, tokens = map(int, line.split())
        random = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, model.config.vocab_size, (count, 1, prompt_tokens), generator=random)
        clock, processor, made, rates = time.perf_counter(), time.process_time(), 0, []
        for prompt in prompts:
            answer = model.generate(prompt, max_new_tokens=tokens, do_sample=False)
            made += answer.shape[1] - prompt_tokens
            rates.append(model.last_report.decode_tokens_per_s)
        taken = {"seconds": time.perf_counter() - clock, "processor_s": time.process_time() - processor}
        print(json.dumps({"tokens": made, "rates": rates} | taken), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
