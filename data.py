"""Instruction-video-target triplets to learn editing from (§5, App. D.1 of the paper).

`TripletDataset` reads a CSV or JSONL file; `fit_clip` brings a clip to a size. The synthetic set is in shapes.py.

Letters: T frames, H height, W width; a clip is uint8 (T, H, W, 3).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

import video
from shapes import CATEGORIES, COMPOSITION, ShapesDataset  # noqa: F401


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and fields of every row of a CSV (, or ;) or JSONL file."""
    line = 1
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            if path.suffix == ".jsonl":
                for line, text in enumerate(file, 1):
                    if text.strip():
                        row = json.loads(text)
                        yield line, row if isinstance(row, dict) else {}
                return
            header = file.readline()
            file.seek(0)
            delimiter = ";" if header.count(";") > header.count(",") else ","
            reader = csv.DictReader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():  # what DictReader makes of too many or too few fields
                    raise csv.Error('not as many fields as columns; a prompt with commas needs "double quotes"')
                yield line, row
        except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {line} or the next: {error}") from error


class TripletDataset(Dataset):
    """Rows of a CSV or JSONL file with `src_video`, `tgt_video`, `prompt` and perhaps `caption` and `category`.

    Relative paths start at `root`, by default the file's folder. An item is a dict of source and target, uint8
    (T, H, W, 3) each of its own size, cut to the shorter of the two; instruction; caption and category, "" where there
    are none. Raises ValueError, in one line that names file and line, for a file that is not such a table.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        path = Path(path)
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"{path}: triplets come in .csv or .jsonl files")
        self.root, self.rows = Path(root or path.parent), []
        for line, row in _rows(path):
            for name in ("src_video", "tgt_video", "prompt"):
                if not isinstance(row.get(name), str) or not row[name].strip():
                    raise ValueError(f"{path}, line {line}: no {name} in columns {', '.join(row) or '(none)'}")
            self.rows.append(row)
        if not self.rows:
            raise ValueError(f"{path}: no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        source, target = (video.read_video(self.root / row[name]).frames for name in ("src_video", "tgt_video"))
        length = min(len(source), len(target))
        words = dict(caption=row.get("caption") or "", category=row.get("category") or "")
        return dict(source=source[:length], target=target[:length], instruction=row["prompt"], **words)


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
