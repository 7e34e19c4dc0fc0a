"""Tell where in a model NaN or inf comes from, and what can be done about it."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.gradients import evaluating
from stepsal.bridge.hooks import Hook, attention_hooks, first_hooks_on

_MOST_TOKENS = 512  # of a text that is read again: the patterns of all its positions are built


def non_finite_parameter(model: nn.Module) -> str | None:
    """Name a parameter that holds NaN or inf, and say which of these; None where all are finite.

    Args:
        model: the model.

    Example:
        >>> import torch
        >>> from stepsal.bridge.finite import non_finite_parameter
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.weight.data[0, 1] = float("nan")
        >>> non_finite_parameter(layer)
        "its parameter 'weight' holds NaN"
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            kind = "NaN" if torch.isnan(parameter).any() else "inf"
            return f"its parameter {name.replace('._original_component', '')!r} holds {kind}"
    return None


def why_not_finite(model: TransformerBridge, tokens: Int[Tensor, " pos"]) -> str:
    """Say in words where NaN or inf first shows when a model reads a text, why, and what to do.

    Args:
        model: a bridge that `stepsal.bridge.check.check_model` accepts.
        tokens: token ids of the text, the beginning of which is read once more.

    Example:
        >>> from stepsal.bridge.finite import why_not_finite
        >>> model = stepsal.load("mini")
        >>> why_not_finite(model, model.to_tokens("1 plus 2")[0])
        'the gradient overflows float32: try load(..., dtype=torch.float64)'
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    remedy = "float64" if dtype == "float32" else "bfloat16) or load(..., dtype=torch.float32"
    if weights := non_finite_parameter(model):
        return f"{weights}: load its weights anew"
    place = _first_place(model, tokens[:_MOST_TOKENS])
    if place is None:
        return f"the gradient overflows {dtype}: try load(..., dtype=torch.{remedy})"
    return f"the numbers overflow {dtype} at {place!r} first: try load(..., dtype=torch.{remedy})"


def _first_place(model: TransformerBridge, tokens: Tensor) -> str | None:
    """Return the first hook point through which NaN or inf comes."""
    places: list[str] = []

    def look(x: Tensor, hook: HookPoint) -> None:
        if not places and not torch.isfinite(x).all():
            places.append(str(hook.name))

    points = model.hook_dict
    names = ["embed.hook_out", "unembed.hook_in", "unembed.hook_out"]
    for layer in range(model.cfg.n_layers):
        names += [*attention_hooks(model, layer).values()]
        names += [f"blocks.{layer}.{part}" for part in ("hook_in", "attn.hook_out", "mlp.hook_out", "hook_out")]
    hooks: list[tuple[str, Hook]] = [(name, look) for name in names if name in points]
    tokens = tokens.to(next(model.parameters()).device)[None]
    with torch.no_grad(), evaluating(model), first_hooks_on(model, hooks):
        model(tokens, attention_mask=torch.ones_like(tokens), return_type=None)
    return places[0] if places else None
