"""The context in use: decoding, what is left behind, other hooks beside it, and what is refused."""

from __future__ import annotations

import pytest
import torch
from forward_passes import logits_of
from strong_flow import RESPONSE, STRONG, THINK
from tiny_models import char_tokenizer, tiny_chat, tiny_hf_model
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

import stepsal
from stepsal import StepFlowConfig
from stepsal.intervention import active_flow
from stepsal.tasks import chain
from stepsal.trace import Trace


class TestGeneration:
    @pytest.mark.slow
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
                stepsal.stepflow(model, STRONG, segmentation=THINK),
                model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", fail)]),
            ):
                logits_of(model, tokens)
        else:
            with stepsal.stepflow(model, STRONG, segmentation=THINK):
                logits_of(model, tokens)
        assert self.state(model) == before
        assert torch.equal(logits_of(model, tokens), plain)
        assert len(calls) == 3  # plain twice, and once inside

    def test_a_hook_of_the_users_that_changes_the_model(self) -> None:
        model = tiny_chat("Qwen2")
        tokens = Trace.from_text("How many?", RESPONSE, model).tokens[None]

        def ablate(z: Tensor, hook: object) -> Tensor:
            return z.index_fill(2, torch.tensor([1]), 0.0)

        with stepsal.stepflow(model, STRONG, segmentation=THINK):
            edited = logits_of(model, tokens)
        with model.hooks(fwd_hooks=[("blocks.1.attn.o.hook_in", ablate)]):
            ablated = logits_of(model, tokens)
            with stepsal.stepflow(model, STRONG, segmentation=THINK):
                both = logits_of(model, tokens)
        for other in (edited, ablated):
            assert (both - other).abs().max() > 0.01

    def test_two_models_at_once(self) -> None:
        first, second = tiny_chat("Qwen2"), tiny_chat("Llama")
        with stepsal.stepflow(first, STRONG, segmentation=THINK), stepsal.stepflow(second, STRONG, segmentation=THINK):
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
        with pytest.raises(ValueError, match=r"oeb_layers=\[99\]: there is no layer 99 in a model of 8 layers"):
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

    def test_a_text_without_a_question_is_reported(self, mini: TransformerBridge) -> None:
        with pytest.warns(UserWarning, match="no question in 1 of 1 sequences"), stepsal.stepflow(mini) as log:
            logits_of(mini, torch.tensor([[5, 6, 7]]))
        assert (log.sequences, log.without_question) == (1, 1)
        assert log.oeb.empty
