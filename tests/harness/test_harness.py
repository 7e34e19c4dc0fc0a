"""The harness without an evaluation: what Inspect looks up by name, and errors where it is missing or has moved."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


def test_the_solver_can_be_named_on_the_command_line() -> None:
    from inspect_ai._util.registry import registry_create

    assert registry_create("solver", "stepsal/capture_step_saliency", folder="maps")


def test_the_harness_is_there_without_inspect() -> None:
    """In a fresh session, and without the package; only using it says what is missing."""
    code = """
import sys
sys.modules["inspect_ai"] = None
import stepsal
assert "hub" in dir(stepsal.harness)
try:
    stepsal.harness.hub
except ImportError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "stepsal.harness.hub needs Inspect: pip install 'stepsal[inspect]'\n"


def test_internals_of_inspect_that_have_moved_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai.log._samples", None)
    monkeypatch.delitem(sys.modules, "stepsal.harness.inspect_private", raising=False)
    with pytest.raises(ImportError, match=r"not where they were .* tested with (\S+); .*inspect-ai==\1"):
        importlib.import_module("stepsal.harness.inspect_private")
