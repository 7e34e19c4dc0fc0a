"""Rows that are refilled: an answer is what it is alone, whatever is written beside it and whoever had its row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, tiny_chat
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import Decoding, StepFlowConfig
from stepsal.bridge.hooks import attention_hooks
from stepsal.generation import batch as batch_module
from stepsal.generation.answers import answer_each
from stepsal.generation.loop import Prompt, Written, write, write_each
from stepsal.tasks import chain
from stepsal.trace import render_prompt

LIMITS = (9, 2, 14, 1, 5, 3, 11)
STRONG = StepFlowConfig(tau_max=0.5, alpha=8.0)


def prompts_of(lengths: Sequence[int], limits: Sequence[int], first_seed: int = 0) -> list[Prompt]:
    """Return prompts of these lengths, whose tokens differ."""
    generator = torch.Generator().manual_seed(first_seed)
    return [
        Prompt(torch.randint(3, 90, (length,), generator=generator).tolist(), first_seed + i, limit)
        for i, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def chain_prompts(model: TransformerBridge, lengths: Sequence[int], limit: int = 90) -> list[Prompt]:
    """Return prompts of chain problems."""
    questions = [chain.sample(40 + i, length=length).question for i, length in enumerate(lengths)]
    texts = [render_prompt(model.tokenizer, question).text for question in questions]
    return [Prompt(model.tokenizer(text)["input_ids"], i, limit) for i, text in enumerate(texts)]


def in_order(answers: Iterator[Written]) -> list[Written]:
    return sorted(answers, key=lambda answer: answer.number)


def alone(model: TransformerBridge, prompts: Sequence[Prompt], decoding: Decoding) -> list[tuple[list[int], str]]:
    """Return tokens and end of each answer, written by itself."""
    answers = [next(write(model, [prompt], decoding=decoding)) for prompt in prompts]
    return [(answer.tokens, answer.ended) for answer in answers]


@pytest.fixture
def widths(mini: TransformerBridge) -> Iterator[list[tuple[int, int, int]]]:
    """Yield rows, new tokens and columns of each pass of mini."""
    seen: list[tuple[int, int, int]] = []

    def note(module: object, args: tuple, kwargs: dict) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.append((*ids.shape, kwargs["attention_mask"].shape[1]))

    handle = mini.original_model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "GPT2", "Phi3", "Falcon", "Bloom", "Lfm2"])
def test_an_answer_is_what_it_is_alone_on_every_architecture(architecture: str) -> None:
    model, decoding = tiny_chat(architecture), Decoding(temperature=0.7)
    prompts = prompts_of((5, 12, 3, 20, 1, 8, 30), LIMITS)
    answers = in_order(write(model, prompts, 3, decoding=decoding))
    assert [(answer.tokens, answer.ended) for answer in answers] == alone(model, prompts, decoding)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    rows=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 12)), min_size=1, max_size=9),
    batch_size=st.integers(1, 5),
    arrivals=st.lists(st.integers(0, 3), max_size=12),
    cancelled=st.dictionaries(st.integers(0, 8), st.integers(1, 4), max_size=3),
    stop=st.sampled_from([(), ("e",), ("an", "7")]),
    budget_forcing=st.integers(0, 1),
)
def test_whenever_prompts_arrive_and_whoever_leaves(
    mini: TransformerBridge,
    rows: list[tuple[int, int]],
    batch_size: int,
    arrivals: list[int],
    cancelled: dict[int, int],
    stop: tuple[str, ...],
    budget_forcing: int,
) -> None:
    decoding = Decoding(temperature=1.0, stop=stop, budget_forcing=budget_forcing, stop_in_thinking=True)
    prompts = prompts_of(*zip(*rows, strict=True), first_seed=7)
    expected = alone(mini, prompts, decoding)
    waiting, schedule, n_asked = iter(prompts), iter(arrivals), dict.fromkeys(range(len(prompts)), 0)

    def take(n: int) -> list[Prompt]:
        return list(islice(waiting, min(n, next(schedule, n))))

    def still_asked(number: int) -> bool:
        n_asked[number] += 1
        return n_asked[number] != cancelled.get(number)

    answers: list[tuple[int, Written]] = []
    while len(answers) < len(prompts):  # a batch that runs out of prompts ends, and the next one goes on
        n_before = len(answers)
        written = write_each(
            mini, take, batch_size, decoding=decoding, still_asked=lambda number, n=n_before: still_asked(n + number)
        )  # fmt: skip
        answers += [(n_before + answer.number, answer) for answer in written]
    for number, answer in answers:
        tokens, ended = expected[number]
        if answer.tokens != tokens:
            assert answer.tokens == tokens[: cancelled[number]]
            assert answer.ended == "limit"
        else:
            assert answer.ended in (ended, "limit")


@pytest.mark.slow
class TestStepFlow:
    """Trackers and kept values belong to a row, and begin anew with it."""

    @pytest.mark.parametrize("config", [STRONG, STRONG.but(oeb_layers=()), STRONG.but(smi_layers=())])
    def test_answers_and_logs_are_what_they_are_alone(self, mini: TransformerBridge, config: StepFlowConfig) -> None:
        prompts, decoding = chain_prompts(mini, (2, 1, 3, 1, 2)), Decoding(temperature=0.5)
        with stepsal.stepflow(mini, config) as log:
            answers = in_order(write(mini, prompts, 2, decoding=decoding))
        assert log.sequences == len(prompts)
        for prompt, answer in zip(prompts, answers, strict=True):
            with stepsal.stepflow(mini, config) as log_alone:
                expected = next(write(mini, [prompt], decoding=decoding))
            assert (answer.tokens, answer.ended) == (expected.tokens, expected.ended)
            own = log.of(answer.number)
            for table in ("oeb", "smi"):
                pd.testing.assert_frame_equal(getattr(own, table), getattr(log_alone, table), rtol=1e-4)
        assert [answer.tokens for answer in answers] != [tokens for tokens, _ in alone(mini, prompts, decoding)]

    @pytest.mark.parametrize("architecture", ["Qwen2", "Gemma2", "GptOss"])
    def test_with_sliding_windows_and_sinks(self, architecture: str) -> None:
        model, decoding = tiny_chat(architecture), Decoding(temperature=0.7)
        text = "<bos><user>How many{}?<assistant><think>We count. They are two. So"
        prompts = [
            Prompt(model.tokenizer(text.format(" of them" * n))["input_ids"], n, limit)
            for n, limit in enumerate((9, 3, 12, 5))
        ]
        segmentation = stepsal.Segmentation("think", min_chars=1)
        plain = [tokens for tokens, _ in alone(model, prompts, decoding)]
        with stepsal.stepflow(model, STRONG, segmentation=segmentation):
            expected = [tokens for tokens, _ in alone(model, prompts, decoding)]
            answers = in_order(write(model, prompts, 2, decoding=decoding))
        assert [answer.tokens for answer in answers] == expected != plain


class TestPortions:
    """Long prompts are read some tokens at a time."""

    @pytest.mark.parametrize("config", [None, STRONG])
    def test_the_answer_is_the_same_and_patterns_stay_narrow(
        self, mini: TransformerBridge, config: StepFlowConfig | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        questions = [chain.sample(40 + n, length=n).question for n in (4, 1, 3)]
        options = {"stepflow": config, "max_new_tokens": 60}
        expected = stepsal.generate_batch(mini, questions, **options)
        heights: list[int] = []

        def note(pattern: Tensor, hook: object) -> None:
            heights.append(pattern.shape[2])

        monkeypatch.setattr(batch_module, "PORTION", 7)
        with mini.hooks(fwd_hooks=[(attention_hooks(mini, 0)["pattern"], note)]):
            traces = stepsal.generate_batch(mini, questions, batch_size=2, **options)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(traces, expected, strict=True))
        assert max(heights) == 7
        assert heights.count(7) > 9


class TestTheBatch:
    def test_is_full_until_the_prompts_run_out(self, mini: TransformerBridge, widths: list) -> None:
        prompts = prompts_of([4] * 6, (5, 1, 1, 1, 1, 1), first_seed=3)
        decoding = Decoding(temperature=60.0)  # so hot that no answer ends by itself
        answers = list(write(mini, prompts, 2, decoding=decoding))
        assert [answer.number for answer in answers] == [1, 2, 3, 4, 0, 5]
        assert [rows for rows, n_new, _ in widths if n_new == 1] == [2] * 4  # the first pass reads two whole prompts
        assert {answer.n_together for answer in answers} == {2}

    def test_lets_go_of_columns_that_are_padding_for_all(self, mini: TransformerBridge, widths: list) -> None:
        list(write(mini, prompts_of([60, 4, 4], (2, 30, 30)), decoding=Decoding(temperature=60.0)))
        assert max(columns for *_, columns in widths[:2]) == 61
        assert widths[2][2] == 6
        assert widths[-1][2] == 33

    def test_seconds_add_up(self, mini: TransformerBridge) -> None:
        start = time.perf_counter()
        answers = list(write(mini, prompts_of([9] * 6, LIMITS[:6]), 2, decoding=Decoding()))
        elapsed = time.perf_counter() - start
        assert 0.5 * elapsed < sum(answer.seconds for answer in answers) <= elapsed
        assert all(answer.seconds > 0 for answer in answers)

    def test_refuses_a_size_below_one(self, mini: TransformerBridge) -> None:
        with pytest.raises(ValueError, match="batch_size=0 must be at least 1, or None for all questions together"):
            stepsal.generate_batch(mini, [chain.sample(1).question], batch_size=0)


class TestTheModelIsLeftWhole:
    def test_by_whoever_leaves_early_or_works_in_between(self, mini: TransformerBridge) -> None:
        before = {name: id(part) for name, part in mini.original_model.named_modules(remove_duplicate=False)}
        questions = [chain.sample(40 + n, length=n).question for n in (1, 2, 1, 3)]
        answers = answer_each(mini, questions, Decoding(max_new_tokens=60), seeds=range(4), batch_size=2)
        first = next(answers)
        assert {n: id(p) for n, p in mini.original_model.named_modules(remove_duplicate=False)} == before
        stepsal.step_saliency(mini, first.trace, progress=False)
        rest = {answer.number: answer.trace for answer in islice(answers, 2)}
        answers.close()
        assert {n: id(p) for n, p in mini.original_model.named_modules(remove_duplicate=False)} == before
        for number, trace in (rest | {first.number: first.trace}).items():
            assert torch.equal(trace.tokens, stepsal.generate(mini, questions[number], max_new_tokens=60).tokens)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("stepflow", [None, STRONG])
    def test_after_an_error_while_a_prompt_joins(
        self, mini: TransformerBridge, error: type[BaseException], stepflow: StepFlowConfig | None
    ) -> None:
        before = {name: id(part) for name, part in mini.original_model.named_modules(remove_duplicate=False)}
        question, passes = chain.sample(41, length=2).question, list[int]()

        def interrupt(module: object, args: tuple, kwargs: dict) -> None:
            passes.append(kwargs["input_ids"].shape[1] if "input_ids" in kwargs else args[0].shape[1])
            if len(passes) > 1 and passes[-1] > 1:
                raise error

        handle = mini.original_model.register_forward_pre_hook(interrupt, with_kwargs=True)
        try:
            with pytest.raises(error):
                stepsal.generate_batch(mini, [question] * 3, batch_size=2, stepflow=stepflow, max_new_tokens=60)
        finally:
            handle.remove()
        assert {n: id(p) for n, p in mini.original_model.named_modules(remove_duplicate=False)} == before
        assert not any(point.fwd_hooks for point in mini.hook_dict.values())
        assert stepsal.generate(mini, question, max_new_tokens=60).response
