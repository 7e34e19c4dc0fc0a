"""Edits in real forward passes, recomputed from the definition, and saliency through them."""

from __future__ import annotations

import brute_force
import pytest
import torch
from forward_passes import logits_of
from strong_flow import HEADS, RESPONSE, STRONG, THINK
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import StepFlowConfig
from stepsal.bridge.attention import sliding_window
from stepsal.bridge.hooks import attention_hooks
from stepsal.trace import Trace


def strengths_of(model: TransformerBridge, config: StepFlowConfig) -> tuple[Tensor, Tensor]:
    """Return tau_max and alpha of all heads, [layer, head], 0 where a head is not edited."""
    of_edits = config.strengths(model.cfg.n_layers, model.cfg.n_heads)
    tables = [torch.zeros(model.cfg.n_layers, model.cfg.n_heads) for _ in of_edits]
    for table, of_layers in zip(tables, of_edits, strict=True):
        for layer, strengths in of_layers.items():
            table[layer] = torch.tensor(strengths)
    return tables[0], tables[1]


class TestAgainstRecomputation:
    """Edits recomputed from the definition: the trace's own steps, loops over rows, heads and tokens."""

    @pytest.fixture(scope="class", params=[STRONG, HEADS], ids=["layers", "heads"])
    def config(self, request: pytest.FixtureRequest) -> StepFlowConfig:
        return request.param

    @pytest.fixture(scope="class")
    def before_and_after(
        self, tiny_with_text: TransformerBridge, config: StepFlowConfig
    ) -> tuple[Trace, list, list, object]:
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
                for kind, name in attention_hooks(model, layer).items()
                if kind in ("pattern", "z", "v")
            ]

        with (
            model.hooks(fwd_hooks=hooks(before)),
            stepsal.stepflow(model, config, segmentation=THINK) as log,
            model.hooks(fwd_hooks=hooks(after)),
        ):
            logits_of(model, trace.tokens[None])
        return trace, before, after, log

    def test_oeb(self, tiny_with_text: TransformerBridge, config: StepFlowConfig, before_and_after: tuple) -> None:
        trace, before, after, log = before_and_after
        taus, _ = strengths_of(tiny_with_text, config)
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
                    share = (len(bridge) / (len(bridge) + len(segment))) ** 0.5
                    for head in range(len(p)):
                        ceiling = min(share, float(taus[layer, head]))
                        p_b, p_s = float(p[head, bridge].sum()), float(p[head, segment].sum())
                        tau = min(ceiling, (p_b + p_s) / 2)
                        if 0 < p_b < tau * (1 - 1e-6):
                            expected[head, bridge] *= tau / p_b
                            expected[head, segment] *= (p_b + p_s - tau) / p_s
                            fired[layer, head] += 1
                torch.testing.assert_close(a["pattern"][:, t].double(), expected, atol=2e-6, rtol=1e-4)
        assert [*zip(log.oeb["layer"], log.oeb["head"], strict=True)] == [tuple(x) for x in taus.nonzero().tolist()]
        logged = torch.tensor(log.oeb["fired"].to_numpy())
        assert (logged - fired[taus > 0]).abs().max() <= 1  # a row within rounding of its ceiling may go either way
        assert fired.sum() > 100 * (taus > 0).float().mean()

    def test_smi(self, tiny_with_text: TransformerBridge, config: StepFlowConfig, before_and_after: tuple) -> None:
        trace, before, after, log = before_and_after
        _, alphas = strengths_of(tiny_with_text, config)
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
                    added[head] = alphas[layer, head] * sum(b["v"][k, head // group] for k in keys) / len(keys)
                torch.testing.assert_close(a["z"][t] - b["z"][t], added, atol=2e-6, rtol=1e-4)
                norms[layer] += added.norm()
        assert n == 4
        starts = [trace.steps[i].start for i in response[1:] if trace.roles[i - 1] == "thinking"]
        others = [t for t in range(len(trace)) if t not in starts]
        for b, a in zip(before, after, strict=True):
            assert torch.equal(a["z"][others], b["z"][others])
        logged = torch.tensor(log.smi["mean_norm"].to_numpy()).float()
        torch.testing.assert_close(logged, norms[log.smi["layer"].tolist()] / n, rtol=1e-4, atol=0)

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
            mass = mass[logged["head"].tolist()]
            torch.testing.assert_close(
                torch.tensor(logged[column].to_numpy()).float(), mass / len(rows), rtol=1e-4, atol=1e-6
            )
            assert (logged["rows"] == len(rows)).all()


@pytest.mark.parametrize("target", ["token", "logit", "sequence"])
@pytest.mark.parametrize(("nested", "config"), [(False, STRONG), (True, STRONG), (False, HEADS)])
def test_saliency_under_stepflow(
    tiny_with_text: TransformerBridge, target: str, nested: bool, config: StepFlowConfig
) -> None:
    trace = Trace.from_text("How many?", RESPONSE[:70], tiny_with_text)
    if nested:
        with stepsal.stepflow(tiny_with_text, config, segmentation=THINK):
            saliency = stepsal.step_saliency(tiny_with_text, trace, target=target, keep_tokens=True)
    else:
        saliency = stepsal.step_saliency(tiny_with_text, trace, target=target, keep_tokens=True, stepflow=config)
    with stepsal.stepflow(tiny_with_text, config, segmentation=THINK):
        expected = brute_force.token_saliency(tiny_with_text, trace.tokens, target)
    for got, wanted in zip(saliency.token_values, expected, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    plain = stepsal.step_saliency(tiny_with_text, trace, target=target)
    assert not torch.allclose(saliency.values, plain.values, rtol=0.01)
    assert saliency.metadata["stepflow"] == config.to_dict()
    assert "stepflow" not in plain.metadata
