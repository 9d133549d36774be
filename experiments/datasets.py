"""Instruction-video-target triplets to learn editing from (§5, App. D.1 of the paper); for others see shapes.py.

    python experiments/datasets.py sample --openve DIR --reco DIR --ditto DIR --out triplets.jsonl  # §5's 120,000, from three sets
    python experiments/datasets.py check triplets.jsonl                                    # decodes some: what training would meet
    python experiments/datasets.py caption triplets.jsonl --url URL --out captioned.jsonl  # ℓ* of every target, by a model on a server

§5 draws 10,000 clips "per category from each dataset", 120,000 in all: four categories from each of the three sets.
Which of a set's own those are is not given in the paper; we take what is one of the four of its Table 1:

              OpenVE-3M     ReCo-Data  Ditto-1M
Local Change  local_change  replace    local, unless it is one of the next two
Local Remove  local_remove  remove     local, if the instruction begins with "remove" or the like
Local Add     local_add     add        local, if the instruction begins with "add" or the like
Global Style  global_style  style      global_style1, global_style2
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

import video
from cli import Parser, fail, number
from data import COLUMNS, TripletDataset, triplets
from experiments import chat
from shapes import CATEGORIES

SETS = {  # the tables of each (where there are none, those after them), and COLUMNS in them; `video` is a target
    "OpenVE-3M": {"*.csv": "original_video video prompt", "*/*.csv": "original_video video prompt"},
    "ReCo-Data": {"*/*_data_configs.json": "src_video tar_video instruction_final_refine"},
    "Ditto-1M": {"training_metadata/*.json": "source_path edited_path instruction",
                 "csvs_for_DiffSynth/*.csv": "vace_video video prompt"},
}  # fmt: skip
# CATEGORIES in the name of a table or, in Ditto-1M, in the path of a target; there, what begins an instruction
KIND = re.compile(
    r"\b(?:(local_change|replace_|local/)|(local_remove|remove_)|(local_add|add_)|(global_style|style_))"
)
VERB = re.compile(
    r"\W*(?:please )?(?:(remove|delete|erase|get rid|take (?:away|off))|(add|insert|put|place))\b",
    re.I,
)
CAPTION_PROMPT = """These are frames of one video in order of time. Describe it in one paragraph for someone who cannot
see it: who and what is there, with looks, number and place; what each does and how that changes; surroundings, light,
colors, visual style, camera. Tell only what can be seen, do not mention frames, and add nothing to the description."""

# --- The public sets as they lie on disk, and the sample of §5 ------------------------------------


def read_set(dataset: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The triplets of a public set that are of one of the four categories.

    OpenVE-3M has a CSV for each category, ReCo-Data a list for each task. Ditto-1M's lists have names that are nowhere
    documented, so there the folder of the target tells; its CSVs have the same rows. Assumed, as no row is published:
    OpenVE-3M's columns, after the one reader seen, and that its CSVs are named for their category; that the refined one
    is the instruction of ReCo-Data, as for all readers; that a local edit of Ditto-1M does what the first verb says.
    """
    for pattern, names in SETS[dataset].items():
        for path in (tables := sorted(folder.glob(pattern))):
            for row in (
                triplets(path, *names.split())
                if dataset == "Ditto-1M" or KIND.match(path.name)
                else ()
            ):
                if kind := KIND.search(row["tgt_video"] if dataset == "Ditto-1M" else path.name):
                    verb = VERB.match(row["prompt"]) if kind[0].endswith("local/") else None
                    category = CATEGORIES[verb.lastindex if verb else kind.lastindex - 1]
                    yield {name: row[name] for name in COLUMNS} | dict(
                        category=category, dataset=dataset
                    )
        if tables:
            return


def locate(dataset: str, folders: list[Path], path: str) -> str | None:
    """Where a clip of a data set lies: the first place of an ordered list that has it, or None.

    Paths start in one of the folders, in its videos/ or its videos_folders/, and may begin with the name of the folder
    or of the set. A folder on the way may be doubled: archives are often unpacked inside of the folder they contain.
    """
    for folder in map(Path.absolute, folders):
        parts = PurePosixPath(
            path.removeprefix(f"{dataset}/").removeprefix(f"{folder.name}/")
        ).parts
        for base in (folder, folder / "videos", folder / "videos_folders"):
            for depth in range(len(parts)):
                place = base.joinpath(*parts[:depth], *parts[max(0, depth - 1) :])
                if place.is_file():
                    return str(place)


def stratified_sample(folders: dict[str, list[Path]], count: int, seed: int) -> list[str]:
    """At most `count` triplets of each category from each set in `folders`, as JSON lines; prints a table of them.

    Those with the smallest hash of (seed, paths, instruction) are taken: the order of files and rows does not matter,
    and equal rows count once. "Not found" are those that might have been taken, but for a clip that is not there.
    """
    lines, table = [], [("data set", "category", "asked", "available", "not found", "taken")]
    for dataset, places in folders.items():
        heaps, seen, missing = (
            {c: [] for c in CATEGORIES},
            {c: set() for c in CATEGORIES},
            Counter(),
        )
        for row in tqdm(read_set(dataset, places[0]), desc=dataset, unit=" rows", disable=None):
            category, values = row["category"], [row[name] for name in COLUMNS]
            key = int(hashlib.sha256(repr((seed, *values)).encode()).hexdigest()[:16], 16)
            heap = heaps[category]  # of negative numbers, so that the largest is on top
            if key not in seen[category] and (len(heap) < count or key < -heap[0][0]):
                clips = [locate(dataset, places, path) for path in values[:2]]
                if None in clips:
                    missing[category] += 1
                else:
                    item = -key, json.dumps(row | dict(src_video=clips[0], tgt_video=clips[1]))
                    (heapq.heappush if len(heap) < count else heapq.heapreplace)(heap, item)
            seen[category].add(key)
        if not any(heaps.values()):
            found = f"{missing.total()} triplets of {dataset}, none with its clips"
            raise ValueError(
                f"{places[0]}: {found}; name the folder of its tables and, after it, that of its clips"
            )
        for category, heap in heaps.items():
            lines += [line for _, line in sorted(heap, reverse=True)]
            table.append(
                (dataset, category, count, len(seen[category]), missing[category], len(heap))
            )
    table.append(("all", "", *map(sum, list(zip(*table[1:], strict=True))[2:])))
    print(*("{:<11}{:<13}{:>10}{:>11}{:>11}{:>10}".format(*row) for row in table), sep="\n")
    return lines


def check(dataset: TripletDataset, count: int, workers: int) -> None:
    """Decode `count` random rows as training does, and print what it would meet."""

    def decode(index: int) -> str:
        try:
            return "{0} frames of {2}x{1}".format(*dataset[index]["target"].shape)
        except (ValueError, OSError) as error:
            return f"bad: triplet {index + 1}: {error}"

    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[
        :count
    ].tolist()
    with ThreadPool(workers) as pool:
        found = Counter(tqdm(pool.imap(decode, drawn), total=len(drawn), disable=None))
    for line, times in found.most_common():
        print(f"{times:>8}  {line}")
    bad = sum(line.startswith("bad") for line in found) / len(drawn)
    bare = sum(not dataset.row(i)["caption"] for i in range(len(dataset)))
    print(
        f"{len(dataset)} triplets, {bare} of them without a caption; {len(drawn)} decoded, {bad:.1%} of them bad"
    )


def caption(dataset: TripletDataset, out: Path, url: str, model: str, workers: int) -> list[str]:
    """The rows as JSON lines, each with a new caption of its target; those whose target got none are left out.

    Captions are kept in OUT.answers as they come, and none is asked for twice. ValueError if 1 in 100 lacks.
    """

    def describe(clip: str) -> dict[str, str]:
        parts = chat.image_parts(video.read_video(clip, dataset.max_frames).frames, 8)
        if text := chat.ask(url, model, [*parts, {"type": "text", "text": CAPTION_PROMPT}]).strip():
            return {"caption": text}
        raise ValueError("the answer is empty")

    rows, answers = (
        list(map(dataset.row, range(len(dataset)))),
        out.with_name(f"{out.name}.answers"),
    )
    failed = chat.run(
        answers, {row["tgt_video"]: row["tgt_video"] for row in rows}, describe, workers
    )
    for clip, problem in failed.items():
        print(f"note: no caption for {clip}: {problem}", file=sys.stderr)
    if len(failed) > 0.01 * len(rows):
        raise ValueError(
            f"{len(failed)} of {len(rows)} clips have no caption; run it again to ask for those alone"
        )
    captions = chat.results(answers)
    return [
        json.dumps(row | captions[row["tgt_video"]]) for row in rows if row["tgt_video"] in captions
    ]


# --- Command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Triplets to train on: draw them, look at them, caption them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    draw = commands.add_parser("sample", help="draw as many for each category and public data set")
    for option, dataset in zip(("--openve", "--reco", "--ditto"), SETS, strict=True):
        folders = f"of {dataset}: with its tables; then others, if its clips are elsewhere"
        draw.add_argument(option, dest=dataset, nargs="+", type=Path, metavar="DIR", help=folders)
    draw.add_argument(
        "--count", type=number(int, 1), default=10_000, help="of each (default 10000, as in §5)"
    )
    draw.add_argument("--seed", type=number(int, 0), default=0, help="of what is drawn (default 0)")
    look = commands.add_parser("check", help="decode some and say what training would meet")
    look.add_argument("--clips", type=number(int, 1), default=200, help="so many (default 200)")
    ask = commands.add_parser(
        "caption", help="have every target clip described by a model on a server"
    )
    ask.add_argument(
        "--url", required=True, help="OpenAI-compatible, such as http://localhost:8000/v1"
    )
    ask.add_argument(
        "--model", default="Qwen/Qwen3-VL-8B-Instruct", help="default %(default)s, as in App. D.1"
    )
    for command in (draw, ask):
        command.add_argument(
            "--out", type=Path, required=True, help="the .jsonl file to write, for train.py --data"
        )
    for command in (look, ask):
        command.add_argument("file", type=Path, metavar="FILE", help="triplets, .csv or .jsonl")
        command.add_argument(
            "--frames", type=number(int, 1), default=81, help="of each clip's start (default 81)"
        )
        command.add_argument(
            "--workers", type=number(int, 1), default=8, help="clips at a time (default 8)"
        )
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            return check(
                TripletDataset(args.file, max_frames=args.frames), args.clips, args.workers
            )
        if args.out.suffix != ".jsonl" or not args.out.parent.is_dir():
            raise ValueError(f"--out {args.out}: name a .jsonl file in a folder that exists")
        if args.command == "caption":
            dataset = TripletDataset(args.file, max_frames=args.frames)
            lines = caption(dataset, args.out, args.url, args.model, args.workers)
        else:
            sets = {name: vars(args)[name] for name in SETS if vars(args)[name]} or fail(
                "name a set, as --openve DIR"
            )
            lines = stratified_sample(sets, args.count, args.seed)
        partial = args.out.with_name(f"{args.out.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(args.out)
        print(f"{args.out}: {len(lines)} triplets")
    except (ValueError, OSError, chat.Refused) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
