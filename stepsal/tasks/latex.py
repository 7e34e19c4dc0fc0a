r"""Boxes in LaTeX, and one spelling for what answers spell in many ways: spaces, signs, symbols and fractions.

The graders of numbers, mathematics and choices read answers through these functions.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LONGEST = 4000
"""Most characters of an answer that are read, from its end: patterns take their time on long texts."""

_TAG = re.compile(r"<answer>\s*([^<>\n]{1,100}?)\s*</answer>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[\dA-Za-z]))")
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$((?:\\.|[^$\n])+?)(?<!\\)\$", re.DOTALL)
_SPACES = dict.fromkeys([0xA0, *range(0x2002, 0x200B), 0x202F, 0x205F, 0x3000], " ")
_SIGNS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_SYMBOLS = {
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "±": r"\pm ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/",
    "∀": r"\forall ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "θ": r"\theta ", "°": r"^\circ ",
    "º": r"^\circ ", "≈": r"\approx ", "\u200b": "", "\ufeff": "",
}  # fmt: skip
_FRACTIONS = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_TABLE = _SPACES | _SIGNS | {ord(symbol): latex for symbol, latex in _SYMBOLS.items()}
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_TEXT = r"\\(?:text|mathrm|textrm|mbox)\s*\{"
_SCALE = re.compile(rf"(?<=\d)\s*(?P<text>{_TEXT})?\s*(?P<scale>{'|'.join(_SCALES)})\b")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,50})\.(\d{0,50})\\(?:overline|bar|dot)\s*\{(\d{1,50})\}")
_ORDINAL = re.compile(rf"(?<=\d)\s*\^\s*(?:\{{\s*{_TEXT}\s*(?:st|nd|rd|th)\s*\}}\s*\}}|\{{\s*(?:st|nd|rd|th)\s*\}})")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


class Span(NamedTuple):
    """A part of a text that holds an expression, with its delimiters.

    Attributes:
        start: index of the first character of the opening delimiter.
        end: index behind the closing delimiter.
        content: the text between the delimiters.
    """

    start: int
    end: int
    content: str


def ending(text: str) -> str:
    r"""Return the last `LONGEST` characters of a text, after the last box if that is earlier, with short white space.

    Args:
        text: an answer; what it states stands at its end.

    Example:
        >>> from stepsal.tasks.latex import ending
        >>> ending("a    b" + "\n" * 9 + "c")
        'a b\n\nc'
    """
    start = max(0, len(text) - LONGEST)
    end, box = text[start:], ""
    if (last := max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))) >= 0 and last < start:
        span = boxes(text[last : last + LONGEST])
        box = text[max(0, last - LONGEST // 4) : last + span[-1].end] + "\n" if span else ""
        end = text[max(start, last + (span[-1].end if span else 0)) :]
    text = re.sub(r"[^\S\n]+", lambda match: match[0][0], box + end)
    return re.sub(r"\n\s*\n", "\n\n", text)


def boxes(text: str) -> list[Span]:
    r"""Find the boxes of a text, those that stand in another box left out; without any, short <answer>...</answer>.

    Args:
        text: any text; a box that is never closed ends with it.

    Example:
        >>> from stepsal.tasks.latex import boxes
        >>> [box.content for box in boxes(r"It is \boxed{\frac{1}{2}}, or \fbox{3}.")]
        ['\\frac{1}{2}', '3']
    """
    spans: list[Span] = []
    for match in _BOX.finditer(text):
        if spans and match.start() < spans[-1].end:
            continue
        if not match[0].endswith("{"):
            content = re.match(r"\d+(?:\.\d+)?|.", text[match.end() :])
            assert content is not None
            spans.append(Span(match.start(), match.end() + content.end(), content[0]))
            continue
        end = _closing(text, match.end())
        spans.append(Span(match.start(), min(end + 1, len(text)), text[match.end() : end]))
    return spans or [Span(match.start(), match.end(), match[1]) for match in _TAG.finditer(text)]


def formulas(text: str) -> list[Span]:
    r"""Find what stands between $...$, $$...$$, \(...\) or \[...\].

    Args:
        text: any text.

    Example:
        >>> from stepsal.tasks.latex import formulas
        >>> [formula.content for formula in formulas(r"$x$ is \(3\)")]
        ['x', '3']
    """
    return [Span(m.start(), m.end(), next(g for g in m.groups() if g is not None)) for m in _MATH.finditer(text)]


def one_spelling(text: str) -> str:
    r"""Write spaces, minus signs, symbols and fractions as plain characters and common LaTeX.

    Args:
        text: prose with formulas, or the inside of a formula.

    Example:
        >>> from stepsal.tasks.latex import one_spelling
        >>> one_spelling(r"−1½ \dfrac 3 4 10⁶ 1{,}250 1,\!250")
        '-1 1/2 \\frac{3}{4} 10^{6} 1,250 1,250'
    """
    text = re.sub(r"(?<=\d)\s*(?=[½⅓⅔¼¾⅕-⅞])", " ", text)
    text = re.sub(r"[½⅓⅔¼¾⅕-⅞]", lambda m: _FRACTIONS[m[0]], text)
    text = re.sub(r"[⁻⁰¹²³⁴-⁹]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\w+))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text.translate(_TABLE))
    text = re.sub(r"\\!\s*|\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?)(?![A-Za-z])\.?", "", text)
    text = re.sub(r"\s*\{([,:])\}\s*", r"\1", text)
    text = _ORDINAL.sub("", text).replace(r"\varnothing", r"\emptyset")
    text = _REPEATING.sub(_fraction, text)
    text = _SCALE.sub(lambda match: rf" \times 10^{{{_SCALES[match['scale']]}}}{match['text'] or ' '}", text)
    text = re.sub(r"\\(?:mathrm|text|operatorname)\s*\{\s*([ie])\s*\}", r"\1", text)  # the constants
    text = re.sub(r"\\(?:[,;:> ]|q?quad(?![A-Za-z])|thinspace|enspace|nobreakspace)|~", " ", text)
    text = re.sub(r"\\(?:d|t|c)frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", _braced, text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\\degrees?(?![A-Za-z])", r"^\\circ ", text)
    return text


def without_emphasis(text: str) -> str:
    """Remove the asterisks of bold and italic text, but not those of products and powers.

    Args:
        text: text with Markdown.

    Example:
        >>> from stepsal.tasks.latex import without_emphasis
        >>> without_emphasis("**Answer:** *3* and 2**10 and 2 * 3")
        'Answer: 3 and 2^10 and 2 * 3'
    """
    text = re.sub(r"(?<=[\d)])\*\*(?=[\d(])", "^", text)
    text = text.replace("***", "").replace("**", "")
    return re.sub(r"(?<![\w*)])\*(?=\S)([^*\n]+)(?<=\S)\*(?![\w*(])", r"\1", text)


def _closing(text: str, start: int) -> int:
    """Return the index of the brace that closes a group, or the length of the text."""
    depth = 1
    for i in range(start, len(text)):
        if text[i] in "{}" and text[i - 1 : i] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return i
    return len(text)


def _fraction(match: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction."""
    whole, first, period = match.groups()
    digits = (whole or "0") + first
    return rf"\frac{{{int(digits + period) - int(digits)}}}{{{'9' * len(period) + '0' * len(first)}}}"


def _braced(match: re.Match[str]) -> str:
    r"""Return a \frac with braces around both parts."""
    numerator, denominator = (match[i] if match[i] is not None else match[i + 1] for i in (1, 3))
    return rf"\frac{{{numerator}}}{{{denominator}}}"
