"""Write an explorer as one HTML file that needs no kernel and no network."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from stepsal.storage import write_atomic
from stepsal.widgets.scene import Scene

STATIC = Path(__file__).parent / "static"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>stepsal: step maps</title>
<style>{css}</style>
</head>
<body class="stepsal-page">
<div id="explorer"></div>
<script type="application/json" id="state">{state}</script>
<script type="module">{script}</script>
</body>
</html>
"""

_START = """
const stored = JSON.parse(document.getElementById("state").textContent);
for (const [name, text] of Object.entries(stored.buffers)) {
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  stored.buffers[name] = new DataView(bytes.buffer);
}
const listeners = {};
const model = {
  get: (name) => stored[name],
  set(name, value) {
    if (String(stored[name]) === String(value)) return;
    stored[name] = value;
    for (const each of listeners[`change:${name}`] ?? []) each();
  },
  save_changes() {},
  on(event, each) { (listeners[event] ??= []).push(each); },
  off(event, each) { listeners[event] = (listeners[event] ?? []).filter((x) => x !== each); },
};
render({ model, el: document.getElementById("explorer") });
"""


def page(scene: Scene, view: dict[str, Any], path: Path) -> Path:
    """Write the page of a scene.

    Args:
        scene: the maps to show.
        view: the choices with which the page begins, as indices (`Scene.to_view`).
        path: the file, such as "maps.html"; its folder must exist.

    Returns:
        The path.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder {path.resolve().parent} does not exist")
    buffers = {name: base64.b64encode(data).decode() for name, data in scene.buffers().items()}
    stored = {"scene": scene.describe(), "buffers": buffers, "controls": True, **view}
    state = json.dumps(stored, ensure_ascii=True).replace("<", "\\u003c")  # no text of a trace can end the script
    script = (STATIC / "explorer.js").read_text().replace("export default { render };", _START)
    css = (STATIC / "explorer.css").read_text()
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(css)}; base-uri 'none'; form-action 'none'"
    )
    write_atomic(path, _PAGE.format(policy=policy, css=css, state=state, script=script).encode())
    return path


def _hash(text: str) -> str:
    """Return a source of a content policy that allows this text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
