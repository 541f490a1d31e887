"""The rewards of d1 (github dllm-reasoning/d1 @837888f, `diffu-grpo/`) with their defects, for comparisons.

Nothing here is a default. Each defect is described where it occurs; the tasks have corrected rewards.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from .task import Example

# Defect: no DOTALL, so a completion in the requested layout matches only if its parts are single lines
# (strict) or on the line of the tag (soft). d1 fixed that later; its descendants have copies of it.
_STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
_JOINT = re.compile(r"</reasoning>\s*<answer>")  # of <reasoning>.*?</reasoning>\s*<answer>.*?</answer>


def _each(score: Callable[[Example, str], float]) -> Callable[[Sequence[Example], Sequence[str]], list[float]]:
    def reward(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        return [score(example, text) for example, text in zip(examples, completions, strict=True)]

    return reward


def _after_tag(text: str) -> str:
    """The text after the last `<answer>`, up to an end tag if any. Defect: without tags, the whole text."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def _gsm8k_correct(example: Example, text: str) -> float:
    """2.0 for the exact string after `####`. Defect: "1000" does not equal "1,000", nor "18.0" "18"."""
    return 2.0 if _after_tag(text) == example.facts["answer"] else 0.0


def _gsm8k_integer(_: Example, text: str) -> float:
    """0.5 for digits alone. Defect: neither "-3" nor "1,000" counts."""
    return 0.5 if _after_tag(text).isdigit() else 0.0


def _strict(_: Example, text: str) -> float:
    return 0.5 if _STRICT.match(text) else 0.0


def _soft(_: Example, text: str) -> float:
    """What matching the whole expression gives, in linear time: gaps stay in their lines, white space may cross one."""
    line = text.find("\n") % (len(text) + 1)
    last = text.rfind("</answer>", 0, line)
    for joint in _JOINT.finditer(text, len("<reasoning>")) if text.startswith("<reasoning>") else ():
        if joint.start() + len("</reasoning>") > line:
            break
        next_line = text.find("\n", joint.end()) % (len(text) + 1)
        if last >= joint.end() if joint.end() <= line else text.find("</answer>", joint.end(), next_line) >= 0:
            return 0.5
    return 0.0


def _tagged(text: str) -> list[str]:
    """What `<answer>(.*?)</answer>` finds, in linear time."""
    found, start = [], text.find("<answer>")
    while start >= 0 and (end := text.find("</answer>", start + len("<answer>"))) >= 0:
        found.append(text[start + len("<answer>") : end])
        start = text.find("<answer>", end + len("</answer>"))
    return found


def _tag_count(_: Example, text: str) -> float:
    """0.125 a tag, less 0.001 a character after the end.

    Defect: without a newline after `</answer>` the third term takes the length of the whole text, so a long
        completion in perfect layout loses, and the fourth gives 0.001 too much.
    """
    score = 0.125 * (text.count("<reasoning>\n") == 1) + 0.125 * (text.count("\n</reasoning>\n") == 1)
    if text.count("\n<answer>\n") == 1:
        score += 0.125
        score -= len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        score += 0.125
        score -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
    return score


GSM8K_PARTS = {
    "tags": _each(_tag_count),
    "soft": _each(_soft),
    "strict": _each(_strict),
    "integer": _each(_gsm8k_integer),
    "correct": _each(_gsm8k_correct),
}


def gsm8k(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """The sum of the five parts."""
    return [sum(values) for values in zip(*(part(examples, completions) for part in GSM8K_PARTS.values()), strict=True)]


def _countdown(example: Example, text: str) -> float:
    """1.0 for the target, 0.1 for any other text in answer tags, 0.0 without them.

    Defects: 0.1 needs no expression; numbers are runs of digits, so 1.5 counts as 1 and 5; ** and // are
        allowed. The original calls `eval`; here a tree is walked with the same operators, and values too
        large to compute are wrong.
    """
    found = _tagged(text)
    if not found:
        return 0.0
    equation = found[-1].strip()
    try:
        if sorted(map(int, re.findall(r"\d+", equation))) != sorted(example.facts["numbers"]):
            return 0.1
        if not re.match(r"^[\d+\-*/().\s]+$", equation) or len(equation) > _LONGEST:
            return 0.1
        result = _evaluate(ast.parse(equation, mode="eval").body)
        return 1.0 if abs(result - example.facts["target"]) < 1e-5 else 0.1
    except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
        return 0.1


_LONGEST = 400
_MOST_BITS = 4096
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def _evaluate(node: ast.expr) -> Any:
    """Evaluate like Python, in ints and floats; a power of more than 4096 bits raises OverflowError."""
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * max(1, int(abs(left)).bit_length()) > _MOST_BITS:
            raise OverflowError
        return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _evaluate(node.operand)
        return -inner if isinstance(node.op, ast.USub) else +inner
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    raise TypeError


countdown = _each(_countdown)


def _sudoku(example: Example, text: str) -> float:
    """Share of empty cells equal to the reference.

    Defects: of several solutions only one counts (124 of the 500 test puzzles have several); given cells may
        be changed; a solved puzzle and a nearly solved one differ by one cell.
    """
    found = _tagged(text)
    digits = "".join(filter(str.isdigit, found[-1])) if found else ""
    puzzle, solution = example.facts["puzzle"], example.facts["solution"]
    empty = [index for index in range(16) if puzzle[index] == "0"]
    if not digits or not empty:
        return 0.0
    filled = digits[:16].ljust(16, "0")
    return sum(filled[index] == solution[index] for index in empty) / len(empty)


sudoku = _each(_sudoku)


def _math_format(_: Example, text: str) -> float:
    r"""0.75 with answer tags and 0.25 without.

    Defect: the test for \boxed has a single backslash, that is a backspace and "oxed", so the bonus that
        would make it 1.0 is never given (except for a backspace in the completion).
    """
    after = text.split("<answer>")
    within = after[1].split("</answer>")[0] if len(after) > 1 else text
    return 0.5 * ((1.0 if len(after) > 1 else 0.0) + (1.0 if "\boxed" in within else 0.5))


def _math_correct(example: Example, text: str) -> float:
    """2.0 for an equal text in the last box. Defects: see `_unboxed` and `_form`."""
    given, gold = _unboxed(text), _unboxed(example.facts["solution"])
    return 2.0 if gold is not None and _equal(text if given is None else given, gold) else 0.0


def _unboxed(text: str) -> str | None:
    r"""The last box; None if it is not closed.

    Defects: "\boxed " anywhere takes precedence over a later \boxed{}; \fbox is not removed; without a box it
        is the whole text.
    """
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed") if "\\boxed" in text else text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if text[end] == "}" and depth == 0:
            return text[start : end + 1].removeprefix("\\boxed{")[: -1 if text.startswith("\\boxed{", start) else None]
    return None


def _equal(one: str, other: str) -> bool:
    """Defect: if either has no normal form (x/2, two units, a bare root), only identical texts are equal."""
    try:
        return _form(one) == _form(other)
    except (ValueError, IndexError):
        return one == other


def _form(text: str) -> str:
    """The normal form of answers of Hendrycks' MATH, as copied by d1.

    Defects: only 0.5 is converted to a fraction (0.25 is not 1/4); thousands separators and units without a
        space matter.
    """
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", "")):
        text = text.replace(old, new)
    for old in ("\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(old, "")
    parts = text.split("\\text{ ")
    if len(parts) > 2:
        raise ValueError
    text = parts[0].replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text
    first, *roots = text.split("\\sqrt")
    text = first + "".join("\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}") for root in roots)
    text = _fractions(text.replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else text
    if text.count("/") == 1:
        a, b = map(int, text.split("/"))
        return f"\\frac{{{a}}}{{{b}}}" if text == f"{a}/{b}" else text
    return text


def _fractions(text: str) -> str:
    """\\frac12 and \\frac1{72} with braces."""
    first, *rest = text.split("\\frac")
    for part in rest:
        if part[0] == "{":
            first += "\\frac" + part
        elif len(part) < 2:
            return text
        else:
            first += f"\\frac{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
    return first


MATH_PARTS = {"correct": _each(_math_correct), "format": _each(_math_format)}


def math(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """The sum of both parts."""
    return [sum(values) for values in zip(*(part(examples, completions) for part in MATH_PARTS.values()), strict=True)]
