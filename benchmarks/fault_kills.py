"""SIGKILL at a random moment: what stands in the file system is whole or absent, and the next start is a clean one."""

import random
import signal
from collections.abc import Callable
from pathlib import Path

from fault_cases import Result, _talk, _wrong_conversion, chat_command
from fault_process import Outcome, Process
from fault_server import _PROMPTS, Server, read_stream, served
from fault_world import MOMENT, VARIANTS, World, convert_command, files_of, label, shards_of

RIGHT = 0
_SAVES = 8


def killed(process: Process, rng: random.Random, seconds: float) -> Outcome:
    process.sleep(rng.uniform(0, MOMENT * seconds))
    process.signal(signal.SIGKILL)
    return process.outcome()


def kill_run(world: World, rng: random.Random, place: Path) -> Result:
    variant = rng.choice(VARIANTS)
    model = world.copy(variant.model, place)
    before = files_of(model)
    found = killed(world.run(variant, model, place), rng, world.seconds[variant.name])
    problem = found.problem((RIGHT, -signal.SIGKILL), world.answers_of(variant)[:1])
    if files_of(model) != before:
        problem = "the model's folder was changed"
    again = world.run(variant, model, place).outcome()
    return Result(label(found), problem or again.problem((RIGHT,), world.answers_of(variant)[:1]))


def kill_convert(world: World, rng: random.Random, place: Path) -> Result:
    out = place / "out"
    command = convert_command(world.pristine("stock"), out)
    found = killed(Process(command, place), rng, world.seconds["convert"])
    whole = files_of(world.pristine("int8"))
    problem = found.problem((RIGHT, -signal.SIGKILL))
    if problem is None and any(path.read_bytes() != whole[path.name] for path in shards_of(out)):
        problem = "a half shard has a whole one's name"
    if problem is None and found.code != RIGHT:
        problem = Process(command, place).outcome().problem((RIGHT,))
    return Result(label(found), problem or _wrong_conversion(world, out))


def kill_save(world: World, rng: random.Random, place: Path) -> Result:
    """A conversation that is saved again and again; the file is a whole one or none."""
    saved = place / "talk"
    script = _talk(*[saved] * _SAVES)
    running = Process(chat_command(world), place, stdin=script)
    if rng.random() < 0.7:
        running.wait_until(saved.exists)  # into the saving, which is short
        found = killed(running, rng, 0.02)
    else:
        found = killed(running, rng, world.seconds["chat"])
    problem = found.problem((RIGHT, -signal.SIGKILL))
    load = [f"/load {saved}\n"] if saved.exists() else []
    again = Process(chat_command(world), place, stdin="".join([*load, _talk(saved)])).outcome()
    problem = problem or again.problem((RIGHT,))
    left = {path.name for path in place.iterdir()} - {"talk", "stdin", "stdout", "stderr"}
    return Result(label(found), problem or (f"left behind after the next save: {sorted(left)}" if left else None))


def kill_server(world: World, rng: random.Random, place: Path) -> Result:
    """In the middle of an answer: what came is its beginning, and the next server answers as before."""
    right = served(world, place)["old"]
    model = world.pristine("stock")
    server = Server(model, place)
    connection = server.begin(_PROMPTS[0], stream=True)
    found = killed(server.process, rng, 0.5)
    text = read_stream(connection)
    problem = found.problem((-signal.SIGKILL,))
    if not right[0].startswith(text):
        problem = f"a wrong beginning: {text!r}"
    again = Server(model, place)
    status, text = again.ask(_PROMPTS[1])
    if status != 200 or text != right[1]:
        problem = problem or f"the next server answers {status}: {text!r}"
    return Result(label(found), problem or again.stop())


KILLS: dict[str, Callable[[World, random.Random, Path], Result]] = {
    "kill: run": kill_run,
    "kill: convert": kill_convert,
    "kill: chat, saving": kill_save,
    "kill: serve": kill_server,
}
