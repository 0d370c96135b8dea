"""What moto's Parameter Store lacks: an aws:ec2:image value is looked at only after it was accepted.

One that names no AMI of the region is dropped without a word, and a good one may take a while
(Options.parameter_reads). The answer tells the number that the version would have in either case.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from moto.ssm.models import ssm_backends

from tests.fake_ec2.calls import ACCOUNT, Answer, Call
from tests.fake_ec2.state import State


def performed(call: Call, state: State, by_moto: Callable[[], Answer]) -> Answer:
    """Do a call to SSM and return the answer."""
    if call.action.startswith("GetParameter") and state.parameter is not None:
        state.reads -= 1
        if state.reads < 0:
            _do(state)
    if call.action != "PutParameter" or call.params.get("DataType") != "aws:ec2:image":
        return by_moto()
    _do(state)
    versions = ssm_backends[ACCOUNT][call.region]._parameters.get(call.params["Name"], [])
    known = call.params["Value"] in state.backend(ACCOUNT, call.region).amis
    if known and (not state.options.parameter_reads or (versions and not call.params.get("Overwrite"))):
        return by_moto()
    if known:
        state.parameter, state.reads = by_moto, state.options.parameter_reads
    told = {"Version": (versions[-1].version if versions else 0) + 1, "Tier": "Standard"}
    return Answer(status=200, body=json.dumps(told).encode(), content_type="application/x-amz-json-1.1")


def _do(state: State) -> None:
    if state.parameter is not None:
        state.parameter()
    state.parameter = None
