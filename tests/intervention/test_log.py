"""The account of what was done, as a whole and of one sequence."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from forward_passes import logits_of
from strong_flow import STRONG, THINK
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import StepFlowConfig
from stepsal.tasks import chain
from stepsal.trace import Trace


def test_a_layer_without_rows_has_no_means(tiny_with_text: TransformerBridge) -> None:
    trace = Trace.from_text("How many?", "</think>Two", tiny_with_text, segmentation=THINK)
    with stepsal.stepflow(tiny_with_text, STRONG, segmentation=THINK) as log:
        logits_of(tiny_with_text, trace.tokens[None])
    assert (log.oeb["rows"] == 0).all()
    assert log.oeb[["fired_share", "bridge_before", "bridge_after"]].isna().all(axis=None)


class TestLogOfOneSequence:
    def test_a_row_of_a_batch_has_the_log_that_it_has_alone(self, mini: TransformerBridge) -> None:
        questions = [chain.sample(seed, length=length).question for seed, length in ((1, 1), (2, 3), (3, 2))]
        config = StepFlowConfig(tau_max=0.3, alpha=0.2)
        with stepsal.stepflow(mini, config) as log:
            stepsal.generate_batch(mini, questions)
        assert log.sequences == 3
        alone = []
        for question in questions:
            with stepsal.stepflow(mini, config) as one:
                stepsal.generate(mini, question)
            alone.append(one)
        for i, one in enumerate(alone):
            mine = log.of(i)
            pd.testing.assert_frame_equal(mine.oeb, one.oeb, rtol=1e-4)
            pd.testing.assert_frame_equal(mine.smi, one.smi, rtol=1e-4)
            assert [*mine.summary().values()][2:] == pytest.approx([*one.summary().values()][2:], rel=1e-4)
        assert log.oeb["fired"].sum() == sum(one.oeb["fired"].sum() for one in alone)
        assert log.summary()["injections"] == sum(one.summary()["injections"] for one in alone) > 0
        json.dumps(log.summary())

    def test_a_sequence_that_is_not_there(self, mini: TransformerBridge) -> None:
        with stepsal.stepflow(mini) as log, pytest.raises(IndexError, match="the log has 0"):
            log.of(0)
