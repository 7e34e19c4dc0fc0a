"""Write a figure together with the numbers it shows and where they come from.

    figures/<name>.png   figures/<name>.pdf   figures/data/<name>.csv   figures/data/<name>.json

The same figure and data give the same bytes: no dates, no paths, no machine names in any of the four files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from stepsal.storage import package_versions, write_atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DPI = 200


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
        fig: The figure.
        name: File name without ending: letters, digits, "-" and "_".
        data: The plotted values, tidy; written with seven significant digits, without the index.
        provenance: Model, seed, parameters: JSON values. Package versions are added.
        folder: Where the figures go.

    Returns:
        Path of each file: "png", "pdf", "csv", "json".

    Raises:
        ValueError: If the name is no slug, if `data` is empty, or if `provenance` cannot be written as JSON.
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
    contents = {
        folder / f"{name}.png": _render(fig, "png", {"Software": None}),
        folder / f"{name}.pdf": _render(fig, "pdf", {"CreationDate": None, "ModDate": None}),
        folder / "data" / f"{name}.csv": data.to_csv(index=False, float_format="%.7g", lineterminator="\n").encode(),
        folder / "data" / f"{name}.json": f"{text}\n".encode(),
    }
    for path, content in contents.items():
        write_atomic(path, content)
    return {path.suffix[1:]: path for path in contents}


def _render(fig: Figure, kind: str, info: dict[str, None]) -> bytes:
    buffer = BytesIO()
    with mpl.rc_context({"pdf.fonttype": 42}):  # editable text, as journals ask
        fig.savefig(buffer, format=kind, dpi=DPI, metadata=info)
    return buffer.getvalue()
