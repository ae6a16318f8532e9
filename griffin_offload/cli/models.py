"""`griffin-offload models`: what is here, and what of it fits the budget."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffin_offload.cli.options import Commands, add_memory_options, heavy_imports, quiet_libraries
from griffin_offload.cli.pull import size_of
from griffin_offload.config import LoadConfig
from griffin_offload.errors import CheckpointError, GriffinError, ModelNotFound, as_line, unreadable
from griffin_offload.units import format_bytes


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "models",
        help="list the models that are here, and which fit the budget",
        description="Lists the hub's cache, and what DIRECTORY holds: checkpoints, converted copies and GGUF files.",
        epilog="example: griffin-offload models --max-gpu-mem 12GB",
    )
    parser.add_argument(
        "directories", nargs="*", type=Path, metavar="DIRECTORY", help="look here, too (default: the working directory)"
    )
    parser.add_argument("--ctx-size", type=int, metavar="TOKENS", help="context that memory is kept for")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_memory_options(parser)
    parser.set_defaults(command=models)


def models(arguments: argparse.Namespace) -> int:
    """A line for each model; those that cannot be read say why. ModelNotFound for a directory that is not there."""
    with heavy_imports():
        import griffin_offload.engine.spec  # noqa: F401

    quiet_libraries()
    options = {name: getattr(arguments, name) for name in LoadConfig.__dataclass_fields__ if hasattr(arguments, name)}
    config = LoadConfig(**options)
    found = [*_in_cache(), *_in_directories(arguments.directories or [Path(".")])]
    rows = [{"model": name, "path": str(path), "bytes": size_of(path), **_fit(path, config)} for name, path in found]
    if arguments.json:
        print(json.dumps({"models": rows}))
        return 0
    width = max((len(row["model"]) for row in rows), default=0)
    for row in rows:
        fits = row["reason"] if row["fits"] is None else _words(row)
        print(f"{row['model']:<{width}}  {row['format'] or '?':<10}{format_bytes(row['bytes']):>9}  {fits}")
    if not rows:
        print("no model is here: griffin-offload pull ID fetches one")
    return 0


def _words(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return f"does not fit: {row['reason']}"
    kept = "all neurons" if row["density"] == 1 else f"density {row['density']:.2f}"
    return f"fits: {row['precision']}, {kept}, context {row['context_tokens']}, {format_bytes(row['peak_bytes'])}"


def _in_cache() -> Iterator[tuple[str, Path]]:
    """Checkpoints and GGUF files of the hub's cache by the names under which --model finds them: of each repository
    the newest snapshot."""
    from huggingface_hub import constants
    from huggingface_hub.utils import scan_cache_dir

    if not Path(constants.HF_HUB_CACHE).is_dir():
        return
    for repo in sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model" or not repo.revisions:
            continue
        snapshot = max(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
        for path in _models_of(Path(snapshot.snapshot_path)):
            yield repo.repo_id if path.is_dir() else f"{repo.repo_id}:{path.name}", path


def _in_directories(directories: list[Path]) -> Iterator[tuple[str, Path]]:
    for directory in directories:
        try:
            inside = sorted(one for one in directory.iterdir() if one.is_dir())
        except NotADirectoryError as error:
            raise ModelNotFound(f"{directory} is a file: give a directory that holds models") from error
        except FileNotFoundError as error:
            raise ModelNotFound(f"no directory {directory}: check the name, or leave it out to look here") from error
        except OSError as error:
            raise CheckpointError(unreadable(directory, error)) from error
        yield from ((str(path), path) for path in _models_of(directory))
        for place in inside:
            with contextlib.suppress(PermissionError):  # one of another user's among others is no model of this one's
                yield from [(str(path), path) for path in _models_of(place)]


def _models_of(directory: Path) -> Iterator[Path]:
    """The directory itself if it is a checkpoint, and its GGUF files."""
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        yield directory
    yield from sorted(directory.glob("*.gguf"))


def _fit(path: Path, config: LoadConfig) -> dict[str, Any]:
    """How a model would be loaded; `fits` is None where it cannot be read, `reason` says why."""
    from griffin_offload.checkpoint.registry import open_checkpoint
    from griffin_offload.engine.spec import examine_checkpoint
    from griffin_offload.formats import FLOATS
    from griffin_offload.planner.solve import solve

    unknown = dict.fromkeys(("format", "fits", "precision", "density", "context_tokens", "peak_bytes", "reason"))
    try:
        checkpoint = open_checkpoint(path)
        model_spec = examine_checkpoint(checkpoint, config, anywhere=True)
        plan, remedy = solve(model_spec.shapes, model_spec.request, model_spec.others)
    except GriffinError as error:
        return unknown | {"reason": as_line(error)}
    plain = checkpoint.precision is FLOATS
    packed = any(tensor.decode is not None for tensor in checkpoint.tensors().values())
    kind = "gguf" if path.is_file() else "packed" if packed else str(checkpoint.dtype).removeprefix("torch.")
    return {
        "format": kind if plain else str(checkpoint.precision),
        "fits": remedy is None,
        "precision": plan.precision,
        "density": plan.density,
        "context_tokens": plan.context_tokens,
        "peak_bytes": plan.peak_bytes,
        "reason": None if remedy is None else f"needs {format_bytes(plan.peak_bytes)}, try {remedy}",
    }
