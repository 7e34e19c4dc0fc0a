"""docs/models.md says what its script measures."""

from __future__ import annotations

import pytest
import table_of_models
from tiny_models import ALL_ARCHITECTURES

TEXT = table_of_models.TARGET.read_text()


def rows(text: str) -> dict[str, str]:
    """Return the rows of all tables by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| arch"))]
    return {line.split("|")[1].strip(): line for line in lines}


def test_the_document_has_a_row_for_each_architecture() -> None:
    assert TEXT.startswith(table_of_models.HEADER)
    assert set(rows(TEXT)) == set(ALL_ARCHITECTURES) == set(table_of_models.FAMILIES)
    assert "off by" not in TEXT


@pytest.mark.parametrize("architecture", ["GPT2", "Phi3", "OPT"])
def test_it_says_what_is_measured(architecture: str) -> None:
    assert rows(table_of_models.table((architecture,)))[architecture] == rows(TEXT)[architecture]


@pytest.mark.nightly
def test_it_says_what_is_measured_of_all() -> None:
    assert table_of_models.table() == TEXT.removeprefix(table_of_models.HEADER)
