"""scripts/lib/debian.sh against fake programs: what mmdebstrap and APT are asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.fake_programs import calls, fake

ROOT = Path(__file__).parents[2]
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# Ends in the second hook, after the first has copied the sources.
MMDEBSTRAP = r"""
for each; do
    case "$each" in
        --setup-hook=download*)
            each="${each#*\'}"
            echo 'deb http://mirror.invalid trixie main' >"${each%\'}"
            ;;
    esac
done
exit 9
"""
APT_GET = r"""
lists="$(sed -n 's/^Dir "\(.*\)";/\1/p' "$APT_CONFIG")var/lib/apt/lists"
case "$*" in
    *update*) cp "$APT_CONFIG" "$0.config" && : >"$lists/mirror.invalid_dists_trixie_InRelease" ;;
    *install*) echo "'http://mirror.invalid/zstd.deb' zstd_1.5_amd64.deb 1 SHA256:0" ;;
esac
"""


def test_the_keys_are_debians_on_hosts_whose_apt_does_not_trust_them(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    fake(programs, "mmdebstrap", MMDEBSTRAP)
    fake(programs, "apt-get", APT_GET)
    done = subprocess.run(
        [ROOT / "scripts/base-disk", "--resolve"],
        env={
            "PATH": f"{programs}:/usr/bin:/bin",
            "TMPDIR": str(tmp_path),
            "AMI_BUILDER_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "zstd=1.5\n"), done.stderr
    [command] = calls(programs, "mmdebstrap")
    assert f" --keyring={KEYRING} " in command
    assert f'Dir::Etc::Trusted "{KEYRING}";\n' in (programs / "apt-get.config").read_text()
