"""A context in a file: the KV entries, statistic and selection of a prompt, as safetensors.

Its metadata says what it belongs to (the model's fingerprint, precision, neurons kept, ...), and reading checks all
of it before anything is changed. Writing goes through a temporary name, a layer at a time, so that no second copy of
the KV cache is made.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from griffin_offload.errors import SavedContextError, one_line
from griffin_offload.runtime.context import Context, Mark
from griffin_offload.weights.files import renamed

_FORMAT, _VERSION = "griffin-offload context", 1
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
_DTYPES |= {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64"}
_HEADER_MULTIPLE = 8

Identity = dict[str, Any]
"""What a context depends on; JSON values."""


@dataclass(frozen=True)
class Like:
    """What the parts of a file must look like, beyond what its header promises."""

    ctx_tokens: int
    vocab_size: int
    kv_width: int
    """Numbers that a layer caches for a token."""
    neurons: dict[int, tuple[int, int]]
    """(F, K) of each streamed layer."""

    def selections(self, squared: dict[int, Tensor], selected: dict[int, Tensor]) -> bool:
        """Whether the tables can be ours: K rising indices below F."""
        return all(
            squared[index].shape == (1, full)
            and squared[index].dtype == torch.float32
            and chosen.shape == (kept,)
            and chosen.dtype == torch.int64
            and bool((chosen[1:] > chosen[:-1]).all())
            and (kept == 0 or (int(chosen[0]) >= 0 and int(chosen[-1]) < full))
            for index, (full, kept) in self.neurons.items()
            for chosen in [selected[index]]
        )

    def caches(self, context: Context, shapes: list[list[list[int]]], tokens: int) -> bool:
        """Whether the KV entries, whose parts have these shapes, can be ours."""
        fitting = all(
            layer.could_load(tokens, parts) for layer, parts in zip(context.cache.layers, shapes, strict=True)
        )
        return fitting and all(
            parts[0][1] * (parts[0][3] + parts[len(parts) // 2][3]) == self.kv_width for parts in shapes
        )


def save_context(context: Context, path: Path, identity: Identity, notes: dict[str, Any]) -> None:
    """Write `context`, and `notes` (JSON values) beside it. SavedContextError if that cannot be done; a file that was
    there stays as it was then."""
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "identity": json.dumps(identity),
        "covered": str(context.covered),
        "exact_tokens": str(context.exact_tokens),
        "notes": json.dumps(notes),
    }
    try:
        with renamed(path) as temporary:
            _write(temporary, dict(_tensors(context)), metadata)
    except OSError as error:
        raise SavedContextError(f"{path} cannot be written ({one_line(error)}): choose another place") from error


def _tensors(context: Context) -> Iterator[tuple[str, Tensor]]:
    yield "tokens", torch.tensor(context.tokens, dtype=torch.int64)
    for index, layer in enumerate(context.cache.layers):
        for number, part in enumerate(layer.saved()):
            yield f"layers.{index}.kv.{number}", part
    for index, squared in context.squared.items():
        yield f"layers.{index}.squared", squared
    for index, selected in context.selected.items():
        yield f"layers.{index}.selected", selected
    mark = context.marks[-1] if context.marks else None
    if mark is not None and mark.tokens == context.covered and mark.logits is not None:
        yield "logits", mark.logits


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, tensor by tensor: the library's own writer copies all of them first."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_MULTIPLE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a saved context, whatever it belongs to; errors as `load_context`."""
    with _readable(path) as file:
        notes = json.loads(_checked_metadata(file.metadata(), path, {})["notes"])
        if not isinstance(notes, dict):
            raise SavedContextError(f"{path} is damaged: its notes cannot be read")
        return notes


def options_of(path: Path) -> dict[str, Any]:
    """What a model has to be loaded with to go on from `path`: density, precision and the smallest context, as
    `LoadConfig`'s fields; errors as `load_context`."""
    with _readable(path) as file:
        identity = json.loads(_checked_metadata(file.metadata(), path, {})["identity"])
        ctx_size = int(file.get_slice("tokens").get_shape()[0])
        densities, precision = [float(density) for density in identity["density"]], identity["precision"]
    same = len(set(densities)) == 1
    return {
        "density": densities[0] if same else densities,
        "quantize": precision if precision in ("int8", "int4") else "none",
        "ctx_size": ctx_size,
    }


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise SavedContextError(f"no file {path}") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SavedContextError(f"{path} is truncated or damaged: {one_line(error)}") from error


def load_context(context: Context, path: Path, identity: Identity, like: Like, device: torch.device) -> Any:
    """Make `context` the one saved at `path`; returns the notes.

    `identity` is what it has to belong to. SavedContextError, and `context` unchanged, for a file that is damaged, of
    another model or of a newer version, or too long.
    """
    with _readable(path) as file:
        metadata = _checked_metadata(file.metadata(), path, identity)
        covered, exact_tokens = int(metadata["covered"]), int(metadata["exact_tokens"])
        tokens = file.get_tensor("tokens").tolist()
        squared = {index: file.get_tensor(f"layers.{index}.squared") for index in like.neurons}
        selected = {index: file.get_tensor(f"layers.{index}.selected") for index in like.neurons}
        logits = file.get_tensor("logits").to(device) if "logits" in set(file.keys()) else None
        layers = range(len(context.cache.layers))
        shapes = [[file.get_slice(name).get_shape() for name in _kv_names(file, index)] for index in layers]
        if len(tokens) > like.ctx_tokens:
            raise SavedContextError(
                f"{path} holds {len(tokens)} tokens, the context is {like.ctx_tokens}: raise --ctx-size"
            )
        if not (
            0 <= exact_tokens <= covered <= len(tokens)
            and covered > 0
            and like.selections(squared, selected)
            and like.caches(context, shapes, len(tokens))
            and (logits is None or logits.shape == (1, like.vocab_size))
        ):
            raise SavedContextError(f"{path} is damaged: its parts contradict each other")
        _fill(context, file, tokens, device)
    context.tokens, context.covered, context.exact_tokens = tokens, covered, exact_tokens
    context.squared = {index: table.to(device) for index, table in squared.items()}
    context.selected = {index: chosen.to(device) for index, chosen in selected.items()}
    context.marks = [Mark(covered, dict(context.squared), context.selected, logits)]
    notes: dict[str, Any] = json.loads(metadata["notes"])
    return notes


def _kv_names(file: Any, index: int) -> list[str]:
    names = [f"layers.{index}.kv.{number}" for number in range(4)]  # keys and values, each with scales if int8
    present = set(file.keys())
    return [name for name in names if name in present]


def _checked_metadata(metadata: dict[str, str] | None, path: Path, identity: Identity) -> dict[str, str]:
    if metadata is None or metadata.get("format") != _FORMAT:
        raise SavedContextError(f"{path} is no saved prompt or conversation")
    if int(metadata["version"]) > _VERSION:
        raise SavedContextError(
            f"{path} has version {metadata['version']}, this program reads up to {_VERSION}: update griffin-offload"
        )
    saved = json.loads(metadata["identity"])
    if not isinstance(saved, dict):
        raise SavedContextError(f"{path} is damaged: it does not say what it belongs to")
    for name, value in identity.items():
        if saved.get(name) != value:
            raise SavedContextError(
                f"{path} was saved with another {name} ({_short(saved.get(name))}, now {_short(value)})"
            )
    return metadata


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _fill(context: Context, file: Any, tokens: list[int], device: torch.device) -> None:
    context.clear()
    try:
        for index, layer in enumerate(context.cache.layers):
            layer.load(len(tokens), [file.get_tensor(name).to(device) for name in _kv_names(file, index)])
    except BaseException:
        context.clear()
        raise
