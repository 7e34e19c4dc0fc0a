"""Figures show in a real IPython kernel: the first, those after it, and the user's own."""

import nbformat
import pytest
from nbclient import NotebookClient

FIRST_INSIDE_STYLE = """
import matplotlib.pyplot as plt, pandas as pd
from stepsal import plots
data = pd.DataFrame({"layer": [0, 1], "decay": [0.2, 0.5]})
with plots.style():
    plots.layer_profile(data, "decay")
"""
SAVED = """
with plots.style():
    figure, ax = plt.subplots()
    plots.layer_profile(data, "decay", ax=ax)
plots.save_figure(figure, "decay", data, provenance={}, folder=FOLDER);
"""
PLAIN = "plt.plot([1, 2]);"


def n_images(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.slow
def test_every_figure_of_a_kernel_shows(tmp_path):
    sources = [FIRST_INSIDE_STYLE, f"FOLDER = {str(tmp_path)!r}" + SAVED, SAVED, PLAIN]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert [n_images(cell) for cell in notebook.cells] == [1, 1, 1, 1]
    assert (tmp_path / "decay.png").exists()
