"""The checks of TLS, held against machines whose port answers the wrong clients."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from ami_builder.checks.machine_state import ListedWorker, SchedulerAnswer

GOOD = "with a certificate: answers\nwithout a certificate: refuses\nwithout TLS: refuses\n"


@pytest.fixture(scope="module")
def checks(pytestconfig: pytest.Config) -> Any:
    pytestconfig.addinivalue_line("markers", "tls: as the plugin has it")
    return importlib.import_module("ami_builder.checks.test_tls")


def _machine(text: str) -> Any:
    return SimpleNamespace(lines=lambda section: tuple({"tls": text}[section].splitlines()))


def _dask(*addresses: str) -> SchedulerAnswer:
    workers = tuple(ListedWorker(address=one, memory_limit=1, directory="/spill") for one in addresses)
    return SchedulerAnswer(workers=workers, error="")


def test_a_machine_with_tls_passes(checks: Any) -> None:
    checks.test_only_clients_with_a_certificate_get_an_answer(_machine(GOOD))
    checks.test_workers_use_tls(_dask("tls://127.0.0.1:40001", "tls://127.0.0.1:40002"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no certificates"),
        (GOOD.replace("TLS: refuses", "TLS: answers"), "without TLS: answers"),
        (GOOD.replace("a certificate: refuses", "a certificate: answers"), "without a certificate: answers"),
        (GOOD.replace("answers", "refuses"), "with a certificate: refuses"),
        (GOOD.splitlines()[0], "with a certificate: answers"),
        ("Traceback: no module named ssl", "no module named ssl"),
    ],
)
def test_another_answer_is_red(checks: Any, text: str, said: str) -> None:
    with pytest.raises(AssertionError, match=f"port 8786 .*{said}"):
        checks.test_only_clients_with_a_certificate_get_an_answer(_machine(text))


def test_a_worker_without_tls_is_red(checks: Any) -> None:
    with pytest.raises(AssertionError, match=r"workers without TLS: tcp://127\.0\.0\.1:40002"):
        checks.test_workers_use_tls(_dask("tls://127.0.0.1:40001", "tcp://127.0.0.1:40002"))
