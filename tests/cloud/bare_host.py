"""Commands as a host without Linux's own things runs them: `python -m tests.cloud.bare_host`.

stdin has a list of commands in JSON, each a list of arguments. stdout gets their results as a list in JSON.
The instances have no ssh, as in the other tests here (flow.py).
"""

from __future__ import annotations

import json
import sys

import pytest

import ami_builder
from tests.cloud.flow import captured, in_haste, without_ssh


def main() -> None:
    """Run the commands one after another, up to the first that fails."""
    monkeypatch = pytest.MonkeyPatch()
    without_ssh(monkeypatch)
    in_haste(monkeypatch)
    results = []
    for command in json.load(sys.stdin):
        ran = captured(*command, settings=())
        results.append({"status": ran.status, "out": ran.out, "err": ran.err})
        if ran.status:
            break
    json.dump({"platform": sys.platform, "package": ami_builder.__file__, "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
