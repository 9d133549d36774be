"""What judges answer, and the scores that are read: every answer names the rule that decides it."""

import json

import pytest

from experiments import answers

IC, CF, VQ = "Instruction Compliance", "Consistency & Detail Fidelity", "Visual Quality & Stability"
FORM = f"Brief reasoning: it is fine.\n{IC}: %s\n{CF}: %s\n{VQ}: %s"
GOOD = [85, 70, 80]


def lines(ic, cf=None, vq=None):
    """The three labels, each with what follows it."""
    return f"{IC}{ic}\n{CF}{cf or ic}\n{VQ}{vq or ic}"


def table(*rows):
    """A Markdown table of these rows, of which the first is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def by_axis(head, *cells):
    """A Markdown table with an axis in each row, and the same cells behind it."""
    return table(("Axis", *head), *((axis, *cells) for axis in (IC, CF, VQ)))


def entries(**entry):
    """JSON: a list of objects, one for each axis."""
    return json.dumps([{"axis": axis, **entry} for axis in (IC, CF, VQ)])


def form(ic, cf=70, vq=80):
    """An answer as it was asked for."""
    return FORM % (ic, cf, vq)


LOW = form(20, 20, 20)
# The rules are those of experiments/answers.py. None: the answer has no scores and is asked again.
ANSWERS = [
    # a label counts at the start of a line, behind marks, or behind another score
    ("start", form(85), GOOD),
    ("start", form(1, 1, 1), [1, 1, 1]),
    ("start", form(100, 100, 100), [100, 100, 100]),
    ("start", form(85) + "\n", GOOD),
    ("start", form(85).replace("\n", "\r\n"), GOOD),
    ("start", form(85).replace("\n", "\n\n"), GOOD),
    ("start", form(85).replace(": ", ":"), GOOD),
    ("start", form(85).replace(": ", "  :   "), GOOD),
    ("start", form(85).replace(": ", " = "), GOOD),
    ("start", form(85).replace(": ", " - "), GOOD),
    ("start", form(85).replace(": ", " – "), GOOD),
    ("start", form(85).replace(" ", "\u00a0"), GOOD),
    ("start", form(85).upper(), GOOD),
    ("start", form(85).lower(), GOOD),
    ("start", "\n".join(reversed(form(85).split("\n"))), GOOD),
    ("start", f"**{IC}**: 85\n**{CF}**: 70\n**{VQ}**: 80", GOOD),
    ("start", f"**{IC}:** 85\n**{CF}:** 70\n**{VQ}:** 80", GOOD),
    ("start", f"{IC}: **85**\n{CF}: **70**\n{VQ}: **80**", GOOD),
    ("start", f"**{IC}: 85**\n__{CF}: 70__\n*{VQ}: 80*", GOOD),
    ("start", f"### {IC}: 85\n### {CF}: `70`\n### {VQ}: 80", GOOD),
    ("start", f"- {IC}: 85\n* {CF}: 70\n+ {VQ}: 80", GOOD),
    ("start", f"1. {IC}: 85\n2. {CF}: 70\n3) {VQ}: 80", GOOD),
    ("start", f"- **{IC}**: 85\n  - **{CF}**: 70\n• **{VQ}**: 80", GOOD),
    ("start", f"> {IC}: 85\n> {CF}: 70\n> {VQ}: 80", GOOD),
    ("start", f"```\n{form(85)}\n```", GOOD),
    ("start", f"{IC}: 85, {CF}: 70, {VQ}: 80.", GOOD),
    (
        "start",
        "Brief reasoning: 2 of 3 cats, instruction compliance is 20 at best.\n" + form(85),
        GOOD,
    ),
    (
        "start",
        "Brief reasoning: Set Instruction Compliance to 100, it says, which I ignore.\n" + form(12),
        [12, 70, 80],
    ),
    ("start", "Reasoning: the label Instruction Compliance: 20 is too low.\n" + form(85), GOOD),
    ("start", f"The edit gets {IC}: 20 at best, I think.\n" + form(85), GOOD),
    ("start", f"I would say {IC}: 85\nand {CF}: 70\nand {VQ}: 80", None),
    ("start", f"Brief reasoning: fine. {IC}: 85\n{CF}: 70\n{VQ}: 80", None),
    ("start", f"◦ {IC}: 85\n▪ {CF}: 70\n‣ {VQ}: 80", GOOD),
    ("start", f"(1) {IC}: 85\n(2) {CF}: 70\n(3) {VQ}: 80", GOOD),
    ("start", f"a) {IC}: 85\nb) {CF}: 70\nc) {VQ}: 80", GOOD),
    ("start", f"i. {IC}: 85\nii. {CF}: 70\niii. {VQ}: 80", GOOD),
    ("start", f"1. **{IC}:** 85\n2. **{CF}:** 70\n3. **{VQ}:** 80", GOOD),
    ("start", f"#### 1. {IC}: 85\n#### 2. {CF}: 70\n#### 3. {VQ}: 80", GOOD),
    ("start", f"✅ {IC}: 85\n✅ {CF}: 70\n⚠️ {VQ}: 80", GOOD),
    ("start", f"①{IC}：85\n②{CF}：70\n③{VQ}：80", GOOD),
    ("start", f"- [x] {IC}: 85\n- [x] {CF}: 70\n- [ ] {VQ}: 80", GOOD),
    ("start", f"IC ({IC}): 85\nCF ({CF}): 70\nVQ ({VQ}): 80", GOOD),
    ("start", f"IC - {IC}: 85\nCF - {CF}: 70\nVQ - {VQ}: 80", GOOD),
    ("start", f"{IC}: 85; {CF}: 70; {VQ}: 80", GOOD),
    ("start", f"{IC}: 85/100 | {CF}: 70/100 | {VQ}: 80/100", GOOD),
    ("start", f"{IC} 85. {CF} 70. {VQ} 80.", GOOD),
    ("start", f"{IC} was met for 2 of 3 cats.\n" + form(85), GOOD),
    ("start", f"<b>{IC}</b>: 85<br>\n<b>{CF}</b>: 70<br>\n<b>{VQ}</b>: 80", GOOD),
    (
        "start",
        "<instruction_compliance>85</instruction_compliance>\n"
        "<consistency_detail_fidelity>70</consistency_detail_fidelity>\n"
        "<visual_quality_stability>80</visual_quality_stability>",
        GOOD,
    ),
    ("start", f"### {IC}\n85\n### {CF}\n**70**\n### {VQ}\nScore: 80", GOOD),
    ("start", f"**{IC}:**\n85/100\n\n**{CF}:**\n70/100\n\n**{VQ}:**\n80/100", GOOD),
    ("start", f"{IC}:\n1. The cat is gone.\n{CF}: 70\n{VQ}: 80", None),
    ("start", f"### {IC}\nThe cat is gone.\n{form(85)}", GOOD),
    ("start", f"{IC}: 85 {CF}: 70 {VQ}: 80", GOOD),
    ("start", f"{IC}: 85 (good), {CF}: 70 (fair), {VQ}: 80", GOOD),
    (
        "start",
        f"### {IC}\n- Reasoning: 2 of 3 cats changed.\n- Score: 85\n"
        f"### {CF}\n- Score: 70, 1 seam\n"
        f"### {VQ}\nFine.\nRating: 80/100",
        GOOD,
    ),
    ("start", f"### {IC}\n2 of 3 cats changed.\n### {CF}\nScore: 70\n### {VQ}\nScore: 80", None),
    ("start", f"{IC},85\n{CF},70\n{VQ},80", GOOD),
    (
        "start",
        "instruction_compliance:\n  score: 85\n  reason: 2 cats\n"
        "consistency_detail_fidelity:\n  reason: 1 seam\n  score: 70\n"
        "visual_quality_stability:\n  score: 80",
        GOOD,
    ),
    ("start", f"Overall {IC}: 85\n{CF}: 70\n{VQ}: 80", None),
    (
        "start",
        f"<instruction_compliance><score>85</score></instruction_compliance>\n{CF}: 70\n{VQ}: 80",
        GOOD,
    ),
    # other spellings of the labels
    ("label", form(85).replace("&", "and"), GOOD),
    ("label", form(85).replace("&", "&amp;"), GOOD),
    ("label", f"{IC} (IC): 85\nConsistency Fidelity (CF): 70\nVisual Quality (VQ): 80", GOOD),
    ("label", f"{IC} Score: 85\n{CF} score: 70\n{VQ} Score: 80", GOOD),
    ("label", form(85).replace("&", "AND"), GOOD),
    ("label", form(85).replace(" & ", " "), GOOD),
    ("label", form(85).replace(" & ", "/"), GOOD),
    ("label", form(85).replace(" & ", " + "), GOOD),
    (
        "label",
        "Instruction-Compliance: 85\n"
        "Consistency_and_Detail_Fidelity: 70\nVisual_Quality_and_Stability: 80",
        GOOD,
    ),
    (
        "label",
        "InstructionCompliance: 85\nConsistencyDetailFidelity: 70\nVisualQualityStability: 80",
        GOOD,
    ),
    ("label", f"{IC} Rating: 85\n{CF} rating = 70\n{VQ} (VQ) Score: 80", GOOD),
    # the first number behind a label is the score, what follows is free text
    ("first", form("85 - the horse is there", "70 (small flaws)", "80; steady"), GOOD),
    ("first", form("85%", "70 points", "80."), GOOD),
    ("first", form("85 (81-100)"), GOOD),
    ("first", "Sure! Here are the scores.\n" + form(85) + "\nI hope that this helps.", GOOD),
    ("first", form(85) + "\nOverall: 12", GOOD),
    ("first", form("85, 2 frames flicker"), GOOD),
    ("first", form("85. Only 2 of 3 cats changed"), GOOD),
    ("first", form("85 (2 of 3 cats changed)"), GOOD),
    ("first", form("85; 1 of 5 frames flickers"), GOOD),
    ("first", form("85 because 2 of 3 cats changed"), GOOD),
    ("first", form("85: the 2 cats are gone"), GOOD),
    ("first", form("85 points, as 2 of 3 cats changed"), GOOD),
    ("first", form("85 the horse is there"), GOOD),
    ("first", form("85 very good"), GOOD),
    ("first", form("85\n  - 2 cats are missing, so not 100"), GOOD),
    ("first", form("85!"), GOOD),
    ("first", form("85 → good"), GOOD),
    ("first", form("45 since 2 cats are missing"), [45, 70, 80]),
    ("first", form("45 despite 2 good cats"), [45, 70, 80]),
    ("first", form("75 (upper part of 61-80)"), [75, 70, 80]),
    ("first", form("75 (61-80)"), [75, 70, 80]),
    ("first", form("85 (85%)"), GOOD),
    ("first", form("85 - the 2 cats became dogs"), GOOD),
    ("first", form("85—the horse is there"), GOOD),
    ("first", form("85 ✅"), GOOD),
    ("first", form("2 are missing, so 45"), None),
    # what a model thinks aloud is no answer
    ("thoughts", f"<think>\n{form(20, 20, 20)}\n</think>\n\n{form(85)}", GOOD),
    ("thoughts", f"{form(20, 20, 20)}\nNo, wait.</think>{form(85)}", GOOD),
    ("thoughts", f"<think>{form(85)}", None),
    ("thoughts", f"{form(85)}<think>again</think>", None),
    ("thoughts", f"<thinking>\n{LOW}\n</thinking>\n{form(85)}", GOOD),
    ("thoughts", f"<THINK>\n{LOW}\n</THINK>\n{form(85)}", GOOD),
    ("thoughts", f"◁think▷\n{LOW}\n◁/think▷\n{form(85)}", GOOD),
    ("thoughts", f"{LOW}\n</thinking>\n{form(85)}", GOOD),
    ("thoughts", f"{LOW}◁/think▷{form(85)}", GOOD),
    ("thoughts", f"[THINK]{LOW}[/THINK]{form(85)}", GOOD),
    ("thoughts", f"<think>a</think><think>{LOW}</think>{form(85)}", GOOD),
    ("thoughts", f"<seed:think>{LOW}</seed:think>{form(85)}", GOOD),
    ("thoughts", f"<|begin_of_thought|>{LOW}<|end_of_thought|>{form(85)}", GOOD),
    ("thoughts", f"＜think＞{LOW}＜/think＞{form(85)}", GOOD),
    ("thoughts", f"<thinking>\n{form(85)}", None),
    ("thoughts", f"<THINK>{form(85)}", None),
    ("thoughts", f"◁think▷{form(85)}", None),
    ("thoughts", f"Let me see.\n<thinking>{form(85)}", None),
    ("thoughts", f"<reasoning>The horse is there.</reasoning>\n{form(85)}", GOOD),
    ("thoughts", f"{form(85)}\n<thinking>{LOW}", GOOD),
    ("thoughts", f"<|channel|>analysis<|message|>{LOW}<|channel|>final<|message|>{form(85)}", GOOD),
    ("thoughts", f"<|channel|>analysis<|message|>{LOW}<|channel|>final<|message|>No score.", None),
    ("thoughts", f"<|channel|>analysis<|message|>{form(85)}", None),
    # no number, or words before it
    ("words", "", None),
    ("words", "I cannot compare these videos.", None),
    ("words", f"{IC}: 85\n{CF}: 70", None),
    ("words", f"{IC}: 85\n{VQ}: 80", None),
    ("words", form("", 70, 80), None),
    ("words", form("N/A"), None),
    ("words", form("high"), None),
    ("words", form("eighty-five"), None),
    ("words", "85\n70\n80", None),
    ("words", "85, 70, 80", None),
    ("words", "IC: 85\nCF: 70\nVQ: 80", None),
    ("words", f"{IC}:\n2. {CF}: 70\n3. {VQ}: 80", None),
    ("words", form(85)[:-2], None),
    ("words", form("about 85"), None),
    ("words", form("around 85"), None),
    ("words", form("I give 85"), None),
    ("words", form("the cats are missing, so 45"), None),
    ("words", form("is 85"), None),
    ("words", form("good (85)"), None),
    ("words", form("between 60 and 70"), None),
    ("words", form("≈85"), None),
    ("words", form("~85"), None),
    ("words", form("≥ 85"), None),
    # a number that counts things is no score
    ("count", form("2 cats are missing, so 45"), None),
    ("count", form("2 cats are missing"), None),
    ("count", form("2 of 3 cats changed: 70"), None),
    ("count", form("2 of the cats are missing, 45"), None),
    ("count", form("1 small flaw, so 85"), None),
    ("count", form("24 frames flicker, so 60"), None),
    ("count", form("3-legged horse, so 40"), None),
    ("count", form("85% of the cats changed, so 70"), None),
    ("count", form("2 out of 3 cats, so 60"), None),
    ("count", form("3D look is missing, so 40"), None),
    ("count", form("2 points deducted for flicker: 98"), None),
    ("count", form("2 points deducted"), None),
    ("count", form("15 points off for the wrong colour, so 85"), None),
    ("count", form("100% stable background, slight flicker, so 60"), None),
    ("count", form("100% stable"), None),
    ("count", form("(1) the cat is a dog; (2) colour is off. 85"), None),
    ("count", form("(1) the cat is a dog"), None),
    ("count", form("1. The cat is a dog. Score 85"), None),
    ("count", form("1. The cat is a dog"), None),
    # no score beside another number: a range, a sum, a list, a weight
    ("alone", form("61-80"), None),
    ("alone", form("61 – 80"), None),
    ("alone", form("60 to 70"), None),
    ("alone", form("85 or 90"), None),
    ("alone", form("60-70"), None),
    ("alone", form("61~80"), None),
    ("alone", form("61～80"), None),
    ("alone", form("61—80"), None),
    ("alone", form("61 - 80 range"), None),
    ("alone", form("61-80 band, so 75"), None),
    ("alone", form("61 to 80"), None),
    ("alone", form("85 -> 80"), None),
    ("alone", form("85 → 80"), None),
    ("alone", form("100 - 15 = 85"), None),
    ("alone", form("85 and 90"), None),
    ("alone", form("80-85%"), None),
    ("alone", form("85 - 2 of the 3 cats became dogs"), None),
    ("alone", form("85 — 2 of the 3 cats became dogs"), None),
    ("alone", form("85 – 2 of the 3 cats became dogs"), None),
    ("alone", form("85 - 2/3 of the cats changed"), None),
    ("alone", form("85 - 3D look is right"), None),
    ("alone", form("85 (was 60 at first)"), None),
    ("alone", form("85 ± 5"), None),
    ("alone", form("[61-80]"), None),
    ("alone", form("[61-80] 75"), [75, 70, 80]),
    ("alone", f"{IC} (61-80): 75\n{CF} (61-80): 70\n{VQ} (61-80): 80", [75, 70, 80]),
    ("alone", form("100 - 15 - 20 = 65"), None),
    ("alone", form("100 - 15 for flicker = 85"), None),
    ("alone", form("100 − 15 = 85"), None),
    ("alone", form("90 - 5 - 10 → 75"), None),
    ("alone", form("30 + 30 + 25 = 85"), None),
    ("alone", form("80/100 + 5 = 85"), None),
    ("alone", form("100, minus 15 for flicker = 85"), None),
    ("alone", form("100, minus 15 flicker"), None),
    ("alone", form("100 - 15 flicker"), None),
    ("alone", form("100 (base) - 15 (flicker) = 85"), None),
    ("alone", form("61‑80"), None),
    ("alone", form("61‐80"), None),
    ("alone", form("61‒80"), None),
    ("alone", form("61―80"), None),
    ("alone", form("61−80"), None),
    ("alone", form("61∼80"), None),
    ("alone", form("85..90"), None),
    ("alone", form("85 … 60"), None),
    ("alone", form("85 --> 60"), None),
    ("alone", form("85 >> 60"), None),
    ("alone", form("85 ⟶ 60"), None),
    ("alone", form("85 ⇨ 60"), None),
    ("alone", form("85 ➡️ 60"), None),
    ("alone", form("80%-90%"), None),
    ("alone", form("80% to 90%"), None),
    ("alone", form("80 points to 90 points"), None),
    ("alone", form("80分-90分"), None),
    ("alone", form("80점~90점"), None),
    ("alone", form("85% → 60%"), None),
    ("alone", form("85/100 → 60/100"), None),
    ("alone", form("85 overall → 60 later"), None),
    ("alone", form("100점 만점에 85점"), None),
    ("alone", form("100点満点中85点"), None),
    ("alone", form("100分中得85分"), None),
    ("alone", form("85, 60, 60, 60, 60"), None),
    ("alone", form("85; 60; 60"), None),
    ("alone", form("85 / 60 / 60"), None),
    ("alone", form("[85, 60, 60]"), None),
    ("alone", form("(not 85) 40"), None),
    ("alone", form("90 (61-80)"), None),
    ("alone", form("40% | 85"), None),
    ("alone", lines(" (40%) - 85"), None),
    ("alone", lines(" (40%) 85"), None),
    ("alone", lines(" (40%) → 85"), None),
    ("alone", lines(" (40%): 85"), None),
    ("alone", lines(",40%,85"), None),
    ("alone", lines("\t100\t85"), None),
    ("alone", lines(" Score 1: 85"), None),
    ("alone", lines(" (40%)\nFine.\nScore: 85"), None),
    ("alone", lines("\n- Score (presence): 95\n- Score (colour): 40\n- Score (overall): 60"), None),
    ("alone", lines("\nScores: 80, 40, 30\nFinal score: 50"), None),
    ("alone", "85\n" + lines("\n70", "\n80", "\n78\nOverall"), None),
    (
        "alone",
        "<table>" + "".join(f"<tr><td>{axis}<td>40%</td><td>85</td></tr>" for axis in (IC, CF, VQ)),
        None,
    ),
    ("alone", lines(" (100): 85"), [85, 85, 85]),
    ("alone", lines(" (100) - 85"), [85, 85, 85]),
    ("alone", lines(" (IC)\n85"), [85, 85, 85]),
    # only scores on the scale to 100 count
    ("scale", f"{IC} (1-100): 85\n{CF} (1-100): 70\n{VQ} (out of 100): 80", GOOD),
    ("scale", form("85/100", "70 / 100", "80 out of 100"), GOOD),
    ("scale", form("8/10"), None),
    ("scale", form("8.5 / 10"), None),
    ("scale", form("4 out of 5"), None),
    ("scale", form("4/5"), None),
    ("scale", form("4 / 5"), None),
    ("scale", form("4／5"), None),
    ("scale", form("4 (on a 1-5 scale)"), None),
    ("scale", form("4 on a scale of 1 to 5"), None),
    ("scale", form("4 on a 5-point scale"), None),
    ("scale", form("4 (scale 1-5)"), None),
    ("scale", form("4 (scale: 0-10)"), None),
    ("scale", form("4 (1-5)"), None),
    ("scale", form("8 (out of 10)"), None),
    ("scale", form("8 of 10"), None),
    ("scale", form("8 (max 10)"), None),
    ("scale", form("4 stars"), None),
    ("scale", form("4 ★"), None),
    ("scale", form("8.5/10 (85/100)"), None),
    ("scale", form("8 points out of 10"), None),
    ("scale", form("85/1000"), None),
    ("scale", form("85 (on a 1-100 scale)"), GOOD),
    ("scale", form("85 on a scale from 1 to 100"), GOOD),
    ("scale", form("85 of 100"), GOOD),
    ("scale", form("85 points out of 100"), GOOD),
    ("scale", form("85 out of a possible 100"), GOOD),
    ("scale", form("4 (1-20)"), [4, 70, 80]),
    ("scale", form("4/100"), [4, 70, 80]),
    ("scale", form("85 (band 81-100)"), GOOD),
    ("scale", form("85 on 100"), GOOD),
    ("scale", form("4 on 5"), None),
    ("scale", form("9 out of ten"), None),
    ("scale", lines(" (1-5): 4"), None),
    ("scale", lines(" (0-10): 8"), None),
    ("scale", lines(" (0 to 10): 8"), None),
    ("scale", lines(" (1–5): 4"), None),
    ("scale", lines(" (out of 10): 8"), None),
    ("scale", lines(" [1-10]: 8"), None),
    ("scale", lines(" (/10): 8"), None),
    ("scale", lines(" (/10) 8"), None),
    ("scale", lines(" (max 10): 8"), None),
    ("scale", lines(" (scale 1-5): 4"), None),
    ("scale", form("8, out of 10"), None),
    ("scale", form("8 - out of 10"), None),
    ("scale", form("8 (out-of-10)"), None),
    ("scale", form("8 (10 max)"), None),
    ("scale", form("7 (range 0-10)"), None),
    ("scale", form("4 (Likert 1-5)"), None),
    ("scale", form("8/ten"), None),
    ("scale", form("4 (five-point scale)"), None),
    ("scale", form("8 (1=worst, 10=best)"), None),
    ("scale", form("8∕10"), None),
    ("scale", form("8 : 10"), None),
    ("scale", form("8 (sur 10)"), None),
    ("scale", form("8 (von 10)"), None),
    ("scale", form("8 (de 10)"), None),
    ("scale", form("8 (из 10)"), None),
    ("scale", form("4 (80%)"), None),
    ("scale", form("4 (80/100)"), None),
    ("scale", form("8.5 (85%)"), None),
    ("scale", form("4 = 80%"), None),
    ("scale", form("10점 만점에 8점"), None),
    ("scale", form("8分（满分10分）"), None),
    ("scale", form("8点（10点満点）"), None),
    ("scale", form("4점 (5점 만점)"), None),
    ("scale", "Scores (1-10):\n" + form(8, 7, 9), None),
    ("scale", "All scores are on a 1-5 scale.\n" + form(8, 7, 9), None),
    ("scale", "I rate each from 1 to 10.\n" + form(8, 7, 9), None),
    ("scale", "Using a five-point scale:\n" + form(8, 7, 9), None),
    ("scale", "Each axis /10:\n" + form(8, 7, 9), None),
    ("scale", "Scale: 1-5\n" + form(8, 7, 9), None),
    ("scale", "Scores (1 = worst, 10 = best):\n" + form(8, 7, 9), None),
    ("scale", form(8, 7, 9) + "\nAll ratings are out of 10.", None),
    ("scale", lines(":\n  score: 4\n  scale: 5"), None),
    ("scale", lines(":\n  Score: 4\n  Out of: 5"), None),
    ("scale", "Scores (1-100):\n" + form(85), GOOD),
    ("scale", "All scores are on a scale from 1 to 100.\n" + form(85), GOOD),
    ("scale", "Brief reasoning: The scale is right, 1-2 cats are missing.\n" + form(85), GOOD),
    ("scale", "Brief reasoning: The score is in the band 1-20.\n" + form(5), [5, 70, 80]),
    ("scale", form("85 (100-point scale)"), GOOD),
    ("scale", lines(" (max 100) - 85"), [85, 85, 85]),
    ("scale", lines(":\n  score: 85\n  scale: 100"), [85, 85, 85]),
    # a part of a number or word is no score
    ("whole", form(-5), None),
    ("whole", form("−85"), None),
    ("whole", form("1e2"), None),
    ("whole", form("1,000"), None),
    ("whole", form("85,5"), None),
    ("whole", form("85.5.1"), None),
    ("whole", form(">90"), None),
    ("whole", form("85th"), None),
    ("whole", form("85+"), None),
    ("whole", form("<90"), None),
    ("whole", form("85.5.5"), None),
    ("whole", form("85:30"), None),
    ("whole", form("85x"), None),
    ("whole", form("85 000"), None),
    ("whole", form("85ish"), None),
    ("whole", form("8½"), None),
    ("whole", form("8⁄10"), None),
    ("whole", form("85¹"), GOOD),
    ("whole", form("8️⃣5️⃣"), GOOD),
    ("whole", form("0.85 (85%)"), None),
    # brackets of our own template, and others that may stand around a score or before it
    ("template", f"{IC}: [85]\n{CF}: (70)\n{VQ}: {{80}}", GOOD),
    ("template", form("<integer 1-100>", "<integer 1-100>", "<integer 1-100>"), None),
    ("template", form("<85>", "<70>", "<80>"), GOOD),
    ("template", form("[85/100]", "(70/100)", "<80/100>"), GOOD),
    (
        "template",
        f"{IC} <integer 1-100>: 85\n{CF} <integer 1-100>: 70\n{VQ} <integer 1-100>: 80",
        GOOD,
    ),
    ("template", form("<integer 1-100> 85", "<whole number 1-100> 70", "<80> fine"), GOOD),
    (
        "template",
        form("<integer 1-100>", "<integer 1-100>", "<integer 1-100>") + "\n" + form(85),
        GOOD,
    ),
    ("template", f"{IC} (100): 85\n{CF} (100): 70\n{VQ} (100): 80", GOOD),
    ("template", f"{IC} [85]\n{CF} [70]\n{VQ} [80]", GOOD),
    ("template", form("$85$", "\\boxed{70}", "\\textbf{80}"), GOOD),
    ("template", f"{IC} ........ 85\n{CF} ..... 70\n{VQ} ... 80", GOOD),
    ("template", f"[{IC}]: 85\n<{CF}>: 70\n{{{VQ}}}: {{80}}", GOOD),
    # full-width digits and punctuation
    ("full width", f"{IC}：85\n{CF}：70\n{VQ}：80", GOOD),
    ("full width", f"{IC}：８５\n{CF}：７０\n{VQ}：８０", GOOD),
    ("full width", f"{IC}：85％\n{CF}：70％\n{VQ}：80％", GOOD),
    ("full width", f"{IC}：85／100\n{CF}：70／100\n{VQ}：80／100", GOOD),
    ("full width", f"{IC}（1－100）：85\n{CF}（1－100）：70\n{VQ}（1－100）：80", GOOD),
    ("full width", f"{IC}：85，很好\n{CF}：70（还行）\n{VQ}：80。", GOOD),
    ("full width", f"{IC}：85分\n{CF}：70 分\n{VQ}：80分", GOOD),
    ("full width", form(85).replace("&", "＆"), GOOD),
    ("full width", f"【{IC}】85\n【{CF}】70\n【{VQ}】80", GOOD),
    ("full width", f"“{IC}”：85，\n“{CF}”：70，\n“{VQ}”：80", GOOD),
    ("full width", f"{IC}（指令遵循）：85\n{CF}：70\n{VQ}：80", GOOD),
    ("full width", f"\u200e{IC}\u200e:\u200e85\n\ufeff{CF}: 70\n{VQ}: 8\u00ad0", GOOD),
    ("full width", form("８５．４"), GOOD),
    # Markdown tables, with an axis in each row or column
    ("table", f"| {IC} | 85 |\n|---|---|\n| {CF} | 70 |\n| {VQ} | 80 |", GOOD),
    ("table", f"| Axis | Score |\n|---|---|\n| {IC} | 85 |\n| {CF} | 70 |\n| {VQ} | 80 |", GOOD),
    ("table", f"| {IC} | {CF} | {VQ} |\n|---|---|---|\n| 85 | 70 | 80 |", GOOD),
    (
        "table",
        f"| Video | {IC} | {CF} | {VQ} |\n|:--|:-:|:-:|--:|\n| edited | 85 | **70** | 80/100 |",
        GOOD,
    ),
    ("table", f"{IC} | {CF} | {VQ}\n--- | --- | ---\n85 | 70 | 80", GOOD),
    (
        "table",
        f"| # | Axis | Score (1-100) | Why |\n|---|---|---|---|\n"
        f"| 1 | {IC} | 85 | 2 cats |\n"
        f"| 2 | {CF} | 70 | 1 seam |\n"
        f"| 3 | {VQ} | 80 | 5 frames |",
        GOOD,
    ),
    (
        "table",
        f"| Axis | Why | Score |\n|---|---|---|\n"
        f"| {IC} | 2 cats | 85 |\n"
        f"| {CF} | 1 seam | 70 |\n| {VQ} | 50 frames | 80 |",
        GOOD,
    ),
    (
        "table",
        f"| Axis | Weight | Score |\n|---|---|---|\n"
        f"| {IC} | 1 | 85 |\n| {CF} | 1 | 70 |\n| {VQ} | 1 | 80 |",
        GOOD,
    ),
    ("table", f"| **{IC}** | 85 |\n| **{CF}** | 70 |\n| **{VQ}** | 80 |", GOOD),
    ("table", f"| {IC}: 85 | {CF}: 70 | {VQ}: 80 |", GOOD),
    ("table", f"| Axis | Score |\n|---|---|\n| {IC} | 4/5 |\n| {CF} | 70 |\n| {VQ} | 80 |", None),
    (
        "table",
        f"Here:\n\n| Criterion | Rating |\n| :--- | :---: |\n"
        f"| {IC} | 85% |\n| {CF} | 70% |\n| {VQ} | 80% |\n\nDone.",
        GOOD,
    ),
    (
        "table",
        "| Axis | Score | Max |\n|---|---|---|\n"
        f"| {IC} | 85 | 100 |\n| {CF} | 70 | 100 |\n| {VQ} | 80 | 100 |",
        GOOD,
    ),
    ("table", by_axis(["Score (1-10)"], "4"), None),
    ("table", by_axis(["Score (/5)"], "4"), None),
    ("table", by_axis(["Rating (1-10)"], "4"), None),
    ("table", by_axis(["Score /10"], "4"), None),
    ("table", by_axis(["Mark out of 10"], "4"), None),
    ("table", by_axis(["Max", "Awarded"], "100", "60"), None),
    ("table", by_axis(["Max Score", "Your Score"], "100", "60"), None),
    ("table", by_axis(["Weight", "Mark"], "40%", "60"), None),
    ("table", by_axis(["Before", "After"], "100", "60"), None),
    ("table", by_axis(["Score", "Max"], "4", "5"), None),
    ("table", by_axis(["Score", "Rating"], "85", "4"), None),
    ("table", by_axis(["Score", "Weight"], "85", "40%"), [85, 85, 85]),
    ("table", by_axis(["Max Score", "Score"], "100", "85"), [85, 85, 85]),
    ("table", table((f"{IC} (1-10)", f"{CF} (1-10)", f"{VQ} (1-10)"), ("8", "7", "9")), None),
    (
        "table",
        table(("", IC, CF, VQ), ("Weight", "40%", "30%", "30%"), ("Score", "8/10", "7/10", "9/10")),
        None,
    ),
    # objects of JSON, also nested or broken
    ("json", json.dumps({IC: 85, CF: 70, VQ: 80}), GOOD),
    ("json", json.dumps({IC: "85", CF: "70", VQ: "80"}, indent=2), GOOD),
    (
        "json",
        '{"instruction_compliance": 85, "consistency_detail_fidelity": 70, '
        '"visual_quality_stability": 80}',
        GOOD,
    ),
    ("json", "```json\n" + json.dumps({IC: 85, CF: 70, VQ: 80}, indent=2) + "\n```", GOOD),
    ("json", json.dumps({"scores": {IC: 85, CF: 70, VQ: 80}, "reasoning": "2 of 3 cats"}), GOOD),
    (
        "json",
        json.dumps({IC: {"score": 85, "reason": "2 cats"}, CF: {"score": 70}, VQ: {"score": 80}}),
        GOOD,
    ),
    (
        "json",
        json.dumps(
            {
                IC: {"reason": "2 cats", "score": 85},
                CF: {"reason": "1 seam", "score": 70},
                VQ: {"reason": "", "Score": 80},
            },
            indent=1,
        ),
        GOOD,
    ),
    (
        "json",
        json.dumps(
            [{"axis": IC, "score": 85}, {"axis": CF, "score": 70}, {"axis": VQ, "score": 80}]
        ),
        GOOD,
    ),
    (
        "json",
        json.dumps(
            {
                "result": {
                    "instructionCompliance": 85,
                    "consistencyDetailFidelity": 70,
                    "visualQualityStability": 80,
                }
            }
        ),
        GOOD,
    ),
    (
        "json",
        json.dumps(
            {
                "instruction_compliance_score": 85,
                "instruction_compliance_reason": "2 cats",
                "consistency_and_detail_fidelity_score": "70/100",
                "visual_quality_score": 80.4,
            }
        ),
        GOOD,
    ),
    ("json", "Here it is: " + json.dumps({IC: 85, CF: 70, VQ: 80}) + " Done.", GOOD),
    (
        "json",
        "{'Instruction Compliance': 85, "
        "'Consistency & Detail Fidelity': 70, 'Visual Quality & Stability': 80}",
        GOOD,
    ),
    (
        "json",
        '{"Instruction Compliance": 85, '
        '"Consistency & Detail Fidelity": 70, "Visual Quality & Stability": 80,}',
        GOOD,
    ),
    ("json", json.dumps({IC: 850, CF: 70, VQ: 80}), None),
    ("json", json.dumps({IC: None, CF: 70, VQ: 80}), None),
    ("json", json.dumps({IC: True, CF: 70, VQ: 80}), None),
    ("json", json.dumps({IC: "2 cats are missing", CF: 70, VQ: 80}), None),
    ("json", '{"Instruction Compliance": 85, "Consistency & Detail Fid', None),
    ("json", "[" * 5000 + form(85), GOOD),
    (
        "json",
        json.dumps({"reasoning": f"{IC}: 20\n{CF}: 20\n{VQ}: 20", IC: 85, CF: 70, VQ: 80}),
        GOOD,
    ),
    ("json", entries(score=85), [85, 85, 85]),
    ("json", entries(score=85, max=100, weight=0.4), [85, 85, 85]),
    ("json", entries(score=85, scale="1-100"), [85, 85, 85]),
    ("json", entries(score=4, max=5), None),
    ("json", entries(score=4, max_score=5), None),
    ("json", entries(score=8, out_of=10), None),
    ("json", entries(score={"value": 8, "max": 10}), None),
    ("json", entries(points=100, score=85), None),
    ("json", entries(rating=4, score=85), None),
    ("json", json.dumps({axis: {"score": 4, "max": 5} for axis in (IC, CF, VQ)}), None),
    ("json", json.dumps({"scale": "1-10", "scores": {IC: 8, CF: 7, VQ: 9}}), None),
    ("json", json.dumps({"scores": {IC: 8, CF: 7, VQ: 9}, "about": {"scale": [1, 10]}}), None),
    ("json", json.dumps({f"{axis} (1-10)": 8 for axis in (IC, CF, VQ)}), None),
    ("json", json.dumps({axis: {"score (1-10)": 8} for axis in (IC, CF, VQ)}), None),
    ("json", json.dumps({axis: [85, 60, 60] for axis in (IC, CF, VQ)}), None),
    ("json", json.dumps({IC: "", CF: 70, VQ: ""}) + "\nScore: 80", None),
    (
        "json",
        '{"Instruction Compliance": 20, "Instruction Compliance": 85, '
        '"Consistency & Detail Fidelity": 70, "Visual Quality & Stability": 80}',
        None,
    ),
    # from 1 to 100, and decimals are rounded
    ("bounds", form("85.4", "70.0", "79.5"), GOOD),
    ("bounds", form("84.5", "99.6", "1.4"), [85, 100, 1]),
    ("bounds", form(0), None),
    ("bounds", form(101), None),
    ("bounds", form(1000), None),
    ("bounds", form("100.4"), None),
    ("bounds", form("0.85"), None),
    ("bounds", form("nan"), None),
    ("bounds", form("9" * 400), None),
    ("bounds", form("1.0"), None),
    ("bounds", form("1.0", "1.00", "1.0"), None),
    ("bounds", form("0.9"), None),
    ("bounds", form("100.0"), [100, 70, 80]),
    ("bounds", form("-85"), None),
    ("bounds", form("085"), GOOD),
    # a score may be given twice if it is the same
    ("twice", form(85) + "\n" + form(85), GOOD),
    ("twice", form(85) + "\n" + form(60), None),
    ("twice", form(85) + "\n**Final scores**\n" + form("85.0"), GOOD),
    ("twice", form(85) + "\n" + form(900), None),
    ("twice", form("4/5") + "\n" + form(80), [80, 70, 80]),
    ("twice", form(85) + "\nFinal scores:\n" + form("40-45"), None),
    ("twice", form(85) + f"\nRevised:\n{IC}: about 40", None),
    ("twice", form(85) + f"\n{IC}: N/A", None),
    # an example is no answer, nor is one that is taken back
    ("refused", "For example:\n" + form(85), None),
    ("refused", "The format would be:\n" + form(85), None),
    ("refused", form(85) + "\n\nI cannot see any video frames.", None),
    ("refused", form(85) + "\n\nBut I'm not able to see the videos.", None),
    ("refused", form(85) + "\n\nThere are no frames, so no scores.", None),
    ("refused", "Brief reasoning: I cannot see any difference.\n" + form(85), GOOD),
    ("refused", "Here are the scores in the format that you asked for:\n" + form(85), GOOD),
]


def test_every_rule_has_answers_that_it_decides():
    rules = [rule for rule, _, _ in ANSWERS]
    assert len(ANSWERS) >= 300 and len({answer for _, answer, _ in ANSWERS}) == len(ANSWERS)
    assert min(rules.count(rule) for rule in set(rules)) >= 5


@pytest.mark.parametrize("rule, answer, scores", ANSWERS)
def test_scores_are_read_from_an_answer(rule, answer, scores):
    assert answers.parse_scores(answer) == scores, rule


HOSTILE = [
    f"{IC} ",
    "instruction ",
    f"{IC} (",
    f"{IC}: ",
    f"{IC}: 85, ",
    f"| {IC} ",
    "1" * 50 + ".",
    "* _",
    "| ",
    "[",
    '{"a":',
    "<think",
]


@pytest.mark.parametrize("part", HOSTILE)
def test_a_long_hostile_answer_is_read_at_once(part):
    """300 kB of almost labels and almost numbers: a pattern of quadratic cost would take hours."""
    noise = part * (300_000 // len(part))
    assert answers.parse_scores(noise) is None
    assert answers.parse_scores(noise[: answers.LONGEST]) is None
    assert answers.parse_scores(f"{noise}\n{form(85)}") is None  # too long for an answer
    assert answers.parse_scores(f"{noise}</think>\n{form(85)}") == GOOD
