"""Start commands of the package quickly: fork a process that has imported JAX.

`Popen` and `run` are those of `subprocess`, but a command `[sys.executable, "-m", MODULE, ...]` is
forked. It is still a process of its own and a child of the one that starts it, with its own
arguments, environment, streams, working directory and signals, and it imports the package itself.
Only the imports of other libraries, about a second of processor time, and the seed of `hash` are
shared. Tests of the start itself, and of exact resumption, use `subprocess`.
"""

import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
from typing import Any

import numpy as np

_LIBRARIES = (
    "flax.linen",
    "grain",
    "matplotlib.figure",
    "ml_collections.config_flags",
    "optax.contrib",
    "orbax.checkpoint",
    "tensorboardX",
)
_SET_CHILD_SUBREAPER = 36  # Of prctl(2).

# The processes to fork, with the socket of each, by the environment in which they were started.
_servers: dict[frozenset, tuple[subprocess.Popen, socket.socket]] = {}


class Popen(subprocess.Popen):
    """Start a command as `subprocess.Popen` does; on Linux, fork it from a server."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if sys.platform != "linux" or args[:2] != [sys.executable, "-m"]:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        executable, preexec, _, descriptors, cwd, env, _, _, shell, *pipes = rest[:15]
        new_session = rest[20]
        assert not (executable or preexec or descriptors or shell or new_session), "unsupported"
        server = _get_server(dict(os.environ if env is None else env))
        message = json.dumps([os.fspath(cwd or os.getcwd()), *map(os.fspath, args[2:])]).encode()
        streams = [fd if fd != -1 else own for own, fd in enumerate((pipes[0], *pipes[3::2]))]
        _adopt_orphans(True)  # The parent of the new process exits, and this process replaces it.
        try:
            socket.send_fds(server, [message], streams)
            if not (pid := server.recv(100)):
                raise RuntimeError("the process to fork has ended, see its error above")
            self.pid = int(pid)
            server.recv(100)
        finally:
            _adopt_orphans(False)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(
    command: list[str],
    input: Any = None,
    timeout: float | None = None,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess:
    """Run a command as `subprocess.run` does."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _get_server(environment: dict[str, str]) -> socket.socket:
    """Return the socket of the server with this environment; start it if there is none."""
    environment.pop("PYTEST_CURRENT_TEST", None)
    key = frozenset(environment.items())
    if key not in _servers or _servers[key][0].poll() is not None:
        while len(_servers) >= 2:  # Each holds 200 MB.
            process, ours = _servers.pop(next(iter(_servers)))
            ours.close()
            process.wait()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            fds = [theirs.fileno()]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environment, pass_fds=fds
            )
        _servers[key] = process, ours
    _servers[key] = _servers.pop(key)  # The latest is last.
    return _servers[key][1]


def _adopt_orphans(adopt: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _serve(requests: socket.socket) -> list[str]:
    """Fork a process for each request; return its command there, and never here."""
    while True:
        message, streams, *_ = socket.recv_fds(requests, 2**20, 3)
        if not message:
            os._exit(0)
        if parent := os.fork():
            os.waitpid(parent, 0)
            requests.send(b"It has exited.")
            for stream in streams:
                os.close(stream)
            continue
        if child := os.fork():
            requests.send(str(child).encode())
            os._exit(0)
        requests.close()
        for own, stream in enumerate(streams):
            os.dup2(stream, own)
            os.close(stream)
        directory, *command = json.loads(message)
        os.chdir(directory)
        sys.path[0] = directory
        return command


def _open_streams() -> None:
    """Open the standard streams as Python does when it starts."""
    for own, name in enumerate(("stdin", "stdout", "stderr")):
        binary: Any = open(own, "wb" if own else "rb", closefd=False)  # noqa: SIM115
        of_server = getattr(sys, name)
        stream = io.TextIOWrapper(
            binary,
            of_server.encoding,
            of_server.errors,
            newline="\n",
            line_buffering=own == 2 or os.isatty(own),
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    for library in _LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    sys.argv = _serve(socket.socket(fileno=int(sys.argv[1])))
    _open_streams()
    np.random.seed()  # Otherwise all commands would draw the same numbers.
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
