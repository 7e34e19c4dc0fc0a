"""Run a notebook, and tidy what it leaves, so that its history shows results and not noise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbformat import NotebookNode

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
PROGRESS_BAR = ["HTMLModel", "FloatProgressModel", "HTMLModel"]  # the parts of tqdm's

Models = dict[str, dict[str, Any]]


def execute(path: Path) -> NotebookNode:
    """The notebook with its outputs, run in its own folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def tidy(notebook: NotebookNode) -> None:
    """Drop times of day, warnings and progress bars; of the widgets keep those that are shown, under stable names."""
    models: Models = notebook.metadata.pop("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    shown: list[str] = []
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and not _is_progress_bar(o, models)]
        shown += [o.data[WIDGET_VIEW]["model_id"] for o in cell.outputs if WIDGET_VIEW in o.get("data", {})]
    if not shown:
        return
    kept = _reached(shown, models)
    names = {model: f"{i:032x}" for i, model in enumerate(kept)}  # ids are random; these are the same in every run
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if view := output.get("data", {}).get(WIDGET_VIEW):
                view["model_id"] = names[view["model_id"]]
    text = json.dumps({model: models[model] for model in kept})
    state = json.loads(re.sub("|".join(names), lambda found: names[found[0]], text))
    notebook.metadata["widgets"] = {WIDGET_STATE: {"state": state, "version_major": 2, "version_minor": 0}}


def _is_progress_bar(output: NotebookNode, models: Models) -> bool:
    if WIDGET_VIEW not in output.get("data", {}):
        return False
    box = models.get(output.data[WIDGET_VIEW]["model_id"], {"state": {}})
    parts = [models[m.removeprefix("IPY_MODEL_")]["model_name"] for m in box["state"].get("children", [])]
    return parts == PROGRESS_BAR or not box["state"]


def _reached(shown: list[str], models: Models) -> list[str]:
    """What is shown, all that it is made of, and the links between these, in the order in which it is found."""
    found, waiting = dict.fromkeys(shown), list(shown)
    while waiting:
        for model in _named(models[waiting.pop(0)]):
            if model not in found:
                found[model] = None
                waiting.append(model)
    links = [m for m, x in models.items() if x["model_name"].endswith("LinkModel") and {*_named(x)} <= found.keys()]
    return [*found, *links]


def _named(model: dict[str, Any]) -> list[str]:
    return re.findall(r"IPY_MODEL_([0-9a-f]+)", json.dumps(model["state"]))
