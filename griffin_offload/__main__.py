"""`python -m griffin_offload` is `griffin-offload`."""

import sys

from griffin_offload.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
