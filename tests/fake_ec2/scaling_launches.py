"""The calls that EC2 Auto Scaling makes to EC2 by itself, with no client's request."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import botocore.session
from botocore.serialize import create_serializer
from werkzeug.test import EnvironBuilder

from tests.fake_ec2.api_call import ApiCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from moto.ec2.models.instances import Instance

    from tests.fake_ec2.cloud_state import CloudState

_SERVICE_ROLE = "AKIAAUTOSCALING00000"
"""The access key of the service-linked role, which no policy limits here."""


class Launches:
    """EC2 as groups use it; `act` does an action of EC2 and returns its result."""

    def __init__(
        self, state: Callable[[], CloudState], act: Callable[[ApiCall, dict[str, Any], bytes], Any]
    ) -> None:
        self._state, self._act = state, act
        self._model = botocore.session.get_session().get_service_model("ec2")

    def now(self) -> float:
        """Return the time in seconds, which a test may be ahead of."""
        return time.monotonic() + self._state().options.seconds_ahead

    def run(self, region: str, settings: dict[str, Any], tags: dict[str, str]) -> Instance:
        """Launch one instance with these parameters of RunInstances; raises Refused."""
        made = self._call(region, "RunInstances", {**settings, "MinCount": 1, "MaxCount": 1})
        (instance,) = made.instances
        # No request may set these.
        instance.add_tags(tags)
        self._state().describe(instance)
        found: Instance = instance
        return found

    def terminate(self, region: str, instance_id: str) -> None:
        """Terminate an instance."""
        self._call(region, "TerminateInstances", {"InstanceIds": [instance_id]})

    def announce(self, instance_id: str, path: str, value: str) -> None:
        """Set a value of an instance's metadata."""
        self._state().announce(instance_id, path, value)

    def _call(self, region: str, action: str, params: dict[str, Any]) -> Any:
        request = create_serializer("ec2", include_validation=False).serialize_to_request(
            params, self._model.operation_model(action)
        )
        form: Any = request["body"]
        body = urlencode(form).encode()
        credential = f"{_SERVICE_ROLE}/20260101/{region}/ec2/aws4_request"
        builder = EnvironBuilder(
            method="POST",
            base_url=f"https://ec2.{region}.amazonaws.com/",
            headers=[
                (
                    "Authorization",
                    f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=host, Signature=0",
                )
            ],
            content_type="application/x-www-form-urlencoded; charset=utf-8",
            data=body,
        )
        call = ApiCall(service="ec2", action=action, region=region, access_key=_SERVICE_ROLE, params=params)
        return self._act(call, builder.get_environ(), body)
