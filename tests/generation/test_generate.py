"""Generation: exact tokens, batches equal singles, seeds, limits."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.generation.answers import _choose, write
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
    assert trace.truncated
    assert not stepsal.generate(mini, PROBLEMS[0].question).truncated


def test_the_end_of_the_context_ends_a_row(mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [p.question for p in PROBLEMS]
    whole = stepsal.generate_batch(mini, questions, max_new_tokens=200)
    n_ctx = whole[1].n_prompt + 30  # of the longest
    monkeypatch.setattr(mini.cfg, "n_ctx", n_ctx)
    batch = stepsal.generate_batch(mini, questions, max_new_tokens=200)
    for trace, complete in zip(batch, whole, strict=True):
        assert len(trace) <= n_ctx
        assert torch.equal(trace.tokens, complete.tokens[: len(trace)])
        assert trace.truncated == (len(complete) > n_ctx)
    assert batch[1].truncated
    monkeypatch.setattr(mini.cfg, "n_ctx", whole[1].n_prompt)
    with pytest.raises(
        ValueError, match=r"a prompt of \d+ tokens leaves no room in the context of \d+ tokens of 'mini'"
    ):
        stepsal.generate_batch(mini, questions)


def test_a_rows_sample_depends_on_its_own_seed_only(mini: TransformerBridge) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 60}
    questions = [p.question for p in PROBLEMS]
    batch = stepsal.generate_batch(mini, questions, seed=5, **options)
    for row, (question, trace) in enumerate(zip(questions, batch, strict=True)):
        assert torch.equal(stepsal.generate(mini, question, seed=5 + row, **options).tokens, trace.tokens)
    turned = stepsal.generate_batch(mini, questions[::-1], seed=[7, 6, 5], **options)
    for a, b in zip(batch, turned[::-1], strict=True):
        assert torch.equal(a.tokens, b.tokens)
    same_question = stepsal.generate_batch(mini, questions[1:2] * 4, seed=0, **(options | {"temperature": 3.0}))
    assert len({trace.response for trace in same_question}) > 1


@pytest.mark.parametrize("as_list", [False, True])
def test_all_end_tokens_end_a_row(monkeypatch: pytest.MonkeyPatch, mini: TransformerBridge, as_list: bool) -> None:
    whole = stepsal.generate(mini, PROBLEMS[1].question)
    stop = int(whole.tokens[whole.n_prompt + 9])
    ends = [stop, mini.tokenizer.eos_token_id] if as_list else stop
    monkeypatch.setattr(mini.original_model.generation_config, "eos_token_id", ends)
    batch = stepsal.generate_batch(mini, [p.question for p in PROBLEMS])
    first = (whole.tokens[whole.n_prompt :] == stop).nonzero()[0, 0]
    assert torch.equal(batch[1].tokens, whole.tokens[: whole.n_prompt + int(first) + 1])
    for trace in batch:
        assert not trace.truncated
        assert not torch.isin(
            trace.tokens[trace.n_prompt : -1], torch.tensor([stop, mini.tokenizer.eos_token_id])
        ).any()


def test_an_answer_of_nothing_does_not_lose_the_batch(mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stepsal.generate(mini, PROBLEMS[1].question)
    first = int(whole.tokens[whole.n_prompt])
    monkeypatch.setattr(mini.original_model.generation_config, "eos_token_id", first)
    monkeypatch.setattr(type(mini.tokenizer), "all_special_tokens", [mini.tokenizer.decode([first]), "<|endoftext|>"])
    batch = stepsal.generate_batch(mini, [p.question for p in PROBLEMS], format="harmony")
    assert [trace.roles for trace in batch] == [("question",)] * 3
    assert batch[1].thinking == ""
    assert PROBLEMS[1].grade(batch[1]).error == "truncated"


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        p = torch.softmax(logits[0] / temperature, 0)
        kept = p * (p.cumsum(0) - p < top_p)
        counts = torch.bincount(_choose(logits, draws, temperature, top_p), minlength=4)
        torch.testing.assert_close(counts / 4000, kept / kept.sum(), atol=0.03, rtol=0)
    assert _choose(logits[:1], draws[:1] * 0 + 1 - 1e-16, 1.0, 0.8).item() <= 1  # never outside the nucleus


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"seed": [1, 2]}, "2 seeds for 1 questions"),
        ({"format": "harmonies"}, "format='harmonies' is unknown"),
        ({"split": "sentences"}, "split='sentences' is unknown; use 'sentence'"),
    ],
)
def test_errors(mini: TransformerBridge, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stepsal.generate(mini, PROBLEMS[0].question, **options)


def test_no_question(mini: TransformerBridge) -> None:
    with pytest.raises(ValueError, match=r"questions=\[\] must be a list"):
        stepsal.generate_batch(mini, [])
    with pytest.raises(ValueError, match="must be a list"):
        stepsal.generate_batch(mini, PROBLEMS[0].question)


def test_the_end_of_thinking_can_be_put_off(mini: TransformerBridge) -> None:
    questions = [chain.sample(seed, length=n).question for seed, n in ((1, 2), (2, 1))]
    plain = stepsal.generate_batch(mini, questions, max_new_tokens=80)
    waiting = stepsal.generate_batch(mini, questions, max_new_tokens=80, put_off=2)
    for a, b in zip(plain, waiting, strict=True):
        thinking, _, _ = a.response.partition("</think>")
        assert b.response.startswith(thinking + "Wait")
        assert len(b) > len(a)
    alone = stepsal.generate(mini, questions[0], max_new_tokens=80, put_off=2)
    assert torch.equal(alone.tokens, waiting[0].tokens)


def test_without_a_mark_of_thinking_the_end_of_the_answer_is_put_off(smollm2: TransformerBridge) -> None:
    plain = stepsal.generate(smollm2, "What is 2 + 3?", max_new_tokens=40)
    assert not plain.truncated
    waiting = stepsal.generate(smollm2, "What is 2 + 3?", max_new_tokens=60, put_off=1)
    assert waiting.response.startswith(plain.response.removesuffix("<|im_end|>") + "Wait")


def test_harmony_cannot_be_put_off(mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(mini.tokenizer), "get_vocab", lambda self: {"<|channel|>": 0})
    with pytest.raises(ValueError, match="put_off=1 is not supported for Harmony"):
        stepsal.generate(mini, "What?", put_off=1)


class TestStops:
    def test_a_row_ends_with_the_text_wherever_tokens_cut_it(self, mini: TransformerBridge) -> None:
        whole = stepsal.generate(mini, PROBLEMS[1].question)
        for text in (" so ", "eds", ".", whole.response[25:60]):
            trace = stepsal.generate(mini, PROBLEMS[1].question, stop=["never written", text])
            n = len(trace)
            assert torch.equal(trace.tokens, whole.tokens[:n])
            assert text in trace.response
            assert text not in whole.text[len(whole.text) - len(whole.response) : int(whole.offsets[n - 2, 1])]
            assert not trace.truncated

    def test_rows_stop_by_themselves(self, mini: TransformerBridge) -> None:
        questions = [p.question for p in PROBLEMS]
        batch = stepsal.generate_batch(mini, questions, stop=["</think>"])
        assert all(trace.response.endswith("</think>") for trace in batch)
        for question, trace in zip(questions, batch, strict=True):
            assert torch.equal(trace.tokens, stepsal.generate(mini, question, stop=["</think>"]).tokens)

    def test_what_ended_a_row(self, mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
        prompt = mini.tokenizer(stepsal.trace.render_prompt(mini.tokenizer, PROBLEMS[1].question).text)["input_ids"]

        def ended(limit: int = 400, stop: tuple[str, ...] = ()) -> str:
            return write(mini, [prompt], max_new_tokens=[limit], seeds=[0], stop=stop)[0].ended

        assert (ended(), ended(limit=5), ended(stop=("so",))) == ("end", "limit", "stop")
        monkeypatch.setattr(mini.cfg, "n_ctx", len(prompt) + 7)
        assert ended() == "context"

    @pytest.mark.parametrize("stop", ["</think>", ["a", ""]])
    def test_stops_that_make_no_sense(self, mini: TransformerBridge, stop: object) -> None:
        with pytest.raises(ValueError, match="must be a list of texts"):
            stepsal.generate(mini, PROBLEMS[0].question, stop=stop)
