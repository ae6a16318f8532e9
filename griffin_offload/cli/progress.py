"""How far a pass or a file is, on stderr if that is a terminal."""

import sys


class Bar:
    """Vanishes when it is left, or at its end where that comes but `once`."""

    def __init__(self, title: str, unit: str = "layer", *, quiet: bool, once: bool = False) -> None:
        from tqdm import tqdm

        self._once = once
        self._bar = tqdm(
            desc=title, unit=unit, unit_scale=unit == "B", leave=False, disable=quiet or None, file=sys.stderr
        )

    def step(self, done: int, total: int) -> None:
        """So many layers or bytes are done, of so many."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._once and done == total:
            self._bar.close()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
