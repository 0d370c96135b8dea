"""One API call as it arrives, and the answers that refuse it, in the protocol that it came in."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

ACCOUNT = "123456789012"
"""moto's, and so everybody's here."""


class Refused(Exception):
    """What AWS would answer with an error; `status` is HTTP's."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


@dataclass(slots=True, kw_only=True)
class ApiCall:
    """One call, and what came of it: `outcome` is `ok`, an error code, or a fault's name."""

    service: str
    action: str
    region: str
    access_key: str
    params: Mapping[str, Any] = field(default_factory=dict)
    """As botocore names them."""
    packer: bool = False
    """Whether Packer made it, the one client here that is written in Go."""
    authorised: bool = True
    fleet_error: Refused | None = None
    """What a fleet may not launch, which is an error in its answer."""
    outcome: str = "ok"

    @property
    def name(self) -> str:
        """The action as IAM policies name it."""
        return f"{self.service}:{self.action}"

    def as_json(self) -> dict[str, Any]:
        """Return what the log keeps, as JSON can hold it."""
        return {
            "service": self.service,
            "action": self.action,
            "region": self.region,
            "access_key": self.access_key,
            "params": json.loads(json.dumps(self.params, default=str)),
            "packer": self.packer,
            "authorised": self.authorised,
            "outcome": self.outcome,
        }


def parse(environ: Mapping[str, Any], body: bytes) -> tuple[ApiCall, dict[str, str]]:
    """Return the call that a request makes, without its parameters, and the fields of its form.

    Raises Refused when it is not signed as AWS's SDKs sign.
    """
    signed = environ.get("HTTP_AUTHORIZATION", "")
    try:
        key, _, region, service, _ = signed.partition("Credential=")[2].split(",")[0].split("/")
    except ValueError:
        raise Refused("MissingAuthenticationToken", "the request is not signed", 403) from None
    packer = "aws-sdk-go" in environ.get("HTTP_USER_AGENT", "")
    target = environ.get("HTTP_X_AMZ_TARGET", "")
    if target:
        form: dict[str, str] = {}
        action = target.rpartition(".")[2]
    else:
        form = {
            name: values[0]
            for name, values in parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True).items()
        }
        action = form.get("Action", f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
    call = ApiCall(service=service, action=action, region=region, access_key=key, packer=packer)
    return call, form


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    """An HTTP answer."""

    status: int
    body: bytes
    content_type: str = "text/xml"
    code: str = ""
    """AWS's error code; empty when it is none."""


def refusal(call: ApiCall, refused: Refused) -> HttpAnswer:
    """Return the answer that says no, as the call's service would say it."""
    code, message = escape(refused.code), escape(refused.message)
    request_id = secrets.token_hex(8)
    if call.service == "ec2":
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error>'
            f"<Code>{code}</Code><Message>{message}</Message></Error></Errors>"
            f"<RequestID>{request_id}</RequestID></Response>"
        )
    elif call.service in ("sts", "iam", "autoscaling"):
        body = (
            f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
            f"<RequestId>{request_id}</RequestId></ErrorResponse>"
        )
    else:
        raw = json.dumps({"__type": refused.code, "message": refused.message}).encode()
        return HttpAnswer(
            status=refused.status, body=raw, content_type="application/x-amz-json-1.1", code=refused.code
        )
    return HttpAnswer(status=refused.status, body=body.encode(), code=refused.code)
