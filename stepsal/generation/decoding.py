"""The settings with which an answer is written: limits, sampling and endings, as one value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """The settings with which answers are written, for `collect`, `evaluate`, `calibrate`, the panel and Inspect.

    Attributes:
        max_new_tokens: most tokens that an answer may have, thinking and summary together; the prompt does not count.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens whose probability reaches top_p, in (0, 1]; 1 keeps all.
        stop: end an answer as soon as one of these texts appears outside the thinking; it is kept in the response.
        budget_forcing: number of times that "Wait" replaces the end of the thinking, so that the model thinks on (s1,
            arXiv 2501.19393). The end is the marker of the format, such as `</think>`; for models without any it is the
            end of the answer.
        stop_in_thinking: True lets a stop text end an answer wherever it appears, in the middle of the thinking too.

    Raises:
        ValueError: a number is out of range, a stop text is empty, or `stop_in_thinking` is neither True nor False.

    Example:
        >>> stepsal.Decoding(temperature=0.6).but(max_new_tokens=64).max_new_tokens
        64
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    budget_forcing: int = 0
    stop_in_thinking: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.max_new_tokens, Integral) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r} must be a whole number, at least 1")
        if not _is_number(self.temperature, Real) or not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature!r} must be a number >= 0; 0 decodes greedily")
        if not _is_number(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must lie in (0, 1]; 1 keeps every token")
        if not _is_number(self.budget_forcing, Integral) or self.budget_forcing < 0:
            raise ValueError(f"budget_forcing={self.budget_forcing!r} must be a whole number >= 0; 0 forces nothing")
        stop = self.stop if isinstance(self.stop, str) else tuple(self.stop)
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop={self.stop!r} must be a list of texts, none of them empty")
        if not isinstance(self.stop_in_thinking, bool):
            raise ValueError(
                f"stop_in_thinking={self.stop_in_thinking!r} must be True, or False to let stop texts count "
                "outside the thinking only"
            )
        plain = {  # numbers of other libraries have no form in JSON
            "max_new_tokens": int(self.max_new_tokens), "temperature": float(self.temperature),
            "top_p": float(self.top_p), "stop": stop, "budget_forcing": int(self.budget_forcing),
        }  # fmt: skip
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def but(
        self,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: Sequence[str] | None = None,
        budget_forcing: int | None = None,
        stop_in_thinking: bool | None = None,
    ) -> Decoding:
        """Return a copy with some settings changed; None keeps a setting.

        Args:
            max_new_tokens: most tokens that an answer may have.
            temperature: divides the logits.
            top_p: probability that the set of tokens to sample from reaches.
            stop: texts that end an answer.
            budget_forcing: number of times that the end of the thinking is replaced.
            stop_in_thinking: whether stop texts count in the thinking, too.

        Raises:
            ValueError: as for the class.
        """
        changes = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop": stop,
            "budget_forcing": budget_forcing,
            "stop_in_thinking": stop_in_thinking,
        }
        return replace(self, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings JSON-ready, for provenance; `from_dict` reads them."""
        return asdict(self) | {"stop": list(self.stop)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Decoding:
        """Read settings that `to_dict` has written, now or before there was `stop_in_thinking`.

        Args:
            settings: attributes by name; a missing one has its default. Only where there are stop texts, a missing
                `stop_in_thinking` is True: before it could be chosen, they ended the thinking as well.

        Raises:
            ValueError: a setting is unknown, or a value is out of range; the message names it.

        Example:
            >>> stepsal.Decoding.from_dict({"temperature": 0.6}) == stepsal.Decoding(temperature=0.6)
            True
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(
                f"unknown settings of decoding: {', '.join(unknown)}; leave them out, and use {', '.join(known)}"
            )
        return cls(**with_stop_in_thinking(settings))


def with_stop_in_thinking(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Add `stop_in_thinking` to settings that were written before it could be chosen.

    Args:
        settings: attributes of a `Decoding` by name, as a manifest holds them.

    Example:
        >>> from stepsal.generation.decoding import with_stop_in_thinking
        >>> with_stop_in_thinking({"stop": []}), with_stop_in_thinking({"stop": ["Answer:"]})
        ({'stop_in_thinking': False, 'stop': []}, {'stop_in_thinking': True, 'stop': ['Answer:']})
    """
    return {"stop_in_thinking": bool(settings.get("stop")), **settings}


def _is_number(value: object, kind: type[Integral] | type[Real]) -> bool:
    """Tell whether a value is a number of a kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)
