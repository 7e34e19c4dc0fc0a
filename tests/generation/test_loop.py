"""The decoding loop and its books: what each row writes, what ends it, and which rows go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import char_tokenizer, tiny_chat
from tokenizers import AddedToken, Tokenizer
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast
from transformers.utils import ModelOutput

import stepsal
from stepsal import Segmentation
from stepsal.generation.endings import StopTexts, ThinkingWatch, watched_formats
from stepsal.generation.loop import Answer, Prompt, Written, check_prompt
from stepsal.generation.loop import write as write_each_when_done
from stepsal.tasks import chain
from stepsal.trace import FORMATS, Format, render_prompt


@pytest.fixture(scope="module")
def prompt(mini: TransformerBridge) -> list[int]:
    question = chain.sample(2, length=3).question
    return mini.tokenizer(render_prompt(mini.tokenizer, question).text)["input_ids"]


def write(
    model: TransformerBridge,
    prompt_ids: list[list[int]],
    *,
    decoding: stepsal.Decoding,
    seeds: list[int],
    max_new_tokens: list[int] | None = None,
    **options: Any,
) -> list[Written]:
    """Return answers in the order of the prompts."""
    limits = max_new_tokens or [decoding.max_new_tokens] * len(prompt_ids)
    prompts = [Prompt(*parts) for parts in zip(prompt_ids, seeds, limits, strict=True)]
    return sorted(write_each_when_done(model, prompts, decoding=decoding, **options), key=lambda answer: answer.number)


class TestAnswer:
    @pytest.mark.parametrize(
        ("limit", "room", "chosen", "ended"),
        [(4, 9, [5, 0], "end"), (2, 9, [6, 6], "limit"), (2, 2, [6, 6], "context"), (4, 9, [7, 7], None)],
    )
    def test_what_ends_it(self, limit: int, room: int, chosen: list[int], ended: str | None) -> None:
        answer = Answer(limit, room, ends={0})
        assert [answer.push(token) for token in chosen] == chosen
        assert (answer.tokens, answer.ended) == (chosen, ended)

    def test_it_ends_where_nobody_asks_for_it(self) -> None:
        asked: list[int] = []

        def still_asked(number: int) -> bool:
            asked.append(number)
            return number == 1

        answer, other = (Answer(9, 20, ends={0}) for _ in range(2))
        for token in (5, 0):
            other.push(token)
            other.end_unless(still_asked, 1)
        answer.push(5)
        answer.end_unless(still_asked, 0)
        assert (answer.ended, other.ended) == ("limit", "end")
        assert asked == [1, 0]  # of an answer that has ended by itself nobody is asked


def test_what_ended_a_row(mini: TransformerBridge, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(limit: int = 400, stop: tuple[str, ...] = ()) -> str:
        decoding = stepsal.Decoding(max_new_tokens=limit, stop=stop, stop_in_thinking=True)
        return write(mini, [prompt], decoding=decoding, seeds=[0])[0].ended

    assert (ended(), ended(limit=5), ended(stop=("so",))) == ("end", "limit", "stop")
    monkeypatch.setattr(mini.cfg, "n_ctx", len(prompt) + 7)
    assert ended() == "context"


def test_a_limit_of_each_row_overrides_that_of_all(mini: TransformerBridge, prompt: list[int]) -> None:
    decoding = stepsal.Decoding(max_new_tokens=1)
    rows = write(mini, [prompt] * 3, decoding=decoding, max_new_tokens=[3, 7, 5], seeds=[0] * 3)
    assert [len(row.tokens) for row in rows] == [3, 7, 5]
    assert rows[0].tokens == rows[1].tokens[:3]
    assert rows[2].tokens == rows[1].tokens[:5]
    assert [len(row.tokens) for row in write(mini, [prompt] * 2, decoding=decoding, seeds=[0] * 2)] == [1, 1]


def test_a_row_that_is_asked_for_no_more_leaves_the_others_alone(mini: TransformerBridge, prompt: list[int]) -> None:
    decoding = stepsal.Decoding(max_new_tokens=12, temperature=1.0)
    whole = write(mini, [prompt] * 2, decoding=decoding, seeds=[1, 2])
    n_calls = [0, 0]

    def still_asked(row: int) -> bool:
        n_calls[row] += 1
        return row == 1 or n_calls[row] < 4

    first, second = write(mini, [prompt] * 2, decoding=decoding, seeds=[1, 2], still_asked=still_asked)
    assert (first.tokens, first.ended) == (whole[0].tokens[:4], "limit")
    assert second == whole[1]


class TestBrokenLogits:
    """Logits that give no distribution end decoding with an error, and leave no trace in the model."""

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_name_the_row_and_the_token(
        self, mini: TransformerBridge, prompt: list[int], value: float, temperature: float
    ) -> None:
        def broken(logits: torch.Tensor, hook: object) -> torch.Tensor:
            n_passes.append(len(n_passes))
            if len(n_passes) == 4:  # the first row has left: the second of three is the first of two
                logits[0] = value
            return logits

        n_passes: list[int] = []
        decoding = stepsal.Decoding(max_new_tokens=9, temperature=temperature)
        whole = write(mini, [prompt] * 3, decoding=decoding, seeds=[1, 2, 3])
        message = r"logits of 'mini' \(float32\) for new token 3 of row 1 are NaN or infinite"
        with mini.hooks(fwd_hooks=[("unembed.hook_out", broken)]), pytest.raises(ValueError, match=message):
            write(mini, [prompt] * 3, decoding=decoding, max_new_tokens=[2, 9, 9], seeds=[1, 2, 3])
        assert write(mini, [prompt] * 3, decoding=decoding, seeds=[1, 2, 3]) == whole

    def test_a_token_that_is_ruled_out_is_no_error(self, mini: TransformerBridge, prompt: list[int]) -> None:
        decoding = stepsal.Decoding(max_new_tokens=5)
        first = write(mini, [prompt], decoding=decoding, seeds=[0])[0].tokens[0]

        def ruled_out(logits: torch.Tensor, hook: object) -> torch.Tensor:
            logits[..., first] = float("-inf")
            return logits

        with mini.hooks(fwd_hooks=[("unembed.hook_out", ruled_out)]):
            assert first not in write(mini, [prompt], decoding=decoding, seeds=[0])[0].tokens

    def test_stepflow_goes_on_after_them(self, mini: TransformerBridge) -> None:
        def broken(module: object, arguments: object, output: ModelOutput) -> None:
            output.logits.fill_(float("nan"))

        question, config = chain.sample(2, length=3).question, stepsal.StepFlowConfig(tau_max=0.3, alpha=1.0)
        options = {"max_new_tokens": 40}
        expected = stepsal.generate(mini, question, stepflow=config, **options)
        plain = stepsal.generate(mini, question, **options)
        with stepsal.stepflow(mini, config):
            with (
                mini.original_model.register_forward_hook(broken),
                pytest.raises(ValueError, match="new token 0 of row 0 are NaN"),
            ):
                stepsal.generate(mini, question, **options)
            assert torch.equal(stepsal.generate(mini, question, **options).tokens, expected.tokens)
        assert torch.equal(stepsal.generate(mini, question, **options).tokens, plain.tokens)

    def test_the_remedy_of_float16_is_another_dtype(self) -> None:
        model = tiny_chat("Qwen2").to(torch.float16)
        with torch.no_grad():
            model.original_model.get_output_embeddings().weight.fill_(60_000.0)
        with pytest.raises(ValueError, match=r"\(float16\) .* load the model with dtype='bfloat16' or 'float32'"):
            stepsal.generate(model, "Why?", max_new_tokens=3)


class TestStopsOutsideTheThinking:
    """What stop texts end, whatever the format, the tokens and the batch."""

    @pytest.mark.parametrize(
        ("format", "prompt_end", "answer", "stopped"),
        [
            # the prompt opens the thinking, or the answer does, or nothing
            ("think", "<think>", "a. b.</think>c. d.", "a. b.</think>c."),
            ("think", "", "<think>a. b.</think>c. d.", "<think>a. b.</think>c."),
            ("think", "", "a. b.", "a."),
            ("think", "<think>\n\n</think>\n\n", "a. b.", "a."),
            ("think", "<think>", "a. b.", None),
            ("think", "", "c. <think>a.", "c."),  # it has not begun yet
            ("think", "</think>", "c <think>a.</think> d. e.", "c <think>a.</think> d."),  # and begins again
            (
                "harmony", "<|start|>assistant",
                "<|channel|>analysis<|message|>a. b.<|end|><|start|>assistant<|channel|>final<|message|>c. d.",
                "<|channel|>analysis<|message|>a. b.<|end|><|start|>assistant<|channel|>final<|message|>c.",
            ),
            ("plain", "<think>", "a. b.", "a."),
            # of a model that is not known: any marker that is
            ("auto", "<think>", "a. b.</think>c. d.", "a. b.</think>c."),
            ("auto", "", "<think>a.</think>c. d.", "<think>a.</think>c."),
            ("auto", "", "a. b.", "a."),
            (Format.with_marker("So:"), "", "a. b. So: c. d.", "a. b. So: c."),
        ],
    )  # fmt: skip
    def test_in_each_format(
        self, format: str | Format, prompt_end: str, answer: str, stopped: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stepsal.generation.endings.preset_format", lambda model: None)
        formats = watched_formats(None, Segmentation(format))
        assert text_until_stop(answer, ["."], ThinkingWatch(formats, f"Why?{prompt_end}")) == stopped
        assert text_until_stop(answer, ["."], None) == answer.partition(".")[0] + "."

    @pytest.mark.parametrize(
        ("stops", "stopped"),
        [
            (["</think>"], "so it is</think>"),  # the end of the thinking is outside it
            (["is</think>"], "so it is</think>"),
            (["so", "a text that is much longer"], "so it is</think>and so"),  # the first one is not remembered
            (["it", "d so"], "so it is</think>and so"),
            (["is"], "so it is</think>and so it is"),
            (["</thi"], None),
        ],
    )
    def test_at_the_end_of_the_thinking(self, stops: list[str], stopped: str | None) -> None:
        watch = ThinkingWatch([FORMATS["think"]], "<think>")
        assert text_until_stop("so it is</think>and so it is, so", stops, watch) == stopped

    def test_in_the_middle_of_a_token(self, mini: TransformerBridge) -> None:
        tokenizer = AddedTokens(mini.tokenizer)
        for token, stopped in ((".</think>", False), (".</think>.", True), (". ", False), ("</think>x.x", True)):
            stops = StopTexts(tokenizer, ["."], ThinkingWatch([FORMATS["think"]], "<think>"))
            assert stops.push(tokenizer.add(token)) is stopped, token

    def test_in_a_batch(self, mini: TransformerBridge) -> None:
        questions = [chain.sample(seed, length=length).question for seed, length in ((1, 1), (3, 2))]
        whole = [stepsal.generate(mini, question).response for question in questions]
        for stop in (["is"], [" = ", "never written"]):
            traces = stepsal.generate_batch(mini, questions, stop=stop)
            for question, trace, response in zip(questions, traces, whole, strict=True):
                thinking, _, summary = response.partition("</think>")
                assert trace.response.startswith(f"{thinking}</think>{summary.partition(stop[0])[0]}{stop[0]}")
                assert response.startswith(trace.response)
                assert trace.summary
                assert torch.equal(trace.tokens, stepsal.generate(mini, question, stop=stop).tokens)
            in_thinking = stepsal.generate_batch(mini, questions, stop=stop, stop_in_thinking=True)
            assert all(trace.response.count(stop[0]) == 1 for trace in in_thinking)

    def test_the_segmentation_tells_the_thinking(self, mini: TransformerBridge) -> None:
        question = chain.sample(2, length=3).question
        whole = stepsal.generate(mini, question).response
        for segmentation in (Segmentation("plain"), Segmentation(Format("own", "summary", {}))):
            trace = stepsal.generate(mini, question, stop=["so"], segmentation=segmentation)
            assert trace.response == whole.partition("so")[0] + "so"


def text_until_stop(answer: str, stops: list[str], watch: ThinkingWatch | None) -> str | None:
    """Push an answer by tokens of one character, and return what stands there when it stops; None if it does not."""
    tokenizer = char_tokenizer()
    texts = StopTexts(tokenizer, stops, watch)
    for i, char in enumerate(answer):
        if texts.push(tokenizer.convert_tokens_to_ids(char)):
            return answer[: i + 1]
    return None


class AddedTokens:
    """A tokenizer to which whole texts are added as tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend_tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())

    def add(self, text: str) -> int:
        self.backend_tokenizer.add_tokens([AddedToken(text, normalized=False)])
        return self.backend_tokenizer.token_to_id(text)


def test_prompts_without_room(mini: TransformerBridge) -> None:
    check_prompt(mini, [1] * (mini.cfg.n_ctx - 1))
    for n in (0, mini.cfg.n_ctx):
        with pytest.raises(ValueError, match=f"a prompt of {n} tokens leaves no room"):
            check_prompt(mini, [1] * n)
