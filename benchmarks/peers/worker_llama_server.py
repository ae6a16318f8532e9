"""llama.cpp's server through xllamacpp: a peer of parallel.py and, with `--prompts`, of experts.py, which start it.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.worker_llama_server FILE.gguf --checkpoint CHECKPOINT

ENV has `xllamacpp`, `gguf` and `numpy`. FILE is made of the checkpoint's weights (bf16) if it is not there: Q4_0
throughout, which is fewer bytes than llama.cpp's own files of that name. For each line "SEQUENCES PROMPT TOKENS" on the
standard input so many prompts of PROMPT ids are answered at once by TOKENS each; a line of JSON says how many tokens
came, and in how many seconds of the clock and of the processors.

`--prompts` are answered one after the other instead, of a file that is mapped: nothing of it is copied into another
layout, so that the system may drop what it has no memory for. llama.cpp's own cache of experts asks for a GPU. One line
of JSON has what experts.py's own worker prints of ours.
"""

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import xllamacpp
from peers.gguf_file import write_gguf


def start(args: argparse.Namespace) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = str(args.file)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = args.threads
    settings.n_gpu_layers, settings.fit_params, settings.cache_ram_mib, settings.cache_prompt = 0, False, 0, False
    settings.verbosity = 0
    if args.prompts:
        longest = max(map(len, args.prompts))
        settings.n_ctx, settings.n_parallel = longest + args.tokens, 1
        settings.n_batch = settings.n_ubatch = max(longest, 32)
        settings.no_extra_bufts, settings.warmup = True, False
    else:
        settings.n_ctx, settings.n_parallel = args.slots * args.ctx_tokens, args.slots
    return xllamacpp.Server(settings)


def answer(server: Any, ids: list[int], tokens: int) -> dict[str, Any]:
    asked = {"prompt": ids, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    found = server.handle_completions(asked)
    return json.loads(found) if isinstance(found, str | bytes) else dict(found)


def answer_together(server: Any, sequences: int, prompt_tokens: int, tokens: int) -> dict[str, float]:
    counts: list[int] = []

    def ask(number: int) -> None:
        # Another prompt for everybody: nothing is shared.
        found = answer(server, [3 + (number * 997 + place * 31) % 30000 for place in range(prompt_tokens)], tokens)
        counts.append(int(found.get("tokens_predicted") or found["usage"]["completion_tokens"]))

    clock, processor = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(sequences)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(counts) != sequences:
        raise SystemExit("error: the server did not answer all")
    taken = time.perf_counter() - clock, time.process_time() - processor
    return {"tokens": sum(counts), "seconds": taken[0], "processor_s": taken[1]}


def answer_alone(server: Any, ids: list[int], tokens: int) -> dict[str, float]:
    timings = answer(server, ids, tokens)["timings"]
    # The first token comes with the prompt: as many steps as tokens are timed behind it, but one.
    return {
        "prefill_s": timings["prompt_ms"] / 1000,
        "decode_s": timings["predicted_ms"] / 1000,
        "decode_tokens_per_s": 1000 * (tokens - 1) / timings["predicted_ms"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="what the file is made of if it is not there")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--ctx-tokens", type=int, default=256, help="of a slot")
    parser.add_argument("--prompts", type=json.loads, help="lists of token ids")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer to one of --prompts")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not args.file.exists():
        partial = args.file.with_suffix(".partial")
        write_gguf(args.checkpoint, partial, q4_0=True)
        partial.rename(args.file)
    begin = time.perf_counter()
    server, system = start(args), xllamacpp.get_system_info()
    if args.prompts:
        loaded_s = time.perf_counter() - begin
        rows = [answer_alone(server, ids, args.tokens) for ids in args.prompts]
        print(json.dumps({"loaded_s": loaded_s, "system": system, "prompts": rows}), flush=True)
        return 0
    print(json.dumps({"ready": str(args.file.name), "system": system}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer_together(server, *map(int, line.split()))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
