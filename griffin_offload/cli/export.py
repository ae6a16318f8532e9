"""`griffin-offload export`: a smaller ordinary checkpoint with the neurons that a set of prompts uses."""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from griffin_offload.cli.options import (
    Commands,
    add_memory_options,
    add_model_option,
    check_utf8,
    heavy_imports,
    load_options,
    model_of,
    quiet_libraries,
)
from griffin_offload.cli.terminal import Bar
from griffin_offload.config import FORMAT_NAMES, ExportForm, LoadConfig, SelectionMethod
from griffin_offload.errors import UsageError
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.engine.export import Choice, Export, Probabilities
    from griffin_offload.transformers_api import Tokenizer


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "export",
        help="write a smaller checkpoint for one domain",
        description="Writes a checkpoint with the neurons (or experts) that a set of prompts uses, for any software. "
        "Every fourth prompt does not choose, and measures what the choice costs.",
        epilog="example: griffin-offload export ./smaller -m ./model --prompts prompts.jsonl --density 0.5",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; an unfinished export continues")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='jsonl, a line {"prompt": ...} or {"messages": [...]} each, or text, its documents separated by '
        "<|endoftext|>",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message in front of every prompt")
    parser.add_argument("--raw", action="store_true", help="do not apply the model's chat template")
    parser.add_argument("--density", default="0.5", metavar="D", help="fraction of neurons kept")
    parser.add_argument(
        "--selection", choices=get_args(SelectionMethod), default=LoadConfig.selection, help="how neurons are chosen"
    )
    parser.add_argument(
        "--to",
        choices=get_args(ExportForm),
        default="unquantized",
        help="unquantized: the original's precision; w8a16, w4a16: 8 or 4 bits as compressed-tensors packs them; gguf: "
        "the original's precision, or in blocks of Q8_0 or Q4_0 (default: unquantized)",
    )
    parser.add_argument(
        "--refit",
        action="store_true",
        help="fit the kept neurons' outputs so that they make up for the others on the prompts, by least squares",
    )
    add_model_option(parser)
    add_memory_options(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(command=export)


def export(arguments: argparse.Namespace) -> int:
    """Choose, write, measure, and say what was written."""
    density = _density(arguments.density)
    # Every layer passes in full, so no neuron need stay: the memory is that of `eval`, whatever the density.
    options = load_options(arguments) | {"quantize": FORMAT_NAMES[0], "density": 0.0, "always_stream": True}
    LoadConfig(**options)
    quiet_libraries()
    with heavy_imports():
        from griffin_offload.checkpoint.registry import locate, open_checkpoint
        from griffin_offload.engine import export as runtime

    directory = locate(model_of(arguments), offline=arguments.offline)
    checkpoint = open_checkpoint(directory)
    runtime.check(directory, arguments.out, density, arguments.to, refit=arguments.refit)
    prompts = _prompts(arguments, checkpoint.tokenizer())
    options["ctx_size"] = max(ids.numel() for ids in prompts) + 1
    choice, before = _chosen(directory, prompts, options, arguments)
    refit = prompts if arguments.refit else []
    made = {"form": arguments.to, "selection": arguments.selection, "refit": refit, "card": True}
    with Bar("export", "B", quiet=arguments.quiet or arguments.json) as bar:
        found = runtime.export(directory, arguments.out, choice, density, **made, progress=bar.step)
    found = runtime.measured(found, before, _after(found, prompts, options), prompts)
    source = "the demo" if arguments.model is None else Path(arguments.model).name
    runtime.write_card(found, source, arguments.selection, _command(arguments), checkpoint.fingerprint())
    if arguments.json:
        print(json.dumps(asdict(found) | {"directory": str(found.directory)}))
    elif not arguments.quiet:
        print("\n".join(_lines(found)), file=sys.stderr)
    return 0


def _density(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise UsageError(f"--density is {text}: one number, more than 0 and less than 1")


def _command(arguments: argparse.Namespace) -> str:
    """As the card says it: without places, and without texts."""
    model = [] if arguments.model is None else ["-m", Path(arguments.model).name]
    said = [*(["--system", "TEXT"] if arguments.system is not None else []), *(["--raw"] if arguments.raw else [])]
    made = ["--density", arguments.density, "--selection", arguments.selection, "--to", arguments.to]
    made += ["--refit"] if arguments.refit else []
    return " ".join(["griffin-offload export", arguments.out.name, *model, "--prompts", "FILE", *said, *made])


def _prompts(arguments: argparse.Namespace, tokenizer: "Tokenizer") -> "list[Tensor]":
    """Token ids of every prompt of the file."""
    import torch

    from griffin_offload.checkpoint.tokenizer import encode, encode_messages

    if arguments.system is not None:
        check_utf8(arguments.system, "the system message")
    templated = tokenizer.chat_template is not None and not arguments.raw
    if arguments.system is not None and not templated:
        raise UsageError("--system needs a chat template: this model has none, or --raw turned it off")
    system = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
    found = []
    for number, messages in enumerate(_messages(arguments.prompts), start=1):
        text = "\n".join(message["content"] for message in messages)
        if not text.strip():
            raise UsageError(f"{arguments.prompts}, prompt {number} is empty: take it out")
        ids = encode_messages(tokenizer, system + messages) if templated else encode(tokenizer, text)
        found.append(torch.tensor(ids, dtype=torch.long, device="cpu"))
    if not found:
        raise UsageError(f"{arguments.prompts} holds no prompt")
    return found


def _messages(path: Path) -> list[list[dict[str, str]]]:
    from griffin_offload.evaluation.samples import json_lines, read_documents

    if path.suffix.lower() != ".jsonl":
        texts = read_documents(path)
        if texts and _is_row(texts[0].partition("\n")[0]):
            raise UsageError(f"{path} holds lines of JSON, and would be read as text: name it .jsonl")
        return [[{"role": "user", "content": text}] for text in texts]
    found = []
    for number, row in enumerate(json_lines(path), start=1):
        given = row if isinstance(row, dict) else {}
        messages = given.get("messages", [{"role": "user", "content": given.get("prompt")}])
        if not _is_chat(messages):
            raise UsageError(f"{path}, prompt {number} has neither a text prompt nor messages of role and text content")
        found.append([{"role": message["role"], "content": message["content"]} for message in messages])
    return found


def _is_row(line: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        return isinstance(row, dict) and not row.keys().isdisjoint(("prompt", "messages"))
    return False


def _is_chat(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )


def _chosen(
    directory: Path, prompts: "list[Tensor]", options: dict[str, object], arguments: argparse.Namespace
) -> "tuple[Choice, Probabilities]":
    """What the prompts say of the neurons, and what the full model predicts on those held out."""
    from tqdm import tqdm

    from griffin_offload.engine.export import choose, predictions
    from griffin_offload.engine.model import GriffinModel

    quiet = arguments.quiet or arguments.json
    with (
        GriffinModel.from_pretrained(directory, **options, keep_prompts=True) as model,
        tqdm(total=len(prompts), desc="prompts", unit="prompt", leave=False, disable=quiet or None) as bar,
    ):
        before = predictions(model, prompts)  # the widest passes first: what does not fit is said at once
        return choose(model, prompts, bar.update), before


def _after(found: "Export", prompts: "list[Tensor]", options: dict[str, object]) -> "Probabilities":
    from griffin_offload.engine.export import held_out_of, predictions
    from griffin_offload.engine.model import GriffinModel

    if not held_out_of(prompts):
        return []
    with GriffinModel.from_pretrained(found.directory, **options) as model:
        return predictions(model, prompts)


def _lines(found: "Export") -> list[str]:
    unit = found.unit
    lines = [
        f"{found.directory}: {found.neurons} of {found.of_neurons} {unit} a layer, {format_bytes(found.read_bytes)} "
        f"became {format_bytes(found.written_bytes)}",
        f"kept     {found.activation_kept:.3f} of the activation of {found.prompts} prompt"
        f"{'s' if found.prompts > 1 else ''}",
    ]
    if found.neurons != found.asked_neurons:
        whole = "the router's groups are alike" if unit == "experts" else f"{found.form} is written in whole blocks"
        lines.append(f"note: {found.asked_neurons} {unit} rounded down, as {whole}")
    if found.refit and found.tokens < found.neurons:
        lines.append(
            f"note: refit on {found.tokens} tokens, fewer than the {found.neurons} neurons that stay: other texts may "
            "lose by it; give more text or leave --refit out"
        )
    if found.activation_kept_heldout is None:
        return [*lines, "note: too few prompts to hold some out: what the choice costs is not known"]
    return [
        *lines,
        f"held out {found.activation_kept_heldout:.3f} of the activation, KL {found.kl:.3f}, perplexity "
        f"{found.perplexity_before:.2f} became {found.perplexity:.2f}",
    ]
