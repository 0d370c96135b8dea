"""The Pricing API's GetProducts: on-demand prices of instances, as far as one look-up needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.fake_ec2.calls import Answer, Refused


def products(params: Mapping[str, Any], prices: Mapping[str, str]) -> Answer:
    """Answer GetProducts for AmazonEC2 by `prices` (type -> dollars an hour); other filters all match."""
    if params.get("ServiceCode") != "AmazonEC2":
        raise Refused("InvalidParameterException", f"no prices of {params.get('ServiceCode')}")
    filters = {each["Field"]: each["Value"] for each in params.get("Filters", [])}
    wanted = filters.get("instanceType")
    listed = [
        json.dumps(_product(kind, price, filters)) for kind, price in prices.items() if wanted in (None, kind)
    ]
    told = {"FormatVersion": "aws_v1", "PriceList": listed}
    return Answer(status=200, body=json.dumps(told).encode(), content_type="application/x-amz-json-1.1")


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
