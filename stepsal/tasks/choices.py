r"""The letter of an option in an answer.

A statement names the letter: "the answer is C", "C is correct", "therefore, C", the same in some other languages, a box
that holds a letter, or a last line that is one. The last statement counts. One that names several letters ("B or C") is
a refusal: the answer then has no choice. A letter that names something else is no statement: in a box that belongs to
an equation, in one that its sentence calls a quantity (the energy \boxed{E}), or behind a noun ("plan B is correct").
Without any, what counts is the label of a last line ("Svar: C"), the beginning ("C, because ..."), an option that is
mentioned ("option C"), or the only letter that stands in brackets, in bold or before the text of an option; a list of
options is no choice.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from string import ascii_uppercase
from typing import NamedTuple

from stepsal.tasks.latex import boxes, ending

MOST_OPTIONS = 10
"""Most options that a problem may have."""

LETTERS = ascii_uppercase[:MOST_OPTIONS]
"""Letters of the options."""
#: Words that may follow the letter A or I; before others "A" is an article and "I" a pronoun.
_FOLLOWERS = (
    "because|since|as|and|or|not|for|with|is|by|but|due|given|which|where|while|rather|instead|"
    "though|although|so|from|in|on|at|if|et|ou|und|oder|weil|denn|porque|y|o|car|parce|que|"
    "per|based|here|above|below"
)
_LETTER = (
    rf"(?<![A-Za-z0-9À-ɏ_\\{{])(?P<letter>[{LETTERS}])(?![A-Za-z0-9À-ɏ_^]|['’][A-Za-z])"
    rf"(?!(?<=[AI])\s+(?!(?:{_FOLLOWERS})\b)[a-zà-ÿ])(?!\s*[=<>+*/^]|-[A-Za-z])"
)
_SMALL = rf"(?:\((?P<small>[{LETTERS.lower()}])\)|(?P<bare>[{LETTERS.lower()}])(?=\)|[.!]?[ ]*(?:\n|\Z)))"
_MARKS = r"[\s\"'“”‘’«»(\[{:,*_#=>-]{0,8}"  # what may stand between a phrase and its letter
_NOUN = (
    "answer|answers|choice|option|letter|alternative|antwort|lösung|respuesta|opción|opcion|alternativa|letra|solución|"
    "réponse|reponse|solution|lettre|risposta|resposta|opzione|opção"
)
_ADJECTIVE = (
    "final|correct|right|best|true|most likely|likely|only|chosen|my|closest|accurate|option|choice|"
    "letter|therefore|thus|hence|then|clearly|probably|definitely|indeed|actually|simply|so|also|"
    "here|still|now|richtige|korrekte|richtig|korrekt|daher|somit|buchstabe|antwort|correcta|"
    "correcto|opción|letra|inciso|alternativa|correcte|exacte|finale|juste|bonne|lettre|corretta|"
    "correta|réponse|respuesta|resposta|risposta|the|la|el|die|le|l'option|is|either|to this question|to the question|"
    "of the question|to be"
)
_VERB = (
    "is|was|would be|will be|should be|must be|has to be|can only be|could only be|seems to be|appears "
    "to be|seems|looks to be|ought to be|remains|turns out to be|comes out as|ist|lautet|wäre|muss|es|"
    "sería|debe ser|est|serait|doit être|è|é|becomes"
)
_THEREFORE = (
    "therefore|hence|thus|so|consequently|accordingly|finally|in conclusion|daher|also|somit|folglich|"
    "por lo tanto|por tanto|así que|donc|ainsi"
)
_CORRECT = (
    "(?:correct|right|true)(?! (?:only|for|in|of|when|if|at|under|that|about)\\b)|"
    "(?:the|our|my) (?:(?:correct|right|best|final|only|true|valid|most likely)\\s+){0,2}"
    "(?:answer|one|choice|option|statement|alternative|solution)"
    "(?!(?: (?:that|which) is(?:n['’]t)?)? (?:not|wrong|incorrect|false)\\b)|(?:the )?best(?! [a-z])|richtig|korrekt|"
    "die richtige|correcta|correcto|la correcta|la respuesta|correcte|exacte|juste|la bonne"
)
#: Words that may stand before a letter that is correct; behind others, as in "plan B", it names something else.
_LEADS = re.compile(
    rf"(?i:\b(?:{_NOUN}|{_ADJECTIVE}|{_THEREFORE}|"
    "and|but|while|whereas|because|since|as|that|think|believe|say|says|means|conclude|see|find|get|know|if|when|say|"
    "not|case|und|aber|dass|denn|weil|y|pero|que|porque|et|mais|car|e|ma|mas|è|é)|[^\\w\\s])\\s*[\"'“‘«*]*\\Z|\\A\\s*\\Z"
)
_RELATIVE = r"(?: (?:that|which)(?: (?!not|wrong|incorrect|false|never|is|are)[a-z]+){1,4}?)?"  # "that fits best"
_STATEMENTS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        rf"(?i:\b(?:{_NOUN})\b){_RELATIVE}(?:{_MARKS}(?i:{_ADJECTIVE})\b){{0,4}}{_MARKS}(?:(?<=[:=*])|(?<=[:=]\s)|"
        rf"(?i:\b(?:{_VERB}))\b)(?:{_MARKS}(?i:{_ADJECTIVE})\b){{0,4}}{_MARKS}(?:{_LETTER}|{_SMALL})",
        rf"(?i:\banswer){_MARKS}{_LETTER}(?=\W*(?:$|[.)]))",
        rf"(?i:\b(?:it|this|that|which)(?: is|'s|’s| must be| has to be| should be| can only be| seems to be))"
        rf"(?:{_MARKS}(?i:{_ADJECTIVE})\b){{0,3}}{_MARKS}{_LETTER}",
        rf"(?i:\b(?:pick|choose|select|go with|going with|opt for|chose|settle on|elijo|wähle|choisis|"
        rf"(?:I|we)(?: would|['’]d) say|(?:leaves|leaving|left with)(?: us| me)?(?: with)?(?: only| just)?)\b)"
        rf"(?:{_MARKS}(?i:{_ADJECTIVE})\b){{0,3}}{_MARKS}{_LETTER}",
        rf"\bI (?:think|believe|guess|suspect)\b(?:{_MARKS}(?i:{_ADJECTIVE}|it|it['’]s)\b){{0,3}}{_MARKS}"
        rf"{_LETTER}(?=\W*(?:$|[.!;]))",
        rf"(?i:\bnot)\W{{1,3}}(?:option |choice )?[{LETTERS}]\W{{1,4}}but(?:\W{{1,4}}(?i:rather|option|choice))?"
        rf"\W{{1,4}}{_LETTER}",
        rf"(?i:\b(?:richtig|korrekt|correct|right) (?:ist|is)\b){_MARKS}{_LETTER}(?=\W*(?:$|[.!;]))",
        rf"(?i:\b(?:{_THEREFORE})\b)(?:{_MARKS}(?i:{_ADJECTIVE})\b){{0,3}}{_MARKS}{_LETTER}(?=\W*(?:$|[.!;]))",
        rf"(?i:\b(?:no|wait|actually|rather|correction|instead)\b)(?:{_MARKS}(?i:{_ADJECTIVE}|{_VERB})\b){{0,3}}{_MARKS}"
        rf"{_LETTER}(?=\W*(?:$|[.!;]))",
        rf"(?P<subject>){_LETTER}[)\]}}*\"'”]*\s+(?i:is|must be|ist|es|est)\s+"
        rf"(?:(?i:therefore|thus|clearly|indeed|also|the most|most likely)\s+)?(?i:{_CORRECT})(?!\w)",
        rf"(?:答案|正解|答え|正答|정?답)(?:应该|應該|应|應|就|即|选|選|为|為|是|は|은|는|项|選項|选项|:|,|\s|[\"'“(\[*「『])*{_LETTER}",
        rf"(?<![不别勿未])[选選](?:择|擇|项|項)?(?:是|为|為|:|\s|[\"'“(\[*「『])*{_LETTER}(?![^\n。,.;]{{0,8}}(?:不|错|錯))",
        rf"{_LETTER}[)\]*\"'”」』]*\s*(?:项|項|选项|選項)?\s*(?:是|为|為|最)?\s*正确",
        rf"(?i:ответ|правильный ответ){_MARKS}(?:(?:[—–]|(?i:это|является)){_MARKS})?{_LETTER}",
        rf"(?:उत्तर|विकल्प|الإجابة|الجواب)(?: (?:الصحيحة|الصحيح|هي|هو))*{_MARKS}{_LETTER}",
        rf"\bist\W{{1,3}}(?:(?i:antwort|option)\W{{1,3}})?{_LETTER}\W{{1,3}}(?i:richtig|korrekt)\b",
        rf"(?i:richtige|korrekte) (?i:antwort|lösung|option)\W{{1,3}}{_LETTER}(?=\W*(?:$|[.!;]))",
    )
)
_LISTED = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (rf"\({_LETTER}\)|\*\*{_LETTER.replace('letter', 'bold')}\W{{0,2}}\*\*", rf"^\W*{_LETTER}[).:]")
)
_LABELLED = re.compile(  # "Svar: C"
    r"(?:^|\n)\W*(?!\S*(?i:wrong|incorrect|false|not|reject|eliminate|exclude))(?:[^\s:]+ ){0,3}[^\s:]{2,}\s*:\W{0,4}"
    rf"{_LETTER}\W*\Z"
)
_FIRST = re.compile(rf"\A\W*{_LETTER}[)\]*]*\s*[,:–—-]?\s*(?i:because|since|as the|weil|denn|porque|car|因为)(?!\w)")
_MENTION = re.compile(rf"(?i:\b(?:option|choice|statement|opción|opcion))\W{{1,8}}{_LETTER}", re.MULTILINE)
_ALONE = re.compile(rf"^\W*{_LETTER}\W*$", re.MULTILINE)
_ALONE_SMALL = re.compile(rf"\W*(?P<letter>[{LETTERS.lower()}])\W*\Z")
_IN_BOX = re.compile(  # the letter, perhaps with "answer" before it and the text of the option behind it
    rf"\W{{0,3}}(?:(?i:the )?(?i:{_NOUN}|答案)\W{{1,4}}(?:(?i:is)\W{{1,4}})?)?"
    rf"(?P<letter>[{LETTERS}{LETTERS.lower()}])\W{{0,3}}(?:\Z|(?<=[).:])\s*\S.*|(?<=\s)\(.*\)\W*\Z)",
    re.DOTALL,
)
_OR = r"(?:\b(?:or|and|und|oder|y|o|ou|et)\b|[,/&或和、])"
_SEVERAL_IN_BOX = re.compile(rf"\W{{0,3}}[{LETTERS}]\W{{0,3}}(?:(?:;|{_OR})\W{{0,4}}[{LETTERS}]\W{{0,3}})+\Z")
_ANOTHER = re.compile(rf"\W{{0,4}}{_OR}\W{{0,4}}(?:(?i:option|choice)\W)?{_LETTER}")
_ONE_BEFORE = re.compile(rf"\b[{LETTERS}]\W{{0,3}}\s(?:or|and|nor|oder|und|o|y|ou|et)\s\W{{0,3}}\Z")
_UNSURE = re.compile(  # before a statement, in its clause
    r"(?i:\b(?:if|whether|suppose|supposing|assum\w+|unless|neither|nor|falls|wenn|si)\b"
    r"|\b(?:don['’]t|do not|doesn['’]t|does not|can['’]t|cannot|can not|isn['’]t|never) "
    r"(?:think|believe|say|mean|conclude)"
    r"|\bnot (?:that|true|the case)\b|\bone (?:might|may|could)\b)"
)
_REFUSED = re.compile(  # behind a letter
    r"[)\]}*\"'”’]*\s*(?:\?|不|"
    r"(?i:is|was|ist|es|est)\s+(?i:not|wrong|incorrect|false|nicht|falsch|incorrecta|fausse?)\b)"
)
#: What a letter stands for where a sentence calls it a quantity.
_QUANTITIES = dict(
    A="area|amplitude|absorbance|matri[xc]",
    B="field|flux|matri[xc]",
    C="capacit|concentrat|constant|circumference|heat",
    D="distance|diamet|diffus|displacement|discriminant",
    E="energ|field|modulus|expect",
    F="force|field|function|faraday",
    G="energ|gibbs|graph|group|gravit|conductance|modulus",
    H="enthalp|height|hamilton|field",
    I="current|inertia|intensity|identity|ideal",
    J="flux|current|angular|impulse|jacobian",
)


class _Statement(NamedTuple):
    """A place in a text that states a letter; None where it names several."""

    position: int
    letter: str | None


def read_choice(text: str, letters: str = LETTERS) -> str | None:
    r"""Return the letter that an answer chooses.

    Args:
        text: an answer.
        letters: letters of the options.

    Returns:
        An upper-case letter; None where the answer names none, or several.

    Example:
        >>> from stepsal.tasks.choices import read_choice
        >>> read_choice("The energy is $\\boxed{E}$.\n**Answer: D**"), read_choice("故选：C"), read_choice("A or B")
        ('D', 'C', None)
    """
    emphatic = unicodedata.normalize("NFKC", ending(text))
    plain = _simplified(emphatic)
    statements = [*_boxed(plain), *_stated(plain), *_last_line(plain)]
    statements = [s for s in statements if s.letter is None or s.letter in letters]
    if statements:
        return max(statements, key=lambda statement: statement.position).letter
    if match := _ALONE_SMALL.match(plain) or _LABELLED.search(plain[-200:]) or _FIRST.match(plain):
        letter = match["letter"].upper()
        return letter if letter in letters else None
    if mentions := [m for m in _MENTION.finditer(plain) if not _REFUSED.match(plain, m.end("letter"))]:
        return _unless_several(plain, mentions[-1], letters)
    if alone := list(_ALONE.finditer(plain)):
        return _unless_several(plain, alone[-1], letters) if len({m["letter"] for m in alone}) == 1 else None
    for pattern in _LISTED:
        named = {letter for m in pattern.finditer(emphatic) for letter in m.groups() if letter}
        if named:
            letter = named.pop()
            return letter if not named and letter in letters else None
    return None


def letters_of(question: str) -> str:
    r"""Return the letters of the options that a question lists, one at the start of a line each; else all letters.

    Args:
        question: the text of a question.

    Example:
        >>> from stepsal.tasks.choices import letters_of
        >>> letters_of("Which is odd?\nA) 2\nB) 3"), letters_of("Which letter comes first?")
        ('AB', 'ABCDEFGHIJ')
    """
    listed = re.findall(rf"^[ \t]*[*(]*([{LETTERS}])[*]*[).:]", question, re.MULTILINE)
    return LETTERS[: len(listed)] if len(listed) > 1 and "".join(listed) == LETTERS[: len(listed)] else LETTERS


def _simplified(text: str) -> str:
    """Remove emphasis, fonts and the delimiters of formulas; boxes stay."""
    for _ in range(2):  # fonts within fonts
        text = re.sub(r"\\(?:mbox|math(?:rm|bf|sf|it)|text(?:bf|rm|it)?|bf|rm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:bf|rm|it|bfseries)\s+", "", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    return re.sub(r"\*\*|__|`|\$|\\[()\[\],;:! ]|~", "", text)


def _boxed(text: str) -> Iterator[_Statement]:
    """Yield the letters in boxes that are no quantities."""
    for box in boxes(text):
        if _SEVERAL_IN_BOX.match(box.content):
            yield _Statement(box.start, None)
        match = _IN_BOX.match(box.content)
        if match is None or (match["letter"] in "AaIi" and re.match(r"\s+[a-z]", box.content[match.end("letter") :])):
            continue
        clause = re.split(r"[.!?\n,:;]|\b(?:where|with|and)\b", text[max(0, box.start - 200) : box.start])[-1]
        is_term = re.match(r"\s*[=<>+*/^]", text[box.end :]) or re.search(r"[=<>+*/^]\s*\Z", clause)
        names_it = re.search(rf"(?i:\b(?:{_QUANTITIES[match['letter'].upper()]}))", clause)
        if is_term or (names_it and not re.search(rf"(?i:\b(?:{_NOUN})\b)", clause)):
            continue
        yield _Statement(box.start, match["letter"].upper())


def _stated(text: str) -> Iterator[_Statement]:
    """Yield the letters that phrases state."""
    for pattern in _STATEMENTS:
        for match in pattern.finditer(text):
            groups = match.groupdict()
            name = next(name for name in ("letter", "small", "bare") if groups.get(name))
            start, end = match.start(name), match.end(name)
            clause = re.split(r"[.!?;,\n:]", text[max(0, match.start() - 120) : match.start()])[-1]
            if _UNSURE.search(clause + match[0][: start - match.start()]) or _REFUSED.match(text, end):
                continue
            if "subject" in groups and not _LEADS.search(clause):
                continue
            is_one_of_several = _ANOTHER.match(text, end) or _ONE_BEFORE.search(text[max(0, start - 14) : start])
            yield _Statement(start, None if is_one_of_several else match[name].upper())


def _last_line(text: str) -> Iterator[_Statement]:
    """Yield the letter of a last line that is nothing else, unless the line before is one too, as in a list."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and (match := _ALONE.match(lines[-1])) and not _ALONE.match(lines[-2]):
        yield _Statement(text.rindex(lines[-1]), match["letter"])


def _unless_several(text: str, match: re.Match[str], letters: str) -> str | None:
    """Return the letter of a match, or None where another follows or it is no option."""
    return match["letter"] if match["letter"] in letters and not _ANOTHER.match(text, match.end("letter")) else None
