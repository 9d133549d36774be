"""OpenVE-Bench: edit its clips, let judges score them, make the tables (§5, App. D.3, Tables 1-3 of the paper).

    python evaluate.py run --bench OpenVE-Bench --out results/ours --checkpoint kiwi-edit-5b
    torchrun --nproc_per_node 8 evaluate.py run ...                  # the same on 8 GPUs; takes sample.py's options
    python evaluate.py judge results/* --bench OpenVE-Bench --url http://localhost:8000/v1 --model Qwen3.5-VL-35B
    python evaluate.py table results/*
    python evaluate.py rubrics rvedit.txt --out paper                # the paper's own, for `judge --rubrics paper`
    python evaluate.py shapes --checkpoint runs/mine/model           # synthetic clips: no benchmark, no judge

OpenVE-Bench is a folder with `benchmark_videos.csv` (edited_type, prompt, original_video) and videos/. A folder of
results has an editor's clips, whichever it is: as the column edited_result_path of its `results.csv` says or, without
one, named after the source, NAME_edited.mp4. Its name is the method's name in tables; an `editor.json` in it, such as
{"params": "14B", "resolution": "832x480"}, fills Table 1's columns of these names. Scores are kept there too.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
from argparse import Namespace
from pathlib import Path

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
import data
import rvedit
import sample
import video
from experiments import chat
from shapes import CATEGORIES as NAMES
from shapes import TOY_EXTENT, ShapesDataset

CATEGORIES = {
    name.lower().replace(" ", "_"): name for name in NAMES
}  # by their names in OpenVE-Bench
OTHERS = (
    "background_change",
    "subtitle_edit",
    "camera_edit",
    "creative_edit",
)  # that the paper leaves out
COLUMNS, RESULT = ("edited_type", "prompt", "original_video"), "edited_result_path"
AXES = {  # as a judge may write them; Markdown, quotes and underscores are gone by then
    "IC": "instruction compliance",
    "CF": "consistency (?:(?:&|&amp;|and) )?(?:detail )?fidelity",
    "VQ": "visual quality(?: (?:(?:&|&amp;|and) )?stability)?",
}
RUBRICS, PLACEHOLDER = Path(__file__).parent / "rubrics", "{edit_prompt}"
FRAMES, TRIES = 5, 3  # frames of each clip that a judge sees; answers that it may give (App. D.3)
VISIBLE = 24  # of 255 levels: what `ShapesDataset` takes for a clear change
TASK = "Compare these two videos based on the sampled frames and provide the requested scores in the specified format."

# --- The benchmark, and an editor's clips for it --------------------------------------------------


def locate(path: str, *folders: Path) -> Path:
    """Where a path of a table leads: the first that exists, from each folder on, then by its last part alone."""
    places = [folder / part for part in (path, Path(path).name) for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def read_table(path: Path, bench: Path, categories: list[str]) -> dict[str, dict]:
    """The rows of the benchmark or of results, with `source`, by the name of the source clip without its ending."""
    rows: dict[str, dict] = {}
    for row in data.triplets(path, "edited_type", "original_video", "prompt"):
        if rows.setdefault(Path(row["original_video"]).stem, row) is not row:
            raise ValueError(f"{path}: {row['original_video']} is there twice")
        row["source"] = locate(row["original_video"], bench, bench.parent, bench / "videos")
    if chosen := {key: row for key, row in rows.items() if row["edited_type"] in categories}:
        return chosen
    raise ValueError(f"{path}: no row has one of the edited_types {', '.join(categories)}")


def save(path: Path, text: str) -> None:
    """Write a file that is at no time half written, whichever of several processes write it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def run(args: Namespace) -> None:
    """Edit those clips that the folder lacks, as `sample.py` would; of torchrun's n processes each takes every n-th."""
    settings = sample.parse_arguments(["--video", "", "--prompt", "-", *args.options])
    if settings.compare:
        raise ValueError(
            "--compare: `run` writes only edits, the judge sees them beside their sources"
        )
    if settings.device == torch.device("cuda"):
        settings.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    rows = read_table(args.bench / "benchmark_videos.csv", args.bench, args.categories)
    model, vae = sample.load_model(settings)
    height, width = sample.model_size(
        720, 1280, model.config.max_pixels, model.config.spatial_factor
    )
    names = ("checkpoint", "routing_depth", "max_pixels", "steps", "shift", "seed", "dtype")
    editor = {name: str(vars(settings)[name]) for name in names} | {
        "resolution": f"{width}x{height}"
    }
    editor["params"] = f"{sum(p.numel() for p in model.dit.parameters()) / 1e9:.2g}B"
    about, edits = args.out / "editor.json", {key: args.out / f"{key}_edited.mp4" for key in rows}
    if about.exists() and json.loads(about.read_text("utf-8")) != editor:
        raise ValueError(
            f"{about}: the clips there are from another checkpoint or options; choose another --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    save(about, json.dumps(editor, indent=1))
    lines = [[*(row[name] for name in COLUMNS), edits[key]] for key, row in rows.items()]
    csv.writer(file := io.StringIO(), lineterminator="\n").writerows([[*COLUMNS, RESULT], *lines])
    save(args.out / "results.csv", file.getvalue())
    mine, failed = (
        list(rows)[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))],
        [],
    )
    for key in tqdm(
        [key for key in mine if not edits[key].exists()], desc="editing", unit="clip", disable=None
    ):
        try:
            clip, device = (
                video.read_video(rows[key]["source"]),
                settings.device if settings.offload else None,
            )
            sampling = settings.steps, settings.shift, settings.seed, device
            frames = sample.edit_video(model, vae, clip.frames, rows[key]["prompt"], *sampling)
            video.write_video(edits[key], frames, like=clip)
        except (ValueError, OSError) as error:
            failed.append(error)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(mine)} clips could not be edited, the first: {failed[0]}"
        )
    print(f"{args.out}: all {len(mine)} clips are edited")


# --- Judges ---------------------------------------------------------------------------------------


def parse_scores(answer: str) -> list[int] | None:
    """IC, CF and VQ of an answer; None if one is missing, not from 1 to 100, or given twice and not the same.

    Markdown, lists, JSON, text behind a score, "/100" and decimals are fine (App. D.3). What is not one number on the
    scale is no score: 61-80, 8/10, about 70. Of a model that thinks aloud only what follows counts.
    """
    text = re.sub(r"(?s)^.*</think>|<think>.*", "", answer)
    text = re.sub(r"(?:[^\S\n]|[*_`#\"'\\])+", " ", text)
    scores = []
    for label in AXES.values():
        name = rf"(?i)\b{label}(?: score)?(?: ?\([^()\n]*\))?"
        number = r"[ :=|({\[–—-]*(?<![−-])([−-]?\d+(?:\.\d+)?)"
        whole = r"(?!\w|[.,]?\d| ?(?:[-–—~→>]+|to|or) ?\d| ?(?:/|out of)(?! ?100\b))"
        found = {
            float(match.replace("−", "-")) for match in re.findall(name + number + whole, text)
        }
        if len(found) != 1 or not 1 <= max(found) <= 100:
            return None
        scores.append(int(found.pop() + 0.5))
    return scores


def ask_judge(
    about: dict, rubric: str, source: Path, edit: Path, url: str, model: str, key: str
) -> dict:
    """What is known about an edit, its scores or None if no answer had them, and the last answer."""
    content = []
    for header, path in (
        ("Source video (before the edit):", source),
        ("Edited video (after the edit):", edit),
    ):
        content += [
            {"type": "text", "text": header},
            *chat.image_parts(video.read_video(path).frames, FRAMES),
        ]
    for _ in range(TRIES):
        answer = chat.ask(url, model, [*content, {"type": "text", "text": TASK}], rubric, key)
        if scores := parse_scores(answer):
            break
    return {**about, "scores": scores, "answer": answer}


def judge(args: Namespace) -> None:
    """Ask the judge about those edits in each folder that it was not asked about before."""
    rubrics, failed = (
        {name: (args.rubrics / f"{name}.txt").read_text("utf-8") for name in CATEGORIES},
        [],
    )
    if lacking := [name for name, text in rubrics.items() if PLACEHOLDER not in text]:
        raise ValueError(
            f"{args.rubrics / lacking[0]}.txt: no {PLACEHOLDER}, where the instruction goes"
        )
    digest = hashlib.sha256("".join(rubrics.values()).encode()).hexdigest()[
        :6
    ]  # edited rubrics are others
    used = (
        f"{'ours' if args.rubrics.resolve() == RUBRICS else args.rubrics.resolve().name}-{digest}"
    )
    for folder in args.results:
        table, jobs = folder / "results.csv", {}
        table = table if table.exists() else args.bench / "benchmark_videos.csv"
        for key, row in read_table(table, args.bench, [*CATEGORIES]).items():
            about = {
                "category": CATEGORIES[row["edited_type"]],
                "judge": args.model,
                "rubrics": used,
            }
            edit = locate(row.get(RESULT) or f"{key}_edited.mp4", folder, Path())
            jobs[key] = (
                about,
                rubrics[row["edited_type"]].replace(PLACEHOLDER, row["prompt"]),
                row["source"],
                edit,
            )
        path = folder / f"scores_{re.sub('[^A-Za-z0-9.-]+', '-', args.model)}_{used}.jsonl"
        problems = chat.run(
            path, jobs, lambda job: ask_judge(*job, args.url, args.model, args.key), args.workers
        )
        scored = [row["scores"] is not None for row in chat.results(path).values()]
        print(
            f"{path}: {sum(scored)} scored, {scored.count(False)} dropped, {len(problems)} failed",
            flush=True,
        )
        failed += problems.values()
    if failed:
        raise ValueError(
            f"no scores for {len(failed)} edits, run the command again; the first: {failed[0]}"
        )


def rubrics(args: Namespace) -> None:
    """Cut the prompts of App. D.3 out of the paper's text, word for word: a category's anchors, rules and format."""
    text = "\n".join(line.rstrip() for line in args.paper.read_text("utf-8").splitlines())

    def between(start: str, end: str) -> str:
        if found := re.search(rf"(?ms)^{start}$\n+(.+?)\n+^{end}$", text):
            return found[1]
        raise ValueError(
            f"{args.paper}: no {start!r}; this takes the text of arXiv 2605.24674 with App. D.3"
        )

    rules, form = "# Shared block: <COMMON_RULES>", "# Shared block: <RESPONSE_FORMAT>"
    shared = f"{between(rules, form)}\n\n{between(form, 'Local Change[.]')}\n"
    texts = {
        key: f"{between(f'{name}[.]', '<COMMON_RULES>')}\n\n{shared}"
        for key, name in CATEGORIES.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for category, text in texts.items():
        save(args.out / f"{category}.txt", text)


# --- Tables ---------------------------------------------------------------------------------------


def summarize(rows: list[dict]) -> np.ndarray:
    """Means of a method's scores, (19,), NaN where there are none; last, how many were scored and dropped.

    Overall: the mean of the category means (App. D.3), of all scores (caption of Table 3), of IC, CF and VQ alone;
    then IC, CF and VQ of each category.
    """
    scored = [row for row in rows if row["scores"]]
    triples = [
        [row["scores"] for row in scored if row["category"] == category] for category in NAMES
    ]
    means = np.array([np.mean(t, axis=0) if t else [np.nan] * 3 for t in triples])  # (4, 3)
    pooled = np.mean([row["scores"] for row in scored] or np.nan)
    return np.array(
        [means.mean(), pooled, *means.mean(0), *means.flat, len(scored), len(rows) - len(scored)]
    )


def make_table(rows: list[dict], layout: int) -> list[list[str]]:
    """Header and lines of Table 1 or 3 from scores with `method`: by judge, and averaged over judges by one rubric."""
    groups: dict[tuple[str, str, str], list] = {}
    for row in rows:
        groups.setdefault((row["rubrics"], row["judge"], row["method"]), []).append(row)
    means = {key: summarize(group) for key, group in groups.items()}
    for used, _, method in groups:
        given = {judge: mean for (r, judge, m), mean in means.items() if (r, m) == (used, method)}
        if (
            len(given) == len({judge for r, judge, _ in groups if r == used}) > 1
        ):  # each of its judges, no average yet
            mean = means[used, "average", method] = np.mean(list(given.values()), axis=0)
            mean[-2:] *= len(given)
    names = ["Overall", "Overall (all scores)", *(f"Overall {axis}" for axis in AXES)]
    names += [*(f"{name} {axis}" for name in NAMES for axis in AXES), "Scored", "Dropped"]
    about = {"#Params.": "params", "#Reso.": "resolution"} if layout == 1 else {}
    shown = [0, 1, *range(5, 19)] if layout == 1 else [*range(19)]
    lines = [
        [
            "Rubrics",
            "Judge",
            "Method" if layout == 1 else "Variant",
            *about,
            *(names[i] for i in shown),
        ]
    ]
    for key, mean in sorted(
        means.items(), key=lambda item: (item[0][0], item[0][1] == "average", item[0][1])
    ):
        texts = ["-" if np.isnan(x) else f"{x:.2f}" for x in mean[:-2]] + [
            f"{x:.0f}" for x in mean[-2:]
        ]
        editor = [
            next(row for row in rows if row["method"] == key[2]).get(name, "-")
            for name in about.values()
        ]
        lines.append([*key, *editor, *(texts[i] for i in shown)])
    return lines


def print_table(lines: list[list[str]]) -> None:
    print(
        "\n".join(
            f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        )
    )


def table(args: Namespace) -> None:
    rows: list[dict] = []
    if len({folder.resolve().name for folder in args.results}) < len(args.results):
        raise ValueError(
            "two folders have the same name, which is the method's in the table; rename one"
        )
    for folder in args.results:
        about, files = folder / "editor.json", sorted(folder.glob("scores_*.jsonl"))
        found = [row for path in files for row in chat.results(path).values()]
        if not found:
            raise ValueError(f"{folder}: no scores; `evaluate.py judge` asks for them")
        editor = json.loads(about.read_text("utf-8")) if about.exists() else {}
        rows += [row | editor | {"method": folder.resolve().name} for row in found]
    lines = make_table(rows, args.layout)
    csv.writer(sys.stdout, lineterminator="\n").writerows(lines) if args.csv else print_table(lines)


# --- The synthetic set, where what is right is known ----------------------------------------------


def rate(output: Tensor, clip: dict, ceiling: Tensor) -> list[float]:
    """IC, CF and VQ, 1 to 100, of an edit of a clip of `ShapesDataset`; ceiling: the target through the VAE.

    IC: how much of the way from source to target is done inside the mask, by the root mean square distance.
    CF: the share of the pixels outside that look as in the source, up to VISIBLE. A style leaves none outside: there,
    how much of the source's variance, or else the target's, a linear map of the output's colors explains: all, if only
    colors differ. VQ: the ceiling's error over the output's, in the frames and in what changes between them. It is the
    distance to the nearer one of source and target at each pixel, so that an edit not done does not count twice.
    """
    source, target, output, ceiling = (
        x.double() for x in (clip["source"], clip["target"], output, ceiling)
    )
    mask = clip["mask"]
    done = 1 - (output - target)[mask].norm() / (source - target)[mask].norm()
    kept = (
        ((output - source)[~mask].square().mean(-1).sqrt() < VISIBLE).double().mean()
    )  # NaN for a style
    if mask.all():
        colors = torch.nn.functional.pad(output, (0, 1), value=1.0).flatten(0, 2)  # (T H W, 4)
        clips = [x.flatten(0, 2) for x in (source, target)]
        rests = [x - colors @ torch.linalg.lstsq(colors, x, driver="gelsd").solution for x in clips]
        kept = max(
            1 - (rest.norm() / (x - x.mean(0)).norm()) ** 2
            for rest, x in zip(rests, clips, strict=True)
        )

    def error(x: Tensor) -> Tensor:
        nearer = (x - source).square().sum(-1, keepdim=True) < (x - target).square().sum(
            -1, keepdim=True
        )
        rest = x - torch.where(nearer, source, target)
        return torch.cat([rest, rest.diff(dim=0)]).norm()

    return [
        1 + 99 * x.clamp(0, 1).item()
        for x in (done, kept, (error(ceiling) + 1e-6) / (error(output) + 1e-6))
    ]


@torch.no_grad()
def shapes(args: Namespace) -> None:
    """Score edits of clips that were never trained on, and what bounds these scores."""
    from experiments import toy  # and with it what trains it

    model, vae = rvedit.load(args.checkpoint, device=toy.DEVICE)
    dataset = ShapesDataset(2026, args.clips * len(CATEGORIES), *TOY_EXTENT)
    rows, about = [], {"judge": "exact targets", "rubrics": "none"}
    for first in tqdm(range(0, len(dataset), 20), desc="editing", unit="batch", disable=None):
        clips = [dataset[i] for i in range(first, min(first + 20, len(dataset)))]
        sources, targets = (
            torch.stack([clip[key] for clip in clips]) for key in ("source", "target")
        )
        edits = toy.edit_clips(model, vae, sources, [clip["instruction"] for clip in clips])
        ceilings = video.to_uint8(vae.decode(vae.encode(video.to_float(targets))))
        outputs = {"edit": edits, "source unchanged": sources, "target through the VAE": ceilings}
        for method, videos in outputs.items():
            for clip, scores in zip(clips, map(rate, videos, clips, ceilings), strict=True):
                rows.append(
                    about | {"method": method, "category": clip["category"], "scores": scores}
                )
    print_table(make_table(rows, layout=3))


# --- Command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description="OpenVE-Bench: edits, judges, tables.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    edit = commands.add_parser(
        "run", help="edit its clips; takes options of sample.py", allow_abbrev=False
    )
    edit.add_argument("--bench", type=Path, required=True, help="the folder OpenVE-Bench")
    edit.add_argument(
        "--out", type=Path, required=True, help="folder of results; what is there is not done again"
    )
    edit.add_argument(
        "--categories",
        nargs="+",
        choices=(*CATEGORIES, *OTHERS),
        default=[*CATEGORIES],
        metavar="NAME",
    )
    ask = commands.add_parser(
        "judge", help="ask a model on a server for scores", allow_abbrev=False
    )
    ask.add_argument("results", type=Path, nargs="+", help="folders of results")
    ask.add_argument("--bench", type=Path, required=True, help="the folder OpenVE-Bench")
    ask.add_argument(
        "--url",
        required=True,
        help="of an OpenAI-compatible server, such as http://localhost:8000/v1",
    )
    ask.add_argument("--model", required=True, help="its name there")
    ask.add_argument(
        "--key",
        default="OPENAI_API_KEY",
        help="environment variable with the API key (OPENAI_API_KEY)",
    )
    ask.add_argument("--rubrics", type=Path, default=RUBRICS, help="folder; default: ours")
    ask.add_argument(
        "--workers", type=cli.number(int, 1), default=8, help="edits judged at a time (default 8)"
    )
    show = commands.add_parser(
        "table", help="Table 1 or 3 from any number of folders", allow_abbrev=False
    )
    show.add_argument("results", type=Path, nargs="+", help="folders of results with scores")
    show.add_argument(
        "--layout",
        type=int,
        choices=(1, 3),
        default=1,
        help="of the paper's Table 1 (default) or 3",
    )
    show.add_argument("--csv", action="store_true", help="instead of Markdown")
    cut = commands.add_parser(
        "rubrics", help="cut the paper's own out of its text", allow_abbrev=False
    )
    cut.add_argument("paper", type=Path, help="the text of arXiv 2605.24674")
    cut.add_argument("--out", type=Path, required=True, help="folder for the four files")
    known = commands.add_parser(
        "shapes", help="scores from the exact targets of synthetic clips", allow_abbrev=False
    )
    known.add_argument("--checkpoint", type=Path, help="of ours; default: the built-in one")
    known.add_argument(
        "--clips", type=cli.number(int, 1), default=50, help="of each category (default 50)"
    )
    args, args.options = parser.parse_known_args(argv)
    if args.options and args.command != "run":
        parser.error(f"{' '.join(args.options)}: only `evaluate.py run` takes options of sample.py")
    try:
        {"run": run, "judge": judge, "table": table, "rubrics": rubrics, "shapes": shapes}[
            args.command
        ](args)
    except torch.OutOfMemoryError:
        cli.fail("out of memory: add --offload, or --max-pixels with a smaller number")
    except (ValueError, OSError, chat.Refused) as error:
        cli.fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
