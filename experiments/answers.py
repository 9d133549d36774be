"""Read a judge's three scores from its answer (App. D.3, "Response parsing and aggregation").

A judge is asked for three lines such as `Instruction Compliance: 85` and often answers something
else. The paper asks for a tolerant matcher and leaves its rules open. Ours, by the names that
tests/test_answers.py gives to them:

- thoughts: what a model thinks aloud is no answer. Only what follows its last thought counts.
- start: a label counts only at the start of a line, behind marks of a list, heading, table or
  Markdown, or directly behind the score of another label. Inside a sentence it is just words.
- first: the first number behind the label is the score. What follows the score is free text.
- words: no score if words come before the number ("about 85", "the cats are missing, so 45").
- count: no score if the number counts things ("2 cats are missing, so 45", "85 % of the cats").
- range: no score if a second number is joined to it ("61-80", "60 to 70", "80 -> 85").
- scale: no score on another scale ("4/5", "4 out of 5", "4 (on a 1-5 scale)").
- whole: no score if it is only a part of a number or word ("85th", "1,000", ">90", "-5").
- table, json: rows and columns of Markdown tables and objects of JSON are read like lines.
- bounds: a score is from 1 to 100; any other number spoils the answer. Decimals are rounded.
- twice: a score may be given twice, if it is the same.

In doubt there is no score: a missing one costs another question, a wrong one is never noticed.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterator

AXES = {  # the labels of the axes, as judges spell them; {0,5}: no pattern may take quadratic time
    "IC": r"instruction\W{0,5}compliance",
    "CF": r"consistency\W{0,5}(?:and\W{0,5})?(?:details?\W{0,5})?fidelity",
    "VQ": r"visual\W{0,5}quality(?:\W{0,5}(?:and\W{0,5})?stability)?",
}
LONGEST = 20_000  # characters of an answer, without its thoughts; four lines were asked for
_LABELS = "|".join(f"(?P<{axis}>{label})" for axis, label in AXES.items())
# What may stand before a label: marks, the number of a list item, the short name of the axis.
_ITEM = r"(?:\d{1,2}\W*|(?:[a-z]|[ivx]{1,4})[.):\]]\W*)?"
_START = re.compile(rf"\W*{_ITEM}(?:(?:IC|CF|VQ)\W+)?(?:{_LABELS})(?!\w)", re.IGNORECASE)
_SCORE_NAME = r"(?:final\s+)?(?:scores?|rating|grade|value|points)"

# --- One score ------------------------------------------------------------------------------------

_GAP = re.compile(r"(?:->|=>|[\s:=|,;$–—→⇒➜➡]|-(?!\d)|\.{2,})*")  # between a label and its score
_BRACKETS = re.compile(r"[(\[{<]([^()\[\]{}<>]*)[)\]}>]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_UNIT = re.compile(r"\s*(?:%|分|点|점|(?:points?|pts|marks?|percent)\b)", re.IGNORECASE)
# Behind a number that is not whole: a letter, more digits, "+", the rest of a word ("3-legged").
_MORE = re.compile(r"(?![分点점])\w|[.,:]\d|\+|-[^\W\d]|\s+\d|\s*[★☆⭐]")
_JOINED = re.compile(
    r"(?P<before>\s*)(?P<joint>->|=>|[-–—~〜→⇒>×*±]|(?:to|or|and|bis)\b)(?P<after>\s*)\d+(?:\.\d+)?"
    # A range ends here; an explanation goes on with words: "85 - 2 of the 3 cats became dogs".
    r"(?P<end>\s*(?:$|[%.,;:()\[\]|=+*]|/\s*100|out of|range|band|bucket|points?|percent))?",
    re.IGNORECASE,
)
_TOP = r"(?:\d+\s*(?:-|–|~|to)\s*)?(\d+(?:\.\d+)?)"  # the last number of "5" or "1-5"
_ON_A = r"\s*[(\[]?\s*(?:(?:on|in|using)\s)?(?:an?\s|the\s)?"
_SCALES = [  # ways to name the top of the scale behind a number
    re.compile(
        r"\s*[(\[]?\s*(?:/|(?:out )?of\b|on\b|over\b|max(?:imum)?\b[.:]?)"
        rf"\s*(?:an?\s|the\s|possible\s|of\s)*{_TOP}",
        re.IGNORECASE,
    ),
    re.compile(rf"{_ON_A}scale\b[^\d]{{0,9}}{_TOP}", re.IGNORECASE),
    re.compile(rf"{_ON_A}{_TOP}[\s-]*(?:point\s)?\s*scale\b", re.IGNORECASE),
]
# "4 (1-5)" names a scale, but "4 (1-20)" and "85 (81-100)" name the band of our rubrics.
_BRACKETED_SCALE = re.compile(r"\s*[(\[]\s*[01]\s*(?:-|–|~|to)\s*(?!20\b|100\b)\d")
# A word directly behind a number is what it counts ("2 cats"), unless it begins an explanation.
_WORD = re.compile(r"\s*[^\W\d]")
_EXPLANATION = re.compile(
    r"\s*(?:because|as|since|due|for|given|considering|with|without|but|though|although|while|"
    r"however|despite|even|overall|mainly|so|thus|hence|therefore|if|when|where|which|"
    r"the|an?|this|that|it|its|there|he|she|they|we|i)\b"
    r"|\s*(?:(?:very|quite|fairly|almost|nearly)\s+)?"
    r"(?:excellent|perfect|great|good|fair|ok|okay|poor|bad|high|low|strong|weak)\b(?!\s+\w)",
    re.IGNORECASE,
)


def _score_at_start(text: str) -> tuple[float | None, str]:
    """The score that `text` starts with, or None, and the text behind it."""
    text = re.sub(rf"(?i)^\s*{_SCORE_NAME}\b", "", text)
    text = text[_GAP.match(text).end() :].lstrip("([{ ")
    number = _NUMBER.match(text)
    if not number:
        return None, text
    behind = text[number.end() :]
    if _MORE.match(behind):
        return None, behind
    joined = _JOINED.match(behind)
    if joined:
        spaced = joined["before"] and joined["after"] or joined["joint"] == "—"
        dash = joined["joint"] in ("-", "–", "—")
        if not (dash and spaced and joined["end"] is None):
            return None, behind

    unit = _UNIT.match(behind)
    if unit:
        behind = behind[unit.end() :]
    for scale in _SCALES:
        top = scale.match(behind)
        if top and float(top[1]) != 100:
            return None, behind
        if top:
            return float(number[0]), behind[top.end() :]
    if _BRACKETED_SCALE.match(behind):
        return None, behind
    is_word = _WORD.match(behind) and not _EXPLANATION.match(behind) and not _START.match(behind)
    if (is_word and not unit) or re.match(r"\s*of\b", behind):
        return None, behind
    return float(number[0]), behind


def _score_behind_label(text: str) -> tuple[float | None, str]:
    """The score in what follows a label on its line, or None, and the text behind it.

    Brackets between label and number are skipped, as in "(IC) [1-100]: 85", unless they hold it.
    """
    text = text.lstrip(")]}>】」")
    while True:
        name = re.match(rf"(?i)\s*{_SCORE_NAME}\b", text)
        if name:
            text = text[name.end() :]
        text = text[_GAP.match(text).end() :]
        brackets = _BRACKETS.match(text)
        if not brackets:
            return _score_at_start(text)
        inside, _ = _score_at_start(brackets[1])
        text = text[brackets.end() :]
        if inside is not None:
            outside, behind = _score_at_start(text)
            if outside is not None and re.match(r"\s*[:=]", text):
                return outside, behind  # "(100): 85": the brackets name the scale or a weight
            return inside, text


# --- Tables and JSON ------------------------------------------------------------------------------


def _label(text: str) -> str | None:
    """The axis that `text` names, if it does nothing else."""
    found = _START.match(text)
    if not found:
        return None
    rest = re.sub(rf"(?i){_BRACKETS.pattern}|\b{_SCORE_NAME}\b", "", text[found.end() :])
    return None if re.search(r"\w", rest) else found.lastgroup


def _is_score_name(text: str) -> bool:
    """Whether a key or the head of a column says "score", "Rating (1-100)" or the like."""
    text = re.sub(r"[(\[].*", "", text).strip()
    return re.fullmatch(_SCORE_NAME, text, re.IGNORECASE) is not None


def _in_json(value: object) -> Iterator[tuple[str, str]]:
    """Axes and their scores in a value of JSON, nested as it may be."""
    if isinstance(value, list):
        for item in value:
            yield from _in_json(item)
    if not isinstance(value, dict):
        return
    # The score in this object that belongs to another entry's label, if there is one.
    scores = [item for key, item in value.items() if _is_score_name(key)]
    for key, item in value.items():
        axis = _label(_plain(key))
        named = _label(_plain(item)) if isinstance(item, str) else None
        if axis and not isinstance(item, dict):  # {"Instruction Compliance": 85}
            yield axis, str(item)
        elif axis:  # {"Instruction Compliance": {"reason": "...", "score": 85}}
            for name, inner in item.items():
                if _is_score_name(name):
                    yield axis, str(inner)
        elif named and scores:  # {"axis": "Instruction Compliance", "score": 85}
            yield named, str(scores[0])
        else:
            yield from _in_json(item)


def _take_json(text: str) -> tuple[list[tuple[str, str]], str]:
    """Axes and scores of the objects of JSON in a text, and the text without these objects."""
    fields: list[tuple[str, str]] = []
    rest, done = "", 0
    starts = [found.start() for found in re.finditer(r"[{\[]", text)]
    for start in starts[:100]:  # a hostile text has many more, each read to its end
        if start < done:
            continue
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
            found = list(_in_json(value))
        except (ValueError, RecursionError):
            continue
        if found:
            fields += found
            rest += text[done:start]
            done = end
    return fields, rest + text[done:]


def _in_table(rows: list[list[str]]) -> Iterator[tuple[str, str]]:
    """Axes and their scores in a Markdown table, by its cells: an axis in each row or column."""
    header = rows[0]
    axes = [_label(name) for name in header]
    if len([axis for axis in axes if axis]) > 1:  # | Instruction Compliance | Visual Quality |
        for row in rows[1:]:
            yield from ((axis, cell) for axis, cell in zip(axes, row, strict=False) if axis)
        return
    named = [i for i, name in enumerate(header) if _is_score_name(name)]
    for row in rows:
        for i, cell in enumerate(row):
            found = _START.match(cell)
            if _label(cell):  # | Instruction Compliance | why | 85 |
                cells = [row[j] for j in named if i < j < len(row)] or row[i + 1 :]
                scores = (cell for cell in cells if _score_behind_label(cell)[0] is not None)
                yield found.lastgroup, next(scores, "")
            elif found:  # | Instruction Compliance: 85 | ...
                yield found.lastgroup, cell[found.end() :]


# --- An answer ------------------------------------------------------------------------------------

_THOUGHT = r"(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)"
_OPENS = rf"[<◁]\s*\|?(?:begin_of_|\w+:)?{_THOUGHT}\|?\s*[>▷]|\[THINK\]"
_CLOSES = rf"[<◁]\s*\|?(?:/\s*|end_of_)(?:\w+:)?{_THOUGHT}\|?\s*[>▷]|\[/THINK\]"


def _without_thoughts(text: str) -> str:
    """What follows the last thought; nothing of a thought that was opened and never closed."""
    # Servers often cut the opening mark off: the last closing one decides.
    text = re.split(f"(?i){_CLOSES}", text)[-1]
    return re.split(f"(?i){_OPENS}", text)[0]


def _plain(text: str) -> str:
    """The text without the marks of Markdown, HTML and LaTeX, which become spaces."""
    text = re.sub(r"\\(?:boxed|textbf|text)\b", " ", text)
    text = re.sub(r"(?i)<\s*(?:br|/?(?:p|li|tr|div|h\d))\s*/?>", "\n", text)
    text = re.sub(r"(?i)</?(?:b|strong|i|em|u|td|th|span|code|score|answer)>", " ", text)
    return re.sub(r"[*_`#\"'\\“”‘’„]+", " ", html.unescape(text))


def _below(lines: list[str]) -> str:
    """The score of a heading: it stands alone on the next line, or it is called so further down."""
    alone = rf"(?i)\W*{_NUMBER.pattern}\s*(?:/\s*100|%|points)?\W*"
    is_next = True
    for line in lines:
        named = re.match(rf"(?i)\W*{_SCORE_NAME}\b(.*)", line)
        if _START.match(line):
            break
        if named:
            return named[1]
        if is_next and re.fullmatch(alone, line):
            return line.lstrip("> •·")
        is_next = is_next and not line.strip()
    return ""


def _in_lines(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Axes at the start of a line, and what follows them there."""
    for i, line in enumerate(lines):
        found = _START.match(line)
        while found:
            behind = line[found.end() :]
            if not re.search(r"\w", behind):
                behind = _below(lines[i + 1 :])
            yield found.lastgroup, behind
            # Another label may follow the score: "Instruction Compliance: 85, Visual Quality: 80".
            score, line = _score_behind_label(behind)
            line = re.sub(r"^\s*\([^()]*\)", "", line)
            found = None if score is None else _START.match(line)


def _in_text(text: str) -> Iterator[tuple[str, str]]:
    """Axes and what follows them, in the tables and lines of a text."""
    lines = []
    table: list[list[str]] = []
    for line in [*_plain(text).splitlines(), ""]:  # the empty line ends a table at the end
        is_row = line.strip().startswith("|") or (table and "|" in line)
        is_rule = "|" in line and "-" in line and set(line) <= set("|:- ")
        if is_rule and not table and lines and "|" in lines[-1]:
            table.append(lines.pop().split("|"))  # a header without outer bars
        elif is_row and not is_rule:
            table.append(line.strip().strip("|").split("|"))
        elif not is_row and table:
            yield from _in_table(table)
            table = []
        if not is_row and not is_rule:
            lines.append(line)
    yield from _in_lines(lines)


def parse_scores(answer: str) -> list[int] | None:
    """Read IC, CF and VQ from an answer, or None if one is missing, doubtful or out of bounds."""
    # Full-width digits and punctuation become plain, other spaces too. Footnote marks are dropped
    # before, as they would become digits.
    text = unicodedata.normalize("NFKC", re.sub("[⁰¹²³⁴-⁹₀-₉]", "", answer))
    text = _without_thoughts(text.replace("\u2044", "/"))  # the bar of a fraction
    if len(text) > LONGEST:
        return None
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn"))  # invisible
    fields, text = _take_json(text)
    fields += _in_text(text)

    given: dict[str, set[float]] = {axis: set() for axis in AXES}
    for axis, behind in fields:
        score, _ = _score_behind_label(behind)
        if score is not None:
            given[axis].add(score)
    scores = []
    for numbers in given.values():
        if len(numbers) != 1 or not 1 <= min(numbers) <= 100:
            return None
        scores.append(int(numbers.pop() + 0.5))
    return scores
