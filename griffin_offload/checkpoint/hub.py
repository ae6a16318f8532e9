"""Models of the hub: only the files that are needed, checked against the disk's room before they come, and gone on with
where an earlier attempt was cut off."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib import import_module
from pathlib import Path
from typing import Any

from griffin_offload.errors import GriffinError, ModelNotFound, one_line
from griffin_offload.units import format_bytes

_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_WEIGHTS = "*.safetensors"
# The same weights again, in other layouts.
_UNWANTED = ("consolidated*", "*/*")
_INDEX = "model.safetensors.index.json"
_CHUNK_BYTES = 2**20
_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_FILES = (".gguf", ".safetensors", ".json", ".bin")
_FILE_IN_ID = re.compile(r"([^/:]+/[^/:]+):([^:]+\.gguf)", re.IGNORECASE)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; `sha256` of those that are stored as large ones, which the cache knows by it."""

    name: str
    size: int
    sha256: str | None


def id_and_file(model: str) -> tuple[str, str | None]:
    """Of "org/name" or "org/name:FILE.gguf"."""
    found = _FILE_IN_ID.fullmatch(model)
    return (found[1], found[2]) if found else (model, None)


def is_hub_id(model: str) -> bool:
    """Whether a name can be the hub's, org/name or org/name:FILE.gguf, and is no path by its looks: ./name, name/,
    dir/file.gguf."""
    repo, file = id_and_file(model)
    return _ID.fullmatch(repo) is not None and (file is not None or not repo.lower().endswith(_FILES))


def fetch(model: str, *, offline: bool = False, **hub: Any) -> Path:
    """The directory of a hub id's snapshot in the cache, or the file of "org/name:FILE.gguf", fetched unless `offline`.
    `hub` are arguments of the hub's client: revision, cache_dir, token. Errors: ModelNotFound; GriffinError for a disk
    without room, or a file that came damaged."""
    from huggingface_hub import snapshot_download

    repo, file = id_and_file(model)
    wanted: Sequence[str] = [*_BESIDE, _WEIGHTS] if file is None else [file]
    unwanted = _UNWANTED if file is None else ()
    with _named(model, offline):
        info = None if offline else _asked(repo, hub)
        if info is not None:
            wanted, unwanted = [one.name for one in _fetch_large(repo, file, info, hub)], ()
        found = Path(
            snapshot_download(
                repo, allow_patterns=list(wanted), ignore_patterns=list(unwanted), local_files_only=offline, **hub
            )
        )
    path = found if file is None else found / file
    if not path.exists():
        raise ModelNotFound(f"{model} is not in the local hub cache: griffin-offload pull {model}")
    return path


@contextlib.contextmanager
def _named(model: str, offline: bool) -> Iterator[None]:
    """ModelNotFound for what the hub's client raises, which are errors of many libraries."""
    from huggingface_hub import errors

    repo, _ = id_and_file(model)
    try:
        yield
    except GriffinError:
        raise
    except errors.GatedRepoError as error:
        remedy = "accept them on its page, then log in by `hf auth login`"
        raise ModelNotFound(f"{repo} is given to those alone who accept its terms: {remedy}") from error
    except errors.RepositoryNotFoundError as error:
        remedy = "check the name, or log in by `hf auth login` if it is private"
        raise ModelNotFound(f"{repo} was not found in this directory or the hub: {remedy}") from error
    except Exception as error:
        where = "the local hub cache" if offline else "this directory or the hub"
        raise ModelNotFound(f"{model} was not found in {where}: {one_line(error)}") from error


def _asked(repo: str, hub: dict[str, object]) -> Any:
    """What the hub says of a repository; None if it cannot be reached: its client then looks into the cache, or says
    why it does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    options = {name: hub[name] for name in ("revision", "token") if hub.get(name) is not None}
    with contextlib.suppress(_connection_error(), OfflineModeIsEnabled):
        return HfApi().model_info(repo, files_metadata=True, **options)
    return None


def _connection_error() -> type[Exception]:
    """Of the library that the hub's client asks by: httpx, or from 2.4 on its successor."""
    from huggingface_hub.utils import get_session

    library = import_module(type(get_session()).__module__.partition(".")[0])
    found: type[Exception] = library.TransportError
    return found


def _fetch_large(repo: str, file: str | None, info: Any, hub: dict[str, object]) -> list[HubFile]:
    """The files that are needed; those of them that are stored as large ones are in the cache afterwards."""
    there = [
        HubFile(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs is not None else None)
        for one in info.siblings or ()
    ]
    wanted = _needed(repo, file, there, hub | {"revision": info.sha})
    blobs = _blobs(repo, hub)
    missing = [one for one in wanted if one.sha256 is None or not (blobs / one.sha256).exists()]
    begun = {one.name: part.stat().st_size for one in missing if (part := _part(blobs, one)) and part.exists()}
    _check_room(repo, blobs, sum(one.size - begun.get(one.name, 0) for one in missing))
    for one in missing:
        if one.sha256 is not None:
            _fetch_file(repo, str(info.sha), one, blobs, hub)
    return wanted


def _needed(repo: str, file: str | None, there: list[HubFile], hub: dict[str, object]) -> list[HubFile]:
    """What of a repository belongs to the model: one GGUF, or the weights of its index and what is beside them."""
    from fnmatch import fnmatchcase

    if file is not None:
        found = [one for one in there if one.name == file]
        if not found:
            raise ModelNotFound(f"{repo} has no file {file}: {_gguf_files(there)}")
        return found
    kept = [one for one in there if not any(fnmatchcase(one.name, pattern) for pattern in _UNWANTED)]
    beside = [one for one in kept if any(fnmatchcase(one.name, pattern) for pattern in _BESIDE)]
    weights = [one for one in kept if fnmatchcase(one.name, _WEIGHTS)]
    if not weights:
        raise ModelNotFound(f"{repo} has no safetensors: {_gguf_files(there)}")
    whole = {"model.safetensors"} & {one.name for one in weights}
    if any(one.name == _INDEX for one in beside):
        whole = _indexed(repo, hub)
    return [*beside, *(one for one in weights if one.name in whole or not whole)]


def _gguf_files(there: list[HubFile]) -> str:
    names = [one.name for one in there if one.name.lower().endswith(".gguf")]
    return f"name one of its GGUF files, as ID:FILE ({', '.join(names[:8])})" if names else "and no GGUF file"


def _indexed(repo: str, hub: dict[str, object]) -> set[str]:
    from huggingface_hub import hf_hub_download

    index = json.loads(Path(hf_hub_download(repo, _INDEX, **hub)).read_text(encoding="utf-8"))
    return set(index["weight_map"].values())


def _blobs(repo: str, hub: dict[str, Any]) -> Path:
    """Where the cache keeps a repository's contents."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(hub.get("cache_dir") or constants.HF_HUB_CACHE).expanduser()
    return cache / str(repo_folder_name(repo_id=repo, repo_type="model")) / "blobs"


def _part(blobs: Path, file: HubFile) -> Path | None:
    """What has come of a file so far; the hub's own client begins again each time since 2.0."""
    return None if file.sha256 is None else blobs / f"{file.sha256}.griffin-part"


def _check_room(repo: str, blobs: Path, needed_bytes: int) -> None:
    """GriffinError if the disk has no room for so much more."""
    there = next(place for place in (blobs, *blobs.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed_bytes > free:
        raise GriffinError(
            f"{repo} needs {format_bytes(needed_bytes)} more, and {format_bytes(free)} are free where {there} is: "
            "make room, or set HF_HOME to a larger disk"
        )


def _fetch_file(repo: str, revision: str, file: HubFile, blobs: Path, hub: dict[str, object]) -> None:
    """Go on where an earlier attempt ended; GriffinError if what came is not what the hub has."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, tqdm

    blobs.mkdir(parents=True, exist_ok=True)
    part = _part(blobs, file)
    assert part is not None, "a large file"
    have = part.stat().st_size if part.exists() else 0
    headers = build_hf_headers(token=hub.get("token")) | {"Accept-Encoding": "identity"}
    if have < file.size:
        url = hf_hub_url(repo, file.name, revision=revision)
        headers |= {"Range": f"bytes={have}-"} if have else {}
        try:
            with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
                answer.raise_for_status()
                goes_on = answer.status_code == HTTPStatus.PARTIAL_CONTENT
                bar = {"total": file.size, "initial": have if goes_on else 0, "desc": file.name, "disable": None}
                with part.open("ab" if goes_on else "wb") as out, tqdm(unit="B", unit_scale=True, **bar) as seen:
                    for chunk in answer.iter_raw():
                        seen.update(out.write(chunk))
        except _connection_error() as error:
            came = format_bytes(part.stat().st_size if part.exists() else 0)
            reason = f"{file.name} of {repo} was cut off after {came} of {format_bytes(file.size)}"
            raise GriffinError(f"{reason}: {one_line(error)}; the same command goes on from there") from error
    if _sha256(part) != file.sha256:
        part.unlink()
        raise GriffinError(f"{file.name} of {repo} came damaged and was removed: try again")
    os.replace(part, blobs / str(file.sha256))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
