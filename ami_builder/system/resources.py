"""The paths of files that are shipped with the program, in a checkout or an installed package."""

from functools import cache
from pathlib import Path

from ami_builder.core.errors import AmiBuilderError

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def root(package: Path = _PACKAGE) -> Path:
    """Return the folder that holds packer/, scripts/ and ami-builder.toml.

    An installed wheel has them in ami_builder/_shipped; a checkout has them beside the package.
    Raises AmiBuilderError when they are in neither place.
    """
    shipped, checkout = package / "_shipped", package.parent
    if (shipped / "packer").is_dir():
        return shipped
    if (checkout / "pyproject.toml").is_file() and (checkout / "packer").is_dir():
        return checkout
    raise AmiBuilderError(
        f"the installation in {package} is incomplete: its packer/ folder is missing",
        hint="reinstall it with pip, or run scripts/ami-builder in a complete clone",
    )


def packer_dir() -> Path:
    """Return the folder of the Packer template, with the guest's files in guest/."""
    return root() / "packer"


def scripts_dir() -> Path:
    """Return the folder of the scripts that make the base disk and the container archive."""
    return root() / "scripts"


def requirements() -> Path:
    """Return the pinned and hashed requirements of the shipped Dask container."""
    return scripts_dir() / "container" / "requirements.txt"


def default_config() -> Path:
    """Return the ami-builder.toml that is used if the user has none."""
    return root() / "ami-builder.toml"


def checks_dir() -> Path:
    """Return the folder of the checks, which is part of the package."""
    return _PACKAGE / "checks"
