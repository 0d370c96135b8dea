"""TLS on a machine: what start-dask makes of certificates, and of what is wrong with them."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import boto3
import pytest
import time_machine
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from moto.server import ThreadedMotoServer

from ami_builder.build import guest as render
from ami_builder.qemu.imds import InstanceMetadata, MetadataServer
from ami_builder.system.certificates import Authority
from tests.fake_programs import calls, fake
from tests.process.test_instance_metadata import give_role
from tests.process.test_start_dask import DASK_TLS, HOST, TLS_ERRORS, Machine
from tests.real_dask import tls_folder
from tests.sample_image import image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ami_builder.system.certificates import Certificate

COMPOSE = f"services: {{w: {{{HOST}, env_file: /run/dask/comm.env}}}}\n"
VARIABLES = {
    "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true",
    "DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME": "tls",
    "DASK_DISTRIBUTED__COMM__TLS__CA_FILE": "/run/dask/tls/ca.pem",
    **{
        f"DASK_DISTRIBUTED__COMM__TLS__{user}__{kind.upper()}": f"/run/dask/tls/{kind}.pem"
        for user in ("SCHEDULER", "WORKER", "CLIENT")
        for kind in ("cert", "key")
    },
    "DASK_DISTRIBUTED__SCHEDULER__PRELOAD": "/run/dask/tls/tls_errors.py",
    "DASK_DISTRIBUTED__WORKER__PRELOAD": "/run/dask/tls/tls_errors.py",
}
ARN = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:dask-a1B2c3"
AWS = (
    'printf "%s" "$FAKE_ANSWER"; [ -z "${FAKE_REASON:-}" ] || { echo "dask-aws: $FAKE_REASON" >&2; exit 1; }'
)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create(days=100)


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Certificate:
    return authority.issue("worker", days=90, serves=True)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.write("etc/dask/compose.yaml", COMPOSE)
    fake(tmp_path / "usr/local/sbin", "dask-aws", AWS)
    return made


def _put(machine: Machine, issued: Certificate) -> None:
    tls_folder(machine.root / "etc/dask/tls", issued)


def _variables(machine: Machine) -> dict[str, str]:
    lines = (machine.root / "run/dask/comm.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def _installed(machine: Machine) -> dict[str, str]:
    found = {path.name: path.read_text() for path in (machine.root / "run/dask/private/tls").iterdir()}
    # A Compose file may name it with or without certificates.
    assert found.pop("tls_errors.py") == (machine.root / TLS_ERRORS.relative_to("/")).read_text()
    return found


def _secret(text: str) -> str:
    return json.dumps({"Name": "dask/worker", "SecretString": text})


def test_certificates_of_user_data_reach_the_container(machine: Machine, issued: Certificate) -> None:
    _put(machine, issued)
    started = machine.start()
    assert started.status == 0, started.output
    assert _variables(machine) == VARIABLES
    assert _installed(machine) == {
        "ca.pem": issued.ca,
        "cert.pem": issued.certificate,
        "key.pem": issued.key,
    }
    assert "TLS" not in started.output


def test_only_root_can_read_the_key_here_and_every_user_of_the_container_there(
    machine: Machine, issued: Certificate
) -> None:
    """The container has the folder tls mounted, so its parent's mode does not count there."""
    _put(machine, issued)
    machine.start()
    private = machine.root / "run/dask/private"
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in (private, private / "tls", private / "tls/key.pem")
    }
    assert modes == {"private": 0o700, "tls": 0o755, "key.pem": 0o644}
    assert [path.name for path in private.iterdir()] == ["tls"]


def test_without_certificates_the_file_is_there_and_empty(machine: Machine) -> None:
    assert machine.start().status == 0
    assert _variables(machine) == _installed(machine) == {}


def test_tls_ends_with_its_certificates(machine: Machine, issued: Certificate) -> None:
    _put(machine, issued)
    machine.start()
    for path in (machine.root / "etc/dask/tls").iterdir():
        path.unlink()
    assert machine.start().status == 0
    assert _variables(machine) == _installed(machine) == {}


@pytest.mark.parametrize(
    ("source", "answer", "call"),
    [
        (
            "secretsmanager:dask/worker",
            lambda text: {"SecretString": text},
            'secretsmanager GetSecretValue {"SecretId":"dask/worker"}',
        ),
        (
            f"secretsmanager:{ARN}",
            lambda text: {"SecretString": text},
            f'secretsmanager GetSecretValue {{"SecretId":"{ARN}"}}',
        ),
        (
            "ssm:/dask/worker",
            lambda text: {"Parameter": {"Value": text}},
            'ssm GetParameter {"Name":"/dask/worker","WithDecryption":true}',
        ),
    ],
)
def test_certificates_come_from_aws_at_each_start(
    machine: Machine, issued: Certificate, source: str, answer: object, call: str
) -> None:
    machine.write("etc/dask/dask.env", f"DASK_ROLE=local\nDASK_TLS={source}\n")
    text = json.dumps(answer(issued.bundle))  # type: ignore[operator]
    for _ in range(2):
        assert machine.start(environment={"FAKE_ANSWER": text}).status == 0
        assert _variables(machine) == VARIABLES
    assert _installed(machine)["key.pem"] == issued.key
    assert calls(machine.root / "usr/local/sbin", "dask-aws") == [call, call]
    assert [path.name for path in (machine.root / "run/dask/private").iterdir()] == ["tls"]


def test_a_secret_that_cannot_be_read_now_is_tried_again(machine: Machine) -> None:
    machine.write("etc/dask/dask.env", "DASK_ROLE=local\nDASK_TLS=ssm:/dask/worker\n")
    started = machine.start(environment={"FAKE_ANSWER": "", "FAKE_REASON": "answers 400: AccessDenied"})
    assert (started.status, started.calls) == (1, [])
    assert machine.health[0] == "waiting", "another instance would not read it either"
    assert machine.health[1].startswith(
        "for certificates: DASK_TLS=ssm:/dask/worker can't be read: dask-aws: answers 400: AccessDenied"
    )


@pytest.mark.parametrize("source", ["vault:a", "ssm:", 'secretsmanager:a"b', "ssm:a b", "dask/worker"])
def test_a_source_that_is_none_is_refused(machine: Machine, source: str) -> None:
    machine.write("etc/dask/dask.env", f"DASK_ROLE=local\nDASK_TLS={source}\n")
    assert machine.start().status == 78
    assert machine.health[0] == "refused"
    assert f"DASK_TLS='{source}'" in machine.health[1]


def _encrypted(key: str) -> str:
    coding = BestAvailableEncryption(b"a password")
    found = load_pem_private_key(key.encode(), None)
    return found.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, coding).decode()


def _changed(issued: Certificate, other: Certificate, what: str) -> str:
    ca, certificate, key = issued.ca, issued.certificate, issued.key
    return {
        "nothing": "",
        "no key": ca + certificate,
        "no CA": certificate + key,
        "key first": key + ca + certificate,
        "swapped": certificate + ca + key,
        "another's key": ca + certificate + other.key,
        "another's CA": other.ca + certificate + key,
        "cut": ca + certificate + key[:-40],
        "broken": ca + certificate.replace("M", "x") + key,
        "encrypted": ca + certificate + _encrypted(key),
    }[what]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("nothing", "found no PEM block"),
        ("no key", "found CERTIFICATE, CERTIFICATE"),
        ("no CA", "found CERTIFICATE, PRIVATE KEY"),
        ("key first", "found PRIVATE KEY, CERTIFICATE, CERTIFICATE"),
        ("swapped", "the key does not belong to the certificate; expected the CA's certificate"),
        ("another's key", "the key does not belong to the certificate"),
        ("another's CA", "the certificate is not valid: another CA issued it"),
        ("cut", "found CERTIFICATE, CERTIFICATE"),
        ("broken", "can't be read"),
        ("encrypted", "the key is encrypted"),
    ],
)
def test_a_malformed_value_is_refused_with_what_is_wrong(
    machine: Machine, issued: Certificate, what: str, reason: str
) -> None:
    machine.write("etc/dask/dask.env", "DASK_ROLE=local\nDASK_TLS=ssm:/dask/worker\n")
    other = Authority.create(days=2).issue("other", days=1, serves=True)
    answer = _secret(_changed(issued, other, what))
    started = machine.start(environment={"FAKE_ANSWER": answer})
    assert (started.status, started.calls) == (78, []), started.output
    assert machine.health[0] == "refused"
    assert machine.health[1].startswith("TLS: ssm:/dask/worker: ")
    assert reason in machine.health[1]
    assert _variables(machine) == _installed(machine) == {}
    assert "PRIVATE KEY-----" not in started.output


@pytest.mark.parametrize("missing", ["ca.pem", "cert.pem", "key.pem"])
def test_half_a_set_is_refused_with_what_is_missing(
    machine: Machine, issued: Certificate, missing: str
) -> None:
    _put(machine, issued)
    (machine.root / "etc/dask/tls" / missing).unlink()
    assert machine.start().status == 78
    assert machine.health[0] == "refused"
    assert machine.health[1].endswith(f"but no {missing}")


def test_a_client_s_certificate_is_none_for_a_machine(machine: Machine, authority: Authority) -> None:
    _put(machine, authority.issue("client", days=1, serves=False))
    assert machine.start().status == 78
    assert "unsuitable certificate purpose" in machine.health[1]


def test_a_certificate_that_has_ended_is_refused(machine: Machine) -> None:
    with time_machine.travel(datetime(2024, 1, 1, tzinfo=UTC), tick=False):
        old = Authority.create(days=5000).issue("worker", days=30, serves=True)
    _put(machine, old)
    assert machine.start().status == 78
    assert "certificate has expired" in machine.health[1]


def test_a_clock_that_is_not_set_yet_is_waited_for(machine: Machine) -> None:
    with time_machine.travel(datetime(2099, 1, 1, tzinfo=UTC), tick=False):
        future = Authority.create(days=300).issue("worker", days=30, serves=True)
    _put(machine, future)
    assert machine.start().status == 1
    assert "is not valid yet" in machine.health[1]


@pytest.mark.parametrize(("days", "said"), [(29, True), (31, False)])
def test_an_end_that_is_near_is_said(machine: Machine, authority: Authority, days: int, said: bool) -> None:
    _put(machine, authority.issue("worker", days=days, serves=True))
    started = machine.start()
    assert started.status == 0
    assert ("<4>start-dask: TLS: the certificate of this machine ends on" in started.output) is said
    notices = machine.root / "run/dask/notices"
    assert ("ends on" in notices.read_text() if notices.exists() else False) is said


def test_a_ca_between_is_sent_along(machine: Machine, issued: Certificate) -> None:
    """A text may have further certificates between the machine's own and its key."""
    machine.write("etc/dask/dask.env", "DASK_ROLE=local\nDASK_TLS=ssm:/dask/worker\n")
    answer = _secret(issued.ca + issued.certificate + issued.ca + issued.key)
    assert machine.start(environment={"FAKE_ANSWER": answer}).status == 0
    assert _installed(machine)["cert.pem"] == issued.certificate + issued.ca


def test_a_compose_file_that_does_not_take_them_is_said(machine: Machine, issued: Certificate) -> None:
    _put(machine, issued)
    machine.write("etc/dask/compose.yaml", f"# /run/dask/comm.env\nservices: {{w: {{{HOST}}}}}\n")
    machine.write("etc/dask/dask.env", "DASK_ROLE=scheduler\n")
    output = machine.start().output
    assert "does not take them: it has no env_file /run/dask/comm.env" in output
    assert "Dask's ports are open to the network without TLS" in output


@pytest.mark.parametrize(
    ("command", "loads"),
    [
        ("dask worker a --preload mine.py", False),
        ("dask worker a --preload /run/dask/tls/tls_errors.py --preload mine.py", True),
        ("dask worker a --preload-nanny mine.py", True),
    ],
)
def test_a_compose_file_without_the_preload_is_said(
    machine: Machine, issued: Certificate, command: str, loads: bool
) -> None:
    _put(machine, issued)
    machine.write(
        "etc/dask/compose.yaml",
        f"# --preload x\n{COMPOSE}".replace("{w: {", f"{{w: {{command: '{command}', "),
    )
    started = machine.start()
    assert started.status == 0, started.output
    assert ("does not load /run/dask/tls/tls_errors.py" not in started.output) is loads


def test_ports_with_tls_are_no_news(machine: Machine, issued: Certificate) -> None:
    _put(machine, issued)
    machine.write("etc/dask/dask.env", "DASK_ROLE=scheduler\n")
    assert "Dask's ports are open" not in machine.start().output


def test_an_address_with_tcp_in_a_compose_file_is_said(machine: Machine, issued: Certificate) -> None:
    _put(machine, issued)
    machine.write("etc/dask/compose.yaml", f"# tcp://\n{COMPOSE}")
    assert "tcp://" not in machine.start().output
    machine.write(
        "etc/dask/compose.yaml", COMPOSE.replace("w:", "w: {command: dask worker tcp://10.0.0.7:1}, v:")
    )
    assert "has an address with tcp://, which Dask refuses with TLS" in machine.start().output


@contextmanager
def _scheduler(issued: Certificate | None, folder: Path, first: bytes = bytes([2] * 64)) -> Iterator[int]:
    """Accept connections as Dask does, with or without TLS, and send `first` at once."""
    context = None
    if issued is not None:
        files = tls_folder(folder, issued)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(files / "ca.pem"))
        context.load_cert_chain(files / "cert.pem", files / "key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(connection, server_side=True) if context else connection as one:
                        one.sendall(first)
                        if first or context is None:
                            while one.recv(1000) and first:
                                pass
                except OSError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("scheme", ["", "tcp://", "tls://"])
def test_a_worker_finds_its_scheduler_whatever_the_scheme(
    machine: Machine, authority: Authority, issued: Certificate, scheme: str, tmp_path: Path
) -> None:
    _put(machine, issued)
    with _scheduler(authority.issue("scheduler", days=1, serves=True), tmp_path / "its") as port:
        address = f"127.0.0.1:{port}"
        machine.write("etc/dask/dask.env", f"DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS={scheme}{address}\n")
        started = machine.start()
    assert started.status == 0, started.output
    assert started.environment["DASK_SCHEDULER_ADDRESS"] == address


def test_without_tls_an_address_stays_as_it_is(machine: Machine, tmp_path: Path) -> None:
    with _scheduler(None, tmp_path) as port:
        address = f"tcp://127.0.0.1:{port}"
        machine.write("etc/dask/dask.env", f"DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS={address}\n")
        assert machine.start().environment["DASK_SCHEDULER_ADDRESS"] == address


def test_tls_in_an_address_needs_certificates(machine: Machine) -> None:
    machine.write("etc/dask/dask.env", "DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS=tls://10.0.0.1:8786\n")
    assert machine.start().status == 78
    assert "DASK_SCHEDULER_ADDRESS=tls://10.0.0.1:8786 needs certificates" in machine.health[1]


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        ("plain", "it does not use TLS, but this machine has certificates"),
        ("another CA's", "its certificate is refused: another CA issued it"),
        ("mute", "it closes the connection"),
        ("closed", "it closes the connection"),
    ],
)
def test_a_worker_waits_and_says_why_if_its_scheduler_does_not_fit(
    machine: Machine, authority: Authority, issued: Certificate, scheduler: str, reason: str, tmp_path: Path
) -> None:
    """It tries again: the scheduler may get other certificates."""
    _put(machine, issued)
    fake(machine.programs, "sleep", "kill $PPID")
    its = {"plain": None, "another CA's": Authority.create(days=2), "mute": authority, "closed": None}[
        scheduler
    ]
    with _scheduler(
        None if its is None else its.issue("a", days=1, serves=True),
        tmp_path / "its",
        first=b"" if scheduler in ("mute", "closed") else bytes([2] * 64),
    ) as port:
        machine.write("etc/dask/dask.env", f"DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS=127.0.0.1:{port}\n")
        assert machine.start().calls == []
    assert machine.health == ["waiting", f"for the scheduler at 127.0.0.1:{port}: {reason}"]


def test_a_scheduler_that_refuses_the_certificate(machine: Machine, tmp_path: Path) -> None:
    """In TLS 1.3 that comes after the handshake."""
    mine = Authority.create(days=2).issue("worker", days=1, serves=True)
    theirs = Authority.create(days=2).issue("scheduler", days=1, serves=True)
    folder = tls_folder(tmp_path / "mine", replace(mine, ca=theirs.ca))
    program = render.guest(image())[DASK_TLS].content
    with _scheduler(theirs, tmp_path / "theirs") as port:
        done = subprocess.run(
            ["python3", "-I", "-", "ask", folder, "127.0.0.1", str(port)],
            input=program,
            capture_output=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stdout.startswith(b"it refuses this machine's certificate: tlsv1 alert unknown ca")


def test_a_scheduler_with_tls_does_not_keep_a_plain_worker_waiting_for_good(
    machine: Machine, issued: Certificate, tmp_path: Path
) -> None:
    """A Compose file may have TLS of its own."""
    fake(machine.programs, "sleep", "")
    # Stands for one that took 10 seconds.
    fake(machine.programs, "bash", "exit 3")
    machine.write("etc/dask/dask.env", "DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS=127.0.0.1:8786\n")
    started = machine.start()
    assert started.status == 0
    said = "the scheduler at 127.0.0.1:8786: it accepts connections, but does not answer; does it use TLS?"
    assert f"<6>start-dask: waiting for {said} (0 min)" in started.output
    assert f"<4>start-dask: {said}\n" in started.output
    assert len(calls(machine.programs, "sleep")) == 4


@pytest.mark.parametrize(("compose", "status"), [(COMPOSE, 3), (f"services: {{w: {{{HOST}}}}}\n", 0)])
def test_a_scheduler_with_tls_gives_a_plain_connection_nothing(
    machine: Machine, issued: Certificate, tmp_path: Path, compose: str, status: int
) -> None:
    """Only our Compose file is known to have no TLS of its own."""
    real = shutil.which("bash")
    # A second is as good as ten.
    shorter = (
        f"""script=$(printf %s "$2" | sed 's/-t 10/-t 1/'); shift 2; {real} -c "$script" "$@"; status=$?"""
    )
    fake(machine.programs, "bash", f"{shorter}\necho $status >>$0.status\nexit $status")
    fake(machine.programs, "sleep", "kill $PPID")
    machine.write("etc/dask/compose.yaml", compose)
    with _scheduler(issued, tmp_path / "its") as port:
        machine.write("etc/dask/dask.env", f"DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS=127.0.0.1:{port}\n")
        machine.start()
    assert (machine.programs / "bash.status").read_text() == f"{status}\n"


@pytest.fixture(scope="module")
def aws() -> Iterator[str]:
    """Secrets Manager and SSM on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def _client(service: str, endpoint: str) -> Any:
    key = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    return boto3.client(service, region_name="eu-central-1", endpoint_url=endpoint, **key)  # type: ignore[call-overload]


@pytest.mark.needs("curl")
def test_a_bundle_comes_all_the_way_from_aws(machine: Machine, issued: Certificate, aws: str) -> None:
    """By the instance's role, with the guest's own programs: what is missing is tried again, then found."""
    for name in ("dask-aws", "instance-metadata"):
        program = machine.root / "usr/local/sbin" / name
        program.write_bytes(render.guest(image())[PurePosixPath("/usr/local/sbin", name)].content)
        program.chmod(0o755)
    metadata = InstanceMetadata(instance_id="i-0123456789abcdef0", region="eu-central-1")
    secrets, parameters = _client("secretsmanager", aws), _client("ssm", aws)
    with MetadataServer(metadata) as imds:
        give_role(imds)
        environment = {
            "INSTANCE_METADATA_URL": f"http://127.0.0.1:{imds.port}",
            "DASK_AWS_ROOT": str(machine.root),
        }
        for source in ("secretsmanager:dask/worker", "ssm:/dask/worker"):
            lines = ("DASK_ROLE=local", f"DASK_TLS={source}", f"DASK_AWS_ENDPOINT={aws}")
            machine.write("etc/dask/dask.env", "\n".join((*lines, "")))
            assert machine.start(environment=environment).status == 1
            assert "NotFound" in machine.health[1]
            if source.startswith("ssm"):
                parameters.put_parameter(Name="/dask/worker", Type="SecureString", Value=issued.bundle)
            else:
                secrets.create_secret(Name="dask/worker", SecretString=issued.bundle)
            started = machine.start(environment=environment)
            assert started.status == 0, started.output
            assert _installed(machine)["key.pem"] == issued.key
            assert _variables(machine) == VARIABLES
