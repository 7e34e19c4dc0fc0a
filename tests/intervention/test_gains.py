"""Gains of edits: against finite differences of a small edit, by head, step and text; and as a labelled value."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from bridged_by_masks import bridged_by_masks
from strong_flow import RESPONSE, THINK
from tiny_models import ARCHITECTURES, tiny_chat
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import Continuation, StepFlowConfig, Trace
from stepsal.bridge.attention import sliding_window
from stepsal.bridge.hooks import attention_hooks
from stepsal.intervention import EditGains
from stepsal.intervention.oeb import bridge_share
from stepsal.tasks import chain

QUESTION, TAU = "How many of them are there?", 0.4
SMALL = 2e-2  # the smallest that shows in float32
TEXTS = (
    Continuation(QUESTION, RESPONSE[:60], " the sum of it.", " a number."),
    Continuation("And how many now?", RESPONSE, " That is it."),
)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "Falcon", "Olmo3"])
def model(request: pytest.FixtureRequest) -> TransformerBridge:
    return tiny_chat(request.param)


def sections(trace: Trace) -> list[str | None]:
    return [None if i < 0 else trace.roles[i] for i in trace.step_ids.tolist()]


def groups(trace: Trace, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return B and S of each row, [query_pos, key_pos], and the share of B, from the roles of the trace's own steps."""
    role, bridge_of = sections(trace), {"thinking": "question", "summary": "thinking"}
    n = len(role)
    bridge, segment = torch.zeros(n, n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.bool)
    for t in range(n):
        for k in range(max(0, t - (window or n) + 1), t + 1):
            if role[t] in bridge_of:
                bridge[t, k], segment[t, k] = role[k] == bridge_of[role[t]], role[k] == role[t]
    return bridge, segment, bridge_share(bridge.sum(1), segment.sum(1))


def bridged_a_little(model: TransformerBridge, trace: Trace, layer: int, head: int, size: float) -> tuple[str, object]:
    """Return a hook that moves the pattern of a head towards the bridged one by a part of the way."""
    bridge, segment, share = groups(trace, sliding_window(model, layer))

    def hook(pattern: Tensor, hook: object) -> Tensor:
        edited = bridged_by_masks(pattern, bridge[None], segment[None], share.clamp(max=TAU).view(1, 1, -1))
        moved = pattern.clone()
        moved[:, head] += size * (edited - pattern)[:, head]
        return moved

    return attention_hooks(model, layer)["pattern"], hook


def pushed_a_little(model: TransformerBridge, trace: Trace, layer: int, head: int, size: float) -> list:
    """Return hooks that add a little of the previous step's mean value where a step of the thinking begins."""
    thinking = [i for i, role in enumerate(trace.roles) if role == "thinking"]
    values: list[Tensor] = []

    def push(z: Tensor, hook: object) -> Tensor:
        z, v = z.clone(), values.pop()
        for before, after in pairwise(thinking):
            of_head = v[0, trace.step_ids == before, head // (z.shape[2] // v.shape[2])]
            z[0, trace.steps[after].start, head] += size * of_head.mean(0)
        return z

    names = attention_hooks(model, layer)
    return [(names["v"], lambda v, hook: values.append(v)), (names["z"], push)]


def log_prob(model: TransformerBridge, trace: Trace, n_new: int, hooks: list = ()) -> float:
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        logits = model(trace.tokens[None], attention_mask=torch.ones_like(trace.tokens)[None])[0].double()
    log_p = logits.log_softmax(-1)[:-1].gather(1, trace.tokens[1:, None])[:, 0]
    return float(log_p[-n_new:].sum())


def slope(model: TransformerBridge, trace: Trace, n_new: int, edit: str, layer: int, head: int) -> float:
    """Return the derivative of the log-probability by the size of an edit, by differences to both sides of none."""

    def value(size: float) -> float:
        if edit == "bridge":
            return log_prob(model, trace, n_new, [bridged_a_little(model, trace, layer, head, size)])
        return log_prob(model, trace, n_new, pushed_a_little(model, trace, layer, head, size))

    return (value(SMALL) - value(-SMALL)) / (2 * SMALL)


def test_gains_are_the_slopes_of_a_small_edit(model: TransformerBridge) -> None:
    gains = stepsal.edit_gains(model, TEXTS, taus=(0.1, TAU), segmentation=THINK, progress=False)
    for text, continuation in enumerate(TEXTS):
        trace, n_new = continuation.trace(model, segmentation=THINK)
        assert float(gains.objective[text]) == pytest.approx(log_prob(model, trace, n_new), rel=1e-6)
        for edit, tau in (("bridge", TAU), ("momentum", None)):
            table = gains.of_texts(edit, tau)[text]
            assert np.abs(table).max() > 1e-3  # there is something to see
            largest = np.argsort(-np.abs(table), axis=None)[:4]
            for layer, head in (divmod(int(i), table.shape[1]) for i in [*largest, 0, table.size - 1]):
                expected = slope(model, trace, n_new, edit, layer, head)
                assert table[layer, head] == pytest.approx(expected, rel=5e-3, abs=2e-3), (edit, layer, head)


def test_a_contrast_is_right_minus_wrong(model: TransformerBridge) -> None:
    right, wrong = (Continuation(QUESTION, TEXTS[0].before, end) for end in (TEXTS[0].right, TEXTS[0].wrong))
    contrast, *parts = (
        stepsal.edit_gains(model, [text], objective, segmentation=THINK, progress=False)
        for text, objective in ((TEXTS[0], "contrast"), (right, "right"), (wrong, "right"))
    )
    for edit in ("bridge", "momentum"):
        np.testing.assert_allclose(
            contrast.of_texts(edit), parts[0].of_texts(edit) - parts[1].of_texts(edit), atol=1e-4
        )
    np.testing.assert_allclose(contrast.objective, parts[0].objective - parts[1].objective, atol=1e-4)


def test_texts_are_what_they_are_alone(mini: TransformerBridge) -> None:
    problems = [chain.sample(40 + i, length=i + 1) for i in range(4)]
    traces = [Trace.from_text(p.question, p.solution(), mini) for p in problems]
    together = stepsal.edit_gains(mini, traces, "answer", batch_size=3, progress=False)
    for i, trace in enumerate(traces):
        alone = stepsal.edit_gains(mini, [trace], "answer", progress=False)
        for edit in ("bridge", "momentum"):
            of_text = together.of_texts(edit)[i]
            np.testing.assert_allclose(of_text, alone.of_texts(edit)[0], rtol=1e-2, atol=1e-4 * np.abs(of_text).max())
        n = len(trace.steps)
        assert not together.bridge[i, n:].values.any()
        np.testing.assert_allclose(together.bridge[i, :n], alone.bridge[0], rtol=1e-2, atol=1e-6)


def test_rows_before_a_step_gain_nothing_of_it(mini: TransformerBridge) -> None:
    problem = chain.sample(41, length=3)
    gains = stepsal.edit_gains(
        mini, [Trace.from_text(problem.question, problem.solution(), mini)], "answer", progress=False
    )
    by_step = gains.to_dataframe(by_step=True)
    of_question = by_step[by_step["role"] == "question"]["gain"]
    assert len(of_question) > 0
    assert not of_question.any()  # it has no bridge
    momentum = gains.to_dataframe("momentum", by_step=True).groupby("step")["gain"].apply(lambda g: g.abs().sum())
    assert momentum[0] == momentum[1] == 0  # no step is before the first one
    assert (momentum[2 : len(gains.roles[0]) - 2] > 0).all()


def test_errors_are_the_tokens_that_the_model_would_not_choose(mini: TransformerBridge) -> None:
    problem = chain.sample(41, length=2)
    right, wrong = (
        Trace.from_text(problem.question, text, mini)
        for text in (problem.solution(), problem.solution().replace(problem.reference, "29"))
    )
    gains = {o: stepsal.edit_gains(mini, [right, wrong], o, progress=False) for o in ("answer", "errors")}
    assert float(gains["errors"].objective[0]) == 0
    assert not gains["errors"].of_texts()[0].any()
    assert float(gains["errors"].objective[1]) < -1
    assert float(gains["errors"].objective[1]) == pytest.approx(float(gains["answer"].objective[1]), abs=0.5)


def test_the_model_is_as_before(mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace.from_text(chain.EXAMPLE, " Hugo is 4 plus 3.</think>So it is.", mini)
    grads = [p.requires_grad for p in mini.parameters()]

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepsal.intervention.gains.target_log_probs", fail)
    with pytest.raises(KeyboardInterrupt):
        stepsal.edit_gains(mini, [trace], "answer", progress=False)
    assert stepsal.intervention.active_flow(mini) is None
    assert not any(point.fwd_hooks for point in mini.hook_dict.values())
    assert [p.requires_grad for p in mini.parameters()] == grads


def table_of(gains: np.ndarray) -> EditGains:
    """Return gains of the bridge at one strength, [text, layer, head], as labelled ones."""
    n = len(gains)
    return EditGains.of(
        gains[:, None, None], 0 * gains[:, None], np.zeros(n), [0.15], roles=[("question",)] * n, about=[{}] * n,
        metadata={},
    )  # fmt: skip


class TestTheValue:
    """The labelled gains: tables, the best heads, files."""

    GAINS = EditGains.of(
        np.array([[[[[1.0, -2.0], [3.0, 0.5]]]], [[[[2.0, -2.0], [1.0, 0.0]]]]]), np.zeros((2, 1, 2, 2)), np.zeros(2),
        [0.3], roles=[("question",)] * 2, about=[{"k": 1}, {"k": 2}], metadata={"model_name": "mine"},
    )  # fmt: skip

    def test_the_best_heads_are_those_of_a_config(self) -> None:
        assert self.GAINS.top(2) == {0: [0], 1: [0]}
        assert self.GAINS.top(9) == {0: [0], 1: [0, 1]}  # one head loses
        assert StepFlowConfig(oeb_layers=self.GAINS.top(9)).resolve(2)[0] == (0, 1)

    def test_the_summary_has_the_error_over_texts(self) -> None:
        first = self.GAINS.summary().iloc[0]
        assert (first["layer"], first["head"], first["gain"]) == (1, 0, 2.0)
        assert first["stderr"] == pytest.approx(1.0)  # of 3 and 1
        assert first["t"] == pytest.approx(2.0)

    def test_a_gain_on_one_text_alone_does_not_come_first(self) -> None:
        of_texts = np.full((20, 2, 3), 0.1) + 0.01 * np.random.default_rng(0).standard_normal((20, 2, 3))
        of_texts[0, 1, 2] += 10
        gains = table_of(of_texts)
        assert gains.summary().sort_values("gain").iloc[-1]["head"] == 2  # the largest mean
        assert gains.top(5) == {0: [0, 1, 2], 1: [0, 1]}

    def test_few_texts_buy_few_heads(self) -> None:
        rng = np.random.default_rng(0)
        true = np.zeros((10, 10))
        true[0] = 0.3
        numbers = []
        for n in (3, 10, 40, 160):
            found = [table_of(true + rng.standard_normal((n, 10, 10))).sure_heads() for _ in range(20)]
            numbers.append(sum(len(heads.get(0, [])) for heads in found) / 20)
        assert numbers == sorted(numbers)
        assert numbers[0] < 0.5
        assert numbers[-1] > 8

    def test_it_is_read_as_it_was_saved(self, tmp_path: Path) -> None:
        again = EditGains.load(self.GAINS.save(tmp_path / "gains"))
        for name in ("bridge", "momentum", "objective"):
            assert getattr(again, name).equals(getattr(self.GAINS, name))
        assert (again.roles, again.about, again.metadata) == (
            self.GAINS.roles, self.GAINS.about, self.GAINS.metadata
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda g: g.of_texts("bridge", 0.1), r"no gains at tau_max=0.1, only at \[0.3\]"),
            (lambda g: g.top(0), "k=0 must be at least 1"),
        ],
    )
    def test_what_is_not_there(self, call: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call(self.GAINS)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there are no texts"),
        ([TEXTS[0]], {"objective": "answer"}, "'answer' is one of Traces, but text 0 is a Continuation"),
        ([TEXTS[1]], {"objective": "contrast"}, "has no wrong one"),
        ([TEXTS[0]], {"objective": "all"}, "objective='all' is unknown"),
        ([TEXTS[0]], {"taus": ()}, "taus is empty"),
        ([TEXTS[0]], {"taus": (1.5,)}, "tau_max=1.5"),
        ([TEXTS[0]], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_errors(mini: TransformerBridge, texts: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stepsal.edit_gains(mini, texts, progress=False, **options)


@pytest.mark.parametrize(("right", "wrong", "message"), [("", None, "right is empty"), ("a", "a", "are both 'a'")])
def test_continuations_that_are_none(right: str, wrong: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Continuation("Why?", "", right, wrong)
