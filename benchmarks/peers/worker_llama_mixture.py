"""Two prompts answered one after the other by llama.cpp, through xllamacpp: a peer of experts.py, which starts it.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.worker_llama_mixture FILE.gguf --tokens 64

The file is mapped, and nothing of it copied into another layout, so that the system may drop what it has no memory for.
llama.cpp's own cache of experts asks for a GPU. A line of JSON has what experts.py's own worker prints of ours. ENV has
`xllamacpp`.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import xllamacpp


def start(file: Path, ctx_tokens: int, batch: int, threads: int) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.n_batch, settings.n_ubatch = ctx_tokens, 1, batch, batch
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.n_gpu_layers, settings.fit_params, settings.cache_ram_mib, settings.cache_prompt = 0, False, 0, False
    settings.no_extra_bufts, settings.warmup, settings.verbosity = True, False, 0
    return xllamacpp.Server(settings)


def answer(server: Any, ids: list[int], tokens: int) -> dict[str, float]:
    asked = {"prompt": ids, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    found = server.handle_completions(asked)
    timings = (json.loads(found) if isinstance(found, str | bytes) else found)["timings"]
    # The first token comes with the prompt: as many steps as tokens are timed behind it, but one.
    return {
        "prefill_s": timings["prompt_ms"] / 1000,
        "decode_s": timings["predicted_ms"] / 1000,
        "decode_tokens_per_s": 1000 * (tokens - 1) / timings["predicted_ms"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompts", type=json.loads, required=True, help="lists of token ids")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    longest = max(map(len, args.prompts))
    begin = time.perf_counter()
    server = start(args.file, longest + args.tokens, max(longest, 32), args.threads)
    loaded_s = time.perf_counter() - begin
    rows = [answer(server, ids, args.tokens) for ids in args.prompts]
    print(json.dumps({"loaded_s": loaded_s, "system": xllamacpp.get_system_info(), "prompts": rows}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
