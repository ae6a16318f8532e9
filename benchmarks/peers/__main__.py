"""What a user would pick instead: ours and its peers on one checkpoint, in the same memory caps, with the same prompt.

    python benchmarks/peers --dir DIR --envs ENVS --out OUT

Every side runs cold in a process of its own; what has been measured is kept, and a second call goes on from there.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the scripts beside this folder

from peers.command import main  # noqa: E402

sys.exit(main(sys.argv[1:], __doc__.splitlines()[0]))
