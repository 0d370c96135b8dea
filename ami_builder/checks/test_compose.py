"""The Compose file starts without a limit on an older image, or after a failed measurement."""

import json
import re

import pytest

from ami_builder.checks.machine_state import VARIABLE, MachineState

pytestmark = pytest.mark.first_boot

FILES = {"in place": "compose", "the image's own": "image"}
LINE = re.compile(rf"^\s*mem_limit:\s*[\"']?\$\{{{VARIABLE}:-0\}}[\"']?\s*(#.*)?$", re.MULTILINE)


def limits(text: str) -> dict[str, int]:
    """Return each service's limit as `docker compose config` printed it; fails with Compose's own error."""
    # Compose warns before it prints: the JSON begins at the first line that is a brace.
    start = re.search(r"^\{", text, re.MULTILINE)
    assert start, f"docker compose config fails: {(text.strip().splitlines() or ['no output'])[-1]}"
    services = json.loads(text[start.start() :])["services"]
    return {name: _limit(service) for name, service in services.items()}


def _limit(service: dict[str, object]) -> int:
    deploy = service.get("deploy")
    resources = deploy.get("resources") or {} if isinstance(deploy, dict) else {}
    return int(str(service.get("mem_limit") or (resources.get("limits") or {}).get("memory") or 0))


@pytest.mark.parametrize("file", FILES)
def test_compose_file_has_mem_limit(machine: MachineState, file: str) -> None:
    """Without this line the variable exists and Dask starts, but has no limit."""
    text = machine.text["compose" if file == "in place" else "compose.image"]
    assert LINE.search(text), f"the Compose file {file} has no line mem_limit: ${{{VARIABLE}:-0}}" + (
        "" if text.strip() else ": it is empty or missing"
    )


@pytest.mark.parametrize("file", FILES)
def test_no_variable_means_no_limit(machine: MachineState, file: str) -> None:
    """A Compose file with this line must also start where nothing was measured."""
    found = limits(machine.text[f"{FILES[file]}.unset"])
    assert set(found.values()) == {0}, f"without {VARIABLE} the limits are {found}, expected 0"
