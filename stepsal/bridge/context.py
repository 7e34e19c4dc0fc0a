"""Give a model a longer context than it was made with, by the scaling of its rotary position embeddings (RoPE)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_SCALINGS = ("default", "linear", "dynamic", "yarn")


def extend_context(config: PretrainedConfig, n_ctx: int) -> None:
    """Change a configuration so that its model takes more tokens.

    A configuration that scales its RoPE already keeps its way and gets a larger factor:

        linear    all positions are squeezed into those that the model knows
        yarn      slow frequencies are squeezed, fast ones kept (arXiv 2309.00071)
        dynamic   nothing changes up to the known length; beyond, frequencies depend on the length of the pass. So what
                  was decoded token by token differs a little from what is read at once, in transformers as here.

    One that does not scale it gets YaRN. Except under dynamic scaling answers of ordinary length change a little, too,
    and no model was trained for its new factor: look at some long answers first.

    Args:
        config: the configuration of a model that is to be loaded; changed in place.
        n_ctx: number of tokens that the model is to take.

    Raises:
        ValueError: `n_ctx` is no longer than the context that the model has, or the model has no RoPE, or scales it in
            another way.

    Example:
        >>> import transformers
        >>> from stepsal.bridge.context import extend_context
        >>> config = transformers.LlamaConfig(max_position_embeddings=2048)
        >>> extend_context(config, 8192)
        >>> config.max_position_embeddings, config.rope_parameters["rope_type"], config.rope_parameters["factor"]
        (8192, 'yarn', 4.0)
    """
    text: Any = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None)
    if known is None or not rope:
        raise ValueError(
            f"n_ctx={n_ctx}: a {text.model_type} model has no rotary position embeddings (RoPE), so that its context "
            "can't be extended: leave n_ctx out, or load a model with a longer context"
        )
    if n_ctx <= known:
        raise ValueError(f"n_ctx={n_ctx} is no longer than the model's own context of {known} tokens: leave it out")
    if (kind := rope.get("rope_type", f"per layer ({', '.join(map(str, rope))})")) not in _SCALINGS:
        raise ValueError(
            f"n_ctx={n_ctx}: the RoPE of this {text.model_type} model is scaled in a way of its own, {kind}; only "
            f"{', '.join(_SCALINGS)} can be extended: change its configuration, and pass the model as hf_model="
        )
    text.rope_parameters = rope | _scaled(rope, kind, known, n_ctx)
    if kind != "dynamic":  # whose formula starts from the length that the model knows
        text.max_position_embeddings = n_ctx


def _scaled(rope: dict[str, Any], kind: str, known: int, n_ctx: int) -> dict[str, Any]:
    """Return what changes in the parameters of RoPE."""
    factor = rope.get("factor") or 1.0
    if kind == "linear":
        return {"factor": factor * n_ctx / known}
    if kind == "dynamic":
        return {"factor": max(factor, n_ctx / known)}
    trained = rope.get("original_max_position_embeddings") or known
    return {"rope_type": "yarn", "factor": max(factor, n_ctx / trained), "original_max_position_embeddings": trained}
