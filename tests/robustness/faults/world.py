"""What faults happen to: the demo model in two formats and two versions, and what undisturbed commands make of them."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from processes import Outcome, Process

from griffin_offload.demo import PROMPT, demo_directory

SHARD = "model.safetensors"
NEW_TOKENS = 24
_RUN = ("-q", "--device", "cpu", "--max-mem", "20MB", "--max-new-tokens", NEW_TOKENS)
MOMENT = 1.1  # of an undisturbed run: faults come until shortly after its end
_CHUNK_BYTES = 2**17
# Exit codes that are documented: runtime, usage, does not fit, model.
RIGHT, RUNTIME, USAGE, NO_ROOM, MODEL = 0, 1, 2, 3, 4


class Result(NamedTuple):
    outcome: str
    problem: str | None


def nothing() -> None:
    pass


def read_directly() -> None:
    """As if the model were larger than the page cache."""
    from griffin_offload.engine import load, residents
    from griffin_offload.offload import weight_store

    weight_store.MIN_DIRECT_BYTES = 0
    load.evicts = residents.evicts = lambda model_spec: True


@dataclass(frozen=True)
class Variant:
    """A way in which weights are read."""

    name: str
    model: str
    flags: tuple[object, ...] = ()
    prepare: Callable[[], None] = nothing


VARIANTS = (
    Variant("mapped", "stock", ("--density", 0.5)),
    Variant("slots", "stock", ("--density", 0.5, "--dtype", "float32")),
    Variant("direct", "stock", ("--density", 0.5), read_directly),
    Variant("ram", "stock", ("--density", 0.5, "--offload", "ram")),
    Variant("int8", "int8", ("--density", 0.5)),
    Variant("exact", "int8", ("--density", 0.5, "--exact", "--draft-tokens", 4)),
)


@dataclass
class World:
    """A folder with pristine models and room for one case after the other."""

    root: Path
    answers: dict[tuple[str, str], str] = field(default_factory=dict)
    """stdout of an undisturbed run, by variant and version; made when it is asked for."""
    seconds: dict[str, float] = field(default_factory=dict)
    served: dict[str, list[str]] = field(default_factory=dict)
    """A server's answers, by version."""
    disk: Path | None = None
    """A small file system; None where none can be mounted."""
    number: int = 0

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """For one case."""
        self.number += 1
        place = self.root / f"case-{self.number}"
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def pristine(self, model: str, version: str = "old") -> Path:
        return self.root / f"{model}-{version}"

    def copy(self, model: str, place: Path, name: str = "model") -> Path:
        return Path(shutil.copytree(self.pristine(model), place / name))

    def run_command(self, variant: Variant, directory: Path) -> list[object]:
        return ["run", PROMPT, "-m", directory, *_RUN, *variant.flags]

    def run(self, variant: Variant, directory: Path, place: Path, prepare: Callable[[], None] = nothing) -> Process:
        def both() -> None:
            variant.prepare()
            prepare()

        return Process(self.run_command(variant, directory), place, prepare=both)

    def answers_of(self, variant: Variant) -> list[str]:
        """Right ones: of either version of the model, whichever was there when it was loaded."""
        for version in ("old", "new"):
            if (variant.name, version) not in self.answers:
                with self.folder() as place:
                    found = self.run(variant, self.pristine(variant.model, version), place).outcome()
                if found.code != 0 or not found.out:
                    raise SystemExit(f"the undisturbed run {variant.name} fails: {found}")
                self.answers[variant.name, version] = found.out
                self.seconds[variant.name] = found.seconds
        return [self.answers[variant.name, version] for version in ("old", "new")]

    def seconds_of(self, variant: Variant) -> float:
        """An undisturbed run's."""
        self.answers_of(variant)
        return self.seconds[variant.name]

    def resize_disk(self, nbytes: int) -> Path:
        """The small file system, emptied."""
        assert self.disk is not None, "asked before"
        for path in self.disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.grow_disk(nbytes)

    def grow_disk(self, nbytes: int) -> Path:
        assert self.disk is not None, "asked before"
        _mount(f"remount,size={nbytes}", self.disk)
        return self.disk


@contextlib.contextmanager
def made_world(root: Path) -> Iterator[World]:
    """A world in `root`, an empty folder; what is mounted there is gone afterwards."""
    world = World(root)
    _make_models(world)
    world.seconds |= _other_seconds(world)
    disk = root / "disk"
    disk.mkdir()
    if _mount("size=1000000", disk):
        world.disk = disk
    try:
        yield world
    finally:
        if world.disk is not None:
            subprocess.run(["umount", str(disk)], check=True)


def _make_models(world: World) -> None:
    """Two versions: one file, and its conversion, whose layers are files of their own. The new one's neurons are
    permuted in one matrix of every layer: other numbers in the same places."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for version in ("old", "new"):
        shutil.copytree(demo_directory(), world.pristine("stock", version))
    shard = world.pristine("stock", "new") / SHARD
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    changed = {k: t.flip(0).contiguous() if "up_proj" in k else t for k, t in load_file(shard).items()}
    save_file(changed, shard, metadata)
    for version in ("old", "new"):
        with world.folder() as place:
            out = world.pristine("int8", version)
            found = Process(convert_command(world.pristine("stock", version), out), place).outcome()
        if found.code != 0:
            raise SystemExit(f"the undisturbed conversion fails: {found}")


def _other_seconds(world: World) -> dict[str, float]:
    seconds = {}
    for name in ("convert", "chat"):
        with world.folder() as place:
            command = chat_command(world) if name == "chat" else convert_command(world.pristine("stock"), place / "out")
            seconds[name] = Process(command, place, stdin="Once there was a dog.\n").outcome().seconds
    return seconds


def chat_command(world: World) -> list[object]:
    return ["chat", "-q", "-m", world.pristine("int8"), "--device", "cpu", "--max-mem", "20MB", "--max-new-tokens", 8]


def talk(*files: Path) -> str:
    return "Once there was a dog.\n" + "".join(f"/save {path}\n" for path in files)


def convert_command(model: Path, out: Path) -> list[object]:
    return ["convert", "-q", "-m", model, out, "--quantize", "int8"]


def _mount(options: str, place: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def truncate(shard: Path, _: Path, rng: random.Random) -> None:
    os.truncate(shard, rng.randrange(shard.stat().st_size))


def delete(shard: Path, _: Path, __: random.Random) -> None:
    shard.unlink()


def replace(shard: Path, other: Path, _: random.Random) -> None:
    """As a careful program does: written beside it and renamed."""
    beside = shard.with_name("beside")
    shutil.copyfile(other, beside)
    beside.replace(shard)


def overwrite(shard: Path, other: Path, _: random.Random) -> None:
    """As `cp` does: into the same file, piece by piece."""
    with shard.open("rb+") as file, other.open("rb") as weight_store:
        while piece := weight_store.read(_CHUNK_BYTES):
            file.write(piece)
            file.flush()
            time.sleep(0.005)  # more than a tick of the file system's clock, as for a large file


def touch(shard: Path, _: Path, __: random.Random) -> None:
    os.utime(shard)


HARMS = {"truncate": truncate, "delete": delete, "replace": replace, "overwrite": overwrite, "touch": touch}


def label(found: Outcome) -> str:
    """An outcome in a few words."""
    if found.code is None:
        return "hang"
    if found.code < 0:
        return f"killed by signal {-found.code}"
    if found.code == 0:
        return "as without fault"
    bus = ", after a bus error" if "parts of it are gone" in found.err else ""
    return f"one line, exit code {found.code}{bus}"
