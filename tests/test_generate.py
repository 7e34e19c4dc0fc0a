"""Generation: exact tokens, batches equal singles, seeds, limits."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.tasks import chain

PROBLEMS = [chain.sample(seed, length=length) for seed, length in ((1, 1), (2, 3), (3, 2))]


def test_the_embedded_reasoner_reasons(mini: TransformerBridge) -> None:
    trace = stepsal.generate(mini, PROBLEMS[0].question)
    assert trace.question == PROBLEMS[0].question
    assert trace.format == "think"
    assert trace.roles == ("question", "thinking", "thinking", "summary")
    assert PROBLEMS[0].grade(trace).correct
    assert trace.tokens[-1] == mini.tokenizer.eos_token_id
    assert trace.step_ids[-1] == -1


def test_the_trace_holds_what_greedy_decoding_gives(mini: TransformerBridge) -> None:
    trace = stepsal.generate(mini, PROBLEMS[2].question)
    with torch.no_grad():
        predicted = mini(trace.tokens[None]).argmax(-1)[0]
    assert torch.equal(predicted[trace.n_prompt - 1 : -1], trace.tokens[trace.n_prompt :])


def test_rows_of_a_left_padded_batch_equal_the_same_rows_alone(mini: TransformerBridge) -> None:
    questions = [p.question for p in PROBLEMS]
    batch = stepsal.generate_batch(mini, questions, max_new_tokens=200)
    for question, trace in zip(questions, batch, strict=True):
        assert torch.equal(trace.tokens, stepsal.generate(mini, question, max_new_tokens=200).tokens)


def test_sampling_follows_the_seed_and_leaves_the_global_state(mini: TransformerBridge) -> None:
    options = {"temperature": 2.0, "max_new_tokens": 60}
    before = torch.get_rng_state()
    first, second, other = (stepsal.generate(mini, PROBLEMS[1].question, seed=s, **options) for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.response == second.response != other.response


def test_a_cut_off_answer_has_no_summary(mini: TransformerBridge) -> None:
    trace = stepsal.generate(mini, PROBLEMS[1].question, max_new_tokens=10)
    assert len(trace.tokens) == trace.n_prompt + 10
    assert trace.summary is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"max_new_tokens": 2000}, r"prompt of \d+ tokens and max_new_tokens=2000 exceed the context of 1024"),
        ({"format": "harmony"}, "marker not found"),
    ],
)
def test_errors(mini: TransformerBridge, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stepsal.generate(mini, PROBLEMS[0].question, **options)


def test_no_question(mini: TransformerBridge) -> None:
    with pytest.raises(ValueError, match="questions is empty"):
        stepsal.generate_batch(mini, [])
