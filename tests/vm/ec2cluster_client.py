"""A user of EC2Cluster: runs among dask-cloudprovider's packages and does what JSON lines on stdin ask for.

tests.vm.ec2cluster starts it. Each line has `do`, the name of a method of User, and its arguments; each
answer is a line on stdout with `result`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from dask_cloudprovider.aws import EC2Cluster  # type: ignore[import-not-found]
from distributed import Client

_EXPERIMENT = Path(__file__).parents[1] / "experiment"
_WAIT_SECONDS = 1800


def load(name: str, path: Path) -> Any:
    """Import a file that is in none of the folders of sys.path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class User:
    """One cluster, its client, and what the client holds."""

    def __init__(self) -> None:
        self.cluster: Any = None
        self.client: Any = None
        self.module: Any = None
        self.held: list[Any] = []

    def start(self, call: dict[str, Any], upload: str) -> dict[str, Any]:
        """Make the cluster by this call, wait for its workers, and give them the functions of tasks."""
        self.cluster = EC2Cluster(**call)
        self.client = Client(self.cluster)
        self.client.wait_for_workers(call["n_workers"], timeout=_WAIT_SECONDS)
        self.module = load(Path(upload).stem, Path(upload))
        self.client.upload_file(upload)
        return self.info()

    def info(self) -> dict[str, Any]:
        """Return the scheduler's address, and what it knows of its workers."""
        self.client.wait_for_workers(len(self.cluster.worker_spec), timeout=_WAIT_SECONDS)
        workers = self.client.scheduler_info(n_workers=-1)["workers"]
        names = ("name", "memory_limit", "local_directory", "nthreads")
        return {
            "scheduler": self.client.scheduler.address,
            "workers": {address: {name: one[name] for name in names} for address, one in workers.items()},
        }

    def hold(self, worker: str, count: int, size: int) -> int:
        """Let a worker hold so many blocks of random bytes; returns how many there are."""
        where = {"workers": [worker], "pure": False}
        blocks = [self.client.submit(self.module.block, size, **where) for _ in range(count)]
        self.held = self.client.gather(self.client.map(self.module.digest, blocks, **where)) and blocks
        self.client.get_task_stream()  # the scheduler records tasks from now on
        return len(self.held)

    def gathered(self) -> dict[str, Any]:
        """Return how many bytes the held blocks have, and the keys of those that were computed again."""
        keys = [block.key for block in self.held]
        size = sum(len(block) for block in self.client.gather(self.held))
        # Whether the first time was recorded depends on what was held before.
        computed = [one["key"] for one in self.client.get_task_stream()]
        again = [key for key in keys if computed.count(key) > 1]
        return {"bytes": size, "computed_again": again}

    def certificates(self, folder: str) -> None:
        """Write the client's certificates, as docs/how-to/ec2cluster.md has it."""
        security = self.cluster.security
        texts = {
            "ca": security.tls_ca_file, "cert": security.tls_client_cert, "key": security.tls_client_key
        }  # fmt: skip
        Path(folder).mkdir(mode=0o700, parents=True)
        for name, text in texts.items():
            Path(folder, f"{name}.pem").write_text(text)

    def release(self) -> None:
        """Hold nothing any more."""
        self.held = []

    def call(self, function: str, arguments: list[Any], workers: list[str] | None = None) -> str:
        """Run one task, and return what came of it: the name of an exception, or `done`."""
        task = self.client.submit(
            getattr(self.module, function), *arguments, pure=False, workers=workers, allow_other_workers=False
        )
        failed = task.exception()
        return type(failed).__name__ if failed is not None else "done"

    def work(self, tasks: list[dict[str, Any]], timeout: float) -> dict[str, Any]:
        """Do the tasks of a work of the experiment, and return the counts."""
        counts: dict[str, Any] = self.client.sync(
            _scheduler.work, self.client, self.module, tasks, timeout=timeout
        )
        return counts

    def close(self) -> None:
        """Close the client and the cluster."""
        self.client.close()
        self.cluster.close()


_scheduler = load("experiment_scheduler", _EXPERIMENT / "scheduler.py")


def main() -> None:
    """Do what stdin asks for until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    user = User()
    for line in sys.stdin:
        message = json.loads(line)
        result = getattr(user, message.pop("do"))(**message)
        answers.write(json.dumps({"result": result}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
