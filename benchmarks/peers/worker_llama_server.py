"""Several answers at once by llama.cpp's server, through xllamacpp: a peer of parallel.py, which says how to start it.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.worker_llama_server CHECKPOINT FILE.gguf

ENV has `xllamacpp`, `gguf` and `numpy`. FILE is made of the checkpoint's weights (bf16) if it is not there: Q4_0
throughout, which is fewer bytes than llama.cpp's own files of that name. For each line "SEQUENCES PROMPT TOKENS" on the
standard input so many prompts of PROMPT ids are answered at once by TOKENS each; a line of JSON says how many tokens
came, and in how many seconds of the clock and of the processors.
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


def start(file: Path, slots: int, ctx_tokens: int, threads: int) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel = slots * ctx_tokens, slots
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.n_gpu_layers, settings.fit_params, settings.cache_ram_mib, settings.cache_prompt = 0, False, 0, False
    settings.verbosity = 0
    return xllamacpp.Server(settings)


def ask(server: Any, number: int, prompt_tokens: int, tokens: int, counts: list[int]) -> None:
    # Another prompt for everybody: nothing is shared.
    ids = [3 + (number * 997 + place * 31) % 30000 for place in range(prompt_tokens)]
    asked = {"prompt": ids, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    found = server.handle_completions(json.dumps(asked))
    answer = json.loads(found) if isinstance(found, str | bytes) else found
    counts.append(int(answer.get("tokens_predicted") or answer["usage"]["completion_tokens"]))


def answer_together(server: Any, sequences: int, prompt_tokens: int, tokens: int) -> dict[str, float]:
    counts: list[int] = []
    clock, processor = time.perf_counter(), time.process_time()
    threads = [
        threading.Thread(target=ask, args=(server, number, prompt_tokens, tokens, counts))
        for number in range(sequences)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(counts) != sequences:
        raise SystemExit("error: the server did not answer all")
    taken = time.perf_counter() - clock, time.process_time() - processor
    return {"tokens": sum(counts), "seconds": taken[0], "processor_s": taken[1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint")
    parser.add_argument("file", type=Path)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--ctx-tokens", type=int, default=256, help="of a slot")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not args.file.exists():
        partial = args.file.with_suffix(".partial")
        write_gguf(args.folder, partial, q4_0=True)
        partial.rename(args.file)
    server = start(args.file, args.slots, args.ctx_tokens, args.threads)
    print(json.dumps({"ready": str(args.file.name), "system": xllamacpp.get_system_info()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer_together(server, *map(int, line.split()))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
