"""Tell how a model marks thinking and summary, by its name, its tokenizer or its architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepsal.trace.formats import FORMATS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

EMBEDDED = {"mini": "think"}
"""Format (a name in `stepsal.trace.formats.FORMATS`) of the models that stepsal brings along, by their whole name."""

FAMILIES = {
    "smollm2": "plain",
    "deepseek-r1": "think",
    "qwq-32b": "think",
    "gpt-oss": "harmony",
    "qwen3": "think",
}
"""Format of each model family, by a lower-case part of the last part of a model's name."""

_SIGNS: dict[str, tuple[str, ...]] = {  # for each format, two markers that its template and its vocabulary have
    name: signs
    for name, format in sorted(FORMATS.items(), key=lambda item: item[0] == "think")  # which others mention, too
    if (signs := format.signs[::-1] if format.header else format.pair)
}
TEMPLATE_MARKERS = {sign: name for name, (_, sign) in _SIGNS.items()}
"""Format by a marker that stands in a chat template, the most general one last: the one that closes the thinking."""

ARCHITECTURES = {"GptOssForCausalLM": "harmony", "Qwen3ForCausalLM": "think"}
"""Format by architecture, for models that neither their name nor their chat template tells."""


def family(name: str) -> str | None:
    """Return the model family that a name belongs to, or None; only the last part of a path or hub id counts.

    Args:
        name: the name that a model was loaded by: a word, a hub id, or a path.

    Example:
        >>> from stepsal.bridge.presets import family
        >>> family("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
        'deepseek-r1'
        >>> family("/models/qwen3-zoo/llama") is None
        True
    """
    if name in EMBEDDED:
        return name
    last_part = name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return next((known for known in FAMILIES if known in last_part), None)


def preset_format(model: TransformerBridge) -> str | None:
    """Return the name of a model's format, told by its family, else its chat template, architecture or vocabulary.

    Args:
        model: a bridge, with or without a tokenizer.

    Returns:
        A name in `stepsal.trace.FORMATS`; None where nothing tells the format.

    Example:
        >>> from stepsal.bridge.presets import preset_format
        >>> preset_format(stepsal.load("mini"))
        'think'
    """
    known = family(str(model.cfg.model_name))
    of_family = (EMBEDDED | FAMILIES)[known] if known else None
    if of_family not in (None, "plain"):  # somebody may have taught a plain one to think
        return of_family
    template = getattr(model.tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, dict) else [template or ""]  # a tokenizer may have several
    for marker, format in TEMPLATE_MARKERS.items():
        if any(marker in text for text in texts):
            return format
    return of_family or ARCHITECTURES.get(str(model.cfg.architecture)) or _format_of_vocabulary(model.tokenizer)


def _format_of_vocabulary(tokenizer: Any) -> str | None:
    """Return the format both of whose markers are tokens of their own, or None."""
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        return None
    for name, signs in _SIGNS.items():
        ids = [tokenizer.convert_tokens_to_ids(sign) for sign in signs]
        if all(i is not None and i != tokenizer.unk_token_id for i in ids):
            return name
    return None
