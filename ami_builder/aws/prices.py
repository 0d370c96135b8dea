"""What a build costs at most, and its AMI afterwards, by the Pricing API."""

from __future__ import annotations

import json
from typing import Any

from ami_builder.aws.session import Account, aws_errors
from ami_builder.config.schema import Image
from ami_builder.core.errors import CloudFailed
from ami_builder.core.records import Finding, State
from ami_builder.core.units import GIB

# Prices in us-east-1. Other regions differ by a few cents, which hardly counts next to the instance.
GP3_GIB_MONTH = 0.08
SNAPSHOT_GIB_MONTH = 0.05
HOURS_A_MONTH = 730.0
_PREFERRED = "us-east-1"


def cost(account: Account, image: Image, disk: int) -> str | Finding:
    """Return what a run costs, and what its AMI does, with a disk of that many bytes, were it full."""
    verify = image.verify
    stages = [(image.aws.instance_types[0], image.bake.timeout, disk)]
    stages += [(kind, verify.timeout, verify.disk_size) for kind in verify.instance_types]
    run = 0.0
    for kind, seconds, size in stages:
        if (price := hourly_price(account, kind)) is None:
            text = "unknown: the Pricing API returned no price in US dollars to these credentials"
            return Finding(name="cost", state=State.NOTE, found=text)
        run += seconds / 3600 * (price + size / GIB * GP3_GIB_MONTH / HOURS_A_MONTH)
    kept = disk / GIB * SNAPSHOT_GIB_MONTH
    return f"at most about ${run:.2f} per run on demand, and ${kept:.2f} per month to keep the AMI"


def hourly_price(account: Account, instance_type: str) -> float | None:
    """Return the price of an instance type on demand, in US dollars per hour; None when it is unknown."""
    wanted = {
        "instanceType": instance_type,
        "regionCode": account.region,
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
    }
    # Endpoints are in a few regions only, each with the prices of its whole partition.
    if not (there := account.regions_of("pricing")):
        return None
    try:
        client = account.client("pricing", _PREFERRED if _PREFERRED in there else there[0], attempts=2)
        with aws_errors("pricing"):
            answer = client.get_products(
                ServiceCode="AmazonEC2",
                Filters=[{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in wanted.items()],
            )
    except CloudFailed:
        return None
    return next((price for text in answer["PriceList"] if (price := _on_demand(json.loads(text)))), None)


def _on_demand(product: dict[str, Any]) -> float | None:
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term.get("priceDimensions", {}).values():
            price = float(dimension.get("pricePerUnit", {}).get("USD", 0))
            if price > 0:
                return price
    return None
