"""Answers: exact tokens, batches equal singles, seeds, limits, and one segmentation for StepFlow and trace."""

from __future__ import annotations

import pytest
import torch
from tiny_models import char_tokenizer, tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.generation.answers import answer_batch, check_questions
from stepsal.generation.endings import BudgetForcing, thinking_ends
from stepsal.generation.scoring import log_probabilities
from stepsal.intervention import FlowLog
from stepsal.tasks import chain
from stepsal.trace import Format

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
    batch = stepsal.generate_batch(
        mini, [p.question for p in PROBLEMS], segmentation=stepsal.Segmentation(format="harmony")
    )
    assert [trace.roles for trace in batch] == [("question",)] * 3
    assert batch[1].thinking == ""
    assert PROBLEMS[1].grade(batch[1]).error == "truncated"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"seed": [1, 2]}, "2 seeds for 1 questions"),
        ({"budget_forcing": -1}, "budget_forcing=-1"),
    ],
)
def test_errors(mini: TransformerBridge, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stepsal.generate_batch(mini, [PROBLEMS[0].question], **options)


def test_no_question(mini: TransformerBridge) -> None:
    with pytest.raises(ValueError, match=r"questions=\[\] must be a list"):
        stepsal.generate_batch(mini, [])
    with pytest.raises(ValueError, match="must be a list"):
        stepsal.generate_batch(mini, PROBLEMS[0].question)


def test_budget_forcing_puts_off_the_end_of_thinking(mini: TransformerBridge) -> None:
    questions = [chain.sample(seed, length=n).question for seed, n in ((1, 2), (2, 1))]
    plain = stepsal.generate_batch(mini, questions, max_new_tokens=80)
    waiting = stepsal.generate_batch(mini, questions, max_new_tokens=80, budget_forcing=2)
    for a, b in zip(plain, waiting, strict=True):
        thinking, _, _ = a.response.partition("</think>")
        assert b.response.startswith(thinking + "Wait")
        assert len(b) > len(a)
    alone = stepsal.generate(mini, questions[0], max_new_tokens=80, budget_forcing=2)
    assert torch.equal(alone.tokens, waiting[0].tokens)


@pytest.mark.slow
def test_without_a_mark_of_thinking_budget_forcing_puts_off_the_end_of_the_answer(smollm2: TransformerBridge) -> None:
    plain = stepsal.generate(smollm2, "What is 2 + 3?", max_new_tokens=40)
    assert not plain.truncated
    waiting = stepsal.generate(smollm2, "What is 2 + 3?", max_new_tokens=60, budget_forcing=1)
    assert waiting.response.startswith(plain.response.removesuffix("<|im_end|>") + "Wait")


def test_budget_forcing_is_refused_for_harmony(mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini.tokenizer, "chat_template", mini.tokenizer.chat_template + "{# <|channel|> #}")
    monkeypatch.setattr(mini.cfg, "model_name", "another")
    with pytest.raises(ValueError, match="not supported for the headers of format 'harmony'"):
        stepsal.generate(mini, "What?", budget_forcing=1)


@pytest.mark.parametrize(
    ("format", "markers", "ends"),
    [
        ("magistral", ("[THINK]", "[/THINK]"), ["[/THINK]"]),
        ("seed-oss", ("<seed:think>", "</seed:think>"), ["</seed:think>"]),
        (Format.with_marker("=>"), ("=>", "<="), ["=>"]),
        ("plain", ("<think>", "</think>"), ["<eos>"]),
        ("auto", ("◁think▷", "◁/think▷"), ["◁/think▷"]),  # told by the vocabulary
        ("auto", ("<notes>", "</notes>"), ["<eos>"]),
    ],
)
def test_budget_forcing_waits_for_the_marker_of_the_format(
    format: str | Format, markers: tuple[str, str], ends: list[str]
) -> None:
    tokenizer = char_tokenizer(markers)
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>", "")
    model = stepsal.load("tiny", hf_model=tiny_hf_model("Llama", eos_token_id=1), tokenizer=tokenizer)
    segmentation = stepsal.Segmentation(format)
    assert tokenizer.convert_ids_to_tokens(sorted(thinking_ends(model, segmentation))) == ends
    wait = tokenizer("Wait", add_special_tokens=False)["input_ids"]
    forcing = BudgetForcing(thinking_ends(model, segmentation), wait, times=1)
    end = tokenizer.convert_tokens_to_ids(ends[0])
    tokens = [forcing.replace(end) for _ in range(5)]
    assert tokenizer.decode(tokens) == "Wait" + ends[0]


def test_budget_forcing_refuses_a_marker_of_several_tokens(mini: TransformerBridge) -> None:
    with pytest.raises(
        ValueError, match=r"'\[/THINK\]', which ends the thinking in format 'magistral', has \d+ tokens"
    ):
        stepsal.generate(mini, "What?", budget_forcing=1, segmentation=stepsal.Segmentation("magistral"))


class TestStops:
    def test_a_row_ends_with_the_text_wherever_tokens_cut_it(self, mini: TransformerBridge) -> None:
        whole = stepsal.generate(mini, PROBLEMS[1].question)
        for text in (" so ", "eds", ".", whole.response[25:60]):
            trace = stepsal.generate(mini, PROBLEMS[1].question, stop=["never written", text], stop_in_thinking=True)
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

    @pytest.mark.parametrize("stop", ["</think>", ["a", ""]])
    def test_stops_that_make_no_sense(self, mini: TransformerBridge, stop: object) -> None:
        with pytest.raises(ValueError, match="must be a list of texts"):
            stepsal.generate(mini, PROBLEMS[0].question, stop=stop)


def test_a_question_is_rendered_tokenised_and_located_once(
    mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(mini.tokenizer)
    render, tokenise = kind.apply_chat_template, kind.__call__
    rendered, tokenised = [], []

    def rendering(self: object, messages: list[dict[str, str]], **options: object) -> str:
        rendered.append(messages[-1]["content"])
        return render(self, messages, **options)

    def tokenising(self: object, text: str, **options: object) -> object:
        tokenised.append(text)
        return tokenise(self, text, **options)

    def searching(*arguments: object) -> None:
        raise AssertionError("the question was searched for, though its place is known")

    monkeypatch.setattr(kind, "apply_chat_template", rendering)
    monkeypatch.setattr(kind, "__call__", tokenising)
    monkeypatch.setattr("stepsal.trace.trace.locate_question", searching)
    questions = [p.question for p in PROBLEMS]
    traces = stepsal.generate_batch(mini, questions, max_new_tokens=3)
    assert [question for question in rendered if question in questions] == questions
    assert (
        len(rendered) == len(questions) + 1
    )  # the template alone, once for the batch, to know where a question stands
    assert len(tokenised) == len(questions)
    assert [trace.step_text(0) for trace in traces] == questions


def test_answers_of_a_decoding_are_those_of_flat_keywords(mini: TransformerBridge) -> None:
    questions = [p.question for p in PROBLEMS]
    options = {"max_new_tokens": 30, "temperature": 1.2, "top_p": 0.9, "stop": ("</think>",), "budget_forcing": 1}
    flat = stepsal.generate_batch(mini, questions, seed=4, system="Be kind.", **options)
    decoding = stepsal.Decoding(**options)
    for a, b in zip(flat, answer_batch(mini, questions, decoding, seeds=[4, 5, 6], system="Be kind."), strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert a.steps == b.steps
        assert a.truncated == b.truncated


def test_prompts_are_checked_before_any_work(mini: TransformerBridge) -> None:
    prompts = check_questions(mini, [p.question for p in PROBLEMS], decoding=stepsal.Decoding(), system="Be kind.")
    for problem, prompt in zip(PROBLEMS, prompts, strict=True):
        assert mini.tokenizer.decode(prompt.ids) == prompt.text
        assert prompt.text[prompt.start : prompt.end] == prompt.question == problem.question
    harmony = stepsal.Segmentation("harmony")
    with pytest.raises(ValueError, match="not supported for the headers of format 'harmony'"):
        check_questions(mini, ["What?"], decoding=stepsal.Decoding(budget_forcing=2), segmentation=harmony)


class TestOneSegmentation:
    """StepFlow injects at the steps that the trace is cut by."""

    CONFIG = stepsal.StepFlowConfig(alpha=3.0)  # so strong that it shows where it is injected
    COMMAS = stepsal.Segmentation(split=",", min_chars=0)

    @pytest.mark.parametrize("split", ["paragraph", ","])  # the embedded reasoner writes no paragraphs, but commas
    def test_stepflow_injects_where_the_trace_is_cut(self, mini: TransformerBridge, split: str) -> None:
        segmentation = stepsal.Segmentation(split=split, min_chars=0)
        decoded: list[torch.Tensor] = []
        with mini.hooks(fwd_hooks=[("unembed.hook_out", lambda logits, hook: decoded.append(logits[0, -1].clone()))]):
            trace = stepsal.generate(
                mini, PROBLEMS[1].question, stepflow=self.CONFIG, segmentation=segmentation, max_new_tokens=60
            )
        assert trace.segmentation == stepsal.Segmentation("think", split, 0)
        starts = [step.start for step in trace.steps[2:] if step.role == "thinking"]  # the first step follows none
        assert [trace.token_texts[start - 1] for start in starts] == [","] * len(starts)
        assert bool(starts) == (split == ",")

        def read(segmentation: stepsal.Segmentation | None) -> tuple[torch.Tensor, FlowLog]:
            with torch.no_grad(), stepsal.stepflow(mini, self.CONFIG, segmentation=segmentation) as log:
                return mini(trace.tokens[None])[0, trace.n_prompt - 1 : -1], log

        logits, log = read(segmentation)
        torch.testing.assert_close(torch.stack(decoded), logits, atol=2e-3, rtol=1e-3)
        assert log.summary()["injections"] == len(starts) * len(log.smi_layers)
        at_sentences, _ = read(None)
        assert (torch.stack(decoded) - at_sentences).abs().max() > 0.1

    def test_traces_take_the_segmentation_of_an_open_context(self, mini: TransformerBridge) -> None:
        question = PROBLEMS[1].question
        inside = stepsal.generate(mini, question, stepflow=self.CONFIG, segmentation=self.COMMAS, max_new_tokens=60)
        with stepsal.stepflow(mini, self.CONFIG, segmentation=self.COMMAS):
            for segmentation in (None, self.COMMAS):
                trace = stepsal.generate(mini, question, segmentation=segmentation, max_new_tokens=60)
                assert torch.equal(trace.tokens, inside.tokens)
                assert trace.steps == inside.steps
                assert trace.segmentation == inside.segmentation

    def test_a_mismatch_is_refused(self, mini: TransformerBridge) -> None:
        with stepsal.stepflow(mini, self.CONFIG, segmentation=self.COMMAS):
            for other in (stepsal.Segmentation(), stepsal.Segmentation("plain", ",", 0)):
                with pytest.raises(ValueError, match="Segmentation"):
                    stepsal.generate(mini, "What?", segmentation=other)
                with pytest.raises(ValueError, match="Segmentation"):
                    stepsal.generate_batch(mini, ["What?"], segmentation=other)


def test_log_probabilities_are_those_of_the_next_tokens(mini: TransformerBridge) -> None:
    trace = stepsal.generate(mini, PROBLEMS[0].question, max_new_tokens=30)
    with torch.no_grad():
        expected = mini(trace.tokens[None])[0].log_softmax(-1)[torch.arange(len(trace) - 1), trace.tokens[1:]]
    torch.testing.assert_close(log_probabilities(mini, trace), expected)
