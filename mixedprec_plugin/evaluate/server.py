"""Start an SGLang server on the loopback interface, talk to it, and stop it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixedprec_plugin.errors import MixedPrecisionError, Problem

START_SECONDS = 600.0
STOP_SECONDS = 30.0
_LOG_TAIL_LINES = 25
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)
# A proxy that the environment names must not be asked for the loopback interface.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(MixedPrecisionError):
    """The server died, did not become ready in time, or answered with an error."""


class Server:
    """`sglang serve` as a subprocess: `with Server(model_path, log_path) as server: ...`.

    Args:
        log_path: file that receives what the server prints.
        preset_path: served with `--load-format mixedprec` if given, stock if None.
        flags: more flags of `sglang serve`.
        api_key: what the server asks for, and is told with every request; empty for none.
        is_quiet: whether nothing is printed while it starts.
    Attributes:
        command: what is run.
        ready_seconds: from start to ready; 0.0 before.
    """

    def __init__(
        self, model_path: Path, log_path: Path, preset_path: Path | None = None,
        flags: Sequence[str] = (), *, api_key: str = "", is_quiet: bool = False,
    ) -> None:  # fmt: skip
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._is_quiet = is_quiet
        self.port = free_port()
        self.log_path = log_path
        self.ready_seconds = 0.0
        self.command = [str(Path(sys.executable).parent / "sglang"), "serve"]
        self.command += ["--model-path", str(model_path)]
        if preset_path is not None:
            self.command += ["--load-format", "mixedprec"]
            self.command += ["--mixedprec-config", str(preset_path)]
        if api_key:
            self.command += ["--api-key", api_key]
        self.command += [*flags, "--host", "127.0.0.1", "--port", str(self.port)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the server, which is its process group's as well."""
        assert self._process is not None
        return self._process.pid

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        environment = {**os.environ, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def request(self, path: str, body: Any = None, timeout: float = 300.0) -> Any:
        """GET a path, or POST a JSON body to it; the JSON that comes back, or a ServerError."""
        return json.loads(self._ask(path, body, timeout) or b"null")

    def flush_cache(self) -> None:
        """Have the server forget what it cached of earlier prompts, once it is idle.

        SGLang lets go of a finished batch a moment after its last reply. Until then it does not
        flush.
        """
        self._ask(f"/flush_cache?timeout={STOP_SECONDS:.0f}", None, 2 * STOP_SECONDS)

    def update_weights(self, model_path: Path, **more: str) -> None:
        """Have the server load other weights.

        A server that is not idle yet loads them and fails to flush its cache: so we wait for it.

        Args:
            more: what else the request says, such as `load_format`.
        Raises:
            ServerError: the weights were refused, or the server fails.
        """
        self.flush_cache()
        self.request("/update_weights_from_disk", {"model_path": str(model_path), **more})

    def _ask(self, path: str, body: Any, timeout: float) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **self._headers}
        request = urllib.request.Request(f"{self.address}{path}", data, headers)
        try:
            with _opener.open(request, timeout=timeout) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {error}: {error.read()[:500]!r}") from error
        except OSError as error:
            raise self._error(f"{path}: {error}") from error

    def log_tail(self) -> str:
        """Return the last lines of the log under a heading."""
        lines = self.log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join([f"--- the end of {self.log_path} ---", *lines])

    def _error(self, what: str) -> ServerError:
        """What is wrong, and the end of the log, a problem a line."""
        return ServerError(Problem("", line) for line in (what, *self.log_tail().splitlines()))

    def stop(self) -> None:
        """Ask the server to stop; end what is left of its process group."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                print("The server does not stop by itself; ending it.", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _wait(self) -> None:
        assert self._process is not None
        start, shown = time.monotonic(), -1
        is_terminal = sys.stderr.isatty()
        try:
            while not self._is_ready():
                seconds = time.monotonic() - start
                if self._process.poll() is not None:
                    code = self._process.returncode
                    raise self._error(f"the server ended with exit code {code} before it was ready")
                if seconds > START_SECONDS:
                    raise self._error(f"the server is not ready after {seconds:.0f} s")
                # a terminal's line is written anew, elsewhere there is one every ten seconds
                step = int(seconds) if is_terminal else int(seconds) // 10
                if step > shown and not self._is_quiet:
                    shown = step
                    self._show(seconds, is_terminal=is_terminal)
                time.sleep(0.5)
        finally:
            if is_terminal and not self._is_quiet:
                print(file=sys.stderr)
        self.ready_seconds = time.monotonic() - start

    def _show(self, seconds: float, *, is_terminal: bool) -> None:
        """Print the seconds, and what the plugin's last line in the log says."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        said = (line.partition("mixedprec: ")[2].strip() for line in reversed(lines))
        width = shutil.get_terminal_size().columns - 1
        text = f"  waiting for the server: {seconds:3.0f} s  {next(filter(None, said), '')}"
        text = text[:width].rstrip()
        print(f"\r{text:{width}}" if is_terminal else text, end="" if is_terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def _is_ready(self) -> bool:
        """Whether /health answers; SGLang opens it before the model is loaded, with status 503."""
        try:
            with _opener.open(f"{self.address}/health", timeout=60) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent is gone, whatever ended it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
