"""Silence of lm-eval and its libraries: what concerns users is said by us, on their stderr."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import datasets
import lm_eval.api.task
import tqdm

_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "filelock", "absl")


class _NoBar(tqdm.tqdm):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Inside, lm-eval logs, prints and draws nothing, and its bootstrap starts no processes."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels, bars = [logger.level for logger in loggers], (tqdm.tqdm, lm_eval.api.task.tqdm)
    forking = os.environ.get("DISABLE_MULTIPROC")
    datasets.disable_progress_bars()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        tqdm.tqdm = lm_eval.api.task.tqdm = _NoBar
        os.environ["DISABLE_MULTIPROC"] = "1"
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        tqdm.tqdm, lm_eval.api.task.tqdm = bars
        if forking is None:
            del os.environ["DISABLE_MULTIPROC"]
        datasets.enable_progress_bars()
