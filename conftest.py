"""Settings of all test runs: `stepsal` in the doctests, and skips of what is not asked for or not installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import matplotlib
import pytest

import stepsal

matplotlib.use("Agg")  # no window; not through MPLBACKEND, which the kernels of notebooks would inherit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the nightly tests unless the expression of `-m` names them, and doctests whose package is not installed."""
    nightly = pytest.mark.skip(reason="nightly: run `make nightly`, or pytest -m nightly")
    no_gym = pytest.mark.skip(reason="reasoning-gym is not installed: pip install 'stepsal[gym]'")
    has_gym = find_spec("reasoning_gym") is not None
    for item in items:
        if item.get_closest_marker("nightly") and "nightly" not in config.option.markexpr:
            item.add_marker(nightly)
        if isinstance(item, pytest.DoctestItem) and item.name.startswith("stepsal.tasks.gym.") and not has_gym:
            item.add_marker(no_gym)


@pytest.fixture(autouse=True)
def _stepsal_is_imported(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["stepsal"] = stepsal
