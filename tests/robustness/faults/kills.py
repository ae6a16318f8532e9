"""SIGKILL at a random moment: what stands in the file system is whole or absent, and the next start is a clean one."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from processes import Outcome, Process
from robustness.faults.cases import wrong_conversion
from robustness.faults.server import PROMPTS, Server, read_stream, served
from robustness.faults.world import (
    RIGHT,
    VARIANTS,
    Result,
    World,
    chat_command,
    convert_command,
    files_of,
    label,
    shards_of,
    talk,
)

_SAVES = 8
_ATTEMPTS = 10


def killed(start: Callable[[], Process], rng: random.Random, seconds: float) -> Outcome:
    """A process that did not come to its end, which the machine may reach sooner than it did before."""
    for attempt in range(_ATTEMPTS):
        process = start()
        process.sleep(rng.uniform(0, seconds / (1 + attempt)))
        process.signal(signal.SIGKILL)
        found = process.outcome()
        if found.code == -signal.SIGKILL:
            break
    return found


def kill_run(world: World, rng: random.Random, place: Path) -> Result:
    variant = rng.choice(VARIANTS)
    model = world.copy(variant.model, place)
    before = files_of(model)
    found = killed(lambda: world.run(variant, model, place), rng, world.seconds_of(variant))
    problem = found.problem((-signal.SIGKILL,), world.answers_of(variant)[:1])
    if files_of(model) != before:
        problem = "the model's folder was changed"
    again = world.run(variant, model, place).outcome()
    return Result(label(found), problem or again.problem((RIGHT,), world.answers_of(variant)[:1]))


def kill_convert(world: World, rng: random.Random, place: Path) -> Result:
    out = place / "out"
    command = convert_command(world.pristine("stock"), out)

    def start() -> Process:
        shutil.rmtree(out, ignore_errors=True)
        return Process(command, place)

    found = killed(start, rng, world.seconds["convert"])
    whole = files_of(world.pristine("int8"))
    problem = found.problem((-signal.SIGKILL,))
    if problem is None and any(path.read_bytes() != whole[path.name] for path in shards_of(out)):
        problem = "a half shard has a whole one's name"
    if problem is None:
        problem = Process(command, place).outcome().problem((RIGHT,))
    return Result(label(found), problem or wrong_conversion(world, out))


def kill_save(world: World, rng: random.Random, place: Path) -> Result:
    """A conversation that is saved again and again; the file is a whole one or none."""
    saved = place / "talk"
    script = talk(*[saved] * _SAVES)

    def start() -> Process:
        saved.unlink(missing_ok=True)
        running = Process(chat_command(world), place, stdin=script)
        if into_saving:
            running.wait_until(saved.exists)
        return running

    into_saving = rng.random() < 0.7  # which is short
    found = killed(start, rng, 0.02 if into_saving else world.seconds["chat"])
    problem = found.problem((-signal.SIGKILL,))
    load = [f"/load {saved}\n"] if saved.exists() else []
    again = Process(chat_command(world), place, stdin="".join([*load, talk(saved)])).outcome()
    problem = problem or again.problem((RIGHT,))
    left = {path.name for path in place.iterdir()} - {"talk", "stdin", "stdout", "stderr"}
    return Result(label(found), problem or (f"left behind after the next save: {sorted(left)}" if left else None))


def kill_server(world: World, rng: random.Random, place: Path) -> Result:
    """In the middle of an answer: what came is its beginning, and the next server answers as before."""
    right = served(world, place)["old"]
    model = world.pristine("stock")
    server = Server(model, place)
    connection = server.begin(PROMPTS[0], stream=True)
    server.process.sleep(rng.uniform(0, 0.5))
    server.process.signal(signal.SIGKILL)
    found = server.process.outcome()
    text = read_stream(connection)
    problem = found.problem((-signal.SIGKILL,))
    if not right[0].startswith(text):
        problem = f"a wrong beginning: {text!r}"
    again = Server(model, place)
    status, text = again.ask(PROMPTS[1])
    if status != 200 or text != right[1]:
        problem = problem or f"the next server answers {status}: {text!r}"
    return Result(label(found), problem or again.stop())


KILLS: dict[str, Callable[[World, random.Random, Path], Result]] = {
    "kill: run": kill_run,
    "kill: convert": kill_convert,
    "kill: chat, saving": kill_save,
    "kill: serve": kill_server,
}
