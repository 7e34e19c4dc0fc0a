"""Write an explorer as one HTML file that needs no kernel and no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from stepsal.storage import write_atomic
from stepsal.widgets.payload import buffers, describe
from stepsal.widgets.scene import Scene

STATIC = Path(__file__).parent / "static"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{css}</style>
</head>
<body class="stepsal-page">
<div id="explorer"></div>
<script type="application/json" id="state">{state}</script>
<script type="module">{script}</script>
</body>
</html>
"""

SCRIPTS = ("drawing", "maps", "chart", "reading", "tokens", "heads", "panel", "depth", "controls", "about", "explorer")


def script(last: str) -> str:
    """Return the whole script of an explorer: one module, as a browser's content policy and anywidget want it.

    Args:
        last: what stands at its end: how it is started.
    """
    return "\n".join([*((STATIC / f"{name}.js").read_text() for name in SCRIPTS), last])


def page(scene: Scene, view: dict[str, Any], path: Path, title: str, verdicts: Mapping[str, str]) -> Path:
    """Write the page of a scene.

    Args:
        scene: the maps to show.
        view: the choices with which the page begins, as indices (`Scene.to_view`).
        path: the file, such as "maps.html"; its folder must exist.
        title: heading of the page.
        verdicts: what is said of the answers of some of the labels.

    Returns:
        The path.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a verdict on an unknown label.
    """
    if unknown := set(verdicts) - set(scene.maps):
        raise ValueError(f"verdicts on {sorted(unknown)}, but the maps are {list(scene.maps)}")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder {path.resolve().parent} does not exist")
    numbers = {name: base64.b64encode(data).decode() for name, data in buffers(scene).items()}
    about = {"title": title, "date": f"{date.today():%Y-%m-%d}", "verdicts": [verdicts.get(x, "") for x in scene.maps]}
    stored = {"scene": describe(scene) | {"page": about}, "buffers": numbers, "controls": True, **view}
    state = json.dumps(stored, ensure_ascii=True).replace("<", "\\u003c")  # no text of a trace can end the script
    code = script((STATIC / "page.js").read_text())
    css = (STATIC / "explorer.css").read_text()
    policy = (
        f"default-src 'none'; script-src {_hash(code)}; style-src {_hash(css)}; base-uri 'none'; form-action 'none'"
    )
    text = _PAGE.format(policy=policy, css=css, state=state, script=code, title=html.escape(title))
    write_atomic(path, text.encode())
    return path


def _hash(text: str) -> str:
    """Return a source of a content policy that allows this text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
