"""EC2 actions on launch templates, where moto does less or something else."""

from __future__ import annotations

import base64
import copy
from typing import TYPE_CHECKING, Any

from moto.core.responses import ActionResult

from ami_builder.qemu.imds import MAX_USER_DATA
from tests.fake_ec2.api_call import Refused
from tests.fake_ec2.ec2_action import EC2Action

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class TemplateActions(EC2Action):
    """The actions that create a launch template, or a version of it."""

    def create_launch_template(self) -> ActionResult:
        """CreateLaunchTemplate: once per client token; its own tags are none of what it launches."""
        return self._once(super().create_launch_template, "LaunchTemplate", self._without_own_tags)

    def create_launch_template_version(self) -> ActionResult:
        """CreateLaunchTemplateVersion: once per client token."""
        return self._once(super().create_launch_template_version, "LaunchTemplateVersion", lambda made: made)

    def describe_launch_templates(self) -> ActionResult:
        """DescribeLaunchTemplates, with tags that were added since they were made."""
        for template in self.ec2_backend.launch_templates.values():
            template.tags = template.get_tags()
        return super().describe_launch_templates()

    def _once(
        self, make: Callable[[], ActionResult], key: str, changed: Callable[[Any], Any]
    ) -> ActionResult:
        params = copy.deepcopy(self.original_params())
        token = params.pop("ClientToken", "")
        # behaviour: user-data-limit
        if len(base64.b64decode(self._get_param("LaunchTemplateData.UserData", ""))) > MAX_USER_DATA:
            raise Refused("InvalidUserData.Malformed", f"User data is limited to {MAX_USER_DATA} bytes.")
        made: list[Any] = []

        def create() -> list[str]:
            result: Any = make().result
            made.append(changed(result[key]))
            # behaviour: template-warning
            if errors := self._errors():
                result["Warning"] = {"Errors": errors}
            self.state.answers[token] = result
            return [token]

        scope = (self.current_account, self.region, self._get_action(), token)
        self.state.once(scope, params, create)
        return ActionResult(self.state.answers[token])

    def _without_own_tags(self, made: Any) -> Any:
        """Take the template's tags out of its data, where moto puts them too."""
        data = self.ec2_backend.launch_templates[made["LaunchTemplateId"]].versions[0].data
        data["TagSpecifications"] = [
            one for one in data.get("TagSpecifications", []) if one["ResourceType"] != "launch-template"
        ]
        return made

    def _errors(self) -> list[dict[str, str]]:
        named = set(_names(self._get_param("LaunchTemplateData", {})))
        return [
            {"Code": code, "Message": message}
            for name, (code, message) in self.state.options.not_valid.items()
            if name in named
        ]


def _names(data: Any) -> Iterator[str]:
    """Yield the names of all parameters in a template's data."""
    if isinstance(data, dict):
        yield from data
    for each in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from _names(each)
