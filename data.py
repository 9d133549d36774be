"""Instruction-video-target triplets to learn editing from (§5, App. D.1 of the paper), and minibatches of them.

The synthetic clips are in shapes.py, the three public sets in experiments/datasets.py.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import video
from mllm import EditEncoder
from rvedit import RVEDiTConfig
from shapes import ShapesDataset  # noqa: F401  (data.ShapesDataset is its public name)

COLUMNS = ("src_video", "tgt_video", "prompt")
MAX_BROKEN = 20  # broken triplets in a row that end a run
PATHS = {"src_video", "tgt_video", "original_video", "vace_video", "video"}  # columns of a CSV

# --- Tables ---------------------------------------------------------------------------------------


def _csv_rows(file: TextIO) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of the rows of a table with the delimiter , or ;.

    Where the prompt is the only text of a row, surplus fields are parts of it that lacked their quotes, and are put
    together again. Any other row that has too many fields, or too few, is a ValueError.
    """
    lines, mended = file.readlines() or [""], 0
    delimiter = ";" if lines[0].count(";") > lines[0].count(",") else ","
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    names = [name.strip() for name in next(reader)]
    for fields in filter(None, reader):
        whole = len(fields) == len(names)
        if len(fields) > len(names) and {*names} - PATHS - {"category", "dataset"} == {"prompt"}:
            fields, at, mended = (
                lines[reader.line_num - 1].split(delimiter),
                names.index("prompt"),
                mended + 1,
            )
            end = at + 1 + len(fields) - len(names)
            fields[at:end] = [delimiter.join(fields[at:end])]
            paths = [field for name, field in zip(names, fields, strict=False) if name in PATHS]
            whole = end > at + 1 and all(re.search(r"\.\w+\s*$", path) for path in paths)
        if not whole:
            raise ValueError(
                f'{file.name}, line {reader.line_num}: fields do not fit; commas need "double quotes"'
            )
        yield (
            reader.line_num,
            {name: field.strip() for name, field in zip(names, fields, strict=True)},
        )
    if mended:
        print(
            f"note: {file.name}: {mended} prompts whose commas lacked quotes were put together",
            file=sys.stderr,
        )


def triplets(path: Path, *names: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or JSONL file, or of a list in a .json file; what it calls `names` is called COLUMNS here.

    A row without one of them is a ValueError that shows file, line and the columns found. In .json lists, where some
    entries are known to lack a path (ReCo-Data), it is left out and counted, unless they all are such.
    """
    count, line, problems = 0, 1, []
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            lines = ((n, json.loads(text)) for n, text in enumerate(file, 1) if text.strip())
            rows = _csv_rows(file) if path.suffix == ".csv" else lines
            for line, row in enumerate(json.load(file), 1) if path.suffix == ".json" else rows:
                row = row if isinstance(row, dict) else {}
                values = [
                    value.strip() if isinstance(value := row.get(name), str) else ""
                    for name in names
                ]
                if all(values):
                    count += 1
                    yield row | dict(zip(COLUMNS, values, strict=True))
                else:
                    problems.append(
                        f"{path}, line {line}: no {names[values.index('')]} in columns {', '.join(row)}"
                    )
        except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {line} or the next: {error}") from error
    if count == 0 or (problems and path.suffix != ".json"):
        raise ValueError(problems[0] if problems else f"{path}: no rows")
    if problems:
        print(
            f"note: {len(problems)} entries are left out, the first is {problems[0]}",
            file=sys.stderr,
        )


# --- Triplets for training ------------------------------------------------------------------------


class TripletDataset(Dataset):
    """Rows of a CSV or JSONL file with `src_video`, `tgt_video`, `prompt` and perhaps `caption` and `category`.

    Relative paths start at `root`, by default the file's folder. An item is a dict of source and target, uint8
    (T, H, W, 3) each of its own size, the same first frames of both, at most `max_frames`; instruction; caption and
    category, "" where there are none. Raises ValueError, in one line that names file and line, for a file that is not
    such a table, and ValueError or OSError for an item whose clips cannot be read, are too short or are not in step.
    """

    def __init__(
        self, path: str | Path, root: str | Path | None = None, max_frames: int | None = None
    ) -> None:
        path = Path(path)
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"{path}: triplets come in .csv or .jsonl files")
        root, self.max_frames, rows = Path(root or path.parent).absolute(), max_frames, []
        for row in triplets(path, *COLUMNS):
            row = {
                name: row.get(name) or "" for name in (*COLUMNS, "caption", "category", "dataset")
            }
            rows.append(
                json.dumps(row | {name: str(root / row[name]) for name in COLUMNS[:2]}).encode()
            )
        # One string: of many objects each worker process would make a copy, just by counting references to them.
        self.text, self.ends = b"".join(rows), np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def row(self, index: int) -> dict[str, str]:
        return json.loads(self.text[self.ends[index] : self.ends[index + 1]])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.row(index)
        source, target = (video.read_video(row[name], self.max_frames) for name in COLUMNS[:2])
        length = min(len(source.frames), len(target.frames))
        if length < min(5, self.max_frames or 5):
            raise ValueError(f"{target.path}: too short, it or its source has only {length} frames")
        if abs(source.total - target.total) > 3 or abs(source.rate / target.rate - 1) > 0.01:
            here, there = (
                f"{clip.total} frames at {float(clip.rate):.4g} fps" for clip in (target, source)
            )
            raise ValueError(
                f"{target.path}: its {here} are not in step with the {there} of its source, {source.path}"
            )
        clips = dict(source=source.frames[:length], target=target.frames[:length])
        return clips | dict(
            instruction=row["prompt"], caption=row["caption"], category=row["category"]
        )


def fit_clip(frames: torch.Tensor, num_frames: int, height: int, width: int) -> torch.Tensor:
    """Scale a clip (antialiased bicubic) until it covers height x width, and cut out the centre.

    uint8 (T, H, W, 3) -> (4k+1, height, width, 3): from the first frame on, at most `num_frames`.
    """
    T, H, W, _ = frames.shape
    scale = max(height / H, width / W)
    size = max(height, round(H * scale)), max(width, round(W * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    length = (min(T, num_frames) - 1) // 4 * 4 + 1
    return video.resize(frames[:length], *size)[:, top : top + height, left : left + width]


class Triplet(NamedTuple):
    """(v, ℓ, v*, ℓ*), its clips at the size of the step that it is for."""

    source: Tensor  # v, uint8 (T, H, W, 3)
    instruction: str  # ℓ
    target: Tensor  # v*, uint8 (T, H, W, 3)
    caption: str  # ℓ*; the instruction if the triplet has none


class Batch(NamedTuple):
    """Algorithm 1, line 3: a minibatch (v, ℓ, v*, ℓ*) with t and ε."""

    source: Tensor  # v, uint8 (B, T, H, W, 3)
    target: Tensor  # v*, likewise
    t: Tensor  # (B,)
    noise: Tensor  # ε, of the latents' shape, (B, C, T', H', W')
    edit_inputs: tuple[Any, ...]  # (v, ℓ) as the MLLM reads it
    ref_inputs: tuple[Any, ...] | None  # (v*, ℓ*), likewise; None if λ = 0
    broken: int  # triplets that could not be read and were replaced


# --- Minibatches (Alg. 1, line 3) -----------------------------------------------------------------


def generator(*key: int | str) -> torch.Generator:
    """A random number generator on the CPU whose state is a function of the key alone."""
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


class Batches(Dataset):
    """The minibatches of one rank: `batches[step, micro]`, where micro counts accumulation steps.

    The samples of an optimiser step are numbered over accumulation steps, then ranks, then the
    clips of a minibatch. All that is random depends on (seed, step, number) only, so a run draws
    the same samples however they are divided. A resumed run gives the step it goes on with, and
    how many samples were trained on before, as `first_step` and `first_sample`.

    A triplet that cannot be read is listed in `broken_file`, and the next one takes its place.
    """

    def __init__(
        self,
        triplets: Dataset,
        encoder: EditEncoder,
        config: RVEDiTConfig,
        *,
        sizes: list[tuple[int, int, int]],  # (T, H, W)
        batch: int,
        accumulate: int,
        seed: int,
        timestep_shift: float,
        broken_file: Path,
        rank: int = 0,
        ranks: int = 1,
        first_step: int = 0,
        first_sample: int = 0,
        caption_fallback: bool = False,
    ) -> None:
        self.triplets = triplets
        self.encoder = encoder
        self.config = config
        self.sizes = sizes
        self.batch = batch
        self.accumulate = accumulate
        self.seed = seed
        self.timestep_shift = timestep_shift
        self.broken_file = broken_file
        self.rank = rank
        self.ranks = ranks
        self.first_step = first_step
        self.first_sample = first_sample

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
        edit_inputs = self.encoder.prepare(sources, [sample.instruction for sample in samples])
        ref_inputs = None
        if self.config.align_weight > 0:
            ref_inputs = self.encoder.prepare(targets, [sample.caption for sample in samples])
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

    def read(self, position: int, step: int) -> tuple[Triplet, int]:
        """The triplet at a position of the endless series of epochs, or the next one that can be read.

        Also returns the number of broken triplets that it replaces.
        """
        epoch, place = divmod(position, len(self.triplets))
        index = int(data_order(self.seed, epoch, len(self.triplets))[place])
        return self.next_readable(index, step)

    def next_readable(self, index: int, step: int) -> tuple[Triplet, int]:
        """The first triplet from `index` on that can be read, and the number of those before it."""
        for broken in range(MAX_BROKEN):
            candidate = (index + broken) % len(self.triplets)
            try:
                return self.load(candidate, step), broken
            except (ValueError, OSError) as error:
                self.note_broken(candidate, error)
        raise ValueError(
            f"{MAX_BROKEN} triplets, one after the other, are broken: see {self.broken_file}"
        )

    def note_broken(self, index: int, error: Exception) -> None:
        with open(self.broken_file, "a", encoding="utf-8") as file:
            file.write(f"triplet {index + 1}: {error}\n")

    def fit(self, index: int, *, step: int) -> Triplet:
        """The triplet at `index` as step `step` would train on it."""
        return self.load(index, step)

    def load(self, index: int, step: int) -> Triplet:
        item = self.triplets[index]
        frames, height, width = self.sizes[0]
        source = fit_clip(item["source"], frames, height, width)
        target = fit_clip(item["target"], frames, height, width)
        if self.batch > 1 and len(target) < frames:
            raise ValueError(
                f"it has {len(target)} frames, but with --batch above 1 all must have {frames}"
            )
        return Triplet(source, item["instruction"], target, item["caption"] or item["instruction"])
