"""Services beside EC2: SSM parameters that name an AMI, and the prices of instances.

SSM accepts a value of type aws:ec2:image and validates it later: it drops one that names no AMI of the
region, and a valid one may take a while (CloudOptions.parameter_reads). The answer has the new version in
either case.
The Pricing API has GetProducts, as far as one look-up of on-demand prices needs it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moto.ssm.models import ssm_backends

from tests.fake_ec2.api_call import ACCOUNT, ApiCall, HttpAnswer, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.fake_ec2.cloud_state import CloudState


def parameter_call(call: ApiCall, state: CloudState, by_moto: Callable[[], HttpAnswer]) -> HttpAnswer:
    """Do a call to SSM and return the answer."""
    if call.action.startswith("GetParameter") and state.parameter is not None:
        state.reads -= 1
        if state.reads < 0:
            _validate(state)
    named = (call.region, str(call.params.get("Name")))
    if call.action == "DeleteParameter":
        state.deleted_parameters[named] = state.options.parameter_rest
    if call.action != "PutParameter" or call.params.get("DataType") != "aws:ec2:image":
        return by_moto()
    # behaviour: deleted-parameter-rests
    if state.deleted_parameters.get(named, 0) > 0:
        state.deleted_parameters[named] -= 1
        if state.options.parameter_rest_refused:
            raise Refused("ParameterAlreadyExists", "The parameter already exists.")
        return _json({"Version": 1, "Tier": "Standard"})
    _validate(state)
    versions = ssm_backends[ACCOUNT][call.region]._parameters.get(call.params["Name"], [])
    # behaviour: image-parameter-is-validated-later
    known = call.params["Value"] in state.backend(ACCOUNT, call.region).amis
    if known and (not state.options.parameter_reads or (versions and not call.params.get("Overwrite"))):
        return by_moto()
    if known:
        state.parameter, state.reads = by_moto, state.options.parameter_reads
    return _json({"Version": (versions[-1].version if versions else 0) + 1, "Tier": "Standard"})


def resolved(region: str, image_id: str) -> str:
    """Return an AMI id as it is, or the one that `resolve:ssm:NAME` or `resolve:ssm:NAME:VERSION` means."""
    # behaviour: image-by-parameter
    if not str(image_id).startswith("resolve:ssm:"):
        return image_id
    name, _, version = image_id.removeprefix("resolve:ssm:").partition(":")
    versions = ssm_backends[ACCOUNT][region]._parameters.get(name, [])
    found = [one for one in versions if version in ("", str(one.version)) or version in one.labels]
    if not found:
        raise Refused(
            "InvalidParameterValue",
            f"The SSM parameter {name} in {image_id} does not exist, or has no such version.",
        )
    return str(found[-1].value)


def _validate(state: CloudState) -> None:
    if state.parameter is not None:
        state.parameter()
    state.parameter = None


def products(params: Mapping[str, Any], prices: Mapping[str, str]) -> HttpAnswer:
    """Answer GetProducts for AmazonEC2 by `prices` (type -> dollars an hour); other filters all match."""
    if params.get("ServiceCode") != "AmazonEC2":
        raise Refused("InvalidParameterException", f"no prices of {params.get('ServiceCode')}")
    filters = {each["Field"]: each["Value"] for each in params.get("Filters", [])}
    wanted = filters.get("instanceType")
    listed = [
        json.dumps(_product(kind, price, filters)) for kind, price in prices.items() if wanted in (None, kind)
    ]
    return _json({"FormatVersion": "aws_v1", "PriceList": listed})


def _json(answer: Mapping[str, Any]) -> HttpAnswer:
    return HttpAnswer(status=200, body=json.dumps(answer).encode(), content_type="application/x-amz-json-1.1")


def quota(params: Mapping[str, Any], quotas: Mapping[str, float]) -> HttpAnswer:
    """Answer GetServiceQuota for EC2 by `quotas` (code -> value)."""
    code = params.get("QuotaCode", "")
    if params.get("ServiceCode") != "ec2" or code not in quotas:
        raise Refused("NoSuchResourceException", f"there is no quota {code}")
    # behaviour: vcpu-quotas
    answer = {"Quota": {"ServiceCode": "ec2", "QuotaCode": code, "Value": quotas[code]}}
    return HttpAnswer(status=200, body=json.dumps(answer).encode(), content_type="application/x-amz-json-1.1")


def _product(kind: str, price: str, filters: Mapping[str, str]) -> dict[str, Any]:
    sku = f"SKU{kind.upper().replace('.', '')}"
    attributes = {
        "instanceType": kind,
        "regionCode": filters.get("regionCode", "us-east-1"),
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
    }
    dimension = {
        "unit": "Hrs",
        "description": f"${price} per {kind}",
        "pricePerUnit": {"USD": price + "000000"},
    }
    term = {"sku": sku, "priceDimensions": {f"{sku}.TERM.RATE": dimension}, "termAttributes": {}}
    return {
        "product": {"productFamily": "Compute Instance", "attributes": attributes, "sku": sku},
        "serviceCode": "AmazonEC2",
        "terms": {"OnDemand": {f"{sku}.TERM": term}},
    }
