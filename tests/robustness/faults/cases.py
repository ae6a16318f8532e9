"""Faults, one function a kind: each starts real processes, does the harm, and says what came of it."""

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

from processes import Process
from robustness.faults.inside import at_call, device_memory, failing_disk, little_memory
from robustness.faults.server import harmed_server
from robustness.faults.world import (
    HARMS,
    MODEL,
    MOMENT,
    RIGHT,
    RUNTIME,
    SHARD,
    USAGE,
    VARIANTS,
    Result,
    World,
    chat_command,
    convert_command,
    files_of,
    label,
    nothing,
    shards_of,
    talk,
)

_NOBODY = 65534
_HARMLESS_BYTES = 30_000  # of a saved conversation of one turn: less than it takes


Case = Callable[[World, random.Random, Path], Result]


def harmed_run(name: str) -> Case:
    """A shard is harmed at a random moment of a run; half of the time at a random layer of a pass, from inside."""

    def case(world: World, rng: random.Random, place: Path) -> Result:
        variant = rng.choice(VARIANTS)
        model = world.copy(variant.model, place)
        shard = rng.choice(shards_of(model))
        other = world.pristine(variant.model, "new") / shard.name

        def harm() -> None:
            with contextlib.suppress(FileNotFoundError):
                HARMS[name](shard, other, rng)

        inside = rng.random() < 0.5
        prepare = at_call("fetch_or_check", rng.randrange(16), harm) if inside else nothing
        running = world.run(variant, model, place, prepare)
        if not inside:
            running.sleep(rng.uniform(0, MOMENT * world.seconds_of(variant)))
            harm()
        found = running.outcome()
        return Result(label(found), found.problem((RIGHT, RUNTIME, MODEL), world.answers_of(variant)))

    return case


def harmed_conversion(name: str) -> Case:
    """The source is harmed at a random moment of a conversion; repaired, the same command gives the same files."""

    def case(world: World, rng: random.Random, place: Path) -> Result:
        model, out = world.copy("stock", place), place / "out"
        running = Process(convert_command(model, out), place)
        running.sleep(rng.uniform(0, MOMENT * world.seconds["convert"]))
        HARMS[name](model / SHARD, world.pristine("stock", "new") / SHARD, rng)
        found = running.outcome()
        problem = found.problem((RIGHT, RUNTIME, MODEL))
        if problem is None and found.code != 0:
            (model / SHARD).write_bytes((world.pristine("stock") / SHARD).read_bytes())
            again = Process(convert_command(model, out), place).outcome()
            # Begun with the other version it says so, and is begun anew.
            if again.code == USAGE and "another model" in again.err:
                again = Process(convert_command(model, place / "anew"), place).outcome()
                out = place / "anew"
            problem = again.problem((RIGHT,))
        return Result(label(found), problem or wrong_conversion(world, out))

    return case


def wrong_conversion(world: World, out: Path) -> str | None:
    """Byte for byte one of those made without faults, with nothing beside it."""
    versions = (files_of(world.pristine("int8", version)) for version in ("old", "new"))
    return None if files_of(out) in versions else f"the conversion differs: {sorted(files_of(out))}"


def full_disk_converting(world: World, rng: random.Random, place: Path) -> Result:
    """The disk fills up behind the check of its free bytes; with room, the same command goes on."""
    needed = sum(len(content) for content in files_of(world.pristine("int8")).values())
    out = world.resize_disk(rng.randrange(20_000, needed)) / "out"

    def believe_in_room() -> None:
        from griffin_offload.engine import shards

        shards.MARGIN_BYTES = -(10**9)

    command = convert_command(world.pristine("stock"), out)
    found = Process(command, place, prepare=believe_in_room).outcome()
    problem = found.problem((RUNTIME,))
    whole = files_of(world.pristine("int8"))
    if problem is None and any(path.read_bytes() != whole[path.name] for path in shards_of(out)):
        problem = "a half shard has a whole one's name"
    world.grow_disk(100_000_000)
    again = Process(command, place).outcome()
    return Result(label(found), problem or again.problem((RIGHT,)) or wrong_conversion(world, out))


def full_disk_saving(world: World, rng: random.Random, place: Path) -> Result:
    """Of a conversation; a file that was there stays."""
    disk = world.resize_disk(100_000)
    saved = disk / "talk"
    before = rng.choice([None, b"an older one"])
    if before is not None:
        saved.write_bytes(before)
    world.grow_disk(rng.randrange(8192, _HARMLESS_BYTES))
    found = Process(chat_command(world), place, stdin=talk(saved)).outcome()
    problem = found.problem((MODEL,))
    left = {path.name: path.read_bytes() for path in disk.iterdir()}
    if problem is None and left != ({} if before is None else {"talk": before}):
        problem = f"left behind: {sorted(left)}"
    return Result(label(found), problem)


def full_disk_printing(world: World, rng: random.Random, place: Path) -> Result:
    """Where the answer goes."""
    variant = rng.choice(VARIANTS)
    command = world.run_command(variant, world.pristine(variant.model)) + rng.choice([[], ["--json"]])
    found = Process(command, place, prepare=variant.prepare, stdout="/dev/full").outcome()
    return Result(label(found), found.problem((RUNTIME,)))


def _as_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)


def read_only(world: World, rng: random.Random, place: Path) -> Result:
    """Somebody without any right to write: runs go on, all that writes is refused, and nothing is left."""
    variant, what = rng.choice(VARIANTS), rng.choice(["run", "convert", "save", "unreadable"])
    model = world.copy(variant.model, place)
    expected: tuple[int, ...] = (RIGHT,)
    if what == "unreadable":
        rng.choice(shards_of(model)).chmod(0)
    for path in (place, model):
        path.chmod(0o555)
    if what == "convert":
        expected = (RUNTIME,)
        running = Process(convert_command(world.pristine("stock"), place / "out"), place, prepare=_as_nobody)
    elif what == "save":
        expected = (MODEL,)
        running = Process(chat_command(world), place, prepare=_as_nobody, stdin=talk(place / "talk"))
    else:
        expected = (MODEL,) if what == "unreadable" else expected
        running = world.run(variant, model, place, _as_nobody)
    found = running.outcome()
    problem = found.problem(expected, world.answers_of(variant) if what == "run" else ())
    left = {path.name for path in place.iterdir()} - {"model", "stdin", "stdout", "stderr"}
    return Result(label(found), problem or (f"left behind: {sorted(left)}" if left else None))


_ODD = [
    "with spaces",
    "größe 模型 модель",
    "💾",
    "a\nline",
    "tab\t",
    "-dash",
    "a'b\"c",
    "back\\slash",
    "\\012",
    "%s{}$HOME",
]
_ODD += ["sep\u2028\u0085\x1c", "(deleted)", "model (deleted)", "~", "x" * 200, "not utf-8 \udcff\udcfe", "trailing "]


def odd_path(world: World, rng: random.Random, place: Path) -> Result:
    """Of a model, of a conversion, and of a saved conversation; one that is not UTF-8 is refused."""
    name, what = rng.choice(_ODD), rng.choice(["run", "convert", "save"])
    codes = (RIGHT,) if name.isascii() or name.encode(errors="replace").decode() == name else (USAGE,)
    variant = rng.choice(VARIANTS)
    if what == "convert":
        out = place / f"{name}2"
        found = Process(convert_command(world.copy("stock", place, name), out), place).outcome()
        problem = found.problem(codes) or (None if found.code else wrong_conversion(world, out))
    elif what == "save":
        if not name.isprintable() or name.endswith(" "):  # no line of input can name it
            name, codes = "a b", (RIGHT,)
        saved = place / name
        found = Process(chat_command(world), place, stdin=talk(saved) + f"/load {saved}\n").outcome()
        problem = found.problem(codes) or (None if saved.is_file() else "nothing was saved")
    else:
        found = world.run(variant, world.copy(variant.model, place, name), place).outcome()
        problem = found.problem(codes, world.answers_of(variant)[:1])
    return Result(label(found), problem)


def two_processes(world: World, rng: random.Random, place: Path) -> Result:
    """On one converted directory, or at one output, a random moment apart."""
    what = rng.choice(["run, run", "convert, convert", "convert, run", "save, save"])
    places = [place / "first", place / "second"]
    for folder in places:
        folder.mkdir()
    out, variant = place / "out", next(v for v in VARIANTS if v.name == "int8")
    convert = convert_command(world.pristine("stock"), out)
    run = world.run_command(variant, out if what == "convert, run" else world.pristine("int8"))
    save = chat_command(world)
    commands = {"run": (run, ""), "convert": (convert, ""), "save": (save, talk(place / "talk"))}
    started = []
    for folder, name in zip(places, what.split(", "), strict=True):
        command, stdin = commands[name]
        started.append(Process(command, folder, stdin=stdin))
        started[-1].sleep(rng.uniform(0, world.seconds_of(variant) / 2))
    found = [process.outcome() for process in started]
    allowed = {"run, run": (RIGHT,), "convert, convert": (RIGHT, USAGE), "convert, run": (RIGHT, MODEL)}
    answers = world.answers_of(variant)[:1] if "run" in what else ()
    problems = [f.problem(allowed.get(what, (RIGHT,)), answers if f.out else ()) for f in found]
    problem = next((p for p in problems if p is not None), None)
    if "convert" in what and problem is None:
        problem = wrong_conversion(world, out) if any(f.code == 0 for f in found) else "nobody finished"
    if what == "save, save" and problem is None:
        again = Process(chat_command(world), place, stdin=f"/load {place / 'talk'}\n").outcome()
        problem = again.problem((RIGHT,))
    return Result(" and ".join(map(label, found)), problem)


def cases(world: World) -> dict[str, tuple[int, Case]]:
    """Weights and cases by kind; those that this machine cannot have are left out."""
    found: dict[str, tuple[int, Case]] = {}
    for name in HARMS:
        found[f"run: {name} a shard"] = (12, harmed_run(name))
        found[f"convert: {name} the source"] = (3, harmed_conversion(name))
        found[f"serve: {name} a shard"] = (2, harmed_server(name))
    if world.disk is not None:
        found["convert: disk full"] = (4, full_disk_converting)
        found["chat: disk full when saving"] = (4, full_disk_saving)
    if Path("/dev/full").exists():
        found["run: disk full when printing"] = (3, full_disk_printing)
    found["run: read errors"] = (8, failing_disk)
    found["run: little memory"] = (10, little_memory)
    found["run: CUDA out of memory"] = (5, device_memory)
    if os.geteuid() == 0:
        found["nothing may be written"] = (5, read_only)
    found["odd paths"] = (6, odd_path)
    found["two processes at once"] = (5, two_processes)
    return found
