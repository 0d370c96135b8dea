"""One AWS account in one region: credentials, clients, errors with a hint, and waiting for a result."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_exponential

from ami_builder import __version__
from ami_builder.core.errors import CloudFailed

if TYPE_CHECKING:
    from types_boto3_ec2.client import EC2Client

ATTEMPTS = 10
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_LOOK_SECONDS = 15.0

T = TypeVar("T")

_LOGIN = "log in again (`aws sso login`, or new keys), or choose another AWS_PROFILE"
DENIED = frozenset({"UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "UnauthorizedAccess"})
_EXPIRED = frozenset(
    {
        "AuthFailure",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_THROTTLED = frozenset({"RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled"})
_QUOTA = re.compile(r"LimitExceeded$|QuotaExceeded$")
_ACTION = re.compile(r"not authorized to perform:? ([a-z0-9-]+:[A-Za-z]+)")
_ENCODED = re.compile(r"\s*Encoded authorization failure message:.*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose credentials are in use."""

    account: str
    arn: str


class Account:
    """One account in one region; threads may share it."""

    def __init__(self, session: Any, region: str) -> None:
        self.region = region
        self._session = session
        self._clients: dict[tuple[str, str, int], Any] = {}
        self._lock = threading.RLock()

    @classmethod
    def open(cls, region: str = "") -> Account:
        """Return the account of the standard chain's credentials; `region` empty: the chain's own too.

        Raises CloudFailed when there are no credentials, or no region.
        """
        with aws_errors():
            # botocore reads AWS_DEFAULT_REGION alone; every other program of AWS reads this first.
            core = botocore.session.get_session()
            core.register_component("data_loader", _descriptions())
            session = boto3.session.Session(
                botocore_session=core, region_name=region or os.environ.get("AWS_REGION") or None
            )
            credentials = session.get_credentials()
        if session.region_name is None:
            raise CloudFailed(
                "no AWS region is set", hint="set aws.region in ami-builder.toml, or AWS_REGION"
            )
        if credentials is None:
            raise CloudFailed(
                "there are no AWS credentials",
                hint="set AWS_PROFILE, log in with `aws sso login`, or run where a role gives them",
            )
        return cls(session, session.region_name)

    def in_region(self, region: str) -> Account:
        """Return the same account in another region."""
        other = Account(self._session, region)
        other._lock = self._lock  # a session must not make two clients at once
        return self if region == self.region else other

    @property
    def ec2(self) -> EC2Client:
        """The client of EC2."""
        return self.client("ec2")  # type: ignore[no-any-return]

    @property
    def ec2_once(self) -> EC2Client:
        """The client of EC2 that leaves it to its caller to try again."""
        return self.client("ec2", attempts=1)  # type: ignore[no-any-return]

    def client(self, name: str, region: str = "", *, attempts: int = 0) -> Any:
        """Return the client of a service in this region, or in another for those that live in one only.

        It makes up to `attempts` attempts at a call, 10 unless told.
        """
        key = (name, region or self.region, attempts or ATTEMPTS)
        with self._lock:
            if key not in self._clients:
                config = Config(
                    retries={"mode": "standard", "total_max_attempts": key[2]},
                    user_agent_extra=f"ami-builder/{__version__}",
                    connect_timeout=_CONNECT_SECONDS,
                    read_timeout=_READ_SECONDS,
                )
                with aws_errors(name):
                    self._clients[key] = self._session.client(name, region_name=key[1], config=config)
            return self._clients[key]

    def endpoint(self, name: str) -> str:
        """Return where a service is spoken to other than at AWS (AWS_ENDPOINT_URL); empty for AWS itself."""
        given = os.environ.get(f"AWS_ENDPOINT_URL_{name.upper()}") or os.environ.get("AWS_ENDPOINT_URL")
        return str(self.client(name).meta.endpoint_url) if given else ""

    def environment(self) -> dict[str, str]:
        """Return what another program needs in its environment to be this account, whatever the chain was.

        Packer 1.6 knows less of the chain than boto3. Only ever hand it to a child, never to argv or a file.
        """
        with aws_errors("sts"):
            found = self._session.get_credentials().get_frozen_credentials()
        named = {
            "AWS_ACCESS_KEY_ID": found.access_key,
            "AWS_SECRET_ACCESS_KEY": found.secret_key,
            "AWS_SESSION_TOKEN": found.token,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
        }
        given = {
            k: v for k, v in os.environ.items() if k.startswith("AWS_ENDPOINT_URL") or k == "AWS_CA_BUNDLE"
        }
        return given | {name: value for name, value in named.items() if value}

    def identity(self) -> Identity:
        """Ask AWS whose credentials these are; raises CloudFailed when it takes them for nobody's."""
        with aws_errors("sts"):
            answer = self.client("sts").get_caller_identity()
        return Identity(account=answer["Account"], arn=answer["Arn"])


@cache
def _descriptions() -> Any:
    """Return what reads the descriptions of services: one for all sessions, since EC2's is long."""
    return botocore.session.get_session().get_component("data_loader")


def code_of(error: ClientError) -> str:
    """Return AWS's code of an error, such as `InvalidAMIID.NotFound`."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_definite(error: BaseException) -> bool:
    """Tell whether an error says for sure that the call did nothing, rather than that no answer came."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(cause, ClientError):
        return False
    # A repeated call that finds a duplicate may have found what its first attempt made.
    if code_of(cause) in _THROTTLED or code_of(cause).endswith(".Duplicate"):
        return False
    return 400 <= cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) < 500


@contextmanager
def aws_errors(service: str = "ec2") -> Iterator[None]:
    """Turn botocore's errors within into CloudFailed, which names the call and says what to do."""
    try:
        yield
    except ClientError as error:
        raise failure(error, service) from error
    except BotoCoreError as error:
        raise _not_answered(error) from error


def failure(error: ClientError, service: str = "ec2") -> CloudFailed:
    """Return an error of AWS's as one of ours."""
    code = code_of(error)
    said = error.response.get("Error", {}).get("Message", "")
    request = error.response.get("ResponseMetadata", {}).get("RequestId", "")
    call = f"{service}:{error.operation_name}"
    message = _ENCODED.sub("", said).strip().rstrip(".")
    return CloudFailed(
        f"AWS refused {call}: {code}" + (f": {message}" if message else ""),
        hint=_hint(code, call, said),
        tail=(f"request id {request}",) if request else (),
    )


def _hint(code: str, call: str, said: str) -> str | None:
    if code in DENIED:
        named = _ACTION.search(said)
        action = named[1] if named else call
        return f"allow {action} to these credentials: `ami-builder iam-policy` prints all that is needed"
    if code in _EXPIRED:
        return f"the credentials are not valid, or not any more: {_LOGIN}"
    if code in _THROTTLED:
        return f"AWS limits the rate of calls and {ATTEMPTS} attempts were not enough: try again later"
    if code == "InsufficientInstanceCapacity":
        return "name more aws.instance_types, or aws.subnets in other zones"
    if _QUOTA.search(code):
        return "the account is at its quota: end what is not needed, or ask Service Quotas for more"
    if code in {"InternalError", "InternalFailure", "ServiceUnavailable", "Unavailable", "503", "500"}:
        return "AWS failed: try again later; `ami-builder gc` shows what may have been left"
    return None


def _not_answered(error: BotoCoreError) -> CloudFailed:
    name = type(error).__name__
    if "Credential" in name or "Token" in name or "SSO" in name or "Profile" in name:
        return CloudFailed(f"the AWS credentials can't be used: {error}", hint=_LOGIN)
    return CloudFailed(
        f"AWS did not answer: {error}",
        hint="is the network up, the region's name right, and AWS_ENDPOINT_URL unset or right?",
    )


def poll(probe: Callable[[], T], *, seconds: float) -> T:
    """Call `probe` until its result is true, for at most `seconds`, and return its last result.

    Ctrl-C does not end it: clean-up goes on after everything else was interrupted.
    """
    retrying = Retrying(
        retry=retry_if_result(lambda result: not result),
        stop=stop_after_delay(seconds),
        wait=wait_exponential(multiplier=0.25, exp_base=1.5, max=10.0),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    return retrying(probe)


def look_for(find: Callable[[], T | None]) -> T | None:
    """Return what `find` finds, or None; for what EC2 may have made without answering, and shows late."""
    return poll(find, seconds=_LOOK_SECONDS)
