"""What the actions share: parameters, tags, paging, and things that aren't found yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moto.core.responses import ActionResult
from moto.ec2.responses import EC2Response

from tests.fake_ec2.api_call import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moto.ec2.models.instances import Instance

    from tests.fake_ec2.api_call import ApiCall
    from tests.fake_ec2.cloud_state import CloudState
    from tests.fake_ec2.guard import Guard

MOST = 1000
"""The largest page, and the size of those that moto would cut at 100."""


class EC2Action(EC2Response):
    """moto's EC2, with this cloud's memory beside."""

    def __init__(self, state: CloudState, call: ApiCall, guard: Guard) -> None:
        super().__init__()
        self.state, self.call, self.guard = state, call, guard

    @property
    def ec2_backend(self) -> Any:
        """moto's backend of this account and region, with Debian's images in it."""
        return self.state.backend(self.current_account, self.region)

    def original_params(self) -> dict[str, Any]:
        """Return a copy of the call's parameters, as botocore names them."""
        return dict(self.params)

    def tags(self) -> dict[str, dict[str, str]]:
        """Return the tags that the call asks for, by resource type."""
        found: dict[str, dict[str, str]] = {}
        for spec in self._get_param("TagSpecifications", []):
            asked = {tag["Key"]: tag.get("Value", "") for tag in spec.get("Tags", [])}
            found.setdefault(spec["ResourceType"], {}).update(asked)
        return found

    def have_spot_role(self) -> None:
        """Make EC2's role for spot instances where there is none; raises Refused when the caller may not."""
        if not self.state.options.spot_role:
            self.guard.make_spot_role(self.call)
            self.state.options.spot_role = True

    def instance(self, instance_id: str) -> Instance:
        """Return an instance; raises as EC2 does when there is none."""
        found: Instance = self.ec2_backend.get_instance(instance_id)
        return found

    def seen(self, ids_name: str, key: str, code: str, result: Any, *, least: int = 5) -> ActionResult:
        """Return one page of a describe's result, without what was made a moment ago.

        Asking for such a thing by its id raises Refused with `code`.
        """
        asked = self._get_param(ids_name, [])
        listed = {each: inner for each in result[key] for inner in _ids(each)}
        hidden = self.state.hidden(inner for inner in listed.values())
        # behaviour: eventual-consistency
        if late := [each for each in asked if each in hidden]:
            raise Refused(code, f"The ID '{', '.join(late)}' does not exist")
        items = {_name(each): each for each in result[key] if not hidden.intersection(_ids(each))}
        size, token = self._get_param("MaxResults"), self._get_param("NextToken")
        if size is not None:
            size = int(size)
            if asked and key != "Images":
                raise Refused(
                    "InvalidParameterCombination", f"{ids_name} cannot be used with the parameter maxResults"
                )
            if not least <= size <= MOST:
                raise Refused(
                    "InvalidParameterValue",
                    f"Value ( {size} ) for parameter maxResults is invalid. Expecting {least} to {MOST}.",
                )
        names, following = self.state.page(self._get_action(), list(items), size, token)
        result[key] = [items[name] for name in names if name in items]
        result["NextToken"] = following or None
        return ActionResult(result)


def _ids(item: Any) -> Iterator[str]:
    """Return the ids of a listed thing; a reservation's are those of its instances."""
    if hasattr(item, "instances"):
        for instance in item.instances:
            yield instance.id
    else:
        yield item.id


def _name(item: Any) -> str:
    return str(item.id)
