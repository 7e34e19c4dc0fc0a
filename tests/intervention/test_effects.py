"""What an intervention does to the next token, against decoding itself."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.intervention.effects import token_effects
from stepsal.tasks import chain

ONLY_SMI = stepsal.StepFlowConfig(oeb_layers=(), alpha=0.5)


@pytest.fixture(scope="module")
def traces(mini: TransformerBridge) -> list[stepsal.Trace]:
    questions = [chain.sample(seed, length=6, distractors=10).question for seed in range(12)]
    return stepsal.generate_batch(mini, questions, max_new_tokens=220)


@pytest.mark.slow
def test_the_first_switched_token_is_where_greedy_answers_part(
    mini: TransformerBridge, traces: list[stepsal.Trace]
) -> None:
    config = stepsal.StepFlowConfig()
    edited = stepsal.generate_batch(mini, [t.question for t in traces], stepflow=config, max_new_tokens=220)
    n_parted = 0
    for plain, other in zip(traces, edited, strict=True):
        effects = token_effects(mini, plain, config)
        switched = effects.loc[effects["switched"], "position"].tolist()
        same = int((plain.tokens[: len(other)] == other.tokens[: len(plain)]).long().cumprod(0).sum())
        if same == len(plain) == len(other):
            assert not switched
        else:
            assert switched[0] == same
            n_parted += 1
    assert 0 < n_parted < len(traces)


def test_columns(mini: TransformerBridge, traces: list[stepsal.Trace]) -> None:
    trace = traces[0]
    effects = token_effects(mini, trace, stepsal.StepFlowConfig())
    assert effects["position"].tolist() == list(range(trace.n_prompt, len(trace)))
    for i, step in enumerate(trace.steps):
        rows = effects[effects["step"] == i]
        assert rows["in_step"].tolist() == (list(range(step.end - step.start)) if i else [])
        assert set(rows["role"]) <= {step.role}
    assert set(effects.loc[effects["step"] < 0, "in_step"]) <= {-1}
    assert (effects["entropy"] >= 0).all()
    assert (effects["kl"] > -1e-12).all()
    assert effects["kl"].max() > 1e-4
    logits = mini(trace.tokens[None])[0, trace.n_prompt - 1 : -1].detach()
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    np.testing.assert_allclose(effects["entropy"], entropy, atol=1e-5)


def test_momentum_does_not_reach_the_first_token_of_its_step(
    mini: TransformerBridge, traces: list[stepsal.Trace]
) -> None:
    last_layer = stepsal.StepFlowConfig(oeb_layers=(), smi_layers=(mini.cfg.n_layers - 1,), alpha=1.0)
    effects = token_effects(mini, traces[0], last_layer)  # no layer above: nothing is carried on to later tokens
    reached = effects["kl"] > 1e-12
    later_steps = effects["role"].eq("thinking") & effects["step"].gt(1)
    assert reached[later_steps & effects["in_step"].eq(1)].all()
    assert not reached[~(later_steps & effects["in_step"].eq(1))].any()


def test_no_edit_has_no_effect_and_nothing_is_left_behind(mini: TransformerBridge, traces: list[stepsal.Trace]) -> None:
    nothing = token_effects(mini, traces[0], stepsal.StepFlowConfig(oeb_layers=(), alpha=0.0))
    assert nothing["kl"].abs().max() < 1e-9
    assert not nothing["switched"].any()
    with stepsal.stepflow(mini), pytest.raises(ValueError, match="context is open"):
        token_effects(mini, traces[0], ONLY_SMI)
    assert not any(point.fwd_hooks for point in mini.hook_dict.values())


def test_several_settings_at_once_are_the_same_as_one_by_one(mini: TransformerBridge) -> None:
    trace = stepsal.generate(mini, chain.sample(1, length=3).question, max_new_tokens=100)
    configs = {"paper": stepsal.StepFlowConfig(), "strong": stepsal.StepFlowConfig(tau_max=0.5, alpha=1.0)}
    both = stepsal.token_effects(mini, trace, configs)
    assert list(both["variant"].unique()) == list(configs)
    for name, config in configs.items():
        one = both[both["variant"] == name].drop(columns="variant").reset_index(drop=True)
        pd.testing.assert_frame_equal(one, stepsal.token_effects(mini, trace, config))
    assert both.groupby("variant")["kl"].mean().is_monotonic_increasing


def test_steps_are_those_of_the_trace(mini: TransformerBridge) -> None:
    """StepFlow follows the trace's own segmentation: momentum comes where its steps begin, and nowhere else."""
    problem, lines = chain.sample(1, length=3), stepsal.Segmentation(split="paragraph", min_chars=0)
    config = stepsal.StepFlowConfig(oeb_layers=(), smi_layers=(mini.cfg.n_layers - 1,), alpha=1.0)
    response = problem.solution()
    by_sentence = stepsal.Trace.from_text(problem.question, response, mini)
    by_paragraph = stepsal.Trace.from_text(problem.question, response, mini, segmentation=lines)
    assert len(by_paragraph.steps) < len(by_sentence.steps)
    for trace in (by_sentence, by_paragraph):
        reached = stepsal.token_effects(mini, trace, config).query("kl > 1e-12")
        starts = [step.start for step in trace.steps[2:] if step.role == "thinking"]
        assert reached["position"].tolist() == [start + 1 for start in starts]


def test_no_settings(mini: TransformerBridge, traces: list[stepsal.Trace]) -> None:
    with pytest.raises(ValueError, match="holds no settings"):
        token_effects(mini, traces[0], {})
