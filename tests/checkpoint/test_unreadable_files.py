"""Files of a checkpoint that cannot be used: the reason is the true one, whichever library met it."""

import errno
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from griffin_offload.checkpoint import tokenizer
from griffin_offload.checkpoint.config_files import read_generation_config
from griffin_offload.checkpoint.files import renamed, temporary_name
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.checkpoint.tokenizer import load_tokenizer
from griffin_offload.errors import CheckpointError, GriffinError, limit_reached

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4976698\n"
SHARD, INDEX = "model-00001-of-00003.safetensors", "model.safetensors.index.json"


@pytest.fixture
def copy(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints("llama2"), tmp_path / "copy"))


def use(directory: Path) -> None:
    """Everything that is read before a weight."""

    class Model:
        generation_config = None

    open_checkpoint(directory)
    load_tokenizer(directory)
    read_generation_config(Model(), directory)


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, SHARD, "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_pointers_of_git_lfs(copy: Path, name: str):
    assert (copy / name).is_file()
    (copy / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a pointer of git-lfs.*git lfs pull"):
        use(copy)


def test_a_pointer_in_the_place_of_a_gguf_file(tmp_path: Path):
    (tmp_path / "model.gguf").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"model\.gguf is a pointer of git-lfs"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_template_that_is_a_pointer_is_no_template(copy: Path):
    """Any text is a template: without a check it would be every prompt."""
    (copy / "chat_template.jinja").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is a pointer"):
        load_tokenizer(copy)


def test_pointers_that_nobody_reads_do_not_matter(copy: Path):
    for name in ("pytorch_model.bin", "tokenizer.model", "picture.png"):
        (copy / name).write_text(POINTER)
    use(copy)


@pytest.mark.parametrize(
    "content", ["", "<!DOCTYPE html><html>", '{"version": "1.0", "add'], ids=["none", "page", "cut"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_damaged_tokenizers_are_named(copy: Path, name: str, content: str):
    (copy / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name} \({len(content)} bytes\) is truncated or damaged"):
        load_tokenizer(copy)


PACKAGES = [
    ("tokenizer.model", [], "pip install sentencepiece protobuf"),
    ("spiece.model", ["sentencepiece"], "pip install protobuf"),
    ("qwen.tiktoken", [], "pip install tiktoken"),
    ("tekken.json", [], "pip install mistral-common"),
    ("tokenizer.model", ["sentencepiece", "google.protobuf"], "tokenizer.model"),
]


@pytest.mark.parametrize(("name", "installed", "advice"), PACKAGES)
def test_packages_that_old_tokenizers_need(copy: Path, monkeypatch, name: str, installed: list[str], advice: str):
    for path in copy.glob("*token*"):
        path.unlink()
    (copy / name).write_text("{}")

    def find(module: str) -> object:
        if module not in installed and module.startswith("google"):
            raise ModuleNotFoundError(module)
        return importlib.util.find_spec("json") if module in installed else None

    def fail(*_: object, **__: object) -> None:
        raise ValueError("`tiktoken` is required to read a `tiktoken` file")  # what transformers says of all of them

    monkeypatch.setattr(tokenizer, "find_spec", find)
    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(CheckpointError, match=advice) as caught:
        load_tokenizer(copy)
    assert ("pip install" in str(caught.value)) == (len(installed) < 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no users as POSIX has them")
@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, "tokenizer.json", "generation_config.json"])
def test_files_of_another_user(copy: Path, name: str):
    """Mode 600, as the safetensors library writes files; root may read everything, so the question is another's."""
    private = copy / name
    _let_others_read(copy)
    use(shutil.copytree(copy, copy.with_name("readable")))  # imports what is late before the rights are given up
    private.chmod(0o600 if os.geteuid() == 0 else 0)
    said = _said_to_another_user(copy)
    assert said.startswith("CheckpointError: "), said
    assert f"{name} cannot be read: Permission denied (mode " in said
    assert "damaged" not in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no users as POSIX has them")
@pytest.mark.parametrize("rights", [0o700, 0o711, 0o744], ids=["closed", "not listed", "not entered"])
def test_directories_of_another_user(copy: Path, rights: int):
    _let_others_read(copy)
    use(shutil.copytree(copy, copy.with_name("readable")))
    copy.chmod(rights if os.geteuid() == 0 else rights % 8 << 6)
    said = _said_to_another_user(copy)
    copy.chmod(0o755)
    assert re.fullmatch(r"CheckpointError: \S+copy cannot be read: Permission denied \(mode \d+\): let this.*", said), (
        said
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no users as POSIX has them")
def test_gguf_files_of_another_user(copy: Path):
    """Nobody can tell what kind of file it is; that it is no GGUF file is not known either."""
    _let_others_read(copy)
    file = copy / "model.gguf"
    file.write_bytes(b"GGUF")
    file.chmod(0o600 if os.geteuid() == 0 else 0)
    said = _said_to_another_user(copy, lambda: open_checkpoint(file))
    assert "model.gguf cannot be read: Permission denied (mode " in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no users as POSIX has them")
def test_links_into_a_directory_of_another_user(copy: Path):
    """As into the cache of the hub that root has: closed is the directory there, and not that of the links."""
    _let_others_read(copy)
    blobs = copy.rename(copy.with_name("blobs"))
    copy.mkdir()
    copy.chmod(0o755)
    for path in blobs.iterdir():
        (copy / path.name).symlink_to(path)
    blobs.chmod(0o700 if os.geteuid() == 0 else 0)
    said = _said_to_another_user(copy)
    blobs.chmod(0o755)
    assert f"config.json cannot be read: Permission denied in {blobs} (mode " in said
    assert "let this user enter it" in said


LINKED = ["config.json", INDEX, SHARD, "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize("name", [*LINKED, "chat_template.jinja", "model.gguf"])
def test_links_to_what_is_not_there(copy: Path, name: str):
    """A snapshot of the hub's cache that was copied without its blobs. Taken for absent, a template or settings of the
    model would be missed by nobody."""
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to("../../blobs/0123")
    with pytest.raises(
        GriffinError, match=rf"{name} cannot be read: it is a link to \.\./\.\./blobs/0123, which is not"
    ):
        use(copy / name if name.endswith("gguf") else copy)


def test_links_that_nobody_follows_do_not_matter(copy: Path):
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors"):
        (copy / name).symlink_to("../../blobs/0123")
    use(copy)


def _let_others_read(copy: Path) -> None:
    for path in copy.iterdir():
        path.chmod(0o644)
    for parent in (copy, *copy.parents[:4]):  # one of them is of a process among several
        if parent.owner() == copy.owner() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)


def _said_to_another_user(copy: Path, work: Callable[[], object] | None = None) -> str:
    """The error of a process without root's rights that uses the checkpoint, or does `work`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing was wrong"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            use(copy) if work is None else work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    said = os.read(read, 10_000).decode()
    os.close(read)
    return said


LIMITS = [
    (OSError(errno.EMFILE, "Too many open files"), "open files"),
    (OSError(errno.ENFILE, "Too many open files in system"), "open files"),
    (ValueError("Error while deserializing: Too many open files (os error 24)"), "open files"),
    (RuntimeError("can't start new thread"), "threads"),
    (OSError(errno.ENOENT, "No such file or directory"), None),
    (GriffinError("says a user's path: Too many open files"), None),
]


@pytest.mark.parametrize(("error", "words"), LIMITS, ids=str)
def test_limits_of_the_process(error: BaseException, words: str | None):
    found = limit_reached(error)
    assert (found is None) == (words is None)
    assert words is None or words in found


def test_a_shard_that_could_not_be_opened_is_not_called_damaged(copy: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.open

    def full(path: Path, *arguments: object, **options: object) -> object:
        if path.name == SHARD:
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return real(path, *arguments, **options)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr("griffin_offload.checkpoint.safetensors.safe_open", fail)
    with pytest.raises(CheckpointError, match=rf"{SHARD} cannot be read: .*limit on open files") as caught:
        open_checkpoint(copy)
    assert limit_reached(caught.value) is not None


@pytest.mark.parametrize("named", ["none", "temporary", "source"])
def test_an_error_while_a_file_is_written_names_the_one_it_is_about(tmp_path: Path, named: str):
    """The file itself and not its temporary name; but what it is made of keeps its own."""
    path, source = tmp_path / "out", tmp_path / "source"
    names = {"none": (), "temporary": (str(temporary_name(path)),), "source": (str(source),)}

    def write() -> None:
        with renamed(path) as temporary:
            temporary.touch()
            raise OSError(errno.ENOSPC, "full", *names[named])

    with pytest.raises(OSError, match="full") as caught:
        write()
    assert caught.value.filename == str(source if named == "source" else path)
    assert list(tmp_path.iterdir()) == []
