"""OpenVE-Bench: edit its clips, ask judges for scores, print tables (§5, App. D.3, Tables 1-3).

    python -m experiments.openve run --bench OpenVE-Bench --out results/ours \\
        --checkpoint kiwi-edit-5b
    python -m experiments.openve judge results/* --bench OpenVE-Bench \\
        --url http://localhost:8000/v1 --model Qwen3.5-VL-35B
    python -m experiments.openve table results/*
    python -m experiments.openve rubrics rvedit.txt --out paper    # for `judge --rubrics paper`

`run` takes the options of sample.py as well; `torchrun --nproc_per_node 8 -m experiments.openve run
...` shares the clips among 8 GPUs.

OpenVE-Bench is a folder with `benchmark_videos.csv` (columns edited_type, prompt, original_video)
and `videos/`. A folder of results holds the clips of one editor, ours or another, in folders of its
own if need be. Its `results.csv`, or `new_result.csv` as the benchmark calls it, names them in the
column edited_result_path; edits are judged by the benchmark's prompts, whatever that table says.
Without it, the edit of NAME.mp4 is NAME_edited, in any format of VIDEOS, or, in a folder without
such names, NAME. The name of the folder is the name of the method in the tables. An `editor.json`
in it, such as {"params": "14B", "resolution": "832x480"}, fills the columns of Table 1 with these
names. `judge` writes its scores into the same folder, and beside them what was judged: a clip that
changes later is judged again. A judge is shown 10 frames. Its server must take as many images, and
8,192 tokens: Ollama's default of 4,096 cuts what is longer without a word.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import re
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli

if __name__ == "__main__":
    cli.begin()

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import data
import sample
import video
import weights
from experiments import chat
from experiments.answers import AXES, parse_scores
from rvedit import RVEDiT
from shapes import CATEGORIES as NAMES
from vae import WanVAE

# "local_change": "Local Change" and so on: the benchmark's spelling and the paper's.
CATEGORIES = {name.lower().replace(" ", "_"): name for name in NAMES}
# Categories of the benchmark that the paper leaves out.
OTHERS = ("background_change", "subtitle_edit", "camera_edit", "creative_edit")
COLUMNS = ("edited_type", "prompt", "original_video")
RESULT = "edited_result_path"
VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif")  # how names of edits may end

NOT_FOR_RUN = {  # options of sample.py that would do nothing here
    "--video": "`run` takes its clips from the benchmark",
    "--prompt": "`run` takes its instructions from the benchmark",
    "--compare": "`run` writes only edits, judges see them beside their sources",
    "--resume": "`run` always goes on with the clips that it lacks",
}

RUBRICS = Path(__file__).parent / "rubrics"
PLACEHOLDER = "{edit_prompt}"
FRAMES = 5  # frames of each clip that a judge sees (App. D.3)
TRIES = 3  # answers that a judge may give until its scores can be read (App. D.3)
TASK = (
    "Compare these two videos based on the sampled frames and provide the requested scores "
    "in the specified format."
)

# --- The benchmark, and an editor's clips for it --------------------------------------------------


def locate(path: str, *folders: Path) -> Path:
    """Find the file that a table names: `path` in one of the folders, or else its last part alone.

    If there is no such file, returns where it was expected first.
    """
    # Tables keep the paths of the machine on which they were made, so the last part counts as well.
    places = [folder / path for folder in folders]
    places += [folder / Path(path).name for folder in folders]
    for place in places:
        if place.is_file():
            return place
    return places[0]


def read_table(path: Path, bench: Path, categories: list[str]) -> dict[str, dict]:
    """Read the rows of the benchmark, or of a folder of results, in some categories.

    Returns them by the name of the source clip without its ending; `source` is added to each.
    """
    # `triplets` checks that these three columns hold texts. The rows keep all their columns.
    rows: dict[str, dict] = {}
    for row in data.triplets(path, "edited_type", "original_video", "prompt"):
        kind = re.sub(r"[\s_-]+", "_", row["edited_type"].strip().lower())
        if kind not in (*CATEGORIES, *OTHERS):
            raise ValueError(
                f"{path}: the edited_type {row['edited_type']!r} is none of "
                f"{', '.join((*CATEGORIES, *OTHERS))}"
            )
        row["edited_type"] = kind
        name = Path(row["original_video"]).stem
        if name in rows:
            raise ValueError(f"{path}: {row['original_video']} is there twice")
        row["source"] = locate(row["original_video"], bench, bench.parent, bench / "videos")
        rows[name] = row
    chosen = {name: row for name, row in rows.items() if row["edited_type"] in categories}
    if not chosen:
        raise ValueError(f"{path}: no row has one of the edited_types {', '.join(categories)}")
    return chosen


def write_results(path: Path, rows: dict[str, dict], edits: dict[str, Path]) -> None:
    """Write which clip is the edit of which row; rows that the table has already stay in it."""
    # Without folders, as this one may be renamed, and another editor's be called like it then.
    merged = {key: row | {RESULT: edits[key].name} for key, row in rows.items()}
    if path.exists():  # of an earlier run, perhaps with other --categories
        merged = read_table(path, path.parent, [*CATEGORIES, *OTHERS]) | merged
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*COLUMNS, RESULT])
    for key in sorted(merged):
        writer.writerow([merged[key].get(name, "") for name in (*COLUMNS, RESULT)])
    cli.write_text(path, file.getvalue())


def read_editor(folder: Path) -> dict:
    """Read what a folder of results says about its editor; {} if it says nothing."""
    path = folder / "editor.json"
    try:
        editor = json.loads(path.read_text("utf-8-sig")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(editor, dict):
        raise ValueError(f'{path}: expected an object such as {{"params": "14B"}}')
    return editor


def describe_editor(settings: Namespace, model: RVEDiT, vae: WanVAE) -> dict[str, str]:
    """What `editor.json` keeps of our own edits: what they depend on, and columns of Table 1."""
    config = model.config
    names = ("keep_source", "steps", "shift", "seed", "dtype", "decode_dtype")
    editor = {name: str(getattr(settings, name)) for name in names}
    for name in ("routing_depth", "max_pixels", "max_frames"):
        editor[name] = str(getattr(config, name))
    # Not the checkpoint's path, at which others may lie by now, or the same at another.
    editor["weights"] = weights.digest_of(model, vae)
    height, width = sample.size_for(config, 720, 1280)
    parameters = sum(p.numel() for p in model.dit.parameters())
    editor["resolution"] = f"{width}x{height}"
    editor["params"] = f"{parameters / 1e9:.2g}B"
    return editor


def edit_clip(
    inference: sample.Inference,
    settings: Namespace,
    source: video.Video,
    prompt: str,
    out: Path,
) -> None:
    """Edit a clip as `sample.py` does with these options."""
    video.prepare_edit(source, out)
    clip = sample.clip_of(source)
    sampling = (settings.steps, settings.shift, settings.seed)
    latents, unedited = inference.edit_latents(clip, prompt, *sampling)
    mask = sample.change_mask(latents, unedited) if settings.keep_source else None
    blocks = inference.decode_edit(clip, latents, mask)
    video.write_video(out, blocks, like=source)


def wait_for_others() -> None:
    """Wait for all processes of torchrun, which would end the others as soon as one has failed."""
    if cli.RANKS > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # which waits for all


def run(args: Namespace) -> None:
    """Edit the clips of the benchmark that the folder lacks, exactly as `sample.py` would.

    Of the n processes of torchrun, each edits every n-th clip.
    """
    for option in (word.partition("=")[0] for word in args.options):
        if option in NOT_FOR_RUN:
            raise ValueError(f"{option}: {NOT_FOR_RUN[option]}")
    settings = sample.parse_arguments(["--video", "", "--prompt", "-", *args.options])
    rows = read_table(args.bench / "benchmark_videos.csv", args.bench, args.categories)
    model, vae = sample.load_model(settings)
    settings.steps = settings.steps or model.config.sampling_steps
    if settings.compile is None:
        settings.compile = settings.device.type == "cuda"  # many edits gain by it
    if settings.compile:
        sample.compile_networks(model, vae)
    inference = sample.Inference(model, vae, settings.device if settings.offload else None)

    # Clips of two editors in one folder would be judged as those of one, so an editor that is
    # already described there must be this one.
    editor = describe_editor(settings, model, vae)
    former = read_editor(args.out)
    differing = [name for name in editor if former and former.get(name) != editor[name]]
    if differing:
        raise ValueError(
            f"{args.out / 'editor.json'}: the clips there are from another editor, which differs "
            f"in {', '.join(differing)}; choose another --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    edits = {key: args.out / f"{key}_edited.mp4" for key in rows}
    # Both are written before the first edit, so that a run that is stopped can be judged.
    cli.write_text(args.out / "editor.json", json.dumps(editor, indent=1))
    write_results(args.out / "results.csv", rows, edits)

    mine = list(rows)[cli.RANK :: cli.RANKS]  # every process has its own share
    missing = [key for key in mine if not edits[key].exists()]
    failed = []
    for key in tqdm(missing, desc="editing", unit="clip", disable=None):
        try:
            clip = video.open_video(rows[key]["source"])
            if key == missing[0]:
                frames = sample.clip_of(clip).frames()
                sample.note_foreign_clip(settings.checkpoint, model, vae, frames)
            edit_clip(inference, settings, clip, rows[key]["prompt"], edits[key])
        except (ValueError, FileNotFoundError, PermissionError) as error:  # not of a full disk
            failed.append(error)  # one clip that cannot be read does not cost the others
    wait_for_others()
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(mine)} clips could not be edited, the first: {failed[0]}"
        )
    print(f"{args.out}: all {len(mine)} clips are edited")


# --- Judges ---------------------------------------------------------------------------------------


def read_rubrics(folder: Path) -> tuple[dict[str, str], str]:
    """Read the system prompt of each category, and the name under which scores by them are kept.

    The name holds a digest of the texts, so that scores by edited rubrics are other scores.
    """
    texts = {name: (folder / f"{name}.txt").read_text("utf-8") for name in CATEGORIES}
    for name, text in texts.items():
        if PLACEHOLDER not in text:
            raise ValueError(
                f"{folder / name}.txt: no {PLACEHOLDER}, where the instruction belongs"
            )
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
    folder = folder.resolve()
    name = "ours" if folder == RUBRICS else folder.name
    return texts, f"{name}-{digest[:6]}"


def show_clips(source: Path, edit: Path) -> list[dict]:
    """What a judge is shown: source first, each clip with a header, then the task (App. D.3)."""
    clips = {"Source video (before the edit):": source, "Edited video (after the edit):": edit}
    content = []
    for header, path in clips.items():
        content.append({"type": "text", "text": header})
        content += chat.image_parts(video.read_video(path).frames, FRAMES)
    return [*content, {"type": "text", "text": TASK}]


async def ask_judge(rubric: str, source: Path, edit: Path, url: str, model: str, key: str) -> dict:
    """Show a judge both clips, in one turn; returns its scores, or None, and its last answer."""
    content = await asyncio.to_thread(show_clips, source, edit)
    for _ in range(TRIES):
        answer = await chat.ask(url, model, content, rubric, key)
        scores = None if answer.is_cut_off else parse_scores(answer)  # "8" may be half of "80"
        if scores:
            break
    return {"scores": scores, "answer": answer, "finish_reason": answer.finish_reason}


def fingerprint(path: Path) -> str | None:
    """Size and hash of a file, or None if it is not there."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{path.stat().st_size}-{digest[:16]}"


def find_edit(named: str, folder: Path, clips: dict[str, list[Path]]) -> Path:
    """Where the edit that a table names is, or should be. clips: those of the folder, by name."""
    path = folder / named
    # What lies in this folder comes first: elsewhere may be another editor's clip by now.
    if path.is_file() and not Path(named).is_absolute():
        return path
    found = clips.get(Path(named).stem, [])
    if len(found) > 1:
        raise ValueError(
            f"{found[0]} and {found[1]} have the same name: remove one, or name the edit's path in "
            f"{folder / 'results.csv'}"
        )
    if found:
        return found[0]
    return Path(named) if Path(named).is_file() else path


def edits_to_judge(folder: Path, bench: Path) -> tuple[dict[str, dict], int]:
    """The rows of a folder of results, with `edit`, and how many clips there should be in all."""
    original = bench / "benchmark_videos.csv"
    rows = read_table(original, bench, [*CATEGORIES])
    total = len(rows)
    # The benchmark's own instructions call the table new_result.csv.
    tables = [folder / "results.csv", folder / "new_result.csv"]
    table = next((table for table in tables if table.exists()), None)
    if table:
        # It may lack rows. Only its paths count: all editors are judged by the same prompts.
        found = read_table(table, bench, [*CATEGORIES, *OTHERS])
        rows = {key: rows[key] | {RESULT: found[key].get(RESULT)} for key in rows if key in found}
        if not rows:
            raise ValueError(f"{table}: none of its clips is in {original}")
    clips: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.name in ("results.csv", "editor.json") and path.parent != folder:
            raise ValueError(f"{path.parent} holds results of its own: name {folder}/* instead")
        if path.suffix.lower() in VIDEOS and path.is_file():
            clips.setdefault(path.stem, []).append(path)
    # A clip that is called like its source may be the source, if others have names of their own.
    is_plain = clips and not any(name.endswith("_edited") for name in clips)
    for key, row in rows.items():
        named = row.get(RESULT) or (f"{key}.mp4" if is_plain else f"{key}_edited.mp4")
        row["edit"] = find_edit(named, folder, clips)
    return rows, total


def score_file(folder: Path, model: str, used: str) -> Path:
    """The file with one judge's scores by some rubrics."""
    return folder / f"scores_{quote(model, safe='')}_{used}.jsonl"


def outdated(former: dict, seen: dict) -> bool:
    """Whether a former result is about another instruction or other clips than those seen now.

    A clip that was deleted after it had been judged keeps its scores.
    """
    known = [name for name in seen if name in former and seen[name] is not None]
    return any(former[name] != seen[name] for name in known)


def folders(paths: list[Path]) -> list[Path]:
    """Those of the paths that are folders of results: `results/*` may name other files, too."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such folder")
        if not path.is_dir():
            cli.note(f"{path} is no folder of results and left out")
    found = [path for path in paths if path.is_dir()]
    if not found:
        raise ValueError(f"{paths[0]} is no folder of results")
    return found


def judge_folder(
    folder: Path, args: Namespace, texts: dict[str, str], used: str
) -> tuple[int, list[str]]:
    """Ask for the scores that one folder lacks.

    Returns how many edits have scores now, and why others have no answer.
    """
    rows, total = edits_to_judge(folder, args.bench)
    # What is judged is kept beside its scores. It is read before the judge is asked: if a clip is
    # replaced in between, the next run asks again.
    seen = {}
    for key, row in rows.items():
        seen[key] = {
            "instruction": row["prompt"],
            "source": fingerprint(row["source"]),
            "edit": fingerprint(row["edit"]),
        }

    async def work(key: str) -> dict:
        row = rows[key]
        rubric = texts[row["edited_type"]].replace(PLACEHOLDER, row["prompt"])
        found = await ask_judge(rubric, row["source"], row["edit"], args.url, args.model, args.key)
        about = {"category": CATEGORIES[row["edited_type"]], "judge": args.model, "rubrics": used}
        return about | found | seen[key] | {"benchmark": total}

    path = score_file(folder, args.model, used)
    former = chat.results(path)
    known = {key: row for key, row in former.items() if key in rows}
    again = {key for key, row in known.items() if outdated(row, seen[key])}
    if args.again:  # dropped ones: App. D.3 gives them up, so this is only done if asked for
        again |= {key for key, row in known.items() if row.get("scores") is None}
    failed = chat.run(path, {key: key for key in rows}, work, args.workers, again)

    found = chat.results(path)
    scored = sum(row.get("scores") is not None for row in found.values())
    dropped = len(found) - scored
    print(f"{path}: {scored} scored, {dropped} dropped, {len(failed)} failed", flush=True)
    return scored, list(failed.values())


def judge(args: Namespace) -> None:
    """Ask the judge about those edits in each folder that it was not asked about before."""
    texts, used = read_rubrics(args.rubrics)
    scored = 0
    failed: list[str] = []
    for folder in folders(args.results):
        of_folder, failures = judge_folder(folder, args, texts, used)
        scored += of_folder
        failed += failures
    if args.rubrics.resolve() == RUBRICS:
        print(
            "note: scores by our own rubrics are not comparable with Table 1. For the paper's run "
            "`python -m experiments.openve rubrics PAPER.txt --out paper`, then `judge` with "
            "`--rubrics paper`"
        )
    if failed:  # no answer at all: clips or server are at fault
        raise ValueError(
            f"no scores for {len(failed)} edits, run the command again; the first: {failed[0]}"
        )
    if not scored:
        raise ValueError(
            "no scores could be read from any answer, which are kept beside the scores with the "
            "reason why each ended; --again asks about dropped edits again"
        )


def rubrics(args: Namespace) -> None:
    """Extract the judges' prompts of App. D.3 from the text of the paper, word for word.

    A category's prompt is its own part, the common rules, and the format of the answer.
    """
    lines = args.paper.read_text("utf-8").splitlines()
    text = "\n".join(line.rstrip() for line in lines)

    def between(start: str, end: str) -> str:
        found = re.search(rf"(?ms)^{start}$\n+(.+?)\n+^{end}$", text)
        if not found:
            raise ValueError(
                f"{args.paper}: no {start!r}; this takes the text of arXiv 2605.24674 with App. D.3"
            )
        return found[1]

    rules = between("# Shared block: <COMMON_RULES>", "# Shared block: <RESPONSE_FORMAT>")
    form = between("# Shared block: <RESPONSE_FORMAT>", "Local Change[.]")
    prompts = {}
    for category, name in CATEGORIES.items():
        anchors = between(f"{name}[.]", "<COMMON_RULES>")
        prompts[category] = f"{anchors}\n\n{rules}\n\n{form}\n"
    args.out.mkdir(parents=True, exist_ok=True)
    for category, prompt in prompts.items():
        cli.write_text(args.out / f"{category}.txt", prompt)


# --- Tables ---------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """The averages of one method's scores by one judge, NaN where there are none."""

    overall: float  # the mean of the category means (App. D.3)
    pooled: float  # the mean of all scores (caption of Table 3)
    axes: np.ndarray  # (3,): Overall of IC, CF and VQ alone
    cells: np.ndarray  # (4, 3): IC, CF and VQ of each category
    scored: int  # edits
    dropped: int
    lacking: str = ""  # how many clips are neither, to write behind the method's name


def summarize(rows: list[dict]) -> Summary:
    """Average the scores of one method by one judge."""
    scored = [row for row in rows if row["scores"]]
    # A category without any scores stays NaN, and so does Overall: no mean of the others stands in.
    cells = np.full((len(NAMES), len(AXES)), np.nan)
    for i, category in enumerate(NAMES):
        triples = [row["scores"] for row in scored if row["category"] == category]
        if triples:
            cells[i] = np.mean(triples, axis=0)
    pooled = np.mean([row["scores"] for row in scored]) if scored else np.nan
    # Each of `judge`'s lines knows how many clips the benchmark has. Means over fewer of them are
    # not comparable with those of other methods.
    expected = max(row.get("benchmark", 0) for row in rows)
    missing = expected - len(rows)
    return Summary(
        overall=cells.mean(),
        pooled=pooled,
        axes=cells.mean(axis=0),
        cells=cells,
        scored=len(scored),
        dropped=len(rows) - len(scored),
        lacking=f" (lacks {missing} of {expected} clips)" if missing > 0 else "",
    )


def average_judges(means: dict[tuple[str, str, str], Summary]) -> dict:
    """Add the average over judges, by (rubrics, judge, method), for methods that all of them saw.

    Only judges with the same rubrics are averaged, and only if there are at least two.
    """
    averaged = dict(means)
    for used, _, method in means:
        judges = {name for rubrics, name, _ in means if rubrics == used}
        given = [means[used, name, method] for name in judges if (used, name, method) in means]
        if len(given) == len(judges) > 1:
            averaged[used, "average", method] = Summary(
                overall=np.mean([one.overall for one in given]),
                pooled=np.mean([one.pooled for one in given]),
                axes=np.mean([one.axes for one in given], axis=0),
                cells=np.mean([one.cells for one in given], axis=0),
                scored=sum(one.scored for one in given),
                dropped=sum(one.dropped for one in given),
                lacking=min(given, key=lambda one: one.scored + one.dropped).lacking,
            )
    return averaged


def by_column(mean: Summary) -> dict[str, float]:
    """The numbers of `summarize` by the names of their columns, and each category's mean."""
    values = {"Overall": mean.overall, "Overall (all scores)": mean.pooled}
    for axis, value in zip(AXES, mean.axes, strict=True):
        values[f"Overall {axis}"] = value
    for name, triple in zip(NAMES, mean.cells, strict=True):
        values[name] = triple.mean()
        for axis, value in zip(AXES, triple, strict=True):
            values[f"{name} {axis}"] = value
    return values


CELLS = [f"{name} {axis}" for name in NAMES for axis in AXES]
LAYOUTS = {  # the columns of means in Tables 1, 2 and 3
    1: ["Overall", "Overall (all scores)", *CELLS],
    2: ["Overall", *NAMES],
    3: ["Overall", "Overall (all scores)", *(f"Overall {axis}" for axis in AXES), *CELLS],
}
EDITOR = {"#Params.": "params", "#Reso.": "resolution"}  # columns of Table 1 from editor.json


def two_digits(value: float) -> str:
    """A cell of a table; a dash where there is no value."""
    return "-" if np.isnan(value) else f"{value:.2f}"


def make_table(rows: list[dict], layout: int) -> list[list[str]]:
    """Make the header and the lines of Table 1, 2 or 3 from scores with their `method`."""
    groups: dict[tuple[str, str, str], list] = {}
    for row in rows:
        groups.setdefault((row["rubrics"], row["judge"], row["method"]), []).append(row)
    means = average_judges({key: summarize(group) for key, group in groups.items()})
    editors = {row["method"]: row for row in rows}

    def order(key: tuple[str, str, str]) -> tuple:
        used, name, _ = key
        return used, name == "average", name  # the average comes behind its judges

    # Table 1 compares editors, Tables 2 and 3 variants of one of them.
    title = "Method" if layout == 1 else "Variant"
    about = EDITOR if layout == 1 else {}
    lines = [["Rubrics", "Judge", title, *about, *LAYOUTS[layout], "Scored", "Dropped"]]
    for key in sorted(means, key=order):
        used, name, method = key
        values = by_column(means[key])
        texts = [two_digits(values[column]) for column in LAYOUTS[layout]]
        counts = [str(means[key].scored), str(means[key].dropped)]
        editor = [str(editors[method].get(column, "-")) for column in about.values()]
        lines.append([used, name, method + means[key].lacking, *editor, *texts, *counts])
    return lines


def print_table(lines: list[list[str]]) -> None:
    """Print a header and lines as Markdown."""
    header, *body = lines
    for line in [header, ["---"] * len(header), *body]:
        print(f"| {' | '.join(line)} |")


def is_result(row: dict) -> bool:
    """Whether `judge` writes such lines: one written by hand must not make wrong numbers."""
    texts = [row.get(name) for name in ("category", "judge", "rubrics")]
    scores = row.get("scores", "none at all")
    valid = all(isinstance(text, str) for text in texts) and texts[0] in NAMES
    if scores is not None:
        valid = valid and isinstance(scores, list) and len(scores) == len(AXES)
        valid = valid and all(type(score) is int and 1 <= score <= 100 for score in scores)
    return valid and isinstance(row.get("benchmark", 0), int)


def read_scores(folder: Path) -> list[dict]:
    """Read all scores in a folder of results; ValueError names what is none of `judge`'s lines."""
    rows = {}  # by judge, rubrics and clip: a copy of a file counts once
    for path in sorted(folder.glob("scores_*.jsonl")):
        for key, row in chat.results(path).items():
            if not is_result(row):
                raise ValueError(
                    f"{path}: the line of {key!r} is none that `judge` writes; remove it"
                )
            rows[row["judge"], row["rubrics"], key] = row
    return list(rows.values())


def table(args: Namespace) -> None:
    """Print Table 1, 2 or 3 of all scores in some folders."""
    results = folders(args.results)
    methods = {folder.resolve().name for folder in results}
    if len(methods) < len(results):
        raise ValueError(
            "two folders have the same name, which is the method's in the table; rename one"
        )
    found = {folder: read_scores(folder) for folder in results}
    lacking = [folder for folder in results if not found[folder]]
    asks = "no scores; `python -m experiments.openve judge` asks for them"
    if lacking == results:
        raise ValueError(f"{results[0]}: {asks}")
    for folder in lacking:
        cli.note(f"{folder}: {asks}")
    rows: list[dict] = []
    for folder in results:
        editor = read_editor(folder)
        about = {name: editor[name] for name in EDITOR.values() if name in editor}
        rows += [row | about | {"method": folder.resolve().name} for row in found[folder]]
    lines = make_table(rows, args.layout)
    if args.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
    else:
        print_table(lines)


# --- Command line ---------------------------------------------------------------------------------


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m experiments.openve",
        description="OpenVE-Bench: edits, judges and tables (§5 and App. D.3 of the paper).",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> cli.Parser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    edit = command("run", "edit the clips of the benchmark; takes the options of sample.py too")
    ask = command("judge", "ask a model on a server to score edits")
    show = command("table", "print Table 1, 2 or 3 from folders of results with scores")
    extract = command("rubrics", "extract the judges' prompts from the text of the paper")

    for sub in (edit, ask):
        sub.add_argument("--bench", type=Path, required=True, help="the folder OpenVE-Bench")
    edit.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of results; clips that it holds are not edited again",
    )
    edit.add_argument(
        "--categories",
        nargs="+",
        choices=(*CATEGORIES, *OTHERS),
        default=[*CATEGORIES],
        metavar="NAME",
        help="edited_types of the benchmark (default: the paper's four)",
    )
    ask.add_argument("results", type=Path, nargs="+", help="folders of results")
    ask.add_argument(
        "--url",
        required=True,
        help="address of an OpenAI-compatible server, such as http://localhost:8000/v1",
    )
    ask.add_argument(
        "--again",
        action="store_true",
        help="ask again about edits whose answers had no scores, and were dropped",
    )
    ask.add_argument("--model", required=True, help="name of the judge on that server")
    ask.add_argument(
        "--key",
        default="OPENAI_API_KEY",
        help="environment variable that holds the API key (default OPENAI_API_KEY)",
    )
    ask.add_argument(
        "--rubrics", type=Path, default=RUBRICS, help="folder of system prompts (default: ours)"
    )
    ask.add_argument(
        "--workers",
        type=cli.number(int, 1),
        default=8,
        help="edits that are judged at the same time (default 8)",
    )
    show.add_argument("results", type=Path, nargs="+", help="folders of results with scores")
    show.add_argument(
        "--layout",
        type=int,
        choices=LAYOUTS,
        default=1,
        help="of the paper's Table 1 (default), 2 or 3",
    )
    show.add_argument("--csv", action="store_true", help="print CSV instead of Markdown")
    extract.add_argument("paper", type=Path, help="the text of arXiv 2605.24674")
    extract.add_argument("--out", type=Path, required=True, help="folder for the four files")
    return parser


@cli.guarded
@cli.memory_advice("add --offload on a GPU, or --max-pixels with a smaller number")
def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args, args.options = parser.parse_known_args(argv)
    if args.options and args.command != "run":
        parser.error(f"{' '.join(args.options)}: only `run` takes options of sample.py")
    commands = {"run": run, "judge": judge, "table": table, "rubrics": rubrics}
    commands[args.command](args)


if __name__ == "__main__":
    main()
