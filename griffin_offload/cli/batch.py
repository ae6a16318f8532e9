"""`griffin-offload batch`: a file of requests, answered into another file."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from griffin_offload.cli.options import (
    LEFT_OVER,
    Commands,
    add_model_options,
    add_run_options,
    heavy_imports,
    load_options,
    model_of,
    prepare_serving,
)
from griffin_offload.config import LoadConfig, ServeConfig
from griffin_offload.demo import SERVED_NAME
from griffin_offload.errors import UsageError

_CONFIG = ServeConfig()  # its limits hold here, too

if TYPE_CHECKING:
    from griffin_offload.serving.batch import AnswerFile, Line, Work


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answers every request of INPUT, a file in OpenAI's batch format (a line is a JSON object with "
        "custom_id, method, url and body). Each answer is a line of OUTPUT, written at once: after an interruption the "
        "same command goes on. Exit code 1 if any request failed.",
        epilog="example: griffin-offload batch requests.jsonl answers.jsonl -m ./model --max-gpu-mem 12GB",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="requests, a line each")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="file for the answers; one that is there continues")
    parser.add_argument(
        "--served-name", metavar="NAME", help="the model's name in requests (default: the last part of --model)"
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--ray", metavar="ADDRESS", help="answer on a Ray cluster: its address, or auto (the one of this machine)"
    )
    cluster.add_argument("--workers", type=int, metavar="N", help="models on the cluster (default: a machine each)")
    add_model_options(
        parser,
        context=f"the longest prompt and answer, if every request limits its answer, else {LEFT_OVER}",
        json="print the figures as one JSON object",
    )
    add_run_options(parser, verbose=None, quiet="no progress and no figures")
    parser.set_defaults(command=batch)


def batch(arguments: argparse.Namespace) -> int:
    """Answer what is not answered yet, and say how many were."""
    options = load_options(arguments)
    LoadConfig(**options)  # a bad flag is reported before any file is looked at
    if arguments.workers is not None and (arguments.ray is None or arguments.workers < 1):
        raise UsageError(f"--workers {arguments.workers}: a number from 1, beside --ray")
    prepare_serving("batch")
    with heavy_imports():
        from griffin_offload.serving.batch import AnswerFile, check_model, read_lines
        from griffin_offload.serving.server import served_name

    lines = read_lines(arguments.input)
    model = model_of(arguments)
    name = arguments.served_name or (SERVED_NAME if arguments.model is None else served_name(model))
    check_model(lines, name)
    if os.path.exists(arguments.output) and arguments.output.samefile(arguments.input):
        raise UsageError(f"{arguments.output} is the file of requests: give another OUTPUT")
    with AnswerFile(arguments.output) as answers:
        before, start = len(answers.answered), time.monotonic()
        _check_same(answers, lines)
        left = [line for line in lines if line.custom_id not in answers.answered]
        tokens = 0
        try:
            if left:
                tokens = _answer(left, answers, name, options, arguments)
        finally:
            _say(answers, len(lines), before, tokens, time.monotonic() - start, arguments)
        return 1 if answers.failed or len(answers.answered) < len(lines) else 0


def _check_same(answers: "AnswerFile", lines: Sequence["Line"]) -> None:
    others = answers.answered - {line.custom_id for line in lines}
    if others:
        raise UsageError(
            f"{answers.path} holds {len(others)} answers to requests that the input lacks, one is {min(others)!r}: "
            "give another OUTPUT"
        )


def _answer(
    lines: Sequence["Line"], answers: "AnswerFile", name: str, options: dict[str, object], arguments: argparse.Namespace
) -> int:
    """Answer or refuse `lines`; tokens that were generated."""
    from tqdm import tqdm

    from griffin_offload.checkpoint.registry import locate, open_checkpoint
    from griffin_offload.serving.batch import Batch, longest, prepare
    from griffin_offload.serving.tokenization import Encoder

    quiet = arguments.quiet or arguments.json
    directory = locate(model_of(arguments), offline=arguments.offline)
    checkpoint = open_checkpoint(directory, adapter=arguments.adapter)
    tokenizer = checkpoint.tokenizer()
    encoder = Encoder(tokenizer, checkpoint.config.get_text_config().vocab_size)
    works, refused = prepare(lines, encoder, name, _CONFIG)
    encoder.close()
    for line, failure in refused:
        answers.refuse(line, failure)
    if not works:
        return 0
    prompt, context = longest(works)
    if options["ctx_size"] is None and context is not None:
        options |= {"ctx_size": context, "prompt_tokens": prompt}
    generated = 0
    with tqdm(total=len(works), desc="batch", unit="request", leave=False, disable=quiet or None) as bar:
        start = time.monotonic()

        def answered(tokens: int) -> None:
            nonlocal generated
            generated += tokens
            bar.set_postfix_str(f"{generated / (time.monotonic() - start):.1f} tokens/s", refresh=False)
            bar.update()

        if arguments.ray is None:
            with Batch(directory, options, name, _CONFIG, tokenizer) as batch:
                batch.run(works, answers, lambda figures: answered(figures.completion_tokens))
        else:
            _answer_on_cluster(works, answers, (str(directory.absolute()), options, name), arguments, answered)
    return generated


def _answer_on_cluster(
    works: Sequence["Work"],
    answers: "AnswerFile",
    model: tuple[str, dict[str, object], str],
    arguments: argparse.Namespace,
    answered: Callable[[int], None],
) -> None:
    from griffin_offload.serving.cluster import answer, connected

    with connected(arguments.ray) as machines:
        workers = arguments.workers or len(machines)
        for custom_id, status, body, tokens in answer(works, model, workers, machines):
            if custom_id not in answers.answered:  # one whose worker died was asked again
                answers.add(custom_id, status, body)
                answered(tokens)


def _say(
    answers: "AnswerFile", requests: int, before: int, tokens: int, seconds: float, arguments: argparse.Namespace
) -> None:
    """How far it came, also when it was interrupted."""
    done = len(answers.answered)
    if arguments.json:
        found = {"requests": requests, "answered": done, "before": before, "failed": answers.failed}
        print(json.dumps(found | {"generated_tokens": tokens, "seconds": seconds}))
        return
    if arguments.quiet:
        return
    failed = f", {answers.failed} of them refused" if answers.failed else ""
    earlier = f", {before} before" if before else ""
    rest = f"; {requests - done} are left, the same command goes on" if done < requests else ""
    print(
        f"griffin-offload: {done} of {requests} requests answered in {answers.path}{failed}{earlier}, {tokens} tokens "
        f"in {seconds:.1f} s{rest}",
        file=sys.stderr,
    )
