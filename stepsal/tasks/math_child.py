"""The program that reads and compares expressions by math-verify, one request per line, in a process of its own.

A request is a JSON object {"stated": text, "references": [text, ...], "boxed": bool, "seconds": float}; the reply is
{"text": str or null, "same": [bool, ...]}, where `text` is how sympy writes the stated expression. `boxed` says that
`stated` is an expression; otherwise it is prose, of which the last expression counts. See `stepsal.tasks.math_process`.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from functools import lru_cache
from typing import Any, TextIO

MARK = "stepsal"  # begins each reply, so that nothing that is printed while Python starts is taken for one


def main() -> None:
    """Answer requests on the standard input until it ends."""
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr  # what sympy prints is no reply
    try:
        import math_verify  # noqa: F401
    except Exception as error:
        _reply(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):  # ends a process whose parent died meanwhile: no Python code needs to run
            signal.setitimer(signal.ITIMER_REAL, 2 * request["seconds"] + 1)
        try:
            reply = answer(request["stated"], request["references"], boxed=request["boxed"])
        except Exception as error:  # MemoryError, RecursionError, and what sympy raises
            reply = {"text": None, "same": [False] * len(request["references"]), "error": type(error).__name__}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, reply)


def answer(stated: str, references: list[str], *, boxed: bool) -> dict[str, Any]:
    """Read an expression, and compare it with references.

    Args:
        stated: the expression, or prose.
        references: expressions to compare it with.
        boxed: `stated` is an expression.

    Returns:
        As "text" the expression in the form of sympy, or None if there is none; as "same", for each reference, whether
        they are equal.
    """
    from math_verify import verify

    forms = read(stated, boxed=boxed)
    if not forms:
        return {"text": None, "same": [False] * len(references)}
    same = []
    for reference in map(read, references):
        options = {"timeout_seconds": None, "allow_set_relation_comp": True}
        differ = bool(reference) and differ_at_a_point(reference[0], forms[0])
        same.append(not differ and bool(verify(list(reference), list(forms), **options)))
    return {"text": str(forms[0]), "same": same}


def differ_at_a_point(a: Any, b: Any) -> bool:
    """Tell whether two expressions have different values where their variables have certain values, by a quick look.

    Expressions that differ there are not equal, which saves sympy from a search for a way to make them so.

    Args:
        a: a result of `read`.
        b: another.
    """
    from sympy import Expr, Rational, Symbol, UnevaluatedExpr, true

    if not all(isinstance(e, Expr) and not isinstance(e, Symbol) and not e.has(UnevaluatedExpr) for e in (a, b)):
        return False  # sets, relations, words; 15% equals 15
    names = sorted({symbol.name for symbol in a.free_symbols | b.free_symbols})
    if any(len(name) > 1 for name in names):
        return False
    point = {name: Rational(13 + 7 * i, 11) for i, name in enumerate(names)}
    try:
        p, q = (e.subs({symbol: point[symbol.name] for symbol in e.free_symbols}).evalf(15) for e in (a, b))
        # in numbers of sympy, which have no largest; equal decimals are rounded at the sixth place
        return (abs(p - q) > 1e-5 * (1 + abs(p) + abs(q))) is true
    except (TypeError, ValueError, OverflowError, AttributeError):  # no number
        return False


@lru_cache(maxsize=1000)
def read(text: str, *, boxed: bool = True) -> tuple[Any, ...]:
    """Return the forms of an expression: that of sympy, and the text; nothing if it can't be read.

    Args:
        text: the expression, or prose.
        boxed: `text` is an expression.
    """
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # units are left out before, by `stepsal.tasks.mathematics`: the list of math-verify has "c" and "t", as in 2c
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules)
    return tuple(parse(rf"\boxed{{{text}}}" if boxed else text, [latex, ExprExtractionConfig()], parsing_timeout=None))


def _reply(pipe: TextIO, values: dict[str, Any]) -> None:
    """Write a reply."""
    pipe.write(f"{MARK}{json.dumps(values)}\n")
    pipe.flush()


if __name__ == "__main__":
    main()
