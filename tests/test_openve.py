"""OpenVE-Bench: edits of its clips, what judges answer, rubrics, tables, and synthetic clips."""

import contextlib
import csv
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import make_clip, tiny_model
from test_answers import CF, IC, VQ, form
from test_chat import CUT, in_turn, lines, loopback, no_pauses, opened, reply_of  # noqa: F401

import cli
import rvedit
import sample
from experiments import chat, openve
from video import read_video, write_video

ROOT = Path(__file__).parents[1]
CATEGORIES = ("local_change", "local_remove", "local_add", "global_style")


def fails(capsys, *command):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as end:
        openve.main([str(word) for word in command])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


# --- Rubrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_our_rubrics_have_axes_bands_place_and_format(category):
    text = (ROOT / "experiments" / "rubrics" / f"{category}.txt").read_text("utf-8")
    axes = re.findall(rf"(?m)^({IC}|{CF}|{VQ}):", text)
    assert axes == [IC, CF, VQ] * 2  # the questions, then the format
    bands = re.findall(r"(?m)^ *([0-9]+-[0-9]+):", text)
    assert bands == ["1-20", "21-40", "41-60", "61-80", "81-100"] * 3
    assert text.count("{edit_prompt}") == 1 and text.isascii()
    asked = text[text.index("Brief reasoning") :]
    assert asked.count("\n") == 4 and openve.parse_scores(text) is None
    assert openve.parse_scores(asked.replace("<whole number 1-100>", "55")) == [55, 55, 55]


RULES = """Rules (apply to all):
- Rule one; a low
  score is low.

- Rule two.
"""
FORMAT = """Instruction (verbatim):
‘‘‘
{edit_prompt}
‘‘‘

Answer:
Instruction Compliance: <integer 1-100>
"""
PAPER = f"""
  • Local Change: IC rewards something.

All rubrics share a common scoring-rules block. The token {{edit_prompt}} is replaced at runtime.

# Shared block: <COMMON_RULES>
{RULES}
# Shared block: <RESPONSE_FORMAT>
{FORMAT}
Local Change.

You grade replacements.

Instruction Compliance (is it done)
 1-20 : Not at all.

<COMMON_RULES>
<RESPONSE_FORMAT>

Local Remove.

You grade removals.

<COMMON_RULES>
<RESPONSE_FORMAT>

Local Add.

You grade additions.

<COMMON_RULES>
<RESPONSE_FORMAT>

Global Style.

You grade styles.

<COMMON_RULES>
"""
SHARED = f"{RULES}\n{FORMAT}"


@pytest.mark.parametrize(
    "dress", ["plain", "carriage returns", "spaces at the ends", "no end of line"]
)
def test_the_papers_prompts_are_cut_out_word_for_word(dress, tmp_path):
    text = {
        "plain": PAPER,
        "carriage returns": PAPER.replace("\n", "\r\n"),
        "spaces at the ends": PAPER.replace("\n", "  \n"),
        "no end of line": PAPER.strip(),
    }[dress]
    (tmp_path / "paper.txt").write_bytes(text.encode())
    openve.main(["rubrics", str(tmp_path / "paper.txt"), "--out", str(tmp_path / "a" / "b")])
    expected = {
        "local_change": "You grade replacements.\n\n"
        "Instruction Compliance (is it done)\n 1-20 : Not at all.",
        "local_remove": "You grade removals.",
        "local_add": "You grade additions.",
        "global_style": "You grade styles.",
    }
    found = {path.stem: path.read_bytes().decode() for path in (tmp_path / "a" / "b").iterdir()}
    assert found == {name: f"{anchors}\n\n{SHARED}" for name, anchors in expected.items()}


@pytest.mark.parametrize(
    "lost", ["# Shared block: <COMMON_RULES>", "# Shared block: <RESPONSE_FORMAT>", "Local Add."]
)
def test_a_paper_without_the_prompts_is_named(lost, tmp_path, capsys):
    (tmp_path / "paper.txt").write_text(PAPER.replace(lost, "something else"), "utf-8")
    error = fails(capsys, "rubrics", tmp_path / "paper.txt", "--out", tmp_path / "out")
    assert "paper.txt" in error and "arXiv 2605.24674" in error and not (tmp_path / "out").exists()


# --- Tables ---------------------------------------------------------------------------------------


def scores(method, judge, rubrics="ours", **by_category):
    """Rows as `judge` writes them; by_category: a list of IC, CF and VQ, or None, by category."""
    about = {"method": method, "judge": judge, "rubrics": rubrics}
    rows = []
    for category, triples in by_category.items():
        about["category"] = category.replace("_", " ").title()
        rows += [about | {"scores": triple} for triple in triples]
    return rows


def as_dicts(table):
    header, *lines = table
    return [dict(zip(header, line, strict=True)) for line in lines]


def markdown_rows(text):
    """The cells of a Markdown table, without the line below its header."""
    header, _, *lines = text.splitlines()
    return [line.strip("| ").split(" | ") for line in [header, *lines]]


def test_the_table_is_that_computed_by_hand():
    """Judge p on a: category means 20, 50, 80, 30, so overall 45.

    The sum of its 18 scores is 690, so the mean of all scores is 38.33.
    """
    rows = scores(
        "a",
        "p",
        local_change=[[10, 20, 30], None, [30, 20, 10]],  # IC 20, CF 20, VQ 20
        local_remove=[[40, 50, 60]],
        local_add=[[70, 80, 90], None],
        global_style=[[1, 40, 49], [11, 30, 49]],  # IC 6, CF 35, VQ 49
    )
    rows += scores(
        "a", "q", local_change=[[50, 50, 50]], local_remove=[[60, 60, 60]], local_add=[[70, 70, 70]]
    )
    rows += scores("a", "q", global_style=[[100, 90, 80]])
    rows += scores("b", "p", local_change=[[1, 2, 4]], local_remove=[None])
    lines = [" ".join(line) for line in openve.make_table(rows, layout=3)]
    assert lines[1:] == [
        "ours p a 45.00 38.33 34.00 46.25 54.75 "
        "20.00 20.00 20.00 40.00 50.00 60.00 70.00 80.00 90.00 6.00 35.00 49.00 6 2",
        "ours p b - 2.33 - - - 1.00 2.00 4.00 - - - - - - - - - 1 1",
        "ours q a 67.50 67.50 70.00 67.50 65.00 "
        "50.00 50.00 50.00 60.00 60.00 60.00 70.00 70.00 70.00 100.00 90.00 80.00 4 0",
        "ours average a 56.25 52.92 52.00 56.88 59.88 "
        "35.00 35.00 35.00 50.00 55.00 60.00 70.00 75.00 80.00 53.00 62.50 64.50 10 2",
    ]


def test_table_2_has_a_categorys_mean_over_the_axes():
    """The first row of the paper's Table 3, whose Table 2 is 74.13 86.48 67.95 63.50 78.61."""
    cells = [float(word) for word in TABLE_3[0].split()[4:]]
    rows = scores(
        "L_s = 8",
        "Qwen3.5-VL-35B",
        local_change=[cells[:3]],
        local_remove=[cells[3:6]],
        local_add=[cells[6:9]],
        global_style=[cells[9:], None],
    )
    header, line = openve.make_table(rows, layout=2)
    assert header[2:] == ["Variant", "Overall", *openve.NAMES, "Scored", "Dropped"]
    assert line[2] == "L_s = 8" and line[-2:] == ["4", "1"]
    printed = [74.13, 86.48, 67.95, 63.50, 78.61]
    assert [float(cell) for cell in line[3:-2]] == pytest.approx(printed, abs=0.0101)


BOMB = "[" * 100_000
ROW = '{"key": "a", "category": "Local Add", "judge": "j", "rubrics": "r", "scores": %s}\n'


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("scores_x.jsonl", f"{BOMB}\n{ROW % '[1, 2, 3]'}", "scores_x.jsonl: line 1 is damaged"),
        ("scores_x.jsonl", '{"key": "a", "scores": [1, 2, 3]}\n', "the line of 'a' is none"),
        ("scores_x.jsonl", ROW % "[1, 2]", "the line of 'a' is none"),
        ("scores_x.jsonl", ROW % '[1, 2, "3"]', "the line of 'a' is none"),
        ("scores_x.jsonl", ROW % "7", "the line of 'a' is none"),
        ("scores_x.jsonl", ROW % "[1, 2, NaN]", "the line of 'a' is none"),
        ("scores_x.jsonl", ROW % "[1, 2, 300]", "the line of 'a' is none"),
        ("scores_x.jsonl", ROW.replace("Local Add", "Other") % "null", "the line of 'a' is none"),
        ("editor.json", BOMB, "editor.json is no JSON"),
        ("editor.json", "{", "editor.json is no JSON"),
        ("editor.json", "[1]", "editor.json: expected an object"),
    ],
)
def test_damaged_scores_are_named_in_one_line(name, text, message, tmp_path, capsys):
    (tmp_path / "scores_ok.jsonl").write_text(ROW % "[1, 2, 3]")
    (tmp_path / name).write_text(text)
    assert message in fails(capsys, "table", tmp_path)


def test_judges_with_other_rubrics_are_not_averaged():
    one = dict(local_change=[[10, 10, 10]], local_remove=[[10, 10, 10]], local_add=[[10, 10, 10]])
    rows = (
        scores("a", "p", **one)
        + scores("a", "q", "paper", **one)
        + scores("b", "r", "paper", **one)
    )
    table = as_dicts(openve.make_table(rows, layout=1))
    assert [(x["Rubrics"], x["Judge"], x["Method"]) for x in table] == [
        ("ours", "p", "a"),
        ("paper", "q", "a"),
        ("paper", "r", "b"),  # no average here either: not one method has been seen by both
    ]


# The rows of Table 3 in its order, without their names and without the repeated full model.
TABLE_3 = """
74.14 71.89 73.69 76.83 83.46 86.72 89.26 81.19 61.14 61.53 57.64 60.84 72.01 65.28 86.05 84.52
77.42 73.76 78.22 80.29 78.71 86.43 89.92 84.32 67.08 67.93 59.49 71.73 79.67 72.50 87.64 83.64
69.86 63.92 72.06 73.61 71.49 84.18 85.97 74.83 58.41 58.37 45.12 62.04 69.76 64.22 83.59 80.33
75.10 72.95 74.62 77.73 79.14 83.45 87.74 82.41 65.81 67.34 61.87 62.94 72.15 68.38 86.29 83.69
72.75 69.12 72.74 76.39 72.52 87.02 89.28 81.14 54.54 58.32 58.97 62.43 74.42 63.86 86.98 83.55
73.37 72.59 72.41 75.11 78.46 81.69 85.12 82.64 64.75 66.15 58.24 59.51 67.09 71.02 83.67 82.09
74.77 73.07 74.72 76.52 79.58 85.78 88.42 81.86 64.55 66.66 58.54 64.85 73.54 72.28 83.69 77.45
76.07 74.04 76.05 78.13 80.62 85.94 88.28 83.19 68.19 69.07 58.39 64.46 74.37 73.95 85.59 80.79
71.77 57.28 78.30 79.73 72.86 88.03 90.75 39.86 63.55 65.12 51.29 71.17 78.73 65.12 90.45 84.31
""".strip().split("\n")
TABLE_2 = {  # the overall, then the four categories; those at the end do not add up to it
    "w/o GRTC": (74.76, 84.59, 71.02, 65.64, 77.80),
    "L_s = 8": (74.13, 86.48, 67.95, 63.50, 78.61),
    "lambda = 0.50": (72.75, 82.94, 64.67, 65.27, 78.13),
    "lambda = 1.00": (73.37, 81.76, 71.18, 61.61, 78.93),
    "L_s = 15": (77.42, 85.02, 73.11, 70.29, 81.29),
    "w/o RAAA": (76.06, 84.94, 73.48, 65.74, 80.11),
    "lambda = 0.25": (75.09, 83.44, 71.85, 65.65, 79.45),
    "L_s = 25": (69.83, 80.55, 63.87, 58.98, 76.05),
    "w/o both": (71.71, 83.88, 56.18, 67.06, 79.96),
}


def overall_of(cells):
    """Overall and its three parts, of 12 printed means: IC, CF and VQ of each category."""
    by_category = {}
    for i, category in enumerate(CATEGORIES):
        by_category[category] = [cells[3 * i : 3 * i + 3]]
    mean = openve.summarize(scores("x", "y", **by_category))
    return np.array([mean.overall, *mean.axes])


@pytest.mark.parametrize("line", TABLE_3)
def test_the_papers_table_3_adds_up(line):
    """In each row Overall and its three parts are means of the category means, up to rounding."""
    printed = np.array([float(word) for word in line.split()])
    assert np.abs(overall_of(printed[4:].tolist()) - printed[:4]).max() <= 0.0051


def test_the_papers_table_2_does_not_add_up_everywhere():
    """In five of nine rows Overall is not the mean of the categories, in two by more than 0.01."""
    errors = {}
    for name, (overall, *categories) in TABLE_2.items():
        errors[name] = abs(overall_of(np.repeat(categories, 3).tolist())[0] - overall)
    assert [name for name, error in errors.items() if error > 0.0051] == [*TABLE_2][4:]
    larger = {name: round(error, 2) for name, error in errors.items() if error > 0.01}
    assert larger == {"L_s = 25": 0.03, "w/o both": 0.06}


def write_scores(folder, *rows, name="scores_x.jsonl", **editor):
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        del row["method"]
        row["key"] = str(i)
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if editor:
        (folder / "editor.json").write_text(json.dumps(editor), "utf-8-sig")  # as Windows may


def test_folders_become_a_table(tmp_path, capsys):
    full = {category: [[50, 60, 70]] for category in CATEGORIES}
    write_scores(tmp_path / "vace", *scores("", "p", **full), params="14B", resolution="1280x720")
    write_scores(tmp_path / "vace", *scores("", "q", **full), name="scores_y.jsonl")
    write_scores(
        tmp_path / "our editor",
        *scores("", "p", **full, rubrics="ours"),
        *scores("", "p", local_add=[None]),
    )
    write_scores(tmp_path / "our editor", *scores("", "q", **full), name="scores_y.jsonl")
    folders = [str(tmp_path / "vace"), str(tmp_path / "our editor")]
    openve.main(["table", *folders])
    markdown = markdown_rows(capsys.readouterr().out)
    openve.main(["table", *folders, "--csv"])
    found = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert markdown == found
    assert found[0][:7] == [
        "Rubrics",
        "Judge",
        "Method",
        "#Params.",
        "#Reso.",
        "Overall",
        "Overall (all scores)",
    ]
    assert found[0][7:] == [
        *(
            f"{category} {axis}"
            for category in openve.CATEGORIES.values()
            for axis in ("IC", "CF", "VQ")
        ),
        "Scored",
        "Dropped",
    ]
    assert [(*line[:7], *line[-2:]) for line in found[1:]] == [
        ("ours", "p", "vace", "14B", "1280x720", "60.00", "60.00", "4", "0"),
        ("ours", "p", "our editor", "-", "-", "60.00", "60.00", "4", "1"),
        ("ours", "q", "vace", "14B", "1280x720", "60.00", "60.00", "4", "0"),
        ("ours", "q", "our editor", "-", "-", "60.00", "60.00", "4", "0"),
        ("ours", "average", "vace", "14B", "1280x720", "60.00", "60.00", "8", "0"),
        ("ours", "average", "our editor", "-", "-", "60.00", "60.00", "8", "1"),
    ]


def test_folders_that_make_no_table_are_named(tmp_path, capsys):
    write_scores(tmp_path / "a" / "x", *scores("", "p", local_add=[None]))
    write_scores(tmp_path / "b" / "x", *scores("", "p", local_add=[None]))
    write_scores(tmp_path / "empty")
    assert "same name" in fails(capsys, "table", tmp_path / "a" / "x", tmp_path / "b" / "x")
    assert "nowhere: no such folder" in fails(capsys, "table", tmp_path / "nowhere")
    assert "empty: no scores" in fails(capsys, "table", tmp_path / "empty")


def test_a_folder_that_is_not_judged_yet_leaves_the_table_of_the_others(tmp_path, capsys):
    write_scores(tmp_path / "x", *scores("", "p", local_add=[[1, 2, 3]]))
    write_scores(tmp_path / "empty")
    openve.main(["table", str(tmp_path / "x"), str(tmp_path / "empty")])
    out, err = capsys.readouterr()
    assert [row["Method"] for row in as_dicts(markdown_rows(out))] == ["x"]
    assert "empty: no scores" in err


# --- Judges at work -------------------------------------------------------------------------------


def make_bench(folder, number, prefix="videos/", frames=5):
    """Rows take the categories in turn; the fifth is one that the paper leaves out."""
    (folder / "videos").mkdir(parents=True)
    write_video(folder / "clip.mp4", make_clip(frames, 48, 64), fps=8)
    kinds = (*CATEGORIES, "background_change")
    with open(folder / "benchmark_videos.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(["edited_type", "prompt", "original_video"])
        for i in range(number):
            name = f"{i:04}_{kinds[i % 5]}_Do.mp4"
            shutil.copy(folder / "clip.mp4", folder / "videos" / name)
            table.writerow([kinds[i % 5], f'Do "{{it}}", clip {i}, ☃', f"{prefix}{name}"])
    return folder


def make_results(bench, folder, parents=False):
    folder.mkdir(parents=parents)
    for path in (bench / "videos").iterdir():
        shutil.copy(path, folder / f"{path.stem}_edited.mp4")
    return folder


def number_of(body):
    """The row of the benchmark that a judge was asked about, by its instruction."""
    return int(re.search(r'Do "{it}", clip (\d+), ☃', body["messages"][0]["content"])[1])


def judged(bench, *folders, url, model="Qwen/judge-1", options=()):
    command = ["judge", *folders, "--bench", bench, "--url", url, "--model", model, *options]
    openve.main([str(word) for word in command])


def test_what_a_judge_is_shown(tmp_path):
    bench, rubrics = make_bench(tmp_path / "bench", 5), tmp_path / "rubrics"
    results = make_results(bench, tmp_path / "ours")
    rubrics.mkdir()
    for category in CATEGORIES:
        (rubrics / f"{category}.txt").write_text(f"Grade {category}: {{edit_prompt}}. {{}}")
    with loopback(lambda body: form(85)) as (url, asked):
        judged(bench, results, url=url, options=["--rubrics", rubrics])
    assert len(asked) == 4
    for _, _, body in asked:
        system, user = body["messages"]
        i = number_of(body)
        assert system["content"] == f'Grade {CATEGORIES[i]}: Do "{{it}}", clip {i}, ☃. {{}}'
        kinds = [part["type"] for part in user["content"]]
        assert kinds == ["text", *["image_url"] * 5, "text", *["image_url"] * 5, "text"]
        before, after, closing = (
            part["text"] for part in user["content"] if part["type"] == "text"
        )
        assert (
            "Source" in before
            and "Edited" in after
            and closing.startswith("Compare these two videos based on")
        )
        frames = chat.image_parts(read_video(bench / "clip.mp4").frames, 5)
        assert user["content"][1:6] == user["content"][7:12] == frames
    (path,) = results.glob("*.jsonl")
    row = chat.results(path)["0001_local_remove_Do"]
    label = row.pop("rubrics")
    assert re.fullmatch("rubrics-[0-9a-f]{6}", label)
    clip = openve.fingerprint(bench / "clip.mp4")
    size = (bench / "clip.mp4").stat().st_size
    assert re.fullmatch(rf"{size}-[0-9a-f]{{16}}", clip)
    expected = {
        "category": "Local Remove",
        "judge": "Qwen/judge-1",
        "scores": [85, 70, 80],
        "answer": form(85),
        "finish_reason": None,
        "instruction": 'Do "{it}", clip 1, ☃',
        "source": clip,
        "edit": clip,
        "benchmark": 4,
    }
    assert row == expected and path.name == f"scores_Qwen%2Fjudge-1_{label}.jsonl"


def test_good_failing_and_lying_judges_are_counted(tmp_path, capsys):
    """Of 20 clips 4 are of a category that is not judged, and 1 gets no answer at all.

    10 are scored at once, 3 in the end, and 2 are dropped.
    """
    bench = make_bench(tmp_path / "bench", 20)
    results = make_results(bench, tmp_path / "vace")
    lie, tries, broken = f"{IC}: 900\n{CF}: 70\n{VQ}: 80", {}, {13}

    def reply(body):
        i = number_of(body)
        tries[i] = tries.get(i, 0) + 1
        if i in (2, 7):
            return [lie, "I like it!", form(70)][min(tries[i], 3) - 1]
        if i in (5, 8):
            return lie if tries[i] % 2 else form("")
        if i == 10:
            return [429, 500, CUT, 503, form(70)][min(tries[i], 5) - 1]
        return 500 if i in broken else form(70)

    with loopback(reply) as (url, _):
        error = fails(capsys, "judge", results, "--bench", bench, "--url", url, "--model", "m")
        assert error.startswith(
            "error: no scores for 1 edits, run the command again; the first: http://127.0.0.1"
        )
        path = next(results.glob("scores_*.jsonl"))
        assert tries == {
            i: {2: 3, 7: 3, 5: 3, 8: 3, 10: 5, 13: 6}.get(i, 1) for i in range(20) if i % 5 != 4
        }
        by_number = {int(key[:4]): row["scores"] for key, row in chat.results(path).items()}
        assert by_number == {
            i: None if i in (5, 8) else [70, 70, 80] for i in range(20) if i % 5 != 4 and i != 13
        }
        tries.clear(), broken.clear()
        judged(bench, results, url=url, model="m")
        assert tries == {13: 1}
    assert capsys.readouterr().out.splitlines()[-2] == f"{path}: 14 scored, 2 dropped, 0 failed"
    openve.main(["table", str(results), "--csv"])
    line = as_dicts(list(csv.reader(capsys.readouterr().out.splitlines())))[0]
    assert (line["Method"], line["Judge"], line["Scored"], line["Dropped"]) == (
        "vace",
        "m",
        "14",
        "2",
    )
    assert line["Rubrics"].startswith("ours-") and line["Overall"] == "73.33"


def test_after_a_kill_nothing_is_judged_twice(tmp_path):
    """SIGKILL while half of the answers are there and the others are held back."""
    bench = make_bench(tmp_path / "bench", 30)
    results, hold = make_results(bench, tmp_path / "ours"), [True]
    asked, asked_again, count = [], [], itertools.count()

    def reply(body):
        asked.append(number_of(body))
        late = next(count) >= 12
        while hold[0] and late:
            time.sleep(0.01)
        return form(85)

    with loopback(reply) as (url, _):
        command = ["judge", results, "--bench", bench, "--url", url, "--model", "m"]
        process = subprocess.Popen(
            [sys.executable, ROOT / "experiments" / "openve.py", *command],
            stderr=subprocess.DEVNULL,
        )
        while len(asked) <= 12 or sum(len(lines(path)) for path in results.glob("*.jsonl")) < 8:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        hold[0] = False
    path = next(results.glob("*.jsonl"))
    finished = {int(row["key"][:4]) for row in lines(path)}
    with open(path, "ab") as file:  # as a kill in the middle of a write would leave it
        file.write(b'{"key": "0001_local_re')

    def reply_again(body):
        asked_again.append(number_of(body))
        return form(85)

    # A server of its own: the first one may still be reading what the killed process asked.
    with loopback(reply_again) as (url, _):
        judged(bench, results, url=url, model="m")
    everything = {i for i in range(30) if i % 5 != 4}
    assert 0 < len(finished) < len(everything)
    assert sorted(asked_again) == sorted(everything - finished)
    assert sorted(int(row["key"][:4]) for row in lines(path)) == sorted(everything)


def test_a_clip_that_was_replaced_is_judged_again(tmp_path):
    """So is one with another source or instruction; one that was deleted keeps its scores."""
    bench = make_bench(tmp_path / "bench", 9)
    results = make_results(bench, tmp_path / "ours")
    other = tmp_path / "other.mp4"
    write_video(other, make_clip(5, 48, 64, seed=1), fps=8)
    with loopback(lambda body: form(85 - number_of(body))) as (url, asked):
        judged(bench, results, url=url)
        before = chat.results(next(results.glob("*.jsonl")))
        judged(bench, results, url=url)
        assert len(asked) == len(before) == 8
        shutil.copy(other, results / "0001_local_remove_Do_edited.mp4")
        shutil.copy(other, bench / "videos" / "0002_local_add_Do.mp4")
        (results / "0003_global_style_Do_edited.mp4").unlink()
        table = bench / "benchmark_videos.csv"
        table.write_text(
            table.read_text("utf-8-sig").replace("clip 5, ☃", "clip 5, ☃ now"), "utf-8"
        )
        asked.clear()
        judged(bench, results, url=url)
        assert sorted(number_of(body) for _, _, body in asked) == [1, 2, 5]
        after = chat.results(next(results.glob("*.jsonl")))
        judged(bench, results, url=url)
        assert len(asked) == 3
    assert after.keys() == before.keys()
    changed = sorted(int(key[:4]) for key in before if before[key] != after[key])
    assert changed == [1, 2, 5]


def test_a_run_without_any_scores_fails_and_again_asks_what_was_dropped(tmp_path, capsys):
    bench = make_bench(tmp_path / "bench", 3)
    results = make_results(bench, tmp_path / "ours")
    command = ["judge", results, "--bench", bench, "--model", "m", "--url"]
    with loopback(lambda body: "I like them all.") as (url, asked):
        error = fails(capsys, *command, url)
    assert "no scores could be read from any answer" in error and len(asked) == 3 * 3
    with loopback(lambda body: form(85)) as (url, asked):
        fails(capsys, *command, url)
        assert not asked
        openve.main([str(word) for word in (*command, url, "--again")])
        assert len(asked) == 3
        openve.main([str(word) for word in (*command, url, "--again")])
        assert len(asked) == 3
    rows = chat.results(next(results.glob("*.jsonl")))
    assert [row["scores"] for row in rows.values()] == [[85, 70, 80]] * 3


def test_an_answer_that_was_cut_off_gives_no_scores(tmp_path):
    """All three lines are there, but its last number may have been 80."""
    bench = make_bench(tmp_path / "bench", 1)
    results = make_results(bench, tmp_path / "ours")
    replies = [reply_of(form(85, 70, 8), finish_reason="length")] * 2 + [form(85)]
    with loopback(in_turn(*replies)) as (url, _):
        judged(bench, results, url=url)
    (row,) = chat.results(next(results.glob("*.jsonl"))).values()
    assert row["scores"] == [85, 70, 80]


def test_why_a_last_answer_ended_is_kept_beside_it(tmp_path, capsys):
    """Thoughts of a model may use up the tokens that its server grants to an answer."""
    bench = make_bench(tmp_path / "bench", 1)
    results = make_results(bench, tmp_path / "ours")
    reply = reply_of(None, finish_reason="length")
    with loopback(lambda body: reply) as (url, _):
        fails(capsys, "judge", results, "--bench", bench, "--model", "m", "--url", url)
    (row,) = chat.results(next(results.glob("*.jsonl"))).values()
    assert (row["answer"], row["scores"], row["finish_reason"]) == ("", None, "length")


def test_only_the_rows_of_a_judge_that_lacks_clips_are_marked():
    """And the average that they are part of."""
    one = {category: [[50, 60, 70]] for category in CATEGORIES}
    rows = scores("a", "p", **one) + scores("a", "q", local_add=[[1, 1, 1]])
    rows += scores("b", "p", **one) + scores("b", "q", **one) + scores("a", "p", "paper", **one)
    table = as_dicts(openve.make_table([row | {"benchmark": 4} for row in rows], layout=2))
    assert [(row["Rubrics"], row["Judge"], row["Variant"]) for row in table] == [
        ("ours", "p", "a"),
        ("ours", "p", "b"),
        ("ours", "q", "a (lacks 3 of 4 clips)"),
        ("ours", "q", "b"),
        ("ours", "average", "a (lacks 3 of 4 clips)"),
        ("ours", "average", "b"),
        ("paper", "p", "a"),
    ]


def test_an_average_lacks_what_one_of_its_judges_lacks_most():
    rows = scores("a", "p", local_add=[[50, 60, 70]] * 11) + scores("a", "q", local_add=[[1, 1, 1]])
    table = as_dicts(openve.make_table([row | {"benchmark": 20} for row in rows], layout=2))
    marks = {row["Judge"]: row["Variant"] for row in table}
    assert marks["p"] == "a (lacks 9 of 20 clips)"
    assert marks["q"] == marks["average"] == "a (lacks 19 of 20 clips)"


def test_a_method_that_lacks_clips_is_marked_in_the_table(tmp_path, capsys):
    bench = make_bench(tmp_path / "bench", 10)
    whole = make_results(bench, tmp_path / "whole")
    part = make_results(bench, tmp_path / "part")
    (part / "0002_local_add_Do_edited.mp4").unlink()
    (part / "0007_local_add_Do_edited.mp4").unlink()
    command = ["judge", whole, part, "--bench", bench, "--model", "m", "--url"]
    with loopback(lambda body: form(85)) as (url, _):
        assert "no scores for 2 edits" in fails(capsys, *command, url)
    openve.main(["table", str(whole), str(part)])
    methods = [row["Method"] for row in as_dicts(markdown_rows(capsys.readouterr().out))]
    assert methods == ["whole", "part (lacks 2 of 8 clips)"]


def test_scores_by_our_rubrics_are_said_to_be_no_scores_of_table_1(tmp_path, capsys):
    """With the command that extracts the paper's; scores by these are not commented."""
    bench = make_bench(tmp_path / "bench", 1)
    results = make_results(bench, tmp_path / "ours")
    paper = tmp_path / "paper"
    paper.mkdir()
    for category in CATEGORIES:
        (paper / f"{category}.txt").write_text("{edit_prompt}")
    with loopback(lambda body: form(85)) as (url, _):
        judged(bench, results, url=url)
        note = capsys.readouterr().out.splitlines()[-1]
        judged(bench, results, url=url, options=["--rubrics", paper])
    assert "not comparable with Table 1" in note
    assert "python -m experiments.openve rubrics PAPER.txt --out paper" in note
    assert "Table 1" not in capsys.readouterr().out


def test_the_key_is_nowhere_in_what_is_printed_and_written(tmp_path, capsys, monkeypatch):
    """Though judge and server repeat it in answers and errors."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret/42")
    bench = make_bench(tmp_path / "bench", 4)
    results = make_results(bench, tmp_path / "ours")
    said = b'{"error": {"message": "sk-secret/42 may not ask this"}}'
    replies = {0: form("85 for sk-secret/42"), 1: "sk-secret/42", 2: (400, {}, said), 3: form(85)}
    with loopback(lambda body: replies[number_of(body)]) as (url, asked):
        error = fails(capsys, "judge", results, "--bench", bench, "--url", url, "--model", "m")
    assert all(headers["Authorization"] == "Bearer sk-secret/42" for _, headers, _ in asked)
    path = next(results.glob("*.jsonl"))
    assert "may not ask this" in error and "85 for [key]" in path.read_text()
    assert "secret" not in error + capsys.readouterr().out + path.read_text()


def test_portrait_clips_are_judged_as_they_are(tmp_path):
    bench = make_bench(tmp_path / "bench", 1)
    write_video(bench / "videos" / "0000_local_change_Do.mp4", make_clip(3, 96, 48), fps=8)
    results = make_results(bench, tmp_path / "ours")
    with loopback(lambda body: form(85)) as (url, asked):
        judged(bench, results, url=url)
    parts = [part for part in asked[0][2]["messages"][1]["content"] if part["type"] != "text"]
    assert [opened(part).size for part in parts] == [(48, 96)] * 6


@pytest.mark.parametrize(
    "there", ["bench/a/x.mp4", "a/x.mp4", "bench/videos/a/x.mp4", "bench/videos/x.mp4"]
)
def test_sources_are_found_wherever_their_paths_start(there, tmp_path):
    (tmp_path / there).parent.mkdir(parents=True)
    (tmp_path / "bench").mkdir(exist_ok=True)
    (tmp_path / there).touch()
    table = tmp_path / "bench" / "benchmark_videos.csv"
    table.write_text("edited_type,prompt,original_video\nlocal_add,Add,a/x.mp4\n")
    assert (
        openve.read_table(table, tmp_path / "bench", ["local_add"])["x"]["source"]
        == tmp_path / there
    )


def test_other_rubrics_are_other_scores(tmp_path):
    bench, rubrics = make_bench(tmp_path / "bench", 2), tmp_path / "mine"
    results = make_results(bench, tmp_path / "ours")
    shutil.copytree(ROOT / "experiments" / "rubrics", rubrics)
    with loopback(lambda body: form(85)) as (url, asked):
        for number in (2, 4, 6, 6):
            judged(bench, results, url=url, options=[] if number == 2 else ["--rubrics", rubrics])
            assert len(asked) == number
            if number == 4:
                (rubrics / "local_add.txt").write_text("{edit_prompt}")
    names = sorted(path.name for path in results.glob("*.jsonl"))
    kinds = [name.rpartition("-")[0].rpartition("_")[2] for name in names]
    assert kinds == ["mine", "mine", "ours"]


def test_judges_with_similar_names_have_files_of_their_own(tmp_path, capsys):
    bench = make_bench(tmp_path / "bench", 2)
    results = make_results(bench, tmp_path / "ours")
    with loopback(lambda body: form(85)) as (url, asked):
        for model in ("org/x", "org-x", "org x", "org/x", "org-x"):
            judged(bench, results, url=url, model=model)
    assert len(asked) == 3 * 2
    openve.main(["table", str(results), "--csv"])
    table = as_dicts(list(csv.reader(capsys.readouterr().out.splitlines()[-5:])))
    assert [(row["Judge"], row["Scored"]) for row in table] == [
        ("org x", "2"),
        ("org-x", "2"),
        ("org/x", "2"),
        ("average", "6"),
    ]


def test_a_folder_of_folders_of_results_is_not_judged_as_one(tmp_path, capsys):
    bench = make_bench(tmp_path / "bench", 1)
    results = make_results(bench, tmp_path / "all" / "ours", parents=True)
    (results / "editor.json").write_text("{}")
    command = ["--bench", bench, "--url", "http://127.0.0.1:1/v1", "--model", "m"]
    error = fails(capsys, "judge", tmp_path / "all", *command)
    assert "all/ours holds results of its own: name" in error and error.strip().endswith("instead")


def test_a_copy_of_a_file_of_scores_counts_once(tmp_path):
    write_scores(tmp_path / "x", *scores("", "p", local_add=[[1, 2, 3], [4, 5, 6]]))
    (path,) = (tmp_path / "x").glob("*.jsonl")
    shutil.copy(path, path.with_name("scores_copy.jsonl"))
    assert [row["scores"] for row in openve.read_scores(tmp_path / "x")] == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("table", ["ours/{}", "{}", "/gone/ours/{}", "{folder}/ours/{}"])
def test_a_renamed_folder_is_judged_on_its_own_clips(table, tmp_path, monkeypatch):
    """Though its table names clips of a folder that is another editor's by now."""
    monkeypatch.chdir(tmp_path)
    bench = make_bench(tmp_path / "bench", 1)
    renamed = make_results(bench, tmp_path / "renamed")
    others = make_results(bench, tmp_path / "ours")
    name = "0000_local_change_Do_edited.mp4"
    write_video(others / name, make_clip(5, 48, 64, seed=1), fps=8)
    edit = table.format(name, folder=tmp_path)
    (renamed / "results.csv").write_text(
        "edited_type,prompt,original_video,edited_result_path\n"
        f"local_change,Do,0000_local_change_Do.mp4,{edit}\n"
    )
    rows, _ = openve.edits_to_judge(renamed, bench)
    assert rows["0000_local_change_Do"]["edit"].resolve() == renamed / name


def test_a_type_may_be_written_in_another_way_but_not_be_unknown(tmp_path):
    table = tmp_path / "benchmark_videos.csv"
    head = "edited_type,prompt,original_video\n"
    table.write_text(f"{head} Local_Add ,Add,a.mp4\nlocal add,Add,b.mp4\nGlobal Style,Do,c.mp4\n")
    rows = openve.read_table(table, tmp_path, [*CATEGORIES])
    kinds = {key: row["edited_type"] for key, row in rows.items()}
    assert kinds == {"a": "local_add", "b": "local_add", "c": "global_style"}
    table.write_text(f"{head}local_add,Add,a.mp4\nlocal_ad,Add,b.mp4\n")
    with pytest.raises(
        ValueError, match="benchmark_videos.csv: the edited_type 'local_ad' is none"
    ):
        openve.read_table(table, tmp_path, [*CATEGORIES])


def test_files_among_the_folders_are_left_out(tmp_path, capsys):
    bench = make_bench(tmp_path / "bench", 2)
    results = make_results(bench, tmp_path / "ours")
    (tmp_path / "a.md").touch()
    with loopback(lambda body: form(85)) as (url, asked):
        judged(bench, tmp_path / "a.md", results, url=url)
        assert len(asked) == 2
        command = ["judge", tmp_path / "a.md", "--bench", bench, "--url", url, "--model", "m"]
        assert "a.md is no folder of results" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            openve.main([str(word) for word in command])
    assert "error: " in capsys.readouterr().err
    openve.main(["table", str(tmp_path / "a.md"), str(results)])
    assert "a.md is no folder of results" in capsys.readouterr().err


def test_results_of_other_editors_are_found(tmp_path, monkeypatch):
    """Paths of their table start in its folder, in this one, or are gone; it may lack rows."""
    bench = make_bench(tmp_path / "bench", 5, prefix="bench/videos/")
    results = tmp_path / "icve"
    (results / "clips").mkdir(parents=True)
    for path in ("clips/a.mp4", "c.mp4", "0003_global_style_Do_edited.mp4"):
        shutil.copy(bench / "clip.mp4", results / path)
    shutil.copy(bench / "clip.mp4", tmp_path / "b.mp4")
    edits = {
        "local_change": "clips/a.mp4",
        "local_remove": "b.mp4",
        "local_add": "/gone/long/ago/c.mp4",
    }
    monkeypatch.chdir(tmp_path)
    with open(results / "results.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["edited_type", "prompt", "original_video", "edited_result_path"])
        for i, (kind, edit) in enumerate(edits.items()):
            table.writerow([kind, "Do it", f"{i:04}_{kind}_Do.mp4", edit])
    with loopback(lambda body: form(85)) as (url, asked):
        judged(bench, results, url=url)
    rows = chat.results(next(results.glob("*.jsonl")))
    assert {key[:4]: row["scores"] for key, row in rows.items()} == {
        f"000{i}": [85, 70, 80] for i in range(3)
    }
    # An editor's table may have prompts of its own: it is judged by those of the benchmark.
    assert sorted(number_of(body) for _, _, body in asked) == [0, 1, 2]


def test_a_table_of_other_clips_is_named(tmp_path, capsys):
    bench = make_bench(tmp_path / "bench", 1)
    results = make_results(bench, tmp_path / "icve")
    (results / "results.csv").write_text(
        "edited_type,prompt,original_video\nlocal_change,Do,another.mp4\n"
    )
    command = ["judge", results, "--bench", bench, "--url", "http://127.0.0.1:1/v1", "--model", "m"]
    assert "results.csv: none of its clips is in" in fails(capsys, *command)


FOLDERS = {  # where the edits of the clips 0000 and 0001 lie, and what else is there
    "as ours": "{0}_edited.mp4 {1}_edited.mp4",
    "upper case and other formats": "{0}_edited.MP4 {1}_edited.webm",
    "folders of their own": "local_change/{0}_edited.mp4 local_remove/x/{1}_edited.mov",
    "called like the sources": "clips/{0}.mp4 clips/{1}.MOV",
    "other files": "{0}_edited.mp4 {1}_edited.mp4 .DS_Store ._{0}_edited.mp4 {0}_edited.json",
    "sources beside them": "{0}_edited.mp4 {1}_edited.mp4 {0}.mp4 {1}.mp4 {1}_edited_compare.mp4",
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_the_edits_of_a_folder_without_a_table_are_found(layout, tmp_path):
    bench, results = make_bench(tmp_path / "bench", 2), tmp_path / "icve"
    names = ("0000_local_change_Do", "0001_local_remove_Do")
    paths = [results / name for name in FOLDERS[layout].format(*names).split()]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (results / "0000_local_change_Do_edited.avi").symlink_to("gone")
    rows, _ = openve.edits_to_judge(results, bench)
    assert [rows[name]["edit"] for name in names] == paths[:2]


def test_a_source_among_the_edits_is_not_judged_as_the_edit_that_lacks(tmp_path):
    bench, results = make_bench(tmp_path / "bench", 2), tmp_path / "icve"
    results.mkdir()
    for name in ("0000_local_change_Do_edited", "0000_local_change_Do", "0001_local_remove_Do"):
        (results / f"{name}.mp4").touch()
    rows, _ = openve.edits_to_judge(results, bench)
    missing = results / "0001_local_remove_Do_edited.mp4"
    assert rows["0001_local_remove_Do"]["edit"] == missing and not missing.exists()


def test_of_two_clips_of_the_same_name_none_is_taken_unless_the_table_says_which(tmp_path):
    bench, results = make_bench(tmp_path / "bench", 1), tmp_path / "icve"
    for version in ("v1", "v2"):
        (results / version).mkdir(parents=True)
        (results / version / "0000_local_change_Do.mp4").touch()
    with pytest.raises(ValueError, match="v1.*v2.*have the same name"):
        openve.edits_to_judge(results, bench)
    (results / "results.csv").write_text(
        "edited_type,prompt,original_video,edited_result_path\n"
        "local_change,Do,0000_local_change_Do.mp4,v2/0000_local_change_Do.mp4\n"
    )
    rows, _ = openve.edits_to_judge(results, bench)
    assert rows["0000_local_change_Do"]["edit"].parent.name == "v2"


def test_the_benchmarks_own_name_for_the_table_is_known(tmp_path):
    """Its instructions ask for new_result.csv with paths of edits anywhere."""
    bench = make_bench(tmp_path / "bench", 4)
    results = tmp_path / "icve"
    (results / "out").mkdir(parents=True)
    shutil.copy(bench / "clip.mp4", results / "out" / "x.mp4")
    (results / "new_result.csv").write_text(
        "edited_type,prompt,original_video,edited_result_path\n"
        "local_add,Add it,videos/0002_local_add_Do.mp4,out/x.mp4\n"
    )
    with loopback(lambda body: form(85)) as (url, asked):
        judged(bench, results, url=url)
    (key,) = chat.results(next(results.glob("*.jsonl")))
    assert key == "0002_local_add_Do" and len(asked) == 1


def test_edits_that_lack_are_named_and_the_others_judged(tmp_path, capsys):
    bench = make_bench(tmp_path / "bench", 4)
    results = make_results(bench, tmp_path / "ours")
    (results / "0002_local_add_Do_edited.mp4").unlink()
    (results / "0003_global_style_Do_edited.mp4").write_bytes(b"no video")
    with loopback(lambda body: form(85)) as (url, asked):
        error = fails(capsys, "judge", results, "--bench", bench, "--url", url, "--model", "m")
    assert "no scores for 2 edits" in error and "000" in error and len(asked) == 2


@pytest.mark.parametrize(
    "status, message", [(401, "401.*OPENAI_API_KEY"), (404, "404.*model"), (None, "failed")]
)
def test_a_server_that_refuses_stops_the_run_with_one_line(status, message, tmp_path, capsys):
    bench = make_bench(tmp_path / "bench", 10)
    results = make_results(bench, tmp_path / "ours")
    command = ["judge", results, "--bench", bench, "--model", "m", "--workers", 1, "--url"]
    with loopback(lambda body: status) as (url, asked):
        error = fails(capsys, *command, url) if status else ""
    error = error or fails(capsys, *command, url)  # the server has gone
    assert re.search(message, error) and url in error and len(asked) < 8


def test_tables_that_are_none_are_named(tmp_path, capsys):
    bench = make_bench(tmp_path / "bench", 2)
    table = bench / "benchmark_videos.csv"
    options = [
        "judge",
        tmp_path,
        "--url",
        "http://127.0.0.1:1/v1",
        "--model",
        "m",
        "--bench",
        bench,
    ]
    (tmp_path / "empty").mkdir()
    assert "no {edit_prompt}" not in fails(capsys, *options, "--rubrics", tmp_path / "empty")
    for name in CATEGORIES:
        (tmp_path / "empty" / f"{name}.txt").write_text("Grade it.")
    assert "local_change.txt: no {edit_prompt}" in fails(
        capsys, *options, "--rubrics", tmp_path / "empty"
    )
    table.write_text("edited_type,prompt,video\nlocal_add,Add,a.mp4\n")
    assert "line 2: no original_video in columns edited_type, prompt, video" in fails(
        capsys, *options
    )
    table.write_text(
        "edited_type,prompt,original_video\nlocal_add,Add,a/x.mp4\nlocal_add,Add,b/x.mp4\n"
    )
    assert "benchmark_videos.csv: b/x.mp4 is there twice" in fails(capsys, *options)
    table.write_text("edited_type,prompt,original_video\nbackground_change,Change,a.mp4\n")
    assert "no row has one of the edited_types local_change, local_remove" in fails(
        capsys, *options
    )
    table.unlink()
    assert "benchmark_videos.csv" in fails(capsys, *options)


# --- Edits of the benchmark -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    rvedit.save(folder, *tiny_model())
    return folder


def edited(bench, out, checkpoint, *options):
    command = [
        "run",
        "--bench",
        bench,
        "--out",
        out,
        "--checkpoint",
        checkpoint,
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    openve.main([str(word) for word in (*command, *options)])


def test_edits_are_those_of_sample(checkpoint, tmp_path, monkeypatch):
    bench, out = make_bench(tmp_path / "bench", 5), tmp_path / "ours"
    edited(bench, out, checkpoint, "--seed", "3")
    names = [f"{i:04}_{kind}_Do_edited.mp4" for i, kind in enumerate(CATEGORIES)]
    assert sorted(path.name for path in out.iterdir()) == [*names, "editor.json", "results.csv"]
    for i, name in list(enumerate(names))[::3]:
        source, prompt = bench / "videos" / name.replace("_edited", ""), f'Do "{{it}}", clip {i}, ☃'
        command = [
            "--video",
            source,
            "--prompt",
            prompt,
            "--out",
            tmp_path / "one.mp4",
            "--seed",
            "3",
            "--steps",
            "2",
        ]
        sample.main(
            [str(word) for word in (*command, "--checkpoint", checkpoint, "--device", "cpu")]
        )
        assert (out / name).read_bytes() == (tmp_path / "one.mp4").read_bytes()
    with open(out / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["edited_result_path"] for row in rows] == names
    assert list(rows[0]) == ["edited_type", "prompt", "original_video", "edited_result_path"]
    assert rows[2]["prompt"] == 'Do "{it}", clip 2, ☃' and rows[2]["edited_type"] == "local_add"
    editor = json.loads((out / "editor.json").read_text())
    assert (editor["resolution"], editor["seed"], editor["steps"]) == ("96x32", "3", "2")
    with loopback(lambda body: form(85)) as (url, asked):
        judged(bench, out, url=url)
    assert len(asked) == 4


def test_what_is_edited_is_not_edited_again(checkpoint, tmp_path, capsys, monkeypatch):
    bench, out = make_bench(tmp_path / "bench", 5), tmp_path / "ours"
    edited(bench, out, checkpoint, "--categories", "local_add", "--dtype", "float32")
    first = out / "0002_local_add_Do_edited.mp4"
    before = first.stat().st_mtime_ns
    edited(bench, out, checkpoint, "--categories", *CATEGORIES, "background_change")
    assert first.stat().st_mtime_ns == before and len([*out.glob("*.mp4")]) == 5
    command = ["run", "--bench", bench, "--out", out, "--checkpoint", checkpoint, "--device", "cpu"]
    error = fails(capsys, *command, "--steps", "3")
    assert "editor.json: the clips there are from another editor, which differs in steps;" in error
    monkeypatch.setattr(sample.Inference, "edit_latents", None)  # nothing is left to do
    edited(bench, out, checkpoint)


def test_weights_that_were_trained_on_are_another_editor(checkpoint, tmp_path, capsys):
    """Though their folder is called as before; the same ones in another folder are not."""
    bench, out, folder = make_bench(tmp_path / "bench", 1), tmp_path / "ours", tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    edited(bench, out, folder)
    edited(bench, out, checkpoint)
    model, vae = rvedit.load(folder)
    for weight in model.dit.parameters():
        weight.data += 1e-3
    rvedit.save(folder, model, vae)
    command = ["run", "--bench", bench, "--out", out, "--device", "cpu", "--steps", "2"]
    assert "differs in weights" in fails(capsys, *command, "--checkpoint", folder)


def test_the_table_of_results_grows_with_the_categories(checkpoint, tmp_path):
    bench, out = make_bench(tmp_path / "bench", 5), tmp_path / "ours"
    edited(bench, out, checkpoint, "--categories", "local_add", "background_change")
    edited(bench, out, checkpoint, "--categories", "local_change")
    edited(bench, out, checkpoint, "--categories", "local_add")
    with open(out / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = [row["edited_type"] for row in rows]
    assert kinds == ["local_change", "local_add", "background_change"]
    assert [row["prompt"] for row in rows] == [f'Do "{{it}}", clip {i}, ☃' for i in (0, 2, 4)]
    paths = [Path(row["edited_result_path"]) for row in rows]
    assert [path.name[:4] for path in paths] == ["0000", "0002", "0004"]
    assert all((out / path).exists() for path in paths)


def test_each_process_takes_its_share(checkpoint, tmp_path, monkeypatch):
    """One that has failed at a clip waits for the others, which torchrun then ends."""
    bench, out, seen = make_bench(tmp_path / "bench", 10), tmp_path / "ours", []
    (bench / "videos" / "0005_local_change_Do.mp4").write_bytes(b"no video")
    waiting = []
    monkeypatch.setattr(openve, "wait_for_others", lambda: waiting.append(cli.RANK))
    for rank in range(3):
        monkeypatch.setattr(cli, "RANK", rank)
        monkeypatch.setattr(cli, "RANKS", 3)
        with pytest.raises(SystemExit) if rank == 1 else contextlib.nullcontext():
            edited(bench, out, checkpoint)
        seen.append({int(path.name[:4]) for path in out.glob("*.mp4")} - set().union(*seen))
    assert seen == [{0, 3, 7}, {1, 8}, {2, 6}] and waiting == [0, 1, 2]


def test_a_full_disk_ends_the_run_at_the_first_clip(checkpoint, tmp_path, capsys, monkeypatch):
    bench, tries = make_bench(tmp_path / "bench", 4), []

    def write(path, *_, **__):
        tries.append(path)
        raise OSError(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr(openve.video, "write_video", write)
    options = ["--checkpoint", checkpoint, "--steps", "2", "--device", "cpu"]
    error = fails(capsys, "run", "--bench", bench, "--out", tmp_path / "ours", *options)
    assert "0000_local_change_Do_edited.mp4 cannot be written: No space left" in error
    assert len(tries) == 1


def test_clips_that_cannot_be_edited_do_not_stop_the_others(checkpoint, tmp_path, capsys):
    bench, out = make_bench(tmp_path / "bench", 4), tmp_path / "ours"
    (bench / "videos" / "0001_local_remove_Do.mp4").write_bytes(b"no video")
    options = ["--checkpoint", checkpoint, "--steps", "2", "--device", "cpu"]
    error = fails(capsys, "run", "--bench", bench, "--out", out, *options)
    assert (
        "1 of 4 clips could not be edited, the first: " in error
        and "0001_local_remove_Do.mp4" in error
    )
    assert sorted(path.name[:4] for path in out.glob("*.mp4")) == ["0000", "0002", "0003"]
    assert not [*out.glob(".*")] and not [*out.glob("*.partial")]


@pytest.mark.parametrize(
    "command, message",
    [
        (
            ["run", "--bench", "b", "--out", "o", "--stepz", "3"],
            "unrecognized arguments: --stepz 3",
        ),
        (
            ["run", "--bench", "b", "--out", "o", "--categories", "local_ad"],
            "--categories: invalid choice: 'local_ad'",
        ),
        (["run", "--bench", "b", "--out", "o", "--compare"], "--compare: `run` writes only edits"),
        (["run", "--bench", "b", "--out", "o", "--resume"], "--resume: `run` always goes on"),
        (["run", "--bench", "b", "--out", "o", "--video=x"], "--video: `run` takes its clips from"),
        (["run", "--bench", "b", "--out", "o", "--prompt", "x"], "--prompt: `run` takes its"),
        (
            ["table", "x", "--stepz", "3"],
            "--stepz 3: only `run` takes options of sample.py",
        ),
        (["table"], "required: results"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_options_are_named(command, message, capsys):
    assert message in fails(capsys, *command)
