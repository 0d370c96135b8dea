"""What each step of a selftest can cost at most, and what may be spent. US dollars.

An instance can cost its whole lifetime, since this host may be switched off. What is kept for the rest of the
run (snapshots) counts as a whole day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ami_builder.aws.prices import GP3_GIB_MONTH, HOURS_A_MONTH, SNAPSHOT_GIB_MONTH, hourly_price
from ami_builder.aws.session import Account
from ami_builder.core.errors import ChecksFailed, UsageError

_ADDRESS_HOUR = 0.005
_DAY = 24.0
# Data to another region. Regions of these beginnings cost 0.02 or less, the others up to 0.15.
_TRANSFER_GIB = 0.02
_TRANSFER_GIB_ELSEWHERE = 0.15
_CHEAP = ("us-", "eu-", "ca-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a step can cost."""

    hourly: float = 0.0
    """While it lasts."""
    hours: float = 0.0
    """The longest that its instance can live."""
    fixed: float = 0.0
    """Whatever its duration."""

    @property
    def most(self) -> float:
        """The most that the step can cost."""
        return self.hourly * self.hours + self.fixed


FREE = Cost()


def instance(price: float, lifetime: float, disk: float) -> Cost:
    """Return the cost of an instance with its disk (GiB) and address, for its lifetime in seconds."""
    volume = disk * GP3_GIB_MONTH / HOURS_A_MONTH
    return Cost(hourly=price + volume + _ADDRESS_HOUR, hours=lifetime / 3600)


def snapshot(disk: float, *, sent_from: str = "") -> Cost:
    """Return the cost of keeping a snapshot, and of sending it from a region to another one."""
    kept = disk * SNAPSHOT_GIB_MONTH / HOURS_A_MONTH * _DAY
    if not sent_from:
        return Cost(fixed=kept)
    return Cost(
        fixed=kept + disk * (_TRANSFER_GIB if sent_from.startswith(_CHEAP) else _TRANSFER_GIB_ELSEWHERE)
    )


def prices(account: Account, kinds: Sequence[str], assumed: float | None) -> dict[str, float]:
    """Return the hourly price of each instance type, `assumed` where it is unknown. Raises UsageError."""
    found: dict[str, float] = {}
    for kind in dict.fromkeys(kinds):
        price = hourly_price(account, kind)
        if price is None:
            price = assumed
        if price is None:
            raise UsageError(
                f"the price of {kind} in {account.region} is unknown: the Pricing API did not answer, or"
                " returned none to these credentials",
                hint="look it up, and add --assume-hourly USD",
            )
        found[kind] = price
    return found


@dataclass(slots=True, kw_only=True)
class Budget:
    """What may be spent, and the most that has been."""

    spend: float
    spent: float = field(default=0.0, init=False)

    def require(self, step: str, cost: Cost) -> None:
        """Raise if a step can cost more than is left: UsageError if nothing was spent, else ChecksFailed."""
        if self.spent + cost.most <= self.spend:
            return
        what = f"{step} can cost {cost.most:.2f} USD, but {self.spend - self.spent:.2f} of --spend"
        if not self.spent:
            raise UsageError(
                f"{what} {self.spend:.2f} are left",
                hint=f"nothing that costs was made; it needs --spend {cost.most + 0.01:.2f}",
            )
        raise ChecksFailed(
            f"{what} {self.spend:.2f} are left: the selftest stopped before it",
            hint="what it had made was removed; run it again with a higher --spend",
        )

    def settle(self, cost: Cost, seconds: float, *, failed: bool = False) -> None:
        """Count what a step has cost at most; the whole of it after a failure."""
        self.spent += cost.most if failed else min(cost.most, cost.hourly * seconds / 3600 + cost.fixed)
