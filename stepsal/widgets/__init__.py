"""Widgets for JupyterLab: look at step maps layer by layer, and play with StepFlow; all assets are local."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepsal.widgets.explorer import Explorer
    from stepsal.widgets.panel import StepFlowPanel

__all__ = ["Explorer", "StepFlowPanel"]
_HOME = {"Explorer": "stepsal.widgets.explorer", "StepFlowPanel": "stepsal.widgets.panel"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'stepsal.widgets' has no attribute {name!r}")
