"""`griffin-offload pull` from a hub of our own, asked by the real client, and `griffin-offload models`."""

import errno
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM

from griffin_offload.checkpoint.hub import fetch

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Repositories of files, `cut_after` so many bytes of a large one the connection ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cut_after: int | None = None
        self.asked: list[tuple[str, str | None]] = []


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        info = re.match(r"/api/models/([^/]+/[^/?]+)", self.path)
        file = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
        if info is None and file is None:  # such as the client's own endpoints
            self._send(404, b"", {})
            return
        name = (info or file)[1]
        files = self.server.repos.get(name)
        if files is None or name in self.server.gated:
            self._send(403 if files else 404, b"", {"X-Error-Code": "GatedRepo" if files else "RepoNotFound"})
        elif info:
            told = _tree(files) if "/tree/" in self.path else _info(name, files)
            self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        elif file[2] not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._send_file(file[2], files[file[2]])

    def _send_file(self, name: str, content: bytes) -> None:
        start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
        if self.command == "GET":
            self.server.asked.append((name, self.headers.get("Range")))
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        cut = self.server.cut_after if _is_large(name) and self.command == "GET" else None
        self._send(206 if start else 200, content[start:], headers, cut)

    def _send(self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
        self.close_connection = cut is not None


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


def _info(name: str, files: dict[str, bytes]) -> dict[str, object]:
    siblings = []
    for file, content in files.items():
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        siblings.append({"rfilename": file, "size": len(content), **({"lfs": lfs} if _is_large(file) else {})})
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}


def _tree(files: dict[str, bytes]) -> list[dict[str, object]]:
    found = []
    for file, content in files.items():
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        entry = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        found.append({**entry, **({"lfs": lfs} if _is_large(file) else {})})
    return found


@pytest.fixture
def hub(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model, and an empty cache."""
    server = Hub()
    files = {file.name: file.read_bytes() for file in checkpoints("llama2").iterdir()}
    server.repos["org/tiny"] = files | {"README.md": b"x", "consolidated.safetensors": b"x", "onnx/model.onnx": b"x"}
    server.repos["org/quants"] = {"a-Q4_K_M.gguf": b"GGUF" + bytes(3000), "a-Q8_0.gguf": b"GGUF", "config.json": b"{}"}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url, cache = f"http://127.0.0.1:{server.server_port}", str(tmp_path / "cache")
    for name, value in (("ENDPOINT", url), ("HF_HUB_CACHE", cache), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", cache, raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_is_fetched_without_what_nobody_needs(hub: Hub, cli, tmp_path: Path):
    pulled = cli("pull", "org/tiny", "--json")
    assert pulled.code == 0, pulled.err
    path = Path(pulled.json["path"])
    assert {file.name for file in path.iterdir()} == hub.repos["org/tiny"].keys() - {
        "README.md",
        "consolidated.safetensors",
        "onnx/model.onnx",
    }
    assert pulled.json["bytes"] == sum(file.stat().st_size for file in path.iterdir())
    fetched = list(hub.asked)
    assert cli("pull", "org/tiny").code == 0
    assert hub.asked == fetched, "nothing comes twice"
    assert fetch("org/tiny", offline=True) == path
    listed = cli("models", "--device", "cpu", "--max-gpu-mem", "1GB", "--json", tmp_path)
    (row,) = listed.json["models"]
    assert (row["model"], row["format"], row["fits"], row["density"]) == ("org/tiny", "float32", True, 1.0)
    assert "does not fit: needs" in cli("models", "--device", "cpu", "--max-gpu-mem", "50kB", tmp_path).out


def test_gguf_files_are_called_so(cli, checkpoints, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama2"))
    write_gguf(model, tmp_path / "tiny.gguf", "Q8_0")
    (row,) = cli("models", "--device", "cpu", "--max-gpu-mem", "1GB", "--json", tmp_path).json["models"]
    assert (Path(row["model"]).name, row["format"], row["fits"]) == ("tiny.gguf", "gguf", True)


def test_a_directory_that_is_not_there_is_named(cli, tmp_path: Path):
    cli.refuses(4, "no directory .*absent: check the name", "models", tmp_path / "absent")
    (tmp_path / "file").touch()
    cli.refuses(4, "file is a file: give a directory", "models", tmp_path / "file")


def test_what_this_user_may_not_read_hides_no_other_model(cli, checkpoints, monkeypatch, tmp_path: Path):
    (tmp_path / "model").symlink_to(checkpoints("llama2"))
    (tmp_path / "another's").mkdir()
    looked = Path.stat

    def refused(path: Path, **options: Any) -> Any:
        if path.parent.name == "another's":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return looked(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    (row,) = cli("models", "--device", "cpu", "--max-gpu-mem", "1GB", "--json", tmp_path).json["models"]
    assert Path(row["model"]).name == "model"
    words = "another's/adapter_config.json cannot be read: Permission denied"
    cli.refuses(4, words, "run", "x", "-m", tmp_path / "model", "--adapter", tmp_path / "another's")
    words = "another's/config.json cannot be read: Permission denied"
    cli.refuses(4, words, "plan", "--config", tmp_path / "another's" / "config.json")


def test_what_was_cut_off_goes_on(hub: Hub, cli):
    content = hub.repos["org/quants"]["a-Q4_K_M.gguf"]
    hub.cut_after = 1000
    broken = cli("pull", "org/quants:a-Q4_K_M.gguf")
    assert broken.code == 1
    assert "a-Q4_K_M.gguf of org/quants was cut off after 1.00 kB of 3.00 kB" in broken.err
    hub.cut_after = None
    pulled = cli("pull", "org/quants:a-Q4_K_M.gguf", "--json")
    assert Path(pulled.json["path"]).read_bytes() == content
    assert hub.asked == [("a-Q4_K_M.gguf", None), ("a-Q4_K_M.gguf", "bytes=1000-")]
    assert fetch("org/quants:a-Q4_K_M.gguf", offline=True).name == "a-Q4_K_M.gguf"


def test_what_is_there_already_but_damaged_does_not_stay(hub: Hub, cli, tmp_path: Path):
    content = hub.repos["org/quants"]["a-Q4_K_M.gguf"]
    part = tmp_path / "cache" / "models--org--quants" / "blobs" / f"{hashlib.sha256(content).hexdigest()}.griffin-part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"other bytes")
    assert "came damaged and was removed" in cli("pull", "org/quants:a-Q4_K_M.gguf").err
    assert cli("pull", "org/quants:a-Q4_K_M.gguf").code == 0


def test_errors_say_what_to_do(hub: Hub, cli, monkeypatch: pytest.MonkeyPatch):
    hub.gated.add("org/gated")
    hub.repos["org/gated"] = {"config.json": b"{}"}
    hub.repos["org/nothing"] = {"model.bin": b"x"}
    for name, code, words in (
        ("org/absent", 4, "check the name, or log in"),
        ("org/gated", 4, "accept its terms"),
        ("org/quants", 4, r"name one of its GGUF files, as ID:FILE \(a-Q4_K_M.gguf, a-Q8_0.gguf\)"),
        ("org/quants:b.gguf", 4, r"has no file b.gguf: name one"),
        ("org/nothing", 4, "no safetensors: and no GGUF file"),
        ("tiny", 2, "no hub id"),
    ):
        found = cli("pull", name)
        assert found.code == code, found.err
        assert re.search(words, found.err)
        assert found.err.count("\n") == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert "needs 3.00 kB more, and 1 B are free" in cli("pull", "org/quants:a-Q4_K_M.gguf").err
    assert not any(_is_large(name) for name, _ in hub.asked)
