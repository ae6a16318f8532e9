"""JSON that a stranger wrote: of bounded size, an object, or a named error."""

import json
from pathlib import Path
from typing import Any

from griffin_offload.errors import CheckpointError, one_line
from griffin_offload.units import format_bytes
from griffin_offload.weights.files import check_content


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """The object in `path`; CheckpointError for anything else, and for a file of more than `most_bytes`."""
    check_content(path)
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise CheckpointError(f"{path} is larger than {format_bytes(most_bytes)}: no such file needs to be")
        found = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(found).__name__}, not an object")
    return found
