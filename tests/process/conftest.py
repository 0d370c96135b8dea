"""A checkout of its own, with fake programs on PATH, for the scripts that set up a machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fake_programs import calls, fake

ROOT = Path(__file__).parents[2]
PLAIN_TOOLS = (
    "bash", "cat", "chmod", "cmp", "cp", "dirname", "env", "find", "flock", "grep", "head", "id", "ln", "ls",
    "mkdir", "mktemp", "mv", "readlink", "rm", "sed", "sh", "sort", "tail", "touch", "tr", "uname",
)  # fmt: skip

# Stands in for the system's python3 and, copied into a virtual environment, for that one's interpreter.
PYTHON = r"""
case "$*" in
    *_base_executable*) [ -z "$OLD_PYTHON" ] && echo "$0" ;;
    *'import ensurepip, venv'*) [ -z "$NO_VENV" ] ;;
    *version_info\[:2\]*) echo 3.12 ;;
    *'import pip, sys'*) [ -e "$(dirname "$0")/pip" ] ;;
    *'-m venv '*) for last; do :; done; mkdir -p "$last/bin" "$last/lib"; cp "$0" "$last/bin/python"
        touch "$last/bin/pip" ;;
    *'-m pip install'*) echo 'pip: the network is down'; [ -z "$OFFLINE" ] ;;
    *purelib*) echo "$(dirname "$(dirname "$0")")/lib" ;;
    *'-m ami_builder'*) shift 3; for each; do printf '<%s>\n' "$each"; done; exit "${STATUS:-0}" ;;
    *packer_release.py*) exec "$REAL_PYTHON" "$@" ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
APT_CACHE = r"""
while [ "$1" != policy ]; do shift; done; shift
for each; do
    case " $NO_PACKAGE " in
        *" $each "*) ;;
        *) printf '%s:\n  Installed: (none)\n  Candidate: 1.2\n  Version table:\n     1.2 500\n' "$each" ;;
    esac
done
"""
# After `install`, the programs are there.
APT_GET = r"""
case "$*" in
    *' update') [ -z "$APT_OFFLINE" ] || { echo 'E: Could not resolve the mirror'; exit 100; } ;;
    *' install '*) [ -z "$APT_BROKEN" ] || { echo 'E: Unable to fetch some archives'; exit 100; }
        for each in packer qemu-img; do
            case "$*" in *"${each%-img}"*) ln -sf /bin/true "$(dirname "$0")/$each" ;; esac
        done ;;
esac
"""


@dataclass
class Checkout:
    """A copy of the scripts in a folder of its own, with a PATH on which only what is given exists."""

    root: Path
    bin: Path
    environ: dict[str, str] = field(default_factory=dict)

    def command(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / script, *arguments],
            env={"PATH": str(self.bin), "TMPDIR": str(self.root.parent), "HOME": "/nonexistent"}
            # Nobody listens at this port, unless a test names another.
            | {"REAL_PYTHON": sys.executable, "AMI_BUILDER_RELEASES": "http://127.0.0.1:9"}
            | self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, script: str = "scripts/ami-builder") -> tuple[int, str, str]:
        process = self.command(script, *arguments)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self, name: str) -> list[str]:
        return calls(self.bin, name)

    def forget(self) -> None:
        for record in self.bin.glob("*.calls"):
            record.unlink()

    @property
    def venv(self) -> Path:
        return self.root / ".venv"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "check out"
    for name in (
        "scripts/ami-builder",
        "scripts/test",
        "scripts/lint",
        "scripts/lib/setup.sh",
        "scripts/lib/packer_release.py",
        ".ci/run",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    (root / "scripts/packages.txt").write_text(
        "[aws]\npacker packer\n[local]\nqemu-img qemu-utils\n/no/such/file,/bin/sh dash\n"
        "[amd64]\n/bin/sh,/no/such/file amd64-firmware\n[arm64]\n/no/file,/nor/this arm64-firmware\n"
        "[test]\nshfmt shfmt\n[unpacked]\ndocker-registry docker-registry\n"
    )
    shutil.copy2(ROOT / "scripts/packer.txt", root / "scripts/packer.txt")
    (root / "tests").mkdir()
    (root / "scripts/requirements.txt").write_text("rich==1 \\\n    --hash=sha256:00\n")
    (root / "tests/requirements.txt").write_text("rich==1 \\\n    --hash=sha256:00\nruff==1\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in PLAIN_TOOLS:
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    fake(programs, "python3", PYTHON)
    fake(programs, "apt-get", APT_GET)
    fake(programs, "apt-cache", APT_CACHE)
    (programs / "id").unlink()
    fake(programs, "id", "echo 0")
    return Checkout(root, programs)
