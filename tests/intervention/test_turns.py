"""StepFlow in conversations and under switches of templates: the bridge goes to the question of its own turn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import char_tokenizer, tiny_chat

import stepsal
from stepsal.intervention.ledger import Ledger
from stepsal.trace import FORMATS, PromptFrame, Trace
from stepsal.trace.tracking import Section, SequenceTracker

STRONG = stepsal.StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.5, alpha=0.5)
THOUGHT = "Count them all first. Then count them all again.</think>Two."
HISTORY = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% else %}<assistant>{{ m.content }}<eos>"
    "{% endif %}{% endfor %}<assistant>"
)
TEMPLATES = {
    "BOS before the first turn": "<bos>" + HISTORY + "<think>",
    "a text before the first turn": "<bos>Think first, then answer.<eos>\n" + HISTORY + "<think>",
    "a switch between two markers": "<bos>" + HISTORY + "{% if thinking %}<think>{% else %}</think>{% endif %}",
    "an empty block": "<bos>" + HISTORY + "{% if thinking is false %}<think>\n\n</think>\n\n{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("n_turns", [1, 2, 3])
def test_the_bridge_goes_to_the_question_of_its_turn(name: str, n_turns: int) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    questions = ["How many?", "And why is that?", "Really?"][:n_turns]
    messages = [{"role": "user", "content": questions[0]}]
    for question in questions[1:]:
        messages += [{"role": "assistant", "content": f"<think>{THOUGHT}"}, {"role": "user", "content": question}]
    options = {"thinking": True} if "thinking" in TEMPLATES[name] else {}
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    text = prompt + ("" if prompt.endswith("<think>") else "<think>") + THOUGHT
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])[None]
    ledger = Ledger([SequenceTracker(tokenizer, PromptFrame.of(tokenizer), FORMATS["think"])], into_summary=True)
    portion = ledger.advance(ids, np.ones_like(ids, dtype=bool))
    groups, sections, keys = portion.groups, ledger.sections[0], np.arange(ids.shape[1])
    bridges: dict[int, set[str]] = {}  # texts of the bridge, by the beginning of the turn
    for row in keys[groups.bridge[0] == Section.QUESTION]:
        since = int(groups.since[0, row])
        bridge = keys[(sections == Section.QUESTION) & (keys >= since) & (keys <= row)]
        bridges.setdefault(since, set()).add(tokenizer.decode(ids[0, bridge]))
    assert list(bridges.values()) == [{question} for question in questions]
    # each step but the first of its turn follows the one before it in the same turn
    members = [tokenizer.decode(ids[0, positions]).strip() for positions in portion.members]
    assert members == ["Count them all first.", "Then count them all again."] * n_turns


@pytest.mark.parametrize(
    ("name", "chat", "thinks"),
    [
        ("a switch between two markers", {"thinking": True}, True),
        ("a switch between two markers", {"thinking": False}, False),
        ("a switch between two markers", {}, False),
        ("an empty block", {"thinking": True}, True),
        ("an empty block", {"thinking": False}, False),
        ("an empty block", {}, True),
    ],
)
def test_stepflow_fires_under_each_switch(name: str, chat: dict[str, bool], thinks: bool) -> None:
    """Where the thinking is shut from the beginning there is none to bridge from, nor a step in it to inject."""
    model = tiny_chat("Qwen2")
    model.tokenizer.chat_template = TEMPLATES[name]
    response = THOUGHT if thinks else "Count them all first. Then count them all again."
    trace = Trace.from_text("How many?", response, model, segmentation=stepsal.Segmentation("think"), chat=chat)
    assert ("thinking" in trace.roles) == thinks
    with torch.no_grad():
        plain = model(trace.tokens[None])
        with stepsal.stepflow(model, STRONG, segmentation=stepsal.Segmentation("think")) as log:
            edited = model(trace.tokens[None])
    assert log.without_question == 0
    assert (log.oeb["fired"].sum() > 0) == (log.smi["injections"].sum() > 0) == thinks
    first = trace.steps[1].start
    assert torch.equal(plain[0, :first], edited[0, :first])
    assert torch.equal(plain, edited) != thinks
    # an answer that is being written, of random tokens
    with stepsal.stepflow(model, STRONG, segmentation=stepsal.Segmentation("think")) as log:
        answer = stepsal.generate(model, "How many?", max_new_tokens=8, chat=chat)
    assert answer.chat == chat
    assert (log.sequences, log.without_question) == (1, 0)


def test_a_template_whose_later_questions_can_not_be_told() -> None:
    model = tiny_chat("Qwen2")
    model.tokenizer.chat_template = "<bos>{% for m in messages %}{{ m.content }}<assistant>{% endfor %}"
    message = r"no text before all questions of a conversation.*one question at a time"
    with (
        pytest.warns(UserWarning, match=message),
        stepsal.stepflow(model, segmentation=stepsal.Segmentation("think")) as log,
    ):
        stepsal.generate(model, "How many?", max_new_tokens=8)
    assert log.without_question == 0
