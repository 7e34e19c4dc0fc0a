"""Traces on real tokenizers of several kinds, trained here."""

from __future__ import annotations

import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from responses import TEXTS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from stepsal.trace.assignment import StepTracker
from stepsal.trace.encoding import check_offsets
from stepsal.trace.formats import FORMATS, Format
from stepsal.trace.prompt import render_prompt
from stepsal.trace.segment import Segmentation, Segmenter
from stepsal.trace.trace import Step, Trace

CORPUS = ["How many rolls are left?", "Let me think. She has 72 rolls, so 3 are left.", "The answer is 3. 😀", "答案"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = "<s>{% for m in messages %}<User>{{ m['content'] | trim }}{% endfor %}<Assistant><think>\n"
HARMONY = "<|start|>user<|message|>{{ messages[-1]['content'] }}<|end|><|start|>assistant"
SPECIAL = {
    "byte_level": ["<s>", "</s>", "<think>", "</think>", "<User>", "<Assistant>"],
    "no_think_tokens": ["<s>", "</s>"],  # so that <think> is several tokens
    "chatml": ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "harmony": ["<s>", "</s>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"],
    "metaspace": ["<s>", "</s>", "<think>", "</think>"],
}
TEMPLATES = {"byte_level": R1, "no_think_tokens": R1, "chatml": CHATML, "harmony": HARMONY, "metaspace": None}


def make_tokenizer(kind: str, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<s>", byte_fallback=False))
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = list({c for text in CORPUS for c in text})
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL[kind], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATES[kind]
    return fast


@pytest.fixture(scope="module", params=["byte_level", "no_think_tokens", "chatml", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer(request.param)


QUESTION = "How many rolls are left?"
RESPONSE = "<think>Let me think. She has 72 rolls. So 3 are left.</think>\n\nThe answer is 3."


def texts(trace: Trace) -> list[tuple[str, str]]:
    return [(step.role, trace.step_text(i)) for i, step in enumerate(trace.steps)]


EXPECTED = [
    ("question", QUESTION),
    ("thinking", "Let me think. She has 72 rolls."),
    ("thinking", "So 3 are left."),
    ("summary", "The answer is 3."),
]


def test_finds_question_thinking_and_summary(tokenizer: PreTrainedTokenizerFast) -> None:
    trace = Trace.from_text(QUESTION, RESPONSE, tokenizer)
    assert texts(trace) == EXPECTED
    assert trace.format == "think"
    assert trace.text.count("<think>") == 1  # not doubled where the template has one
    assert trace.summary == "The answer is 3."
    ends = [step.end for step in trace.steps]
    assert all(a <= step.start for a, step in zip(ends, trace.steps[1:], strict=False))
    for token, i in zip(trace.token_texts, trace.step_ids.tolist(), strict=True):
        assert i >= 0 or not token.strip() or token not in RESPONSE.removeprefix("<think>").split("</think>")[0].split()
    marker = trace.text.index("</think>")
    inside = (trace.offsets[:, 0] >= marker) & (trace.offsets[:, 1] <= marker + len("</think>"))
    assert inside.any()
    assert (trace.step_ids[inside] == -1).all()
    assert trace.step_ids[0] == -1  # BOS or the template


def test_opening_mark_in_the_prompt_template() -> None:
    tokenizer = make_tokenizer("byte_level")
    with_mark = Trace.from_text(QUESTION, RESPONSE, tokenizer)
    without = Trace.from_text(QUESTION, RESPONSE.removeprefix("<think>"), tokenizer)
    assert texts(with_mark) == texts(without) == EXPECTED


def test_harmony() -> None:
    response = (
        "<|channel|>analysis<|message|>Let me think of this.<|end|><|start|>assistant<|channel|>final<|message|>"
        "The answer is 3.<|return|>"
    )
    trace = Trace.from_text(QUESTION, response, make_tokenizer("harmony"))
    assert texts(trace)[1:] == [("thinking", "Let me think of this."), ("summary", "The answer is 3.")]
    assert trace.format == "harmony"


def test_marker_and_plain(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = make_tokenizer("chatml")
    marker = Trace.from_text(
        QUESTION, "I count all of them. ANSWER It is 3.", chat, segmentation=Segmentation(Format.with_marker("ANSWER"))
    )
    assert texts(marker)[1:] == [("thinking", "I count all of them."), ("summary", "It is 3.")]
    plain = Trace.from_text(QUESTION, "I count all of them.\n\nThe answer is 3.", chat)
    assert plain.format == "plain"
    assert texts(plain)[1:] == [("thinking", "I count all of them."), ("summary", "The answer is 3.")]


def test_truncated_thinking_has_no_summary(tokenizer: PreTrainedTokenizerFast) -> None:
    trace = Trace.from_text(QUESTION, "<think>Let me think. She has 72 ro", tokenizer)
    assert trace.summary is None
    assert set(trace.roles) == {"question", "thinking"}


def test_system_prompt_is_template() -> None:
    trace = Trace.from_text(QUESTION, RESPONSE, make_tokenizer("chatml"), system="You are left alone.")
    assert "You are left alone." in trace.text
    assert texts(trace) == EXPECTED


def test_from_tokens_keeps_the_tokens_and_agrees(tokenizer: PreTrainedTokenizerFast) -> None:
    trace = Trace.from_text(QUESTION, RESPONSE, tokenizer)
    again = Trace.from_tokens(trace.tokens, trace.n_prompt, tokenizer, question=QUESTION)
    assert torch.equal(again.tokens, trace.tokens)
    assert texts(again) == EXPECTED
    assert [s.role for s in again.steps] == [s.role for s in trace.steps]


def test_from_tokens_of_a_tokenisation_that_the_tokenizer_would_not_choose() -> None:
    tokenizer = make_tokenizer("byte_level")
    prompt = render_prompt(tokenizer, QUESTION).text
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    letters = tokenizer.convert_tokens_to_ids([c if c != " " else "Ġ" for c in "Let me think. She has rolls."])
    end = tokenizer.convert_tokens_to_ids("</think>")
    tokens = torch.tensor([*ids, *letters, end, *letters])
    trace = Trace.from_tokens(tokens, len(ids), tokenizer, question=QUESTION)
    assert torch.equal(trace.tokens, tokens)
    assert [text for _, text in texts(trace)[1:]] == ["Let me think. She has rolls."] * 2
    assert trace.steps[1] == Step("thinking", len(ids), len(ids) + len(letters))


def test_characters_over_several_tokens() -> None:
    tokenizer = make_tokenizer("byte_level")
    trace = Trace.from_text(QUESTION, "Now a party 🎉 begins. 🎉 And it ends.</think>Yes, 🎉 it is.", tokenizer)
    again = Trace.from_tokens(trace.tokens, trace.n_prompt, tokenizer, question=QUESTION)
    assert again.text == trace.text
    assert "".join(again.token_texts) == trace.text
    assert [text for _, text in texts(again)] == [text for _, text in texts(trace)]


@pytest.mark.parametrize(
    "response",
    [
        "先我们看数字。然后想。🎉 然后再想。</think>答案是三。🎉🎉",
        "🎉 So it is. 答 is an answer.</think>🎉",
        "Is it x答? It is.\n\n答案.</think>\n答",
        "यह तीन है। वह चार है।</think>तीन।",
        "é à ü. ö ß. ê î.</think>ñ",
    ],
)
@pytest.mark.parametrize("kind", ["byte_level", "no_think_tokens", "chatml"])
def test_tokens_that_share_a_character_are_in_the_same_steps_from_text_and_from_tokens(
    kind: str, response: str
) -> None:
    tokenizer = _CACHE.setdefault(kind, make_tokenizer(kind))
    segmentation = Segmentation(min_chars=0)
    trace = Trace.from_text(QUESTION, response, tokenizer, segmentation=segmentation)
    again = Trace.from_tokens(trace.tokens, trace.n_prompt, tokenizer, question=QUESTION, segmentation=segmentation)
    assert torch.equal(again.step_ids, trace.step_ids)
    assert torch.equal(again.offsets, trace.offsets)
    assert "".join(trace.token_texts) == trace.text


@given(st.text(max_size=30))
def test_from_text_and_from_tokens_agree(text: str) -> None:
    tokenizer = _CACHE.setdefault("byte_level", make_tokenizer("byte_level"))
    if "\ufffd" in text or any(0xD800 <= ord(c) < 0xE000 for c in text):
        return
    trace = Trace.from_text(QUESTION, f"{text}So it is.</think>{text}Three.", tokenizer)
    again = Trace.from_tokens(trace.tokens, trace.n_prompt, tokenizer, question=QUESTION)
    assert torch.equal(again.step_ids, trace.step_ids)


@pytest.mark.parametrize("marker", ["Final Answer:\n", "\nFinal Answer:", "\n\nFinal Answer: "])
def test_no_step_runs_over_a_marker_with_white_space_around_it(marker: str) -> None:
    tokenizer = _CACHE.setdefault("byte_level", make_tokenizer("byte_level"))
    response = f"I count all of them.{marker}It is 3."
    trace = Trace.from_text(QUESTION, response, tokenizer, segmentation=Segmentation(Format.with_marker(marker)))
    assert texts(trace)[1:] == [("thinking", "I count all of them."), ("summary", "It is 3.")]
    place = len(trace.text) - len(response) + response.index(marker)
    begins_in_marker = (trace.offsets[:, 0] >= place) & (trace.offsets[:, 0] < place + len(marker))
    assert (trace.step_ids[begins_in_marker] == -1).all()
    assert not any(begins_in_marker[step.start : step.end].any() for step in trace.steps)
    tracker = StepTracker(Segmenter(Format.with_marker(marker), template=tokenizer.all_special_tokens))
    told = [tracker.push(text) for text in trace.token_texts[trace.n_prompt :]]
    assert told[-1] == 1


def test_sections_may_alternate(tokenizer: PreTrainedTokenizerFast) -> None:
    response = "<think>Let me think.</think>\nThe answer: 72.<think>She has 3 left.</think>The answer is 3."
    trace = Trace.from_text(QUESTION, response, tokenizer)
    assert texts(trace)[1:] == [
        ("thinking", "Let me think."), ("summary", "The answer: 72."), ("thinking", "She has 3 left."),
        ("summary", "The answer is 3."),
    ]  # fmt: skip
    assert trace.thinking == "Let me think.\nShe has 3 left."
    assert trace.summary == "The answer: 72.\nThe answer is 3."


def test_sections_without_a_token_between_them_are_kept_apart() -> None:
    text = "Why?One.#Two.@Three."  # a token that begins with a step holds the marker behind it, too
    format = Format("signs", "thinking", {"thinking": {"#": "summary"}, "summary": {"@": "thinking"}})
    steps = (Step("question", 0, 1), Step("thinking", 1, 2), Step("summary", 2, 3), Step("thinking", 3, 4))
    offsets = torch.tensor([[0, 4], [4, 9], [9, 14], [14, 20]])
    trace = Trace("Why?", text[4:], text, torch.arange(4), offsets, steps, Segmentation(format), 1)
    assert trace.thinking == "One.#\nThree."


def test_a_text_with_a_marker_that_no_format_knows() -> None:
    chat = make_tokenizer("chatml")
    with pytest.warns(UserWarning, match=r"'</scratchpad>'.*Format.with_marker") as caught:
        trace = Trace.from_text(QUESTION, "<scratchpad>Let me think.</scratchpad>\n\nThree.", chat)
    assert [warning.filename for warning in caught] == [__file__]
    assert trace.format == "plain"


def test_a_header_that_cant_be_read_is_told() -> None:
    response = "<|channel|>analysis<|message|>Let me think.<|end|><|channel|>finale<|message|>Three.<|return|>"
    tokenizer = make_tokenizer("harmony")
    with pytest.warns(UserWarning, match=r"can't be read: '<\|channel\|>finale'") as caught:
        trace = Trace.from_text(QUESTION, response, tokenizer)
    with pytest.warns(UserWarning, match="can't be read") as caught_again:
        Trace.from_tokens(trace.tokens, trace.n_prompt, tokenizer, question=QUESTION)
    assert [warning.filename for warning in (*caught, *caught_again)] == [__file__] * 2
    assert trace.summary is None


@pytest.mark.parametrize(("kind", "opening"), [("byte_level", "<think>"), ("harmony", "<|start|>assistant")])
def test_an_opening_that_prompt_and_response_share(kind: str, opening: str) -> None:
    tokenizer = make_tokenizer(kind)
    rest = "<|channel|>final<|message|>It is 3." if kind == "harmony" else "So it is.</think>It is 3."
    trace = Trace.from_text(QUESTION, opening + rest, tokenizer)
    assert trace.text.count(opening) == 1
    assert trace.summary == "It is 3."


@pytest.mark.filterwarnings("ignore:headers of messages can't be read")
@settings(max_examples=60)
@given(TEXTS, st.sampled_from(["byte_level", "no_think_tokens", "harmony"]))
def test_token_by_token_equals_the_whole_text(response: str, kind: str) -> None:
    tokenizer = _CACHE.setdefault(kind, make_tokenizer(kind))
    format = "harmony" if kind == "harmony" else "think"
    prompt = tokenizer(render_prompt(tokenizer, QUESTION).text, add_special_tokens=False)["input_ids"]
    chosen, filler = FORMATS[format], "<|channel|>analysis<|message|>" if kind == "harmony" else "So be it. "
    new = tokenizer(filler + "It begins here. " + response, add_special_tokens=False)["input_ids"]
    trace = Trace.from_tokens(
        torch.tensor(prompt + new), len(prompt), tokenizer, question=QUESTION, segmentation=Segmentation(format=chosen)
    )
    tracker = StepTracker(Segmenter(chosen, template=tokenizer.all_special_tokens))
    told = [tracker.push(text) for text in trace.token_texts[len(prompt) :]]
    final = tracker.segmenter.finish()
    shift = len(trace.text) - len(trace.response)
    held = trace.offsets[:, 0].tolist()
    begins = [s.start + shift for s in final]
    if all(b in held or trace.text[b - 1].isspace() for b in begins):  # no token straddles the beginning of a step
        assert len(trace.steps) == 1 + len(final)
    if "<" not in response:  # no text that could become a marker: what was told online is final
        assert [i + 1 if i >= 0 else -1 for i in told] == trace.step_ids[len(prompt) :].tolist()


_CACHE: dict[str, PreTrainedTokenizerFast] = {}


@pytest.mark.parametrize("question", ["assistant", "user", "a", "im_start"])
def test_the_question_is_not_mistaken_for_template_text(question: str) -> None:
    tokenizer = make_tokenizer("chatml")
    prompt = render_prompt(tokenizer, question, system=f"Now {question}.")
    assert prompt.start == prompt.text.index("<|im_start|>user\n") + len("<|im_start|>user\n")
    trace = Trace.from_text(question, "Let me think it over.\n\nIt is three.", tokenizer)
    again = Trace.from_tokens(trace.tokens, trace.n_prompt, tokenizer, question=question)
    assert again.steps[0] == trace.steps[0]


def test_a_question_that_the_template_trims() -> None:
    tokenizer = make_tokenizer("byte_level")
    prompt = tokenizer(render_prompt(tokenizer, " How? \n").text, add_special_tokens=False)["input_ids"]
    new = tokenizer("Let me think now.</think>Three.", add_special_tokens=False)["input_ids"]
    trace = Trace.from_tokens(torch.tensor(prompt + new), len(prompt), tokenizer, question=" How? \n")
    assert trace.step_text(0) == "How?"
    assert trace.n_prompt == len(prompt)


def test_the_prompt_may_end_within_a_character() -> None:
    tokenizer = make_tokenizer("byte_level")
    prompt = tokenizer(render_prompt(tokenizer, "How?").text, add_special_tokens=False)["input_ids"]
    new = tokenizer("🎉 Now we think.</think>Yes.", add_special_tokens=False)["input_ids"]
    for n in range(len(prompt), len(prompt) + 4):
        trace = Trace.from_tokens(torch.tensor(prompt + new), n, tokenizer, question="How?")
        assert trace.n_prompt == n


class TestErrors:
    @pytest.fixture(scope="class")
    def chat(self) -> PreTrainedTokenizerFast:
        return make_tokenizer("chatml")

    @pytest.mark.parametrize(
        ("question", "response", "message"),
        [
            ("", RESPONSE, "question='' is empty"),
            (" \n", RESPONSE, "question=.* is empty"),
            (QUESTION, "", "response='' is empty"),
            (QUESTION, "<think></think>", "holds no step"),
        ],
    )
    def test_nothing_to_trace(self, chat: PreTrainedTokenizerFast, question: str, response: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Trace.from_text(question, response, chat)

    @pytest.mark.parametrize("code", [0xD83D, 0xDC4D])
    def test_half_a_character(self, chat: PreTrainedTokenizerFast, code: int) -> None:
        half = chr(code)
        with pytest.raises(ValueError, match=r"response holds half a character.*position 3.*read it as UTF-8"):
            Trace.from_text(QUESTION, f"So {half} it is.", chat)
        with pytest.raises(ValueError, match=r"question holds half a character"):
            Trace.from_text(f"So {half}?", RESPONSE, chat)

    def test_slow_tokenizer(self) -> None:
        from transformers import ByT5Tokenizer

        with pytest.raises(ValueError, match=r"ByT5Tokenizer gives no character offsets.*fast tokenizer"):
            Trace.from_text(QUESTION, RESPONSE, ByT5Tokenizer())

    def test_longer_than_the_context(self, mini: TransformerBridge) -> None:
        response = "Anna needs Hugo. " * 400
        with pytest.raises(
            ValueError, match=rf"the trace has \d{{4}} tokens but the model's context is {mini.cfg.n_ctx}"
        ):
            Trace.from_text("What is Anna?", response, mini)

    def test_marker_not_found(self, chat: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match=r"marker not found.*'FINAL'"):
            Trace.from_text(
                QUESTION, "No such thing here.", chat, segmentation=Segmentation(format=Format.with_marker("FINAL"))
            )
        with pytest.raises(ValueError, match=r"marker not found.*'</think>'"):
            Trace.from_text(QUESTION, "No such thing here.", chat, segmentation=Segmentation(format="think"))

    def test_unknown_format(self, chat: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match=r"format='thinking' is unknown.*with_marker"):
            Trace.from_text(QUESTION, RESPONSE, chat, segmentation=Segmentation(format="thinking"))

    def test_template_that_alters_the_question(self) -> None:
        tokenizer = make_tokenizer("chatml")
        tokenizer.chat_template = "{{ messages[-1]['content'] | upper }}"
        with pytest.raises(ValueError, match="altered the question"):
            Trace.from_text(QUESTION, RESPONSE, tokenizer)

    def test_tokens_of_another_question(self, chat: PreTrainedTokenizerFast) -> None:
        trace = Trace.from_text(QUESTION, RESPONSE, chat)
        with pytest.raises(ValueError, match=r"token/text mismatch.*'How many\?'"):
            Trace.from_tokens(trace.tokens, trace.n_prompt, chat, question="How many?")
        with pytest.raises(ValueError, match=r"n_prompt=0 must lie in 1\.\."):
            Trace.from_tokens(trace.tokens, 0, chat, question=QUESTION)

    def test_offsets_that_do_not_fit_the_text(self, chat: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match=r"token/text mismatch: token 1 \('b'\) claims characters 2..9 of 4"):
            check_offsets([(0, 2), (2, 9)], "abcd", ["a", "b"])
        with pytest.raises(ValueError, match=r"token 1 .*after 2"):
            check_offsets([(2, 3), (0, 1)], "abcd", ["a", "b"])


@pytest.mark.parametrize("question", ["Was ist cafe\u0301?", "How many \u2126 is it?"])
def test_a_question_that_the_tokenizer_normalises(question: str) -> None:
    tokenizer = make_tokenizer("byte_level", normalizers.NFC())
    ids = tokenizer(render_prompt(tokenizer, question).text)["input_ids"]
    new = tokenizer("First we look.</think>Then we know.")["input_ids"]
    trace = Trace.from_tokens(torch.tensor(ids + new), len(ids), tokenizer, question=question)
    assert trace.roles == ("question", "thinking", "summary")
    assert trace.step_text(0) == unicodedata.normalize("NFC", question)


def test_template_between_thinking_blocks_is_not_thinking() -> None:
    response = (
        "<|channel|>analysis<|message|>We think once.<|end|><|start|>assistant<|channel|>commentary<|message|>aside"
        "<|end|><|start|>assistant<|channel|>analysis<|message|>We think twice.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Done.<|return|>"
    )
    trace = Trace.from_text("How?", response, make_tokenizer("harmony"))
    assert trace.thinking == "We think once.\nWe think twice."
    assert trace.summary == "Done."
