"""The WSGI application: every request goes through faults, permissions and the log before moto sees it."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import threading
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moto.core.exceptions import ServiceException
from moto.core.request import Request
from moto.core.responses import BaseResponse
from moto.core.utils import camelcase_to_underscores
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

from tests.fake_ec2 import other_services, scaling_actions, strict
from tests.fake_ec2.account_actions import AccountActions
from tests.fake_ec2.api_call import ACCOUNT, ApiCall, HttpAnswer, Refused, parse, refusal
from tests.fake_ec2.cloud_state import CloudState
from tests.fake_ec2.faults import Fault, Faults, Rule
from tests.fake_ec2.guard import Guard
from tests.fake_ec2.identity_actions import Iam, Sts
from tests.fake_ec2.image_actions import ImageActions
from tests.fake_ec2.instance_actions import InstanceActions
from tests.fake_ec2.scaling_actions import ScalingActions, ScalingGroup
from tests.fake_ec2.scaling_launches import Launches
from tests.fake_ec2.template_actions import TemplateActions
from tests.fake_ec2.touched_resources import not_found, touched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tests.fake_ec2.cloud_state import CloudOptions

CONTROL = "/_cloud/"

_HTTP = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 412: "Precondition Failed"}


class _Request(Request):
    from_wsgi_server = True


class EC2(AccountActions, ImageActions, InstanceActions, TemplateActions):
    """One call to EC2."""


def _performed(action: BaseResponse, environ: Mapping[str, Any], body: bytes) -> HttpAnswer:
    """Let one of moto's responses read and answer a request; raises Refused."""
    request = _Request({**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))})
    try:
        action.setup_class(request)
    except ServiceException as error:
        raise Refused(error.code, error.message) from error
    status, headers, text = action.call_action()
    raw = text.encode() if isinstance(text, str) else bytes(text)
    kind = headers.get("Content-Type", "text/xml")
    return HttpAnswer(status=int(status), body=raw, content_type=kind, code=_error_code(raw))


def _error_code(body: bytes) -> str:
    if b"<Errors>" not in body[:400]:
        return ""
    return body.partition(b"<Code>")[2].partition(b"</Code>")[0].decode()


class Shim:
    """What the server runs; `lock` is held while moto works, since moto is not made for threads."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.state = CloudState()
        self.faults = Faults()
        self.guard = Guard()
        self.calls: list[ApiCall] = []
        self.on_reset: Callable[[], None] = lambda: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._launches = Launches(lambda: self.state, self._acted)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if environ["PATH_INFO"].startswith(CONTROL):
            answer = self._control(environ["REQUEST_METHOD"], environ["PATH_INFO"], body)
        else:
            answer = self._answer(environ, body)
        status = f"{answer.status} {_HTTP.get(answer.status, 'Error')}"
        headers = [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body)))]
        start_response(status, headers)
        return [answer.body]

    def _answer(self, environ: dict[str, Any], body: bytes) -> HttpAnswer:
        try:
            call, form = parse(environ, body)
        except Refused as refused:
            return refusal(ApiCall(service="ec2", action="", region="", access_key=""), refused)
        with self.lock:
            self.calls.append(call)
        rule = self.faults.meet(call.action, call.region, packer=call.packer)
        fault = rule.fault if rule is not None else None
        try:
            _before(fault)
            answer = self._performed(call, form, environ, body)
            if fault is Fault.DUPLICATED:
                self._performed(call, form, environ, body)
        except Refused as refused:
            answer = refusal(call, refused)
        except ConnectionResetError:
            call.outcome = Fault.RESET.value
            _hang_up(environ)
            raise
        except Exception:
            # Loud, and not retried: what is missing here must be noticed.
            traceback.print_exc()
            answer = refusal(call, Refused("NotImitated", f"this cloud failed at {call.name}", 501))
        answer = _differing(answer, self.state.options)
        call.outcome = answer.code or "ok"
        if rule is not None and fault is Fault.SLOW:
            self.faults.hold(rule.seconds)
        if fault is Fault.LOST_RESPONSE:
            call.outcome = f"{call.outcome}, {fault.value}"
            _hang_up(environ)
            raise ConnectionResetError(fault.value)
        return answer

    def _performed(
        self, call: ApiCall, form: Mapping[str, str], environ: dict[str, Any], body: bytes
    ) -> HttpAnswer:
        with self.lock:
            self.state.require_valid(call)
            # moto's groups are the process's: another cloud of this process may have had them.
            ScalingGroup.launcher = self._launches
            scaling_actions.advance()
            call.params = strict.parsed(call.service, call.action, form, body)
            if call.service == "ec2":
                backend = self.state.backend(ACCOUNT, call.region)
                unseen = self.state.unseen(call)
                self.guard.judge(call, backend, unseen)
                if unseen:
                    raise not_found(min(unseen))
                if call.params.get("DryRun"):
                    raise _tried(call, backend)
                return _performed(EC2(self.state, call, self.guard), environ, body)
            self.guard.judge(call, None)
            if call.action == "SimulatePrincipalPolicy":
                return _performed(Iam(self.guard, call), environ, body)
            if call.service == "sts":
                return _performed(Sts(self.guard, call), environ, body)
            if call.service == "autoscaling":
                return _performed(ScalingActions(), environ, body)
            if call.service == "pricing":
                return other_services.products(call.params, self.state.options.region_prices)
            if call.service == "servicequotas":
                return other_services.quota(call.params, self.state.options.vcpu_quotas)
            if call.service == "ssm":
                # Debian's parameter is there as soon as its region is used.
                self.state.backend(ACCOUNT, call.region)
                return other_services.parameter_call(call, self.state, lambda: self._by_moto(environ, body))
            return self._by_moto(environ, body)

    def _acted(self, call: ApiCall, environ: dict[str, Any], body: bytes) -> Any:
        """Do an action of EC2 for another service, and return its result; raises Refused."""
        action = EC2(self.state, call, self.guard)
        try:
            action.setup_class(_Request({**environ, "wsgi.input": io.BytesIO(body)}))
            return getattr(action, camelcase_to_underscores(call.action))().result
        except ServiceException as error:
            raise Refused(error.code, error.message) from error

    def _by_moto(self, environ: dict[str, Any], body: bytes) -> HttpAnswer:
        heard: dict[str, Any] = {}

        def start_response(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            heard.update(status=int(status.split()[0]), headers=dict(headers))

        fresh = {**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        raw = b"".join(self._moto(fresh, start_response))
        kind = heard["headers"].get("Content-Type", "text/xml")
        return HttpAnswer(
            status=heard["status"], body=raw, content_type=kind, code=_code(heard["status"], raw)
        )

    def _control(self, method: str, path: str, body: bytes) -> HttpAnswer:
        answer: Any = {}
        status = 200
        match method, path.removeprefix(CONTROL):
            case "GET", "calls":
                with self.lock:
                    answer = [call.as_json() for call in self.calls]
            case "POST", "faults":
                try:
                    self.faults.add_rule(Rule.of(json.loads(body)))
                except (ValueError, TypeError, KeyError) as error:
                    status, answer = 400, {"error": str(error)}
            case "DELETE", "faults":
                self.faults.clear()
            case "POST", "reset":
                self.on_reset()
            case _:
                status, answer = 404, {"error": f"there is no {method} {path}"}
        return HttpAnswer(status=status, body=json.dumps(answer).encode(), content_type="application/json")


def _tried(call: ApiCall, backend: Any) -> Refused:
    """Return what EC2 answers to a try (DryRun) that is allowed."""
    for it in touched(call, backend):
        if it.unknown:
            return Refused(it.unknown, f"{it.arn.rpartition('/')[2]} does not exist")
    # behaviour: dry-run
    return Refused("DryRunOperation", "Request would have succeeded, but DryRun flag is set.", 412)


def _differing(answer: HttpAnswer, options: CloudOptions) -> HttpAnswer:
    """Return an answer as a cloud gives it that differs on purpose."""
    body = answer.body
    code = options.other_codes.get(answer.code, answer.code)
    if code != answer.code:
        body = body.replace(answer.code.encode(), code.encode(), 1)
    for name in options.left_out:
        body = re.sub(rf"<{name}>.*?</{name}>|<{name} */>".encode(), b"", body, flags=re.DOTALL)
    return replace(answer, body=body, code=code)


def _before(fault: Fault | None) -> None:
    if fault is Fault.THROTTLE:
        raise Refused("RequestLimitExceeded", "Request limit exceeded.", 503)
    if fault is Fault.HTTP500:
        raise Refused("InternalError", "An internal error has occurred", 500)
    if fault is Fault.RESET:
        raise ConnectionResetError(fault.value)


def _hang_up(environ: dict[str, Any]) -> None:
    """Close the connection at once, with a reset rather than an orderly end."""
    connection: socket.socket = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)


def _code(status: int, body: bytes) -> str:
    if status < 400:
        return ""
    text = body.decode(errors="replace")
    if text.lstrip().startswith("{"):
        return str(json.loads(text).get("__type", status)).rpartition("#")[2]
    return text.partition("<Code>")[2].partition("</Code>")[0] or str(status)
