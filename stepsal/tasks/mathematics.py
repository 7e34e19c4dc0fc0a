r"""Mathematical expressions in answers, compared by math-verify (sympy) with a limit on the time.

An answer states what stands in its last box; several values, where boxes are joined by "or", "and" or a comma. Without
a box it is what follows "the answer is", or else the last formula, the last line where that is all formula, or the last
number.

Before math-verify, an expression is written in one way: numbers without grouping (10\,080), mixed numbers as fractions
(11 5/6 is 71/6), inequalities of one variable as intervals, intervals in round brackets (]0,1[ is (0,1)), and without
units, conditions ("for all x"), roundings behind \approx and text around it. Units, names of variables before "=" and
percent signs are not compared. A list in braces is no pair in round brackets; one without brackets may be either, but
then has the order of the pair. A number in a base is none in another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from stepsal.tasks.latex import Span, boxes, ending, formulas, one_spelling, without_emphasis
from stepsal.tasks.math_process import Comparison, compare
from stepsal.tasks.numbers import read_number, whole_number

_TEXT = r"\\(?:text|mbox|mathrm|textrm|textbf|textit|mathbf|operatorname)"
_UNITS = (
    "mm|cm|dm|km|kg|mg|lbs?|oz|ft|feet|foot|in|inch(?:es)?|miles?|mph|yards?|meters?|metres?|centimeters?|centimetres?|"
    "kilomet(?:er|re)s?|grams?|kilograms?|lit(?:er|re)s?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|degrees?|"
    "radians?|[ap]\.?m\.?|[AP]\.?M\.?|units?|square units?|cubic units?|dollars?|cents?|euros?|people|students|ways?|"
    "sq|mL|hr|min|sec|m/s|km/h"
)
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d]| \d)")
_MIXED = re.compile(r"(?<![\d.,/^{\w])(\d+)\s+(?:(\d+)\s*/\s*(\d+)|\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\})(?![\d/^.])")
_END_POINT = r"([^\[\],;()]+|[^\[\],;]*\([^\[\],;]*\)[^\[\],;]*)"
_OUTWARD = (  # intervals with brackets that open outwards, as in France and Germany
    (re.compile(rf"\]\s*{_END_POINT}[,;]\s*{_END_POINT}\["), r"(\1,\2)"),
    (re.compile(rf"\[\s*{_END_POINT}[,;]\s*{_END_POINT}\[(?!\s*[^\[\],;]+[,;])"), r"[\1,\2)"),
    (re.compile(rf"\]\s*{_END_POINT}[,;]\s*{_END_POINT}\]"), r"(\1,\2]"),
)
_CONDITION = re.compile(
    rf"\s*[,;:.(]?\s*(?:{_TEXT}\s*\{{\s*,?\s*)?(?:\(\s*)?"
    r"(?:\bfor\s+(?:all|every|each|any|some)\b|\b(?:where|with|such that|pour tout|für alle|para todo)\b|\\forall).*\Z"
    r"|,\s*[a-z]\s*\\in\s*\\(?:mathbb|mathbf)\s*\{?[ZNRQC]\}?\s*\Z",
    re.DOTALL,
)
_WORDS = rf"{_TEXT}\s*\{{[^{{}}]*\}}"
_BEFORE = re.compile(rf"\A\s*{_WORDS}\s*:?\s*(?=\S)")
_BEHIND = re.compile(
    rf"(?<=\S)\s*(?:{_WORDS}|\\frac\s*\{{\s*{_WORDS}{_POWER}\s*\}}\s*\{{\s*{_WORDS}{_POWER}\s*\}}|(?<=[\d}}\s)])(?<![a-z])(?:{_UNITS})\b){_POWER}\s*\.?\s*\Z"
)
_ANSWER = re.compile(
    r"(?i:\b(?:answer|answers|antwort|respuesta|réponse|result)\b|答案)"
    r"(?:[^.\n$\\:=]{0,60}?(?:\b(?:is|are|ist|lautet|es|est)\b|[:=：是为])\s*[:：]?)\s*"
)
_ONE_WORD = re.compile(r"\s*([A-Za-z]{2,})\s*(?:[.!]|\n|\Z)")
_SENTENCE_END = re.compile(r"[.!?](?:\s|\Z)|[\n。]")
_FOR_ALL = re.compile(  # in prose, where it ends a clause
    r"[\s,]*\bfor (?:all|every|each|any)\s+(?:[a-z]{3,}\s+){0,2}"
    r"(?:\$[^$\n]+\$|\\\([^\n]+?\\\)|[a-z](?:\s*(?:>|<|∈|≥|in\b)\s*\S+)?)\s*(?=[.,;\n]|\Z)"
)
_BEGINNING = re.compile(
    r"(?i:\A\s*(?:(?:so|thus|therefore|hence|then|finally|we get|we have|this gives|that is)\b[,:]?\s*)+)"
)
_BOUND = r"((?:[\d\s.+*/^{}()-]|\\(?:frac|sqrt|pi|infty|cdot)(?![A-Za-z]))+)"
_STRICT = ("<", ">", r"\lt", r"\gt")
_LESS, _MORE = (
    r"(<|\\leq?(?:slant)?(?![A-Za-z])|\\lt(?![A-Za-z]))",
    r"(>|\\geq?(?:slant)?(?![A-Za-z])|\\gt(?![A-Za-z]))",
)
_VARIABLE = r"\s*[a-z]\s*"
_OR = rf"(?:{_TEXT}\s*\{{\s*or\s*\}}|\bor\b|,)"
_INEQUALITIES = (  # "b" stands for a bound, "<" and ">" for the signs between it and the variable
    ("b<<b", re.compile(rf"{_BOUND}{_LESS}{_VARIABLE}{_LESS}{_BOUND}")),
    ("b>>b", re.compile(rf"{_BOUND}{_MORE}{_VARIABLE}{_MORE}{_BOUND}")),
    ("<b", re.compile(rf"{_VARIABLE}{_LESS}{_BOUND}")),
    (">b", re.compile(rf"{_VARIABLE}{_MORE}{_BOUND}")),
    ("b<", re.compile(rf"{_BOUND}{_LESS}{_VARIABLE}")),
    ("b>", re.compile(rf"{_BOUND}{_MORE}{_VARIABLE}")),
)
_ALL_TEXT = re.compile(rf"\A\s*{_TEXT}\s*\{{([^{{}}]*\d[^{{}}]*)\}}\s*\Z")
_DEGREES = re.compile(  # of an angle in a trigonometric function
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{?\d\}?)?)\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\\circ(?![A-Za-z])\s*[)}]?"
)
_RATIO = re.compile(r"[^:=,<>]+(?::[^:=,<>]+){2,}")  # of three and more, which sympy would divide
_NAME = re.compile(r"(?<![\\\w])[A-Za-z](?:_\w)?\s*=(?!=)\s*")
_BASE = re.compile(r"(?<=\d)_\{?\s*(\d+)\s*\}?\Z")
_INTEGER = re.compile(r"-?\d{1,4000}")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:or|and|sin|cos|tan|log|ln|exp|sqrt|pi)\b)[A-Za-z]{2,}")
_FORMULA = re.compile(r"[\d\\]|[<>=∞]|^\s*[A-Za-z]\s*$")
_JOINT = re.compile(
    r"[\s$\\()\[\].]*(?:,|;|、|&|\bor\b|\band\b|和|或|\\text\s*\{\s*(?:or|and)\s*\})[\s$\\()\[\]]*"
    r"(?:(?:or|and)\b)?[\s$\\()\[\]]*(?:\w(?:_\{?\w\}?)?\s*=\s*)?\Z"
)
_LOOSE_JOINT = re.compile(r"\b(?:and|or)\b|[,;]")
_CORRECTION = re.compile(r"(?i:\b(?:no|not|wait|actually|instead|rather|sorry|correct\w*|mistake|wrong)\b)")


class Expression(NamedTuple):
    r"""The expression that an answer states, read once, to be compared with any reference.

    Attributes:
        latex: the expression in one spelling; or prose, see `is_prose`.
        several: all values, where boxes far from each other may hold one each; for references with several values.
        number: the expression without its unit, where it is a number with one.
        rounded: the decimal that an exact value is rounded to (22/7 \approx 3.143); for references that are decimals.
        is_prose: `latex` is prose, in which math-verify looks for an expression.
    """

    latex: str
    several: str | None = None
    number: str | None = None
    rounded: str | None = None
    is_prose: bool = False

    def compare(self, reference: str) -> Comparison:
        r"""Compare the expression with a reference.

        Args:
            reference: LaTeX of the right expression.

        Example:
            >>> from stepsal.tasks.mathematics import read_expression
            >>> read_expression("The answer is 11 5/6.").compare(r"\frac{71}{6}").same
            (True,)
        """
        return self.compare_all((reference,))

    def compare_all(self, references: tuple[str, ...]) -> Comparison:
        """Compare the expression with several references.

        Args:
            references: LaTeX of each.
        """
        spelled = [expression(reference) for reference in references]
        wholes = tuple(whole_number(r) is not None and not re.search(r"(?<![\\A-Za-z])[A-Za-z]", r) for r in spelled)
        kinds: dict[tuple[str, bool], list[int]] = {}
        for i, (reference, is_whole) in enumerate(zip(spelled, wholes, strict=True)):
            stated, boxed = self._side(reference, is_whole)
            if boxed:
                stated, spelled[i] = _in_same_brackets(stated, reference)
            kinds.setdefault((stated, boxed), []).append(i)
        same, texts, problem = [False] * len(references), [], None
        for (stated, boxed), places in kinds.items():
            result = _compared(stated, tuple(spelled[i] for i in places), boxed=boxed)
            texts.append(result.text)
            problem = problem or result.problem
            for i, is_same in zip(places, result.same, strict=True):
                same[i] = (is_same or (boxed and _bare(stated) == _bare(spelled[i]))) and _agree(stated, spelled[i])
        return Comparison(texts[0], tuple(same), problem)

    def _side(self, reference: str, is_whole: bool) -> tuple[str, bool]:
        """Return the text to compare with a reference, and whether it is an expression."""
        if self.several is not None and _is_list(reference) and not _is_list(self.latex):
            return self.several, True
        if self.rounded is not None and re.fullmatch(r"-?\d*\.\d+", reference):
            return self.rounded, True
        if self.number is not None and is_whole:
            return self.number, True
        return self.latex, not self.is_prose


def read_expression(text: str) -> Expression | None:
    r"""Return the expression that an answer states, or None if there is none.

    Args:
        text: an answer.

    Example:
        >>> from stepsal.tasks.mathematics import read_expression
        >>> read_expression(r"It is \boxed{]0,1[}.").latex, read_expression("So 10 080.").latex
        ('(0,1)', '10080')
    """
    text = without_emphasis(ending(text))
    if spans := boxes(text):
        return _of_spans(text, spans, one_spelling(_joined(text, spans, _LOOSE_JOINT.search)))
    text = _FOR_ALL.sub("", text)
    answers = list(_ANSWER.finditer(text))
    for match in reversed(answers):
        if content := _statement(text[match.end() :]):
            return _of_content(content)
        if word := _ONE_WORD.match(text, match.end()):
            return _of_content(rf"\text{{{word[1]}}}")
    if spans := formulas(text):
        tail = text[spans[-1].end :]
        number = read_number(tail)
        return _of_number(number) if number is not None else _of_spans(text, spans, None)
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and (content := _statement(_BEGINNING.sub("", re.split(r"\bis\b|:", lines[-1])[-1]) + "\n")):
        return _of_content(content)
    if (number := read_number(text)) is not None:
        return _of_number(number)
    return Expression(one_spelling(text), is_prose=True) if text.strip() else None


def expression(content: str) -> str:
    r"""Write an expression in one way, without grouping, units, conditions and text around it.

    Args:
        content: LaTeX, such as what stands in a box.

    Example:
        >>> from stepsal.tasks.mathematics import expression
        >>> expression(r"f(x) = 10\,080 x \text{ for all } x"), expression(r"11 5/6\text{ cm}")
        ('f(x) = 10080 x', '\\frac{71}{6}')
    """
    latex = re.sub(r"\\?\$|[€£¥₹]|\\(?:\(|\)|\[(?![^\]]*\\\\)|\])", " ", one_spelling(content))
    latex = re.sub(r"\s+", " ", latex)  # patterns try each way to share a run of spaces
    latex = _CONDITION.sub("", latex) or latex
    latex = _exact_and_rounded(_ALL_TEXT.sub(r"\1", latex))[0]
    while (shorter := _BEHIND.sub("", latex)).strip() not in ("", latex.strip()) and not _ends_in_joint(shorter):
        latex = shorter
    shorter = _BEFORE.sub("", latex)
    latex = shorter if _FORMULA.search(shorter) else latex
    latex = _GROUPS.sub(lambda match: match[0].replace(" ", ""), latex)
    latex = _MIXED.sub(_improper, latex)
    for pattern, inward in _OUTWARD:
        latex = pattern.sub(inward, latex)
    latex = _DEGREES.sub(r"\1{\\frac{\2\\pi}{180}}", _interval(latex))
    if _RATIO.fullmatch(latex):
        latex = f"({latex.replace(':', ',')})"
    latex = re.sub(r"(?<=[\d}])\s*\^\\circ\s*\Z", "", latex.strip())
    return re.sub(r"\s+", " ", latex).strip().rstrip(".").strip()


def _compared(stated: str, references: tuple[str, ...], *, boxed: bool) -> Comparison:
    """Compare an expression with references; whole numbers without math-verify, which they would only keep busy."""
    if boxed and all(_INTEGER.fullmatch(text) for text in (stated, *references)):
        return Comparison(str(int(stated)), tuple(int(stated) == int(reference) for reference in references))
    return compare(stated, references, boxed=boxed)


def _of_content(content: str) -> Expression:
    latex = expression(content)
    rounded = _exact_and_rounded(one_spelling(content))[1]
    number = whole_number(content) if rounded is None else None
    return Expression(
        latex,
        number=None if number is None or _is_exact_text(latex) else _latex_of(number),
        rounded=None if rounded is None else expression(rounded),
    )


def _exact_and_rounded(latex: str) -> tuple[str, str | None]:
    r"""Return what stands on either side of \approx; an unknown, or nothing, to its left has no exact value."""
    exact, *roundings = re.split(r"\s*\\(?:approx|simeq|doteq)(?![A-Za-z])\s*", latex)
    if not roundings:
        return latex, None
    value = re.sub(r"_(?:\w|\{[^{}]*\})", "", exact.rsplit("=", 1)[-1])
    return (exact, roundings[-1]) if re.search(r"\d|\\(?:pi|infty)(?![A-Za-z])", value) else (roundings[-1], None)


def _in_same_brackets(stated: str, reference: str) -> tuple[str, str]:
    """Return both sides of a comparison; where only one is in brackets, and the other a bare list, both in brackets."""
    if _kind(stated) == "round" and _is_bare_list(reference):
        return stated, stated.strip()[0] + reference + stated.strip()[-1]
    if _kind(reference) == "round" and _is_bare_list(stated):
        return reference[0] + _NAME.sub("", stated) + reference[-1], reference
    return stated, reference


def _is_bare_list(latex: str) -> bool:
    return _is_list(latex) and re.search(r"[(\[{]|\\pm|\bor\b", re.sub(r"\\(?:frac|sqrt)\{|[_^]\{", "", latex)) is None


def _bare(latex: str) -> str:
    """Return an expression without spaces and the marks of text."""
    return re.sub(rf"{_TEXT}(?=\s*\{{)|[{{}}\s]", "", latex)


def _of_number(number: Fraction) -> Expression:
    return Expression(_latex_of(number))


def _of_spans(text: str, spans: list[Span], several: str | None) -> Expression:
    """Return what the last spans state: all that are joined to the last one."""
    joined = _joined(text, spans, _JOINT.match)
    if joined == spans[-1].content:
        return _of_content(joined)._replace(several=several if several != joined else None)
    return _of_content(joined)


def _joined(text: str, spans: list[Span], is_joint: Callable[[str], object]) -> str:
    """Return the contents of the last spans that stand near to each other, with commas between."""
    contents = [spans[-1].content]
    for before, behind in zip(spans[-2::-1], spans[:0:-1], strict=True):
        between = text[before.end : behind.start]
        if len(between) > 70 or not is_joint(between) or _CORRECTION.search(between):
            break
        if before.content not in contents:
            contents.insert(0, before.content)
    return ",".join(contents)


def _statement(text: str) -> str | None:
    """Return the formula that begins a text and ends with its sentence or before a word; None if none does."""
    text = text.lstrip()
    if (spans := formulas(text)) and spans[0].start == 0:
        n_joined = 1
        while n_joined < len(spans) and _JOINT.match(text[spans[n_joined - 1].end : spans[n_joined].start]):
            n_joined += 1
        return _joined(text, spans[:n_joined], _JOINT.match)
    if end := _SENTENCE_END.search(text):
        text = text[: end.start()]
    outside = re.sub(rf"{_TEXT}\s*\{{[^{{}}]*\}}", lambda match: " " * len(match[0]), text)
    if word := _WORD.search(outside):
        unit = re.match(rf"(?:{_UNITS})\b{_POWER}\s*\Z", text[word.start() :])
        head = text[: word.start()].rstrip(" ,;:(")
        is_cut = not unit
        text = head
        if is_cut and not re.search(r"[\d\\]", head):
            return None
        text = re.sub(r"(?:\s(?:or|and|a|I))+\Z", "", head)
    return text if text and _FORMULA.search(text) else None


def _improper(match: re.Match[str]) -> str:
    """Return a mixed number as a fraction, or as it is where it is none."""
    whole, top, bottom = (int(part) for part in match.groups() if part is not None)
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}" if 0 < top < bottom else match[0]


def _interval(latex: str) -> str:
    """Return inequalities of one variable as an interval, "x < a or x > b" as a union; others as they are."""
    rays = re.split(rf"\s*{_OR}\s*", latex)
    if len(rays) == 2:
        sides = [_interval(ray) for ray in rays]
        return (
            rf"{sides[0]}\cup{sides[1]}" if all(side != ray for side, ray in zip(sides, rays, strict=True)) else latex
        )
    for form, pattern in _INEQUALITIES:
        if not (match := pattern.fullmatch(latex)):
            continue
        parts = [part.strip() for part in match.groups()]
        if len(parts) == 2:  # a ray
            sign, bound = parts if form in ("<b", ">b") else parts[::-1]
            parts = [bound, sign, "<", r"\infty"] if form in ("b<", ">b") else [r"-\infty", "<", sign, bound]
        low, first, last, high = parts[::-1] if form == "b>>b" else parts
        return f"{'(' if first in _STRICT else '['}{low},{high}{')' if last in _STRICT else ']'}"
    return latex


def _ends_in_joint(latex: str) -> bool:
    """Tell whether an expression was cut behind "or" or a comma."""
    return re.search(r"(?:\b(?:or|and)|[,;=+*/^-])\s*\Z", latex) is not None


def _is_exact_text(latex: str) -> bool:
    """Tell whether math-verify reads a number as it is."""
    return re.fullmatch(r"-?\d+(?:\.\d+)?(?:\s*\\?%)?|-?\\frac\{-?\d+\}\{\d+\}", latex) is not None


def _latex_of(number: Fraction) -> str:
    sign = "-" if number < 0 else ""
    top, bottom = abs(number.numerator), number.denominator
    return f"{sign}{top}" if bottom == 1 else rf"{sign}\frac{{{top}}}{{{bottom}}}"


def _is_list(latex: str) -> bool:
    r"""Tell whether an expression has a comma, or a \pm, outside of the grouping of digits."""
    return re.search(r"[,;](?!\d{3}(?!\d))|\\pm", latex) is not None


def _agree(stated: str, reference: str) -> bool:
    """Tell whether an expression and a reference that math-verify calls equal have the same shape.

    A set in braces is no pair or interval, whose order or ends matter, and several equations are not the last one.
    """
    if {_kind(stated), _kind(reference)} == {"braces", "round"}:
        return False
    bases = [match[1] for match in map(_BASE.search, (stated, reference)) if match]
    if len(set(bases)) > 1:
        return False
    equations = re.split(rf"{_TEXT}\s*\{{\s*(?:or|and)\s*\}}|\b(?:or|and)\b|[,;]", stated)
    return not (len(equations) > 1 and all("=" in part for part in equations)) or bool(_is_list(reference))


def _kind(latex: str) -> str:
    """Return "braces", "round" or "other" for the brackets around a list."""
    latex = re.sub(r"^[A-Za-z]\s*(?:=|\\in(?![a-z]))\s*", "", latex.strip())
    if latex.startswith(r"\{") and latex.endswith(r"\}"):
        return "braces"
    return "round" if latex[:1] in "([" and latex[-1:] in ")]" and _is_list(latex) else "other"
