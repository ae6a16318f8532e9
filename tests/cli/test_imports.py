"""What a command imports is out of the collector's sight, and all that is made later is in it."""

import json
import re

import pytest
from marks import mostly_slow

# Cycles that fall inside and behind the block, told by weak references, in processes that know no torch: each is forked
# from one that has read this much.
CYCLES = """
import gc, json, os, sys, weakref
from griffin_offload.cli.options import heavy_imports

class Cycle:
    def __init__(self):
        self.self = self

for setting, inside in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    exec(setting)
    failed = None
    try:
        with heavy_imports():
            during, cycle = gc.isenabled(), weakref.ref(Cycle())
            exec(inside)
    except ImportError as error:
        failed = str(error)
    after, behind = gc.isenabled(), weakref.ref(Cycle())
    gc.collect()
    print(json.dumps([failed, during, after, cycle() is not None, behind() is not None]), flush=True)
    os._exit(0)
"""
# Which modules of a package that nothing here needs are there after a command, and whether it can be imported then. As
# its own program it leaves out torch's compiler and its symbols, too, which can be used afterwards, and nobody else's
# is touched; and the files of transformers' models are read once for their names. Then plans of further models.
COMPILES = """
import builtins, sys
read = []
stock_open = builtins.open
builtins.open = lambda file, *args, **kwargs: (read.append(str(file)), stock_open(file, *args, **kwargs))[1]
from griffin_offload.cli.main import main
words = ["plan", "-q", "--device", "cpu", "--max-gpu-mem", "100MB"]
program, more = sys.argv[1] == "program", sys.argv[2:]
sys.argv[1:] = words
code = main() if program else main(words)
there = [name for name in ("torch._dynamo.convert_frame", "sympy.core") if name in sys.modules]
needless = [name for name in sys.modules if name.partition(".")[0] in ("scipy", "accelerate")]
needless += [name for name in ("torch.distributed.checkpoint",) if name in sys.modules]
times = sum(name.endswith("modeling_vit.py") for name in read)
import importlib.util, torch
print(code, there, needless, times)
for directory in more:
    sys.argv[1:] = [word for word in words if word != "-q"] + ["--json", "-m", directory]
    main()
if not program:
    sys.exit()
if importlib.util.find_spec("scipy"):
    import scipy.optimize
print(torch.distributed.is_available())
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1, dtype=torch.float32, device="cpu")))
import sympy, torch.fx.experimental.symbolic_shapes as shapes
print(sympy.Integer(2) + 2, shapes.guard_or_false(False), shapes.ShapeEnv.__name__)
"""
MODEL_THERE = "sys.modules['griffin_offload.engine.model'] = sys"


@pytest.mark.slow
def test_imports_are_not_collected(process):
    """What transformers was told of is not hidden: serve silences it before it imports what it needs of it."""
    cases = {
        ("", ""): [None, False, True, True, False],
        ("", "raise ImportError('lacking')"): ["lacking", False, True, True, False],
        (MODEL_THERE, ""): [None, True, True, False, False],  # models may be there, which have to be collected
        ("gc.disable()", ""): [None, False, False, False, False],  # not ours to turn on
        ("", "import scipy"): ["import of scipy halted; None in sys.modules", False, True, True, False],
        ("import transformers", "import scipy"): [None, False, True, True, False],
    }
    outcome = process("-c", CYCLES, json.dumps(list(cases)))
    assert [json.loads(line) for line in outcome.out.splitlines()] == list(cases.values()), outcome.err


@pytest.mark.parametrize("whose", mostly_slow(("program", "somebody's"), 1))
def test_plan_leaves_out_what_no_plan_needs_and_the_compiler_of_its_own_process_alone(
    process, cli, checkpoints, whose: str
):
    """Losses of vision models, weights that accelerate places, tensors that processes share. Layers of every kind are
    passed on the meta device, and what asks for more of the compiler gets it: plans are the same."""
    more = [str(checkpoints(name)) for name in ("mixtral", "falcon_h1")] if whose == "program" else []
    outcome = process("-c", COMPILES, whose, *more)
    behind = "0 [] [] 1\nTrue\ntensor([2.])\n4 False ShapeEnv\n"
    expected = behind if more else "0 ['torch._dynamo.convert_frame', 'sympy.core'] [] 1\n"
    assert re.sub(r"^\{.*\n", "", outcome.out, flags=re.M) == expected, outcome.err
    plans = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    words = ("plan", "--json", "--device", "cpu", "--max-gpu-mem", "100MB", "-m")
    assert plans == [cli(*words, directory).json for directory in more]
