"""Tell by its name, its chat template or its architecture how a model marks thinking and summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Format (a name in `stepsal.trace.FORMATS`) of each model family, by a lower-case part of the last part of its name, most
#: specific first; the embedded reasoner by its whole name.
FAMILIES: dict[str, str] = {
    "mini": "think",
    "smollm2": "plain",
    "deepseek-r1": "think",
    "qwq-32b": "think",
    "gpt-oss": "harmony",
    "qwen3": "think",
}
#: Format by architecture, for models that neither their name nor their chat template tells.
ARCHITECTURES: dict[str, str] = {"GptOssForCausalLM": "harmony", "Qwen3ForCausalLM": "think"}


def family(name: str) -> str | None:
    """Return the key of `FAMILIES` that fits a model's name; only the last part of a path or hub id counts.

    Example:
        >>> family("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
        'deepseek-r1'
        >>> family("/models/qwen3-zoo/llama")
    """
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return next((part for part in FAMILIES if (last == part if part == "mini" else part in last)), None)


def preset_format(model: TransformerBridge) -> str | None:
    """Return the format of a model by its family, its chat template or its architecture; None where none of them tells."""
    if known := family(str(model.cfg.model_name)):
        return FAMILIES[known]
    template = str(getattr(model.tokenizer, "chat_template", None) or "")
    if "<|channel|>" in template:
        return "harmony"
    if "</think>" in template:
        return "think"
    return ARCHITECTURES.get(str(model.cfg.architecture))
