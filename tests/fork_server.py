"""Runs Python scripts in forks of a process that has imported the libraries, which spares each the seconds of imports.

    python tests/fork_server.py FD      FD is a Unix socket; tests/processes.py speaks the other end

Of the suite itself nothing is imported before the fork: a script begins as ``python SCRIPT`` would let it.
"""

import array
import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback

import datasets  # noqa: F401
import huggingface_hub.constants
import lm_eval.evaluator
import lm_eval.models.huggingface
import lm_eval.tasks  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Seq2SeqTrainer  # noqa: F401

MESSAGE_LIMIT = 1 << 20


def next_request(server: socket.socket) -> tuple[dict, list[int]] | None:
    """A request and its descriptors: stdin, stdout, stderr, status; ``None`` once the other end has closed."""
    descriptors = array.array("i")
    data, ancillary, _, _ = server.recvmsg(MESSAGE_LIMIT, socket.CMSG_SPACE(4 * descriptors.itemsize))
    for _, _, content in ancillary:
        descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return (json.loads(data), list(descriptors)) if data else None


def become(request: dict, streams: list[int]) -> None:
    """Give this process the streams, folder, environment and arguments of the request."""
    for target, source in enumerate(streams):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    # The hub's address and whether it may be asked were read when the libraries were imported.
    importlib.reload(huggingface_hub.constants)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = request["argv"]


def watched_fork(report: int) -> bool:
    """Fork a process that forks another and writes its id and its exit status; whether this is the latter."""
    if os.fork():
        return False
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(report)
        return True
    os.write(report, f"{pid}\n".encode())
    # Or the ends of its streams would stay open here.
    os.closerange(0, report)
    _, status = os.waitpid(pid, 0)
    os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def serve(server: socket.socket) -> dict:
    """Answer requests until the other end closes; returns, in a forked process, the request that it is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while (message := next_request(server)) is not None:
        request, (*streams, report) = message
        if watched_fork(report):
            server.close()
            become(request, streams)
            return request
        for descriptor in (*streams, report):
            os.close(descriptor)
    os._exit(0)


def run(job: dict) -> None:
    """Run what a request names as ``__main__``."""
    sys.path[0] = job["path"]
    if job["module"]:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    elif job["code"]:
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(job["argv"][0], run_name="__main__")


def status_of(job: dict) -> int:
    """Run it; the exit status that the interpreter would end with."""
    try:
        run(job)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    # The forks leave the pages of what is imported alone, when they collect garbage and when they end.
    gc.freeze()
    status = status_of(serve(socket.socket(fileno=int(sys.argv[1]))))
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
