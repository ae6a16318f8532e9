"""What a command imports is out of the collector's sight, and all that is made later is in it."""

import json

import pytest
from marks import mostly_slow

# Cycles that fall inside and behind the block, told by weak references, in a process that knows no torch.
CYCLES = """
import gc, json, sys, weakref
from griffin_offload.cli.options import heavy_imports

class Cycle:
    def __init__(self):
        self.self = self

SETTING
try:
    with heavy_imports():
        during, inside = gc.isenabled(), weakref.ref(Cycle())
        if "fail" in sys.argv:
            raise ImportError
except ImportError:
    pass
after, behind = gc.isenabled(), weakref.ref(Cycle())
gc.collect()
print(json.dumps([during, after, inside() is not None, behind() is not None]))
"""
# Which modules of a package that nothing here needs are there after a command, and whether it can be imported then. As
# its own program it leaves out torch's compiler and its symbols, too, which can be used afterwards, and nobody else's
# is touched; and the files of transformers' models are read once for their names.
COMPILES = """
import builtins, sys
read = []
stock_open = builtins.open
builtins.open = lambda file, *args, **kwargs: (read.append(str(file)), stock_open(file, *args, **kwargs))[1]
from griffin_offload.cli.main import main
words = ["plan", "-q", "--device", "cpu", "--max-gpu-mem", "100MB"]
program = sys.argv[1] == "program"
sys.argv[1:] = words
code = main() if program else main(words)
there = [name for name in ("torch._dynamo.convert_frame", "sympy.core") if name in sys.modules]
needless = [name for name in sys.modules if name.partition(".")[0] in ("scipy", "accelerate")]
needless += [name for name in ("torch.distributed.checkpoint",) if name in sys.modules]
times = sum(name.endswith("modeling_vit.py") for name in read)
import importlib.util, torch
print(code, there, needless, times)
if importlib.util.find_spec("scipy"):
    import scipy.optimize
print(torch.distributed.is_available())
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1, dtype=torch.float32, device="cpu")))
import sympy, torch.fx.experimental.symbolic_shapes as shapes
print(sympy.Integer(2) + 2, shapes.guard_or_false(False), shapes.ShapeEnv.__name__)
"""
HELPS = """
import sys
from griffin_offload.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as leaving:
    print(leaving.code, [name for name in ("torch", "transformers", "numpy", "asyncio") if name in sys.modules])
"""
# serve silences transformers before it imports what it needs of it.
KNOWN = """
import transformers
from griffin_offload.cli.options import heavy_imports
with heavy_imports():
    from transformers.modeling_utils import PreTrainedModel
print(PreTrainedModel.__name__)
"""
MODEL_THERE = "sys.modules['griffin_offload.engine.model'] = sys"
# Runs a command and prints whether the collector is on, how many objects it sees and how many never.
COUNTS = """
import gc, json, sys
from griffin_offload.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, gc.isenabled(), len(gc.get_objects()), gc.get_freeze_count()]))
"""


@pytest.mark.parametrize(
    ("setting", "arguments", "expected"),
    [
        ("", [], [False, True, True, False]),
        ("", ["fail"], [False, True, True, False]),
        (MODEL_THERE, [], [True, True, False, False]),  # models may be there, which have to be collected
        ("gc.disable()", [], [False, False, False, False]),  # not ours to turn on
    ],
)
def test_imports_are_not_collected(process, setting: str, arguments: list[str], expected: list[bool]):
    outcome = process("-c", CYCLES.replace("SETTING", setting), *arguments)
    assert json.loads(outcome.out) == expected, outcome.err


@pytest.mark.slow
def test_run_leaves_the_collector_on_and_little_to_it(process):
    outcome = process("-c", COUNTS, "run", "-q", "-n", "1", "a")
    code, on, seen, unseen = json.loads(outcome.out.splitlines()[-1])
    assert (code, on) == (0, True), outcome.err
    assert unseen > 10 * seen


@pytest.mark.parametrize("whose", mostly_slow(("program", "somebody's"), 1))
def test_plan_leaves_out_what_no_plan_needs_and_the_compiler_of_its_own_process_alone(process, whose: str):
    """Losses of vision models, weights that accelerate places, tensors that processes share."""
    outcome = process("-c", COMPILES, whose)
    there = [] if whose == "program" else ["torch._dynamo.convert_frame", "sympy.core"]
    assert outcome.out == f"0 {there} [] 1\nTrue\ntensor([2.])\n4 False ShapeEnv\n", outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon_h1", "mixtral"])
def test_a_plan_without_the_compiler_is_the_same(process, cli, checkpoints, name: str):
    """Layers of every kind are passed on the meta device; what asks for more of the compiler gets it."""
    words = ("plan", "--json", "--device", "cpu", "--max-gpu-mem", "100MB", "-m", str(checkpoints(name)))
    outcome = process("-m", "griffin_offload", *words)
    assert json.loads(outcome.out) == cli(*words).json, outcome.err


@pytest.mark.parametrize("flags", [("--version",), ("--help",), ("plan", "--help"), ("run", "--help")], ids=" ".join)
def test_help_imports_nothing_heavy(process, flags: tuple[str, ...]):
    outcome = process("-c", HELPS, *flags)
    assert outcome.out.splitlines()[-1] == "0 []", outcome.err


def test_what_transformers_was_told_of_is_not_hidden(process):
    outcome = process("-c", KNOWN)
    assert outcome.out == "PreTrainedModel\n", outcome.err
