"""The planner: which runs are left, in which order; the limits of policies; the tasks; the user data."""

from __future__ import annotations

import json
import math
import os
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
from ami_builder.core.units import GIB, MIB
from ami_builder.qemu.imds import MAX_USER_DATA
from tests.experiment import tasks
from tests.experiment.cases import (
    HEADROOM,
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
from tests.experiment.layers import parse_layers
from tests.experiment.samples import case
from tests.experiment.saved import as_script
from tests.experiment.user_data import LAYERS_UNIT, user_data
from tests.fake_programs import calls, fake

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
        "layers": st.lists(st.sampled_from(["image", "off", "ttl", "ttl+protect"]), min_size=1, max_size=3),
        "repeat": st.integers(1, 5),
        "seed": st.integers(0, 10),
    }
)


@given(PLANS, st.randoms(use_true_random=False))
def test_what_was_made_is_not_made_again_and_nothing_else_moves(
    asked: dict[str, Any], random: Random
) -> None:
    whole = plan(**asked)
    assert len(set(whole)) == len(whole)
    assert len({one.name for one in whole}) == len(whole)
    kinds = math.prod(len(set(asked[name])) for name in ("memory", "policies", "work", "layers"))
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
    assert limits[LimitPolicy.MEASURED] == 7 * GIB
    assert limits[LimitPolicy.NANNY] == limits[LimitPolicy.NANNY_64] == 7 * GIB - 64 * MIB
    assert limits[LimitPolicy.NANNY_8] == 7 * GIB - 8 * MIB
    assert limits[LimitPolicy.DEFAULT] is None
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
    assert "tcp://169.254.169.2:8786" in json.dumps(worker["command"])
    for path, content in files.items():
        if path.endswith(".py"):
            compile(content, path, "exec")


@pytest.mark.parametrize(("policy", "headroom"), HEADROOM.items())
def test_dask_gets_less_than_its_cgroup_for_the_nanny(policy: LimitPolicy, headroom: int) -> None:
    shell, c, command = service(written(user_data(IMAGE, policy, "tcp://x:1")))["command"]
    # As Compose reads it: its own variables first, and `$$` is a dollar.
    command = command.replace("${AVAILABLE_MEMORY_FOR_DASK:?}", "734003200").replace("$$", "$")
    argv = [shell, c, command.replace("exec", "echo")]
    said = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert f"--memory-limit {734003200 - headroom} " in said.stdout


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
    commands = yaml.safe_load(user_data(IMAGE, policy, "tcp://x:1"))["bootcmd"]
    (script,) = [text for *_, text in commands if "/usr/local/sbin/measure-memory" in text]
    start = tmp_path / "measure-memory"
    start.write_text("reserve_bytes=7\nreserve_millipercent=0\nreserve_capped=yes\nunits='a b'\n")
    subprocess.run(["sh", "-euc", script.replace("/usr/local/sbin/measure-memory", str(start))], check=True)
    units = "'a b'" if policy.startswith(("programs", "default", "follow")) else ""
    assert start.read_text() == (
        f"reserve_bytes=0\nreserve_millipercent={percent * 1000}\nreserve_capped=\nunits={units}\n"
    )
    template = (ROOT / "packer" / "guest" / "usr" / "local" / "sbin" / "measure-memory.j2").read_text()
    assert "\nreserve_bytes=" in template
    assert "\nreserve_millipercent=" in template
    assert "\nreserve_capped=" in template
    assert "\nunits=" in template


def test_the_default_policy_is_the_image_s_own_compose_file(tmp_path: Path) -> None:
    raw = user_data(IMAGE, LimitPolicy.DEFAULT, "tcp://x:1", "image")
    worker = service(written(raw))
    assert worker["mem_limit"] == "${AVAILABLE_MEMORY_FOR_DASK:-0}"
    assert "dask worker tcp://x:1 --nworkers" in worker["command"]
    assert worker["environment"]["PYTHONPATH"] == "/experiment"
    assert "profiles" not in worker
    (settings,) = [one[2] for one in yaml.safe_load(raw)["bootcmd"] if one[:2] == ["sh", "-c"]]
    (tmp_path / "dask.env").write_text("DASK_ROLE=local\nDASK_SCHEDULER_ADDRESS=\n")
    subprocess.run(["sh", "-c", settings.replace("/etc/dask", str(tmp_path))], check=True)
    assert (tmp_path / "dask.env").read_text() == "DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS=tcp://x:1\n"


def test_the_names_of_layers() -> None:
    assert parse_layers("image") == "image"
    assert parse_layers("protect+ttl+protect") == "ttl+protect"
    assert parse_layers("ttl-500+oom-score") == "oom-score+ttl-500"
    for wrong in ("", "ttl+", "off+ttl", "ttl-0", "TTL"):
        with pytest.raises(ValueError, match="is not a layer"):
            parse_layers(wrong)
    assert case(layers="ttl+protect").name == "1024MiB-2cpu-available-ttl+protect-spikes-seed1-1"
    assert case(layers="ttl").draw == case().draw


def test_layers_are_set_before_memory_is_measured() -> None:
    def unit(policy: LimitPolicy, layers: str) -> list[str]:
        commands = yaml.safe_load(user_data(IMAGE, policy, "tcp://x:1", layers))["bootcmd"]
        (found,) = [one for one in commands if f"--unit={LAYERS_UNIT}" in one]
        assert "--property=Before=dask-memory.service" in found
        return list(found[found.index("sh") + 2 :])

    assert unit(LimitPolicy.NONE, "image") == []
    assert unit(LimitPolicy.NONE, "off") == ["off"]
    assert unit(LimitPolicy.NONE, "ttl+protect") == ["off", "ttl", "protect"]
    assert unit(LimitPolicy.MEASURED, "ttl") == ["off", "ttl", "measured"]
    assert unit(LimitPolicy.FOLLOW_1, "image") == ["follow"]
    scores = {
        layers: service(written(user_data(IMAGE, LimitPolicy.NONE, "tcp://x:1", layers))).get("oom_score_adj")
        for layers in ("off", "ttl+oom-score", "image")
    }
    assert scores == {"off": None, "ttl+oom-score": 500, "image": None}
    start = (ROOT / "packer" / "guest" / "usr" / "local" / "sbin" / "start-dask.j2").read_text()
    assert "\noom_score=" in start
    assert start.count('compare-memory" --start') == 1
    followed = service(written(user_data(IMAGE, LimitPolicy.FOLLOW_1, "tcp://x:1", "image")))
    assert "--preload-nanny /run/dask/preload/follow_limit.py" in followed["command"]


STAT = "anon 4096\nfile 999999\nkernel 100\nshmem 0\nfile_mapped 8192\nfile_dirty 7\n"


def test_layers_on_a_machine(tmp_path: Path) -> None:
    root, bin_ = tmp_path / "root", tmp_path / "bin"
    files = {
        "sys/kernel/mm/lru_gen/min_ttl_ms": "1000",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        "proc/sys/vm/watermark_scale_factor": "100",
        "proc/sys/vm/min_free_kbytes": "1000",
        "proc/meminfo": "MemTotal: 4000 kB\n",
        "sys/block/zram0/disksize": "0",
        "usr/local/sbin/measure-memory": "reserve_bytes=1\nreserve_millipercent=2000\n",
        "usr/local/sbin/start-dask": 'other=1\noom_score=500\n"/compare-memory" --start || :\n',
        "usr/local/sbin/lower-watermark": "#!/bin/sh\nfalse\n",
        "run/other": "",
    }
    units = ("ssh", "systemd-journald", "systemd-networkd", "systemd-logind", "dbus", "docker", "containerd")
    for unit in units:
        files[f"sys/fs/cgroup/system.slice/{unit}.service/memory.stat"] = STAT
        files[f"sys/fs/cgroup/system.slice/{unit}.service/cgroup.procs"] = "1\n"
    files["sys/fs/cgroup/init.scope/memory.stat"] = STAT
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    for program in ("systemctl", "systemd-run", "modprobe", "mkswap", "swapon"):
        fake(bin_, program, "")
    environment = {"PATH": f"{bin_}:{os.environ['PATH']}", "LAYERS_ROOT": str(root)}

    def set_layers(*layers: str) -> int:
        argv = ["sh", str(Path(tasks.__file__).with_name("layers.sh")), *layers]
        return subprocess.run(argv, env=environment, check=False).returncode

    def read(path: str) -> str:
        return (root / path).read_text().strip()

    assert set_layers("off") == 0
    assert read("sys/kernel/mm/lru_gen/min_ttl_ms") == "0"
    assert read("sys/kernel/mm/transparent_hugepage/enabled") == "always"
    assert read("usr/local/sbin/lower-watermark") == "#!/bin/sh"
    assert read("usr/local/sbin/start-dask") == 'other=1\noom_score=0\n"/compare-memory" --start || :'
    assert read("run/ami-builder-layers") == "off"
    (root / "run/ami-builder-layers").unlink()
    assert set_layers("off", "ttl-500", "protect", "min-free", "zram", "madvise", "measured") == 0
    assert read("sys/kernel/mm/lru_gen/min_ttl_ms") == "500"
    assert read("proc/sys/vm/min_free_kbytes") == "4000"
    assert read("sys/block/zram0/disksize") == str(4000 * 1024 // 4)
    assert read("usr/local/sbin/measure-memory") == "reserve_bytes=57344\nreserve_millipercent=0"
    assert calls(bin_, "systemctl") == [
        *(f"set-property --runtime {unit}.service MemoryMin=12388" for unit in units),
        "set-property --runtime system.slice MemoryMin=86716",
    ]
    assert set_layers("protect-all", "low-free") == 0
    assert read("proc/sys/vm/min_free_kbytes") == "62"
    assert read("sys/fs/cgroup/init.scope/memory.min") == "12388"
    (root / "run/ami-builder-layers").unlink()
    assert set_layers("follow") == 0
    started = ': >"$state/follows"; "/compare-memory" --start || :'
    assert read("usr/local/sbin/start-dask").splitlines()[-1] == started
    assert calls(bin_, "systemd-run")[0].endswith("/compare-memory --follow")
    (root / "run/ami-builder-layers").unlink()
    assert set_layers("off", "other") == 2
    assert not (root / "run/ami-builder-layers").exists()


def test_user_data_as_a_script_for_a_saved_vm(tmp_path: Path) -> None:
    content = "it's `one`\n$two\n"
    config = {
        "bootcmd": [["cp", f"{tmp_path}/a/file", f"{tmp_path}/copy"]],
        "write_files": [{"path": f"{tmp_path}/a/file", "content": content}],
    }
    fake(tmp_path / "bin", "systemctl", "")
    fake(tmp_path / "bin", "touch", "")
    script = as_script(f"#cloud-config\n{json.dumps(config)}".encode())
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    subprocess.run(["sh", "-s"], input=script, text=True, env=environment, check=True)
    assert (tmp_path / "copy").read_text() == content
    assert calls(tmp_path / "bin", "systemctl")[-1].endswith("dask-memory.service dask.service")


def test_a_case_is_a_key() -> None:
    assert case() == Case(
        memory=GIB, cpus=2, policy=LimitPolicy.AVAILABLE, work=Work.SPIKES, repeat=1, seed=1
    )
    assert case().name == "1024MiB-2cpu-available-spikes-seed1-1"
