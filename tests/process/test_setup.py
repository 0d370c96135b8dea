"""The scripts that set up a machine, against fake programs: nothing is installed and no network is used."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ami_builder.system import processes
from tests.fake_programs import calls, fake
from tests.process.conftest import APT_GET, Checkout

ROOT = Path(__file__).parents[2]


def tree(root: Path) -> set[Path]:
    return set(root.rglob("*"))


def test_a_bare_machine_gets_everything_and_hears_of_it(checkout: Checkout) -> None:
    status, out, err = checkout.run("build")
    assert (status, out) == (0, "<build>\n")
    assert "installing system packages: packer qemu-utils\n" in err
    assert "making the virtual environment (.venv)" in err
    assert "installing Python packages (1, pinned by scripts/requirements.txt)" in err
    [installed] = [line for line in checkout.calls("apt-get") if " install " in line]
    assert "--no-install-recommends" in installed
    assert installed.endswith(" install packer qemu-utils")
    [pip] = [line for line in calls(checkout.venv / "bin", "python") if "pip install" in line]
    assert "--require-hashes" in pip
    assert (checkout.venv / "lib/ami-builder.pth").read_text() == f"{checkout.root}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "--target", "aws"),
        ("nightly", "--target=aws"),
        ("verify", "ami-0123"),
    ],
)
def test_it_installs_what_boots_vms_only_for_local_images(
    checkout: Checkout, arguments: tuple[str, ...]
) -> None:
    status, _, err = checkout.run(*arguments)
    assert status == 0
    assert "installing system packages: packer\n" in err
    checkout.forget()
    assert checkout.run(*arguments)[2] == ""
    assert "installing system packages: qemu-utils\n" in checkout.run("--debug", "build")[2]


@pytest.mark.parametrize(
    ("host", "packages"),
    [("x86_64", "qemu-utils"), ("aarch64", "qemu-utils arm64-firmware"), ("riscv64", "qemu-utils")],
)
def test_each_architecture_gets_its_own_emulator(checkout: Checkout, host: str, packages: str) -> None:
    checkout.environ["HOSTTYPE"] = host
    assert f"installing system packages: packer {packages}\n" in checkout.run("build")[2]


@pytest.mark.parametrize("arguments", [("report",), ("gc", "--apply"), ("--version",), ()])
def test_what_boots_nothing_needs_python_alone(checkout: Checkout, arguments: tuple[str, ...]) -> None:
    status, _, err = checkout.run(*arguments)
    assert status == 0
    assert "installing Python packages" in err
    assert checkout.calls("apt-get") == []


def test_the_second_run_does_nothing_but_run(checkout: Checkout) -> None:
    checkout.run("build")
    checkout.forget()
    assert checkout.run("list") == (0, "<list>\n", "")
    assert checkout.calls("apt-get") + checkout.calls("apt-cache") + checkout.calls("python3") == []


def test_no_temporary_files_stay(checkout: Checkout) -> None:
    checkout.run("build")
    assert {path.name for path in checkout.root.parent.iterdir()} == {"bin", "check out"}


def test_arguments_and_status_are_passed_on_unchanged(checkout: Checkout) -> None:
    checkout.environ["STATUS"] = "5"
    arguments = ["verify", "two words", "", "*", "it's", 'a "quote"', "--flag=$HOME", "back\\slash"]
    status, out, _ = checkout.run(*arguments)
    assert (status, out) == (5, "".join(f"<{argument}>\n" for argument in arguments))


def test_it_runs_through_links_and_from_the_environment(checkout: Checkout, tmp_path: Path) -> None:
    checkout.run("build")
    link = tmp_path / "link"
    link.symlink_to(checkout.root / "scripts/ami-builder")
    for script in (str(link), ".venv/bin/ami-builder"):
        assert checkout.run("list", script=script) == (0, "<list>\n", "")


@pytest.mark.parametrize("absent", ["qemu-utils", "packer qemu-utils"])
def test_it_stops_before_anything_is_changed_where_a_package_does_not_exist(
    checkout: Checkout, absent: str
) -> None:
    checkout.environ["NO_PACKAGE"] = absent
    before = tree(checkout.root)
    status, out, err = checkout.run("build")
    assert (status, out) == (3, "")
    assert "Nothing has been changed" in err
    assert "\n  qemu-utils\n" in err
    assert "README.md" in err
    assert ("this fetches it from HashiCorp" in err) == ("packer" in absent)
    assert not [line for line in checkout.calls("apt-get") if "install" in line]
    assert all("Dir::State::lists=" in line for line in checkout.calls("apt-get"))
    assert tree(checkout.root) == before


def test_without_apt_it_stops_and_names_what_is_missing(checkout: Checkout) -> None:
    for name in ("apt-get", "apt-cache", "uname"):
        (checkout.bin / name).unlink()
    fake(checkout.bin, "uname", "echo Darwin")
    checkout.environ["OLD_PYTHON"] = "yes"
    status, _, err = checkout.run("build")
    assert status == 3
    assert "macOS has no package for them. Nothing has been changed." in err
    assert "Packer is not among them" in err
    assert "\n  python3\n" in err
    assert "ami-builder build --target aws" in err
    assert not checkout.venv.exists()


def test_a_packer_that_was_installed_by_hand_counts(checkout: Checkout) -> None:
    checkout.environ["NO_PACKAGE"] = "packer"
    fake(checkout.bin, "packer", "")
    status, _, err = checkout.run("build")
    assert status == 0
    assert "installing system packages: qemu-utils\n" in err


def test_lists_are_fetched_only_when_a_package_is_unknown(checkout: Checkout) -> None:
    checkout.run("build")
    assert not [line for line in checkout.calls("apt-get") if line.endswith(" update")]


def test_sudo_is_used_only_by_others_than_root(checkout: Checkout) -> None:
    fake(checkout.bin, "id", "echo 1000")
    fake(checkout.bin, "sudo", 'while [ "$1" != env ]; do shift; done; exec "$@"')
    assert checkout.run("build")[0] == 0
    assert len(checkout.calls("sudo")) == 1


def test_without_sudo_it_says_what_root_has_to_do(checkout: Checkout) -> None:
    fake(checkout.bin, "id", "echo 1000")
    status, _, err = checkout.run("build")
    assert status == 3
    assert "As root: apt-get install --no-install-recommends packer qemu-utils" in err
    assert checkout.calls("apt-get") == []


def test_stale_lists_are_fetched_anew_once_and_then_apt_is_quoted(checkout: Checkout) -> None:
    checkout.environ["APT_BROKEN"] = "yes"
    status, _, err = checkout.run("build")
    assert status == 3
    assert "| E: Unable to fetch some archives" in err
    assert "proxy is set" in err
    kinds = [
        re.findall(r"install|update", line.replace("no-install", ""))[0] for line in checkout.calls("apt-get")
    ]
    assert kinds == ["install", "update", "install"]


def test_without_lists_and_network_apt_is_quoted(checkout: Checkout) -> None:
    checkout.environ |= {"NO_PACKAGE": "packer qemu-utils", "APT_OFFLINE": "yes"}
    before = tree(checkout.root)
    status, _, err = checkout.run("build")
    assert status == 3
    assert "APT failed. Nothing has been changed." in err
    assert "| E: Could not resolve the mirror" in err
    assert tree(checkout.root) == before


def test_an_interrupted_set_up_heals(checkout: Checkout) -> None:
    checkout.environ["OFFLINE"] = "yes"
    status, _, err = checkout.run("build")
    assert status == 3
    assert "| pip: the network is down" in err
    assert "Check that this machine is online" in err
    (checkout.venv / "lib/half").touch()
    del checkout.environ["OFFLINE"]
    status, _, err = checkout.run("build")
    assert status == 0
    assert "making the virtual environment" in err
    assert not (checkout.venv / "lib/half").exists()
    assert checkout.run("build")[2] == ""


def test_an_environment_whose_python_is_gone_is_made_anew(checkout: Checkout) -> None:
    checkout.run("build")
    (checkout.venv / "bin/python").unlink()
    (checkout.venv / "bin/python").symlink_to("/nonexistent/python3.11")
    assert "making the virtual environment" in checkout.run("build")[2]
    assert checkout.run("build")[2] == ""


def test_a_copied_checkout_does_not_run_the_old_one(checkout: Checkout) -> None:
    checkout.run("build")
    copy = checkout.root.parent / "copy"
    shutil.copytree(checkout.root, copy, symlinks=True)
    moved = Checkout(copy, checkout.bin)
    assert "making the virtual environment" in moved.run()[2]
    assert (copy / ".venv/lib/ami-builder.pth").read_text() == f"{copy}\n"


def test_an_environment_that_the_user_made_is_kept(checkout: Checkout) -> None:
    (checkout.venv / "bin").mkdir(parents=True)
    (checkout.venv / "lib").mkdir()
    shutil.copy2(checkout.bin / "python3", checkout.venv / "bin/python")
    for name in ("bin/pip", "mine"):
        (checkout.venv / name).touch()
    status, _, err = checkout.run("build")
    assert status == 0
    assert "making the virtual environment" not in err
    assert (checkout.venv / "mine").exists()


def test_a_new_lock_is_installed_into_the_same_environment(checkout: Checkout) -> None:
    checkout.run("build")
    (checkout.root / "scripts/requirements.txt").write_text("rich==2\n")
    status, _, err = checkout.run("build")
    assert status == 0
    assert err == "==> installing Python packages (1, pinned by scripts/requirements.txt)\n"


@pytest.mark.parametrize("named", [{}, {"PYTHON": "python3"}])
def test_an_old_python_stops_it(checkout: Checkout, named: dict[str, str]) -> None:
    checkout.environ |= {"OLD_PYTHON": "yes"} | named
    status, _, err = checkout.run("build")
    assert status == 3
    assert "Python 3.11 or newer is necessary, and python3 is not. Nothing has been changed." in err
    assert checkout.calls("apt-get") == []


def test_debians_split_venv_module_is_installed(checkout: Checkout) -> None:
    checkout.environ["NO_VENV"] = "yes"
    assert "installing system packages: packer qemu-utils python3.12-venv\n" in checkout.run("build")[2]


def test_two_set_ups_at_once_wait_for_each_other(checkout: Checkout) -> None:
    lock = os.open(checkout.root, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = checkout.command("scripts/ami-builder", "list")
    assert process.stderr is not None
    assert process.stderr.readline() == "==> waiting for another set-up in this folder\n"
    assert not checkout.venv.exists()
    os.close(lock)
    out, err = process.communicate(timeout=60)
    assert out == "<list>\n"
    assert "making the virtual environment" in err


def test_the_test_command_unpacks_what_would_start_a_service(checkout: Checkout) -> None:
    fake(checkout.bin, "dpkg-deb", 'mkdir -p "$3/usr/bin" && ln -s /bin/true "$3/usr/bin/docker-registry"')
    downloads = APT_GET.replace("case", 'case "$*" in *download*) touch docker-registry.deb ;; esac\ncase')
    fake(checkout.bin, "apt-get", downloads + 'ln -sf /bin/true "$(dirname "$0")/shfmt"\n')
    status, _, err = checkout.run("tests/unit", "-k", "two words", script="scripts/test")
    assert status == 99, "the fake has no pytest"
    assert "installing system packages: packer qemu-utils shfmt\n" in err
    assert "unpacking into .cache/tools: docker-registry\n" in err
    assert "unexpected: -m pytest tests/unit -k two words" in err
    assert not [line for line in checkout.calls("apt-get") if "install" in line and "docker-registry" in line]
    # What the tests need holds all that the program needs.
    assert checkout.run("list") == (0, "<list>\n", "")


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    for name in ("packer", "qemu-img", "shfmt", "docker-registry", "shellcheck"):
        fake(checkout.bin, name, "")
    checkout.run(script="scripts/test")
    for name in ("ruff", "mypy", "lint-imports", "check-jsonschema", "codespell", "zensical"):
        fake(checkout.venv / "bin", name, "")
    return checkout


def test_linters_all_run_even_if_one_fails(ready: Checkout) -> None:
    for name in ("packer", "tests/experiment", ".ci", "docs"):
        (ready.root / name).mkdir(parents=True, exist_ok=True)
    (ready.root / "zensical.toml").touch()
    fake(ready.venv / "bin", "mypy", "exit 1")
    status, _, err = ready.run(script="scripts/lint")
    assert status == 1
    assert err.endswith("==> failed: mypy\n")
    assert any("scripts/lib/setup.sh" in line for line in ready.calls("shellcheck"))
    assert [line for line in ready.calls("packer") if line.startswith("fmt -check")]
    assert ready.run("ruff", script="scripts/lint")[0] == 0
    assert ready.run("nonsense", script="scripts/lint")[0] == 1


def test_commit_hooks_install_nothing(checkout: Checkout) -> None:
    status, _, err = checkout.run("--no-setup", "docs", script="scripts/lint")
    assert status == 0
    assert "skipped" in err
    assert not checkout.calls("apt-get")
    assert not checkout.venv.exists()


def test_a_failing_linter_ends_the_tests_at_once(ready: Checkout) -> None:
    fake(ready.venv / "bin", "ruff", "exit 1")
    status, _, err = ready.run(script="scripts/test")
    assert status == 1
    assert "pytest" not in err


@pytest.mark.parametrize(("form", "tier"), [((), "journey"), (("--all",), "all")])
def test_what_needs_no_vm_is_tested_before_what_does(
    ready: Checkout, form: tuple[str, ...], tier: str
) -> None:
    fake(ready.venv / "bin", "python", "")
    (ready.root / "packer").mkdir()
    status, _, err = ready.run(*form, script="scripts/test")
    assert status == 0, err
    quick, vms = [line for line in calls(ready.venv / "bin", "python") if line.startswith("-m pytest")]
    assert f"--tier {tier} " in quick
    assert f"--tier {tier} " in vms
    assert quick.endswith("-m not vm tests")
    assert vms.endswith("-m vm tests")


def test_the_test_command_explains_itself_without_a_set_up(checkout: Checkout) -> None:
    status, out, err = checkout.run("--help", script="scripts/test")
    assert (status, err) == (0, "")
    for form in ("scripts/test ", "scripts/test --all ", "scripts/test ARGS... "):
        assert f"\n  {form}" in out
    assert not checkout.venv.exists()


def test_ci_runs_the_test_command_with_nothing_to_read(checkout: Checkout) -> None:
    fake(checkout.root / "scripts", "test", 'echo "CI=$CI in $PWD"; cat; exit 4')
    status, out, _ = checkout.run(script=".ci/run")
    assert (status, out) == (4, f"CI=true in {checkout.root}\n")


def listed() -> dict[str, str]:
    lines = (ROOT / "scripts/packages.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line and line[0] not in "#["]
    return dict(rows)


def test_every_program_that_the_code_names_is_installed_by_the_set_up() -> None:
    rows = listed()
    assert {program: rows.get(program) for program in processes.PACKAGES} == dict(processes.PACKAGES)


def pins(path: str) -> dict[str, str]:
    text = (ROOT / path).read_text().replace("\\\n", " ")
    blocks = [line.split() for line in text.splitlines() if line.strip()]
    assert all(any(word.startswith("--hash=sha256:") for word in block) for block in blocks)
    return dict(block[0].split("==") for block in blocks)


def test_the_tests_lock_holds_all_of_the_programs_lock() -> None:
    assert pins("scripts/requirements.txt").items() <= pins("tests/requirements.txt").items()


def test_the_programs_lock_covers_what_it_declares() -> None:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=\[]", line)[0].lower().replace(".", "-") for line in declared}
    assert names <= pins("scripts/requirements.txt").keys()


@pytest.mark.parametrize(
    "path", ["scripts/requirements.txt", "tests/requirements.txt", "tests/vm/ec2cluster.txt"]
)
def test_locks_name_no_index_and_no_machine(path: str) -> None:
    assert not re.search(r"https?:|://|/|--(index|find|extra|trusted)", (ROOT / path).read_text())


def test_commit_hooks_are_the_linters_of_the_test_command() -> None:
    [repo] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local", "hooks from elsewhere would be fetched"
    [default] = re.findall(r"set -- (.+)", (ROOT / "scripts/lint").read_text())
    linters = [f"scripts/lint --no-setup {name}" for name in default.split()]
    assert [hook["entry"] for hook in repo["hooks"]] == linters
