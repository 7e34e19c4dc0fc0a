"""Premise faithfulness: questions with many facts, and how many of the facts that an answer restates are right.

It asks of an answer only that it repeats what it was told, so that models which reason badly can be told apart as well.
A fact is restated where its name is followed, in the same sentence and before any other name, by a number; the first
such number counts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from stepsal.tasks.probes import Wording, words_of

N_FACTS = 8
_SENTENCE = re.compile(r"[.!?]\s|\n")


class Restated(NamedTuple):
    """A fact as an answer restates it.

    Attributes:
        name: what the fact is about.
        number: the number that the answer gives it.
        is_right: True if that is the number of the question.
    """

    name: str
    number: int
    is_right: bool


@dataclass(frozen=True)
class Premises:
    """A question with facts about names, each a number.

    Attributes:
        question: the question.
        facts: the number of each name.
        seed: seed that it was drawn by.

    Example:
        >>> premises = stepsal.tasks.faithfulness.sample(0)
        >>> names = list(premises.facts)
        >>> premises.restated(f"The {names[0]} box holds {premises.facts[names[0]]} coins, and the {names[1]} box 7.")
        [Restated(name='blue', number=48, is_right=True), Restated(name='purple', number=7, is_right=False)]
    """

    question: str
    facts: Mapping[str, int]
    seed: int

    def restated(self, response: str) -> list[Restated]:
        """Return the facts that an answer restates, in its order; the same fact may come again.

        Args:
            response: the answer.
        """
        names = "|".join(map(re.escape, self.facts))
        mention = re.compile(rf"\b({names})\b((?:(?!\b(?:{names})\b)\D)*?)(\d+)", re.IGNORECASE)
        by_name = {name.lower(): (name, n) for name, n in self.facts.items()}
        restated = []
        for sentence in _SENTENCE.split(response):
            for match in mention.finditer(sentence):
                name, n = by_name[match[1].lower()]
                restated.append(Restated(name, int(match[3]), int(match[3]) == n))
        return restated


def sample(seed: int, wording: Wording = "boxes") -> Premises:
    """Draw a question with eight facts.

    Args:
        seed: seed of names, numbers and their order.
        wording: the words, as those of `stepsal.tasks.probes`.

    Raises:
        ValueError: there is no such wording.

    Example:
        >>> stepsal.tasks.faithfulness.sample(0).question[-84:]
        'How many coins do the blue box and the purple box hold together? Think step by step.'
    """
    draw = random.Random(f"faithfulness {wording} {seed}")
    facts, sentences = premises_of(draw, wording, N_FACTS)
    name, other, *_ = facts
    ask = words_of(wording).ask.format(name=name, other=other)
    return Premises(" ".join([*sentences, ask, "Think step by step."]), facts, seed)


def premises_of(draw: random.Random, wording: Wording, n: int) -> tuple[dict[str, int], list[str]]:
    """Return facts, the number of each name, and the sentences that state them, in another order.

    Args:
        draw: what draws names, numbers and the order.
        wording: the words.
        n: number of facts, 1 to 10.

    Raises:
        ValueError: there is no such wording.
    """
    words = words_of(wording)
    names = draw.sample(words.names, n)
    facts = dict(zip(names, draw.sample(range(11, 60), n), strict=True))
    sentences = [words.fact.format(name=name, n=n) for name, n in facts.items()]
    draw.shuffle(sentences)
    return facts, sentences
