"""Fixtures of the doctests in `stepsal`."""

from __future__ import annotations

from typing import Any

import pytest

import stepsal


@pytest.fixture(autouse=True)
def _stepsal_is_imported(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["stepsal"] = stepsal
