"""Texts that tell whether a model still holds what it needs: a right continuation and a wrong one, without decoding.

Each probe asks for something that stands k filler sentences back, where one of the two failures of the paper would
lose it:

    premise_recall   a fact of the question, in the middle of the thinking (Shallow Lock-in)
    hand_over        a result of an earlier step of the thinking, in a later step (what momentum is to carry)
    summary_recall   a result of the thinking, in the summary (Deep Decay)

The wrong continuation is another number of the same text, so that the difference of both tells whether the model knows
which is meant. Every probe comes in two wordings, with other names, units, sentences and fillers, so that what is
chosen by one can be judged by the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from stepsal.trace.continuation import Continuation

Wording = Literal["boxes", "villages"]
"""The words of a probe."""
Kind = Literal["premise_recall", "hand_over", "summary_recall"]
"""What a probe asks for."""


@dataclass(frozen=True)
class Words:
    """The sentences of a wording, with places for a name, a number or two, and a unit."""

    names: tuple[str, ...]
    fact: str  # of the question
    ask: str
    again: str  # begins to restate a fact in the thinking
    gain: str  # a step that computes a result
    later: str  # begins to use that result in a later step
    summary: str  # begins to restate it in the summary
    fillers: tuple[str, ...]


_WORDS: dict[Wording, Words] = {
    "boxes": Words(
        names=("red", "blue", "green", "yellow", "white", "black", "brown", "purple", "orange", "grey"),
        fact="The {name} box holds {n} coins.",
        ask="How many coins do the {name} box and the {other} box hold together?",
        again="So the {name} box holds",
        gain="Somebody puts {more} more coins into the {name} box, so the {name} box now holds {sum} coins.",
        later="Since the {name} box now holds",
        summary="In short, the {name} box ends up with",
        fillers=(
            "Let me think about this step by step.",
            "I want to be careful here.",
            "It helps to read the question once more.",
            "There is no need to hurry.",
            "The order of the boxes does not matter.",
            "Nothing else is said about the lids.",
            "I will keep the names of the boxes in mind.",
            "That seems to be all that is given.",
            "It is a matter of finding the right box.",
            "Let me go on with the next thought.",
            "This part of the problem is clear.",
            "I can check it at the end.",
            "The boxes all look the same from outside.",
            "It is easy to mix things up here.",
        ),
    ),
    "villages": Words(
        names=("Aldby", "Borrow", "Cutnall", "Denholm", "Elsford", "Farley", "Gorsby", "Hatwell", "Iveston", "Kirkby"),
        fact="In the village of {name} there are {n} lamps.",
        ask="What is the total number of lamps in {name} and {other}?",
        again="We know that the number of lamps in {name} is",
        gain="When {more} lamps are added in {name}, the number of lamps there becomes {sum}.",
        later="Because the number of lamps in {name} became",
        summary="To sum up, the final number of lamps in {name} is",
        fillers=(
            "First of all, this looks like a simple count.",
            "One should not be confused by the names.",
            "The villages lie along the same river.",
            "Perhaps a short pause is useful.",
            "We do not have to draw a map for it.",
            "Every village is described in the same way.",
            "Some of what is said may not be needed.",
            "Let us look at it from another side.",
            "This does not change anything so far.",
            "The roads between them play no part.",
            "We will come back to that in a moment.",
            "It is a calm evening in all of them.",
            "A careful reader finds what is asked for.",
            "Then we can write the result down.",
        ),
    ),
}
WORDINGS: tuple[Wording, ...] = get_args(Wording)
N_FACTS = 6


def words_of(wording: Wording) -> Words:
    """Return the sentences of a wording.

    Args:
        wording: the words.

    Raises:
        ValueError: there is no such wording.
    """
    if wording not in _WORDS:
        raise ValueError(f"wording={wording!r} is unknown; use {' or '.join(map(repr, WORDINGS))}")
    return _WORDS[wording]


def premise_recall(seed: int, k: int = 10, wording: Wording = "boxes") -> Continuation:
    """Ask for a fact of the question after k filler sentences of thinking.

    Args:
        seed: seed of names, numbers and fillers.
        k: number of filler sentences, >= 0.
        wording: the words.

    Raises:
        ValueError: k is negative, or there is no such wording.

    Example:
        >>> probe = stepsal.tasks.probes.premise_recall(seed=0, k=1)
        >>> probe.before, probe.right, probe.wrong
        ('Let me go on with the next thought. So the white box holds', ' 39', ' 40')
    """
    draw = _Draw(seed, k, wording)
    before = [*draw.fillers(k), draw.words.again.format(name=draw.names[0])]
    return draw.continuation("premise_recall", before, draw.numbers[0], draw.numbers[1])


def hand_over(seed: int, k: int = 10, wording: Wording = "boxes") -> Continuation:
    """Ask for the result of a step of the thinking after k filler sentences.

    Args:
        seed: seed of names, numbers and fillers.
        k: number of filler sentences, >= 0.
        wording: the words.

    Raises:
        ValueError: k is negative, or there is no such wording.

    Example:
        >>> probe = stepsal.tasks.probes.hand_over(seed=0, k=0)
        >>> probe.before[-49:], probe.right
        ('now holds 51 coins. Since the white box now holds', ' 68')
    """
    draw = _Draw(seed, k, wording)
    gains, (result, other) = draw.gains()
    before = [*gains, *draw.fillers(k), draw.words.later.format(name=draw.names[0])]
    return draw.continuation("hand_over", before, result, other)


def summary_recall(
    seed: int, k: int = 10, wording: Wording = "boxes", *, end_of_thinking: str = "\n\n"
) -> Continuation:
    """Ask in the summary for a result from the middle of the thinking, before which and after which come fillers.

    Args:
        seed: seed of names, numbers and fillers.
        k: number of filler sentences, half of them before the result, >= 0.
        wording: the words.
        end_of_thinking: text between thinking and summary, by which the model's segmentation tells them apart, such as
            "</think>"; where a format has no marker, the summary is the last paragraph.

    Raises:
        ValueError: k is negative, or there is no such wording.

    Example:
        >>> probe = stepsal.tasks.probes.summary_recall(seed=0, k=0)
        >>> probe.before.splitlines()[-1], probe.right
        ('In short, the white box ends up with', ' 68')
    """
    draw = _Draw(seed, k, wording)
    gains, (result, other) = draw.gains()
    fillers = draw.fillers(k)
    thinking = " ".join([*fillers[: k // 2], *gains, *fillers[k // 2 :]])
    before = [thinking + end_of_thinking + draw.words.summary.format(name=draw.names[0])]
    return draw.continuation("summary_recall", before, result, other)


PROBES: dict[Kind, Callable[..., Continuation]] = {
    "premise_recall": premise_recall, "hand_over": hand_over, "summary_recall": summary_recall
}  # fmt: skip
"""The probes by name."""


class _Draw:
    """The names, numbers and fillers of one probe."""

    def __init__(self, seed: int, k: int, wording: Wording) -> None:
        if k < 0:
            raise ValueError(f"k={k} must be a number of filler sentences >= 0")
        self.words = words_of(wording)
        self._seed, self._k, self._wording = seed, k, wording
        self._random = random.Random(f"{wording} {seed}")
        self.names = self._random.sample(self.words.names, N_FACTS)
        self.numbers = self._random.sample(range(11, 60), N_FACTS)

    def fillers(self, k: int) -> list[str]:
        """Return k filler sentences, no two of which follow each other twice."""
        sentences: list[str] = []
        while len(sentences) < k:
            sentences += self._random.sample(self.words.fillers, len(self.words.fillers))
        return sentences[:k]

    def gains(self) -> tuple[list[str], tuple[int, int]]:
        """Return the steps that compute a result for the first name and for another, and both results."""
        added = self._random.sample(range(11, 40), 2)
        results = [number + more for number, more in zip(self.numbers, added, strict=False)]
        if results[0] == results[1]:  # they are to be told apart
            added[1] += 1
            results[1] += 1
        steps = [
            self.words.gain.format(name=name, more=more, sum=result)
            for name, more, result in zip(self.names, added, results, strict=False)
        ]
        self._random.shuffle(steps)
        return steps, (results[0], results[1])

    def continuation(self, kind: Kind, before: Sequence[str], right: int, wrong: int) -> Continuation:
        """Return the probe: the facts in any order, what is thought, and what comes next."""
        facts = [self.words.fact.format(name=name, n=n) for name, n in zip(self.names, self.numbers, strict=True)]
        self._random.shuffle(facts)
        ask = self.words.ask.format(name=self.names[0], other=self.names[1])
        about = {"probe": kind, "wording": self._wording, "k": self._k, "seed": self._seed}
        return Continuation(" ".join([*facts, ask]), " ".join(before), f" {right}", f" {wrong}", about)
