"""Triplets to train on: one table from the public data sets, checked, and with captions.

    # 10,000 of each category from each of the three sets, as in §5
    python -m experiments.datasets sample --openve DIR --reco DIR --ditto DIR --out triplets.jsonl
    # decode some of them as training does, and say what it would meet
    python -m experiments.datasets check triplets.jsonl
    # have every target described by a model on a server: the captions ℓ* of the reference branch
    python -m experiments.datasets caption triplets.jsonl --url URL --out captioned.jsonl
    # encode all clips once, for train.py --latents: for more than one epoch, or more than one run
    python -m experiments.datasets encode captioned.jsonl --checkpoint DIR --out latents

§5 draws 10,000 clips "per category from each dataset", 120,000 in all: four categories from each of
the three sets. The paper does not say which categories of a set those are. We take those that are
one of the four of its Table 1:

              OpenVE-3M     ReCo-Data  Ditto-1M
Local Change  local_change  replace    local, unless it is one of the next two
Local Remove  local_remove  remove     local, if the instruction begins with "remove" or the like
Local Add     local_add     add        local, if the instruction begins with "add" or the like
Global Style  global_style  style      global_style1, global_style2
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli

if __name__ == "__main__":
    cli.begin()

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

import rvedit
import video
from data import (
    COLUMNS,
    Latents,
    TripletDataset,
    check_size,
    checked_text,
    fit_pair,
    latents_of,
    one_line,
    read_rows,
    read_table,
    triplets,
)
from experiments import chat
from experiments.answers import without_thoughts
from shapes import CATEGORIES
from vae import WanVAE
from weights import what_it_is

# --- The public sets as they lie on disk ----------------------------------------------------------


class Layout(NamedTuple):
    """How a public set is laid out, as far as it is known."""

    columns: tuple[tuple[str, str, str], ...]  # what its tables may call COLUMNS
    words: dict[str, tuple[str, ...]]  # words in the name of a table or folder of a category


# In OpenVE-3M and Ditto-1M the column `video` is the edited clip.
SETS = {
    "OpenVE-3M": Layout(
        columns=(("original_video", "video", "prompt"),),
        words={
            "Local Change": ("local", "change"),
            "Local Remove": ("local", "remove"),
            "Local Add": ("local", "add"),
            "Global Style": ("global", "style"),
        },
    ),
    "ReCo-Data": Layout(
        columns=(("src_video", "tar_video", "instruction_final_refine"),),
        words={
            "Local Change": ("replace",),
            "Local Remove": ("remove",),
            "Local Add": ("add",),
            "Global Style": ("style",),
        },
    ),
    "Ditto-1M": Layout(
        columns=(("source_path", "edited_path", "instruction"), ("vace_video", "video", "prompt")),
        words={"Global Style": ("global", "style")},
    ),
}

# How the instructions of Ditto-1M's local edits begin, by category.
VERBS = {
    "Local Remove": re.compile(
        r"\W*(please )?(remove|delete|erase|get rid|take (away|off))\b", re.IGNORECASE
    ),
    "Local Add": re.compile(r"\W*(please )?(add|insert|put|place)\b", re.IGNORECASE),
}

LONGEST_POINTER = 1024  # bytes
TABLES = (".csv", ".tsv", ".json", ".jsonl")  # how the names of tables end


def note(message: str) -> None:
    # Not print: it would break the line of a progress bar.
    tqdm.write(f"note: {message}", file=sys.stderr)


@functools.cache
def is_named(name: str, words: tuple[str, ...]) -> bool:
    """Whether a name holds all of some words: Local_Add, localadd, part2-AddLocal ..."""
    parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
    joined = {"".join(order) for order in itertools.permutations(words)}
    return parts.issuperset(words) or not parts.isdisjoint(joined)


def named_category(dataset: str, name: str) -> str | None:
    """The category whose words a name holds; None if it holds those of none, or of several."""
    found = [c for c, words in SETS[dataset].words.items() if is_named(name, words)]
    return found[0] if len(found) == 1 else None


def category_of(dataset: str, table: str, row: dict[str, str]) -> str | None:
    """The category of a triplet, or None if it has none of ours. table: its path in the set.

    OpenVE-3M has a table for each category, ReCo-Data for each task. If a table's name does not
    tell, the folder of the target does. What the tables of Ditto-1M are called is not documented,
    so there the folder tells alone; a local edit does what the first verb of its instruction says.
    """
    folder = str(PurePosixPath(row["tgt_video"]).parent)
    if dataset != "Ditto-1M":
        return named_category(dataset, table) or named_category(dataset, folder)
    if is_named(folder, ("local",)):
        for category, verb in VERBS.items():
            if verb.match(row["prompt"]):
                return category
        return "Local Change"
    return named_category(dataset, folder)


class Listing(NamedTuple):
    """The names in a folder."""

    files: set[str]
    folders: list[str]


def has_content(clip: str) -> bool:
    """Whether a file is more than the name of a clip: not empty, and no pointer of git-lfs."""
    try:
        size = os.path.getsize(clip)
    except OSError:
        return False
    return size > LONGEST_POINTER or (size > 0 and what_it_is(Path(clip)) is None)


class Folders:
    """The folders of a data set. Each is listed once, however many clips are looked up in it."""

    def __init__(self, dataset: str, places: list[Path]) -> None:
        self.dataset = dataset
        self.places = [place.absolute() for place in places]
        self.listings: dict[str, Listing] = {}
        self.found: dict[str, list[str]] = {}  # the results of `places_of`
        self.real: dict[str, str] = {}  # where a folder with clips really is
        for place in self.places:
            if not place.is_dir():
                raise ValueError(f"{place}: there is no such folder")

    def listing(self, folder: str) -> Listing:
        if folder not in self.listings:
            listing = Listing(set(), [])
            # A path may lead to no folder, or to one that cannot be read: nothing is found there.
            with contextlib.suppress(OSError):
                for entry in os.scandir(folder):
                    if entry.is_file():
                        listing.files.add(entry.name)
                    elif entry.is_dir():
                        listing.folders.append(entry.name)
            self.listings[folder] = listing
        return self.listings[folder]

    def contents(self) -> str:
        """What lies in the places, for a message: their first names, folders with a slash."""
        texts = []
        for place in self.places:
            files, folders = self.listing(str(place))
            names = sorted([*files, *(f"{name}/" for name in folders)])
            shown = ", ".join(names[:12]) or "nothing"
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            texts.append(f"{place} holds {shown}{more}")
        return "; ".join(texts)

    def tables(self) -> list[Path]:
        """The tables of the first place, of the folders in it, and of those in them.

        Raises ValueError if there is none.
        """
        level = [self.places[0]]
        tables = []
        for _ in range(3):
            below = []
            for folder in level:
                files, folders = self.listing(str(folder))
                tables += [folder / name for name in files if name[0] != "."]
                below += [folder / name for name in folders if name[0] != "."]
            level = below
        tables = [path for path in tables if path.suffix.lower() in TABLES]
        if not tables:
            raise ValueError(
                f"{self.places[0]}: no table of {self.dataset} in it or two folders below, no "
                f"{', '.join(TABLES)} file ({self.contents()})"
            )
        return sorted(tables)

    def places_of(self, folder: str) -> list[str]:
        """Where the clips may lie that a table has in `folder`; places without files are left out.

        Paths start in one of the places, in its videos/ or its videos_folders/, and may begin with
        the name of the place or of the set. A folder on the way may be doubled: archives are often
        unpacked inside of the folder that they contain.
        """
        if folder in self.found:
            return self.found[folder]
        found = []
        for place in self.places:
            inside = f"{folder}/".removeprefix(f"{self.dataset}/").removeprefix(f"{place.name}/")
            parts = PurePosixPath(inside).parts if folder else ()
            for base in (place, place / "videos", place / "videos_folders"):
                for depth in range(len(parts) + 1):
                    # From depth 1 on, the folder at that depth is doubled.
                    steps = parts[:depth] + parts[max(0, depth - 1) :]
                    candidate = os.path.join(base, *steps)
                    if self.listing(candidate).files:
                        found.append(candidate)
        self.found[folder] = found
        return found

    def find(self, path: str) -> str | None:
        """Where a clip of a table lies: the first place that has it, or None."""
        folder, name = os.path.split(os.path.normpath(path))
        for place in self.places_of(folder):
            clip = os.path.join(place, name)
            if name in self.listing(place).files and has_content(clip):
                return clip
        return None

    def identity(self, clip: str) -> str:
        """A clip that was found, by a name that is the same however its folder was reached."""
        folder, name = os.path.split(clip)
        if folder not in self.real:
            self.real[folder] = os.path.realpath(folder)
        return os.path.join(self.real[folder], name)


def columns_of(dataset: str, table: Path) -> tuple[str, str, str]:
    """What a table of a set calls COLUMNS. ValueError if it is none of the set's tables."""
    # A list may lack a path in some entries, so that its first ones need not tell.
    for row in itertools.islice(read_rows(table), 1000):
        for names in SETS[dataset].columns:
            if row.fields.keys() >= {*names}:
                return names
    wanted = " or ".join(", ".join(names) for names in SETS[dataset].columns)
    raise ValueError(f"{table}: it has no columns {wanted}")


def read_set(folders: Folders) -> Iterator[dict[str, Any]]:
    """The triplets of a public set that are of one of the four categories, from all its tables.

    Notes on stderr say what is left out: files that are none of its tables, rows that are bad, and
    rows of other categories. Assumed, as no row is published: OpenVE-3M's columns, after the one
    reader seen; that the refined instruction is the instruction of ReCo-Data, as for all readers.
    """
    dataset = folders.dataset
    for table in folders.tables():
        name = str(table.relative_to(folders.places[0]))
        try:
            columns = columns_of(dataset, table)
        except (ValueError, OSError) as error:
            note(f"skipped {error}")
            continue
        problems: list[str] = []
        others = 0
        for row in read_table(table, *columns):
            if row.problem:
                problems.append(f"{row.place}: {row.problem}")
                continue
            category = category_of(dataset, name, row.fields)
            if category is None:
                others += 1
                continue
            triplet = {column: row.fields[column] for column in COLUMNS}
            yield triplet | {"category": category, "dataset": dataset}
        if problems:
            note(f"{table}: {len(problems)} bad rows are left out, the first is {problems[0]}")
        if others:
            note(f"{table}: {others} rows are left out, they are of none of our categories")


class Benchmark:
    """The clips of OpenVE-Bench, which an editor that will be judged on them must not train on."""

    def __init__(self, folder: Path) -> None:
        folders = Folders("OpenVE-Bench", [folder])
        self.stems: set[str] = set()
        self.edits: set[tuple[str, int]] = set()  # instruction, and size of the source in bytes
        table = folder / "benchmark_videos.csv"
        for row in triplets(table, "edited_type", "original_video", "prompt"):
            path = PurePosixPath(row["original_video"])
            self.stems.add(path.stem)
            clip = folders.find(str(path)) or folders.find(path.name)
            if clip:
                self.edits.add(self.edit(row["prompt"], clip))

    @staticmethod
    def edit(instruction: str, source: str) -> tuple[str, int]:
        return " ".join(instruction.lower().split()), os.path.getsize(source)

    def holds(self, instruction: str, source: str, target: str) -> bool:
        """By the name of a clip or, as it may have been renamed, by instruction and source."""
        if {Path(source).stem, Path(target).stem} & self.stems:
            return True
        return bool(self.edits) and self.edit(instruction, source) in self.edits


# --- The sample of §5 -----------------------------------------------------------------------------


class Drawn:
    """What is drawn from one set, by category."""

    def __init__(self) -> None:
        # The triplets with the smallest keys, as (-key, JSON line): the root of a heap has the
        # largest key of those that are kept.
        self.heaps: dict[str, list[tuple[int, str]]] = {category: [] for category in CATEGORIES}
        self.available: Counter[str] = Counter()  # pairs of the tables, each counted once
        self.missing: Counter[str] = Counter()  # those of them of which a clip was not found
        self.located = 0  # rows whose clips were found
        self.in_bench = 0  # pairs that are left out, because they are the benchmark's


def draw_from_set(
    folders: Folders, count: int, seed: int, seen: set[int], bench: Benchmark | None
) -> Drawn:
    """Draw from one set; `seen` has the pairs of other sets, and gets those of this one."""
    drawn = Drawn()
    for row in tqdm(read_set(folders), desc=folders.dataset, unit=" rows", disable=None):
        category = row["category"]
        source, target = folders.find(row["src_video"]), folders.find(row["tgt_video"])
        if source and target:
            drawn.located += 1
            pair = hash((folders.identity(source), folders.identity(target)))
        else:
            pair = hash((row["src_video"], row["tgt_video"]))
        if pair in seen:
            continue
        seen.add(pair)
        if source is None or target is None:
            drawn.available[category] += 1
            drawn.missing[category] += 1
            continue
        if bench and bench.holds(row["prompt"], source, target):
            drawn.in_bench += 1
            continue
        drawn.available[category] += 1
        # Paths as they stand in the table: where the set lies does not change the sample. A hash as
        # the key draws at random in one pass, and gives the same sample for any order of the rows.
        key = (seed, *(row[name] for name in COLUMNS))
        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        line = json.dumps(row | dict(src_video=source, tgt_video=target))
        heap = drawn.heaps[category]
        heapq.heappush(heap, (-int(digest[:16], 16), line))
        if len(heap) > count:
            heapq.heappop(heap)
    return drawn


def stratified_sample(
    places: dict[str, list[Path]], count: int, seed: int, bench: Benchmark | None = None
) -> list[str]:
    """At most `count` triplets of each category from each set, as JSON lines.

    places: the folders of each set, that of its tables first. Triplets with the smallest hash of
    (seed, paths, instruction) are taken, so the order of files and rows does not matter. A pair of
    clips counts once, in the set where it is found first. Prints how many triplets of each category
    are available, lack a clip ("not found") and are taken.
    Raises ValueError for a set of which no clips are found.
    """
    lines: list[str] = []
    report = [("data set", "category", "asked", "available", "not found", "taken")]
    totals = [0, 0, 0, 0]
    seen: set[int] = set()
    in_bench = 0
    for dataset in places:
        folders = Folders(dataset, places[dataset])
        drawn = draw_from_set(folders, count, seed, seen, bench)
        if drawn.located == 0:
            raise ValueError(
                f"{drawn.missing.total()} triplets of {dataset}, none with its clips: name the "
                f"folder of its tables and, after it, that of its clips ({folders.contents()})"
            )
        in_bench += drawn.in_bench
        for category, heap in drawn.heaps.items():
            taken = [line for _, line in sorted(heap, reverse=True)]
            lines += taken
            numbers = [count, drawn.available[category], drawn.missing[category], len(taken)]
            report.append((dataset, category, *numbers))
            totals = [total + number for total, number in zip(totals, numbers, strict=True)]
    report.append(("all", "", *totals))
    for line in report:
        print("{:<11}{:<13}{:>10}{:>11}{:>11}{:>10}".format(*line))
    if bench:
        note(f"{in_bench} triplets are clips of OpenVE-Bench and are left out")
    return lines


# --- Checking -------------------------------------------------------------------------------------

TRAINING_PIXELS = (704, 1280)  # of a frame in the paper's run (§5)


def check(dataset: TripletDataset, count: int, workers: int, frames: int) -> None:
    """Print all bad rows, then decode `count` random ones as training does and print what it meets.

    Sizes are those of the full-size model, for minibatches of one clip.
    """
    factor = rvedit.preset("wan2.2-ti2v-5b").spatial_factor
    size = (frames, *TRAINING_PIXELS)

    def decode(index: int) -> str:
        try:
            _, target = fit_pair(dataset[index], size, factor, keep_aspect=True)
        except (ValueError, OSError) as error:
            return f"bad: triplet {index + 1}: {one_line(error)}"
        T, H, W, _ = target.shape
        return f"{T} {'frame' if T == 1 else 'frames'} of {W}x{H}"

    for index, problem in dataset.bad.items():
        print(f"bad: triplet {index + 1}: {problem}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [index for index in order if index not in dataset.bad][:count]
    with ThreadPool(workers) as pool:
        results = pool.imap(decode, drawn)
        found = Counter(tqdm(results, total=len(drawn), disable=None))
    print("   clips  what training would read")
    for line, times in found.most_common():
        print(f"{times:>8}  {line}")
    bad_clips = sum(line.startswith("bad") for line in found)
    without_caption = len(dataset) - len(dataset.bad) - dataset.captions
    print(
        f"{len(dataset)} triplets: {len(dataset.bad)} bad rows, {without_caption} without a "
        f"caption; {len(drawn)} decoded, {bad_clips / len(drawn):.1%} of them bad"
    )


# --- Captions -------------------------------------------------------------------------------------

CAPTION_PROMPT = (
    "These are frames of one video in order of time. Describe it in one paragraph for someone who "
    "cannot see it: who and what is there, with looks, number and place; what each does and how "
    "that changes; surroundings, light, colors, visual style, camera. Tell only what can be seen, "
    "do not mention frames, and add nothing to the description."
)
CAPTION_FRAMES = 8  # of a clip that the captioner sees
# How an answer begins that refuses to give one. A description never speaks of itself.
REFUSAL = re.compile(
    r"\W*(?:(?:I['’]m|I am) (?:\w+ )?(?:sorry|afraid|unable|not able)|sorry|unfortunately|"
    r"I (?:can['’]t|cannot|can not|couldn['’]t|could not|won['’]t|will not|don['’]t|do not)|"
    r"I apologi[sz]e|my apologies|as an? (?:AI|language model))\b",
    re.IGNORECASE,
)


def checked_caption(answer: chat.Answer) -> str:
    """The caption in an answer. ValueError if it holds none: it would be trained on as ℓ*."""
    if answer.is_cut_off:
        raise ValueError(f"the answer was cut off ({answer.finish_reason})")
    text = checked_text("caption", without_thoughts(answer))
    if not text:
        raise ValueError("the answer is empty")
    if REFUSAL.match(text):
        raise ValueError(f"the model refused: {one_line(text)}")
    return text


def caption_key(clip: str, frames: int | None, model: str) -> str:
    """What a caption depends on: another clip at the same path needs another one."""
    size = changed = None
    with contextlib.suppress(OSError):  # a clip that is not there gets no caption anyway
        status = os.stat(clip)
        size, changed = status.st_size, status.st_mtime_ns
    return json.dumps([clip, size, changed, frames, model])


def caption(dataset: TripletDataset, out: Path, url: str, model: str, workers: int) -> list[str]:
    """The rows as JSON lines, each with a new caption of its target.

    Bad rows, and rows whose target got no caption, are left out with a note. Captions are kept in
    OUT.answers as they come, so that none is asked for twice, unless the clip or the model is
    another. Raises ValueError if more than 1 in 100 targets got none.
    """

    def question_about(clip: str) -> list[dict]:
        frames = video.read_video(clip, dataset.max_frames).frames
        images = chat.image_parts(frames, CAPTION_FRAMES)
        return [*images, {"type": "text", "text": CAPTION_PROMPT}]

    async def describe(clip: str) -> dict[str, str]:
        question = await asyncio.to_thread(question_about, clip)
        return {"caption": checked_caption(await chat.ask(url, model, question))}

    for problem in dataset.bad.values():
        note(f"left out: {problem}")
    rows = [dataset.row(i) for i in range(len(dataset)) if i not in dataset.bad]
    answers = out.with_name(f"{out.name}.answers")
    clips = {row["tgt_video"] for row in rows}
    keys = {clip: caption_key(clip, dataset.max_frames, model) for clip in clips}
    jobs = {key: clip for clip, key in keys.items()}
    failed = chat.run(answers, jobs, describe, workers)
    for key, problem in failed.items():
        note(f"no caption for {jobs[key]}: {problem}")
    if len(failed) > 0.01 * len(rows):
        raise ValueError(
            f"{len(failed)} of {len(rows)} clips have no caption: run it again to ask for them, or "
            f"take their rows out of the table"
        )
    captions = chat.results(answers)
    captioned = [row for row in rows if keys[row["tgt_video"]] in captions]
    return [json.dumps(row | captions[keys[row["tgt_video"]]]) for row in captioned]


# --- Latents --------------------------------------------------------------------------------------


def clips_to_encode(
    dataset: TripletDataset,
    index: int,
    latents: Latents,
    sizes: list[tuple[int, int, int]],
    factor: int,
) -> list[tuple[Path, Tensor, Tensor]]:
    """A triplet's source and target at each size of which `latents` lacks the file, with its path.

    Raises ValueError or OSError for a triplet that is broken.
    """
    row = dataset.row(index)
    item = None
    clips = []
    for size in sizes:
        file = latents.file(row["src_video"], row["tgt_video"], size)
        if file.is_file():
            continue
        item = item or dataset[index]
        source, target = fit_pair(item, size, factor, keep_aspect=True)
        clips.append((file, source, target))
    return clips


@torch.no_grad()
def encode(
    dataset: TripletDataset,
    latents: Latents,
    vae: WanVAE,
    sizes: list[tuple[int, int, int]],
    factor: int,
) -> None:
    """Write the latents of all triplets at all sizes (T, H, W), but for those that are there.

    Broken triplets are left out with a note. Of the processes of torchrun each takes its share.
    """
    written = 0
    share = range(cli.RANK, len(dataset), cli.RANKS)
    for index in tqdm(share, unit=" triplets", disable=None):
        try:
            clips = clips_to_encode(dataset, index, latents, sizes, factor)
        except (ValueError, OSError) as error:
            note(f"left out: triplet {index + 1}: {one_line(error)}")
            continue
        for file, source, target in clips:
            tensors = {
                "source": latents_of(vae, source[None])[0].cpu(),
                "target": latents_of(vae, target[None])[0].cpu(),
            }
            file.parent.mkdir(exist_ok=True)
            with cli.replacing(file) as temporary:
                temporary.write_bytes(safetensors.torch.save(tensors))
            written += 1
    print(f"{latents.folder}: {written} files written for {len(dataset)} triplets")


# --- Command line ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = cli.Parser(
        prog="python -m experiments.datasets",
        description="Triplets to train on: draw them, check them, caption them, encode them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    natural = cli.number(int, 1)

    def command(name: str, text: str) -> cli.Parser:
        return commands.add_parser(name, help=text, description=text)

    sample = command("sample", "draw triplets from the public data sets (§5)")
    for option, dataset in zip(("--openve", "--reco", "--ditto"), SETS, strict=True):
        sample.add_argument(
            option,
            dest=dataset,
            nargs="+",
            action="extend",
            type=Path,
            metavar="DIR",
            help=f"the folder of {dataset}'s tables; then others, if its clips are elsewhere",
        )
    sample.add_argument(
        "--bench", type=Path, metavar="DIR", help="the folder of OpenVE-Bench: leave its clips out"
    )
    sample.add_argument(
        "--count",
        type=natural,
        default=10_000,
        help="triplets of each category of each set (default 10000, as in §5)",
    )
    sample.add_argument(
        "--seed", type=cli.number(int, 0), default=0, help="another seed draws others (default 0)"
    )

    look = command("check", "decode some triplets and say what training would meet")
    look.add_argument("--clips", type=natural, default=200, help="how many to decode (default 200)")

    ask = command("caption", "have a model on a server describe every target clip")
    ask.add_argument(
        "--url", required=True, help="an OpenAI-compatible server, as http://localhost:8000/v1"
    )
    ask.add_argument(
        "--model", default="Qwen/Qwen3-VL-8B-Instruct", help="default %(default)s, as in App. D.1"
    )

    code = command("encode", "write the VAE latents of every triplet, once")
    code.add_argument("--checkpoint", type=Path, help="the model that will be trained")
    code.add_argument("--wan", type=Path, help="or the folders that training will start from:")
    code.add_argument("--qwen", type=Path, help="Wan2.2-TI2V-5B and Qwen2.5-VL-3B-Instruct")
    code.add_argument(
        "--size",
        nargs=3,
        type=natural,
        action="append",
        metavar=("T", "H", "W"),
        help="that of train.py, may be given several times (default 81 704 1280)",
    )
    code.add_argument("--device", type=cli.device_of, help="default: a GPU if there is one")
    code.add_argument("--out", type=Path, required=True, help="the folder to write, or go on with")

    for command in (sample, ask):
        command.add_argument(
            "--out", type=Path, required=True, help="the .jsonl file to write, for train.py --data"
        )
    for command in (look, ask, code):
        command.add_argument("file", type=Path, metavar="FILE", help="a table of triplets")
        command.add_argument(
            "--root", type=Path, metavar="DIR", help="where relative paths start; default: at FILE"
        )
    for command in (look, ask):
        command.add_argument(
            "--frames", type=natural, default=81, help="frames of a clip to read (default 81)"
        )
        command.add_argument(
            "--workers", type=natural, default=8, help="clips that are read at a time (default 8)"
        )
    return parser.parse_args(argv)


def encode_table(args: Namespace) -> None:
    if not (args.checkpoint or args.wan or args.qwen):
        raise ValueError("name the model that will be trained: --checkpoint, or --wan and --qwen")
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == torch.device("cuda"):
        device = torch.device("cuda", cli.LOCAL_RANK)
    sizes = [tuple(size) for size in args.size or [(81, *TRAINING_PIXELS)]]
    dataset = TripletDataset(args.file, args.root, max(size[0] for size in sizes))
    config, vae = rvedit.load_vae(args.checkpoint, args.wan, args.qwen, device)
    for size in sizes:  # as train.py will
        check_size(config, size)
    encode(dataset, Latents(args.out, vae, create=True), vae, sizes, config.spatial_factor)


@cli.guarded
@cli.memory_advice("take a smaller --size, or a GPU that nothing else uses")
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.command == "check":
        dataset = TripletDataset(args.file, args.root, args.frames)
        return check(dataset, args.clips, args.workers, args.frames)
    if args.command == "encode":
        return encode_table(args)
    if args.out.suffix != ".jsonl" or not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: name a .jsonl file in a folder that exists")
    if args.command == "caption":
        dataset = TripletDataset(args.file, args.root, args.frames)
        lines = caption(dataset, args.out, args.url, args.model, args.workers)
    else:
        places = {name: vars(args)[name] for name in SETS if vars(args)[name]}
        if not places:
            raise ValueError("name a data set, such as --openve DIR")
        bench = Benchmark(args.bench) if args.bench else None
        lines = stratified_sample(places, args.count, args.seed, bench)
    cli.write_text(args.out, "".join(f"{line}\n" for line in lines))
    print(f"{args.out}: {len(lines)} triplets")


if __name__ == "__main__":
    main()
