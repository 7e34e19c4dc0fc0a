"""Questions that a small model answers in a sentence: a fact that it was told among others, or a sum told as a story.

    recall     six facts, one of which is asked for
    stories    a person has some things, and gets or loses some

Both come in two wordings, as the probes do, and are graded by the last number of the answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from stepsal.tasks.answers import Problem
from stepsal.tasks.faithfulness import premises_of
from stepsal.tasks.probes import Wording, words_of

ShortAnswer = Literal["recall", "stories"]
"""What is asked for."""
SHORT_ANSWERS: tuple[ShortAnswer, ...] = get_args(ShortAnswer)

INSTRUCTION = "Answer in one short sentence."
N_FACTS = 6
_ASK_ONE: dict[Wording, str] = {
    "boxes": "How many coins does the {name} box hold?",
    "villages": "How many lamps are there in {name}?",
}
_PEOPLE: dict[Wording, tuple[str, ...]] = {
    "boxes": ("Tom", "Anna", "Ben", "Clara", "David", "Emma"),
    "villages": ("Mr. Hill", "Mrs. Stone", "the baker", "the teacher", "the farmer", "the nurse"),
}
_THINGS: dict[Wording, tuple[str, ...]] = {
    "boxes": ("apples", "marbles", "stickers", "pencils", "cards"),
    "villages": ("candles", "chairs", "baskets", "jars", "ropes"),
}
_CHANGES: dict[Wording, dict[int, tuple[str, ...]]] = {  # by sign
    "boxes": {
        1: ("{who} buys {n} more {what}.", "A friend gives {who} {n} more {what}.", "{who} finds {n} more {what}."),
        -1: ("{who} gives {n} {what} away.", "{who} loses {n} {what}.", "{who} sells {n} {what}."),
    },
    "villages": {
        1: ("Then {n} more {what} are delivered to {who}.", "A neighbour brings {who} {n} more {what}."),
        -1: ("Then {n} of the {what} of {who} are taken away.", "Fire destroys {n} of the {what} of {who}."),
    },
}


@dataclass(frozen=True)
class ShortTask:
    """Recall questions or stories as a task (`stepsal.tasks.Task`).

    Attributes:
        kind: "recall" or "stories".
        wording: the words, as those of `stepsal.tasks.probes`.

    Raises:
        ValueError: there is no such kind or wording.

    Example:
        >>> problem = stepsal.tasks.short_answers.ShortTask("stories").sample(0)
        >>> problem.question[:37], problem.reference
        ('Clara has 7 marbles. Clara gives 3 ma', '4')
    """

    kind: ShortAnswer
    wording: Wording = "boxes"

    def __post_init__(self) -> None:
        if self.kind not in SHORT_ANSWERS:
            raise ValueError(f"kind={self.kind!r} is unknown; use {' or '.join(map(repr, SHORT_ANSWERS))}")
        words_of(self.wording)  # refuses wordings that there are not

    @property
    def name(self) -> str:
        """A text that names kind and wording."""
        return f"short answers: {self.kind} ({self.wording})"

    def sample(self, seed: int) -> Problem:
        """Return the problem of a seed.

        Args:
            seed: seed of names, numbers and sentences.
        """
        return _recall(seed, self.wording) if self.kind == "recall" else _story(seed, self.wording)


def _recall(seed: int, wording: Wording) -> Problem:
    draw = random.Random(f"recall {wording} {seed}")
    facts, sentences = premises_of(draw, wording, N_FACTS)
    name = draw.choice(list(facts))
    ask = _ASK_ONE[wording].format(name=name)
    return Problem(" ".join([*sentences, ask, INSTRUCTION]), str(facts[name]), "number")


def _story(seed: int, wording: Wording) -> Problem:
    draw = random.Random(f"stories {wording} {seed}")
    who, what = draw.choice(_PEOPLE[wording]), draw.choice(_THINGS[wording])
    sign, n, first = draw.choice((1, -1)), draw.randint(1, 5), draw.randint(6, 14)
    change = draw.choice(_CHANGES[wording][sign]).format(who=who, n=n, what=what)
    told = f"{who[0].upper()}{who[1:]} has {first} {what}. {change}"
    ask = f"How many {what} does {who} have now?"
    return Problem(f"{told} {ask} {INSTRUCTION}", str(first + sign * n), "number")
