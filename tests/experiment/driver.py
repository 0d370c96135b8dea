"""Owns the process of scheduler.py, in which a scheduler and its client run outside the VM."""

from __future__ import annotations

import importlib.util
import json
import queue
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ami_builder.core.errors import BuildFailed, MissingTool
from ami_builder.system import processes
from ami_builder.verify.executor import INSTALL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_START_SECONDS = 60.0


def require_distributed() -> None:
    """Raise MissingTool if Dask is not installed."""
    if importlib.util.find_spec("distributed") is None:
        raise MissingTool(
            "Dask (distributed) isn't installed, and the experiment's scheduler runs on this host",
            hint=INSTALL,
        )


class Driver:
    """A scheduler and a client that gives it tasks; made by `driving`."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self._messages: queue.Queue[Mapping[str, Any]] = queue.Queue()
        assert process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()
        self.port = int(self.expect("port", timeout=_START_SECONDS)["port"])

    def _read(self, out: IO[str]) -> None:
        with suppress(ValueError):  # the pipe is closed once the process has ended
            for line in out:
                self._messages.put(json.loads(line))

    def expect(
        self,
        key: str,
        *,
        timeout: float,
        alive: Callable[[], None] = lambda: None,
        on_other: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> Mapping[str, Any]:
        """Return the next message that has `key`. Pass others to `on_other`, and call `alive` in between.

        Raises TimedOut after `timeout` seconds, and BuildFailed if the process has ended.
        """

        def look() -> Mapping[str, Any] | None:
            alive()
            while not self._messages.empty():
                message = self._messages.get()
                if key in message:
                    return message
                on_other(message)
            if self._process.poll() is not None and not self._reader.is_alive() and self._messages.empty():
                raise BuildFailed(
                    f"the experiment's scheduler ended (exit status {self._process.returncode})",
                    log=self._log,
                    tail=processes.last_lines(self._log),
                )
            return None

        return processes.wait_until(look, what=f"{key!r} of the scheduler", timeout=timeout, log=self._log)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; raises BuildFailed if the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as ended:
            raise BuildFailed("the experiment's scheduler has ended", log=self._log) from ended


@contextmanager
def driving(log: Path) -> Iterator[Driver]:
    """Run a scheduler on a free local port, and its client, until the block ends. Raises MissingTool."""
    require_distributed()
    argv = [sys.executable, "-m", "tests.experiment.scheduler"]
    environment = processes.environment({"PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    with (
        log.open("w") as err,
        processes.running(
            argv,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err.fileno(),
        ) as process,
    ):
        yield Driver(process, log)
