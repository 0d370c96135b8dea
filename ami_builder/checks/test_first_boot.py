"""What a machine finds at its first boot: an image without traces of whoever built it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import pytest

from ami_builder.checks.context import Context
from ami_builder.checks.machine_state import MachineState, exact_size
from ami_builder.core.options import Datasource

pytestmark = pytest.mark.first_boot

MIB = 1 << 20
CLOUD_IDS = {Datasource.EC2: "aws", Datasource.NOCLOUD: "nocloud"}


def some(lines: Iterable[str]) -> str:
    """Write the first few of a list."""
    found = list(lines)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def test_root_fills_the_disk(machine: MachineState, context: Context) -> None:
    """Who launches with a larger disk wants to spill to it; the ESP and file system tables keep a part."""
    root, disk = (int(word) for word in machine.text["disk"].split())
    least = int((disk - 512 * MIB) * 0.9)
    assert disk == context.disk, f"the disk has {exact_size(disk)}, booted with {exact_size(context.disk)}"
    assert root >= least, f"the root file system has {exact_size(root)} of a disk of {exact_size(disk)}"


def test_only_our_key_is_authorized(machine: MachineState, context: Context) -> None:
    """Published images have shipped the builder's key: whoever holds it gets into every machine."""
    blob = context.public_key.split()[1]
    lines = machine.lines("authorized")
    others = [line.split(":")[0] for line in lines if blob not in line.split()]
    assert lines, "there is no key at all, and yet we got in"
    assert not others, f"keys that are not ours in {some(others)}"


def test_root_cannot_log_in(machine: MachineState, context: Context) -> None:
    """cloud-init leaves root a line that only says who to log in as; without that command it is a way in."""
    root = [line for line in machine.lines("authorized") if line.startswith("/root/")]
    free = [line for line in root if 'command="' not in line]
    assert context.user == "root" or not free, f"root has {len(free)} keys without a forced command"


def test_host_keys_are_new(machine: MachineState) -> None:
    """Machines that share a host key can pass for each other."""
    old = machine.lines("hostkeys.old")
    assert machine.lines("hostkeys"), "there is no host key"
    assert not old, f"older than this boot: {some(old)}"


def test_machine_id_is_new(machine: MachineState) -> None:
    """Machines that share an id get the same DHCP address, and mix their journals."""
    name, old = machine.text["machine-id"].strip(), machine.lines("machine-id.old")
    assert re.fullmatch(r"[0-9a-f]{32}", name), f"/etc/machine-id is {name!r}"
    assert not old, f"/etc/machine-id is older than this boot: {name}"


def test_journal_starts_at_this_boot(machine: MachineState) -> None:
    """The builder's boots are nobody's business, and confuse who looks for a reason."""
    boots, name = machine.lines("boots"), machine.text["machine-id"].strip()
    others = [journal for journal in machine.lines("journals") if journal.split(".")[0] != name]
    assert len(boots) == 1, f"{len(boots)} boots in the journal, not 1"
    assert not others, f"journals of other machine ids: {some(others)}"


def test_no_old_logs(machine: MachineState) -> None:
    """Logs tell who built the image, where, and with what."""
    old = machine.lines("logs")
    assert not old, f"older than this boot: {some(old)}"


def test_no_files_of_the_build(machine: MachineState) -> None:
    """Scripts and folders of the builder."""
    left = sorted(set(machine.lines("temporary")))
    assert not left, f"left behind: {some(left)}"


def test_no_package_lists(machine: MachineState) -> None:
    """Lists and archives are stale when the image is launched, and make it larger."""
    left = machine.lines("apt")
    assert not left, f"{len(left)} files: {some(left)}"


def test_no_histories(machine: MachineState) -> None:
    """Shell histories hold what was typed while building, secrets included."""
    left = machine.lines("histories")
    assert not left, f"histories: {some(left)}"


def test_no_secrets(machine: MachineState) -> None:
    """Credentials and private keys in an image belong to everybody who can launch it."""
    left = machine.lines("secrets")
    assert not left, f"look like credentials: {some(left)}"


def test_no_old_containers(machine: MachineState) -> None:
    """A container made while baking may be started again, with the builder's limit."""
    old = [c.name for c in machine.containers if c.created < machine.booted - 5]
    assert not old, f"older than this boot: {some(old)}"


def test_cloud_init_ran_for_one_instance(machine: MachineState) -> None:
    """What cloud-init keeps of the builder's instance holds its user data."""
    found = machine.lines("instances")
    assert len(found) == 1, f"{len(found)} instances under /var/lib/cloud, not 1: {some(found)}"


def test_cloud_init_used_the_datasource(machine: MachineState, context: Context) -> None:
    """The proof holds for the way that the machine got its key and user data."""
    expected, found = CLOUD_IDS[context.datasource], machine.text["cloud-id"].strip() or "nothing"
    assert found == expected, f"cloud-id is {found}, booted with {expected}"


def test_cloud_init_has_no_errors(machine: MachineState) -> None:
    """A module that fails on the first boot fails on everybody's."""
    try:
        result = json.loads(machine.text["cloud-result"])["v1"]["errors"]
        stages = json.loads(machine.text["cloud-status"])["v1"]
    except (ValueError, KeyError):
        pytest.fail("cloud-init has not finished: it left no result")
    errors = [*result, *(e for s in stages.values() if isinstance(s, dict) for e in s.get("errors") or [])]
    assert not errors, f"{len(errors)} errors: {some(str(error) for error in errors)}"


def test_user_data_replaced_the_compose_file(machine: MachineState) -> None:
    """A control plane's Compose file must win over the image's own."""
    same = machine.text["compose"] == machine.text["compose.image"]
    assert not same, "/etc/dask/compose.yaml is the image's own: the user data was not applied in time"


def test_dask_listens_on_loopback_only(machine: MachineState) -> None:
    """A client that reaches Dask's ports runs programs here, and the role `local` needs none from outside."""
    sockets = [line.split() for line in machine.lines("listening")]
    inside = set(machine.lines("listening.dask"))
    dask = [
        words
        for words in sockets
        if words[3].endswith((":8786", ":8787")) or inside & set(re.findall(r"pid=(\d+)", words[-1]))
    ]
    opened = [words[3] for words in dask if not words[3].startswith(("127.", "[::1]"))]
    assert dask, "nothing listens on 8786 and 8787"
    assert not opened, f"Dask listens to the network on {some(opened)}"


def test_containers_cannot_reach_the_metadata(machine: MachineState) -> None:
    """A task of Dask would have the credentials of the instance's role, and could read its user data."""
    if "IPAddressDeny" not in machine.text["metadata"]:
        pytest.skip("this image lets containers read the metadata (container.instance_metadata)")
    if not machine.lines("metadata.host"):
        pytest.skip("this machine has no metadata service")
    answer = (machine.lines("plain") or ("nothing",))[-1]
    assert answer in ("reached", "refused"), f"a container could not try: {answer}"
    assert answer == "refused", "a container reaches 169.254.169.254"


def test_ssh_accepts_keys_only(machine: MachineState) -> None:
    """A password can be guessed."""
    settings = dict(line.split(maxsplit=1) for line in machine.lines("sshd") if " " in line)
    assert settings, "sshd -T says nothing"
    for name in ("passwordauthentication", "kbdinteractiveauthentication"):
        assert settings.get(name) == "no", f"sshd has {name} {settings.get(name)}"
