"""How steps are found: the format of answers still to be written, and one segmentation for all that work together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from strong_flow import RESPONSE
from tiny_models import char_tokenizer, tiny_chat, tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import Segmentation, StepFlowConfig, Trace
from stepsal.generation.answers import Answered, answer_each
from stepsal.generation.scoring import log_probabilities
from stepsal.intervention import active_flow, agreed_segmentation
from stepsal.intervention.segmentation import agreement, common_segmentation, resolved_segmentation
from stepsal.trace import FORMATS, Format

QUESTION = "Anna is 1 plus 1. What is Anna?"
PLAIN_TEMPLATE = "<bos>{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"


def tiny(
    name: str,
    template: str | None = None,
    architecture: str = "Llama",
    markers: tuple[str, str] = ("<think>", "</think>"),
) -> TransformerBridge:
    tokenizer = char_tokenizer(markers)
    if template is not None:
        tokenizer.chat_template = template
    hf_model = tiny_hf_model(architecture, max_position_embeddings=512)
    return stepsal.load(name, hf_model=hf_model, tokenizer=tokenizer)


class TestResolvedFormat:
    @pytest.mark.parametrize(
        ("name", "template", "architecture", "expected"),
        [
            ("openai/gpt-oss-20b", PLAIN_TEMPLATE, "Llama", "harmony"),
            ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", PLAIN_TEMPLATE, "Llama", "think"),
            ("smollm2", None, "Llama", "plain"),  # the name tells more than what the prompt opens
            ("tiny", "{{ messages[0].content }}<|start|>assistant{# <|channel|> #}", "Llama", "harmony"),
            ("tiny", "{{ messages[0].content }}<a>{% if x %}</think>{% endif %}", "Llama", "think"),
            ("tiny", PLAIN_TEMPLATE, "Qwen3", "think"),
            ("tiny", PLAIN_TEMPLATE, "GptOss", "harmony"),
            ("tiny", "{{ messages[0].content }}<a><think>\n", "Llama", "think"),
            ("tiny", PLAIN_TEMPLATE, "Llama", "think"),
        ],
    )
    def test_it_is_told_by_name_template_architecture_prompt_and_vocabulary(
        self, name: str, template: str | None, architecture: str, expected: str
    ) -> None:
        model = tiny(name, template, architecture)
        with stepsal.stepflow(model, segmentation=Segmentation(split="line")):
            assert active_flow(model).segmentation == Segmentation(expected, split="line")

    @pytest.mark.parametrize(
        ("end", "markers", "expected"),
        [
            ("", ("<a>", "<b>"), "plain"),
            ("", ("[THINK]", "[/THINK]"), "magistral"),
            ("<seed:think>", ("<a>", "<b>"), "seed-oss"),
            ("<think>", ("[THINK]", "[/THINK]"), "magistral"),
        ],
    )
    def test_markers_of_any_format_tell_it(self, end: str, markers: tuple[str, str], expected: str) -> None:
        model = tiny("tiny", "{{ messages[0].content }}<assistant>" + end, markers=markers)
        assert resolved_segmentation(Segmentation(), model, "<assistant>" + end).format == expected
        common = common_segmentation(Segmentation(), model).format
        assert common == ("auto" if expected == "plain" else expected)

    def test_a_named_format_stays(self) -> None:
        model, own = tiny("openai/gpt-oss-20b"), Format.with_marker("Answer:")
        for format in ("think", "plain", own):
            assert resolved_segmentation(Segmentation(format), model, "<think>").format == format
            with stepsal.stepflow(model, segmentation=Segmentation(format)):
                assert active_flow(model).segmentation.format == format


class TestAgreement:
    CURRENT = Segmentation("think", split="line", min_chars=3)

    @pytest.mark.parametrize(
        ("current", "requested"),
        [
            (CURRENT, None),
            (CURRENT, CURRENT),
            (CURRENT, Segmentation("auto", split="line", min_chars=3)),
            (Segmentation("think", split=r"\d"), Segmentation("think", split=r"\d")),
            (Segmentation("think"), Segmentation(stepsal.trace.FORMATS["think"])),
            (Segmentation(Format.with_marker("So:")), Segmentation(Format.with_marker("So:"))),
            (Segmentation(Format.with_marker("So:")), Segmentation()),
        ],
    )
    def test_the_same(self, current: Segmentation, requested: Segmentation | None) -> None:
        assert agreement(current, requested) is current

    @pytest.mark.parametrize(
        "requested",
        [
            Segmentation(),
            Segmentation("auto", split="line"),
            Segmentation("harmony", split="line", min_chars=3),
            Segmentation(Format.with_marker("So:"), split="line", min_chars=3),
            Segmentation("think", split=re.compile("line"), min_chars=3),
            Segmentation("think", split="sentence", min_chars=3),
        ],
    )
    def test_others_are_refused_by_name(self, requested: Segmentation) -> None:
        with pytest.raises(ValueError, match="use the same segmentation for both") as error:
            agreement(self.CURRENT, requested)
        assert str(self.CURRENT) in str(error.value)
        assert str(requested) in str(error.value)

    def test_no_open_context(self, mini: TransformerBridge) -> None:
        assert agreed_segmentation(mini, None) is None
        assert agreed_segmentation(mini, self.CURRENT) is self.CURRENT


class TestUnderAnOpenContext:
    def test_generate(self, mini: TransformerBridge) -> None:
        with stepsal.stepflow(mini, segmentation=Segmentation(split="line")):
            trace = stepsal.generate(mini, QUESTION, max_new_tokens=4)
            assert trace.segmentation == Segmentation("think", split="line")
            assert stepsal.generate(mini, QUESTION, max_new_tokens=4, segmentation=trace.segmentation) is not None
            with pytest.raises(ValueError, match="use the same segmentation"):
                stepsal.generate(mini, QUESTION, max_new_tokens=4, segmentation=Segmentation())

    def test_step_saliency(self) -> None:
        model = tiny_chat("Qwen2")
        traces = [Trace.from_text("How many?", RESPONSE, model, segmentation=Segmentation(split=split))
                  for split in ("line", "sentence")]  # fmt: skip
        with stepsal.stepflow(model, segmentation=Segmentation(split="line")):
            stepsal.step_saliency(model, traces[0])
            with pytest.raises(ValueError, match="use the same segmentation"):
                stepsal.step_saliency(model, traces[1])

    def test_step_saliency_follows_the_trace(self) -> None:
        model = tiny_chat("Qwen2")
        own = Segmentation(Format.with_marker("So we"), split="line")
        trace = Trace.from_text("How many?", RESPONSE, model, segmentation=own)
        config = StepFlowConfig(tau_max=0.5, alpha=0.5)
        with stepsal.stepflow(model, config, segmentation=own):
            expected = stepsal.step_saliency(model, trace)
        assert stepsal.step_saliency(model, trace, stepflow=config).values.equal(expected.values)

    def test_log_probabilities(self, mini: TransformerBridge) -> None:
        trace = stepsal.Trace.from_text("What is Anna?", "Anna is 3.</think>3.", mini)
        with (
            stepsal.stepflow(mini, segmentation=Segmentation(split="paragraph")),
            pytest.raises(ValueError, match="use the same segmentation for both"),
        ):
            log_probabilities(mini, trace)

    def test_a_format_agrees_by_name_and_by_value(self, mini: TransformerBridge) -> None:
        traces = [
            stepsal.Trace.from_text("What is Anna?", "Anna is 3.</think>3.", mini, segmentation=Segmentation(format))
            for format in ("think", FORMATS["think"])
        ]
        one, other = stepsal.step_saliency(mini, traces, stepflow=StepFlowConfig())
        assert torch.equal(one.values, other.values)
        assert one.metadata["segmentation"] == Segmentation("think").to_dict()


class TestCommonSegmentation:
    """With and without StepFlow, answers of a known model are cut by one rule."""

    def test_it_is_told_by_the_model(self, mini: TransformerBridge) -> None:
        assert common_segmentation(Segmentation(split="line"), mini) == Segmentation("think", split="line")
        assert common_segmentation(Segmentation("plain"), mini) == Segmentation("plain")

    def test_it_stays_open_where_the_model_does_not_tell(self) -> None:
        model = tiny("model", PLAIN_TEMPLATE, markers=("<a>", "<b>"))
        assert common_segmentation(Segmentation(), model) == Segmentation()

    def test_variants_with_and_without_stepflow_have_it(self, mini: TransformerBridge, tmp_path: Path) -> None:
        config = StepFlowConfig()
        variants = [stepsal.Variant("plain"), stepsal.Variant("StepFlow", stepflow=config)]
        formats: list[object] = []

        def seen(
            model: TransformerBridge, questions: list[str], decoding: object, **options: Any
        ) -> Iterator[Answered]:
            formats.append(options["segmentation"].format)
            return answer_each(model, questions, decoding, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stepsal.experiments.evaluate.answer_each", seen)
            stepsal.evaluate(
                mini, stepsal.tasks.chain.ChainTask(length=1), variants, 1, folder=tmp_path, progress=False,
                decoding=stepsal.Decoding(max_new_tokens=4),
            )  # fmt: skip
        assert formats == ["think", "think"]
