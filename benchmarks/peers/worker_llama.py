"""llama.cpp's server through xllamacpp, without HTTP: a peer of `benchmarks/peers`, parallel.py and experts.py.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.worker_llama {side,together,alone} ...

`side` takes the arguments of protocol.py. `together FILE` answers, for each line "SEQUENCES PROMPT TOKENS" of the
standard input, so many prompts of PROMPT ids at once by TOKENS each; a line of JSON says how many tokens came, and in
how many seconds of the clock and of the processors. `alone FILE` answers `--prompts` one after the other, of a file
that is mapped; one line of JSON has what experts.py's own worker prints of ours. llama.cpp's own cache of experts asks
for a GPU. ENV has `xllamacpp`.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xllamacpp
from peers import protocol


def start(file: Path, threads: int, tokens: int, *, slots: int = 1, batch: int = 0, mapped: bool = False) -> Any:
    """`tokens` of context for each of `slots`; prompts of up to `batch` pass at once. `mapped`: nothing is copied into
    another layout, so that the system may drop what it has no memory for."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.n_gpu_layers, settings.fit_params, settings.cache_ram_mib, settings.cache_prompt = 0, False, 0, False
    settings.verbosity = 0
    settings.n_ctx, settings.n_parallel = slots * tokens, slots
    if batch:
        settings.n_batch = settings.n_ubatch = max(batch, 32)
        settings.warmup = False
    settings.no_extra_bufts = mapped
    return xllamacpp.Server(settings)


def answer(server: Any, ids: list[int], tokens: int, on_word: Callable[[str], object] = id) -> dict[str, Any]:
    """What the server says at last, greedily and without an end of sequence; `on_word` is called at each token."""
    said: list[dict[str, Any]] = []

    def take(chunk: dict[str, Any]) -> bool:
        said.append(chunk)
        if "choices" in chunk and chunk["choices"][0]["finish_reason"] is None:
            on_word(chunk["choices"][0]["text"])
        return False

    asked = {"prompt": ids, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    server.handle_completions(asked | {"stream": True}, take)
    if "timings" not in said[-1]:
        raise RuntimeError(f"the server said {said[-1]}")
    return said[-1]


def load(args: argparse.Namespace) -> protocol.Loaded:
    tokens = args.prompt_tokens + args.new_tokens
    server = start(args.dir / args.file, args.threads, tokens, batch=args.prompt_tokens, mapped=args.mapped)

    def generate(ids: list[int], new_tokens: int, on_token: Callable[[], None]) -> list[int]:
        words: list[int] = []

        def on_word(word: str) -> None:
            words.append(int(word.removeprefix("t")))  # as gguf_file.py names them
            on_token()

        answer(server, ids, new_tokens, on_word)
        return words

    return generate, {}


def answer_together(server: Any, sequences: int, prompt_tokens: int, tokens: int) -> dict[str, float]:
    counts: list[int] = []

    def ask(number: int) -> None:
        # Another prompt for everybody, of words that every vocabulary has: nothing is shared.
        found = answer(server, [3 + (number * 997 + place * 31) % 500 for place in range(prompt_tokens)], tokens)
        counts.append(found["usage"]["completion_tokens"])

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


def together(args: argparse.Namespace) -> None:
    server = start(args.file, args.threads, args.ctx_tokens, slots=args.slots)
    print(json.dumps({"ready": str(args.file.name), "system": xllamacpp.get_system_info()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer_together(server, *map(int, line.split()))), flush=True)


def alone(args: argparse.Namespace) -> None:
    begin, longest = time.perf_counter(), max(map(len, args.prompts))
    server = start(args.file, args.threads, longest + args.tokens, batch=longest, mapped=True)
    loaded_s = time.perf_counter() - begin
    rows = [answer_alone(server, ids, args.tokens) for ids in args.prompts]
    print(json.dumps({"loaded_s": loaded_s, "system": xllamacpp.get_system_info(), "prompts": rows}), flush=True)


def main() -> int:
    if sys.argv[1:2] == ["side"]:
        del sys.argv[1]
        return protocol.run("xllamacpp", load)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("how", choices=("together", "alone"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--ctx-tokens", type=int, default=256, help="of a slot")
    parser.add_argument("--prompts", type=json.loads, help="lists of token ids")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer to one of --prompts")
    args = parser.parse_args()
    together(args) if args.how == "together" else alone(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
