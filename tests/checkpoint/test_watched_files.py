"""Files that change under a loaded model: each change has its words, and pages that are gone are no crash."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from griffin_offload.checkpoint.files import Mappings, WatchedFiles, states_of
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.checkpoint.safetensors import map_file
from griffin_offload.errors import CheckpointChanged

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are found on Linux alone")


def cut(path: Path) -> None:
    os.truncate(path, 10)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def overwrite(path: Path) -> None:
    with path.open("rb+") as file:
        file.write(b"other")
    os.utime(path, ns=(0, 1))  # as if a tick of the clock had passed


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 1))


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    beside = path.with_name("beside")
    beside.write_bytes(path.read_bytes())
    beside.replace(path)


CHANGES: dict[Callable[[Path], None], tuple[str, bool]] = {
    cut: ("from 100 to 10 bytes", True),
    append: ("from 100 to 104 bytes", True),
    overwrite: ("it was written to", True),
    touch: ("it was written to", True),
    delete: ("it cannot be found any more: No such file", False),
    replace: ("another file took its place", False),
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "a", tmp_path / "b c"]
    for path in found:
        path.write_bytes(bytes(100))
    return found


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_told(files: list[Path], change: Callable[[Path], None]):
    words, content = CHANGES[change]
    watched = WatchedFiles(map(str, files))
    watched.check()
    change(files[1])
    message = f"^{files[1]} has changed since it was loaded \\({words}.*\\): load the model again$"
    with pytest.raises(CheckpointChanged, match=message):
        watched.check()
    watched.check_contents([str(files[0])])
    if content:
        with pytest.raises(CheckpointChanged, match=words):
            watched.check_contents()
    else:
        watched.check_contents()  # what is mapped is what was mapped
    watched.close()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_states_from_before(files: list[Path], change: Callable[[Path], None]):
    """What changed between two looks is told by the second one."""
    known = states_of(map(str, files))
    change(files[0])
    with pytest.raises(CheckpointChanged, match=str(files[0])):
        WatchedFiles(known, known).check()


def test_no_descriptor_stays_open(files: list[Path]):
    before = os.listdir("/proc/self/fd")
    WatchedFiles(map(str, files)).close()
    with pytest.raises(OSError, match="No such file"):
        WatchedFiles([str(files[0]), str(files[0].with_name("absent"))])
    assert os.listdir("/proc/self/fd") == before


ODD = ["with spaces ", "größe 模型", "new\nline", "\\012", "a\u2028b\u0085c\x1cd", "x (deleted)"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_mapped_files_are_found_by_any_name(tmp_path: Path, name: str):
    path = tmp_path / name
    save_file({"x": torch.arange(5000.0)}, tmp_path / "plain")
    (tmp_path / "plain").rename(path)
    tensor = map_file(path)["x"]
    pages = FilePages([tensor], evict=False)
    assert (pages.unmapped_bytes, pages.paths([tensor])) == (0, {str(path)})
    pages.read(pages.spans([tensor]))
    pages.close()


def test_a_mapped_file_without_a_name(tmp_path: Path):
    """Deleted between mapping and looking: an error, and not a model whose files are not watched."""
    path = tmp_path / "x"
    save_file({"x": torch.arange(5000.0)}, path)
    tensor = map_file(path)["x"]
    path.unlink()
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    found = Mappings().around(start, end)
    assert found is not None
    assert (found.path, found.deleted) == (str(path), True)
    assert (Mappings().around(start, found.end), Mappings().around(start, found.end + 1)) == (found, None)
    with pytest.raises(CheckpointChanged, match="x was deleted or replaced while it was loaded"):
        FilePages([tensor], evict=False)


LOST = """
import os, sys, threading, torch
from pathlib import Path
from safetensors.torch import save_file
from griffin_offload.errors import CheckpointChanged
from griffin_offload.checkpoint.safetensors import map_file
from griffin_offload.checkpoint.files import WatchedFiles
path, watched_before = Path(sys.argv[1]), sys.argv[2]
save_file({"x": torch.ones(1000, 1000)}, path)
x = map_file(path)["x"]
torch.set_num_threads(4)
files = WatchedFiles([str(path)])
if watched_before != "watched":
    files.close()
os.truncate(path, 8192)
torch.mm(torch.ones(100, 1000), x)
try:
    files.check_contents()
except CheckpointChanged as error:
    print(error)
files.close()
path.unlink()
save_file({"x": torch.ones(1000, 1000)}, path)
z = map_file(path)["x"]
os.truncate(path, 8192)
torch.empty(1000).copy_(z[-1])
print("never printed")
"""


def test_lost_pages_are_an_error_where_they_are_watched(forks, tmp_path: Path):
    """Touched by several threads at once; unwatched, they are what they always were: the end."""
    command = ("-c", "import sys; sys.stdout.reconfigure(line_buffering=True)\n" + LOST, tmp_path / "x")
    found = forks.run(*command, "watched")
    words = "parts of it are gone: it was cut, or its disk fails"
    assert found.returncode == -signal.SIGBUS, found.err
    assert found.out == f"{tmp_path / 'x'} has changed since it was loaded ({words}): load the model again\n"
    assert forks.run(*command, "unwatched").returncode == -signal.SIGBUS
