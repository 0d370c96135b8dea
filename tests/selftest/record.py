"""Record what the cloud on loopback does in a selftest: `python -m tests.selftest.record`.

The selftest compares an account with this. It is recorded with two kinds of credentials, since EC2's answers
about what does not exist depend on their permissions.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ami_builder.aws.session import Account
from ami_builder.config import loading
from ami_builder.config.types import Destination
from ami_builder.console import Mode, open_progress
from ami_builder.core.records import TargetKind
from ami_builder.selftest import compare, plan
from ami_builder.selftest.budget import Budget
from ami_builder.selftest.run import Result, Selftest
from ami_builder.state.workspace import Workspace
from tests.cloud.flow import SETTINGS, captured, in_haste, without_ssh
from tests.fake_ec2.server import Cloud

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ami_builder.selftest.recording import Recording

COPY_REGION = "eu-west-1"
EVERYTHING, PRINTED = "credentials that may do everything", "credentials with the policy of `iam-policy`"
_KEY = "AKIASELFTESTSELFTEST"


def prepare(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process at an empty cloud whose AMIs take a moment, without ssh and long waits."""
    cloud.reset()
    cloud.options.image_describes = 2
    cloud.options.parameter_reads = 1
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AMI_BUILDER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    without_ssh(monkeypatch)
    in_haste(monkeypatch)


def run(home: Path, *, spend: float = 10.0, copy_region: str = COPY_REGION) -> Result:
    """Run a selftest with the settings of the other tests, in this process."""
    settings = loading.overrides_from(word for word in SETTINGS if word != "--set")
    chosen = loading.load(None, environ={}, overrides=settings, target=TargetKind.AWS).select()
    destination = Destination(region=copy_region) if copy_region else None
    image = plan.selftest_image(chosen, "selftest-recorded", destination)
    account = Account.open(image.aws.region)
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(home)})
    with open_progress(Mode.QUIET) as progress:
        one = Selftest(
            plan=plan.plan(account, image, None),
            workspace=workspace,
            budget=Budget(spend=spend),
            progress=progress,
        )
        return one.run()


def enforce_printed(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the permissions that `iam-policy` prints for all of the work, and no more."""
    printed = captured("iam-policy", settings=(*SETTINGS, "--set", f"aws.copy_to={COPY_REGION}"))
    assert printed.status == 0, printed.err
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", _KEY)
    cloud.enforce(json.loads(printed.out), _KEY)


def recordings(cloud: Cloud) -> Mapping[str, Recording]:
    """Return what the cloud does, for each kind of credentials; raises what stops a selftest."""
    found: dict[str, Recording] = {}
    for kind in (EVERYTHING, PRINTED):
        home = Path(tempfile.mkdtemp(prefix="selftest-"))
        try:
            with pytest.MonkeyPatch.context() as monkeypatch:
                prepare(cloud, monkeypatch)
                if kind == PRINTED:
                    enforce_printed(cloud, monkeypatch)
                result = run(home)
        finally:
            shutil.rmtree(home, ignore_errors=True)
        if result.error is not None:
            raise result.error
        assert not result.remnants
        found[kind] = result.recording
    return found


def main() -> None:
    """Write the file that the package ships."""
    with Cloud() as cloud:
        text = compare.dump(recordings(cloud))
    Path(compare.__file__).with_name(compare.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
