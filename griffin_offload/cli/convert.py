"""`griffin-offload convert`: quantise a checkpoint once, so that no prompt has to."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from griffin_offload.cli.options import Commands, add_adapter_option, add_model_option, model_of, quiet_libraries
from griffin_offload.cli.terminal import Bar
from griffin_offload.config import FORMAT_NAMES, TABLE_FORMATS, TIERS
from griffin_offload.units import format_bytes


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "convert",
        help="write a quantised copy of a checkpoint",
        epilog="example: griffin-offload convert -m ./model ./model-int4 --quantize int4",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; an unfinished conversion continues")
    parser.add_argument(
        "--quantize",
        choices=(*FORMAT_NAMES, TIERS),
        required=True,
        help="precision of the matrices: what griffin-offload plan --prefer speed names for your budget, int8 for "
        f"--exact; none: of experts alone, each in one piece; {TIERS}: int4, int3 and int2 of every neuron, of which "
        "each prompt takes one",
    )
    parser.add_argument(
        "--embeddings",
        choices=tuple(TABLE_FORMATS),
        default="16",
        help="embeddings and head: 16 bit, as they are stored, or int8 (default: 16)",
    )
    add_model_option(parser)
    add_adapter_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(command=convert)


def convert(arguments: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from griffin_offload.engine import convert as runtime

    quiet_libraries()
    with Bar("convert", "B", quiet=arguments.quiet or arguments.json) as bar:
        done = runtime.convert(
            model_of(arguments),
            arguments.out,
            arguments.quantize,
            tables=TABLE_FORMATS[arguments.embeddings],
            offline=arguments.offline,
            adapter=arguments.adapter,
            progress=bar.step,
        )
    if arguments.json:
        print(json.dumps(asdict(done) | {"directory": str(done.directory)}))
    elif not arguments.quiet:
        resumed = f", {done.resumed_shards} of them from before" if done.resumed_shards else ""
        print(
            f"{done.directory}: {done.precision}, {format_bytes(done.read_bytes)} became "
            f"{format_bytes(done.written_bytes)} in {done.shards} shards{resumed}",
            file=sys.stderr,
        )
    return 0
