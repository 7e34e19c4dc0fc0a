"""Versions of what a result was made with."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("stepsal", "torch", "transformer-lens", "transformers", "matplotlib")


def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Versions of Python and of the packages a result depends on; None for those not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
