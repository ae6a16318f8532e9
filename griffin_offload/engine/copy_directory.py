"""A directory that a copy of a checkpoint is written into, one shard after the other.

A shard gets its name when it is whole, and the index is written last: until then a note lies in the directory that
makes every command refuse it, and the same copy continue it.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.files import check_name, one_writer, renamed, temporary_name, write_text
from griffin_offload.checkpoint.safetensors import INDEX, UNFINISHED, said_untied
from griffin_offload.devices.memory import OutOfMemoryAsError
from griffin_offload.errors import CheckpointError, DoesNotFit, GriffinError, UsageError, one_line
from griffin_offload.units import format_bytes

# Beside the tensors: headers, index, tokenizer.
MARGIN_BYTES = 50_000_000
# Our temporary names, and those that safetensors writes under before it renames to ours.
_HALVES = (".*.tmp", ".tmp*")


class CopyDirectory:
    """`note` (JSON values) tells two copies apart, `metadata` goes into every shard, `check` raises CheckpointError for
    a finished shard of another copy. `kind` is what messages call it: "conversion"."""

    def __init__(
        self,
        path: str | Path,
        kind: str,
        note: Mapping[str, Any],
        metadata: dict[str, str],
        check: Callable[[Path], None],
    ) -> None:
        self.path = Path(os.path.expanduser(path))
        check_name(self.path)
        self._kind, self._note, self._metadata, self._check = kind, dict(note), metadata, check

    @contextlib.contextmanager
    def writing(self) -> Iterator[list[Path]]:
        """Make the directory and keep others out of it, who would remove our temporary files; the shards that the same
        copy has finished before. UsageError when it holds anything else, GriffinError for what fails meanwhile."""
        with self._failures_named():
            check_place(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            with one_writer(self.path, self._kind):
                yield self._finished()

    @contextlib.contextmanager
    def _failures_named(self) -> Iterator[None]:
        remedy = "finished shards are kept, run the same command again"
        doing = {"conversion": "converting"}.get(self._kind, f"{self._kind}ing")
        try:
            with OutOfMemoryAsError(doing, f"close other programs; {remedy}"):
                yield
        except (OSError, SafetensorError) as error:
            raise GriffinError(f"{self.path} cannot be written ({one_line(error)}); {remedy}") from error

    def _finished(self) -> list[Path]:
        """What the same copy finished before it was interrupted, its halves deleted."""
        note = self.path / UNFINISHED
        halves = {path for pattern in _HALVES for path in self.path.glob(pattern)}
        if note.is_file() and _read_note(note) != self._note:
            raise UsageError(f"{self.path} holds an unfinished {self._kind} of another model or precision: remove it")
        for path in halves:
            path.unlink()
        shards = sorted(self.path.glob("*.safetensors"))
        for path in shards:
            try:
                self._check(path)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{path} is damaged or of another {self._kind} ({one_line(error)}): remove it and run the same "
                    "command again"
                ) from error
        return shards

    def begin(self, nbytes: int) -> None:
        """Of `nbytes` in all shards, those that are missing have to fit the disk, or DoesNotFit; from now on no command
        takes the directory for a checkpoint."""
        missing = nbytes - sum(path.stat().st_size for path in self.path.glob("*.safetensors"))
        free, needed = shutil.disk_usage(self.path).free, missing + MARGIN_BYTES
        if needed > free and missing > 0:
            raise DoesNotFit(
                f"the {self._kind} needs {format_bytes(needed)} on the disk of {self.path}, {format_bytes(free)} are "
                "free"
            )
        write_text(self.path / UNFINISHED, json.dumps(self._note))

    def write_shard(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Whole or not at all."""
        with renamed(self.path / name) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, self._metadata)

    def finish(self, checkpoint: Checkpoint, config: dict[str, Any], names: list[str]) -> None:
        """Tokenizer, config, and last the index over the shards `names`, which makes the directory a checkpoint."""
        checkpoint.write_beside(self.path, {"config.json", INDEX})
        config = said_untied(config) if checkpoint.untied else config
        write_text(self.path / "config.json", json.dumps(config, indent=2))
        weight_map = {key: name for name in names for key in names_in(self.path / name)}
        total = sum((self.path / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.path / INDEX, json.dumps(index, indent=2))
        (self.path / UNFINISHED).unlink()


def check_place(path: Path) -> None:
    """UsageError for what is there and is no unfinished copy. OSError."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: nothing is overwritten, give a new directory")
    note = path / UNFINISHED
    if path.is_dir() and not note.is_file() and set(path.iterdir()) - {temporary_name(note)}:
        raise UsageError(f"{path} exists already: nothing is overwritten, give a new directory")


def shard_names(count: int) -> list[str]:
    """Of so many shards, in order."""
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def names_in(path: Path) -> list[str]:
    """Of the tensors of a shard."""
    with safe_open(path, framework="np") as file:
        return list(file.keys())


def _read_note(note: Path) -> Any:
    try:
        return json.loads(note.read_bytes())
    except ValueError:
        return None
