"""`python ARGUMENTS` for tests, forked from a process that has imported all that commands import.

For tests of what a process does; those of how the interpreter or an import starts have a real one (`process`).
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

from processes import Child

_LARGEST_REQUEST = 2**17
LONGEST_S = 300.0
_POLL_S = 0.01


class Started:
    """One process; stdout and stderr are files, or what was given."""

    def __init__(self, reply: socket.socket, out: IO[bytes], err: IO[bytes]) -> None:
        self._reply, self._out, self._err = reply, out, err
        self.returncode: int | None = None
        self.pid = int(reply.recv(32))

    @property
    def out(self) -> str:
        """What it printed so far."""
        return _text(self._out)

    @property
    def err(self) -> str:
        return _text(self._err)

    def poll(self) -> int | None:
        return self.wait(0.0) if self.returncode is None else self.returncode

    def wait(self, timeout_s: float = LONGEST_S) -> int | None:
        """The exit code, negative for a signal; None when it is not over in time."""
        if self.returncode is None:
            self._reply.settimeout(max(timeout_s, 1e-6))
            try:
                self.returncode = int(self._reply.recv(32))
            except TimeoutError:
                return None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        """Kill it, if it is not over."""
        self.send_signal(signal.SIGKILL)
        self.wait()
        for file in (self._reply, self._out, self._err):
            file.close()


class ForkServer:
    """Started with the first process, and shared by all that run tests of one call (xdist's workers): what it has
    imported takes as long as a hundred small tests."""

    def __init__(self) -> None:
        call = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
        self._address = f"\0griffin-offload-forks-{call}"
        self._socket: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._started: list[Started] = []

    def start(self, *arguments: object, stdin: bytes = b"", terminal: int | None = None, **variables: str) -> Started:
        """`python arguments` (-c CODE ... or -m MODULE ...); `terminal`: a descriptor in place of files."""
        files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115  # closed by `Started`
        files[0].write(stdin)
        files[0].seek(0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        standard = [file.fileno() for file in files] if terminal is None else [terminal] * 3
        request = {"arguments": [os.fsdecode(str(a)) for a in arguments], "folder": os.getcwd()}
        request["variables"] = dict(os.environ) | variables
        with theirs, files[0]:
            socket.send_fds(self._connection(), [json.dumps(request).encode()], [*standard, theirs.fileno()])
            started = Started(ours, files[1], files[2])
        self._started.append(started)
        return started

    def run(self, *arguments: object, stdin: bytes = b"", **variables: str) -> Started:
        """One that is over."""
        started = self.start(*arguments, stdin=stdin, **variables)
        assert started.wait() is not None, started.err
        return started

    def end_all(self) -> None:
        """Whatever was started since the last time."""
        while self._started:
            self._started.pop().close()

    def close(self) -> None:
        self.end_all()
        if self._socket is not None:
            self._socket.close()
        if self._server is not None:
            self._server.wait()  # for the others, too: it is this process's child

    def _connection(self) -> socket.socket:
        while self._socket is None:
            ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                ours.connect(self._address)
                self._socket = ours
            except ConnectionRefusedError:
                ours.close()
                self._start()
        return self._socket

    def _start(self) -> None:
        """Unless another process is just doing it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            try:
                listening.bind(self._address)
            except OSError:
                time.sleep(_POLL_S)
                return
            listening.listen()
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-m", "fork_server", str(listening.fileno())]
            # Not in the checkout, whose package would come before the one that is installed, with its kernels.
            folder = os.path.dirname(__file__)
            self._server = subprocess.Popen(command, env=environment, pass_fds=[listening.fileno()], cwd=folder)


def _text(file: IO[bytes]) -> str:
    """All of it; the process's own place in the file is not moved."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def import_everything() -> None:
    """What commands import when they need it."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    import uvicorn.protocols.http.h11_impl  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import griffin_offload.engine.chat
    import griffin_offload.engine.convert
    import griffin_offload.engine.model
    import griffin_offload.evaluation.summaries
    import griffin_offload.serving.server  # noqa: F401

    get_checkpoint_conversion_mapping("llama")  # made once, of all models: a quarter of a small model's command


def interpret(arguments: Sequence[str]) -> int:
    """As the interpreter with these arguments; the exit code."""
    kind, program, *rest = arguments
    sys.argv = ["-c" if kind == "-c" else program, *rest]
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0


def serve(listening: socket.socket) -> None:
    """Until nobody asks any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    asking = [listening.accept()[0]]
    while asking:
        for one in select.select([listening, *asking], [], [])[0]:
            if one is listening:
                asking.append(listening.accept()[0])
                continue
            data, descriptors, _, _ = socket.recv_fds(one, _LARGEST_REQUEST, 4)
            if not data:
                asking.remove(one)
                one.close()
            elif os.fork() == 0:
                for other in (listening, *asking):
                    other.close()
                _supervise(json.loads(data), descriptors[:3], socket.socket(fileno=descriptors[3]))
            for descriptor in descriptors:
                os.close(descriptor)


def _supervise(request: dict[str, Any], standard: Sequence[int], reply: socket.socket) -> None:
    """The parent of one process, which tells its end. Never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def work() -> int:
        reply.close()
        os.setsid()
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["variables"])
        return interpret(request["arguments"])

    child = Child(work, standard)
    reply.send(str(child.pid).encode())
    reply.send(str(child.wait()).encode())
    os._exit(0)


if __name__ == "__main__":
    import_everything()
    serve(socket.socket(fileno=int(sys.argv[1])))
