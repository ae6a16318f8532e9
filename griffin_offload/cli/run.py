"""`griffin-offload run`: one prompt, one answer."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_offload.cli.options import (
    Commands,
    add_generation_options,
    add_model_options,
    add_run_options,
    cut_note,
    heavy_imports,
    load_options,
    model_of,
    quiet_libraries,
    sampling_of,
    stops_of,
)
from griffin_offload.cli.plan import plan_lines
from griffin_offload.cli.terminal import Bar, PromptCache, is_demos, prompt_text, tokenize
from griffin_offload.config import LoadConfig, RunConfig
from griffin_offload.errors import UsageError, unreadable

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.engine.generation import Finish
    from griffin_offload.engine.model import GriffinModel
    from griffin_offload.engine.structure import Structure


_LONG_S = 2.0  # so long may neurons be quantised without a word


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "run",
        help="answer one prompt",
        epilog='example: griffin-offload run -m ./model --max-gpu-mem 12GB "Why is the sky blue?"',
    )
    parser.add_argument("prompt", nargs="?", help="the prompt, or - for standard input (the demo has its own)")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--system", metavar="TEXT", help="system message, for models with a chat template")
    parser.add_argument("--raw", action="store_true", help="do not apply the model's chat template")
    parser.add_argument(
        "--prompt-cache",
        type=Path,
        metavar="FILE",
        help="start from the prompt saved there, if this one begins with it token by token (--raw keeps a template's "
        "closing words out of it); where there is no such file, save this prompt",
    )
    parser.add_argument(
        "--json-schema",
        type=Path,
        metavar="FILE",
        help="the answer is JSON by the schema in this file (needs the extra structured)",
    )
    add_generation_options(parser, RunConfig.max_new_tokens)
    add_model_options(parser, context="prompt and answer")
    add_run_options(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Generate; the text goes to stdout as it comes, the figures to stderr."""
    text = prompt_text(arguments)
    sampling, stops = sampling_of(arguments), stops_of(arguments)
    structure = _structure(arguments.json_schema)
    options = load_options(arguments)
    LoadConfig(**options)  # a bad flag is reported before any file is looked at
    with heavy_imports():
        from griffin_offload.checkpoint.registry import locate, open_checkpoint

    quiet_libraries()
    prompt_cache = PromptCache(arguments.prompt_cache) if arguments.prompt_cache is not None else None
    directory = locate(model_of(arguments), offline=arguments.offline)
    with heavy_imports():  # the larger half; a wrong --model is told without it
        from griffin_offload.engine.model import GriffinModel
        from griffin_offload.engine.structure import check_structure

    if structure is not None:
        check_structure(structure)

    checkpoint = open_checkpoint(
        directory, adapter=arguments.adapter
    )  # its headers are checked before its tokenizer is loaded
    tokenizer = checkpoint.tokenizer()
    tokens = tokenize(tokenizer, text, arguments)
    prompt_tokens = tokens.shape[1]
    if arguments.ctx_size is None:
        options["ctx_size"] = prompt_tokens + arguments.max_new_tokens
    elif prompt_tokens + arguments.max_new_tokens > arguments.ctx_size:
        raise UsageError(
            f"a prompt of {prompt_tokens} tokens and {arguments.max_new_tokens} new ones do not fit the context of "
            f"{arguments.ctx_size}: raise --ctx-size or shorten one of them"
        )
    if prompt_cache is not None:
        options["keep_prompts"] = True
        prompt_cache.adopt(options, checkpoint)
    model = GriffinModel.from_pretrained(directory, **options, prompt_tokens=prompt_tokens)
    model.tokenizer = tokenizer
    if arguments.verbose:
        print("\n".join(plan_lines(model.plan)), file=sys.stderr)
    quiet = arguments.quiet or arguments.json
    if is_demos(arguments) and not quiet:
        print(f"prompt   {text}", file=sys.stderr, flush=True)
    with Bar("prefill", quiet=quiet, once=True) as bar:
        model.progress = bar.step
        answer = _generate(model, tokens, sampling, stops, arguments, prompt_cache, structure)
    _print_result(model, answer, arguments)
    if prompt_cache is not None:
        prompt_cache.close(quiet=quiet)
    return 0


def _structure(file: Path | None) -> "Structure | None":
    """What the answer has to be; UsageError for a file that holds no schema."""
    if file is None:
        return None
    with heavy_imports():
        from griffin_offload.checkpoint.files import read_text
        from griffin_offload.engine.structure import Structure

    try:
        return Structure(json_schema=read_text(file))
    except (OSError, ValueError) as error:
        raise UsageError(f"--json-schema {unreadable(file, error)}") from error
    except UsageError as error:
        raise UsageError(f"--json-schema {file}: {error}") from error


def _generate(
    model: "GriffinModel",
    tokens: "Tensor",
    sampling: dict[str, Any],
    stops: tuple[str, ...],
    arguments: argparse.Namespace,
    prompt_cache: PromptCache | None,
    structure: "Structure | None",
) -> tuple[str, "Finish"]:
    """The answer, and why it ended; printed as it comes, unless JSON is asked for."""
    import torch
    from transformers import StoppingCriteriaList

    from griffin_offload.cli.terminal import TextPrinter
    from griffin_offload.engine.arguments import ONE_ANSWER
    from griffin_offload.engine.generation import StopStrings, cut, finish_of
    from griffin_offload.serving.text_stream import whole_text

    torch.manual_seed(arguments.seed)
    kept = prompt_cache.arguments(model, tokens, exact=arguments.exact) if prompt_cache is not None else {}
    prompt_tokens, most, ends = tokens.shape[1], arguments.max_new_tokens, _ends(model, arguments)
    own_ends: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    stop = StopStrings(model.tokenizer, stops, prompt_tokens)
    output: Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=most,
        streamer=None if arguments.json else TextPrinter(model.tokenizer, stops),
        stopping_criteria=StoppingCriteriaList([stop] if stops else []),
        structure=structure,
        **ONE_ANSWER,
        **own_ends,
        **kept,
        **sampling,
    )
    answer = output[0, prompt_tokens:]
    text = cut(whole_text(model.tokenizer, answer.tolist()), stops)
    report = model.last_report
    over = report is not None and report.structure is not None and report.structure.over
    return text, finish_of(answer, most, ends, stopped=stop.happened or over)


def _ends(model: "GriffinModel", arguments: argparse.Namespace) -> list[int]:
    from griffin_offload.engine.generation import end_tokens

    vocab_size = model.engine.shape.vocab_size
    return end_tokens(model.tokenizer, model.generation_config, vocab_size, chat=not arguments.raw)


def _print_result(model: "GriffinModel", answer: tuple[str, "Finish"], arguments: argparse.Namespace) -> None:
    report, (text, finish) = model.last_report, answer
    assert report is not None
    if arguments.json:
        print(json.dumps({"text": text, "finish_reason": finish, **report.to_json()}))
        return
    if not arguments.quiet:
        print("\n".join(report.lines(model.hardware.name.upper())), file=sys.stderr)
        measured = report.activation_kept_heldout is not None or report.cached_prompt_tokens
        if not measured and model.plan.streamed:
            print("note: the prompt is too short to tell how much of its activation is kept", file=sys.stderr)
        shape, stored = model.engine.shape, model.engine.model_spec.checkpoint.precision
        drafts = shape.precision not in shape.levels  # of which no copy holds the neurons
        if model.engine.model_spec.quantises(model.plan) and report.select_s > _LONG_S and not drafts:
            source = "" if stored.is_plain else " of the original"
            print(
                f"note: {report.select_s:.1f} s of this prompt went into choosing and quantising neurons: "
                f"griffin-offload convert --quantize {shape.option}{source} quantises once, for all prompts",
                file=sys.stderr,
            )
        if finish == "length":
            print(f"note: {cut_note(arguments.max_new_tokens)}", file=sys.stderr)
