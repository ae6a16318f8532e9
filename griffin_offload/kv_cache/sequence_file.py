"""A context in a file: the KV entries, statistic and selection of a prompt, as safetensors.

Its metadata says what it belongs to (the model's fingerprint, precision, neurons kept, ...), and reading checks all
of it before anything is changed; a digest of the header tells a damaged one. Writing goes through a temporary name, a
layer at a time, so that no second copy of the KV cache is made.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from griffin_offload.blocks.states import StateTensor
from griffin_offload.checkpoint.files import check_name, renamed
from griffin_offload.checkpoint.safetensors import DTYPES
from griffin_offload.config import MIXED
from griffin_offload.errors import SavedContextError, one_line, unreadable, unwritable
from griffin_offload.formats import planned_as
from griffin_offload.kv_cache.kv_layer import States
from griffin_offload.kv_cache.sequence import MAX_MARKS, Context, Snapshot
from griffin_offload.kv_cache.store import MOST_PARTS, head_sizes, part_types
from griffin_offload.method.allocation import Counts

_FORMAT, _VERSION = "griffin-offload context", 1
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_MULTIPLE = 8

ModelIdentity = dict[str, Any]
"""What a context depends on; JSON values."""


class _Slice(Protocol):
    def get_dtype(self) -> str: ...

    def get_shape(self) -> list[int]: ...


class _SavedFile(Protocol):
    """What safetensors opens."""

    def keys(self) -> Iterable[str]: ...

    def metadata(self) -> dict[str, str] | None: ...

    def get_tensor(self, name: str) -> Tensor: ...

    def get_slice(self, name: str) -> _Slice: ...


_Part = tuple[str, str, tuple[int, ...]]
"""Name, kind of numbers and shape of a tensor, as a header tells them."""


@dataclass(frozen=True)
class ContextSchema:
    """What the parts of a file must look like, beyond what its header promises."""

    ctx_tokens: int
    vocab_size: int
    kv_widths: tuple[int, ...]
    """Numbers that each layer caches for a token, those that cache none left out."""
    dtype: torch.dtype
    """Of the KV cache, or of its scales."""
    neurons: dict[int, tuple[int, Counts]]
    """F, and how many are chosen for each format, of each streamed layer."""
    states: tuple[tuple[StateTensor, ...], ...] = ()
    """Of each layer that has some."""

    def holds(self, parts: dict[str, _Part], prefix: str) -> bool:
        """Whether all states are there under names that begin like this, and look like ours."""
        return all(
            parts.get(name := _state_name(prefix, number, state.name)) == (name, DTYPE_NAMES[state.dtype], state.shape)
            for number, layer in enumerate(self.states)
            for state in layer
        )

    def selections(self, squared: dict[int, Tensor], selected: dict[int, Tensor]) -> bool:
        """Whether the tables can be ours: for each format rising indices below F, none of them twice."""
        return all(
            squared[index].shape == (1, full)
            and squared[index].dtype == torch.float32
            and chosen.shape == (sum(counts),)
            and chosen.dtype == torch.int64
            and all(bool((own[1:] > own[:-1]).all()) for own in chosen.split(counts))
            and chosen.unique().numel() == chosen.numel()
            and (chosen.numel() == 0 or (int(chosen.min()) >= 0 and int(chosen.max()) < full))
            for index, (full, counts) in self.neurons.items()
            for chosen in [selected[index]]
        )

    def sequence(self, tokens: Tensor) -> bool:
        """Whether these can be token ids."""
        ids = tokens.dim() == 1 and tokens.dtype == torch.int64 and tokens.numel() > 0
        return ids and int(tokens.min()) >= 0 and int(tokens.max()) < self.vocab_size

    def last(self, logits: Tensor | None) -> bool:
        """Whether these can be the logits behind the last token, or there are none."""
        return logits is None or (logits.shape == (1, self.vocab_size) and logits.is_floating_point())

    def caches(self, context: Context, parts: list[list[_Part]], tokens: int) -> bool:
        """Whether the KV entries, a layer's parts being these, can be ours."""
        shapes = [[list(shape) for _, _, shape in layer] for layer in parts]
        fitting = all(layer.could_load(tokens, shape) for layer, shape in zip(context.cache.kept, shapes, strict=True))
        return fitting and all(
            [kind for _, kind, _ in layer] == [DTYPE_NAMES[dtype] for dtype in part_types(kept.bits, self.dtype)]
            and shape[0][1] * sum(head_sizes(kept.bits, shape[-1][1], shape[-1][2], shape) or []) == width
            for kept, layer, shape, width in zip(context.cache.kept, parts, shapes, self.kv_widths, strict=True)
        )


def save_context(context: Context, path: Path, identity: ModelIdentity, notes: dict[str, object]) -> None:
    """Write `context`, and `notes` (JSON values) beside it. SavedContextError if that cannot be done; a file that was
    there stays as it was then."""
    check_name(path)
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "identity": json.dumps(identity),
        "covered": str(context.covered),
        "exact_tokens": str(context.exact_tokens),
        "seams": json.dumps([mark.tokens for mark in context.seams]),
        "notes": json.dumps(notes),
    }
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")  # a directory, or a device that a file would take the place of
        with renamed(path) as temporary:
            write_tensors(temporary, dict(_tensors(context)), metadata)
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
        raise SavedContextError(unwritable(path, error)) from error


def _tensors(context: Context) -> Iterator[tuple[str, Tensor]]:
    yield "tokens", torch.tensor(context.tokens, dtype=torch.int64, device="cpu")
    for index, layer in enumerate(context.cache.kept):
        for number, part in enumerate(layer.saved()):
            yield f"layers.{index}.kv.{number}", part
    yield from _states("now", context.cache.copied_states())
    for index, squared in context.squared.items():
        yield f"layers.{index}.squared", squared
    for index, selected in context.selected.items():
        yield f"layers.{index}.selected", selected
    for number, seam in enumerate(context.seams):
        for index, squared in seam.squared.items():
            yield f"layers.{index}.seam.{number}", squared
        yield from _states(f"seam.{number}", seam.states)
    mark = context.marks[-1] if context.marks else None
    if mark is not None and mark.tokens == context.covered and mark.logits is not None:
        yield "logits", mark.logits
    if mark is not None and mark.tokens == context.covered < len(context.tokens):
        yield from _states("covered", mark.states)


def _states(prefix: str, states: States | None) -> Iterator[tuple[str, Tensor]]:
    for number, held in enumerate(states or ()):
        for name, state in held.items():
            yield _state_name(prefix, number, name), state


def _state_name(prefix: str, number: int, name: str) -> str:
    return f"states.{prefix}.{number}.{name}"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, tensor by tensor: the library's own writer copies all of them first."""
    parts = [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    header: dict[str, Any] = {"__metadata__": metadata | {"digest": header_digest(metadata, parts)}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_MULTIPLE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def header_digest(metadata: dict[str, str], parts: list[_Part]) -> str:
    """Of all that a header says but this."""
    said = [sorted(item for item in metadata.items() if item[0] != "digest"), sorted(parts)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a saved context, whatever it belongs to; errors as `load_context`."""
    with readable(path) as file:
        return _notes(_checked_metadata(file, path), path)


def options_of(path: Path, *, model: str) -> dict[str, Any]:
    """What `model`, a fingerprint, has to be loaded with to go on from `path`: density, precision and the smallest
    context, as `LoadConfig`'s fields; errors as `load_context`."""
    with readable(path) as file:
        identity = json.loads(_checked_metadata(file, path)["identity"])
        if identity["model"] != model:
            raise SavedContextError(f"{path} was saved with another model: use that one, or name another file")
        ctx_size = int(file.get_slice("tokens").get_shape()[0])
        densities, precision = [float(density) for density in identity["density"]], identity["precision"]
        if precision in MIXED:
            return {"density": "auto", "quantize": precision, "bits": float(identity["bits"]), "ctx_size": ctx_size}
    same = len(set(densities)) == 1
    return {
        "density": densities[0] if same else densities,
        "quantize": planned_as(precision.split()[0]).name,  # "int4 and more" comes of int4
        "ctx_size": ctx_size,
    }


def _check_file(path: Path) -> None:
    """SavedContextError, with the system's reason, for what cannot be opened or is no file."""
    try:
        with path.open("rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a name that cannot be one
        raise SavedContextError(f"no file {path}: check the name") from error
    except OSError as error:
        raise SavedContextError(unreadable(path, error)) from error
    if not regular:
        raise SavedContextError(f"{path} is no file: name one that was saved")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[_SavedFile]:
    check_name(path)
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SavedContextError(f"{path} is truncated or damaged: {one_line(error)}") from error


def load_context(
    context: Context, path: Path, identity: ModelIdentity, like: ContextSchema, device: torch.device
) -> Any:
    """Make `context` the one saved at `path`; returns the notes.

    `identity` is what it has to belong to. SavedContextError, and `context` unchanged, for a file that is damaged, of
    another model or of a newer version, or too long.
    """
    with readable(path) as file:
        metadata = _checked_metadata(file, path)
        _check_identity(json.loads(metadata["identity"]), identity, path)
        notes = _notes(metadata, path)
        covered, exact_tokens = int(metadata["covered"]), int(metadata["exact_tokens"])
        ids = file.get_tensor("tokens")
        squared = {index: file.get_tensor(f"layers.{index}.squared") for index in like.neurons}
        selected = {index: file.get_tensor(f"layers.{index}.selected") for index in like.neurons}
        seams = _seams(metadata)
        inside = [
            {i: file.get_tensor(f"layers.{i}.seam.{number}") for i in like.neurons} for number in range(len(seams))
        ]
        logits = file.get_tensor("logits") if "logits" in set(file.keys()) else None
        kv = [[_part(file, name) for name in _kv_names(file, i)] for i in range(len(context.cache.kept))]
        there = {name: _part(file, name) for name in file.keys()}  # noqa: SIM118
        if ids.numel() > like.ctx_tokens:
            raise SavedContextError(
                f"{path} holds {ids.numel()} tokens, the context is {like.ctx_tokens}: raise --ctx-size"
            )
        if not (
            like.sequence(ids)
            and 0 <= exact_tokens <= covered <= ids.numel()
            and covered > 0
            and seams == sorted(set(seams))
            and all(0 < seam < covered for seam in seams)
            and all(like.selections(tables, selected) for tables in (squared, *inside))
            and like.caches(context, kv, ids.numel())
            and all(like.holds(there, prefix) for prefix in ("now", *(f"seam.{n}" for n in range(len(seams)))))
            and like.last(logits)
        ):
            raise SavedContextError(f"{path} is damaged: its parts contradict each other")
        tokens = ids.tolist()
        _fill(context, file, tokens, device)
        now, *at_seams = [_states_of(file, like, p, device) for p in ("now", *(f"seam.{n}" for n in range(len(seams))))]
        covering = "now" if covered == len(tokens) else "covered"
        at_end = _states_of(file, like, covering, device) if like.holds(there, covering) else None
    context.tokens, context.covered, context.exact_tokens = tokens, covered, exact_tokens
    # Copies: what safetensors gives are views of the mapped file.
    context.squared = {index: table.to(device, copy=True) for index, table in squared.items()}
    context.selected = {index: chosen.to(device, copy=True) for index, chosen in selected.items()}
    last = logits.to(device, copy=True) if logits is not None else None
    tables = [{index: table.to(device, copy=True) for index, table in tables.items()} for tables in inside]
    if now is not None:
        context.cache.put_back(now)
    context.mark_seams(seams, tables, at_seams)
    if at_end is not None or not like.states:
        context.marks.append(Snapshot(covered, dict(context.squared), context.selected, last, at_end))
    return notes


def _states_of(file: _SavedFile, like: ContextSchema, prefix: str, device: torch.device) -> States | None:
    """Copies of the states that lie under this name; None where there are none at all."""
    return [
        {state.name: file.get_tensor(_state_name(prefix, number, state.name)).to(device, copy=True) for state in layer}
        for number, layer in enumerate(like.states)
    ] or None


def _seams(metadata: dict[str, str]) -> list[int]:
    """Tokens of the states inside the prompt; none in files of before there were any. ValueError for other things."""
    seams = json.loads(metadata.get("seams", "[]"))
    if not isinstance(seams, list) or len(seams) >= MAX_MARKS or any(type(seam) is not int for seam in seams):
        raise ValueError("its seams cannot be read")
    return seams


def _part(file: _SavedFile, name: str) -> _Part:
    there = file.get_slice(name)
    return name, there.get_dtype(), tuple(there.get_shape())


def _kv_names(file: _SavedFile, index: int) -> list[str]:
    names = [f"layers.{index}.kv.{number}" for number in range(MOST_PARTS)]
    present = set(file.keys())
    return [name for name in names if name in present]


def _checked_metadata(file: _SavedFile, path: Path) -> dict[str, str]:
    """What the header says, if it is a context's of a version that is known, and whole."""
    metadata: dict[str, str] | None = file.metadata()
    if metadata is None or metadata.get("format") != _FORMAT:
        raise SavedContextError(f"{path} is no saved prompt or conversation")
    if int(metadata["version"]) > _VERSION:
        raise SavedContextError(
            f"{path} has version {metadata['version']}, this program reads up to {_VERSION}: update griffin-offload"
        )
    if metadata["digest"] != header_digest(metadata, [_part(file, name) for name in file.keys()]):  # noqa: SIM118
        raise SavedContextError(f"{path} is damaged: its header is not the one that was written")
    return metadata


def _notes(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    notes = json.loads(metadata["notes"])
    if not isinstance(notes, dict):
        raise SavedContextError(f"{path} is damaged: its notes cannot be read")
    return notes


def _check_identity(saved: object, identity: ModelIdentity, path: Path) -> None:
    if not isinstance(saved, dict):
        raise SavedContextError(f"{path} is damaged: it does not say what it belongs to")
    for name, value in identity.items():
        if saved.get(name) != value:
            raise SavedContextError(
                f"{path} was saved with another {name} ({_short(saved.get(name))}, now {_short(value)}): load the "
                "model as it was then, or use another file"
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _fill(context: Context, file: _SavedFile, tokens: list[int], device: torch.device) -> None:
    context.clear()
    try:
        for index, layer in enumerate(context.cache.kept):
            layer.load(len(tokens), [file.get_tensor(name).to(device) for name in _kv_names(file, index)])
        context.cache.count(len(tokens))
    except BaseException:
        context.clear()
        raise
