"""Write docs/models.md: which architectures stepsal serves, each measured on a tiny model of random weights.

For each architecture of tests/tiny_models.py:

* saliency by each engine against T backward passes through the patterns (tests/brute_force.py), relative error <= 1e-5
  with engine="pattern" and <= 1e-4 with engine="streamed", which computes everything again in another order;
* StepFlow with both edits in all layers: patterns and attention outputs are computed again from the definition of the
  edits, and put into a second copy of the model that TransformerLens has never seen; its logits are those under
  StepFlow, and so are those of the same text decoded token by token from a cache (relative error <= 1e-4);
* bfloat16: both engines run, and give the maps of float32 with the same weights to 15 %; with experts they only run,
  since rounding sends tokens of a tiny model to others.

What is refused is listed with the reason that `stepsal.load` gives.

    python scripts/table_of_models.py            # writes the file
    python scripts/table_of_models.py GPT2 Phi3  # prints the rows of some architectures
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import brute_force  # noqa: E402
from forward_passes import decoded, logits_of  # noqa: E402
from tiny_models import ALL_ARCHITECTURES, char_tokenizer, has_experts, tiny_hf_model, with_room  # noqa: E402

import stepsal  # noqa: E402
from stepsal.bridge.attention import sliding_window  # noqa: E402
from stepsal.bridge.hooks import attention_hooks  # noqa: E402
from stepsal.saliency.streamed import why_not  # noqa: E402

TARGET = ROOT / "docs" / "models.md"
FAMILIES = {
    "Qwen2": "Qwen 2 and 2.5, QwQ, R1-Distill-Qwen",
    "Llama": "Llama 1 to 3.3, R1-Distill-Llama, SmolLM2, Yi",
    "Qwen3": "Qwen 3 (dense)",
    "Gemma2": "Gemma 2",
    "GptOss": "gpt-oss",
    "GPT2": "GPT-2, DistilGPT-2",
    "Phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini, Phi-4-reasoning",
    "Mistral": "Mistral 7B, Magistral, Mistral Small",
    "Mixtral": "Mixtral",
    "Qwen2Moe": "Qwen 1.5 and 2 with experts",
    "Qwen3Moe": "Qwen 3 with experts",
    "Gemma": "Gemma 1",
    "Gemma3": "Gemma 3 (text)",
    "Olmo": "OLMo 1",
    "Olmo2": "OLMo 2",
    "Olmo3": "OLMo 3",
    "Olmoe": "OLMoE",
    "Granite": "Granite 3",
    "GraniteMoe": "Granite with experts",
    "Glm": "GLM-4 9B",
    "Glm4": "GLM-4-0414, GLM-Z1",
    "Glm4Moe": "GLM-4.5, 4.6",
    "Cohere": "Command R",
    "Cohere2": "Command R7B, Command A",
    "SmolLM3": "SmolLM3",
    "SeedOss": "Seed-OSS",
    "Exaone4": "EXAONE 4",
    "Ernie4_5": "ERNIE 4.5 (dense)",
    "Apertus": "Apertus",
    "Arcee": "AFM",
    "Nemotron": "Nemotron 3 and 4, Minitron",
    "MiniMaxM2": "MiniMax-M2",
    "Lfm2": "LFM2 (layers of attention only)",
    "StableLm": "StableLM",
    "Starcoder2": "StarCoder 2",
    "Phi": "Phi-1, 1.5, 2",
    "GPTNeoX": "Pythia, GPT-NeoX",
    "GPTBigCode": "StarCoder 1, SantaCoder",
    "Falcon": "Falcon 7B",
    "Bloom": "BLOOM",
    "Mpt": "MPT",
    "OPT": "OPT",
    "GPTNeo": "GPT-Neo, TinyStories",
    "GPTJ": "GPT-J",
    "CodeGen": "CodeGen",
    "HunYuanDenseV1": "Hunyuan (dense)",
    "DeepseekV3": "DeepSeek V3, R1 (not its distillations)",
    "Mamba": "Mamba",
}
THINK = stepsal.Segmentation("think", min_chars=1)
CONFIG = stepsal.StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.5, alpha=0.8, into_summary=True)
EDITED_ROLES = {"thinking": "question", "summary": "thinking"}  # what the rows of each section are bridged to
HEADER = """# Models

<!-- written by scripts/table_of_models.py; a test holds it against what it measures -->

stepsal serves decoder-only language models whose TransformerLens adapter computes attention itself, so that the pattern
at `attn.hook_pattern` is the one in use. The table says what was measured for each architecture, on a tiny model of
random weights (4 layers, 4 heads, windows of 6 tokens where there are windows):

* **pattern**, **streamed**: saliency by each engine is that of T backward passes, to a relative error of 1e-5 and 1e-4.
* **StepFlow**: patterns and attention outputs under both edits, computed again from their definition and put into a
  copy of the model that TransformerLens has never seen, give the same logits; so does decoding token by token (1e-4).
* **bfloat16**: both engines give the maps of float32 on the same weights, to 15 %; "runs" where there are experts,
  since rounding sends tokens of such a small model to others.

`stepsal.load` checks every model in a moment, in this table or not: it compares the logits before and after
TransformerLens has put its own attention into the model, and `stepsal.bridge.check.check_model` reads two texts of four
tokens. What does not pass is refused, with the layer, the reason and a remedy. To check a bridge of your own:

```python
from stepsal.bridge.check import check_model

check_model(bridge)  # of TransformerBridge.boot_transformers(...)
```

The check also finds quantised layers (int8, 4 bit) whose kernels drop the gradient. Numbers that overflow in float16
end with an error that names the place.

"""


@dataclass(frozen=True)
class Row:
    """What was measured of one architecture: "exact", "yes", or the reason why not."""

    architecture: str
    pattern: str
    streamed: str
    stepflow: str
    bfloat16: str


def measured(architecture: str) -> Row | str:
    """Return the row of an architecture, or the reason why it is refused."""
    try:
        model = tiny(architecture)
    except ValueError as error:
        return str(error)
    trace = stepsal.Trace.from_text("How?", "One. Two.</think>2.", model, segmentation=THINK)
    token_map = brute_force.token_saliency(model, trace.tokens, "token")
    expected = torch.stack([brute_force.pool(m, trace.step_ids, len(trace.steps), "density") for m in token_map])
    return Row(
        architecture,
        saliency_in_words(model, trace, "pattern", expected, 1e-5),
        saliency_in_words(model, trace, "streamed", expected, 1e-4),
        stepflow_in_words(model, rounded(architecture).float()),
        bfloat16_in_words(architecture, trace, expected),
    )


def rounded(architecture: str) -> Any:
    """Make a tiny Hugging Face model in bfloat16."""
    return tiny_hf_model(architecture, **with_room(architecture)).to(torch.bfloat16)


def tiny(architecture: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """Load a tiny model whose weights are those of `rounded`."""
    return stepsal.load(f"tiny-{architecture}", hf_model=rounded(architecture), tokenizer=char_tokenizer(), dtype=dtype)


def saliency_in_words(
    model: TransformerBridge, trace: stepsal.Trace, engine: Any, expected: Tensor, tolerance: float
) -> str:
    """Compare the map of an engine with the expected one."""
    try:
        values = stepsal.step_saliency(model, trace, engine=engine).values
    except ValueError as error:
        return "no: ALiBi" if "ALiBi" in str(error) else f"no: {error}"
    error_size = relative(values, expected)
    return "exact" if error_size <= tolerance else f"off by {error_size:.0e}"


def bfloat16_in_words(architecture: str, trace: stepsal.Trace, expected: Tensor) -> str:
    """Compare the maps of both engines in bfloat16 with the map of the same weights in float32."""
    model = tiny(architecture, torch.bfloat16)
    engines: list[Any] = ["pattern"] if why_not(model) else ["pattern", "streamed"]
    values = [stepsal.step_saliency(model, trace, engine=engine).values for engine in engines]
    if has_experts(architecture):
        return "runs" if all(v.isfinite().all() for v in values) else "no"
    error_size = max(relative(v, expected) for v in values)
    return "yes" if error_size <= 0.15 else f"off by {error_size:.0%}"


def relative(values: Tensor, expected: Tensor) -> float:
    """Return the relative error."""
    return float((values - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------------- StepFlow


def stepflow_in_words(model: TransformerBridge, untouched: Any) -> str:
    """Compare StepFlow with edits that are computed here, in a model that TransformerLens has never seen."""
    trace = stepsal.Trace.from_text("How?", "One. Two a b.\nSo it is.</think>It is 2. Yes.", model, segmentation=THINK)
    layers = range(model.cfg.n_layers)
    before: list[dict[str, Tensor]] = [{} for _ in layers]

    def saving(store: dict[str, Tensor], kind: str) -> Any:
        return lambda x, hook: store.update({kind: x[0].detach().clone()})

    hooks = [
        (name, saving(before[layer], kind)) for layer in layers for kind, name in attention_hooks(model, layer).items()
    ]
    plain = logits_of(model, trace.tokens[None])
    with model.hooks(fwd_hooks=hooks), stepsal.stepflow(model, CONFIG, segmentation=THINK) as log:
        full = logits_of(model, trace.tokens[None])
    if not (log.oeb["fired"].sum() > 0 and (log.smi["injections"] > 0).all() and relative(full, plain) > 1e-3):
        return "no edit was made"
    z = [edited_z(trace, before[layer], sliding_window(model, layer)) for layer in layers]
    recomputed = logits_with(untouched, output_projections(model), z, trace.tokens[None])
    if (error_size := relative(recomputed, full)) > 1e-4:
        return f"off by {error_size:.0e}"
    with stepsal.stepflow(model, CONFIG, segmentation=THINK):
        one_by_one = decoded(model, trace.tokens[None], trace.n_prompt)
    return "exact" if (error_size := relative(one_by_one, full)) <= 1e-4 else f"off by {error_size:.0e} with a cache"


def edited_z(trace: stepsal.Trace, activations: dict[str, Tensor], window: int | None) -> Tensor:
    """Compute the attention output under StepFlow of a layer from its unedited pattern and its values."""
    pattern, v = activations["pattern"].double().clone(), activations["v"].double()  # [head, query, key], [key, kv, d]
    roles = [None if i < 0 else trace.roles[i] for i in trace.step_ids.tolist()]
    for t, role in enumerate(roles):
        visible = range(max(0, t + 1 - (window or t + 1)), t + 1)
        bridge = [k for k in visible if role in EDITED_ROLES and roles[k] == EDITED_ROLES[role]]
        segment = [k for k in visible if role in EDITED_ROLES and roles[k] == role]
        if not bridge or not segment:
            continue
        ceiling = min((len(bridge) / (len(bridge) + len(segment))) ** 0.5, CONFIG.tau_max)
        for row in pattern[:, t]:  # of one head
            p_b, p_s = row[bridge].sum(), row[segment].sum()
            tau = torch.minimum((p_b + p_s) / 2, torch.tensor(ceiling))
            if 0 < p_b < tau:
                row[bridge], row[segment] = row[bridge] * tau / p_b, row[segment] * (p_b + p_s - tau) / p_s
    v = v.repeat_interleave(len(pattern) // v.shape[1], dim=1)  # [key, head, d_head]
    z = torch.einsum("hqk,khd->qhd", pattern, v)
    response = [i for i, step in enumerate(trace.steps) if step.role != "question"]
    for i, previous in zip(response[1:], response, strict=False):
        if trace.roles[previous] == "thinking":
            z[trace.steps[i].start] += CONFIG.alpha * v[trace.step_ids == previous].mean(0)
    return z.flatten(1).float()  # [pos, head * d_head]


def output_projections(model: TransformerBridge) -> list[str]:
    """Return the name of W_O of each layer in the Hugging Face model."""
    return [
        f"{model.adapter.component_mapping['blocks'].name}.{layer}.{block.attn.name}.{block.attn.o.name}"
        for layer, block in enumerate(model.blocks)
    ]


def logits_with(untouched: Any, names: list[str], z: list[Tensor], tokens: Tensor) -> Tensor:
    """Return the logits of a Hugging Face model whose attention outputs before W_O are replaced."""
    handles = [
        untouched.get_submodule(name).register_forward_pre_hook(lambda module, args, own=own: (own[None],))
        for name, own in zip(names, z, strict=True)
    ]
    try:
        with torch.no_grad():
            logits: Tensor = untouched(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


# --------------------------------------------------------------------------------------------------------- the file


def table(architectures: tuple[str, ...] = ALL_ARCHITECTURES) -> str:
    """Return the tables in Markdown."""
    outcomes = {architecture: measured(architecture) for architecture in architectures}
    lines = [
        "| architecture | models | pattern | streamed | StepFlow | bfloat16 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.architecture} | {FAMILIES[row.architecture]} | {row.pattern} | {row.streamed} | {row.stepflow} | "
        f"{row.bfloat16} |"
        for row in outcomes.values()
        if isinstance(row, Row)
    ]
    refused = {architecture: reason for architecture, reason in outcomes.items() if isinstance(reason, str)}
    lines += ["", "Refused, with the reason that `stepsal.load` gives:", "", "| architecture | models | reason |"]
    lines += ["| --- | --- | --- |"]
    lines += [f"| {name} | {FAMILIES[name]} | {in_short(reason)} |" for name, reason in refused.items()]
    return "\n".join(lines) + "\n"


def in_short(reason: str) -> str:
    """Return the reason without the name of the model and the remedy."""
    return reason.partition(" is not supported: ")[2].partition(". stepsal needs")[0] or reason


def main(arguments: list[str]) -> int:
    """Write the file, or print the rows of the named architectures."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments:
        print(table(tuple(arguments)))
        return 0
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(HEADER + table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
