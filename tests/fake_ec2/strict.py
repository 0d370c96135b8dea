"""A call's parameters by botocore's model of the service; what it doesn't have so is refused."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from botocore.validate import ParamValidator
from moto.core.parse import EC2QueryParser, QueryParser
from moto.core.utils import get_service_model

from tests.fake_ec2.api_call import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PROTOCOL = {"Action", "Version"}
_FILTER_VALUES = 200


class _Read(dict[str, str]):
    """A form that remembers which of its fields were read."""

    def __init__(self, form: Mapping[str, str]) -> None:
        super().__init__(form)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field's value."""
        if key in self:
            self.read.add(key)
        return super().get(key, default)


_MODELS = {"servicequotas": "service-quotas"}
"""The model of a service whose signatures have another name."""


def parsed(service: str, action: str, form: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """Return a call's parameters as botocore names them; raises Refused when the model doesn't have them so.

    `form` has the fields of a query protocol; empty for a service that takes JSON, which `body` is then.
    """
    try:
        model = get_service_model(_MODELS.get(service, service))
        operation = model.operation_model(action)
    except Exception as error:  # botocore has many ways to say that it knows neither
        # behaviour: strict-parameters
        raise Refused("InvalidAction", f"The action {action} is not valid for this web service.") from error
    shape = operation.input_shape
    if model.metadata["protocol"] in ("ec2", "query"):
        fields = _Read(form)
        parser = EC2QueryParser if service == "ec2" else QueryParser
        params = parser(operation).parse({"values": fields})  # type: ignore[typeddict-item]
        if strange := sorted(fields.keys() - fields.read - _PROTOCOL):
            raise Refused("UnknownParameter", f"The parameter {strange[0].split('.')[0]} is not recognized")
    else:
        params = json.loads(body or b"{}")
        if strange := sorted(params.keys() - shape.members.keys()) if shape is not None else []:
            raise Refused("UnknownParameter", f"The parameter {strange[0]} is not recognized")
    if shape is None:
        return dict(params)
    for name in shape.required_members:
        if name not in params:
            raise Refused("MissingParameter", f"The request must contain the parameter {name}")
    report = ParamValidator().validate(_untimed(params), shape)
    for kind, name, details in report._errors if report.has_errors() else ():
        if kind in ("missing required field", "unknown field"):
            code = "MissingParameter" if kind.startswith("missing") else "UnknownParameter"
            raise Refused(code, f"{name}: {details}")
    for path, value in _impossible(shape, params, ""):
        raise Refused("InvalidParameterValue", f"Value ({value}) for parameter {path} is invalid.")
    if service == "ec2":
        _require_limits(params)
    elif service == "iam":
        # behaviour: patterns-of-names
        for path, value in _mismatched(shape, params):
            raise Refused("ValidationError", f"Value '{value}' at '{path}' failed to satisfy constraint")
    return dict(params)


def _require_limits(params: Mapping[str, Any]) -> None:
    """Raise Refused for what EC2 documents of filters and tags, but its model doesn't have."""
    # behaviour: filter-values
    if any(len(each.get("Values", [])) > _FILTER_VALUES for each in params.get("Filters", [])):
        raise Refused("FilterLimitExceeded", "The maximum number of filter values specified on a call is 200")
    specifications = params.get("TagSpecifications", [])
    tags = [*params.get("Tags", []), *(tag for each in specifications for tag in each.get("Tags", []))]
    # behaviour: reserved-tags
    if reserved := [tag["Key"] for tag in tags if tag.get("Key", "").startswith("aws:")]:
        raise Refused("InvalidParameterValue", f"Value ( {reserved[0]} ) for parameter key is invalid.")


def _size(value: Any) -> float:
    return value if isinstance(value, int | float) else len(value) if isinstance(value, str | list) else 0


def _mismatched(shape: Any, params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values at the top that don't match their model's pattern, and their names."""
    for name, each in params.items():
        pattern = shape.members[name].metadata.get("pattern") if name in shape.members else None
        if pattern and isinstance(each, str) and not re.fullmatch(pattern, each):
            yield name, each


def _untimed(value: Any) -> Any:
    """Return parameters as the validator takes them; the parser's types are its own affair."""
    if isinstance(value, dict):
        return {key: _untimed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_untimed(each) for each in value]
    return value


def _impossible(shape: Any, value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the values that are none of an enumeration's, or above the model's bound, and where they are.

    botocore itself checks lower bounds alone.
    """
    most = shape.metadata.get("max")
    if most is not None and _size(value) > most:
        yield path, value
    match shape.type_name:
        case "structure":
            for name, each in value.items():
                if name in shape.members:
                    yield from _impossible(shape.members[name], each, f"{path}.{name}" if path else name)
        case "list":
            for each in value:
                yield from _impossible(shape.member, each, path)
        # EC2 has newer instance types than any model, and an error of its own for those that it hasn't.
        case "string" if shape.enum and value not in shape.enum and shape.name != "InstanceType":
            yield path, value
        case _:
            return
