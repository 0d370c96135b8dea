"""What scenarios look at on a cluster's machines, and what they ask of its scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ami_builder.core.errors import TimedOut
from ami_builder.system import processes
from tests.experiment import work
from tests.experiment.scheduler import load
from tests.vm.conftest import DASK_SECONDS, ROOT, environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distributed import Client

    from ami_builder.system.ssh import Session
    from tests.vm.instances import Instances

WORK = "ami_builder_work"
"""The name of tests/experiment/work.py on workers."""
BLOCK = 32 << 20
"""Bytes of what `spill` gives a worker."""
_LIMITS = """
sed -n 's/^AVAILABLE_MEMORY_FOR_DASK=/variable /p' /run/dask/memory.env
id=$(docker ps -q --no-trunc | head -n 1)
docker inspect -f 'docker {{.HostConfig.Memory}}' "$id"
echo memory_max $(cat /sys/fs/cgroup/system.slice/docker-$id.scope/memory.max | sed s/max/-1/)
"""
_KILLS = "journalctl -k -b -o short-monotonic --no-pager"


def limits(session: Session) -> dict[str, int]:
    """Return the variable, what Docker was asked for, and memory.max of a machine's one container; bytes."""
    words = session.run(_LIMITS, sudo=True, timeout=DASK_SECONDS).stdout.split()
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def health(session: Session) -> list[str]:
    """Return the lines of /run/dask/health; none while there is no such file."""
    return session.run("cat /run/dask/health", check=False, timeout=DASK_SECONDS).stdout.splitlines()


def spill_folder(session: Session) -> dict[str, Any]:
    """Return where the spill folder is, and how many bytes are in it."""
    found = session.run(
        "findmnt -n -o SOURCE,FSTYPE --target /var/lib/dask/spill; du -sb /var/lib/dask/spill",
        sudo=True, timeout=DASK_SECONDS,
    ).stdout.split()  # fmt: skip
    return {"source": found[0], "type": found[1], "bytes": int(found[2])}


def spill(there: Instances, client: Client, machine: str, worker: str, module: Any) -> dict[str, Any]:
    """Give one worker a third more blocks than its limit, and return where they are."""
    limit = int(client.scheduler_info(n_workers=-1)["workers"][worker]["memory_limit"])
    count = limit * 4 // 3 // BLOCK
    blocks = [client.submit(module.block, BLOCK, key=f"block-{n}", workers=[worker]) for n in range(count)]
    client.gather([client.submit(module.digest, one, workers=[worker]) for one in blocks])
    with there.session(machine) as session:
        return {**spill_folder(session), "held": count * BLOCK}


def kernel_log(session: Session) -> str:
    """Return the kernel's log of this boot, for core.oom."""
    return session.run(_KILLS, sudo=True, timeout=DASK_SECONDS).stdout


def workers(client: Client, count: int, seconds: float = 1800.0) -> dict[str, dict[str, Any]]:
    """Return address -> what the scheduler knows of each worker, once there are so many."""

    def there() -> dict[str, dict[str, Any]] | None:
        found = client.scheduler_info(n_workers=-1)["workers"]
        return dict(found) if len(found) == count else None

    return processes.wait_until(there, what=f"{count} workers", timeout=seconds, interval=2)


def load_work(client: Client) -> Any:
    """Send the experiment's functions to all workers and return their module.

    Functions of a module are pickled by name: another Python's byte code may not run in the container.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"{WORK}.py"
        copy.write_text(Path(work.__file__).read_text())
        client.upload_file(str(copy))
        return load(WORK, str(copy))


def announce_interruption(there: Instances, machine: str, seconds: float = 600.0) -> None:
    """Announce in a machine's metadata that EC2 terminates it in so many seconds."""
    end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
    action = json.dumps({"action": "terminate", "time": end})
    there.metadata(machine).tree.announce("spot/instance-action", action)


def interrupt(there: Instances, machine: str) -> float:
    """Announce a machine's end, wait until it has ended by itself, and return after how many seconds."""
    began = time.monotonic()
    announce_interruption(there, machine)
    processes.wait_until(
        lambda: machine not in there.running(), what="the end of the machine", timeout=600, interval=1
    )
    return round(time.monotonic() - began, 1)


def left(there: Instances, before: Mapping[str, list[str]], seconds: float = 300.0) -> dict[str, list[str]]:
    """Return what the account has that it had not `before`, once machines have ended: kind -> ids."""

    def found() -> dict[str, list[str]]:
        now = {kind: sorted(set(ids) - set(before.get(kind, ()))) for kind, ids in there.cloud.left().items()}
        return {kind: ids for kind, ids in now.items() if ids}

    with suppress(TimedOut):
        processes.wait_until(lambda: not found(), what="the end of all machines", timeout=seconds, interval=1)
    return found()


def doctor(address: str, *more: str) -> dict[str, Any]:
    """Return what `ami-builder doctor --json` says of a cluster, with its exit status."""
    argv = [sys.executable, "-m", "ami_builder", "doctor", address, "--timeout", "5min", "--json", *more]
    done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    return {**json.loads(done.stdout or "{}"), "status": done.returncode}


def is_refused(address: str) -> bool:
    """Return whether a client without TLS gets no answer from a scheduler."""
    plain = address.rpartition("/")[2]
    program = (
        "import sys; from distributed import Client, Security\n"
        "try: Client('tcp://' + sys.argv[1], timeout='20s', security=Security(require_encryption=False))\n"
        "except Exception: sys.exit(0)\n"
        "sys.exit(1)"
    )
    argv = [sys.executable, "-c", program, plain]
    done = subprocess.run(argv, env=_without_dask(), capture_output=True, check=False, timeout=300)
    return done.returncode == 0


def _without_dask() -> dict[str, str]:
    return {key: value for key, value in environment().items() if not key.startswith("DASK_")}


def same_limits(found: Sequence[Mapping[str, int]]) -> bool:
    """Return whether variable, memory.max and the worker's limit are equal to the byte on each machine."""
    return bool(found) and all(
        one["variable"] == one["memory_max"] == one["worker"] > 0 and one["docker"] in (0, one["variable"])
        for one in found
    )


def launcher_row(launcher: str, found: Mapping[str, Any]) -> str:
    """Return a launcher's row of the table in docs/explanation/launchers.md."""
    each, spot, spill = found["limits"], found["spot"], found["spill"]
    lost = f"{len(spot['computed_again'])} of {spot['of']}"
    cells = (
        launcher,
        f"{sum(same_limits([one]) for one in each)} of {len(each)}",
        "yes" if found["refused"] else "no",
        f"{lost} results computed again, left after {spot['seconds']:.0f} s",
        f"{spill['type']} on {spill['source']}",
        found["replaced"],
    )
    return f"| {' | '.join(cells)} |"
