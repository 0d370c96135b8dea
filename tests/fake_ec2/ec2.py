"""EC2's actions in one class, performed for one call."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from moto.core.exceptions import ServiceException
from moto.core.request import Request

from tests.fake_ec2.calls import Answer, Refused
from tests.fake_ec2.images import Images
from tests.fake_ec2.instances import Instances
from tests.fake_ec2.state import State


class _Request(Request):
    from_wsgi_server = True


class EC2(Images, Instances):
    """One call to EC2: `prepared` reads its parameters, `performed` does it."""

    @classmethod
    def prepared(cls, state: State, environ: Mapping[str, Any], body: bytes) -> EC2:
        """Return the call that a request makes, not performed yet; raises Refused when it can't be read."""
        call = cls(state)
        request = _Request({**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))})
        try:
            call.setup_class(request)
        except ServiceException as error:
            raise Refused(error.code, error.message) from error
        return call

    def performed(self) -> Answer:
        """Do it and return the answer; raises Refused."""
        status, headers, body = self.call_action()
        raw = body.encode() if isinstance(body, str) else bytes(body)
        kind = headers.get("Content-Type", "text/xml")
        return Answer(status=int(status), body=raw, content_type=kind, code=_code(raw))


def _code(body: bytes) -> str:
    if b"<Errors>" not in body[:400]:
        return ""
    return body.partition(b"<Code>")[2].partition(b"</Code>")[0].decode()
