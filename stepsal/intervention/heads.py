"""Name single heads that StepFlow edits, each with a strength of its own where it has one.

{3: [0, 2]}                  heads 0 and 2 of layer 3, at the strength of the settings
{3: {0: 0.3, 2: 0.1}}        the same heads, at strengths of their own
{3: [0, 2], -1: {5: 0.3}}    negative layers count from the top
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from stepsal.layers import layer_indices

Heads = Mapping[int, Sequence[int] | Mapping[int, float]]
"""Heads by layer: their indices, or their strengths by index."""


class EditedHeads(Mapping[int, Mapping[int, float | None]]):
    """Heads by layer, with the strength of each or None for that of the settings; it does not change.

    Args:
        heads: heads by layer, see the module docstring; indices may be written as text, as JSON has them.
        name: what the caller calls the choice, for the error.

    Raises:
        ValueError: an index is none, a strength is no number, or a layer has no head.

    Example:
        >>> from stepsal.intervention.heads import EditedHeads
        >>> heads = EditedHeads({3: [0, 2], "5": {"1": 0.3}})
        >>> dict(heads[3]), heads.to_dict(), heads == EditedHeads(heads.to_dict())
        ({0: None, 2: None}, {'3': [0, 2], '5': {'1': 0.3}}, True)
    """

    def __init__(self, heads: Mapping[Any, Any], name: str = "heads") -> None:
        by_layer: dict[int, dict[int, float | None]] = {}
        for key, of_layer in heads.items():
            layer = _index(key, f"{name} names layer")
            by_layer[layer] = _strengths(of_layer, f"{name}[{layer}]")
        self._items = tuple((layer, tuple(sorted(by_layer[layer].items()))) for layer in sorted(by_layer))

    def __getitem__(self, layer: int) -> Mapping[int, float | None]:
        return dict(dict(self._items)[layer])

    def __iter__(self) -> Iterator[int]:
        return (layer for layer, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EditedHeads) and self._items == other._items

    def __repr__(self) -> str:
        return repr({layer: _plain(dict(heads)) for layer, heads in self._items})

    @property
    def n_heads(self) -> int:
        """The number of heads, of all layers."""
        return sum(len(heads) for _, heads in self._items)

    def strengths(self, default: float) -> list[float]:
        """Return the strengths of all heads, in the order of layers and heads.

        Args:
            default: strength of those that have none of their own.
        """
        return [default if strength is None else strength for _, heads in self._items for _, strength in heads]

    def to_dict(self) -> dict[str, list[int] | dict[str, float]]:
        """Return the heads as JSON has them, with text for keys."""
        return {str(layer): _plain({str(h): s for h, s in heads}, int) for layer, heads in self._items}

    def resolve(self, n_layers: int, n_heads: int, default: float, name: str = "heads") -> dict[int, list[float]]:
        """Return the strength of each head of a model's edited layers, 0 where the head is not edited.

        Args:
            n_layers: depth of the model.
            n_heads: number of heads of a layer.
            default: strength of heads that have none of their own.
            name: what the caller calls the choice, for the error.

        Raises:
            ValueError: the model lacks a layer or a head, or a layer is named twice.

        Example:
            >>> from stepsal.intervention.heads import EditedHeads
            >>> EditedHeads({0: [1], -1: {2: 0.3}}).resolve(n_layers=8, n_heads=4, default=0.15)
            {0: [0.0, 0.15, 0.0, 0.0], 7: [0.0, 0.0, 0.3, 0.0]}
        """
        layer_indices(tuple(self), n_layers, name)  # refuses layers that the model lacks
        resolved: dict[int, list[float]] = {}
        for layer, heads in self._items:
            if layer % n_layers in resolved:
                raise ValueError(f"{name} names layer {layer % n_layers} twice, once counted from the top")
            if outside := [head for head, _ in heads if not 0 <= head < n_heads]:
                raise ValueError(
                    f"{name}[{layer}] names head {outside[0]}, but layers of the model have {n_heads} heads: use "
                    f"0..{n_heads - 1}"
                )
            row = [0.0] * n_heads
            for head, strength in heads:
                row[head] = default if strength is None else strength
            resolved[layer % n_layers] = row
        return dict(sorted(resolved.items()))


def _index(key: object, what: str) -> int:
    if isinstance(key, str) and key.lstrip("-").isdecimal():
        return int(key)
    if not isinstance(key, Integral) or isinstance(key, bool):
        raise ValueError(f"{what} {key!r}, which is no index: use whole numbers")
    return int(key)


def _strengths(heads: object, name: str) -> dict[int, float | None]:
    """Return the heads of a layer with their strengths."""
    if isinstance(heads, Mapping):
        for head, strength in heads.items():
            if not isinstance(strength, Real) or isinstance(strength, bool):
                raise ValueError(f"{name}[{head}]={strength!r} must be a number, the strength of the head")
        strengths: dict[int, float | None] = {_index(h, f"{name} names head"): float(s) for h, s in heads.items()}
    elif isinstance(heads, Sequence) and not isinstance(heads, str | bytes):
        strengths = dict.fromkeys(_index(head, f"{name} names head") for head in heads)
    else:
        raise ValueError(f"{name}={heads!r} must be indices of heads, such as [0, 2], or their strengths by index")
    if not strengths:
        raise ValueError(f"{name} has no head: leave the layer out")
    return strengths


def _plain(heads: dict[Any, float | None], index: type = int) -> Any:
    """Return the heads of a layer as they are written: indices alone where none has a strength of its own."""
    own = {head: strength for head, strength in heads.items() if strength is not None}
    if not own:
        return [index(head) for head in heads]
    if len(own) < len(heads):
        raise ValueError(f"heads {sorted(set(heads) - set(own))} of a layer have no strength, while others have one")
    return own
