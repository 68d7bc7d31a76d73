"""Answers of maths problems: found in a solution, and compared by value."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rankwise.errors import UserError
from rankwise.tasks.maths import final_answer, is_right, same_answer

# A reference answer, how a solution ends, and whether that is right.
FORMS: list[tuple[str, str, bool]] = [
    # GSM8K
    ("18", "She makes 9*2=$<<9*2=18>>18 every day.\n#### 18", True),
    ("1234", "#### 1,234", True),
    ("42", "#### 42 apples", True),
    ("42", "#### 43", False),
    ("42", "#### 42\n\nQuestion: and now? #### 7", False),
    # MATH: boxed
    (r"\frac{1}{2}", r"so \boxed{0.5}", True),
    (r"\frac34", r"\boxed{\tfrac{3}{4}}", True),
    (r"-\frac{1}{2}", r"\boxed{\frac{-1}{2}}", True),
    (r"1\frac12", r"\boxed{1.5}", True),
    (r"\sqrt{2}/2", r"\boxed{\frac{1}{\sqrt{2}}}", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("7", r"\boxed{\boxed{7}}", True),
    ("7", r"First \boxed{3}, and then \boxed{7}", True),
    ("5", r"\boxed{5", True),
    ("5", r"\boxed{}", False),
    (r"3\text{ cm}", r"\boxed{3 cm}", True),
    (r"90^\circ", r"\boxed{90}", True),
    (r"\text{(B)}", r"\boxed{B}", True),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", True),
    (r"\text{Evelyn}", r"\boxed{Briana}", False),
    (r"11,\! 111", r"\boxed{11111}", True),
    ("1000", r"\boxed{1\,000}", True),
    ("1000", r"\boxed{1{,}000}", True),
    ("(1,2)", r"\boxed{(1, 2)}", True),
    ("(1,2)", r"\boxed{(2, 1)}", False),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", True),
    ("1,2,3", r"\boxed{3,2,1}", True),
    (r"(-\infty, 3]", r"\boxed{(-\infty,3]}", True),
    (r"(-\infty, 3]", r"\boxed{(-\infty,3)}", False),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    ("x=5", r"\boxed{5}", True),
    ("y=2x+3", r"\boxed{y = 3+2x}", True),
    ("2x+3", r"\boxed{y=2x+3}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}", True),
    ("6 - 5i", r"\boxed{6-5i}", True),
    ("2220_5", r"\boxed{2220_5}", True),
    ("2:3", r"\boxed{2:3}", True),
    ("5:30", r"\boxed{5:30}", True),
    (r"\text{6:00 p.m.}", r"\boxed{6:00 \text{ p.m.}}", True),
    (r"10\pi", r"\boxed{10π}", True),
    (r"10\pi", r"\boxed{31.4}", False),
    (r"1.5\times10^{3}", r"\boxed{1500}", True),
    ("100!", r"\boxed{100!}", True),
    # sentences
    ("1234", "The answer is $1,234$.", True),
    ("72", "The answer is 72 apples.", True),
    ("5", "**Final answer:** 5", True),
    ("5", r"The final answer is: $\boxed{5}$", True),
    ("5", "So the answer is $x = 5$.", True),
    ("4", "Answer: 4 (since 2+2=4)", True),
    ("-5", "answer is \u22125", True),
    ("3/4", "the probability is 3/4.", True),
    ("12", "Answer: twelve", False),
    ("10", "The answer is ten.", False),
    # numbers in words' company
    ("5", "He has 3+2 = 5 apples", True),
    ("10", "Total: $10.00", True),
    (r"\$36", "36 dollars", True),
    ("8", "$8 million", True),
    ("8", "8 cm^2", True),
    ("3", "I paid $5 and got $2 back, 3 in all", True),
    ("1.5", "I get 1½", True),
    ("1.5", "That is 1 1/2 cups", True),
    ("1234567", "1,234,567 people", True),
    ("1000", "1 000", True),
    ("12", "on 3 May 2020, 12 people", True),
    ("-7", "temperature -7 degrees", True),
    ("20", "It is 20.", True),
    ("20", "It costs 20.50", False),
    ("3", "3 apples and 0.5 litres", False),
    ("40", "40 years old", True),
    # bare expressions
    ("12", "12.0", True),
    ("12", "12.5", False),
    (".5", "0.5", True),
    ("1e-3", "0.001", True),
    ("25", "25%", True),
    (r"25\%", "0.25", True),
    (r"50\%", r"\boxed{50\%}", True),
    ("1/3", "0.333", False),
    (r"\frac{\sqrt{3}}{3}", "1/sqrt(3)", True),
    (r"3\sqrt{2}", "3 sqrt(2)", True),
    (r"2\pi", "2*pi", True),
    ("x^2", "x**2", True),
    ("2xy", "2xy", True),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"\text{Evelyn}", "I do not know Evelyn", False),
    ("7", "x=7", True),
    ("3", "x=3, y=4", False),
    ("15", "10-15", False),
    ("10", "10 . . .", True),
    # nothing
    ("5", "", False),
    ("5", "no idea", False),
    # sums that no one waits for: compared letter by letter
    ("9^{9^{9}}", r"\boxed{9^{9^9}}", False),
    ("9^{9^9}", r"\boxed{9^{9^9}}", True),
    ("5", r"\boxed{9^{9^9}}", False),
    ("5", r"\boxed{99999!}", False),
    ("5", r"\boxed{2^{99999999}}", False),
    ("5", r"\boxed{" + "(" * 5000 + "5" + ")" * 5000 + "}", False),
]


# A number's reference, an answer with words, and whether they are the same.
COUNTED: list[tuple[str, str, bool]] = [
    ("1,000", "1000 dollars", True),
    ("1000", "1,000 books", True),
    *(("18", f"18 {unit}", True) for unit in ("eggs", "people", "cookies", "ounces", "pages", "points", "euros")),
    ("18", "18 years old", True),
    ("18", "18 dollars a day", True),
    ("18", "$18 dollars", True),
    ("18", "€18", True),
    ("18", "18** eggs", True),
    ("18", "18 (eggs)", True),
    ("18", "18 oz of Ann's flour", True),
    ("18", "18. She sells them at the farmers' market", True),
    ("18", "18, because the others are eaten", True),
    ("60", "60 km/h", True),
    ("60", "60 miles/hour", True),
    ("-7", "\u22127 degrees Celsius", True),
    ("3/4", "3/4 cup", True),
    ("1.5", "1 1/2 cups", True),
    ("25%", "25% of the pupils", True),
    ("18 eggs", "18", True),
    ("18 eggs", "19 eggs", False),
    # algebra
    ("2", "2x", False),
    ("3", "3 x", False),
    ("3x", "3 x", True),
    ("2", "2n", False),
    ("2", "2 xy", False),
    ("2xyz", "2 xyz", True),
    ("5", "5 pi", False),
    (r"5\pi", "5 pi", True),
    ("5", "5 theta", False),
    ("3", "3 sqrt 2", False),
    (r"3\sqrt{2}", "3 sqrt 2", True),
    ("5", "5 (mod x)", False),
    ("5", "5 - cost", False),
    ("5", "5 more than x", False),
    ("5", "5 times a", False),
    (r"5\text{ cm}", "5", True),
    ("7", "7 or 8", False),
    ("7", "7, eight", False),
    ("10", "10^4", False),
    ("1", "1/2", False),
    ("2", "2 squared", False),
    # magnitudes and parts
    ("0.5", "0.5 million", False),
    ("3", "3 hundred dollars", False),
    ("2", "2 dozen eggs", False),
    ("3", "3 and a half", False),
    ("2", "2 thirds", False),
    ("0.05", "5 percent", True),
    ("2", "2 thousandths", False),
    ("7", "7 months", True),
]


@pytest.mark.parametrize(("reference", "answer", "same"), COUNTED)
def test_words_after_a_number(reference: str, answer: str, same: bool) -> None:
    assert same_answer(answer, reference) is same_answer(reference, answer) is same
    assert is_right(f"The answer is {answer}.", rf"\boxed{{{reference}}}") is same


@pytest.mark.parametrize(("reference", "solution", "right"), FORMS)
def test_answers_in_all_their_forms(reference: str, solution: str, right: bool) -> None:
    assert is_right(solution, rf"\boxed{{{reference}}}") is right


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        (r"thus \boxed{\frac{1}{2}}, since \frac{a}{b}", r"\frac{1}{2}"),
        ("The answer is: $x^2$.", "x^2"),
        ("nothing", "nothing"),
        ("no idea at all", None),
        ("  ", None),
        ("####", None),
        ("#### yes", "yes"),
        ("so it is #### **42**", "42"),
        ("####\n42", "42"),
        ("#### 42\n\n#### Check\n6 * 7 = 42, not 43", "42"),
        ("#### Final Answer\n\n$\\boxed{42}$", "42"),
        ("#### **Final Answer:** 42", "42"),
        ("#### Step 1: add\n9 + 9 is 18.\nThe answer is 42.", "42"),
        ("#### 1. Add\n9 + 9 is 18.\n#### 2. Multiply\nThe answer is 42.", "42"),
    ],
)
def test_the_final_answer_as_it_is_written(solution: str, answer: str | None) -> None:
    assert final_answer(solution) == answer


def test_the_reference_answers_of_gsm8k_are_right_in_several_forms(real_data: Path) -> None:
    lines = (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    references = [json.loads(line)["answer"] for line in lines]
    assert len(references) == 1319
    numbers = [float(text.rpartition("#### ")[2].replace(",", "")) for text in references]
    for text, number in zip(references, numbers, strict=True):
        assert is_right(text, text)
        assert is_right(f"The answer is {number:.2f}", text)  # read as a number, not as letters
        assert not is_right(f"The answer is {number + 1:.2f}", text)
    for text in references[::10]:
        answer = text.rpartition("#### ")[2]
        for form in ("So the answer is {}.", r"\boxed{{{}}}", "That makes {} of them", "It costs ${}", "{}.00 dollars"):
            assert is_right(form.format(answer), text)
        assert not is_right(f"The answer is {answer}1.", text)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'rankwise\[maths\]'"):
        same_answer("1", "2")
