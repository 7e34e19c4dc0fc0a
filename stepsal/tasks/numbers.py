r"""Numbers in answers: read whole (sign, grouping, fraction, power), or not at all.

The decimal mark is a point. A comma groups digits (1,250; also 1,25,000 as in India), and so do a space, a thin space
and what LaTeX writes for them, between groups of three digits (1 250, 1\,250). Other commas between digits make a list:
"3,5" is no number, since it is 3.5 in one country and two numbers in another. Percent, degrees, currencies and units
beside a number are left out: "15%" is 15. A number that is part of a larger expression, such as the 2 in \sqrt{2}, in
x^2 or in (1, 2), is none; behind a sign of equality it is ("10 - 3 = 7" is 7).
"""

from __future__ import annotations

import re
from fractions import Fraction

from stepsal.tasks.latex import boxes, ending, one_spelling, without_emphasis

MOST_DIGITS = 4000  # more make a number that Python does not print

_PLAIN = (
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d{1,3}(?: \d{3})+(?! ?\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!,?\d)|\d+)"
    r"(?:\.\d+)?(?:[eE][+-]?\d{1,9}(?!\d))?|\.\d+(?:[eE][+-]?\d{1,9}(?!\d))?)"
)
_FRAC = rf"\\frac\{{\s*(?P<{{0}}>[+-]?\s*{_PLAIN})\s*\}}\{{\s*(?P<{{1}}>-?\s*{_PLAIN})\s*\}}"
_TIMES = r"\s*(?:\\times|\\cdot|\*|x)\s*"
_POWER = r"\^\s*(?:\{\s*(?P<braced>[+-]?\s*\d+)\s*\}|\((?P<round>[+-]?\d+)\)|(?P<bare>[+-]?\d+))"
_NUMBER = re.compile(
    r"(?P<sign>[+-]\s*)?(?:"
    rf"(?P<whole>\d+)(?:\s*{_FRAC.replace('{0}', 'mixed_top').replace('{1}', 'mixed_bottom')}"
    r"|\s+(?P<slash_top>\d+)\s*/\s*(?P<slash_bottom>\d+))"
    rf"|{_FRAC.replace('{0}', 'top').replace('{1}', 'bottom')}"
    rf"|(?:(?P<factor>{_PLAIN}){_TIMES}(?=10\s*\^))?(?P<base>{_PLAIN})\s*{_POWER}"
    rf"|(?P<numerator>{_PLAIN})\s*/\s*(?P<denominator>{_PLAIN})"
    rf"|(?P<plain>{_PLAIN})"
    r")".replace("{{", "{").replace("}}", "}")
)
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|mathbf|textbf|textrm|textit|mathit|mathsf|operatorname)\s*\{([^{}]*)\}")
_CURRENCY = r"[$€£¥₹]"
#: Commands that end an expression to their left and begin one to their right.
_BREAKS = (
    r"\\(?:approx|equiv|implies|iff|to|rightarrow|Rightarrow|therefore|because|l?geq?|leq?|neq?|item|sim|simeq|colon|cdots|"
    r"l?dots|text|ldots|hfill|newline|par|because|Longrightarrow|square|blacksquare|qed|checkmark)(?![A-Za-z])\s*"
)
_VARIABLE = r"(?<![A-Za-z'’])[A-Za-z]"
_OPERAND = rf"(?:[\d)\]}}]|{_VARIABLE})"
_OPERAND_BEFORE = re.compile(rf"{_OPERAND}\s*\Z")
_PART_BEFORE = re.compile(  # what makes a number to its right a part of an expression
    r"(?:[\w.\\√]|\d[,:'’]|\d\s*x\s*|[\^_]\s*\(?|(?<!\\)\{\s*|\\\{\s*|[\^_]\{?\s*[+-]?"
    rf"|{_OPERAND}\s*[-+*/^]\s*|[A-Za-z]['’]*\(\s*"
    r"|[(\[]\s*-?[\d./]+\s*[,;]\s*"
    rf"|(?!{_BREAKS}\Z)\\[A-Za-z]+(?:_(?:\w|\{{\w+\}}))?\s*\(?)\Z"
)
_PER = r"(?:[A-Za-z]{3,}|h|s|hr|kg|lb|mi|km)\b(?!\()"  # 12/hour
_PART_BEHIND = re.compile(  # the same for a number to its left
    rf"\s*(?:\^(?!\\circ)|[+*]\s*[\w({{\\.]|/\s*(?!{_PER})[\w({{\\.]|-\s*[\d\\(.]|!\s*[+*/=-]|_|\\?\}}"
    r"|[,;]\s*-?[\d./]+\s*[)\]]|x\s*\d"
    rf"|(?!{_BREAKS})\\(?!circ)[A-Za-z])"
    r"|\(|[:.,'’]\d|\s*\\\{"
)
_UNIT = r"(?:[A-Za-zµΩ'\"]+|[/*.]|\\cdot)(?:\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d+))?"
_UNITS_BEHIND = re.compile(rf"(?:\s*{_UNIT})*\s*(?:\([A-Za-z ]+\))?\s*[.,;:]*\s*\Z")
_WORDS_BEFORE = re.compile(r"[A-Za-z\s:,]*\Z")
_LETTERS = re.compile(r"[A-Za-z]+")
_UNIT_LETTERS = frozenset("mgshLlKNJWVACF")
_SHORT_UNITS = frozenset(
    "cm mm km nm kg mg lb oz ft yd mi in hr mL ml cL dL kN kJ kW MW Hz eV pm am st nd rd th cc pt qt ha".split()
)
_NO_UNITS = frozenset(["or", "and", "to", "mod", "if", "when", "plus", "minus", "times", "over", "not", "is"])


def read_number(text: str) -> Fraction | None:
    r"""Return the number that an answer states: that of its last box, or else the last number of all.

    Args:
        text: an answer.

    Returns:
        The exact value; None where the last box is no number, or where there is no box and no number.

    Example:
        >>> from stepsal.tasks.numbers import read_number
        >>> read_number(r"There are \boxed{1,\!250}."), read_number("It is 3/4."), read_number(r"\boxed{\sqrt{2}}")
        (Fraction(1250, 1), Fraction(3, 4), None)
    """
    text = ending(text)
    if spans := boxes(text):
        return whole_number(spans[-1].content)
    plain = _plain(text)
    for match in reversed(list(_NUMBER.finditer(plain))):
        if (value := _stated(plain, match)) is not None:
            return value
    return None


def whole_number(text: str) -> Fraction | None:
    r"""Return the value of a text that is one number, perhaps with "x =" before and a unit behind it.

    Args:
        text: such as a reference, or what stands in a box.

    Example:
        >>> from stepsal.tasks.numbers import whole_number
        >>> whole_number(r"x = -1\,250\text{ cm}^2"), whole_number("2 or 3"), whole_number("10^6")
        (Fraction(-1250, 1), None, Fraction(1000000, 1))
    """
    *names, plain = re.split(r"(?<![<>!\\])=|\\approx", _plain(text))
    if any(re.search(r"\b(?:or|and)\b|[,;](?!\d{3})", name) for name in names):
        return None  # several equations
    values = [(m, value) for m in _NUMBER.finditer(plain) if (value := _stated(plain, m)) is not None]
    if not values:
        return None
    match, value = values[0]
    before, behind = plain[: match.start()], plain[match.end() :]
    if not _WORDS_BEFORE.match(before) or not _UNITS_BEHIND.match(behind):
        return None
    words = _LETTERS.findall(behind)
    is_unit = all(len(word) > 1 or word in _UNIT_LETTERS for word in words) and not _NO_UNITS.intersection(words)
    return value if is_unit and not re.search(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", before) else None


def _plain(text: str) -> str:
    """Return a text without emphasis, currencies, degrees, percents and delimiters of formulas, in one spelling."""
    text = one_spelling(without_emphasis(text))
    text = _TEXT.sub(r" \1 ", text)
    text = re.sub(rf"(?<![\w)])-\s*\\?{_CURRENCY}\s*(?=[\d.])", "-", text)
    text = re.sub(rf"\\?{_CURRENCY}|\\[()\[\]]|`", " ", text)
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\^\\circ|\\?%", " ", text))


def _stated(text: str, match: re.Match[str]) -> Fraction | None:
    """Return the value of a number, or None where it is part of a larger expression."""
    start = match.start()
    before = text[max(0, start - 40) : start]
    sign = (match["sign"] or "").strip()
    if sign and match["sign"] != sign and not re.search(r"(?:[=(:]|^)\s*\Z", before):
        start, sign = match.end("sign"), ""  # a dash or the mark of a list, unless it follows a sign of equality
        if _OPERAND_BEFORE.search(before):
            return None
        before = "" if before.endswith(("\n", " ")) or not before else before + " "
    elif sign:
        if _OPERAND_BEFORE.search(before):
            return None
        if before[-1:].isalpha() or before.endswith("-"):
            before, sign = "", ""  # a hyphen or a dash
    if _PART_BEFORE.search(before) or _PART_BEHIND.match(text, match.end()) or _variable(text, match.end()):
        return None
    value = _value(match)
    return None if value is None else -value if sign == "-" else value


def _variable(text: str, end: int) -> bool:
    """Tell whether the letters glued to a number are a variable and no unit."""
    word = _LETTERS.match(text, end)
    if word is None:
        return False
    if len(word[0]) == 1:
        return word[0] not in _UNIT_LETTERS
    return word[0] not in _SHORT_UNITS and (len(word[0]) == 2 or set(word[0]) <= set("abcnpqrtuvwxyz"))


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the unsigned value of a match of `_NUMBER`; None for a division by zero and for what is too long."""
    if len(match[0]) > MOST_DIGITS:
        return None
    if match["whole"]:
        top, bottom = (_fraction(match[f"mixed_{part}"] or match[f"slash_{part}"]) for part in ("top", "bottom"))
        if top is None or bottom is None or not 0 <= top < bottom:
            return None
        return Fraction(match["whole"]) + top / bottom
    if match["base"]:
        base, factor = _fraction(match["base"]), _fraction(match["factor"] or "1")
        exponent = int((match["braced"] or match["round"] or match["bare"]).replace(" ", ""))
        if base is None or factor is None or (not base and exponent < 0):
            return None
        if abs(exponent) * len(match["base"]) > MOST_DIGITS:
            return None
        return factor * base**exponent
    numerator = _fraction(match["top"] or match["numerator"] or match["plain"])
    denominator = _fraction(match["bottom"] or match["denominator"] or "1")
    return numerator / denominator if numerator is not None and denominator else None


def _fraction(digits: str) -> Fraction | None:
    """Return the value of digits with grouping and exponent; None where the exponent is too large."""
    digits = re.sub(r"[,\s]", "", digits)
    exponent = re.search(r"[eE]([+-]?\d+)\Z", digits)
    return None if exponent and abs(int(exponent[1])) > MOST_DIGITS else Fraction(digits)
