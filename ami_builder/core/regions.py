"""The names of AWS regions."""

REGION = r"[a-z]{2,}(?:-[a-z]+)+-[0-9]+"
"""A regular expression for all of them, whatever their partition."""

_PREFIXES = ("cn-", "us-gov-", "us-iso-", "us-isob-", "us-isof-", "eu-isoe-", "eusc-")


def partition(region: str) -> str:
    """Return the prefix of a region's partition, which no resource of another one can reach; "" for most."""
    return next((prefix for prefix in _PREFIXES if region.startswith(prefix)), "")
