"""Token maps of all tokens and of those of some steps, from both engines, and where they are shown."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import StepFlowConfig, StepSaliency, Trace, plots
from stepsal.saliency.blocks import row_blocks
from stepsal.saliency.window import TokenWindow
from stepsal.tasks import chain
from stepsal.widgets import Explorer

STRONG = StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.6, alpha=0.9)


@pytest.fixture(scope="module")
def trace(mini: TransformerBridge) -> Trace:
    problem = chain.sample(5, length=4)
    return Trace.from_text(problem.question, problem.solution(), mini)


@given(st.sets(st.integers(0, 29), min_size=1), st.integers(1, 12), st.none() | st.integers(1, 12))
def test_a_window_is_what_it_is_of_the_whole(kept: set[int], n_rows: int, sliding: int | None) -> None:
    whole = torch.rand(30, 30).tril()
    if sliding is not None:
        whole = whole.triu(1 - sliding)
    window = TokenWindow(positions := torch.tensor(sorted(kept)), whole)
    for block in row_blocks(30, n_rows, sliding):
        for part in (0.25, 0.75):  # as of two groups of heads
            window.add(part * whole[block.first : block.stop, block.first_key : block.stop], block)
    torch.testing.assert_close(window.values, whole[positions][:, positions])


@pytest.mark.parametrize("stepflow", [None, STRONG], ids=["plain", "StepFlow"])
@pytest.mark.parametrize("target", ["token", "logit", "sequence", "attention"])
def test_both_engines(mini: TransformerBridge, trace: Trace, target: str, stepflow: StepFlowConfig | None) -> None:
    def maps(engine: str, keep_tokens: bool | list[int]) -> StepSaliency:
        options: dict = {"engine": engine, "keep_tokens": keep_tokens, "stepflow": stepflow}
        if target == "attention":
            return stepsal.step_attention(mini, trace, **options)
        return stepsal.step_saliency(mini, trace, target=target, **options)

    whole = maps("pattern", True)
    assert whole.token_positions is None
    scale = float(whole.token_values.norm())
    assert float((maps("streamed", True).token_values - whole.token_values).norm()) <= 1e-4 * scale
    steps = [2, -1, 0]
    of_steps = torch.isin(trace.step_ids, torch.tensor([0, 2, whole.n_steps - 1])).nonzero()[:, 0]
    expected = whole.token_values[:, of_steps][:, :, of_steps]
    for engine in ("pattern", "streamed"):
        some = maps(engine, steps)
        assert torch.equal(some.token_positions, of_steps)
        assert float((some.token_values - expected).norm()) <= 1e-4 * scale
        torch.testing.assert_close(some.values, whole.values, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def some(mini: TransformerBridge, trace: Trace) -> StepSaliency:
    return stepsal.step_saliency(mini, trace, engine="streamed", keep_tokens=[1, 3])


def test_they_are_saved(some: StepSaliency, tmp_path: Path) -> None:
    again = StepSaliency.load(some.save(tmp_path / "some"))
    assert torch.equal(again.token_positions, some.token_positions)
    assert torch.equal(again.token_values, some.token_values)


def test_rows_are_normalised_by_what_is_kept(some: StepSaliency) -> None:
    sums = some.row_normalised().token_values.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_the_plot_names_positions(some: StepSaliency) -> None:
    _, ax = plt.subplots()
    plots.token_map(some, 0, ax=ax)
    ax.figure.draw_without_rendering()
    written = [label.get_text() for label in ax.get_xticklabels()]
    first = int(some.token_positions[0])
    assert first > 0
    assert written[0] == str(first)
    assert set(written) <= {str(position) for position in some.token_positions.tolist()}
    plt.close()


def test_the_explorer_opens_cells_of_steps_that_were_kept(some: StepSaliency) -> None:
    explorer = Explorer({"mini": some})
    explorer.state = {"zoom": {"trace": "mini", "query": 3, "key": 1}}
    with pytest.raises(ValueError, match=r"tokens of step 2 of 'mini' were not kept: .*keep_tokens=\[\.\., 2\]"):
        explorer.state = {"zoom": {"trace": "mini", "query": 2, "key": 1}}
    (described,) = explorer.view.scene["maps"]
    assert described["token_texts"] == [some.token_texts[i] for i in some.token_positions.tolist()]
    lengths = [stop - start for start, stop in described["token_spans"]]
    assert lengths == [some.step_lengths[i] if i in (1, 3) else 0 for i in range(some.n_steps)]


@pytest.mark.parametrize(
    ("positions", "message"), [([3, 1], "must ascend"), ([1, 1], "must ascend"), ([0, 999], r"in 0\.\.")]
)
def test_positions_that_do_not_fit(some: StepSaliency, positions: list[int], message: str) -> None:
    labels = {name: getattr(some, name) for name in some.__dataclass_fields__}
    values = torch.zeros(len(some.layers), len(positions), len(positions))
    with pytest.raises(ValueError, match=message):
        StepSaliency(**labels | {"token_values": values, "token_positions": torch.tensor(positions)})


def test_a_step_that_is_not_there(mini: TransformerBridge, trace: Trace) -> None:
    with pytest.raises(ValueError, match=r"keep_tokens names step 40, but the trace has \d+ steps"):
        stepsal.step_saliency(mini, trace, keep_tokens=[0, 40])
