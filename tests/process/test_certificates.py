"""`certificates`: what it makes is checked by openssl, by the guest, and by a real Dask."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import time_machine
import yaml

from ami_builder.build import certificates
from ami_builder.build.certificates import CA_DAYS, LONGEST_PARAMETER, Holder
from ami_builder.cli import app as cli
from ami_builder.state.workspace import write_atomically
from ami_builder.system.certificates import Authority
from tests.process.test_start_dask import Machine
from tests.real_dask import dask, said, scheduler, tls_flags

if TYPE_CHECKING:
    from collections.abc import Mapping

MACHINES = ("scheduler", "worker", "local")
USER_DATA_BYTES = 16384


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster") / "certificates"
    assert cli.run(["-q", "certificates", str(folder), "--scheduler", "tls://10.0.0.7"]) == 0
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _openssl(*arguments: str | Path) -> str:
    return subprocess.check_output(["openssl", *arguments], text=True, stderr=subprocess.STDOUT)


@pytest.mark.needs("openssl")
def test_openssl_takes_each_certificate_for_what_its_holder_does(folder: Path) -> None:
    for role in Holder:
        certificate = folder / role / "cert.pem"
        for purpose in ("sslclient", "sslserver"):
            argv = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", folder / "ca.pem"]
            done = subprocess.run([*argv, certificate], capture_output=True, text=True, check=False)
            expected = purpose == "sslclient" or role is not Holder.CLIENT
            assert (done.returncode == 0) is expected, done.stderr
        text = _openssl("x509", "-in", certificate, "-noout", "-text")
        assert "ecdsa-with-SHA256" in text
        assert "prime256v1" in text
        pair = [
            _openssl("x509", "-in", certificate, "-noout", "-pubkey"),
            _openssl("pkey", "-in", folder / role / "key.pem", "-pubout"),
        ]
        assert pair[0] == pair[1]


def test_keys_are_for_their_owner_and_the_ca_s_key_is_nowhere_else(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    key = (folder / "ca-key.pem").read_bytes().splitlines()[1]
    assert [name for name, content in _files(folder).items() if key in content] == ["ca-key.pem"]


@pytest.mark.parametrize("role", MACHINES)
def test_a_bundle_fits_into_a_parameter_and_user_data_into_its_bound(folder: Path, role: str) -> None:
    own = folder / role
    bundle = (own / "bundle.pem").read_text()
    assert bundle == "".join((own / name).read_text() for name in ("ca.pem", "cert.pem", "key.pem"))
    assert len(bundle) < LONGEST_PARAMETER / 2
    assert len((own / "user-data.yaml").read_bytes()) < USER_DATA_BYTES / 4


@pytest.mark.parametrize("role", MACHINES)
def test_a_machine_with_its_user_data_starts_with_tls(folder: Path, role: str, tmp_path: Path) -> None:
    text = (folder / role / "user-data.yaml").read_text()
    assert text.startswith("#cloud-config\n")
    machine = Machine(tmp_path)
    machine.write(
        "etc/dask/compose.yaml", "services: {w: {network_mode: host, env_file: /run/dask/comm.env}}\n"
    )
    for file in yaml.safe_load(text)["write_files"]:
        path = tmp_path / file["path"].removeprefix("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file["content"])
        assert ("permissions" in file) is file["path"].endswith("key.pem")
    settings = (tmp_path / "etc/dask/dask.env").read_text().splitlines()
    assert (
        settings
        == {
            "scheduler": ["DASK_ROLE=scheduler"],
            "worker": ["DASK_ROLE=worker", "DASK_SCHEDULER_ADDRESS=10.0.0.7:8786"],
            "local": ["DASK_ROLE=local", "DASK_LISTEN=0.0.0.0"],
        }[role]
    )
    if role == "worker":
        machine.write("etc/dask/dask.env", "DASK_ROLE=scheduler\n")
    started = machine.start()
    assert started.status == 0, started.output
    assert "TLS" not in started.output
    assert "DEFAULT_SCHEME=tls" in (tmp_path / "run/dask/comm.env").read_text()


def test_a_second_run_renews_the_certificates_and_keeps_the_ca(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with time_machine.travel(datetime.now(UTC) - timedelta(days=90)):
        assert cli.run(["-q", "certificates", str(tmp_path), "--scheduler", "10.0.0.7"]) == 0
    before = _files(tmp_path)
    capsys.readouterr()
    assert cli.run(["-q", "certificates", str(tmp_path), "--days", "30", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    after = _files(tmp_path)
    assert (told["new_ca"], told["folder"]) == (False, str(tmp_path))
    assert {name for name in before if after.get(name) == before[name]} == {
        ".gitignore",
        "ca.pem",
        "ca-key.pem",
        "client/dask.yaml",
        *(f"{role}/ca.pem" for role in Holder),
    }
    ends = {datetime.fromisoformat(one["end"]) for one in told["issued"]}
    assert all(timedelta(days=29) < end - datetime.now(UTC) <= timedelta(days=30) for end in ends)
    assert [one["role"] for one in told["issued"]] == list(Holder)
    # It has no address for the workers now, and the former file has the former certificate.
    assert "worker/user-data.yaml" not in after


def test_no_certificate_outlives_the_ca(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with time_machine.travel(datetime.now(UTC) - timedelta(days=CA_DAYS - 10)):
        assert cli.run(["-q", "certificates", str(tmp_path)]) == 0
    capsys.readouterr()
    assert cli.run(["-q", "certificates", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert {one["end"] for one in told["issued"]} == {told["ca_end"]}
    assert "the certificates end with the CA" in printed.err
    with time_machine.travel(datetime.now(UTC) + timedelta(days=11)):
        assert cli.run(["-q", "certificates", str(tmp_path)]) == 2
    assert "can't be used: it ended on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--days", "0"], "--days 0: expected 1 to 3650"),
        (["--days", "3651"], "--days 3651: expected"),
        (["--scheduler", "http://a:1"], "--scheduler http://a:1: expected HOST or HOST:PORT"),
        (["--scheduler", "10.0.0.7:99999"], "expected HOST or HOST:PORT"),
        (["--scheduler", "a b"], "expected HOST or HOST:PORT"),
    ],
)
def test_wrong_flags_make_nothing(
    tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["-q", "certificates", str(tmp_path / "new"), *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def _other(folder: Path) -> None:
    certificate = Authority.create(days=2).issue("other", days=1, serves=True).certificate
    (folder / "worker/cert.pem").write_text(certificate)


def _other_key(folder: Path) -> None:
    (folder / "ca-key.pem").write_text(Authority.create(days=2).key_pem)


def _no_ca(folder: Path) -> None:
    (folder / "ca.pem").write_bytes((folder / "worker/cert.pem").read_bytes())
    (folder / "ca-key.pem").write_bytes((folder / "worker/key.pem").read_bytes())


def test_an_interrupted_start_can_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key without its certificate would be taken for one whose certificate was lost."""

    def fails(path: Path, data: bytes | str) -> None:
        if path.name == "ca.pem":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomically(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(certificates, "write_atomically", fails)
        assert cli.run(["certificates", str(tmp_path / "tls")]) == 2
    assert cli.run(["certificates", str(tmp_path / "tls")]) == 0


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda folder: (folder / "ca-key.pem").unlink(), "has ca.pem, but no ca-key.pem"),
        (lambda folder: (folder / "ca.pem").unlink(), "has ca-key.pem, but no ca.pem"),
        (
            lambda folder: [(folder / name).unlink() for name in ("ca.pem", "ca-key.pem")],
            "scheduler is not from",
        ),
        (lambda folder: (folder / "ca.pem").write_text("nothing"), "can't be used: it can't be read"),
        (_other_key, "its key does not belong to its certificate"),
        (_no_ca, "its certificate is not a CA's"),
        (_other, "worker/cert.pem is not from this command and its CA"),
        (lambda folder: (folder / "client/cert.pem").unlink(), "client is not from this command"),
    ],
)
def test_files_of_another_origin_are_left_alone(
    tmp_path: Path, broken: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["-q", "certificates", str(tmp_path)]) == 0
    broken(tmp_path)
    before = _files(tmp_path)
    assert cli.run(["-q", "certificates", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err
    assert _files(tmp_path) == before


@pytest.mark.parametrize("ignored", [None, "build/\n"])
def test_a_folder_of_others_files_does_not_become_ignored(
    tmp_path: Path, ignored: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("")
    if ignored is not None:
        (tmp_path / ".gitignore").write_text(ignored)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for _ in range(2):
        assert cli.run(["certificates", str(tmp_path)]) == 0
        assert ("does not keep keys out of Git" in capsys.readouterr().err) is (ignored is not None)
    listed = ["git", "-C", str(tmp_path), "status", "--porcelain", "--untracked-files=all"]
    seen = {line[3:] for line in subprocess.check_output(listed, text=True).splitlines()}
    assert "mine.py" in seen
    if ignored is None:
        assert seen == {"mine.py"}
    else:
        assert (tmp_path / ".gitignore").read_text() == ignored


@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    ("algorithm", "extensions", "reason"),
    [
        (["rsa", "-pkeyopt", "rsa_keygen_bits:2048"], [], ""),
        (["ec", "-pkeyopt", "ec_paramgen_curve:P-384"], [], ""),
        (["ed25519"], [], "its key is neither EC nor RSA"),
        (
            ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
            ["-addext", "subjectKeyIdentifier=none"],
            "its certificate has no subject key identifier",
        ),
    ],
    ids=["rsa", "ec", "ed25519", "no-identifier"],
)
def test_a_ca_that_the_user_brings(
    tmp_path: Path,
    algorithm: list[str],
    extensions: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = ["-keyout", str(tmp_path / "ca-key.pem"), "-out", str(tmp_path / "ca.pem")]
    usage = ["-addext", "keyUsage=critical,keyCertSign"]
    kind = ["-newkey", *algorithm, "-nodes", "-subj", "/CN=mine", "-days", "9"]
    _openssl("req", "-x509", *kind, *files, *usage, *extensions)
    status = cli.run(["-q", "certificates", str(tmp_path)])
    assert (status, reason in capsys.readouterr().err) == (2 if reason else 0, True)
    if reason:
        return
    assert (tmp_path / ".gitignore").exists()
    verify = ("verify", "-x509_strict", "-CAfile", tmp_path / "ca.pem")
    _openssl(*verify, *(tmp_path / role / "cert.pem" for role in Holder))
    for role in MACHINES:
        assert len((tmp_path / role / "bundle.pem").read_text()) <= LONGEST_PARAMETER


def test_certificates_pass_the_strict_mode_of_python(folder: Path) -> None:
    def context(purpose: ssl.Purpose, role: Holder) -> ssl.SSLContext:
        made = ssl.create_default_context(purpose, cafile=str(folder / role / "ca.pem"))
        made.check_hostname, made.verify_mode = False, ssl.CERT_REQUIRED
        # Python's default since 3.13; distributed clears it.
        made.verify_flags |= ssl.VERIFY_X509_STRICT
        made.load_cert_chain(folder / role / "cert.pem", folder / role / "key.pem")
        return made

    for role in Holder:
        left, right = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = context(ssl.Purpose.CLIENT_AUTH, Holder.SCHEDULER).wrap_bio(left, right, server_side=True)
        client = context(ssl.Purpose.SERVER_AUTH, role).wrap_bio(right, left)
        unfinished = [client, server]
        while unfinished:
            for side in list(unfinished):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
                    unfinished.remove(side)


def test_a_folder_that_cannot_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "in"):
        assert cli.run(["-q", "certificates", str(path)]) == 2
        assert f"error: {path}" in capsys.readouterr().err


ASK = """
import sys
from distributed import Client, Security
ca, certificate, key, address = sys.argv[1:]
security = None
if certificate:
    files = dict(tls_ca_file=ca, tls_client_cert=certificate, tls_client_key=key)
    security = Security(**files, require_encryption=True)
with Client(address, security=security, timeout="20s", set_as_default=False) as client:
    print(client.submit(sum, [20, 22]).result(60))
"""


def _ask(folder: Path, ca: Path, address: str, scheme: str = "tls") -> subprocess.CompletedProcess[str]:
    """Connect with the client's certificate of a folder, or with none and without TLS."""
    files: list[Any] = (
        [folder / "client/cert.pem", folder / "client/key.pem"] if scheme == "tls" else ["", ""]
    )
    address = re.sub("^tls", scheme, address)
    return subprocess.run(
        [sys.executable, "-c", ASK, ca, *files, address], capture_output=True, text=True, check=False
    )


def test_a_real_cluster_takes_its_own_and_refuses_everybody_else(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert cli.run(["-q", "certificates", str(other)]) == 0
    with scheduler(tmp_path, "tls", *tls_flags(folder / "scheduler")) as address:
        flags = ("--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path / "worker"))
        log = tmp_path / "worker.log"
        with dask("worker", address, *tls_flags(folder / "worker"), *flags, log=log):
            said(log, "Registered to")
            own = _ask(folder, folder / "ca.pem", address)
            assert own.stdout == "42\n", own.stderr
            # Renewed: the CA is the same.
            assert cli.run(["-q", "certificates", str(folder), "--scheduler", "10.0.0.7"]) == 0
            assert _ask(folder, folder / "ca.pem", address).stdout == "42\n"
            # Another CA's client that trusts this scheduler; one that does not; one without TLS.
            assert _ask(other, folder / "ca.pem", address).returncode != 0
            assert _ask(other, other / "ca.pem", address).returncode != 0
            assert _ask(folder, folder / "ca.pem", address, "tcp").returncode != 0
            assert _ask(folder, folder / "ca.pem", address).stdout == "42\n"


def test_a_client_s_certificate_is_none_for_a_scheduler(folder: Path) -> None:
    """Else every client could take the workers' connections."""
    authority = Authority.load((folder / "ca.pem").read_bytes(), (folder / "ca-key.pem").read_bytes())
    for holder, refused in ((Holder.CLIENT, True), (Holder.WORKER, False)):
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(folder / holder / "cert.pem", folder / holder / "key.pem")
        client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=authority.pem)
        client.check_hostname = False
        left, right = ssl.MemoryBIO(), ssl.MemoryBIO()
        sides = [client.wrap_bio(left, right), server.wrap_bio(right, left, server_side=True)]
        reason = ""
        for side in (*sides, *sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as wrong:
                reason = wrong.verify_message
                break
        assert ("purpose" in reason) is refused


def test_the_client_s_configuration_is_enough_for_dask(folder: Path, tmp_path: Path) -> None:
    code = (
        "from distributed import Security; s = Security(); "
        "print(s.require_encryption, s.tls_ca_file, s.tls_client_key)"
    )
    environment: Mapping[str, str] = {**os.environ, "DASK_CONFIG": str(folder / "client/dask.yaml")}
    told = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, cwd=tmp_path)
    assert told.split() == ["True", str(folder / "client/ca.pem"), str(folder / "client/key.pem")]


def test_help_does_not_load_cryptography(tmp_path: Path) -> None:
    code = (
        "import sys; from ami_builder.cli import app; app.run(['certificates', '--help']); "
        "print('cryptography' in sys.modules)"
    )
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert told.splitlines()[-1] == "False"
