"""llama.cpp through llama-cpp-python, on a GGUF file. Its binding's lowest level, as ids need no tokenizer."""

import argparse
import ctypes
import sys
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy
from peers.protocol import Generate, run


def load_model(args: argparse.Namespace) -> Any:
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    if args.mapped:  # else most are copied into the layout of the CPU's kernels, which cannot be paged out
        settings.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(args.dir / args.file).encode(), settings)
    if not model:
        raise RuntimeError("llama.cpp could not load the file")
    return model


def new_context(model: Any, args: argparse.Namespace) -> Any:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = args.prompt_tokens + args.new_tokens
    settings.n_batch = settings.n_ubatch = max(args.prompt_tokens, 32)
    settings.n_threads = settings.n_threads_batch = args.threads
    settings.no_perf = True
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")
    return context


def load(args: argparse.Namespace) -> Generate:
    llama_cpp.llama_backend_init()
    model = load_model(args)
    context = new_context(model, args)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(ids: list[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(numpy.ctypeslib.as_array(pointer, shape=(vocabulary,)).argmax())

    def generate(ids: list[int], new_tokens: int, on_token: Callable[[], None]) -> list[int]:
        tokens: list[int] = []
        for _ in range(new_tokens):
            ids = [step(ids)]
            tokens += ids
            on_token()
        return tokens

    return generate


if __name__ == "__main__":
    sys.exit(run("llama-cpp-python", load))
