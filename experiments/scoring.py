"""How well a checkpoint edits clips of moving shapes, whose right edits are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import rvedit
import sample
import video
from scenes import EVERYTHING, NOT_THERE
from shapes import ShapesDataset
from vae import WanVAE
from video import to_float, to_uint8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# --- Scores ---------------------------------------------------------------------------------------


class Score(NamedTuple):
    inside: float  # PSNR inside the mask in dB; NaN if the edit changes nothing
    outside: float  # PSNR outside it; NaN if the edit changes everything
    temporal: float  # rms difference between the changes from frame to frame, of 255 levels
    edited: bool


def psnr(squared_error: Tensor) -> float:
    return (10 * torch.log10(255**2 / squared_error.mean())).item()


def score(output: Tensor, clip: dict[str, Any], ceiling: Tensor) -> Score:
    """How close an output is to the target of a clip of `ShapesDataset`.

    It counts as edited if both are true:
    - Inside the mask, its squared error to the target is at most a quarter of that to the source.
    - Outside, its PSNR is at least 28 dB, or within 3 dB of the ceiling's.
    ceiling: the target through the VAE. All clips are uint8 (T, H, W, 3).
    """
    output, ceiling = output.float(), ceiling.float()
    source, target, mask = clip["source"].float(), clip["target"].float(), clip["mask"]
    error = (output - target).square()  # (T, H, W, 3)
    error_to_source = (output - source).square()
    temporal = (output.diff(dim=0) - target.diff(dim=0)).square().mean().sqrt().item()
    outside = psnr(error[~mask])
    # The VAE alone may miss 28 dB: an edit cannot be better than its ceiling.
    limit = min(28, psnr((ceiling - target)[~mask].square()) - 3)
    changed = not mask.any() or bool(error[mask].mean() <= error_to_source[mask].mean() / 4)
    kept = not outside < limit  # also true if nothing is outside, where the PSNR is NaN
    return Score(psnr(error[mask]), outside, temporal, changed and kept)


@torch.no_grad()
def assess(
    model: rvedit.RVEDiT,
    vae: WanVAE,
    seed: int,
    number: int,
    extent: tuple[int, int, int],
    words: str = "plain",
    categories: tuple[str, ...] = EVERYTHING,
    world: str = "all",
) -> Iterator[tuple[str, str, list[float]]]:
    """Yield category, what is scored and its mean `Score` over `number` clips of T, H, W.

    Scored are the edits, and what bounds them: unchanged sources, and targets through the VAE.
    """
    for category in categories:
        shapes = ShapesDataset(seed, number, *extent, [category], words=words, world=world)
        scores: dict[str, list[Score]] = {}
        for index in tqdm(range(number), desc=category, disable=None, leave=False):
            clip = shapes[index]
            ceiling = to_uint8(vae.decode(vae.encode(to_float(clip["target"][None])))[0])
            outputs = {
                "edit": sample.edit_video(model, vae, clip["source"], clip["instruction"]),
                "source unchanged": clip["source"],
                "target through the VAE": ceiling,
            }
            for name, output in outputs.items():
                scores.setdefault(name, []).append(score(output, clip, ceiling))
        for name, rows in scores.items():
            yield category, name, torch.tensor(rows, dtype=torch.float64).nanmean(0).tolist()


def evaluate(
    model: rvedit.RVEDiT,
    vae: WanVAE,
    seed: int,
    number: int,
    extent: tuple[int, int, int],
    words: str = "plain",
) -> None:
    """Print a table of `assess`."""
    categories = EVERYTHING if words == "plain" else (*EVERYTHING, NOT_THERE)
    print(f"{'':<36}PSNR inside   outside   temporal error   edited")
    rows = assess(model, vae, seed, number, extent, words=words, categories=categories)
    for category, name, (inside, outside, temporal, edited) in rows:
        decibels = f"{_cell(inside, ' dB'):>11}{_cell(outside, ' dB'):>10}"
        print(f"{category:<13}{name:<23}{decibels}{_cell(temporal):>17}{edited:>9.1%}", flush=True)


def _cell(value: float, unit: str = "") -> str:
    """A dash for NaN, where there was nothing to compare."""
    return "-" if math.isnan(value) else f"{value:.2f}{unit}"


# --- Requests in a person's words -----------------------------------------------------------------

# A request counts as one that changed the clip if 2.5 % of the pixels differ by 32 of 255 levels or
# more in a channel. The smallest object covers 3.4 % of a square clip. The toy's VAE alone, which
# blurs the edges of objects, changes 1.6 % of the sample clip.
MIN_SHARE = 0.025
MIN_DIFFERENCE = 32


def read_requests(path: Path) -> list[str]:
    """The lines of a text file, without empty ones and comments (#). Raises ValueError if none."""
    lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    requests = [line for line in lines if line and not line.startswith("#")]
    if not requests:
        raise ValueError(f"{path} holds no requests: write one a line")
    return requests


def changed_share(before: Tensor, after: Tensor) -> float:
    """The share of the pixels, of uint8 clips (T, H, W, 3), that differ strongly in a channel."""
    difference = (after.int() - before.int()).abs().amax(-1)  # (T, H, W)
    return (difference >= MIN_DIFFERENCE).float().mean().item()


def contact_sheet(clips: list[Tensor], columns: int) -> Tensor:
    """The middle frames of clips of one size, row by row: uint8 (height, width, 3)."""
    tiles = []
    for clip in clips:
        frame = clip[len(clip) // 2]
        tiles.append(torch.nn.functional.pad(frame, (0, 0, 2, 2, 2, 2), value=255))
    while len(tiles) % columns:
        tiles.append(torch.full_like(tiles[0], 255))
    rows = []
    for first in range(0, len(tiles), columns):
        rows.append(torch.cat(tiles[first : first + columns], dim=1))
    return torch.cat(rows)


def try_requests(
    model: rvedit.RVEDiT, vae: WanVAE, requests: Path, clip: Path, out: Path, columns: int = 10
) -> None:
    """Edit a clip by each request of a file; write the clip and all edits as one picture.

    Prints how much each changed. Whether that is right is for a person to see.
    """
    texts = read_requests(requests)
    video.check_writable(out)
    source = video.read_video(clip).frames
    edits = []
    changed = 0
    for number, text in enumerate(texts, start=1):
        edit = sample.edit_video(model, vae, source, text)
        share = changed_share(source, edit)
        changed += share >= MIN_SHARE
        edits.append(edit)
        print(f"{number:>4}  {share:>6.1%} of the pixels change  {text}", flush=True)
    video.write_video(out, contact_sheet([source, *edits], columns).unsqueeze(0))
    print(
        f"{changed} of {len(texts)} requests change the clip; {out} shows it and its edits in order"
    )
