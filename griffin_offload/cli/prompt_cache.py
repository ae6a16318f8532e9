"""`run --prompt-cache FILE`: a prompt that was saved, or is to be."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_offload.errors import SavedContextError

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.runtime.context import Context
    from griffin_offload.runtime.model import GriffinModel
    from griffin_offload.weights.checkpoint import Checkpoint


def adopt_saved(path: Path, options: dict[str, Any], checkpoint: "Checkpoint") -> None:
    """Make what is "auto" in `options` (`LoadConfig`'s fields) what the context saved at `path` has, and a context that
    is too small for it as large. SavedContextError if it is of another model than `checkpoint`, whose options these
    would not be."""
    from griffin_offload.runtime.saved import options_of
    from griffin_offload.weights.checkpoint import fingerprint

    saved = options_of(path, model=fingerprint(checkpoint))
    ctx_size = saved.pop("ctx_size")
    options |= {name: value for name, value in saved.items() if options[name] == "auto"}
    if options["ctx_size"] is not None:
        options["ctx_size"] = max(options["ctx_size"], ctx_size)


class PromptCache:
    """The file of one run. SavedContextError at once when it could not be written in the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._there = path.is_file()
        self._error: SavedContextError | None = None
        if (path.exists() and not self._there) or not path.parent.is_dir():
            raise SavedContextError(f"--prompt-cache {path} names no file in a directory that is there")
        if not self._there and not os.access(path.parent, os.W_OK):
            raise SavedContextError(f"--prompt-cache {path} cannot be written: {path.parent} is read-only")

    def adopt(self, options: dict[str, Any], checkpoint: "Checkpoint") -> None:
        """Let a file that is there say what the plan would have solved: `options` are `LoadConfig`'s."""
        if self._there:
            adopt_saved(self._path, options, checkpoint)

    def arguments(self, model: "GriffinModel", tokens: "Tensor", *, exact: bool) -> dict[str, Any]:
        """What `generate` is given: a context, and what to do with it when the prompt has passed."""
        self._model = model
        if not self._there:
            return {"context": model.new_context(), "prompt_done": self._save}
        context, _ = model.load_context(self._path)
        saved = self._saved = len(context.tokens)
        self._covered = context.covered
        if context.known(tokens[0], exact=exact) == 0:
            print(
                f"griffin-offload: warning: {self._path} holds a prompt of {saved} tokens that this one does not begin "
                "with, so it is not used: delete it, or name another file to save this one",
                file=sys.stderr,
            )
        return {"context": context}

    def _save(self, context: "Context") -> None:
        try:
            self._model.save_context(context, self._path)
        except SavedContextError as error:  # the answer goes on: its prompt has been paid for
            self._error = error

    def close(self, *, quiet: bool) -> None:
        """Raise what went wrong while saving, now that the answer is there; unless `quiet`, say how much of the prompt
        was of use."""
        if self._error is not None:
            raise self._error
        report = self._model.last_report
        assert report is not None, "an answer has a report"
        if self._there and not quiet and 0 < report.cached_prompt_tokens < self._covered:
            print(
                f"note: {report.cached_prompt_tokens} of the {self._saved} tokens in {self._path} were used: behind "
                "them this prompt has others",
                file=sys.stderr,
            )
