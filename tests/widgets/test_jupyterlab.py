"""The explorer and StepFlow's panel in JupyterLab, in a real Chromium: a copy of notebook 09 with some cells more."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import nbformat
import pytest
from browsing import ROOT, hover, panel, picture, point, settle, watched_page
from capture_explorer import maps_of_notebook_09
from made_up import saliency
from nbformat.sign import NotebookNotary
from playwright.sync_api import Browser, Locator, Page, expect

from stepsal.widgets import Explorer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("jupyterlab")]  # one server for all of them

TOKEN = "of-the-tests"
MORE_CELLS = (
    """
looped = Explorer(maps)
looped.state = {"layer": 3}
looped""",
    """
import json, time
for i in range(8):
    looped.state = {"layer": i, "band": "deep", "metric": "share", "pinned": {"trace": "wrong", "query": 9, "key": i}}
    time.sleep(0.02)""",
)

# Commands go to JupyterLab itself and not through its menus, which take no click while a busy machine builds the page.
READY = "() => window.jupyterapp?.shell.currentWidget?.context?.isReady"
RUN_ALL = """
async () => {
  const app = window.jupyterapp, notebook = app.shell.currentWidget;
  await Promise.all([app.restored, notebook.context.ready, notebook.sessionContext.ready]);
  await notebook.sessionContext.session.kernel.info;
  const late = new Promise(resolve => setTimeout(resolve, 600_000, "the cells did not end within ten minutes"));
  return Promise.race([app.commands.execute("notebook:run-all-cells"), late]);
}
"""
EXECUTE = """
async code => {
  const future = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({ code });
  let printed = "";
  future.onIOPub = ({ header, content }) => {
    if (header.msg_type === "stream") printed += content.text;
    if (header.msg_type === "error") printed += `${content.ename}: ${content.evalue}`;
  };
  await future.done;
  return printed;
}
"""


def in_kernel(notebook: Page, code: str) -> str:
    """Run code in the kernel of the open notebook, in its turn, and return what it printed."""
    return notebook.evaluate(EXECUTE, code)


def stranger() -> nbformat.NotebookNode:
    """A notebook that nobody here has run or signed, with the stored output of an explorer."""
    output = nbformat.v4.new_output("display_data", data=Explorer(saliency())._repr_mimebundle_())
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("explorer", outputs=[output])])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab with settings of its own, on a copy of notebook 09, which it trusts; without news and lazy cells."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "jupyter"):
        (folder / name).mkdir()
    (folder / "data").symlink_to(ROOT / "data")
    notebook = nbformat.read(ROOT / "notebooks" / "09_explorer.ipynb", as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source += f"\nFIGURES = {str(folder / 'figures')!r}"
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in MORE_CELLS]
    nbformat.write(notebook, folder / "notebooks" / "09_explorer.ipynb")
    NotebookNotary(data_dir=str(folder / "jupyter")).sign(notebook)
    nbformat.write(stranger(), folder / "notebooks" / "stranger.ipynb")
    for plugin, settings in {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }.items():
        file = folder / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"CONFIG_DIR": "config", "DATA_DIR": "jupyter", "RUNTIME_DIR": "runtime"}
    environment = os.environ | {f"JUPYTER_{name}": str(folder / place) for name, place in places.items()}
    environment |= {f"JUPYTERLAB_{name.upper()}_DIR": str(folder / name) for name in ("settings", "workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True",
               f"--IdentityProvider.token={TOKEN}"]  # fmt: skip
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(1800):
                if process.poll() is not None:
                    break
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/api/status?token={TOKEN}")
                    yield url
                    return
                time.sleep(0.1)
            raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'log.txt').read_text()}")
        finally:
            process.terminate()
            process.wait()


def open_notebook(page: Page, server: str, name: str = "09_explorer") -> None:
    page.goto(f"{server}/lab/workspaces/{name}/tree/notebooks/{name}.ipynb?token={TOKEN}")  # each with tabs of its own
    page.wait_for_function(READY)


@pytest.fixture(scope="module")
def notebook(browser: Browser, server: str) -> Iterator[Page]:
    """Notebook 09 in JupyterLab, all cells run."""
    with watched_page(browser, 1400, 1200) as page:
        open_notebook(page, server)
        outcome = page.evaluate(RUN_ALL)
        assert page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts() == []
        assert outcome is True
        yield page


@pytest.fixture
def first(notebook: Page, request: pytest.FixtureRequest) -> Iterator[Locator]:
    """The notebook's first explorer."""
    yield notebook.locator(".stepsal-widget").first
    picture(notebook, request)


def test_saved_widgets_are_shown_without_running_anything(page: Page, server: str) -> None:
    open_notebook(page, server)
    expect(page.locator(".stepsal-map").first).to_be_visible(timeout=60_000)
    first = page.locator(".stepsal-widget").first
    expect(panel(first).locator(".stepsal-title")).to_have_text("wrong · layer 6 · share of its row")
    first.locator(".noUi-handle").first.press("ArrowLeft")  # the slider works, though no kernel knows of it
    expect(panel(first).locator(".stepsal-title")).to_have_text("wrong · layer 5 · share of its row")


def test_a_notebook_that_is_not_trusted_shows_a_picture(page: Page, server: str) -> None:
    open_notebook(page, server, "stranger")
    output = page.locator(".jp-OutputArea-output")
    expect(output).to_have_attribute("data-mime-type", "image/png")
    image = output.locator("img")
    expect(image).to_be_visible(timeout=60_000)
    assert image.evaluate("e => e.naturalWidth") > 300


def test_sliders_and_switches_in_jupyterlab(first: Locator) -> None:
    title = panel(first).locator(".stepsal-title")
    expect(title).to_have_text("wrong · layer 6 · share of its row")
    first.locator(".noUi-handle").first.press("ArrowRight")
    expect(title).to_have_text("wrong · layer 7 · share of its row")
    metric, _, view, _, beside = (first.locator(".widget-dropdown select").nth(i) for i in range(5))
    metric.select_option("difference of shares")
    expect(title).to_have_text("wrong − correct · layer 7 · difference of shares")
    expect(first.locator(".stepsal-panel")).to_have_count(1)
    metric.select_option("saliency")
    expect(first.locator(".stepsal-panel")).to_have_count(2)
    first.get_by_role("button", name="shallow").click()
    expect(title).to_have_text("wrong · shallow layers 0–1 · saliency")
    view.select_option("arcs")
    view.select_option("map")
    beside.select_option("nothing")
    expect(first.locator(".stepsal-panel")).to_have_count(1)
    first.locator(".noUi-handle").first.press("ArrowLeft")  # moving the slider leaves the band
    expect(title).to_have_text("wrong · layer 6 · saliency")


def state_in_python(notebook: Page, **choices: Any) -> dict[str, Any]:
    """The state of the last cells' explorer, once Python has heard of these choices, or should have."""
    deadline = time.monotonic() + 60
    while True:
        state = json.loads(in_kernel(notebook, "print(json.dumps(looped.state))"))
        if all(state[name] == value for name, value in choices.items()) or time.monotonic() > deadline:
            return state
        notebook.wait_for_timeout(100)


def test_python_and_the_reader_may_both_choose(notebook: Page, request: pytest.FixtureRequest) -> None:
    """Choices that a cell makes in a row all arrive, and what a busy kernel hears late takes nothing back."""
    last = notebook.locator(".stepsal-widget").last
    title = panel(last).locator(".stepsal-title")
    expect(title).to_have_text("wrong · deep layers 6–7 · share of its row")
    state = state_in_python(notebook, layer=7)
    assert (state["layer"], state["band"], state["pinned"]["key"]) == (7, "deep", 7)
    slider = last.locator(".noUi-handle").first
    expect(slider).to_have_attribute("aria-valuenow", "7.0")
    notebook.evaluate(f"() => {{ ({EXECUTE})('time.sleep(3)'); }}")  # not awaited: the kernel is busy from here on
    for _ in range(5):
        slider.press("ArrowLeft")
    expect(title).to_have_text("wrong · layer 2 · share of its row")
    state = state_in_python(notebook, layer=2)
    assert (state["layer"], state["band"]) == (2, None)
    notebook.wait_for_timeout(500)  # in which an echo of an older choice would come back
    expect(title).to_have_text("wrong · layer 2 · share of its row")
    assert state_in_python(notebook)["layer"] == 2
    picture(notebook, request)


def test_steps_are_marked_and_pins_reach_python(notebook: Page, first: Locator) -> None:
    maps = maps_of_notebook_09()["wrong"]
    where = panel(first)
    first.locator(".widget-dropdown select").first.select_option("saliency")
    first.get_by_role("button", name="one layer").click()
    expect(where.locator(".stepsal-title")).to_contain_text(re.compile(r"layer \d · saliency"))
    layer = int(re.search(r"layer (\d)", where.locator(".stepsal-title").inner_text())[1])
    told = hover(where, 12, 7, 18)
    assert float(re.search(r": (\S+),", told)[1]) == pytest.approx(float(maps.layer(layer)[12, 7]), rel=0.006)
    for mark, step in (("query", 12), ("key", 7)):
        expect(where.locator(f".stepsal-{mark} .stepsal-words")).to_have_text(" ".join(maps.step_texts[step].split()))
    where.locator(".stepsal-map").click(position=point(where, 12, 7, 18))
    expect(notebook.locator(".stepsal-told")).to_have_text("pinned: {'trace': 'wrong', 'query': 12, 'key': 7}")


def test_arrows_move_in_the_map_and_not_in_the_notebook(notebook: Page, first: Locator) -> None:
    where = panel(first)
    where.locator(".stepsal-map").click(position=point(where, 9, 3, 18))
    selected = "all => all.map(cell => cell.classList.contains('jp-mod-selected'))"
    before = notebook.locator(".jp-Notebook .jp-Cell").evaluate_all(selected)
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        notebook.keyboard.press(key)
    expect(where.locator(".stepsal-readout")).to_contain_text("step 10 (thinking) ← 5 (thinking)")
    assert notebook.locator(".jp-Notebook .jp-Cell").evaluate_all(selected) == before
    assert sum(before) == 1


def theme(notebook: Page, name: str) -> None:
    notebook.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: name })", name)
    light = "true" if name == "JupyterLab Light" else "false"
    expect(notebook.locator("body")).to_have_attribute("data-jp-theme-light", light)
    expect(notebook.locator("#jupyterlab-splash")).to_have_count(0)


def test_the_theme_of_jupyterlab_is_followed(notebook: Page, first: Locator) -> None:
    labels = "[...c.getContext('2d').getImageData(0, 0, 23, 400).data]"  # opaque where a label is inked
    of_labels = f"c => {{ const p = {labels}, i = p.findIndex((a, i) => i % 4 === 3 && a > 200); return p[i - 1]; }}"
    canvas = panel(first).locator(".stepsal-map")
    settle(first)
    assert canvas.evaluate(of_labels) < 100
    theme(notebook, "JupyterLab Dark")
    settle(first)
    assert canvas.evaluate(of_labels) > 150
    theme(notebook, "JupyterLab Light")
    settle(first)
    assert canvas.evaluate(of_labels) < 100


def test_a_generation_is_stopped_and_run_again(notebook: Page, request: pytest.FixtureRequest) -> None:
    where = notebook.locator(".stepsal-panel-live")
    status = where.locator(".stepsal-status")
    expect(status).to_have_text("done")
    slowly = "slow = model.original_model.register_forward_pre_hook(lambda *_: time.sleep(0.2))"
    assert in_kernel(notebook, slowly) == ""  # so that the run is not over before it can be stopped
    where.locator(".stepsal-run").click()
    where.locator(".stepsal-stop").click()  # which waits until it can be clicked
    expect(status).to_have_text("stopped")
    expect(where.locator(".stepsal-stop")).to_be_disabled()
    assert in_kernel(notebook, "slow.remove()") == ""
    where.locator(".stepsal-run").click()
    expect(status).to_have_text("done")
    expect(where.locator(".stepsal-parting")).to_contain_text("They part in step 2, after 6 tokens")
    expect(where.locator(".stepsal-map")).to_have_count(2)
    for label in ("without StepFlow", "with StepFlow"):
        expect(panel(where, label).locator(".stepsal-step")).not_to_have_count(0)
    where.scroll_into_view_if_needed()
    picture(notebook, request)
