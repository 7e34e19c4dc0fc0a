"""StepFlow in real forward passes: the equivalence contract, independent recomputation, and what is left behind."""

from __future__ import annotations

import json

import brute_force
import pandas as pd
import pytest
import torch
from tiny_models import ARCHITECTURES, char_tokenizer, tiny_chat, tiny_hf_model
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

import stepsal
from stepsal import StepFlowConfig
from stepsal.bridge.attention import sliding_window
from stepsal.bridge.hooks import attention_hooks
from stepsal.intervention import active_flow
from stepsal.tasks import chain
from stepsal.trace import Trace

# far stronger than the defaults, and in every layer: what is wrong must show
STRONG = StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.5, alpha=0.8, into_summary=True, format="think")
RESPONSE = (
    "First we read the list of names. Then we count 3.5 of them, e.g. twice. The sum of it is seven.\n\n"
    "So we have it now.</think>The answer is seven. That is all of it."
)


def logits_of(model: TransformerBridge, tokens: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options)


def decoded(model: TransformerBridge, tokens: Tensor, n_first: int, mask: Tensor | None = None) -> Tensor:
    """Logits of the same tokens, the first ones at once and then one by one from the cache."""
    options: dict = {"return_type": "logits_and_cache", "use_cache": True}
    masks = torch.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        logits, cache = model(tokens[:, :n_first], attention_mask=masks[:, :n_first], **options)
        parts = [logits]
        for i in range(n_first, tokens.shape[1]):
            logits, cache = model(
                tokens[:, i : i + 1], attention_mask=masks[:, : i + 1], past_key_values=cache, **options
            )
            parts.append(logits)
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def text_trace(tiny_with_text: TransformerBridge) -> Trace:
    return Trace.from_text("How many of them are there?", RESPONSE, tiny_with_text)


class TestEquivalence:
    """A teacher-forced pass under StepFlow gives what cached decoding under StepFlow gives."""

    @pytest.mark.parametrize("start", ["token by token", "prompt", "part of the thinking"])
    def test_on_every_architecture(self, tiny_with_text: TransformerBridge, text_trace: Trace, start: str) -> None:
        model, tokens = tiny_with_text, text_trace.tokens[None]
        n_first = {"token by token": 1, "prompt": text_trace.n_prompt, "part of the thinking": text_trace.n_prompt + 50}
        plain = logits_of(model, tokens)
        with stepsal.stepflow(model, STRONG) as log:
            full = logits_of(model, tokens)
        with stepsal.stepflow(model, STRONG) as log_of_decoding:
            step_by_step = decoded(model, tokens, n_first[start])
        assert (full - plain).abs().max() > 0.05  # it does something
        assert (step_by_step - full).abs().max() <= 1e-4
        assert log.oeb[["rows", "fired"]].equals(log_of_decoding.oeb[["rows", "fired"]])
        assert log.oeb["fired"].sum() > 0
        assert (log.smi["injections"] == 4).all()
        assert (log_of_decoding.smi["injections"] == 4).all()

    @pytest.mark.parametrize(
        "changes", [{"window": 2}, {"bridge": "prompt"}, {"oeb_layers": None}, {"smi_layers": None}]
    )
    def test_with_other_settings(self, changes: dict) -> None:
        model, config = tiny_chat("Qwen2"), STRONG.but(**changes)
        trace = Trace.from_text("How many?", RESPONSE, model)
        with stepsal.stepflow(model, config):
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
        with stepsal.stepflow(model, STRONG) as log:
            full = logits_of(model, tokens)
            fired = log.oeb["fired"].sum()
            for n_first in (1, 60, 200):
                assert (decoded(model, tokens, n_first) - full).abs().max() <= 1e-4
        assert fired > 0
        assert (full - logits_of(model, tokens)).abs().max() > 0.05

    def test_the_last_turn_alone_has_the_question(self) -> None:
        """What a turn is edited by does not depend on the words of the turns before it."""
        model = tiny_chat("Qwen2")
        seen: list[tuple] = []

        def look(pattern: Tensor, hook: object) -> None:
            bridging = active_flow(model)._bridging
            seen.append((bridging.bridge, bridging.segment))

        turn = "<user>And why is that?<assistant><think>" + RESPONSE
        for history in ("<bos><user>How many?<assistant><think>Two of them are here.</think>Two.\n", "<bos>"):
            with stepsal.stepflow(model, STRONG), model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", look)]):
                logits_of(model, torch.tensor(model.tokenizer(history + turn)["input_ids"])[None])
        n = len(model.tokenizer(turn)["input_ids"])
        for after, alone in zip(*seen, strict=True):
            assert torch.equal(after[:, -n:, -n:], alone[:, -n:, -n:])
            assert not after[:, -n:, :-n].any()

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
        with torch.no_grad(), stepsal.stepflow(model, STRONG):
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
        with stepsal.stepflow(model, STRONG):
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
        with stepsal.stepflow(exact, config):
            reference = logits_of(exact, trace.tokens[None])
        half = stepsal.load("tiny", hf_model=tiny_hf_model(architecture, max_position_embeddings=512),
                            tokenizer=tokenizer, dtype=torch.bfloat16)  # fmt: skip
        rounding = float((logits_of(half, trace.tokens[None]).float() - logits_of(exact, trace.tokens[None])).norm())
        with stepsal.stepflow(half, config):
            full = logits_of(half, trace.tokens[None]).float()
            step_by_step = decoded(half, trace.tokens[None], trace.n_prompt).float()
        # no further off than bfloat16 itself is, give or take its own noise
        assert float((full - reference).norm()) <= 2 * rounding
        assert float((step_by_step - reference).norm()) <= 2 * rounding


@pytest.mark.parametrize("config", [STRONG.but(alpha=0.0, oeb_layers=None), STRONG.but(tau_max=1e-30, smi_layers=None),
                                    STRONG.but(tau_max=1e-30, alpha=0.0)])  # fmt: skip
def test_nothing_to_do_changes_no_bit(
    tiny_with_text: TransformerBridge, text_trace: Trace, config: StepFlowConfig
) -> None:
    tokens, n_prompt = text_trace.tokens[None], text_trace.n_prompt
    plain, plain_decoded = logits_of(tiny_with_text, tokens), decoded(tiny_with_text, tokens, n_prompt)
    with stepsal.stepflow(tiny_with_text, config):
        assert torch.equal(logits_of(tiny_with_text, tokens), plain)
        assert torch.equal(decoded(tiny_with_text, tokens, n_prompt), plain_decoded)


class TestAgainstRecomputation:
    """Edits recomputed from the definition: the trace's own steps, loops over rows, heads and tokens."""

    @pytest.fixture(scope="class")
    def before_and_after(self, tiny_with_text: TransformerBridge) -> tuple[Trace, list, list, object]:
        """Pattern, z and v of each layer as the model computes them and as the edits leave them."""
        model = tiny_with_text
        trace = Trace.from_text("How many of them are there?", RESPONSE, model)
        before: list[dict[str, Tensor]] = [{} for _ in range(model.cfg.n_layers)]
        after: list[dict[str, Tensor]] = [{} for _ in range(model.cfg.n_layers)]

        def saver(store: dict[str, Tensor], kind: str) -> object:
            def hook(x: Tensor, hook: object) -> None:
                store[kind] = x[0].detach().clone()

            return hook

        def hooks(stores: list) -> list:
            return [
                (name, saver(store, kind))
                for layer, store in enumerate(stores)
                for kind, name in attention_hooks(layer).items()
                if kind in ("pattern", "z", "v")
            ]

        with (
            model.hooks(fwd_hooks=hooks(before)),
            stepsal.stepflow(model, STRONG) as log,
            model.hooks(fwd_hooks=hooks(after)),
        ):
            logits_of(model, trace.tokens[None])
        return trace, before, after, log

    def test_oeb(self, tiny_with_text: TransformerBridge, before_and_after: tuple) -> None:
        trace, before, after, log = before_and_after
        role = [None if i < 0 else trace.roles[i] for i in trace.step_ids.tolist()]
        bridge_role = {"thinking": "question", "summary": "thinking"}
        fired = torch.zeros(tiny_with_text.cfg.n_layers, tiny_with_text.cfg.n_heads, dtype=torch.long)
        for layer, (b, a) in enumerate(zip(before, after, strict=True)):
            window = sliding_window(tiny_with_text, layer) or len(role)
            for t in range(len(role)):
                visible = range(max(0, t - window + 1), t + 1)
                bridge = [k for k in visible if role[t] in bridge_role and role[k] == bridge_role[role[t]]]
                segment = [k for k in visible if role[t] in bridge_role and role[k] == role[t]]
                p = b["pattern"][:, t].double()  # [head, key_pos]
                expected = p.clone()
                if bridge and segment:
                    ceiling = min((len(bridge) / (len(bridge) + len(segment))) ** 0.5, STRONG.tau_max)
                    for head in range(len(p)):
                        p_b, p_s = float(p[head, bridge].sum()), float(p[head, segment].sum())
                        tau = min(ceiling, (p_b + p_s) / 2)
                        if 0 < p_b < tau * (1 - 1e-6):
                            expected[head, bridge] *= tau / p_b
                            expected[head, segment] *= (p_b + p_s - tau) / p_s
                            fired[layer, head] += 1
                torch.testing.assert_close(a["pattern"][:, t].double(), expected, atol=2e-6, rtol=1e-4)
        logged = torch.tensor(log.oeb["fired"].to_numpy().reshape(fired.shape))
        assert (logged - fired).abs().max() <= 1  # a row within rounding of its ceiling may go either way
        assert fired.sum() > 100

    def test_smi(self, before_and_after: tuple) -> None:
        trace, before, after, log = before_and_after
        response = [i for i, step in enumerate(trace.steps) if step.role != "question"]
        norms = torch.zeros(len(before))
        n = 0
        for i, previous in zip(response[1:], response, strict=False):
            if trace.roles[previous] != "thinking":
                continue
            n += 1
            t, keys = trace.steps[i].start, (trace.step_ids == previous).nonzero().flatten().tolist()
            for layer, (b, a) in enumerate(zip(before, after, strict=True)):
                group = b["z"].shape[1] // b["v"].shape[1]
                added = torch.zeros_like(b["z"][t])
                for head in range(len(added)):
                    added[head] = STRONG.alpha * sum(b["v"][k, head // group] for k in keys) / len(keys)
                torch.testing.assert_close(a["z"][t] - b["z"][t], added, atol=2e-6, rtol=1e-4)
                norms[layer] += added.norm()
        assert n == 4
        starts = [trace.steps[i].start for i in response[1:] if trace.roles[i - 1] == "thinking"]
        others = [t for t in range(len(trace)) if t not in starts]
        for b, a in zip(before, after, strict=True):
            assert torch.equal(a["z"][others], b["z"][others])
        torch.testing.assert_close(torch.tensor(log.smi["mean_norm"].to_numpy()).float(), norms / n, rtol=1e-4, atol=0)

    def test_the_mean_bridge_mass(self, tiny_with_text: TransformerBridge, before_and_after: tuple) -> None:
        trace, before, after, log = before_and_after
        layer = next(i for i in range(tiny_with_text.cfg.n_layers) if sliding_window(tiny_with_text, i) is None)
        role = [None if i < 0 else trace.roles[i] for i in trace.step_ids.tolist()]
        rows = [t for t, r in enumerate(role) if r in ("thinking", "summary")]
        for store, column in ((before, "bridge_before"), (after, "bridge_after")):
            mass = torch.zeros(tiny_with_text.cfg.n_heads)
            for t in rows:
                bridge = [k for k in range(t) if role[k] == {"thinking": "question", "summary": "thinking"}[role[t]]]
                mass += store[layer]["pattern"][:, t, bridge].sum(-1)
            logged = log.oeb[log.oeb["layer"] == layer]
            torch.testing.assert_close(
                torch.tensor(logged[column].to_numpy()).float(), mass / len(rows), rtol=1e-4, atol=1e-6
            )
            assert (logged["rows"] == len(rows)).all()


@pytest.mark.parametrize("target", ["token", "sequence"])
@pytest.mark.parametrize("nested", [False, True])
def test_saliency_under_stepflow(tiny_with_text: TransformerBridge, target: str, nested: bool) -> None:
    trace = Trace.from_text("How many?", RESPONSE[:70], tiny_with_text)
    if nested:
        with stepsal.stepflow(tiny_with_text, STRONG):
            saliency = stepsal.step_saliency(tiny_with_text, trace, target=target, keep_tokens=True)
    else:
        saliency = stepsal.step_saliency(tiny_with_text, trace, target=target, keep_tokens=True, stepflow=STRONG)
    with stepsal.stepflow(tiny_with_text, STRONG):
        expected = brute_force.token_saliency(tiny_with_text, trace.tokens, target)
    for got, wanted in zip(saliency.token_values, expected, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    plain = stepsal.step_saliency(tiny_with_text, trace, target=target)
    assert not torch.allclose(saliency.values, plain.values, rtol=0.01)
    assert saliency.metadata["stepflow"] == STRONG.to_dict()
    assert "stepflow" not in plain.metadata


class TestGeneration:
    def test_the_context_and_the_argument_agree(self, mini: TransformerBridge) -> None:
        problem, config = chain.sample(11, length=5), StepFlowConfig(tau_max=0.4, alpha=0.5)
        plain = stepsal.generate(mini, problem.question, max_new_tokens=150)
        edited = stepsal.generate(mini, problem.question, max_new_tokens=150, stepflow=config)
        with stepsal.stepflow(mini, config):
            inside = stepsal.generate(mini, problem.question, max_new_tokens=150)
            prompt = inside.tokens[None, : inside.n_prompt]
            by_the_bridge = mini.generate(
                prompt, max_new_tokens=len(inside) - inside.n_prompt, do_sample=False, return_type="tokens",
                verbose=False, stop_at_eos=False,
            )  # fmt: skip
        assert torch.equal(edited.tokens, inside.tokens)
        assert torch.equal(by_the_bridge[0], inside.tokens)
        assert not torch.equal(edited.tokens, plain.tokens)

    def test_a_batch_whose_rows_finish_at_different_times(self, mini: TransformerBridge) -> None:
        problems = [chain.sample(seed, length=length) for seed, length in ((1, 4), (2, 1), (3, 3), (4, 2))]
        config = StepFlowConfig(tau_max=0.2, alpha=0.2)
        batch = stepsal.generate_batch(mini, [p.question for p in problems], stepflow=config, max_new_tokens=160)
        assert len({len(trace) - trace.n_prompt for trace in batch}) > 1
        for problem, trace in zip(problems, batch, strict=True):
            alone = stepsal.generate(mini, problem.question, stepflow=config, max_new_tokens=160)
            assert torch.equal(alone.tokens, trace.tokens)


class TestNothingIsLeftBehind:
    @staticmethod
    def state(model: TransformerBridge) -> tuple:
        return (
            {name: len(point.fwd_hooks) + len(point.bwd_hooks) for name, point in model.hook_dict.items()},
            {name: len(module._forward_hooks) for name, module in model.named_modules()},
            len(model.original_model._forward_pre_hooks),
            active_flow(model),
        )

    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    def test_hooks_and_logits(self, error: type | None) -> None:
        model = tiny_chat("Qwen2")
        tokens = Trace.from_text("How many?", RESPONSE, model).tokens[None]
        calls = []
        model.blocks[0].attn.hook_pattern.add_hook(lambda x, hook: calls.append(hook.name))
        before, plain = self.state(model), logits_of(model, tokens)
        if error:

            def fail(x: Tensor, hook: object) -> None:
                raise error

            with (
                pytest.raises(error),
                stepsal.stepflow(model, STRONG),
                model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", fail)]),
            ):
                logits_of(model, tokens)
        else:
            with stepsal.stepflow(model, STRONG):
                logits_of(model, tokens)
        assert self.state(model) == before
        assert torch.equal(logits_of(model, tokens), plain)
        assert len(calls) == 3  # plain twice, and once inside

    def test_a_hook_of_the_users_that_changes_the_model(self) -> None:
        model = tiny_chat("Qwen2")
        tokens = Trace.from_text("How many?", RESPONSE, model).tokens[None]

        def ablate(z: Tensor, hook: object) -> Tensor:
            return z.index_fill(2, torch.tensor([1]), 0.0)

        with stepsal.stepflow(model, STRONG):
            edited = logits_of(model, tokens)
        with model.hooks(fwd_hooks=[("blocks.1.attn.o.hook_in", ablate)]):
            ablated = logits_of(model, tokens)
            with stepsal.stepflow(model, STRONG):
                both = logits_of(model, tokens)
        for other in (edited, ablated):
            assert (both - other).abs().max() > 0.01

    def test_two_models_at_once(self) -> None:
        first, second = tiny_chat("Qwen2"), tiny_chat("Llama")
        with stepsal.stepflow(first, STRONG), stepsal.stepflow(second, STRONG):
            assert active_flow(first) is not active_flow(second)


class TestErrors:
    def test_nesting(self, mini: TransformerBridge) -> None:
        with stepsal.stepflow(mini) as log, pytest.raises(ValueError, match="stepflow is open on 'mini' already"):
            stepsal.generate(mini, "Anna is 1 plus 1. What is Anna?", stepflow=StepFlowConfig())
        assert log.sequences == 0
        with stepsal.stepflow(mini):  # the failed try has not closed or blocked anything
            pass

    def test_no_tokenizer(self) -> None:
        model = stepsal.load("tiny", hf_model=tiny_hf_model("Llama"))
        with pytest.raises(ValueError, match="'tiny' has no tokenizer"), stepsal.stepflow(model):
            pass

    def test_a_layer_that_does_not_exist(self, mini: TransformerBridge) -> None:
        config = StepFlowConfig(oeb_layers=[99])
        with pytest.raises(ValueError, match=r"oeb_layers=\[99\]: the model has no layer 99"):
            stepsal.generate(mini, "Anna is 1 plus 1. What is Anna?", stepflow=config)

    def test_a_pattern_that_cannot_be_edited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hf_model = tiny_hf_model("Qwen2", max_position_embeddings=512)
        model = build_bridge_from_module(  # not by stepsal.load, which has tried the model out already
            hf_model, "Qwen2ForCausalLM", hf_config=hf_model.config, tokenizer=None, model_name="tiny"
        )
        model.tokenizer = char_tokenizer()
        monkeypatch.setattr(model.blocks[1].attn, "_pre_output_projection", lambda z: 2 * z)  # as a norm there would
        with pytest.raises(ValueError, match="not supported: layer 1"), stepsal.stepflow(model):
            pass
        assert active_flow(model) is None

    def test_a_cache_from_before_the_context(self, mini: TransformerBridge) -> None:
        tokens = Trace.from_text("Anna is 1 plus 1. What is Anna?", " Anna needs nothing.", mini).tokens[None]
        with torch.no_grad():
            _, cache = mini(tokens[:, :5], return_type="logits_and_cache", use_cache=True)
            with stepsal.stepflow(mini), pytest.raises(ValueError, match=r"a cache of 5 tokens in 1 rows.*followed 0"):
                mini(tokens[:, 5:], past_key_values=cache, return_type="logits_and_cache")

    def test_another_cache_of_the_same_length(self, mini: TransformerBridge) -> None:
        trace = Trace.from_text("Anna is 1 plus 1. What is Anna?", " Anna needs nothing. So she is 2.", mini)
        tokens, n = trace.tokens[None], trace.n_prompt
        options: dict = {"return_type": "logits_and_cache", "use_cache": True}
        with torch.no_grad(), stepsal.stepflow(mini):
            _, first = mini(tokens[:, :n], **options)
            mini(tokens[:, :n], **options)
            with pytest.raises(ValueError, match="continues another cache"):
                mini(tokens[:, n:], past_key_values=first, **options)

    def test_hooks_removed_inside(self, mini: TransformerBridge) -> None:
        with stepsal.stepflow(mini):
            mini.reset_hooks()
            with pytest.raises(ValueError, match="hooks of stepflow were removed"):
                logits_of(mini, torch.tensor([[5, 6, 7]]))

    def test_no_chat_template(self) -> None:
        tokenizer = char_tokenizer()
        tokenizer.chat_template = None
        model = stepsal.load("tiny", hf_model=tiny_hf_model("Llama"), tokenizer=tokenizer)
        with pytest.raises(ValueError, match=r"set tokenizer\.chat_template"), stepsal.stepflow(model):
            pass

    def test_embeddings_instead_of_tokens(self, mini: TransformerBridge) -> None:
        with stepsal.stepflow(mini), pytest.raises(ValueError, match="given embeddings"):
            mini.original_model(inputs_embeds=torch.zeros(1, 3, mini.cfg.d_model))

    def test_a_layer_without_rows_has_no_means(self, tiny_with_text: TransformerBridge) -> None:
        trace = Trace.from_text("How many?", "</think>Two", tiny_with_text, format="think")
        with stepsal.stepflow(tiny_with_text, STRONG) as log:
            logits_of(tiny_with_text, trace.tokens[None])
        assert (log.oeb["rows"] == 0).all()
        assert log.oeb[["fired_share", "bridge_before", "bridge_after"]].isna().all(axis=None)

    def test_a_text_without_a_question_is_reported(self, mini: TransformerBridge) -> None:
        with pytest.warns(UserWarning, match="no question in 1 of 1 sequences"), stepsal.stepflow(mini) as log:
            logits_of(mini, torch.tensor([[5, 6, 7]]))
        assert (log.sequences, log.without_question) == (1, 1)
        assert log.oeb.empty


def test_every_architecture_is_covered() -> None:
    assert {"Qwen2", "Llama", "Qwen3", "Gemma2", "GptOss"} <= set(ARCHITECTURES)


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
