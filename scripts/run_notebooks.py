"""Run the notebooks of this repository; each rebuilds its figures in `figures/`.

    python scripts/run_notebooks.py                             # all of them
    python scripts/run_notebooks.py 01 02_shallow_deep_flow     # some, by number or by name
    python scripts/run_notebooks.py --inplace 09                # and keep the outputs in the notebook
    python scripts/run_notebooks.py --jobs 1                    # one at a time, where answers are to be made anew

Two run at a time, each with its share of the cores; a line with its time says when one is done. Outputs are kept
without times of day, warnings and progress bars, and with widgets under stable names, so that a notebook's history
shows results and not noise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
#: So that a kernel does not warn of itself: of frozen modules, and of a connection within the machine as not encrypted.
QUIET_ENVIRONMENT, QUIET_KERNEL = {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}, ["--IPKernelApp.log_level=40"]
PROGRESS_BAR = ["HTMLModel", "FloatProgressModel", "HTMLModel"]  # the parts of tqdm's

Models = dict[str, dict[str, Any]]
"""The state of a notebook's widgets, by id."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run notebooks as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, by number or name; all by default")
    parser.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="folder of the notebooks")
    parser.add_argument("--inplace", action="store_true", help="keep the outputs in the notebooks")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks that run at the same time")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one notebook has to run at a time")
    try:
        paths = select(sorted(options.notebooks.glob("*.ipynb")), options.names)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    start = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:  # the work is done by the kernels, which are processes
        runs = {pool.submit(run, path, n_threads(options.jobs), inplace=options.inplace): path for path in paths}
        failures = [runs[future] for future in as_completed(runs) if not report(future, runs[future])]
    if len(paths) > 1:
        print(f"{len(paths) - len(failures)} of {len(paths)} notebooks ran in {duration(time.monotonic() - start)}")
    return 1 if failures else 0


def n_threads(jobs: int) -> int:
    """Return how many threads a kernel may use, so that all of them together keep the cores busy and no more."""
    return max(1, (os.cpu_count() or 1) // jobs)


def run(path: Path, threads: int, *, inplace: bool) -> float:
    """Run a notebook, keep its outputs if that is asked for, and return the seconds that it took."""
    start = time.monotonic()
    notebook = execute(path, threads)
    if inplace:
        tidy(notebook)
        nbformat.write(notebook, path)
    return time.monotonic() - start


def report(future: Future[float], path: Path) -> bool:
    """Say how long a notebook took, or how it failed; return whether it ran."""
    try:
        print(f"{path.stem}: {duration(future.result())}", flush=True)
    except CellExecutionError as error:
        print(f"{path.stem} failed:\n{error}", file=sys.stderr, flush=True)
        return False
    return True


def duration(seconds: float) -> str:
    """Return a time in words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def select(paths: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Return the notebooks that names or numbers stand for, in their own order; all of them without names.

    Raises:
        ValueError: there are no notebooks, or none of a name.
    """
    known = {name: path for path in paths for name in (path.stem, path.stem.partition("_")[0])}
    unknown = [name for name in names if name not in known]
    if not paths:
        raise ValueError("there is no notebook at all in the folder; name another by --notebooks")
    if unknown:
        raise ValueError(f"there is no notebook {', '.join(unknown)}; there is {', '.join(p.stem for p in paths)}")
    return sorted({known[name] for name in names}) if names else list(paths)


def execute(path: Path, threads: int | None = None) -> NotebookNode:
    """Run a notebook in its own folder, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}, extra_arguments=QUIET_KERNEL
    )
    environment = os.environ | QUIET_ENVIRONMENT | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    client.execute(env=environment)
    return notebook


def tidy(notebook: NotebookNode) -> None:
    """Drop times of day, warnings and progress bars; keep the widgets that are shown, under stable names."""
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
    kept = _with_parts_and_links(shown, models)
    names = {model: f"{i:032x}" for i, model in enumerate(kept)}  # ids are random; these are the same in every run
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if view := output.get("data", {}).get(WIDGET_VIEW):
                view["model_id"] = names[view["model_id"]]
    text = json.dumps({model: models[model] for model in kept})
    state = json.loads(re.sub("|".join(names), lambda match: names[match[0]], text))
    notebook.metadata["widgets"] = {WIDGET_STATE: {"state": state, "version_major": 2, "version_minor": 0}}


def _is_progress_bar(output: NotebookNode, models: Models) -> bool:
    """Tell whether an output is a bar of tqdm, or a widget that has been closed."""
    if WIDGET_VIEW not in output.get("data", {}):
        return False
    box = models.get(output.data[WIDGET_VIEW]["model_id"], {"state": {}})
    parts = [models[m.removeprefix("IPY_MODEL_")]["model_name"] for m in box["state"].get("children", [])]
    return parts == PROGRESS_BAR or not box["state"]


def _with_parts_and_links(shown: list[str], models: Models) -> list[str]:
    """Return the ids of widgets, of all that they are made of, and of the links between these, breadth first."""
    members, queue = dict.fromkeys(shown), list(shown)
    while queue:
        for model in _references(models[queue.pop(0)]):
            if model not in members:
                members[model] = None
                queue.append(model)
    links = [
        model
        for model, content in models.items()
        if content["model_name"].endswith("LinkModel") and {*_references(content)} <= members.keys()
    ]
    return [*members, *links]


def _references(model: dict[str, Any]) -> list[str]:
    """Return the ids of the widgets that a widget's state names."""
    return re.findall(r"IPY_MODEL_([0-9a-f]+)", json.dumps(model["state"]))


if __name__ == "__main__":
    sys.exit(main())
