"""What all test runs share: `stepsal` in the doctests, and the nightly tests left out unless they are asked for."""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest

import stepsal

matplotlib.use("Agg")  # no window; not through MPLBACKEND, which the kernels of notebooks would inherit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the nightly tests unless the expression of `-m` names them."""
    if "nightly" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.skip(reason="nightly: run `make nightly`, or pytest -m nightly"))


@pytest.fixture(autouse=True)
def _stepsal_is_imported(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["stepsal"] = stepsal
