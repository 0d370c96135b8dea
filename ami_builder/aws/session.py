"""One AWS account in one region: credentials, clients, errors with a hint, and waiting for a result."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError
from botocore.utils import parse_timestamp
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_exponential

from ami_builder import __version__
from ami_builder.aws import hints
from ami_builder.aws.credentials import ServedCredentials, served
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.regions import REGION

if TYPE_CHECKING:
    from types_boto3_ec2.client import EC2Client

ATTEMPTS = 10
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_LOOK_SECONDS = 15.0
_VALUES = 200
PAGES = {
    "ec2": 1000,
    "describe_instance_types": 100,
    "describe_route_tables": 100,
    "describe_launch_templates": 200,
    "describe_launch_template_versions": 200,
    "autoscaling": 100,
    "ssm": 50,
    "get_parameters_by_path": 10,
}
"""The most entries of a page that AWS accepts: of a call, or else of any call of a service."""

T = TypeVar("T")

_prepared: list[Callable[[Any], None]] = []

NOT_ENABLED = frozenset(
    {"AuthFailure", "InvalidClientTokenId", "OptInRequired", "UnrecognizedClientException"}
)
"""The answers of a region that the account has not enabled, to valid credentials."""
DENIED = hints.DENIED
_ENVIRONMENT = "env"
"""botocore's word for credentials in variables."""


class Account:
    """One account in one region, safe to share between threads."""

    def __init__(self, session: Any, core: Any, region: str, attempts: int = 0) -> None:
        self.region = region
        self._attempts = attempts
        self._session = session
        self._core = core
        self._clients: dict[tuple[str, str, int], Any] = {}
        self._lock = threading.RLock()

    @classmethod
    def open(cls, region: str = "", *, otherwise: str = "") -> Account:
        """Return the account of the default credential chain, in its default region unless `region` is given.

        `otherwise` is the region where the chain has none.
        Raises CloudFailed when there are no credentials, UsageError when there is no region, or a setting of
        AWS's own is wrong.
        """
        _check_environment()
        with aws_errors():
            # botocore reads only AWS_DEFAULT_REGION; other AWS tools read AWS_REGION first.
            core = botocore.session.get_session()
            core.register_component("data_loader", _loader())
            for prepare in _prepared:
                prepare(core)
            session = boto3.session.Session(
                botocore_session=core, region_name=region or os.environ.get("AWS_REGION") or None
            )
            credentials = session.get_credentials()
        found = session.region_name or otherwise
        if not found:
            raise UsageError(
                "no AWS region is set",
                hint="export AWS_REGION=…, write aws.region in your ami-builder.toml, or give --region to a"
                " command that has it",
            )
        if not re.fullmatch(REGION, found):
            names = ("AWS_REGION", "AWS_DEFAULT_REGION")
            origin = next((n for n in names if os.environ.get(n) == found), "the region")
            raise UsageError(f"{origin} = {found!r}: expected the name of a region, such as us-east-1")
        if credentials is None:
            raise CloudFailed(
                "no AWS credentials found",
                hint="set AWS_PROFILE, run `aws sso login`, or run on an instance with a role",
            )
        return cls(session, core, found)

    def in_region(self, region: str, *, attempts: int = 0) -> Account:
        """Return the same account in another region, where a call is attempted `attempts` times; 0: 10."""
        other = Account(self._session, self._core, region, attempts)
        other._lock = self._lock  # a session is not safe to create two clients at once
        return self if region == self.region else other

    @property
    def partition(self) -> str:
        """The part of AWS that the region is in, such as `aws` or `aws-cn`."""
        with aws_errors():
            return str(self._session.get_partition_for_region(self.region))

    def regions_of(self, service: str) -> list[str]:
        """Return the regions of this partition that have a service, as botocore knows them."""
        return list(self._session.get_available_regions(service, self.partition))

    @property
    def ec2(self) -> EC2Client:
        """The EC2 client."""
        return self.client("ec2")  # type: ignore[no-any-return]

    @property
    def ec2_once(self) -> EC2Client:
        """An EC2 client that does not retry."""
        return self.client("ec2", attempts=1)  # type: ignore[no-any-return]

    def client(self, name: str, region: str = "", *, attempts: int = 0) -> Any:
        """Return the client of a service, in this region unless `region` is given.

        A call is attempted `attempts` times; 0 means the account's number, by default 10.
        """
        key = (name, region or self.region, attempts or self._attempts or ATTEMPTS)
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
        """Return the URL of a service where it is not the region's ordinary one; empty otherwise.

        It may be an AWS_ENDPOINT_URL, a profile's endpoint_url, or a FIPS or dual-stack endpoint.
        """
        plain = Config(
            ignore_configured_endpoint_urls=True,  # type: ignore[call-arg] # the stubs lack it
            use_fips_endpoint=False,
            use_dualstack_endpoint=False,
        )
        with self._lock, aws_errors(name):
            ordinary = self._session.client(name, region_name=self.region, config=plain).meta.endpoint_url
        url = str(self.client(name).meta.endpoint_url)
        return "" if url == ordinary else url

    @contextmanager
    def environment(self, *services: str) -> Iterator[ServedCredentials]:
        """Yield environment variables that let another program use these services of this account.

        Packer does not know all of boto3's credential chain and settings. Credentials that botocore refreshes
        are refreshed there too, as long as the context lasts. Pass the variables to a child process only,
        never on a command line or in a file. Raises CloudFailed, UsageError.
        """
        endpoints = {f"AWS_ENDPOINT_URL_{n.upper().replace('-', '_')}": self.endpoint(n) for n in services}
        variables = {
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_CA_BUNDLE": self._core.get_config_variable("ca_bundle") or "",
            # It must not find others, or settings that contradict these.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            **endpoints,
        }
        variables = {name: value for name, value in variables.items() if value}
        keys = self._frozen()
        if self._can_refresh():
            with served(self._frozen) as credentials:
                credentials.variables = {**credentials.variables, **variables}
                yield credentials
            return
        variables |= {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key}
        yield ServedCredentials(
            variables=variables | ({"AWS_SESSION_TOKEN": keys.token} if keys.token else {})
        )

    def seconds_left(self) -> float | None:
        """Return how long the credentials are valid; None when they are refreshed, or have no known end."""
        end = os.environ.get("AWS_CREDENTIAL_EXPIRATION")
        if not end or self._can_refresh() or self._credentials().method != _ENVIRONMENT:
            return None
        with aws_errors("sts"):
            return float((parse_timestamp(end) - datetime.now(UTC)).total_seconds())

    def _frozen(self) -> Any:
        with aws_errors("sts"):
            return self._credentials().get_frozen_credentials()

    def _can_refresh(self) -> bool:
        # What botocore refreshes from the environment are the same variables.
        found = self._credentials()
        return isinstance(found, RefreshableCredentials) and found.method != _ENVIRONMENT

    def _credentials(self) -> Any:
        with aws_errors("sts"):
            return self._session.get_credentials()

    def identity(self) -> str:
        """Return the ARN that these credentials belong to; raises CloudFailed when they are not valid."""
        with aws_errors("sts"):
            return str(self.client("sts").get_caller_identity()["Arn"])

    def listed(
        self, call: str, key: str, *, service: str = "ec2", ignore: str = "", **parameters: Any
    ) -> list[Any]:
        """Return the entries of all pages of a list; none when the error's code matches `ignore`.

        Raises CloudFailed when the list can't be read to its end.
        """
        found: list[Any] = []
        size = PAGES.get(call) or PAGES[service]
        with aws_errors(service, ignore=ignore):
            pages = self.client(service).get_paginator(call)
            for page in pages.paginate(PaginationConfig={"PageSize": size}, **parameters):
                found += page[key]
        return found

    def matching(self, call: str, key: str, name: str, values: Iterable[str], **parameters: Any) -> list[Any]:
        """Return the entries of an EC2 list that have one of the values; EC2's limit for a filter is 200."""
        wanted = list(values)
        chunks = [wanted[start : start + _VALUES] for start in range(0, len(wanted), _VALUES)]
        filters = [[{"Name": name, "Values": chunk}] for chunk in chunks]
        return [one for each in filters for one in self.listed(call, key, Filters=each, **parameters)]


def default_region() -> str:
    """Return the region of the AWS chain (AWS_REGION, profile), without credentials; empty for none."""
    with aws_errors():
        found = botocore.session.get_session().get_config_variable("region")
        return os.environ.get("AWS_REGION") or found or ""


@contextmanager
def prepared(prepare: Callable[[Any], None]) -> Iterator[None]:
    """Call `prepare` with each botocore session that any thread opens in this context, before its use."""
    _prepared.append(prepare)
    try:
        yield
    finally:
        _prepared.remove(prepare)


@cache
def _loader() -> Any:
    """Return one loader of service descriptions for all sessions, since EC2's takes long to read."""
    return botocore.session.get_session().get_component("data_loader")


def code_of(error: BaseException) -> str:
    """Return the AWS error code of a ClientError or of its CloudFailed, such as `InvalidAMIID.NotFound`."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    return str(cause.response.get("Error", {}).get("Code", "")) if isinstance(cause, ClientError) else ""


def is_definite(error: BaseException) -> bool:
    """Return whether an error means for certain that the call changed nothing.

    A lost answer does not.
    """
    cause = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(cause, ClientError):
        return False
    # A retried call may find the duplicate that its first attempt made.
    if code_of(cause) in hints.THROTTLED or code_of(cause).endswith(".Duplicate"):
        return False
    return 400 <= cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) < 500


@contextmanager
def aws_errors(service: str = "ec2", *, ignore: str = "") -> Iterator[None]:
    """Turn botocore's errors into CloudFailed, which names the call and has a hint.

    Errors are ignored whose whole code matches the regular expression `ignore`.
    """
    try:
        yield
    except ClientError as error:
        if not (ignore and re.fullmatch(ignore, code_of(error))):
            raise failure(error, service) from error
    except BotoCoreError as error:
        raise hints.not_usable(error) from error
    except (ValueError, OSError, RuntimeError) as error:
        # A wrong variable or file of AWS's, which botocore has not looked at before.
        if not hints.raised_by_botocore(error):
            raise
        raise hints.not_usable(error) from error


def failure(error: ClientError, service: str = "ec2") -> CloudFailed:
    """Return an AWS error as CloudFailed."""
    code = code_of(error)
    # botocore has None for an empty element.
    text = error.response.get("Error", {}).get("Message") or ""
    request = error.response.get("ResponseMetadata", {}).get("RequestId", "")
    call = f"{service}:{error.operation_name}"
    message, encoded = hints.without_encoded(text)
    tail = (f"request id {request}" if request else "", f"encoded message: {encoded}" if encoded else "")
    return CloudFailed(
        f"AWS refused {call}: {code}" + (f": {message}" if message else ""),
        hint=hints.of(code, call, text),
        tail=tuple(filter(None, tail)),
    )


def _check_environment() -> None:
    """Raise UsageError for an endpoint or a bundle of certificates that can't be one."""
    for name, value in os.environ.items():
        if name.startswith("AWS_ENDPOINT_URL") and value and not _is_url(value):
            raise UsageError(
                f"{name} = {value!r}: expected a URL that begins with http:// or https://",
                hint=f"write http:// or https:// before it, or unset {name} to use AWS's own endpoints",
            )
        if name == "AWS_CA_BUNDLE" and value and not os.access(value, os.R_OK):
            raise UsageError(f"{name} = {value!r}: there is no such file that can be read")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


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
