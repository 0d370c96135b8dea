"""About what a run costs, by AWS's public prices."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ami_builder.aws.session import Account, translated
from ami_builder.core.errors import CloudFailed

# The Pricing API lives in a few regions only, and tells about all.
_PRICING_REGION = "us-east-1"
# us-east-1's, which others differ from by a few cents: next to the instance they hardly count.
_GP3_GIB_MONTH = 0.08
_SNAPSHOT_GIB_MONTH = 0.05
_HOURS_A_MONTH = 730.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """US dollars."""

    hour: float
    """An instance's, on demand."""
    run: float
    """The instance and its disk, for as long as was asked."""
    month: float
    """Keeping the AMI's snapshot for a month, if it were full."""


def about(account: Account, instance_type: str, hours: float, disk_gib: float) -> Cost | None:
    """Return what an instance with a disk costs for some hours; None where nobody tells the price."""
    wanted = {
        "instanceType": instance_type,
        "regionCode": account.region,
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
    }
    try:
        client = account.client("pricing", _PRICING_REGION, attempts=2)
        with translated("pricing"):
            answer = client.get_products(
                ServiceCode="AmazonEC2",
                Filters=[{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in wanted.items()],
            )
    except CloudFailed:
        return None
    hour = next((price for text in answer["PriceList"] if (price := _on_demand(json.loads(text)))), None)
    if hour is None:
        return None
    disk = disk_gib * _GP3_GIB_MONTH / _HOURS_A_MONTH
    return Cost(hour=hour, run=hours * (hour + disk), month=disk_gib * _SNAPSHOT_GIB_MONTH)


def _on_demand(product: dict[str, Any]) -> float | None:
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term.get("priceDimensions", {}).values():
            price = float(dimension.get("pricePerUnit", {}).get("USD", 0))
            if price > 0:
                return price
    return None
