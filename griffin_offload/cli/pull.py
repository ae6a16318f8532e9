"""`griffin-offload pull`: fetch a model of the hub, and no more of it than is needed."""

import argparse
import json
import sys
from pathlib import Path

from griffin_offload.cli.options import Commands, quiet_libraries
from griffin_offload.errors import UsageError
from griffin_offload.units import format_bytes


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "pull",
        help="fetch a model of the hub",
        description="Fetches weights, configuration and tokenizer into the hub's cache, where --model ID finds them; "
        "a fetch that was interrupted goes on where it ended.",
        epilog="example: griffin-offload pull org/name:FILE.gguf",
    )
    parser.add_argument("id", metavar="ID[:FILE.gguf]", help="hub id, and which of its GGUF files")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: main)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(command=pull)


def pull(arguments: argparse.Namespace) -> int:
    """Fetch, and say where it is."""
    from griffin_offload.checkpoint.hub import fetch, is_hub_id

    if not is_hub_id(arguments.id):
        raise UsageError(f"{arguments.id!r} is no hub id: write org/name, or org/name:FILE.gguf for one GGUF file")
    quiet_libraries()
    path = fetch(arguments.id, **({} if arguments.revision is None else {"revision": arguments.revision}))
    nbytes = size_of(path)
    if arguments.json:
        print(json.dumps({"id": arguments.id, "path": str(path), "bytes": nbytes}))
    else:
        print(f"{arguments.id}: {format_bytes(nbytes)} in {path}", file=sys.stderr)
    return 0


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files right in a directory."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
