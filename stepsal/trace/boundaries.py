"""Boundary rules: where a step ends within a section.

A rule is asked when a character has come that may begin a new step. It sees the end of the step so far, the white space
after it and that one character, never what follows: so a boundary is known as soon as the next step begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["sentence", "paragraph", "line"] | str | re.Pattern[str] | Callable[[str, str], bool]
"""Ends of steps: a named rule, a regular expression, or a callable `f(step_so_far, next_char) -> bool`.

The callable is asked at each non-space character `next_char` and returns True where a new step begins with it;
`step_so_far` is the text of the open step, white space at its end included.
"""

CLOSERS = "\"'”’»)]}*_`"
WIDE_CLOSERS = "」』）】》"
WIDE_END = "。！？｡．︒︕︖﹒﹖﹗"  # need no white space after them

_NAMED = ("sentence", "paragraph", "line")
_BULLETS = "-*•#"
_ABBREVIATIONS = frozenset("e.g i.e cf vs fig figs eq eqs dr mr mrs ms prof approx resp sec ch viz ca al".split())
_OPENERS = "\"'“‘«‹„([{*_`$\\¿¡"  # what a sentence may begin with, besides letters and digits
_WIDE_POINTS = "．﹒"  # which also stand in numbers
_MARKS = "!?…‼‽⁇⁈⁉"  # end a sentence where the next one does not begin with a small letter
# what ends a sentence in scripts that know no such letters: Unicode's Sentence_Terminal without the marks above
_OTHER_ENDS = frozenset(
    "։؝؞؟۔܀܁܂߹࠷࠹࠽࠾।॥၊။።፧፨᙮᜵᜶។៕᠃᠉᥄᥅᪨᪩᪪᪫᭎᭏᭚᭛᭞᭟᭽᭾᭿᰻᰼᱾᱿⳹⳺⳻⸮⸼⹓⹔⹠⹡꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫"
    "𐩖𐩗𐽕𐽖𐽗𐽘𐽙𐾆𐾇𐾈𐾉𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼𑊩𑏔𑏕𑑋𑑌𑗂𑗃𑗉𑗊𑗋𑗌𑗍𑗎𑗏𑗐𑗑𑗒𑗓𑗔𑗕𑗖𑗗𑙁𑙂𑜼𑜽𑜾𑥄𑥆𑩂𑩃𑪛𑪜𑱁𑱂𑻷𑻸𑽃𑽄"
    "𖩮𖩯𖫵𖬷𖬸𖭄𖵮𖵯𖺘𛲟𝪈"
)
_INLINE_LIST = re.compile(r":\s+\(?[1aAiI][.)]$")  # "We do two things: 1. ..."
_LIST_NUMBER = re.compile(r"(\d{1,3}|[A-Za-z])[.)]")
_SENTENCE_TAIL = 48  # characters of the step that a sentence decision looks back on
_MATCH_TAIL = 256  # and that a regular expression sees, so that a long step costs no more per character


@dataclass(frozen=True)
class BoundaryRule:
    """A rule that decides whether a new step begins.

    Attributes:
        begins_step: called with the step so far, the white space after it, the next character, and the index in the
            step at which its last line begins; returns True where the next character begins a new step.
        look_back: number of characters at the end of the step that the rule sees; None is all of the step.
        within_words: the rule is asked at each character, not only after white space or wide punctuation.
    """

    begins_step: Callable[[str, str, str, int], bool]
    look_back: int | None
    within_words: bool


def boundary_rule(split: Split) -> BoundaryRule:
    """Return the boundary rule that a `split` stands for.

    Args:
        split: "sentence", "paragraph", "line", a regular expression or a callable; see `Segmenter`.

    Raises:
        ValueError: an expression that does not compile, one for bytes, or a name that is almost right.

    Example:
        >>> from stepsal.trace.boundaries import boundary_rule
        >>> boundary_rule("sentence").begins_step("We add one.", " ", "T", 0)
        True
        >>> boundary_rule("sentence").begins_step("See Fig.", " ", "2", 0)
        False
    """
    if callable(split):
        return BoundaryRule(lambda step, gap, char, line: bool(split(step + gap, char)), None, within_words=True)
    if split == "sentence":
        return BoundaryRule(_sentence_ends, _SENTENCE_TAIL, within_words=False)
    if split == "paragraph":
        return BoundaryRule(lambda step, gap, char, line: gap.count("\n") >= 2, _MATCH_TAIL, within_words=False)
    if split == "line":
        return BoundaryRule(lambda step, gap, char, line: "\n" in gap, _MATCH_TAIL, within_words=False)
    pattern = _compiled(split)
    return BoundaryRule(
        lambda step, gap, char, line: any(
            match.end() >= len(step) and match.start() < len(step) for match in pattern.finditer(step + gap)
        ),
        _MATCH_TAIL,
        within_words=True,
    )


def split_to_json(split: Split) -> str | dict[str, Any]:
    """Return a split JSON-ready: a compiled expression with its flags, a callable by its qualified name.

    Args:
        split: as for `boundary_rule`.

    Example:
        >>> import re
        >>> from stepsal.trace.boundaries import split_to_json
        >>> split_to_json(re.compile("so", re.IGNORECASE))
        {'pattern': 'so', 'flags': ['IGNORECASE', 'UNICODE']}
    """
    if isinstance(split, str):
        return split
    if isinstance(split, re.Pattern):
        return {"pattern": split.pattern, "flags": [flag.name for flag in re.RegexFlag(split.flags)]}
    named: Any = split if hasattr(split, "__qualname__") else type(split)  # a partial has no name of its own
    return {"callable": f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"}


def split_from_json(split: Mapping[str, Any]) -> re.Pattern[str]:
    """Read a compiled expression that `split_to_json` has written.

    Args:
        split: a mapping with the keys "pattern" and "flags".

    Raises:
        ValueError: what was written is a callable, or is not an expression.

    Example:
        >>> import re
        >>> from stepsal.trace.boundaries import split_from_json, split_to_json
        >>> split_from_json(split_to_json(re.compile("so", re.IGNORECASE))).flags == re.IGNORECASE | re.UNICODE
        True
    """
    if "callable" in split:
        raise ValueError(
            f"split={split['callable']!r} is a callable, of which only the name was written: make the Segmentation "
            "with the function itself, or use a regular expression"
        )
    try:
        flags = re.RegexFlag(0)
        for name in split["flags"]:
            flags |= re.RegexFlag[name]
        return re.compile(split["pattern"], flags)
    except (KeyError, TypeError, re.error) as error:
        raise ValueError(f"split={dict(split)!r} is no regular expression with its flags: {error!r}") from error


def _compiled(split: str | re.Pattern[str]) -> re.Pattern[str]:
    """Compile a regular expression.

    Raises:
        ValueError: it does not compile, is for bytes, or is a name that is almost right.
    """
    if isinstance(split, str) and split.removesuffix("s") in _NAMED:
        raise ValueError(f"split={split!r} is unknown; use {split.removesuffix('s')!r}")
    if not isinstance(split, str) and not isinstance(getattr(split, "pattern", None), str):
        raise ValueError(
            f"split={split!r} is of no kind that is known: use 'sentence', 'paragraph', 'line', a regular expression "
            "for text, or a callable"
        )
    try:
        return re.compile(split)
    except re.error as error:
        raise ValueError(
            f"split={split!r} is neither 'sentence', 'paragraph', 'line' nor a regular expression: {error}"
        ) from error


def _sentence_ends(step: str, gap: str, char: str, line_start: int) -> bool:
    """Tell whether a step is a finished sentence, given the white space after it and the next character."""
    line_breaks = gap.count("\n")
    if line_breaks >= 2:
        return True
    body = step.rstrip(CLOSERS + WIDE_CLOSERS) or step
    mark = body[-1]
    if mark in WIDE_END:
        return bool(gap) or mark not in _WIDE_POINTS or not char.isdigit()
    if not gap:
        return False
    if mark in _OTHER_ENDS:
        return True
    if line_breaks and (char in _BULLETS or char.isdigit()):  # a new line that begins as list items do
        return True
    if mark != "." and mark not in _MARKS:
        return False
    opens_sentence = char in _OPENERS or (char.isalnum() and not char.islower())
    if mark != "." or body.endswith(".."):
        return opens_sentence  # not in "Wait... maybe", "5! = 120", "1 + 2 + ... + n"
    if _LIST_NUMBER.fullmatch(step[line_start:].strip()) or _INLINE_LIST.search(step):
        return False
    words = body[:-1].split()
    last_word = words[-1].lstrip("([\"'“‘*_").lower() if words else ""
    if last_word == "etc":
        return opens_sentence
    return last_word not in _ABBREVIATIONS
