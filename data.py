"""Triplets to learn editing from (§5, App. D.1 of the paper), and minibatches of them.

A triplet is a source clip v, an instruction ℓ, the edited clip v* and, for the reference branch, a
caption ℓ* of v*. `TripletDataset` reads triplets from a table and their clips from disk; `Batches`
makes minibatches of them, line 3 of Algorithm 1. The synthetic clips are in shapes.py. How the
public data sets become one table is in experiments/datasets.py.

One bad row never ends a run: a row that makes no sense, or a clip that cannot be read, raises
ValueError or OSError only when that triplet is asked for. `Batches` then takes the next triplet.

Letters: T H W frames, height and width of a clip; C T' H' W' the shape of its latents; B clips.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

import cli
import video
from mllm import CHAT_START, EditEncoder, max_visual_tokens
from rvedit import RVEDiTConfig
from sample import model_size
from shapes import ShapesDataset
from vae import WanVAE
from weights import what_it_is

COLUMNS = ("src_video", "tgt_video", "prompt")  # which every table of triplets has
OPTIONAL_COLUMNS = ("caption", "category", "dataset")
# Columns with the path of a clip, in our tables and in those of the public data sets.
PATH_COLUMNS = {"src_video", "tgt_video", "original_video", "vace_video", "video"}

DELIMITERS = ",;\t"  # of a CSV file: the one that its header has most of
# What R, pandas and databases write where there is nothing.
MISSING = (None, "", "NA", "N/A", "<NA>", "NaN", "nan", "None", "NULL", "null")
MAX_CHARACTERS = 10_000  # of an instruction or a caption: a longer text is a mistake in the data
MIN_FRAMES = 5  # of a clip that is not a still: two frames of latents
MAX_ASPECT = 200  # of a frame's sides: Qwen's preprocessing takes no more
MAX_STRETCH = 1.03  # of a target beside its source: sizes are rounded, 832x480 is 16:9 to most
MAX_BROKEN = 20  # this many broken triplets, one after the other, end a run

# --- Tables ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of a table: its fields by column or, if the row is bad, what is wrong with it."""

    place: str  # such as "line 3"
    fields: dict[str, Any]
    problem: str = ""  # one line; empty for a good row


def one_line(message: object) -> str:
    """A message that may quote a file: in one line, printable, and not much longer than a line."""
    words = " ".join(str(message).split())
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
    return printable if len(printable) <= 400 else f"{printable[:400]}..."


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .csv, .tsv, .jsonl or .json file, bad ones included.

    Raises OSError, and ValueError, in one line that names the file, for a file that is no table.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".json"):
        raise ValueError(f"{path}: a table is a .csv, .tsv, .jsonl or .json file")
    with open(path, "rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f'{path}: it is UTF-16: save it as UTF-8 (in Excel, "CSV UTF-8")')
    if instead := what_it_is(path):
        raise ValueError(f"{path}: {instead}")
    # A byte that is not UTF-8 becomes a lone surrogate: it spoils its own row and no other.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if kind in (".csv", ".tsv"):
            yield from _csv_rows(path, file.readlines())
        elif kind == ".jsonl":
            yield from _json_lines(file)
        else:
            yield from _json_rows(path, file.read())


def _parsed(text: str) -> Any:
    """The JSON value in a text. NaN, which pandas writes where there is nothing, is null."""
    return json.loads(text, parse_constant=lambda name: None)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """The rows of a list or, as Hugging Face's `to_json` writes them, of an object in each line."""
    if re.match(r"\s*{.*}\s*\n\s*{", text):
        return _json_lines(text.split("\n"))
    try:
        entries = _parsed(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, or damaged: {one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{path}: the JSON in it is nested too deeply") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: it does not hold a list of triplets")
    return (_object_row(f"entry {number}", entry) for number, entry in enumerate(entries, 1))


def _json_lines(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        place = f"line {number}"
        if not line.strip():
            continue
        try:
            yield _object_row(place, _parsed(line))
        except ValueError as error:  # a JSONDecodeError, or a number of thousands of digits
            yield Row(place, {}, f"not JSON: {one_line(error)}")
        except RecursionError:
            yield Row(place, {}, "the JSON is nested too deeply")


def _object_row(place: str, entry: object) -> Row:
    if isinstance(entry, dict):
        return Row(place, entry)
    return Row(place, {}, one_line(f"it is not an object with named columns: {entry!r}"))


class _Header(NamedTuple):
    """What the first lines of a CSV file say."""

    names: list[str]  # of its columns
    delimiter: str
    blanks: int  # so many empty cells a row may have behind its last column
    num_lines: int


def _csv_rows(path: Path, lines: list[str]) -> Iterator[Row]:
    """The rows of a CSV file with a delimiter of DELIMITERS and column names in its first line.

    If the prompt is the only text of a table, then the commas of a prompt without quotes are
    recognised: the parts of such a prompt are put together again. Empty cells behind the last
    column, as spreadsheets write them, are left out.
    """
    if not lines:
        return
    names, delimiter, blanks, start = _csv_header(path, lines)
    # With two texts, nobody could say to which of them a comma belongs.
    only_text_is_prompt = {*names} - PATH_COLUMNS - {"category", "dataset"} == {"prompt"}
    mended = 0
    while start < len(lines):  # the index of the first line that has not been read
        # A row may have several lines, and what a bad one has swallowed is read again: so each row
        # gets a reader of its own.
        place = f"line {start + 1}"
        rest = (lines[index] for index in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            fields = next(reader)
        except csv.Error as error:
            yield Row(place, {}, one_line(error))
            # An open quote may have swallowed good rows: reading goes on with the next line.
            start += 1
            continue
        fields = _without_blanks(fields, len(names), blanks)
        if len(fields) > len(names) and only_text_is_prompt and reader.line_num == 1:
            parts = _without_blanks(lines[start].split(delimiter), len(names), blanks)
            joined = _join_prompt(parts, names, delimiter)
            if joined:
                fields = joined
                mended += 1
        start += reader.line_num
        texts = [field.strip() for field in fields]
        if not any(texts):
            continue  # an empty line
        if len(texts) == len(names):
            yield Row(place, dict(zip(names, texts, strict=True)))
        else:
            problem = f"{len(fields)} fields for {len(names)} columns"
            if len(fields) > len(names):
                problem += '; a text with commas needs "double quotes"'
            yield Row(place, {}, problem)
    if mended:
        cli.note(f"{path}: {mended} prompts whose commas lacked quotes were put together")


def _csv_header(path: Path, lines: list[str]) -> _Header:
    """Raises ValueError for lines that name no columns, or one twice."""
    told = re.match(r'"?sep=(.)"?\s*$', lines[0])  # by a line for Excel, before the names
    line = "".join(lines[1:2]) if told else lines[0]
    delimiter = told[1] if told else max(DELIMITERS, key=line.count)
    try:
        fields = next(csv.reader([line], delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{path}: its first line does not name columns: {error}") from None
    cells = [field.strip() for field in fields]
    names = _without_blanks(cells, 0, len(cells))
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{path}: it has two columns {one_line(name)}")
    blanks = len(cells) - len(names)
    if names and names[-1] in PATH_COLUMNS | {"prompt"}:
        blanks = sys.maxsize  # no row leaves that column empty, so these are behind it
    return _Header(names, delimiter, blanks, 2 if told else 1)


def _without_blanks(fields: list[str], least: int, most: int) -> list[str]:
    """Fields without the empty ones at their end: `least` stay, and at most `most` go."""
    while len(fields) > least and most > 0 and not fields[-1].strip():
        fields = fields[:-1]
        most -= 1
    return fields


def _join_prompt(parts: list[str], names: list[str], delimiter: str) -> list[str] | None:
    """A row's fields, with all surplus parts in its prompt; None if nobody could say which are."""
    # An empty part at the end is that of the last column, or it lies behind it.
    if not parts[-1].strip() and _with_prompt_joined(parts[:-1], names, delimiter):
        return None
    return _with_prompt_joined(parts, names, delimiter)


def _with_prompt_joined(parts: list[str], names: list[str], delimiter: str) -> list[str] | None:
    """See `_join_prompt`; None if there are too few parts, or if a path then has no ending."""
    surplus = len(parts) - len(names)
    if surplus < 0:
        return None
    first = names.index("prompt")
    last = first + surplus
    prompt = delimiter.join(parts[first : last + 1])
    fields = [*parts[:first], prompt, *parts[last + 1 :]]
    for name, field in zip(names, fields, strict=True):
        if name in PATH_COLUMNS and not re.search(r"\.\w+\s*$", field):
            return None
    return fields


def read_table(path: Path, *names: str) -> Iterator[Row]:
    """The rows of a table; what it calls `names` is called COLUMNS in the fields of good rows.

    A row is bad unless it has a text in each of `names` and a text or nothing in OPTIONAL_COLUMNS.
    Errors are those of `read_rows`.
    """
    for row in read_rows(path):
        if row.problem:
            yield row
            continue
        try:
            texts = _checked_texts(row.fields, names)
        except ValueError as error:
            yield Row(row.place, {}, one_line(error))
        else:
            yield Row(row.place, row.fields | texts)


def _checked_texts(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    """The texts of a row in the columns COLUMNS and OPTIONAL_COLUMNS; ValueError for a bad row."""
    texts = dict.fromkeys(OPTIONAL_COLUMNS, "")
    named = dict(zip(COLUMNS, names, strict=True)) | {name: name for name in OPTIONAL_COLUMNS}
    for column, name in named.items():
        text = fields.get(name)
        if text not in MISSING:
            texts[column] = checked_text(name, text)
            if not texts[column]:  # one of spaces was meant to be a text, and got lost
                raise ValueError(f"its {name} is blank")
        elif column in COLUMNS:
            raise ValueError(f"no {name} in columns {', '.join(map(str, fields))}")
    if os.path.normpath(texts["src_video"]) == os.path.normpath(texts["tgt_video"]):
        raise ValueError(f"its {names[1]} is its {names[0]}")
    return texts


def checked_text(name: str, text: object) -> str:
    """A text of a row, without spaces around it. ValueError for what `read_table` takes as bad."""
    if not isinstance(text, str):
        raise ValueError(f"its {name} is not a text: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"its {name} is not valid UTF-8: {text!r}") from None
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"its {name} has {len(text)} characters, more than {MAX_CHARACTERS}")
    return text.strip()


def triplets(path: Path, *names: str) -> Iterator[dict[str, Any]]:
    """The rows of a table of which none may be bad, with `names` as in `read_table`.

    Raises ValueError, in one line that names file and row, for the first bad row and for no rows.
    """
    row = None
    for row in read_table(path, *names):
        if row.problem:
            raise ValueError(f"{path}, {row.place}: {row.problem}")
        yield row.fields
    if row is None:
        raise ValueError(f"{path}: no rows")


# --- Triplets -------------------------------------------------------------------------------------


class TripletDataset(Dataset):
    """Triplets of a table with the columns COLUMNS, and perhaps OPTIONAL_COLUMNS.

    Relative paths start at `root`, by default the folder of the file. An item is a dict:
    - source, target: uint8 (T, H, W, 3), each of its own size; the same first frames of both, at
      most `max_frames` of them; T is 1 for stills;
    - instruction; caption and category, "" where there is none;
    - source_path, target_path: of the clips.

    Raises ValueError, in one line that names the file, for a file that has no good row. A bad row
    is an item that raises ValueError; so are clips that are too short or not in step, and clips
    that cannot be read, which may also raise OSError.
    """

    def __init__(
        self, path: str | Path, root: str | Path | None = None, max_frames: int | None = None
    ) -> None:
        self.path = Path(path)
        self.max_frames = max_frames
        root = str(Path(root or self.path.parent).absolute())
        self.bad: dict[int, str] = {}  # what is wrong with bad rows, by index
        self.captions = 0  # number of good rows with a caption
        # All rows in one object: of many each worker process would make a copy, just by counting
        # references to them.
        self.text = bytearray()
        self.ends = array("q")  # of the rows in it
        for row in read_table(self.path, *COLUMNS):
            if row.problem:
                self.bad[len(self)] = f"{self.path}, {row.place}: {row.problem}"
            else:
                fields = {name: row.fields[name] for name in (*COLUMNS, *OPTIONAL_COLUMNS)}
                for name in ("src_video", "tgt_video"):
                    # Windows writes backslashes. Joined as texts, which is faster than as Paths.
                    fields[name] = os.path.join(root, fields[name].replace("\\", "/"))
                self.captions += fields["caption"] != ""
                self.text += json.dumps(fields).encode()
            self.ends.append(len(self.text))
        if not self.ends:
            raise ValueError(f"{path}: no rows")
        if len(self.bad) == len(self):
            raise ValueError(self.bad[0])

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, index: int) -> dict[str, str]:
        """The fields of a row, with absolute paths; ValueError for a bad row."""
        if index in self.bad:
            raise ValueError(self.bad[index])
        start = self.ends[index - 1] if index else 0
        return json.loads(self.text[start : self.ends[index]])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.row(index)
        # Only the first frames are decoded; a Video also knows how many there are in all.
        source = video.read_video(row["src_video"], self.max_frames)
        target = video.read_video(row["tgt_video"], self.max_frames)
        length = min(len(source.frames), len(target.frames))
        stills = source.total == target.total == 1
        if not stills:
            self.check_in_step(source, target, length)
        return dict(
            source=source.frames[:length],
            target=target.frames[:length],
            instruction=row["prompt"],
            caption=row["caption"],
            category=row["category"],
            source_path=row["src_video"],
            target_path=row["tgt_video"],
        )

    def check_in_step(self, source: video.Video, target: video.Video, length: int) -> None:
        """Raise ValueError for clips that are too short, or whose frames are of other moments."""
        if length < min(MIN_FRAMES, self.max_frames or MIN_FRAMES):
            raise ValueError(f"{target.path}: too short, it or its source has only {length} frames")
        # An edit made frame by frame has as many frames, and the rate of the program that wrote it.
        # Others may lack a frame or two at the end, and say 30 fps for 29.97. More than that would
        # pair frames of different moments.
        missing = abs(source.total - target.total)
        if missing > 3 or (missing and abs(source.rate / target.rate - 1) > 0.01):
            here = f"{target.total} frames at {float(target.rate):.4g} fps"
            there = f"{source.total} frames at {float(source.rate):.4g} fps"
            raise ValueError(
                f"{target.path}: its {here} are not in step with the {there} of its source, "
                f"{source.path}"
            )


def tables_of(dataset: Dataset) -> list[TripletDataset]:
    """The tables that a data set consists of; none if its clips are synthetic."""
    if isinstance(dataset, TripletDataset):
        return [dataset]
    if isinstance(dataset, ConcatDataset):
        return [table for part in dataset.datasets for table in tables_of(part)]
    return []


def caption_share(dataset: Dataset) -> float:
    """The share of triplets that have a caption ℓ*, from 0 to 1. Synthetic clips all have one.

    The reference branch reads a triplet's instruction in place of a caption that it lacks.
    """
    tables = tables_of(dataset)
    if not tables:
        return 1.0
    good_rows = sum(len(table) - len(table.bad) for table in tables)
    return sum(table.captions for table in tables) / good_rows


def require_captions(dataset: Dataset) -> None:
    """Raise ValueError for a table that has no caption at all."""
    for table in tables_of(dataset):
        if table.captions == 0:
            raise ValueError(
                f"{table.path}: no triplet has a caption, which the reference branch reads. Make "
                f"them (`python -m experiments.datasets caption`), or add --caption-fallback to "
                f"let it read the instructions, or --align-weight 0 to train without it"
            )


def fingerprint(paths: list[Path]) -> str:
    """A hash of the bytes of some tables: what a resumed run compares."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- From clips to the sizes of a step ------------------------------------------------------------


def check_size(config: RVEDiTConfig, size: tuple[int, int, int]) -> None:
    """Raise ValueError for a --size (T, H, W) that no clip of this model has."""
    T, H, W = size
    frames, pixels = config.vae.temporal_factor, config.spatial_factor
    if (T - 1) % frames or H % pixels or W % pixels:
        raise ValueError(
            f"--size {T} {H} {W}: take {frames}k + 1 frames with sides in multiples of {pixels}"
        )


def fit_clip(frames: Tensor, num_frames: int, height: int, width: int) -> Tensor:
    """Scale a clip (antialiased bicubic) until it covers height x width, and cut out the centre.

    uint8 (T, H, W, 3) -> (4k+1, height, width, 3): from the first frame on, at most `num_frames`.
    """
    T, H, W, _ = frames.shape
    scale = max(height / H, width / W)
    scaled_height = max(height, round(H * scale))
    scaled_width = max(width, round(W * scale))
    top = (scaled_height - height) // 2
    left = (scaled_width - width) // 2
    length = (min(T, num_frames) - 1) // 4 * 4 + 1  # 4k + 1 frames, as the VAE takes them
    scaled = video.resize(frames[:length], scaled_height, scaled_width)
    return scaled[:, top : top + height, left : left + width]


def training_size(height: int, width: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """The sides at which a clip is trained on, multiples of `factor`: those that sampling chooses.

    Sampling stretches a clip a little to sides that were rounded. Training scales and crops it,
    because source and target must keep the shapes of things. So where `sample.model_size` would
    enlarge the clip, or would cut off more than a factor, sides are rounded down instead.
    Raises ValueError for a clip that is too small or too narrow.
    """
    sides = list(model_size(height, width, max_pixels, factor))
    while True:  # shorten the side that asks for the larger scale, until both conditions hold
        scales = sides[0] / height, sides[1] / width
        scale = max(scales)  # the smallest at which the clip covers both sides
        cut_rows = round(height * scale) - sides[0]
        cut_columns = round(width * scale) - sides[1]
        if scale <= 1 and max(cut_rows, cut_columns) <= factor:
            return sides[0], sides[1]
        sides[scales.index(scale)] -= factor
        if min(sides) == 0:
            raise ValueError(
                f"{width}x{height} is too small or too narrow for a model that takes "
                f"{max_pixels} pixels in multiples of {factor}"
            )


def fit_pair(
    item: dict[str, Any], size: tuple[int, int, int], factor: int, keep_aspect: bool
) -> tuple[Tensor, Tensor]:
    """Source and target of a triplet at the size they are trained on, uint8 (T, H, W, 3) both.

    size: (T, H, W). With keep_aspect it is an upper limit, of frames and of pixels, and both clips
    get the `training_size` of the source; without, it is the size itself. Of clips of different
    aspects one would lose what the other keeps: they are refused.
    Raises ValueError for a triplet that nothing can be learned from.
    """
    name = item.get("target_path", "a clip")
    source, target = item["source"], item["target"]
    frames, height, width = size
    for clip in (source, target):
        H, W = clip.shape[1:3]
        if min(H, W) < factor:
            raise ValueError(
                f"{name}: it or its source is {W}x{H}, the model needs {factor} pixels a side"
            )
    (H, W), (target_H, target_W) = source.shape[1:3], target.shape[1:3]
    stretch = (target_W / target_H) / (W / H)
    if max(stretch, 1 / stretch) > MAX_STRETCH:
        raise ValueError(
            f"{name}: it is {target_W}x{target_H}, its source {W}x{H}, which is another aspect"
        )
    if keep_aspect:
        try:
            height, width = training_size(H, W, height * width, factor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{name}: one side is more than {MAX_ASPECT} times the other")
    source = fit_clip(source, frames, height, width)
    target = fit_clip(target, frames, height, width)
    if not keep_aspect and len(source) < frames:
        raise ValueError(
            f"{name}: it gives {len(source)} frames, but with --batch above 1 all clips of a step "
            f"have those of --size, {frames}"
        )
    if torch.equal(source, target):
        raise ValueError(f"{name}: it is the same as its source, there is no edit to learn")
    return source, target


# --- Latents that were encoded before -------------------------------------------------------------


class Latents:
    """A folder with the VAE latents of triplets, for runs that would encode the same clips again.

    `python -m experiments.datasets encode` writes it. It holds latents.json, with a hash of the
    VAE, and a safetensors file for each triplet and size (T, H, W), with the float32 latents
    (C, T', H', W') of `source` and `target` as `fit_pair` gives these, with their aspect kept. A
    file's name is a hash of the normal paths of both clips, their sizes in bytes, and (T, H, W).
    Raises ValueError for a folder that is none of that VAE's; `create` makes a new one.
    """

    def __init__(self, folder: Path, vae: WanVAE, create: bool = False) -> None:
        self.folder = folder
        # One small layer stands for the VAE: another training or precision changes all of them.
        weight = vae.conv1.weight.detach().cpu().contiguous()
        wanted = {"vae": hashlib.sha256(weight.numpy().tobytes()).hexdigest()}
        description = folder / "latents.json"
        if create and not description.exists():
            folder.mkdir(parents=True, exist_ok=True)
            cli.write_text(description, json.dumps(wanted))
        if not description.is_file():
            raise ValueError(f"{folder} is not a folder of latents: it has no latents.json")
        if json.loads(description.read_text()) != wanted:
            raise ValueError(f"{folder} holds latents of another VAE, or in another precision")

    def file(self, source_path: str, target_path: str, size: tuple[int, int, int]) -> Path:
        """Where the latents of a triplet are. OSError if one of its clips is not there."""
        paths = (source_path, target_path)
        clips = [(os.path.normpath(path), os.path.getsize(path)) for path in paths]
        name = hashlib.sha256(repr((clips, *size)).encode()).hexdigest()
        # 256 folders, because some file systems are slow with 100,000 files in one.
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def read(self, item: dict[str, Any], size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """The latents of a triplet's source and target. ValueError if they are not there."""
        file = self.file(item["source_path"], item["target_path"], size)
        if not file.is_file():
            raise ValueError(
                f"{item['target_path']}: {self.folder} lacks its latents at this --size; make them "
                f"with `python -m experiments.datasets encode`"
            )
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged, remove it: {one_line(error)}") from None
        return tensors["source"], tensors["target"]


def latents_of(vae: WanVAE, clips: Tensor) -> Tensor:
    """VAE(clips), float32 (B, C, T', H', W'), for what a `Batch` has as its source or target."""
    if clips.is_floating_point():
        return clips  # they were encoded before
    return vae.encode(video.to_float(clips))


# --- Minibatches (Alg. 1, line 3) -----------------------------------------------------------------


class Triplet(NamedTuple):
    """(v, ℓ, v*, ℓ*), with both clips at the size of an optimiser step."""

    source: Tensor  # v, uint8 (T, H, W, 3)
    instruction: str  # ℓ
    target: Tensor  # v*, uint8 (T, H, W, 3)
    caption: str  # ℓ*; the instruction if the triplet has none
    latents: tuple[Tensor, Tensor] | None = None  # VAE(v), VAE(v*), if encoded before


class Batch(NamedTuple):
    """Algorithm 1, line 3: a minibatch (v, ℓ, v*, ℓ*) with t and ε."""

    source: Tensor  # v, uint8 (B, T, H, W, 3); or VAE(v), (B, C, T', H', W'): see `latents_of`
    target: Tensor  # v*, in the same form
    t: Tensor  # (B,)
    noise: Tensor  # ε, of the latents' shape, (B, C, T', H', W')
    edit_inputs: tuple[Any, ...]  # (v, ℓ) as the MLLM reads it
    ref_inputs: tuple[Any, ...] | None  # (v*, ℓ*) for it; None if λ = 0
    broken: int  # triplets that could not be read and were replaced


def generator(*key: int | str) -> torch.Generator:
    """A random number generator on the CPU whose state is a function of the key alone."""
    # Not hash(key): for strings, its value differs from process to process.
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw(
    seed: int, step: int, sample: int, shape: tuple[int, ...], shift: float
) -> tuple[Tensor, Tensor]:
    """Draw t from U[0, 1] and ε from N(0, I) for one sample of an optimiser step.

    A shift s other than 1 moves t towards noise: u becomes s·u / (1 + (s - 1)·u).
    """
    random = generator(seed, "noise", step, sample)
    u = torch.rand((), generator=random)
    t = shift * u / (1 + (shift - 1) * u)
    return t, torch.randn(shape, generator=random)


@functools.lru_cache(maxsize=2)
def data_order(seed: int, epoch: int, length: int) -> Tensor:
    """The order in which an epoch goes through the triplets, a permutation of 0 ... length - 1."""
    return torch.randperm(length, generator=generator(seed, "order", epoch))


def count_tokens(tokenizer: Tokenizer, text: str, verbatim: bool = True) -> int:
    """How many tokens a text makes. verbatim: spelt special tokens are ordinary text."""
    tokenizer.encode_special_tokens = verbatim
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def max_text_tokens(config: RVEDiTConfig, tokenizer: Tokenizer, max_pixels: int) -> int:
    """How many tokens of text the MLLM's context holds beside any clip or still, and the queries.

    Below 1 for a size that leaves no room.
    max_pixels: of a still, which the MLLM reads at its full size.
    """
    clip_tokens = max_visual_tokens(config)
    still_tokens = math.ceil(max_pixels / config.qwen.vision.token_side**2)
    queries = max(config.num_editing_tokens, config.num_image_tokens)
    # And a few that close the clip and the turn.
    chat_tokens = count_tokens(tokenizer, CHAT_START, verbatim=False) + 8
    others = max(clip_tokens, still_tokens) + queries + chat_tokens
    return config.qwen.max_position_embeddings - others


@dataclasses.dataclass(eq=False, repr=False)
class Batches(Dataset):
    """The minibatches of one rank: `batches[step, micro]`, where micro counts accumulation steps.

    Where ranks share clips (sequence.py), a group of ranks counts as one here.
    The samples of an optimiser step are numbered over accumulation steps, then ranks, then the
    clips of a minibatch. All that is random depends on (seed, step, number) only, so a run draws
    the same samples however they are divided. A resumed run gives the step it goes on with, and
    how many samples were trained on before, as `first_step` and `first_sample`.

    Sizes (T, H, W) have 4k+1 frames and sides that are multiples of the spatial factor. Each
    optimiser step takes one of them, the same on all ranks:
    - Minibatches of one clip from a table keep the clip's aspect. The size is the upper limit of
      its frames and pixels; a still stays a still.
    - Minibatches of several clips, which must have one shape, are scaled and cropped to the size.
      A clip that has fewer frames is broken; T = 1 takes stills and the first frames of clips.
    - Synthetic clips are painted at the size.

    With `latents` a batch holds latents in place of clips, which are then read for the MLLM only.
    A triplet that is broken is listed in `broken_file`, and the next one takes its place.
    Raises ValueError for sizes that leave no room for text, and for latents without a table.
    """

    triplets: Dataset
    encoder: EditEncoder
    config: RVEDiTConfig
    _: dataclasses.KW_ONLY
    sizes: list[tuple[int, int, int]]  # (T, H, W)
    batch: int
    accumulate: int
    seed: int
    timestep_shift: float
    broken_file: Path
    rank: int = 0
    ranks: int = 1
    first_step: int = 0
    first_sample: int = 0
    latents: Latents | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.keep_aspect = self.batch == 1 and not isinstance(self.triplets, ShapesDataset)
        if self.latents and not self.keep_aspect:
            raise ValueError("--latents works with --data and a --batch of 1")
        max_pixels = max(height * width for _, height, width in self.sizes)
        self.max_text_tokens = max_text_tokens(config, self.encoder.tokenizer, max_pixels)
        if self.max_text_tokens < 1:
            raise ValueError(
                f"--size: a still of {max_pixels} pixels leaves no room for text in the MLLM's "
                f"context of {config.qwen.max_position_embeddings} tokens; take a smaller --size"
            )

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        step, micro = key
        first_number = (micro * self.ranks + self.rank) * self.batch
        step_samples = self.accumulate * self.ranks * self.batch
        first_position = self.first_sample + (step - self.first_step) * step_samples

        samples: list[Triplet] = []
        ts: list[Tensor] = []
        noises: list[Tensor] = []
        broken = 0
        for number in range(first_number, first_number + self.batch):
            sample, replaced = self.read(first_position + number, step)
            shape = self.latent_shape(sample.target)
            t, noise = draw(self.seed, step, number, shape, self.timestep_shift)
            samples.append(sample)
            ts.append(t)
            noises.append(noise)
            broken += replaced

        sources = [sample.source for sample in samples]
        targets = [sample.target for sample in samples]
        # Tokenized here, in a worker process, while the GPU is busy with the step before.
        edit_inputs = self.encoder.prepare(sources, [sample.instruction for sample in samples])
        ref_inputs = None  # without the alignment loss, nothing reads (v*, ℓ*)
        if self.config.align_weight > 0:
            ref_inputs = self.encoder.prepare(targets, [sample.caption for sample in samples])
        if self.latents:
            sources = [sample.latents[0] for sample in samples]
            targets = [sample.latents[1] for sample in samples]
        return Batch(
            source=torch.stack(sources),
            target=torch.stack(targets),
            t=torch.stack(ts),
            noise=torch.stack(noises),
            edit_inputs=edit_inputs,
            ref_inputs=ref_inputs,
            broken=broken,
        )

    def latent_shape(self, clip: Tensor) -> tuple[int, int, int, int]:
        """(C, T', H', W') of the latents of a clip (T, H, W, 3)."""
        T, H, W, _ = clip.shape
        vae = self.config.vae
        latent_frames = (T - 1) // vae.temporal_factor + 1
        return vae.z_dim, latent_frames, H // vae.spatial_factor, W // vae.spatial_factor

    def size(self, step: int) -> tuple[int, int, int]:
        """(T, H, W) of an optimiser step."""
        choice = torch.randint(len(self.sizes), (), generator=generator(self.seed, "size", step))
        return self.sizes[int(choice)]

    def read(self, position: int, step: int) -> tuple[Triplet, int]:
        """The triplet at a position in the endless series of epochs, as `next_good` gives it."""
        epoch, place = divmod(position, len(self.triplets))
        index = int(data_order(self.seed, epoch, len(self.triplets))[place])
        return self.next_good(index, step)

    def next_good(self, first: int, step: int) -> tuple[Triplet, int]:
        """The first triplet from an index on that is not broken, as a step trains on it.

        Also returns how many broken ones it replaces.
        """
        for broken in range(MAX_BROKEN):
            index = (first + broken) % len(self.triplets)
            try:
                return self.load(index, step), broken
            except (ValueError, OSError) as error:
                # Appended in one write, because several workers may write at once.
                with open(self.broken_file, "a", encoding="utf-8") as file:
                    file.write(f"triplet {index + 1}: {one_line(error)}\n")
        raise ValueError(
            f"{MAX_BROKEN} triplets, one after the other, are broken: see {self.broken_file}"
        )

    def load(self, index: int, step: int) -> Triplet:
        """Read a triplet at the size of a step. Raises ValueError or OSError if it is broken."""
        size = self.size(step)
        triplets = self.triplets
        if isinstance(triplets, ShapesDataset):
            # To paint at the size of the step is better than to cut shapes off.
            triplets = triplets.at(size)
        item = triplets[index]
        instruction = item["instruction"]
        caption = item["caption"] or instruction
        tokens = max(count_tokens(self.encoder.tokenizer, text) for text in (instruction, caption))
        if tokens > self.max_text_tokens:
            name = item.get("target_path", "a clip")
            raise ValueError(
                f"{name}: its instruction or caption makes {tokens} tokens, the model has room for "
                f"{self.max_text_tokens} beside a clip"
            )
        if isinstance(triplets, ShapesDataset):
            # A request for what is not there has its source as the target: nothing is broken.
            source, target = item["source"], item["target"]
        else:
            source, target = fit_pair(item, size, self.config.spatial_factor, self.keep_aspect)
        latents = self.latents.read(item, size) if self.latents else None
        return Triplet(source, instruction, target, caption, latents)
