"""Runs of Python scripts in processes of their own, without the seconds that each spends on imports."""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Read while libraries are imported: a process with another value of one has to import them itself.
READ_AT_IMPORT = ("HF_", "OMP_", "MALLOC_", "PYTHON", "LD_", "TRANSFORMERS_", "ACCELERATE_", "USE_")
# Before any test, or library in this process, has changed it.
ENVIRONMENT = dict(os.environ)
# Those of them that a forked process reads again.
READ_AGAIN = {"HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_DISABLE_XET"}


class PythonProcess:
    """A running script; its stdout and stderr are files that grow.

    Attributes:
        pid: process id.
    """

    def __init__(self, server: socket.socket, request: dict[str, Any], folder: Path) -> None:
        self.request, self.files = request, [folder / name for name in ("stdout", "stderr")]
        read, write = os.pipe()
        with open(os.devnull) as stdin, self.files[0].open("w") as stdout, self.files[1].open("w") as stderr:
            streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
            socket.send_fds(server, [json.dumps(request).encode()], [*streams, write])
        os.close(write)
        self.report = os.fdopen(read)
        self.pid = int(self.report.readline())

    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self.files[1].read_text()

    def await_stderr(self, text: str, seconds: float = 120) -> None:
        """Return once ``text`` stands in stderr; fails where it doesn't for so long."""
        deadline = time.monotonic() + seconds
        while text not in self.stderr():
            assert time.monotonic() < deadline, self.stderr()
            time.sleep(0.02)

    def send_signal(self, signum: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, signum)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Its exit status and texts once it has ended; killed after ``timeout`` seconds."""
        with self.report:
            if not select.select([self.report], [], [], timeout)[0]:
                self.send_signal(signal.SIGKILL)
            status = int(self.report.readline())
        return subprocess.CompletedProcess(self.request["argv"], status, *(file.read_text() for file in self.files))


class ForkServer:
    """The server of this process, started at its first use."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(theirs.fileno())]
        self.process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self.folder = tempfile.TemporaryDirectory()
        self.runs = 0
        atexit.register(self.close)

    def close(self) -> None:
        """End the server."""
        self.socket.close()
        self.process.wait()
        self.folder.cleanup()

    def start(self, request: dict[str, Any]) -> PythonProcess:
        """Start a process."""
        self.runs += 1
        folder = Path(self.folder.name) / str(self.runs)
        folder.mkdir()
        return PythonProcess(self.socket, request, folder)


_SERVERS: list[ForkServer] = []


def server() -> ForkServer:
    """The one of this process."""
    if not _SERVERS:
        _SERVERS.append(ForkServer())
    return _SERVERS[0]


def clean(environment: dict[str, str] | None) -> dict[str, str]:
    """``environment`` without what this process has changed of its own since it began."""
    if environment is None:
        return dict(ENVIRONMENT)
    own = {name for name in {*os.environ, *ENVIRONMENT} if environment.get(name) == os.environ.get(name)}
    others = {name: value for name, value in environment.items() if name not in own}
    return others | {name: value for name, value in ENVIRONMENT.items() if name in own}


def fits(environment: dict[str, str]) -> bool:
    """Whether a process with this environment may share the server's imports."""
    names = {name for name in {*environment, *ENVIRONMENT} if name.startswith(READ_AT_IMPORT)} - READ_AGAIN
    return all(environment.get(name) == ENVIRONMENT.get(name) for name in names)


def start_python(*words: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> PythonProcess:
    """Start ``python WORDS``; see ``run_python``. ``env`` holds nothing that libraries read while they are imported."""
    arguments, environment = list(map(str, words)), clean(env)
    assert fits(environment)
    request: dict[str, Any] = {"cwd": str(cwd), "env": environment, "module": None, "code": None, "path": str(cwd)}
    if arguments[0] in ("-m", "-c"):
        request["module" if arguments[0] == "-m" else "code"] = arguments[1]
        request["argv"] = [arguments[0], *arguments[2:]]
        request["path"] = request["path"] if arguments[0] == "-m" else ""
    else:
        request["argv"] = arguments
        request["path"] = str((Path(cwd) / arguments[0]).parent)
    return server().start(request)


def run_python(
    *words: object, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """What ``python WORDS`` returns and prints, as ``subprocess.run`` with captured text gives it.

    Args:
        words: a script's path, ``-m`` and a module, or ``-c`` and code; then arguments.
        cwd: working folder.
        env: the whole environment; that of the tests where it is left out.
        timeout: seconds until the process is killed.
    """
    if fits(clean(env)):
        return start_python(*words, cwd=cwd, env=env).wait(timeout)
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=timeout)


def run_ranks(processes: int, *words: object) -> subprocess.CompletedProcess:
    """The same in so many processes of one group, as ``torchrun`` starts them; their texts one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    group |= {"LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    ends = [
        process.wait() for process in [start_python(*words, env={**ENVIRONMENT, **group, **rank}) for rank in ranks]
    ]
    texts = ["".join(text) for text in zip(*((end.stdout, end.stderr) for end in ends), strict=True)]
    return subprocess.CompletedProcess(ends[0].args, max((end.returncode for end in ends), key=abs), *texts)
