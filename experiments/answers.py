"""Read a judge's three scores from its answer (App. D.3, "Response parsing and aggregation").

A judge is asked for three lines such as `Instruction Compliance: 85` and often answers something
else. The paper asks for a tolerant matcher and leaves its rules open. Ours, by the names that
tests/test_answers.py gives to them:

- thoughts: what a model thinks aloud is no answer. Only what follows its last thought counts.
- table, json: what Markdown tables and objects of JSON say of an axis is read as a line of its own.
- start: a label counts only at the start of a line, behind marks of a list, heading, table or
  Markdown, or directly behind the score of another label. Inside a sentence it is just words.
- template: brackets between label and score are skipped, if they do not hold the score.
- first: the first number behind the label is the score. What follows the score is free text.
- words: no score if words come before the number ("about 85", "the cats are missing, so 45").
- whole: no score if it is only a part of a number or word ("85th", "1,000", ">90", "-5").
- count: no score if the number counts things ("2 cats are missing, so 45", "85 % of the cats").
- alone: no score beside another number, as in ranges ("61-80"), sums ("100 - 15 = 85"), lists ("85,
  60, 60") and weights ("40% | 85"), unless that one counts things ("85, 2 cats are missing"), is
  the same, or names a frame ("85, flicker in frame 12") or a band of our rubrics ("75 (61-80)").
- scale: no score on another scale than to 100 that is named behind it, in its label, in the head of
  its column or in another key. Three scores of at most 20 may be on another scale: they are none if
  one is a decimal, or if a line beside the reasoning holds a number that may be the top, in any
  language: "Skala von 1 bis 10", "Average: 8/10".
- bounds: a score is from 1 to 100; any other number spoils the answer. Decimals are rounded, but
  1.0 is none: it is a judge's best on a scale from 0 to 1.
- twice: a score may be given twice, if it is the same. The last one must be readable.
- refused: an example is no answer, nor is one that the judge takes back, or comes back to below:
  "Wait, Instruction Compliance should be 40".

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
_LABELS = "(?:" + "|".join(f"(?P<{axis}>{label})" for axis, label in AXES.items()) + r")(?!\w)"
# What may stand before a label: marks, the number of a list item, the short name of the axis.
_ITEM = r"(?:\d{1,2}\W*|(?:[a-z]|[ivx]{1,4})[.):\]]\W*)?"
_START = re.compile(rf"\W*{_ITEM}(?:(?:IC|CF|VQ)\W+)?{_LABELS}", re.IGNORECASE)
_NEXT = re.compile(  # the next label on a line
    rf"(?:/\s{{0,5}})?(?:\b\d[.)]\W{{0,5}})?(?:\b(?:IC|CF|VQ)\W{{1,5}})?{_LABELS}", re.IGNORECASE
)
_SCORE_NAME = r"(?:final\s+)?(?:scores?|rating|grade|value|points)\b"

# --- One score ------------------------------------------------------------------------------------

_NAME = re.compile(rf"\s*{_SCORE_NAME}", re.IGNORECASE)
_GAP = re.compile(r"(?:[-=]>|[\s:=|,;$→]|-(?!\d)|\.{2,})*")  # between a label and its score
_BRACKETS = re.compile(r"[(\[{<]([^()\[\]{}<>]*)[)\]}>]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_UNIT = re.compile(r"\s*(?:%|[分点점]|(?:points?|pts|marks?|percent)\b)", re.IGNORECASE)
_LIST_ITEM = re.compile(r"\(?\d[.)]\s*[^\W\d]")  # "1. The cat is a dog", "(1) the cat"
# A word directly behind a number is what it counts ("2 cats"), unless it begins an explanation.
_EXPLANATION = (
    r"(?:because|as|since|due|for|given|considering|with|without|but|though|although|while|"
    r"however|despite|even|overall|mainly|so|thus|hence|therefore|if|when|where|which|"
    r"the|an?|this|that|it|its|there|he|she|they|we|i)\b"
    r"|(?:(?:very|quite|fairly|almost|nearly)\s+)?"
    r"(?:excellent|perfect|great|good|fair|ok|okay|poor|bad|high|low|strong|weak)\b(?!\s+\w)"
)
# What may follow a score: nothing, punctuation or an explanation.
_END = re.compile(
    rf"\s*(?:$|[.,;:!?$()\[\]{{}}<>|=→。、✅✓✔]|-(?!\w))|\s+(?:{_EXPLANATION})", re.IGNORECASE
)
_PLACE = re.compile(  # where something is seen: "frames 10 to 20", "at 0:03"
    r"\bframes?\s+#?\d+(?:\s*(?:-|to|and|,|&)\s*\d+)*|\b\d{1,2}:\d\d\b", re.IGNORECASE
)
_BAND = re.compile(r"\b(1-20|21-40|41-60|61-80|81-100)\b")
_WORDS = r"(?:four|five|six|seven|ten)"  # the tops of scales in words
_OTHER = re.compile(rf"\d+(?:\.\d+)?(?:/\d+)?|\b{_WORDS}\b", re.IGNORECASE)
_SUM = re.compile(r"[-+=→>×]\s*\d|\b(?:minus|plus|less|deduct\w*|subtract\w*)\b", re.IGNORECASE)
_UNCOUNTED = re.compile(
    rf"[\s-]*(?:[分点점]|(?:points?|pts|marks?|percent|stars?|max|maximum|scale|total|best|worst|"
    rf"off|at|in|on|by|to|or|and|than|from)\b|{_EXPLANATION})",
    re.IGNORECASE,
)


def _is_alone(score: float, beside: str) -> bool:
    """Whether no number beside a score may be another score, or the top of a scale."""
    for band in _BAND.findall(beside):
        low, high = map(int, band.split("-"))
        if not low <= score <= high:
            return False
    beside = _PLACE.sub("", _BAND.sub("", beside))
    others = list(_OTHER.finditer(beside))
    if others and _SUM.search(beside):
        return False
    for other in others:
        behind = beside[other.end() :]
        is_small = re.fullmatch(r"\d(?:/\d)?", other[0])
        counts = is_small and re.match(r"[\s-]*[^\W\d]", behind) and not _UNCOUNTED.match(behind)
        if not counts and other[0] != f"{score:g}":
            return False
    return True


def _skip(text: str) -> str:
    """The text without "Score:" and the like at its start."""
    text = text[_GAP.match(text).end() :]
    name = _NAME.match(text)
    return text[_GAP.match(text, name.end()).end() :] if name else text


def _number_at_start(text: str) -> tuple[float | None, str]:
    """The number that `text` starts with, if it may be a score, or None, and the text behind it."""
    text = _skip(text)
    number = _NUMBER.match(text)
    if not number or _LIST_ITEM.match(text) or re.fullmatch(r"1\.0+", number[0]):
        return None, text
    behind = text[number.end() :]
    unit = _UNIT.match(behind)
    behind = behind[unit.end() :] if unit else behind
    end = _END.match(_NEXT.split(behind, 1)[0])
    return float(number[0]) if end else None, behind


def _score_behind_label(text: str) -> tuple[float | None, str]:
    """The score in what follows a label on its line, or None, and the text behind it.

    Brackets between label and number are skipped, as in "(IC) [1-100]: 85", unless they hold it.
    """
    text = _skip(text.lstrip(")]}>】」"))
    skipped = ""
    while (brackets := _BRACKETS.match(text)) and not _LIST_ITEM.match(text):
        score, inside = _number_at_start(brackets[1])
        behind = text[brackets.end() :]
        if score is not None:
            skipped += inside
            break
        skipped += brackets[1]
        text = _skip(behind)
    else:
        score, behind = _number_at_start(text)
    beside = f"{skipped} {_NEXT.split(behind, 1)[0]}"
    return (score, behind) if score is not None and _is_alone(score, beside) else (None, behind)


# --- Scales ---------------------------------------------------------------------------------------

_TO = r"(?:[\s:=(\[.]|\b(?:of|from|is|an?|the|scale|score|points|possible)\b){0,9}"
_TOP = rf"(?:/|\b(?:out[\s-]of|max(?:imum)?|scale|range)\b){_TO}"  # what names the top of a scale
_OF_SCALE = r"[\s-]*(?:point\s+)?scale\b"
# Our own scale is not worth a word: "/100", "(on a 1-100 scale)", "(100): 85".
_TO_100 = re.compile(
    rf"(?:(?:{_TOP}|\bo[fn]\b{_TO})(?:[01]-)?|\b[01]-)100\b(?![.,]\d)(?:{_OF_SCALE})?"
    rf"|\b100{_OF_SCALE}|[(\[]100(?:\s+points)?[)\]](?=[\s:=→-]*\d)",
    re.IGNORECASE,
)
_SCALE_KEY = re.compile(r"\b(?:max(?:imum)?|out\s?of|scale|range)\b", re.IGNORECASE)
_SCALE = re.compile(rf"\d[-/]\d|\b{_WORDS}\b", re.IGNORECASE)
_REASONING = re.compile(r"\W*(?:brief\s+)?(?:reason|explanation|justification)", re.IGNORECASE)


def _may_be_on_another_scale(scores: list[float], others: list[str]) -> bool:
    """Whether low scores may be on a scale to 5, 10 or 20. others: the lines without labels."""
    if max(scores) > 20:
        return False
    lines = [_PLACE.sub("", _BAND.sub("", line)) for line in others if not _REASONING.match(line)]
    tops = [float(number) for line in lines for number in _NUMBER.findall(line)]
    return (
        any(score % 1 for score in scores)
        or any(top >= max(scores) for top in tops)  # in any language, and as "Average: 8/10"
        or any(_SCALE.search(line) for line in lines)
    )


# --- Tables and JSON, which become lines ----------------------------------------------------------


def _is_label(text: str) -> bool:
    """Whether `text` names an axis and does nothing else."""
    found = _START.match(text)
    if not found:
        return False
    rest = re.sub(rf"(?i){_BRACKETS.pattern}|\b{_SCORE_NAME}", "", text[found.end() :])
    return not re.search(r"\w", rest)


def _is_score_name(text: str) -> bool:
    """Whether a key or the head of a column says "score", "Rating (1-100)" or the like."""
    return re.fullmatch(rf"(?i)\s*{_SCORE_NAME}\s*(?:[(\[].*)?", text) is not None


def _line(label: object, score: object) -> str:
    return f"{label}: {' '.join(str(score).split()) or 'none'}"


def _json_lines(value: object) -> Iterator[str]:
    """What a value of JSON, whose objects are tuples of entries, says of axes and scales."""
    if isinstance(value, list):
        for item in value:
            yield from _json_lines(item)
    if not isinstance(value, tuple):
        return

    def score(entries: tuple) -> str:
        found = [f"{key} {item}" for key, item in entries if _is_score_name(_plain(key))]
        return " | ".join(found)

    for key, item in value:
        if _is_label(_plain(key)):  # {"Instruction Compliance": 85}, or an object with the score
            yield _line(key, score(item) if isinstance(item, tuple) else item)
        elif isinstance(item, str) and _is_label(_plain(item)):
            yield _line(item, score(value))  # {"axis": "Instruction Compliance", "score": 85}
        elif _SCALE_KEY.search(_plain(key)):
            yield _line("scale", item)
        yield from _json_lines(item)


def _without_json(text: str) -> str:
    """The text with lines in the place of JSON that says something of axes and scales."""
    decoder = json.JSONDecoder(object_pairs_hook=tuple)  # a dict would drop a key's first score
    rest, done = "", 0
    starts = [found.start() for found in re.finditer(r"[{\[]", text)]
    for start in starts[:100]:  # a hostile text has many more, each read to its end
        if start < done:
            continue
        try:
            value, end = decoder.raw_decode(text, start)
            lines = list(_json_lines(value))
        except (ValueError, RecursionError):
            continue
        if lines:
            rest += "\n".join([text[done:start], *lines, ""])
            done = end
    return rest + text[done:]


def _table_lines(rows: list[list[str]]) -> Iterator[str]:
    """What a Markdown table says, by its cells: there is an axis in each row or column."""
    header = rows[0]
    if sum(map(_is_label, header)) > 1:  # | Instruction Compliance | Visual Quality |
        for row in rows[1:]:
            cells = zip(header, row, strict=False)
            yield from (_line(name, cell) for name, cell in cells if _is_label(name))
        return
    if not any(map(_START.match, header)):
        yield " ".join([*header, ":"])  # it may name a scale: | Axis | Result (1-10) |
    scores = [i for i, name in enumerate(header) if _is_score_name(name)]
    scales = [i for i, name in enumerate(header) if _SCALE_KEY.search(name) and i not in scores]
    for row in rows:
        for i, cell in enumerate(row):
            if _is_label(cell):  # | Instruction Compliance | why | 85 |
                cells = [f"{header[j]} {row[j]}" for j in scores if j < len(row)]
                cells = cells or [cell for cell in row[i + 1 :] if re.search(r"\d", cell)]
                yield _line(cell, " | ".join(cells))
            elif _START.match(cell):  # | Instruction Compliance: 85 | ...
                yield cell
        yield from (_line("scale", row[i]) for i in scales if i < len(row))


def _without_tables(text: str) -> list[str]:
    """The lines of a text, with others in the place of its tables."""
    lines: list[str] = []
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:  # the empty line ends a table at the end
        is_row = line.strip().startswith("|") or (table and "|" in line)
        is_rule = "|" in line and "-" in line and set(line) <= set("|:- ")
        if is_rule and not table and lines and "|" in lines[-1]:
            table.append(lines.pop().split("|"))  # a header without outer bars
        elif is_row and not is_rule:
            table.append(line.strip().strip("|").split("|"))
        elif not is_row and table:
            lines += _table_lines(table)
            table = []
        if not is_row and not is_rule:
            lines.append(line)
    return lines


# --- An answer ------------------------------------------------------------------------------------

_THOUGHT = r"(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)"
_OPENS = rf"[<◁]\s*\|?(?:begin_of_|\w+:)?{_THOUGHT}\|?\s*[>▷]|\[THINK\]|<\|channel\|>"
_CLOSES = rf"[<◁]\s*\|?(?:/\s*|end_of_)(?:\w+:)?{_THOUGHT}\|?\s*[>▷]|\[/THINK\]"
_CLOSES += r"|<\|channel\|>\s*final\s*<\|message\|>"

_NOT = r"\b(?:cannot|can\s?not|can\s?t|could not|unable|not able)\b"
_EXAMPLE = re.compile(  # scores that are made up
    r"\b(?:examples?|e\.g\.|for instance|hypothetical\w*|placeholders?|would be)(?!\w).*:\s*$"
    rf"|{_NOT}\s+(?:to\s+)?(?:directly\s+)?"
    r"(?:view|watch|open|access|process|score|rate|evaluate)\b",
    re.IGNORECASE,
)
_CLIPS = r"(?:videos?|frames?|images?|clips?|pictures?|files?|inputs?|content)\b"
_NOTHING = rf"\s+(?:see|detect|find|notice|spot|observe)\s+(?:any|an?)\s+(?!(?:\w+\s+)?{_CLIPS})"
_REFUSAL = re.compile(  # below the scores, where "I cannot see any flicker" is a reason for them
    rf"\bI\s?(?:(?:am|m)\s+)?(?:{_NOT}|do not|don\s?t)(?!{_NOTHING})|\bno scores?\b", re.IGNORECASE
)
_CORRECTION = re.compile(rf"\b(?:(?:IC|CF|VQ)\b|{_LABELS}).*\d", re.IGNORECASE)  # below, too


def without_thoughts(text: str) -> str:
    """What follows the last thought; nothing of a thought that was opened and never closed."""
    # Servers often cut the opening mark off: the last closing one decides.
    text = re.split(f"(?i){_CLOSES}", text)[-1]
    return re.split(f"(?i){_OPENS}", text)[0]


def _normal(text: str) -> str:
    """The text with plain digits, dashes, arrows and ranges, without what is invisible."""
    # Full-width digits and punctuation become plain, other spaces too. Footnote marks are dropped
    # before, as they would become digits.
    text = unicodedata.normalize("NFKC", re.sub("[⁰¹²³⁴-⁹₀-₉]", "", text))
    text = re.sub("[–—―]", " - ", re.sub("[⁄∕]", "/", re.sub("[⇒⇨➔➜➡⟶]", "→", text)))
    kinds = ((c, unicodedata.category(c)) for c in text)
    text = "".join(
        "-" if kind == "Pd" or c in "−~∼" else c
        for c, kind in kinds
        if kind not in ("Cf", "Mn", "Me")
    )
    return re.sub(r"(?<=\d)[ \t]*(?:-|\bto\b)[ \t]*(?=\d)", "-", text)


def _plain(text: str) -> str:
    """The text without the marks of Markdown, HTML and LaTeX, which become spaces."""
    text = re.sub(r"\\(?:boxed|textbf|text)\b", " ", text)
    text = re.sub(r"(?i)<\s*(?:br|/?(?:p|li|tr|div|h\d))\s*/?>", "\n", text)
    text = re.sub(r"(?i)<(?:b|strong|i|em|u|td|th|span|code|score|answer)>|</\w+>", " ", text)
    return re.sub(r"[*_`#\"'\\“”‘’„]+", " ", html.unescape(text))


_LONE = re.compile(rf"\W*{_NUMBER.pattern}\s*(?:%|points)?\W*", re.IGNORECASE)  # a whole line


def _below(lines: list[str]) -> str:
    """What stands below a heading: a number alone on the next line, and lines of scores."""
    found = []
    is_next = True
    for line in lines:
        if _START.match(line):
            break
        if re.match(rf"(?i)\W*{_SCORE_NAME}", line) or (is_next and _LONE.fullmatch(line)):
            found.append(line.lstrip("> •·-+"))
        is_next = is_next and not line.strip()
    return " | ".join(found)


def _in_lines(lines: list[str]) -> Iterator[tuple[str, float | None]]:
    """Axes at the start of a line, and the score that they have there, or None."""
    for i, line in enumerate(lines):
        found = _START.match(line)
        while found:
            behind = line[found.end() :]
            if not re.search(r"\w", _BRACKETS.sub("", behind)):
                behind += " " + _below(lines[i + 1 :])
            score, line = _score_behind_label(behind)
            yield found.lastgroup, score
            # Another label may follow the score: "Instruction Compliance: 85, Visual Quality: 80".
            line = re.sub(r"^\s*\([^()]*\)", "", line)
            found = None if score is None else _START.match(line)


def _is_doubtful(lines: list[str], scores: list[float]) -> bool:
    """Whether the lines around those with labels leave it open what the scores are."""
    labelled = [i for i, line in enumerate(lines) if _START.match(line)]
    above, below = lines[: labelled[0]], lines[labelled[-1] + 1 :]
    others = [line for line in lines if not _START.match(line)]
    return (
        _may_be_on_another_scale(scores, others)
        or any(_EXAMPLE.search(line) for line in others)
        or any(_LONE.fullmatch(line) for line in above)  # each score may stand above its label
        or any(_REFUSAL.search(line) for line in below)
        or any(_CORRECTION.search(line) and not _REASONING.match(line) for line in below)
    )


def parse_scores(answer: str) -> list[int] | None:
    """Read IC, CF and VQ from an answer, or None if one is missing, doubtful or out of bounds."""
    text = without_thoughts(_normal(answer))
    if len(text) > LONGEST:
        return None
    lines = _without_tables(_plain(_without_json(text)))
    lines = [_TO_100.sub(" ", line) for line in lines]

    given: dict[str, list[float | None]] = {axis: [] for axis in AXES}
    for axis, score in _in_lines(lines):
        given[axis].append(score)
    scores = []
    for found in given.values():
        last = found[-1] if found else None
        # A last one that cannot be read may take back the others.
        if last is None or set(found) - {None, last} or not 1 <= last <= 100:
            return None
        scores.append(last)
    return None if _is_doubtful(lines, scores) else [int(score + 0.5) for score in scores]
