"""The equivalence contract: a text in one pass, the same text decoded from a cache, and a row of a batch alone."""

from __future__ import annotations

import pytest
import torch
from forward_passes import decoded, logits_of
from strong_flow import HEADS, RESPONSE, STRONG, THINK
from tiny_models import ARCHITECTURES, tiny_chat, tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import StepFlowConfig
from stepsal.tasks import chain
from stepsal.trace import Trace


@pytest.fixture(scope="module")
def text_trace(tiny_with_text: TransformerBridge) -> Trace:
    return Trace.from_text("How many of them are there?", RESPONSE, tiny_with_text)


class TestEquivalence:
    """A teacher-forced pass under StepFlow gives what cached decoding under StepFlow gives."""

    @pytest.mark.slow
    @pytest.mark.parametrize("start", ["token by token", "prompt", "part of the thinking"])
    def test_on_every_architecture(self, tiny_with_text: TransformerBridge, text_trace: Trace, start: str) -> None:
        model, tokens = tiny_with_text, text_trace.tokens[None]
        n_first = {"token by token": 1, "prompt": text_trace.n_prompt, "part of the thinking": text_trace.n_prompt + 50}
        plain = logits_of(model, tokens)
        with stepsal.stepflow(model, STRONG, segmentation=THINK) as log:
            full = logits_of(model, tokens)
        with stepsal.stepflow(model, STRONG, segmentation=THINK) as log_of_decoding:
            step_by_step = decoded(model, tokens, n_first[start])
        assert (full - plain).abs().max() > 0.05  # it does something
        assert (step_by_step - full).abs().max() <= 1e-4
        assert log.oeb[["rows", "fired"]].equals(log_of_decoding.oeb[["rows", "fired"]])
        assert log.oeb["fired"].sum() > 0
        assert (log.smi["injections"] == 4).all()
        assert (log_of_decoding.smi["injections"] == 4).all()

    @pytest.mark.parametrize(
        "changes",
        [{"window": 2}, {"bridge": "prompt"}, {"oeb_layers": ()}, {"smi_layers": ()},
         {"oeb_layers": HEADS.oeb_layers, "smi_layers": HEADS.smi_layers}],
    )  # fmt: skip
    def test_with_other_settings(self, changes: dict) -> None:
        model, config = tiny_chat("Qwen2"), STRONG.but(**changes)
        trace = Trace.from_text("How many?", RESPONSE, model)
        with stepsal.stepflow(model, config, segmentation=THINK):
            full = logits_of(model, trace.tokens[None])
            step_by_step = decoded(model, trace.tokens[None], trace.n_prompt)
        assert (full - logits_of(model, trace.tokens[None])).abs().max() > 0.01
        assert (step_by_step - full).abs().max() <= 1e-4

    def test_on_the_embedded_reasoner(self, mini: TransformerBridge) -> None:
        problem = chain.sample(4, length=4)
        trace = Trace.from_text(problem.question, problem.solution(), mini)
        config = StepFlowConfig(tau_max=0.3, alpha=0.3)
        with stepsal.stepflow(mini, config):
            full = logits_of(mini, trace.tokens[None])
            step_by_step = decoded(mini, trace.tokens[None], trace.n_prompt)
        assert (step_by_step - full).abs().max() <= 1e-4

    def test_on_the_real_model(self, smollm2: TransformerBridge) -> None:
        trace = Trace.from_text(
            "How many legs have 3 cats?", "A cat has four legs. We multiply by three. So twelve.", smollm2
        )
        with stepsal.stepflow(smollm2, StepFlowConfig(tau_max=0.3, alpha=0.2)) as log:
            full = logits_of(smollm2, trace.tokens[None])
            step_by_step = decoded(smollm2, trace.tokens[None], trace.n_prompt)
        assert (step_by_step - full).abs().max() <= 1e-4
        assert log.oeb["fired"].sum() > 0

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "text",
        [
            "<bos><user>How many?<assistant><think>"
            + RESPONSE
            + " It is said:\n<user>And why?<assistant><think>"
            + RESPONSE,
            "<bos><user>How many?<assistant><think>" + RESPONSE + "<user> and no more",
            "<bos><user>How many?<assistant>Two.\n<user>And why is that?<assistant><think>" + RESPONSE,
        ],
        ids=["two turns", "an opening in the response", "a history without thinking"],
    )
    @pytest.mark.parametrize("architecture", ["Qwen2", "Gemma2"])
    def test_conversations(self, architecture: str, text: str) -> None:
        model = tiny_chat(architecture)
        tokens = torch.tensor(model.tokenizer(text)["input_ids"])[None]
        with stepsal.stepflow(model, STRONG, segmentation=THINK) as log:
            full = logits_of(model, tokens)
            fired = log.oeb["fired"].sum()
            for n_first in (60, 200):
                assert (decoded(model, tokens, n_first) - full).abs().max() <= 1e-4
        assert fired > 0
        assert (full - logits_of(model, tokens)).abs().max() > 0.05

    def test_a_padded_second_portion(self) -> None:
        """The mask tells padding in every pass, not only in the first one."""
        model = tiny_chat("Qwen2")
        traces = [Trace.from_text("How many?", r, model) for r in (RESPONSE, RESPONSE[:90])]
        n_first, n_second = traces[0].n_prompt, len(traces[0]) - traces[0].n_prompt
        tokens = torch.full((2, n_first + n_second), model.tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for row, trace in enumerate(traces):
            n = len(trace) - n_first
            for part in (tokens, mask):
                part[row, :n_first] = trace.tokens[:n_first] if part is tokens else 1
                part[row, n_first + n_second - n :] = trace.tokens[n_first:] if part is tokens else 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        options: dict = {"return_type": "logits_and_cache", "use_cache": True}
        with torch.no_grad(), stepsal.stepflow(model, STRONG, segmentation=THINK):
            _, cache = model(tokens[:, :n_first], attention_mask=mask[:, :n_first], **options)
            logits, _ = model(
                tokens[:, n_first:], attention_mask=mask, position_ids=positions[:, n_first:], past_key_values=cache,
                **options,
            )  # fmt: skip
            alone = logits_of(model, traces[1].tokens[None])[0]
        n = len(traces[1]) - n_first
        assert (logits[1, -n:] - alone[n_first:]).abs().max() <= 1e-4

    def test_rows_of_a_left_padded_batch_equal_the_same_rows_alone(self, tiny_with_text: TransformerBridge) -> None:
        model = tiny_with_text
        questions = ["How many of them are there?", "Why?", "And what is it?"]
        responses = [RESPONSE, RESPONSE[34:], "We think about it for a while. Then we stop.</think>Done."]
        traces = [Trace.from_text(q, r, model) for q, r in zip(questions, responses, strict=True)]
        width = max(len(t) for t in traces)
        tokens = torch.full((3, width), model.tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for row, trace in enumerate(traces):
            tokens[row, width - len(trace) :] = trace.tokens
            mask[row, width - len(trace) :] = 1
        with stepsal.stepflow(model, STRONG, segmentation=THINK):
            together = logits_of(model, tokens, attention_mask=mask)
            one_by_one = decoded(model, tokens, width - 40, mask)
            for row, trace in enumerate(traces):
                alone = logits_of(model, trace.tokens[None])[0]
                assert (together[row, width - len(trace) :] - alone).abs().max() <= 1e-4
                assert (one_by_one[row, width - len(trace) :] - alone).abs().max() <= 1e-4

    @pytest.mark.parametrize("architecture", ["Qwen2", "GptOss"])
    def test_in_bfloat16(self, architecture: str) -> None:
        hf_model = tiny_hf_model(architecture, max_position_embeddings=512)
        tokenizer = tiny_chat(architecture).tokenizer
        exact = stepsal.load("tiny", hf_model=hf_model, tokenizer=tokenizer)
        trace = Trace.from_text("How many?", RESPONSE, exact)
        config = STRONG.but(tau_max=0.2, alpha=0.2)
        with stepsal.stepflow(exact, config, segmentation=THINK):
            reference = logits_of(exact, trace.tokens[None])
        half = stepsal.load("tiny", hf_model=tiny_hf_model(architecture, max_position_embeddings=512),
                            tokenizer=tokenizer, dtype=torch.bfloat16)  # fmt: skip
        rounding = float((logits_of(half, trace.tokens[None]).float() - logits_of(exact, trace.tokens[None])).norm())
        with stepsal.stepflow(half, config, segmentation=THINK):
            full = logits_of(half, trace.tokens[None]).float()
            step_by_step = decoded(half, trace.tokens[None], trace.n_prompt).float()
        # no further off than bfloat16 itself is, give or take its own noise
        assert float((full - reference).norm()) <= 2 * rounding
        assert float((step_by_step - reference).norm()) <= 2 * rounding


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(STRONG.but(alpha=0.0, oeb_layers=()), marks=pytest.mark.nightly),
        pytest.param(STRONG.but(tau_max=1e-30, smi_layers=()), marks=pytest.mark.nightly),
        STRONG.but(tau_max=1e-30, alpha=0.0),
    ],
)
def test_nothing_to_do_changes_no_bit(
    tiny_with_text: TransformerBridge, text_trace: Trace, config: StepFlowConfig
) -> None:
    tokens, n_prompt = text_trace.tokens[None], text_trace.n_prompt
    plain, plain_decoded = logits_of(tiny_with_text, tokens), decoded(tiny_with_text, tokens, n_prompt)
    with stepsal.stepflow(tiny_with_text, config, segmentation=THINK):
        assert torch.equal(logits_of(tiny_with_text, tokens), plain)
        assert torch.equal(decoded(tiny_with_text, tokens, n_prompt), plain_decoded)


def test_every_architecture_is_covered() -> None:
    assert {"Qwen2", "Llama", "Qwen3", "Gemma2", "GptOss"} <= set(ARCHITECTURES)
