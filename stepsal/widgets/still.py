"""Put a picture beside a widget: what a notebook shows that is not trusted, or that is looked at without a kernel."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepsal.widgets.explorer import Explorer

INVITATION = "A picture of the explorer: run the cell to explore."
DOTS_PER_INCH = 110


def with_picture(bundle: Any, explorer: Explorer) -> Any:
    """Return what a notebook stores of a widget, with a picture of an explorer and a sentence that says what to do.

    Viewers choose the richest form that they can show: the widget where there are widgets, else the picture, else the
    sentence.

    Args:
        bundle: the widget by MIME type, as ipywidgets has it; with metadata or without.
        explorer: its current view is drawn.
    """
    data, *metadata = bundle if isinstance(bundle, tuple) else (bundle,)
    data = {**data, "image/png": picture(explorer), "text/plain": f"{INVITATION}\n{', '.join(explorer.scene.maps)}"}
    return (data, *metadata) if metadata else data


def picture(explorer: Explorer) -> str:
    """Return a PNG of an explorer's current view and an invitation below it, in base64.

    Args:
        explorer: the explorer.
    """
    import matplotlib.pyplot as plt

    fig, file = explorer.figure(), io.BytesIO()
    fig.supxlabel(INVITATION, fontsize="small", fontstyle="italic")
    fig.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    plt.close(fig)  # so that it isn't shown a second time, beside the widget
    return base64.b64encode(file.getvalue()).decode()
