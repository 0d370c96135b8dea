"""A machine with certificates uses TLS for all connections, and takes only clients of the same CA."""

import pytest

from ami_builder.checks.machine_state import MachineState, SchedulerAnswer

pytestmark = pytest.mark.tls

ANSWERS = ("with a certificate: answers", "without a certificate: refuses", "without TLS: refuses")


def test_only_clients_with_a_certificate_get_an_answer(machine: MachineState) -> None:
    """A client that can connect to Dask's ports can run programs here."""
    found = machine.lines("tls")
    assert found == ANSWERS, f"port 8786 {'; '.join(found) or 'has no certificates'}"


def test_workers_use_tls(dask: SchedulerAnswer) -> None:
    """Workers send data to each other, and take it from each other."""
    plain = [worker.address for worker in dask.workers if not worker.address.startswith("tls://")]
    assert not plain, f"workers without TLS: {', '.join(plain)}"
