"""The explorer's choices and files, and StepFlow's panel, without a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from made_up import NASTY, saliency
from PIL import Image
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import plots
from stepsal.maps import StepSaliency
from stepsal.tasks import chain
from stepsal.widgets import Explorer, StepFlowPanel
from stepsal.widgets.panel import EDITED, PLAIN, _say, first_difference, tell_parting


@pytest.fixture
def explorer() -> Explorer:
    tokens = torch.rand(8, 10, 10).tril()
    return Explorer({"wrong": saliency(token_values=tokens), "correct": saliency(seed=1), "long": saliency(7)})


EVERYTHING = {
    "trace": "correct", "compare": "wrong", "layer": 6, "band": "deep", "metric": "difference", "scale": "linear",
    "shared": False, "top_k": 3, "threshold": 25, "view": "arcs", "pinned": {"trace": "correct", "query": 4, "key": 2},
    "zoom": {"trace": "wrong", "query": 3, "key": 1},
}  # fmt: skip


def test_state_gives_back_and_restores_every_choice(explorer: Explorer) -> None:
    first = explorer.state
    assert set(first) == set(EVERYTHING)
    assert all(first[name] != value for name, value in EVERYTHING.items())
    explorer.state = EVERYTHING
    assert explorer.state == EVERYTHING
    assert json.loads(json.dumps(explorer.state)) == EVERYTHING
    explorer.state = {"layer": 2}
    assert explorer.state == EVERYTHING | {"layer": 2}
    explorer.state = first
    assert explorer.state == first


def test_layers_are_called_as_in_the_model() -> None:
    explorer = Explorer({"part": part(), "whole": saliency(layers=12)})
    assert explorer.state["layer"] == 4
    explorer.state = {"layer": 11}
    assert explorer.view.layer == 2
    with pytest.raises(ValueError, match=r"layer=5 was not computed of 'part'; there are \[4, 8, 11\]"):
        explorer.state = {"layer": 5}
    explorer.state = {"compare": "whole", "layer": 8}
    assert explorer.scene.title("whole", explorer.state).startswith("whole · layer 8 ·")
    explorer.state = {"trace": "whole", "compare": "part"}  # the layer in the place of the old one
    assert explorer.state["layer"] == 1
    assert explorer.scene.title("part", explorer.state).startswith("part · layer 4 ·")  # the nearest


def test_a_difference_is_between_layers_that_belong_together() -> None:
    shallow, deep = saliency(layers=8), saliency(layers=28, seed=1)
    explorer = Explorer({"a": shallow, "b": deep})
    explorer.state = {"compare": "b", "metric": "difference", "band": "deep"}

    def share(values: torch.Tensor) -> torch.Tensor:
        return values / values.sum(-1, keepdim=True)

    torch.testing.assert_close(
        explorer.scene.shown("a", explorer.state), share(shallow.mean_over("deep")) - share(deep.mean_over("deep"))
    )
    explorer.state = {"band": None, "layer": 5}
    torch.testing.assert_close(
        explorer.scene.shown("a", explorer.state), share(shallow.layer(5)) - share(deep.layer(5))
    )


def test_what_a_trace_lacks_is_said_and_saliency_shown(explorer: Explorer) -> None:
    scene = explorer.scene
    for choice, note in (
        ({"metric": "difference"}, "another trace beside it, with as many steps"),
        ({"metric": "difference", "compare": "long"}, "another trace beside it, with as many steps"),
        ({"metric": "attention"}, "attention was not captured"),
    ):
        explorer.state = scene.first_state() | choice
        explorer.state = explorer.state  # every state that there is can be restored
        assert explorer.state["metric"] == choice["metric"]
        torch.testing.assert_close(scene.shown("wrong", explorer.state), scene.maps["wrong"].layer(0))
        (title, *_) = (ax.get_title(loc="left") for ax in explorer.figure().axes if ax.get_title(loc="left"))
        assert note in title.replace("\n", " ")
        plt.close("all")


def test_colours_reach_what_is_shown() -> None:
    """The share of a band's mean may exceed the shares of all its layers."""
    values = torch.zeros(8, 4, 4)
    values[6, 3, 0], values[7, 3, 1] = 1e-3, 1.0
    values[:, range(4), range(4)] = 1e-6
    first = saliency(4)
    fields = {name: getattr(first, name) for name in first.__dataclass_fields__}
    one, other = (StepSaliency(**fields | {"values": x}) for x in (values, values.flip(0)))
    scene = Explorer({"a": one, "b": other}).scene
    for metric in ("share", "difference", "saliency"):
        state = scene.first_state() | {"compare": "b", "metric": metric, "band": "deep"}
        low, high = scene.color_range("a", state)
        assert low <= float(scene.shown("a", state).abs().max()) <= high


def part() -> StepSaliency:
    whole = saliency(layers=3)
    fields = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
    return StepSaliency(**fields | {"layers": (4, 8, 11), "n_layers": 12})


def test_a_notebook_can_react_to_the_pinned_cell(explorer: Explorer) -> None:
    seen = []
    explorer.observe(lambda change: seen.append(change["new"]), names="pinned")
    explorer.view.pinned = [1, 3, 2]  # as the browser says it
    explorer.state = {"pinned": None}
    assert seen == [{"trace": "correct", "query": 3, "key": 2}, None]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"colour": "red"}, r"unknown choices \['colour'\]"),
        ({"trace": "none"}, "trace='none' is not one of"),
        ({"layer": None}, "layer has None, which is no whole number"),
        ({"layer": 1.5}, "layer has 1.5"),
        ({"layer": 8}, r"layer=8 was not computed"),
        ({"shared": 1}, "shared=1 is not one of"),
        ({"pinned": [0, 1, 1]}, r"pinned=\[0, 1, 1\] must be None or"),
        ({"pinned": {"trace": "wrong"}}, "must be None or"),
        ({"layer": 6, "pinned": {"trace": "wrong", "query": 2.5, "key": 1}}, "pinned has 2.5"),
        ({"pinned": {"trace": "wrong", "query": 1, "key": 2}}, "is no cell"),
        ({"pinned": {"trace": "wrong", "query": 9, "key": 2}}, "is no cell"),
        ({"zoom": {"trace": "correct", "query": 1, "key": 1}}, "keep_tokens=True"),
        ({"top_k": 9}, "top_k=9"),
        ({"threshold": 51}, "threshold=51"),
    ],
)
def test_choices_that_make_no_sense(explorer: Explorer, choice: dict, message: str) -> None:
    before = explorer.state
    with pytest.raises(ValueError, match=message):
        explorer.state = choice
    assert explorer.state == before


def test_maps_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="nothing to explore"):
        Explorer({})
    with pytest.raises(ValueError, match="attention of 'b'"):
        Explorer({"a": saliency()}, attention={"b": saliency()})
    with pytest.raises(ValueError, match="other steps or layers"):
        Explorer(saliency(), attention=saliency(6))
    with pytest.raises(ValueError, match="say whose attention"):
        Explorer({"a": saliency(), "b": saliency()}, attention=saliency())


@pytest.mark.parametrize("container", [list, tuple, iter, lambda maps: np.array(maps, dtype=object)])
def test_maps_in_other_containers_than_a_dict(container: Callable[[list[StepSaliency]], object]) -> None:
    maps = [saliency(), saliency()]
    kind = type(container(maps)).__name__
    with pytest.raises(
        ValueError, match=f'saliency is a {kind}: give a StepSaliency of one trace, or a dict .*"wrong"'
    ):
        Explorer(container(maps))
    with pytest.raises(ValueError, match=f"attention is a {kind}"):
        Explorer(maps[0], attention=container(maps[:1]))


def test_what_is_no_map() -> None:
    with pytest.raises(ValueError, match="saliency is a NoneType"):
        Explorer(None)
    with pytest.raises(ValueError, match=r"saliency\['a'\] is a Tensor, not a StepSaliency: stepsal.step_saliency"):
        Explorer({"a": saliency().values})
    with pytest.raises(ValueError, match=r"attention\['a'\] is a list"):
        Explorer({"a": saliency()}, attention={"a": [saliency()]})


def test_what_is_shown(explorer: Explorer) -> None:
    scene, wrong, correct = explorer.scene, *(explorer.scene.maps[x] for x in ("wrong", "correct"))
    state = explorer.state | {"layer": 3, "metric": "saliency"}
    torch.testing.assert_close(scene.shown("wrong", state), wrong.layer(3))
    torch.testing.assert_close(scene.shown("wrong", state | {"band": "deep"}), wrong.mean_over("deep"))
    share = scene.shown("wrong", state | {"metric": "share"})
    torch.testing.assert_close(share.sum(-1), torch.ones(5))
    difference = scene.shown("wrong", state | {"metric": "difference", "compare": "correct"})
    other = correct.layer(3) / correct.layer(3).sum(-1, keepdim=True)
    torch.testing.assert_close(difference, share - other)


def test_numbers_go_to_the_browser_once_and_packed(explorer: Explorer) -> None:
    buffers = explorer.view.buffers
    assert set(buffers) == {"0/saliency", "1/saliency", "2/saliency", "0/tokens"}
    packed = np.frombuffer(buffers["1/saliency"], dtype="<f4").reshape(8, 15)
    rows, columns = np.tril_indices(5)
    np.testing.assert_array_equal(packed, explorer.scene.maps["correct"].values.numpy()[:, rows, columns])
    explorer.state = EVERYTHING
    assert explorer.view.buffers is buffers


def test_figures_of_every_view(explorer: Explorer) -> None:
    for choice in ({}, {"compare": "long"}, {"view": "arcs", "top_k": 2}, {"scale": "linear", "band": "deep"},
                   {"metric": "difference", "compare": "correct"}, {"metric": "share"}):  # fmt: skip
        explorer.state = explorer.scene.first_state() | choice
        state, scene = explorer.state, explorer.scene
        fig = explorer.figure()
        axes = [ax for ax in fig.axes if ax.get_title(loc="left")]
        labels = ["wrong", "long"] if choice.get("compare") == "long" else ["wrong"]
        assert [ax.get_title(loc="left").replace("\n", " ") for ax in axes] == [scene.title(x, state) for x in labels]
        for ax, label in zip(axes, labels, strict=True):
            if state["view"] == "map":
                image = ax.collections[0]  # the mesh of cells
                assert (image.norm.vmin, image.norm.vmax) == pytest.approx(scene.color_range(label, state))
                np.testing.assert_allclose(
                    np.tril(image.get_array().filled(0)), np.maximum(scene.shown(label, state), image.norm.vmin).tril(),
                    rtol=1e-6,
                )  # fmt: skip
        fig.canvas.draw()
        plt.close(fig)


def test_a_picture_and_a_sentence_stand_beside_the_widget(explorer: Explorer) -> None:
    before = plt.get_fignums()
    bundle = explorer._repr_mimebundle_()
    assert plt.get_fignums() == before  # or the picture would be shown a second time
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.model_id
    assert bundle["text/plain"] == "A picture of the explorer: run the cell to explore.\nwrong, correct, long"
    image = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert image.width > 300
    assert np.asarray(image.convert("L")).std() > 20  # something is on it
    explorer.state = {"view": "arcs", "top_k": 0}
    assert explorer._repr_mimebundle_()["image/png"] != bundle["image/png"]


def test_colours_follow_the_rule_of_the_figures(explorer: Explorer) -> None:
    scene = explorer.scene
    values = scene.maps["wrong"].values.clone()
    values[:, 0, 0] = 1e3  # the corner
    state = scene.first_state()
    shares = values / values.sum(-1, keepdim=True)
    norm = plots.shared_norm([shares[:, 1:].numpy()], quantile_floor=0.3)
    assert scene.color_range("wrong", state) == pytest.approx((norm.vmin, norm.vmax))
    alone = plots.shared_norm([shares[0, 1:].numpy()], quantile_floor=0.3)
    assert scene.color_range("wrong", state | {"shared": False}) == pytest.approx((alone.vmin, alone.vmax))
    whole = saliency(values=values)
    assert Explorer(whole).scene.color_range("made up", {**state, "trace": "made up", "metric": "saliency"})[1] <= 1


def test_arcs_below_the_threshold_belong_to_the_own_step(explorer: Explorer) -> None:
    scene, state = explorer.scene, explorer.state | {"top_k": 2, "threshold": 25}
    shares, arcs = scene.shown("wrong", state), scene.arcs("wrong", state)
    torch.testing.assert_close(arcs.sum(-1), shares.sum(-1))
    off = torch.ones(5, 5).tril(-1).bool()
    assert 0 < int((arcs[off] > 0).sum()) < int(off.sum())
    torch.testing.assert_close(arcs[off], torch.where(shares[off] >= 0.25, shares[off], 0))
    assert not scene.arcs("wrong", state | {"top_k": 0})[off].any()


def test_the_page_is_whole_and_texts_stay_texts(tmp_path: Path) -> None:
    path = Explorer(saliency(4, texts=NASTY)).to_html(tmp_path / "maps.html")
    text = path.read_text()
    (stored,) = re.findall(r'<script type="application/json" id="state">(.*?)</script>', text, re.S)
    assert [m["texts"] for m in json.loads(stored)["scene"]["maps"]] == [NASTY]
    assert text.count("</script>") == 2
    assert "unsafe-inline" not in text
    assert "<img" not in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Explorer(saliency()).to_html(tmp_path / "nowhere" / "maps.html")


# ------------------------------------------------------------------------------------------------------ panel


@pytest.fixture
def panel(mini: TransformerBridge) -> StepFlowPanel:
    return StepFlowPanel(mini, chain.sample(3, length=3).question, decoding=stepsal.Decoding(max_new_tokens=60))


def test_the_panel_answers_twice_and_shows_where_the_answers_part(
    mini: TransformerBridge, panel: StepFlowPanel
) -> None:
    panel.tau_max.value, panel.oeb_layers.value, panel.smi.value = 0.9, (0, 7), False
    panel.run()
    assert panel.status.value == "done"
    assert panel.config == stepsal.StepFlowConfig(oeb_layers=tuple(range(8)), smi_layers=(), tau_max=0.9)
    plain, edited = (panel.traces[name] for name in (PLAIN, EDITED))
    assert plain.response == stepsal.generate(mini, panel.question.value, max_new_tokens=60).response
    assert edited.response == stepsal.generate(
        mini, panel.question.value, stepflow=panel.config, max_new_tokens=60
    ).response  # fmt: skip
    position = first_difference(plain, edited)
    assert position is not None
    assert torch.equal(plain.tokens[:position], edited.tokens[:position])
    assert html.unescape(panel.parting.value) == tell_parting(plain, edited) != tell_parting(plain, plain)
    assert panel.explorer.state["compare"] == EDITED
    assert panel.bar.value > 60
    assert not any(point.fwd_hooks for point in mini.hook_dict.values())


def test_the_panel_begins_with_the_settings_that_it_is_given(mini: TransformerBridge) -> None:
    question, heads = chain.sample(3, length=3).question, {2: [0, 3], 5: {1: 0.3}}
    settings = stepsal.StepFlowConfig(oeb_layers=heads, smi_layers=(1, 4), alpha=0.5, window=4)
    panel = StepFlowPanel(mini, question, settings)
    assert panel.config == settings
    assert (panel.oeb.description, panel.oeb_layers.disabled) == ("bridge (OEB) in 3 heads of layers 2,5", True)
    assert (panel.smi.description, panel.smi_layers.disabled) == ("momentum (SMI) in layers 1,4", True)
    panel.oeb.value = False
    assert panel.config == settings.but(oeb_layers=())
    panel = StepFlowPanel(mini, question, stepsal.StepFlowConfig(oeb_layers="middle", smi_layers=()))
    assert panel.config == stepsal.StepFlowConfig(oeb_layers=(2, 3, 4, 5), smi_layers=())
    panel.oeb_layers.value = (3, 4)
    assert panel.config.oeb_layers == (3, 4)
    with pytest.raises(ValueError, match="names head 9"):
        StepFlowPanel(mini, question, stepsal.StepFlowConfig(oeb_layers={2: [9]}))


def test_a_run_can_be_stopped(mini: TransformerBridge, panel: StepFlowPanel) -> None:
    begun = threading.Event()
    handle = mini.original_model.register_forward_hook(lambda *_: begun.set())
    try:
        panel.start()
        assert begun.wait(20)
        panel.stop()
        panel.wait(20)
    finally:
        handle.remove()
    assert panel.status.value == "stopped"
    assert panel.traces == {}
    assert (panel.run_button.disabled, panel.stop_button.disabled) == (False, True)
    assert not mini.original_model._forward_pre_hooks
    panel.run()
    assert panel.status.value == "done"


def test_steps_are_found_as_asked_for_in_both_answers(mini: TransformerBridge) -> None:
    segmentation = stepsal.Segmentation(split="line", min_chars=1)
    panel = StepFlowPanel(
        mini, chain.sample(3, length=3).question, decoding=stepsal.Decoding(max_new_tokens=60, temperature=0.8), seed=7,
        segmentation=segmentation,
    )  # fmt: skip
    panel.run()
    expected = stepsal.generate(
        mini, panel.question.value, max_new_tokens=60, temperature=0.8, seed=7, segmentation=segmentation
    )
    assert torch.equal(panel.traces[PLAIN].tokens, expected.tokens)
    assert panel.saliency[PLAIN].step_texts == tuple(map(expected.step_text, range(len(expected.steps))))
    for answer in panel.traces.values():
        assert answer.segmentation == stepsal.Segmentation("think", "line", 1)


def test_errors_are_told(panel: StepFlowPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    panel.question.value = " "
    with pytest.raises(ValueError, match="question"):
        panel.run()
    panel.start()
    panel.wait(20)
    assert panel.status.value.startswith("error: question=&#x27; &#x27; is empty")
    assert not panel.run_button.disabled
    monkeypatch.setattr("stepsal.widgets.panel.generate", lambda *_, **__: 1 / 0)
    panel.start()
    panel.wait(20)
    assert panel.status.value == "error: division by zero"


def test_a_run_is_alone_and_leaves_the_passes_of_others(mini: TransformerBridge, panel: StepFlowPanel) -> None:
    other, inside = StepFlowPanel(mini, panel.question.value), threading.Event()
    ids, resume = torch.tensor([[1, 2, 3]]), threading.Event()

    def hold(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread() and not inside.is_set():
            inside.set()
            resume.wait(20)

    handle = mini.original_model.register_forward_hook(hold)
    try:
        panel.start()
        assert inside.wait(20)
        panel.stop()
        passes = panel.bar.value
        mini(ids)  # ours is neither stopped nor counted
        assert panel.bar.value == passes
        with pytest.raises(RuntimeError, match="a panel is running already"):
            other.run()
    finally:
        resume.set()
        panel.wait(20)
        handle.remove()
    assert panel.status.value == "stopped"


def test_runs_leave_no_widgets_behind(panel: StepFlowPanel) -> None:
    panel.run()
    counts = []
    for _ in range(2):
        panel.run()
        counts.append(len(ipywidgets.Widget.widgets))
    assert counts[0] == counts[1]


def test_answers_are_shown_as_they_are(panel: StepFlowPanel) -> None:
    _say(panel.parting, "It costs $5 and then $7 <b>in all</b>")
    assert panel.parting.value == "It costs $5 and then $7 &lt;b&gt;in all&lt;/b&gt;"
