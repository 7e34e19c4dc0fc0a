"""Write a figure together with the numbers that it shows and their provenance.

    figures/<name>.png   figures/<name>.pdf   figures/data/<name>.csv   figures/data/<name>.json

The same figure and data give the same bytes: no dates, no paths, no machine names in any of the four files. A figure
that is drawn anew and differs in rounding alone leaves its files as they are: version control shows what has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pandas as pd

from stepsal.storage import package_versions, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200
DIGITS = 6  # of a value: more than any of our statistics means
ROUNDING = 1e-5  # of the largest value of a column: what the order of threads changes
PIXEL_ROUNDING = 8 / 255  # of a channel: no eye sees it


def save_figure(
    fig: Figure,
    name: str,
    data: pd.DataFrame,
    *,
    provenance: Mapping[str, Any],
    folder: str | Path = "figures",
) -> dict[str, Path]:
    """Write a figure as PNG (200 dpi) and PDF, its plotted values as CSV, and its provenance as JSON.

    Everything is rendered before the first file is written, and each file is moved into place when complete.

    Args:
        fig: the figure.
        name: file name without ending: letters and digits joined by "-" or "_".
        data: the plotted values, tidy; written with six significant digits, without the index.
        provenance: model, seed, parameters: JSON values. Package versions are added.
        folder: folder to write to; created if missing.

    Returns:
        Path of each file: "png", "pdf", "csv", "json".

    Raises:
        ValueError: the name is no file name, `data` is empty, or `provenance` cannot be written as JSON.

    Example:
        >>> import matplotlib.pyplot as plt, pandas as pd, tempfile
        >>> data = pd.DataFrame({"layer": [0, 1], "decay": [0.2, 0.5]})
        >>> figure = stepsal.plots.layer_profile(data, "decay").figure
        >>> folder = tempfile.mkdtemp()
        >>> paths = stepsal.plots.save_figure(figure, "decay", data, provenance={"model_name": "mini"}, folder=folder)
        >>> [path.relative_to(folder).as_posix() for path in paths.values()]
        ['decay.png', 'decay.pdf', 'data/decay.csv', 'data/decay.json']
        >>> plt.close(figure)
    """
    if not re.fullmatch(r"[A-Za-z0-9]+([-_][A-Za-z0-9]+)*", name):
        raise ValueError(f"figure name {name!r} is no file name; use letters and digits joined by '-' or '_'")
    if data.empty:
        raise ValueError(f"figure {name!r} has no data; pass the plotted values as a DataFrame")
    document = {"figure": name, "provenance": dict(provenance), "versions": package_versions()}
    try:
        text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"provenance of {name!r} cannot be written as JSON ({error}); use text, finite numbers, lists"
        ) from error

    folder = Path(folder)
    values = data.to_csv(index=False, float_format=f"%.{DIGITS}g", lineterminator="\n")
    contents = {
        folder / f"{name}.png": _render(fig, "png", {"Software": None}),
        folder / f"{name}.pdf": _render(fig, "pdf", dict.fromkeys(("CreationDate", "ModDate", "Creator", "Producer"))),
        folder / "data" / f"{name}.csv": values.encode(),
        folder / "data" / f"{name}.json": f"{text}\n".encode(),
    }
    if not _is_unchanged(contents):
        for path, content in contents.items():
            write_atomic(path, content)
    return {path.suffix[1:]: path for path in contents}


def _render(fig: Figure, kind: str, info: dict[str, None]) -> bytes:
    """Return the figure as a file of a kind, without the entries of its metadata that are None."""
    buffer = BytesIO()
    fonttype = mpl.rcParams["pdf.fonttype"]
    mpl.rcParams["pdf.fonttype"] = 42  # editable text, as journals ask
    try:
        fig.savefig(buffer, format=kind, dpi=DPI, metadata=info)
    finally:
        mpl.rcParams["pdf.fonttype"] = fonttype
    return buffer.getvalue()


def _is_unchanged(contents: Mapping[Path, bytes]) -> bool:
    """Tell whether the files of a figure show it already: same provenance, values and pixels but for rounding."""
    if not all(path.exists() for path in contents):
        return False
    same = {".png": _same_pixels, ".csv": _same_values, ".json": _same_provenance}
    # the PDF is drawn from what the PNG is drawn from
    return all(same[path.suffix](path.read_bytes(), new) for path, new in contents.items() if path.suffix in same)


def _same_pixels(old: bytes, new: bytes) -> bool:
    """Compare two PNGs."""
    before, after = (mpl.image.imread(BytesIO(content)) for content in (old, new))
    return before.shape == after.shape and bool(np.abs(before - after).max() <= PIXEL_ROUNDING)


def _same_values(old: bytes, new: bytes) -> bool:
    """Compare two tables, numbers by the digits that are meant."""
    before, after = (pd.read_csv(BytesIO(content)) for content in (old, new))
    largest = before.select_dtypes("number").abs().max()
    try:
        one, two = (table.assign(**table[largest.index] / largest) for table in (before, after))
        pd.testing.assert_frame_equal(one, two, check_dtype=False, rtol=0, atol=ROUNDING)
    except (AssertionError, KeyError, TypeError):  # other columns or rows; words where numbers were
        return False
    return True


def _same_provenance(old: bytes, new: bytes) -> bool:
    """Compare two provenances; a newer version of a package that changes nothing is not recorded."""
    before, after = (json.loads(content) for content in (old, new))
    return bool(before["provenance"] == after["provenance"])
