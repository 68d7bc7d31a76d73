"""Maths problems: the answer that a worked solution ends with, and whether two answers have one value.

Expressions are read and compared by math-verify (extra ``maths``), which stands on sympy.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from rankwise.errors import UserError

MARK = re.compile(r"#{4,}")  # before the answer of GSM8K's solutions; and before a heading in Markdown
HEADING = re.compile(r"[*_]*(?:\d+[.)]\s+)?[*_]*[^\W\d_]{2}")
SENTENCE = re.compile(r"\banswer\b[^.\n:=\d$\\]*?(?:\bis\b|:|=)[*_\s]*:?", re.IGNORECASE)
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
PLAIN = r"(?:\d{1,3}(?:[ ,]\d{3})+|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"(?<![\w^.])[-\u2212]?(?:\d+ +\d+/\d+|(?:{PLAIN})(?:[eE][-\u2212]?\d+|\s*/\s*(?:{PLAIN}))?)[½¼¾]?(?:\s*\\?%)?"
)
WORD = re.compile(r"(?:^|\s)(?!sqrt|log|sin|cos|tan|exp|pi\b|ln\b)[^\W\d_]{2,}")
SIGNS = {
    "\u2212": "-",
    "\u2013": "-",
    "\u00d7": r"\times ",
    "·": r"\cdot ",
    "π": r"\pi ",
    "√": r"\sqrt ",
    "∞": r"\infty ",
}
SIGNS |= {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge "}
# What people and programs write without LaTeX.
WRITTEN = {
    r"(\d+)\s+(\d+)\s*/\s*(\d+)": r"\1\\frac{\2}{\3}",
    r"(?<![\\\w])sqrt\s*\(([^()]*)\)": r"\\sqrt{\1}",
    r"(?<![\\\w])pi\b": r"\\pi ",
    r"(\d)[eE](-?\d+)\b": r"\1\\times 10^{\2}",
    r"\*\*\s*(-?[\w.]+|\([^()]*\))": r"^{\1}",
    r"(?<=\d) (?=\d{3}\b)": "",
}
# Words that a number's value hangs on: magnitudes and parts, other numbers, functions and Greek letters.
VALUED = (
    r"(?:hundred|thousand|\w*illion|dozen|score|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth)(?:th)?s?"
    r"|hal(?:f|ves)|per\W?cent\w*|double|twice|or|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|pi|sqrt|root|squared|cubed|factorial|infinity|log|ln|exp|mod"
    r"|sin|cos|tan|cot|csc|alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi"
    r"|chi|psi|omega"
)
WORDS = (
    rf"(?:[\s,.;:()\"*/-]+(?!(?:{VALUED})\b)"
    r"(?:[^\W\d_]{2,}(?:['\u2019][^\W\d_]*)*|a(?=\s+[^\W\d_]{2})|(?<=km/)h))*[\s,.;:()\"*-]*"
)
CURRENCY = r"(?:\s*(?:\\?\$|[€£¥₹]))?"
# After the number, a sentence ends, or a word follows that is no product of letters.
COUNTED = re.compile(
    rf"(?P<sign>[-\u2212]?){CURRENCY}(?P<number>{NUMBER.pattern}){CURRENCY}(?:\*\*)?"
    rf"(?:(?=[.;]\s|,?\s+\(?(?:[^\W\d_]{{3}}|(?:[ckm]m|[km]g|ml|ft|lb|oz|hr|yd|in|of)\b)){WORDS})?",
    re.IGNORECASE,
)
LONGEST = 200  # characters of an answer that is read as an expression
# Powers of powers and their like would be computed without end.
TOWER = re.compile(r"(?:\^|\*\*)[{(\s]*-?\d{4,}|(?:\^|\*\*)[^+*/,=]{0,20}(?:\^|\*\*)|!\s*!|\d{4,}\s*!")


def final_answer(solution: str) -> str | None:
    r"""The answer of a worked solution, as it is written there; None where it has none.

    The first of these that there is: what follows the last ``####`` on its line (GSM8K) that is no heading, the last
    ``\boxed{...}`` (MATH), what follows the last "answer is" or "answer:" on its line (a formula in it, if there is
    one), the last formula, all of a text without words, the last number. A heading begins with a word and has text
    below it, or says "answer:" itself.
    """
    if marked := _last_marked(solution):
        return marked
    if (boxed := _last_boxed(solution)) is not None:
        return _bare(boxed)
    if found := [*SENTENCE.finditer(solution)]:
        line = _first_line(solution[found[-1].end() :])
        return _last_formula(line or "") or line
    alone = len(solution.split()) == 1 or not WORD.search(solution)
    return _last_formula(solution) or (_first_line(solution) if alone else _last_number(solution))


def same_answer(answer: str, reference: str) -> bool:
    r"""Whether two answers have one value: 0.5 and ``\frac{1}{2}``, 1,000 and 1000 dollars, x = 3 and 3.

    Units, currency, other words after a number and a leading ``x =`` do not count, but words such as million or half
    do; sets are equal in any order, points and intervals in theirs.
    Answers that are no expressions, or too large to be computed, are compared letter by letter, without case, spaces
    and LaTeX's ``\text``.

    Raises:
        UserError: math-verify is not installed.
    """
    if _letters(answer) == _letters(reference):
        return bool(_letters(answer))
    readings = dict.fromkeys([(answer, reference), (_number(answer), _number(reference))])
    return any(_equal(*pair) for pair in readings)


def is_right(solution: str, reference: str) -> bool:
    """Whether a solution ends with the answer that the reference solution ends with."""
    found, wanted = final_answer(solution), final_answer(reference)
    return found is not None and wanted is not None and same_answer(found, wanted)


def check_library() -> None:
    """See that math-verify is installed.

    Raises:
        UserError: it is not.
    """
    _library()


def _library() -> Any:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise UserError("comparing maths answers needs math-verify: pip install 'rankwise[maths]'") from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of each expression that it cannot read
    return math_verify


def _equal(answer: str, reference: str) -> bool:
    verify = _library().verify
    ours, theirs = _read(answer), _read(reference)
    return bool(ours and theirs and verify(theirs, ours))


def _number(answer: str) -> str:
    """The number alone of an answer that is one with words after it, none of which its value hangs on."""
    found = COUNTED.fullmatch(_bare(answer))
    return found["sign"] + found["number"] if found else answer


def _read(answer: str) -> list[Any]:
    """The answer as expressions of sympy; none where it is no expression."""
    text = _plain(answer)
    if not text or len(text) > LONGEST or TOWER.search(text):
        return []
    found: list[Any] = _library().parse(rf"\boxed{{{text}}}", fallback_mode="no_fallback")
    return found


def _plain(answer: str) -> str:
    text = _bare(answer)
    for sign, latex in SIGNS.items():
        text = text.replace(sign, latex)
    for written, latex in WRITTEN.items():
        text = re.sub(written, latex, text)
    return text


def _bare(text: str) -> str:
    """Without the dollars around a formula, and the full stop after it."""
    bare = text.lstrip("#*_ \t\n").rstrip(".*_ \t\n")
    formula = FORMULA.fullmatch(bare)
    return _inside(formula) if formula else bare


def _letters(answer: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", _bare(answer))
    return re.sub(r"\\[!,; ]|[\s$]", "", text).casefold()


def _first_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return _bare(lines[0]) or None if lines else None


def _last_marked(text: str) -> str | None:
    """What stands on the line of the last mark that is no heading."""
    for mark in [*MARK.finditer(text)][::-1]:
        line, _, below = text[mark.end() :].strip().partition("\n")
        if not (HEADING.match(line) and (below.strip() or SENTENCE.search(line))) and _bare(line):
            return _bare(line)
    return None


def _last_boxed(text: str) -> str | None:
    r"""What stands in the braces of the last ``\boxed`` that is closed."""
    for start in [found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)][::-1]:
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
            if not depth:
                inner = text[start:place].strip()
                return inner or None
    return None


def _last_formula(text: str) -> str | None:
    found = [*FORMULA.finditer(text)]
    return _inside(found[-1]) or None if found else None


def _inside(formula: re.Match[str]) -> str:
    return next(part for part in formula.groups() if part is not None).strip()


def _last_number(text: str) -> str | None:
    found = [number.strip().rstrip(",.") for number in NUMBER.findall(text)]
    return found[-1] if found else None
