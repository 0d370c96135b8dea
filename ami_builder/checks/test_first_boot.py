"""At its first boot a machine finds no traces of the build: no keys, ids, logs or files."""

import json
import re
from collections.abc import Iterable

import pytest

from ami_builder.checks.context import Context
from ami_builder.checks.machine_state import MachineState, exact_size
from ami_builder.core.options import Datasource
from ami_builder.core.units import MIB

pytestmark = pytest.mark.first_boot

CLOUD_IDS = {Datasource.EC2: "aws", Datasource.NOCLOUD: "nocloud"}


def some(lines: Iterable[str]) -> str:
    """Return the first few of a list, and how many more there are."""
    found = list(lines)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def test_root_fills_the_disk(machine: MachineState, context: Context) -> None:
    """A larger disk gives more room to spill; the boot partition and file system tables keep a part."""
    root, disk = (int(word) for word in machine.text["disk"].split())
    least = int((disk - 512 * MIB) * 0.9)
    assert disk == context.disk, f"the disk has {exact_size(disk)}, expected {exact_size(context.disk)}"
    assert root >= least, f"the root file system has {exact_size(root)} of a disk of {exact_size(disk)}"


def test_only_our_key_is_authorized(machine: MachineState, context: Context) -> None:
    """The owner of a key that was left in the image can log in to every machine made from it."""
    blob = context.public_key.split()[1]
    lines = machine.lines("authorized")
    others = [line.split(":")[0] for line in lines if blob not in line.split()]
    assert lines, "no authorized_keys file has a key"
    assert not others, f"keys that are not ours in {some(others)}"


def test_root_cannot_log_in(machine: MachineState, context: Context) -> None:
    """cloud-init gives root a key whose forced command names the right user; any other key is a login."""
    root = [line for line in machine.lines("authorized") if line.startswith("/root/")]
    free = [line for line in root if 'command="' not in line]
    assert context.user == "root" or not free, f"root has {len(free)} keys without a forced command"


def test_host_keys_are_new(machine: MachineState) -> None:
    """A machine with the same host key can pass for another one."""
    old = machine.lines("hostkeys.old")
    assert machine.lines("hostkeys"), "there is no host key"
    assert not old, f"older than this boot: {some(old)}"


def test_machine_id_is_new(machine: MachineState) -> None:
    """Machines with the same id get the same DHCP address, and mix their journals."""
    name, old = machine.text["machine-id"].strip(), machine.lines("machine-id.old")
    assert re.fullmatch(r"[0-9a-f]{32}", name), f"/etc/machine-id is {name!r}"
    assert not old, f"/etc/machine-id is older than this boot: {name}"


def test_journal_starts_at_this_boot(machine: MachineState) -> None:
    """Boots of the build would confuse a diagnosis."""
    boots, name = machine.lines("boots"), machine.text["machine-id"].strip()
    others = [journal for journal in machine.lines("journals") if journal.split(".")[0] != name]
    assert len(boots) == 1, f"{len(boots)} boots are in the journal, expected 1"
    assert not others, f"journals of other machine ids: {some(others)}"


def test_no_old_logs(machine: MachineState) -> None:
    """Logs of the build would tell where and with what the image was built."""
    old = machine.lines("logs")
    assert not old, f"older than this boot: {some(old)}"


def test_no_files_of_the_build(machine: MachineState) -> None:
    """Scripts and folders of the build do not belong in an image."""
    left = sorted(set(machine.lines("temporary")))
    assert not left, f"files of the build: {some(left)}"


def test_no_package_lists(machine: MachineState) -> None:
    """Package lists and archives make the image larger, and are out of date when it is launched."""
    left = machine.lines("apt")
    assert not left, f"{len(left)} package lists and archives: {some(left)}"


def test_no_histories(machine: MachineState) -> None:
    """Shell histories may contain secrets that were typed during the build."""
    left = machine.lines("histories")
    assert not left, f"shell histories: {some(left)}"


def test_no_secrets(machine: MachineState) -> None:
    """Everyone who can launch the image can read credentials and private keys in it."""
    left = machine.lines("secrets")
    assert not left, f"possible credentials: {some(left)}"


def test_no_old_containers(machine: MachineState) -> None:
    """A container made during the build may start again, with the builder's limit."""
    old = [c.name for c in machine.containers if c.created < machine.booted - 5]
    assert not old, f"older than this boot: {some(old)}"


def test_cloud_init_ran_for_one_instance(machine: MachineState) -> None:
    """What cloud-init keeps of the build's instance contains its user data."""
    found = machine.lines("instances")
    assert len(found) == 1, f"{len(found)} instances are under /var/lib/cloud, expected 1: {some(found)}"


def test_cloud_init_used_the_datasource(machine: MachineState, context: Context) -> None:
    """The result counts for the datasource that gave the machine its key and user data."""
    expected, found = CLOUD_IDS[context.datasource], machine.text["cloud-id"].strip() or "nothing"
    assert found == expected, f"cloud-id is {found}, expected {expected}"


def test_cloud_init_has_no_errors(machine: MachineState) -> None:
    """A cloud-init module that fails here fails on every first boot."""
    try:
        result = json.loads(machine.text["cloud-result"])["v1"]["errors"]
        stages = json.loads(machine.text["cloud-status"])["v1"]
    except (ValueError, KeyError):
        pytest.fail("cloud-init has not finished: it has written no result")
    errors = [*result, *(e for s in stages.values() if isinstance(s, dict) for e in s.get("errors") or [])]
    assert not errors, f"cloud-init has {len(errors)} errors: {some(str(error) for error in errors)}"


def test_user_data_replaced_the_compose_file(machine: MachineState) -> None:
    """A control plane's Compose file must replace the image's own."""
    same = machine.text["compose"] == machine.text["compose.image"]
    assert not same, (
        "/etc/dask/compose.yaml is the image's own: user data was not applied before Dask started"
    )


def test_dask_listens_on_loopback_only(machine: MachineState) -> None:
    """A client of Dask can run any program here, and the role `local` needs no client from outside."""
    sockets = [line.split() for line in machine.lines("listening")]
    inside = set(machine.lines("listening.dask"))
    dask = [
        words
        for words in sockets
        if words[3].endswith((":8786", ":8787")) or inside & set(re.findall(r"pid=(\d+)", words[-1]))
    ]
    opened = [words[3] for words in dask if not words[3].startswith(("127.", "[::1]"))]
    assert dask, "no process listens on 8786 and 8787"
    assert not opened, f"Dask accepts connections from the network on {some(opened)}"


def test_containers_cannot_reach_the_metadata(machine: MachineState) -> None:
    """A Dask task could use the credentials of the instance's role, and read its user data."""
    if "IPAddressDeny" not in machine.text["metadata"]:
        pytest.skip("this image lets containers read the metadata (container.instance_metadata)")
    if not machine.lines("metadata.host"):
        pytest.skip("this machine has no metadata service")
    answer = (machine.lines("plain") or ("nothing",))[-1]
    assert answer in ("reached", "refused"), f"the container could not try to reach it: {answer}"
    assert answer == "refused", "a container can reach 169.254.169.254"


def test_ssh_accepts_keys_only(machine: MachineState) -> None:
    """A password can be guessed, a key cannot."""
    settings = dict(line.split(maxsplit=1) for line in machine.lines("sshd") if " " in line)
    assert settings, "sshd -T printed nothing"
    for name in ("passwordauthentication", "kbdinteractiveauthentication"):
        assert settings.get(name) == "no", f"sshd has {name} {settings.get(name)}, expected no"
