"""What the layers of defence cost: `python -m tests.benchmarks layers`

One VM of 1 GiB boots once. A container of the default limit does the work with the layers and
without them in turns: the limit is the same for both, and the runs of a pair are minutes apart. The worker is
smaller than the experiment's. It has one thread, so that its tasks always have the same order.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ami_builder.core.units import GIB, MIB
from tests.experiment.cases import Case, LimitPolicy, Work
from tests.experiment.layers import IMAGE, OFF, OOM_SCORE_ADJ
from tests.experiment.tasks import Memory, tasks
from tests.vm.conftest import ROOT, Booted, booted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ami_builder.config.schema import Image

WORKS = (Work.ARRAY, Work.MATRIX)
PAIRS = 6
BESIDE_WORKER = 150 * MIB
"""For the scheduler, the client and the nanny, which are in the same container here."""
_FILES = ("tests/layered_work.py", "tests/experiment/work.py")
_TTL = "/sys/kernel/mm/lru_gen/min_ttl_ms"
_FREE = "/proc/sys/vm/min_free_kbytes"
_SET = {
    IMAGE: f"echo 1000 >{_TTL}; lower-watermark",
    # Whatever is written here, the kernel computes again what it keeps free.
    OFF: f"echo 0 >{_TTL}; echo always >/sys/kernel/mm/transparent_hugepage/enabled",
}
_PREPARE = """
until dask-health; do sleep 1; done
systemctl stop dask dask-health.timer
sed -n 's/^AVAILABLE_MEMORY_FOR_DASK=//p' /run/dask/memory.env
"""
_REST = "sync; echo 3 >/proc/sys/vm/drop_caches"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One work without the layers and with them: seconds, and seconds in which the VM's processors worked."""

    off: tuple[float, float]
    on: tuple[float, float]


def measure(
    image: Image, disk: Path, directory: Path, works: Sequence[Work] = WORKS, count: int = PAIRS
) -> Mapping[Work, Sequence[Pair]]:
    """Return the pairs of each work; who begins changes each time."""
    pairs: dict[Work, list[Pair]] = {work: [] for work in works}
    with booted(image, disk, directory, memory=GIB) as machine:
        limit = int(machine.root(_PREPARE).split()[-1])
        worker = limit - BESIDE_WORKER
        for name in _FILES:
            text = (ROOT / name).read_text()
            machine.session.run(f"mkdir -p /run/{Path(name).parent}; cat >/run/{name}", sudo=True, stdin=text)
        for work in works:
            case = Case(memory=GIB, cpus=2, policy=LimitPolicy.DEFAULT, work=work, repeat=1, seed=1)
            given = [dataclasses.asdict(task) for task in tasks(case, Memory(total=worker, available=worker))]
            machine.session.run("cat >/run/tasks.json", sudo=True, stdin=json.dumps(given))
            _work(
                machine, image, IMAGE, limit, worker
            )  # the first is slower: programs are read from the disk
            for turn in range(count):
                order = (OFF, IMAGE) if turn % 2 else (IMAGE, OFF)
                found = {layers: _work(machine, image, layers, limit, worker) for layers in order}
                pairs[work].append(Pair(off=found[OFF], on=found[IMAGE]))
    return pairs


def _work(machine: Booted, image: Image, layers: str, limit: int, worker: int) -> tuple[float, float]:
    score = f"--oom-score-adj {OOM_SCORE_ADJ}" if layers == IMAGE else ""
    run = f"docker run --rm --interactive --memory {limit} {score} --volume /run/tests:/work/tests:ro"
    run = f"{run} --workdir /work {image.container.reference} python -m tests.layered_work {worker}"
    text = machine.root(f"set -e; {_SET[layers]}; {_REST}; cat {_TTL} {_FREE} >&2; {run} </run/tasks.json")
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    assert found["done"] == found["of"], found
    sys.stderr.write(f"{layers}: {found}\n")
    return found["seconds"], found["busy"]


def costs(pairs: Sequence[Pair], which: int) -> tuple[float, float, float]:
    """Return the median of what the layers add, and its quartiles, as shares of the time without them.

    `which` is 0 for the time, 1 for the processors'.
    """
    added = [pair.on[which] / pair.off[which] - 1 for pair in pairs]
    low, middle, high = statistics.quantiles(added, n=4, method="inclusive")
    return middle, low, high
