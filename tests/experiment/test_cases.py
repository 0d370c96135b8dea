"""The planner: which runs are left, in which order; the limits of policies; the tasks; the user data."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.config import loading
from ami_builder.core.units import GIB, MIB, Reserve
from ami_builder.qemu.imds import MAX_USER_DATA
from tests.experiment import tasks
from tests.experiment.cases import (
    DEFAULT,
    NANNY_HEADROOM,
    RESERVE_PERCENT,
    Case,
    LimitPolicy,
    Work,
    expected_limit,
    fraction_limit,
    gke_limit,
    left,
    plan,
)
from tests.experiment.samples import case
from tests.experiment.user_data import user_data

if TYPE_CHECKING:
    from random import Random

ROOT = Path(__file__).resolve().parents[2]
IMAGE = loading.load(ROOT / "ami-builder.toml", environ={}, overrides={}).select()

PLANS = st.fixed_dictionaries(
    {
        "memory": st.lists(st.sampled_from([GIB, 2 * GIB, 4 * GIB]), min_size=1, max_size=3),
        "cpus": st.integers(1, 4),
        "policies": st.lists(st.sampled_from(LimitPolicy), min_size=1, max_size=4),
        "work": st.lists(st.sampled_from(Work), min_size=1, max_size=4),
        "repeat": st.integers(1, 5),
        "seed": st.integers(0, 10),
    }
)


def test_the_default_policy_is_the_image_s_default() -> None:
    assert IMAGE.memory.reserve == Reserve(percent=RESERVE_PERCENT[DEFAULT])


@given(PLANS, st.randoms(use_true_random=False))
def test_what_was_made_is_not_made_again_and_nothing_else_moves(
    asked: dict[str, Any], random: Random
) -> None:
    whole = plan(**asked)
    assert len(set(whole)) == len(whole)
    assert len({one.name for one in whole}) == len(whole)
    kinds = len(set(asked["memory"])) * len(set(asked["policies"])) * len(set(asked["work"]))
    assert len(whole) == kinds * asked["repeat"]
    assert [one.repeat for one in whole] == sorted(one.repeat for one in whole)
    made = random.sample(whole, random.randint(0, len(whole)))
    assert left(whole, made) == tuple(one for one in whole if one not in made)
    assert left(whole, whole) == ()


@given(PLANS)
def test_more_repeats_add_runs_at_the_end(asked: dict[str, Any]) -> None:
    more = plan(**(asked | {"repeat": asked["repeat"] + 1}))
    assert more[: len(plan(**asked))] == plan(**asked)


def test_the_seed_decides_the_order_and_the_work() -> None:
    def order(seed: int) -> list[tuple[LimitPolicy, Work]]:
        found = plan(memory=[GIB], cpus=2, policies=list(LimitPolicy), work=list(Work), repeat=1, seed=seed)
        return [(one.policy, one.work) for one in found]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert case(policy=LimitPolicy.NONE).draw == case(policy=LimitPolicy.GKE).draw
    assert len({case(seed=s, repeat=r).draw for s in (1, 2) for r in (1, 2)}) == 4


def test_the_limits_of_the_formulas() -> None:
    # 25 % of 4 GiB, 20 % of 4, 10 % of 8, and 100 MiB.
    assert gke_limit(4 * GIB) == 3 * GIB - 100 * MIB
    # The documentation says 2.6 GiB of 16 GiB.
    assert abs(16 * GIB - 100 * MIB - gke_limit(16 * GIB) - 2.6 * GIB) < 2 * 4096
    assert gke_limit(1000 * MIB) == (1000 - 255 - 100) * MIB
    assert fraction_limit(100 * MIB) == 95 * MIB


@given(st.integers(512 * MIB, 300 * GIB))
def test_limits_are_pages_below_the_total(total: int) -> None:
    for limit in (gke_limit(total), fraction_limit(total)):
        assert 0 < limit < total
        assert limit % 4096 == 0


def test_the_limit_that_dask_has_to_have() -> None:
    limits = {policy: expected_limit(policy, total=8 * GIB, measured=7 * GIB) for policy in LimitPolicy}
    assert limits[LimitPolicy.NONE] == 8 * GIB
    assert (
        limits[LimitPolicy.AVAILABLE]
        == limits[LimitPolicy.DASK_ONLY]
        == limits[LimitPolicy.HEADROOM]
        == 7 * GIB
    )
    assert limits[LimitPolicy.NANNY] == 7 * GIB - NANNY_HEADROOM
    assert limits[LimitPolicy.FRACTION] == fraction_limit(8 * GIB)
    assert limits[LimitPolicy.GKE] == gke_limit(8 * GIB)


MACHINE = tasks.Memory(total=980 * MIB, available=740 * MIB)


@pytest.mark.parametrize("work", Work)
def test_the_tasks_of_each_work(work: Work) -> None:
    found = tasks.tasks(case(work=work), MACHINE)
    assert found == tasks.tasks(case(work=work, policy=LimitPolicy.NONE), MACHINE)
    known: set[str] = set()
    functions = {
        line.split("(")[0].removeprefix("def ")
        for line in Path(tasks.__file__).with_name("work.py").read_text().splitlines()
        if line.startswith("def ")
    }
    for task in found:
        assert set(task.after) <= known
        assert task.key not in known
        assert task.function in functions
        known.add(task.key)
    json.dumps([task.arguments for task in found])


def test_five_percent_of_the_tasks_spike_into_the_zone() -> None:
    kinds = Counter(task.function for task in tasks.tasks(case(), MACHINE))
    assert kinds == {"ordinary": 190, "spike": 10}
    targets = [task.arguments[1] for task in tasks.tasks(case(), MACHINE) if task.function == "spike"]
    assert all(isinstance(t, int) and 0.95 * MACHINE.available - 1 <= t <= MACHINE.total for t in targets)
    assert tasks.tasks(case(repeat=2), MACHINE) != tasks.tasks(case(), MACHINE)


def test_the_control_ends_about_as_many_workers_and_takes_no_memory() -> None:
    spikes, control = (tasks.tasks(case(work=work), MACHINE) for work in (Work.SPIKES, Work.RESTARTS))
    over = [t for t in spikes if t.function == "spike" and int(t.arguments[1]) > MACHINE.available]
    kinds = Counter(task.function for task in control)
    assert kinds.keys() == {"ordinary", "end"}
    assert kinds.total() == len(spikes)
    assert abs(kinds["end"] - len(over)) <= 2
    assert {task.arguments[-2:] for task in control} == {task.arguments[-2:] for task in spikes}


def test_a_worker_of_the_control_ends_once(tmp_path: Path) -> None:
    seen = str(tmp_path / "seen")
    program = f"from tests.experiment import work; work.SEEN = {seen!r}; work.end('x', 4096, 0.01)"
    ended = [subprocess.run([sys.executable, "-c", program], check=False).returncode for _ in range(2)]
    assert ended == [-signal.SIGKILL, 0]


def test_the_array_and_the_matrices_are_larger_than_memory() -> None:
    for work, times in ((Work.ARRAY, 2.4), (Work.MATRIX, 1.5)):
        found = tasks.tasks(case(work=work), MACHINE)
        sizes = [int(task.arguments[0]) for task in found if task.function == "block"]
        assert sum(sizes) > times * MACHINE.total
    # 16 products of 4 parts each: 64 parts, and 3 sums of each 4.
    functions = Counter(task.function for task in tasks.tasks(case(work=Work.MATRIX), MACHINE))
    assert functions == {"block": 32, "multiply": 64 + 48}


def test_only_w5_has_an_agent() -> None:
    assert [work for work in Work if tasks.agent(work, MACHINE)] == [Work.AGENT]


def written(raw: bytes) -> dict[str, str]:
    """Return the files of a cloud-config, by their paths."""
    return {one["path"]: one["content"] for one in yaml.safe_load(raw)["write_files"]}


def service(files: dict[str, str]) -> dict[str, Any]:
    """Return the one service of the Compose file among them."""
    (found,) = yaml.safe_load(files["/etc/dask/compose.yaml"])["services"].values()
    return dict(found)


@pytest.mark.parametrize("policy", LimitPolicy)
def test_the_user_data_is_what_ec2_takes_and_cloud_init_and_compose_read(policy: LimitPolicy) -> None:
    raw = user_data(IMAGE, policy, "tcp://169.254.169.2:8786")
    assert len(raw) < MAX_USER_DATA
    assert raw.startswith(b"#cloud-config\n")
    files = written(raw)
    worker = service(files)
    assert worker["mem_limit"] == worker["memswap_limit"]
    assert (worker["mem_limit"] == "0") == (policy in (LimitPolicy.NONE, LimitPolicy.DASK_ONLY))
    assert "tcp://169.254.169.2:8786" in " ".join(worker["command"]).split()
    for path, content in files.items():
        if path.endswith(".py"):
            compile(content, path, "exec")


def test_dask_is_told_less_than_its_cgroup_has_for_the_nanny() -> None:
    shell, c, command = service(written(user_data(IMAGE, LimitPolicy.NANNY, "tcp://x:1")))["command"]
    # As Compose reads it: its own variables first, and `$$` is a dollar.
    command = command.replace("${AVAILABLE_MEMORY_FOR_DASK:?}", "734003200").replace("$$", "$")
    argv = [shell, c, command.replace("exec", "echo")]
    said = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert f"--memory-limit {734003200 - NANNY_HEADROOM} " in said.stdout


@pytest.mark.parametrize("total_kb", [1003912, 2030000, 8130000, 16380000, 264000000])
@pytest.mark.parametrize("policy", [LimitPolicy.FRACTION, LimitPolicy.GKE])
def test_the_machine_computes_what_we_expect(policy: LimitPolicy, total_kb: int, tmp_path: Path) -> None:
    told = yaml.safe_load(user_data(IMAGE, policy, "tcp://x:1"))
    (script,) = [one[2] for one in told["bootcmd"] if one[:2] == ["sh", "-c"]]
    (tmp_path / "meminfo").write_text(f"MemTotal:       {total_kb} kB\nMemFree: 1 kB\n")
    script = script.replace("/proc/meminfo", f"{tmp_path}/meminfo")
    script = script.replace("/etc/dask/dask.env", f"{tmp_path}/dask.env")
    subprocess.run(["sh", "-euc", script], check=True)
    limit = expected_limit(policy, total=total_kb * 1024, measured=0)
    assert (tmp_path / "dask.env").read_text() == f"EXPERIMENT_LIMIT={limit}\n"


@pytest.mark.parametrize(("policy", "percent"), RESERVE_PERCENT.items())
def test_what_a_policy_leaves_is_what_memory_reserve_takes_off(
    policy: LimitPolicy, percent: int, tmp_path: Path
) -> None:
    told = yaml.safe_load(user_data(IMAGE, policy, "tcp://x:1"))
    (script,) = [one[2] for one in told["bootcmd"] if one[:2] == ["sh", "-c"]]
    start = tmp_path / "measure-memory"
    start.write_text("reserve_bytes=7\nreserve_millipercent=0\nother=1\n")
    subprocess.run(["sh", "-euc", script.replace("/usr/local/sbin/measure-memory", str(start))], check=True)
    assert start.read_text() == f"reserve_bytes=0\nreserve_millipercent={percent * 1000}\nother=1\n"
    template = (ROOT / "packer" / "guest" / "usr" / "local" / "sbin" / "measure-memory.j2").read_text()
    assert "\nreserve_bytes=" in template
    assert "\nreserve_millipercent=" in template


def test_a_case_is_a_key() -> None:
    assert case() == Case(
        memory=GIB, cpus=2, policy=LimitPolicy.AVAILABLE, work=Work.SPIKES, repeat=1, seed=1
    )
    assert case().name == "1024MiB-2cpu-available-spikes-seed1-1"
