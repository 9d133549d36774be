"""A synthetic data set without files: clips of moving shapes, an edit in words, and the exact clip after it.

The edits are of the paper's four categories (§5), or two of them in one instruction; every clip is drawn anew.
The words fix the target, by these rules of the shapes' world: an object has one of 8 forms, 8 colours and 3 sizes; it
stands still or moves in one of 8 directions, all at one speed, and bounces off the margins; of overlapping objects the
later is on top, and an added one is the last. It is named by attributes that no other object shares all of; "on the
left" is left, in every frame, of all others of its colour and form.

Letters: T frames, H height, W width; a clip is uint8 (T, H, W, 3). Lengths are in units of min(H, W), y points down.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

# --- Vocabulary -----------------------------------------------------------------------------------

CATEGORIES = ("Local Change", "Local Remove", "Local Add", "Global Style")
COMPOSITION = "Composition"  # two edits in one instruction
EVERYTHING = (*CATEGORIES, COMPOSITION)
TRAINING_MIX = (
    *EVERYTHING,
    "Local Change",
    "Local Remove",
    "Local Change",
)  # more of what is learnt last

# fmt: off
COLORS = {"red": (214, 48, 58), "orange": (242, 134, 36), "yellow": (248, 208, 54), "green": (46, 148, 84),
          "cyan": (52, 196, 208), "blue": (44, 92, 206), "purple": (128, 62, 172), "pink": (242, 128, 178)}
SIZES = {"small": 0.105, "medium": 0.145, "large": 0.2}  # radius
FORMS = {  # signed distance, near the outline, from a form of radius 1; symmetric, so x is >= 0; m: numpy or torch
    "circle": lambda m, x, y: m.hypot(x, y) - 0.95,
    "ring": lambda m, x, y: m.abs(m.hypot(x, y) - 0.72) - 0.28,
    "square": lambda m, x, y: m.maximum(x, m.abs(y)) - 0.86,
    "diamond": lambda m, x, y: 0.8 * x + 0.6 * m.abs(y) - 0.72,
    "triangle": lambda m, x, y: m.maximum(y - 0.2, 0.866 * x - 0.5 * (y - 0.2)) - 0.62,
    "cross": lambda m, x, y: m.maximum(m.maximum(x, m.abs(y)) - 1, m.minimum(x, m.abs(y)) - 0.36),
    # a square on its corner and two half discs
    "heart": lambda m, x, y: m.minimum(0.7071 * (x + m.abs(y)), m.hypot(x - 0.4243, y + 0.4243)) - 0.6,
    # the plane folded onto one of the ten edges: from a tip at 1.2 to a notch at 0.6, 36 degrees away
    "star": lambda m, x, y: m.hypot(x, y) * m.cos(m.abs((m.arctan2(x, -y) + 0.628) % 1.257 - 0.628) - 1.1125) - 0.531,
}
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
           "diagonally up and left": (-1, -1), "diagonally up and right": (1, -1),
           "diagonally down and left": (-1, 1), "diagonally down and right": (1, 1)}
SPEED = 0.03  # a frame, diagonally too
MARGIN = 0.18  # the least distance of an object's centre from the border
PLACES = {"at the top left": (1, 1), "at the top": (2, 1), "at the top right": (3, 1),  # quarters of the frame
          "on the left": (1, 2), "in the center": (2, 2), "on the right": (3, 2),
          "at the bottom left": (1, 3), "at the bottom": (2, 3), "at the bottom right": (3, 3)}
SIDES = {"on the left": (0, 1), "on the right": (0, -1), "at the top": (1, 1), "at the bottom": (1, -1)}  # axis, sign
PATTERNS = {  # the share of the second tone, cut to [0, 1]; u, v: rotated coordinates, ramp: u from 0 to 1 in a frame,
    # k: wave number, edge: makes the zeros of a wave edges of one pixel
    "plain": lambda m, u, v, ramp, k, edge: 0 * u,
    "gradient": lambda m, u, v, ramp, k, edge: ramp,
    "striped": lambda m, u, v, ramp, k, edge: 0.5 + edge * m.sin(k * u),
    "checkered": lambda m, u, v, ramp, k, edge: 0.5 + edge * m.sin(k * u) * m.sin(k * v),
    "cloudy": lambda m, u, v, ramp, k, edge: (
        0.5 + 0.25 * (m.sin(k / 2 * u + 2 * m.sin(k / 3 * v)) + m.sin(k / 1.5 * v + m.sin(k * u)))
    ),
}
BACKGROUNDS = {  # the two tones of a pattern
    "cream": ((250, 243, 226), (235, 219, 187)), "sand": ((229, 211, 173), (205, 181, 138)),
    "sky": ((206, 227, 244), (170, 202, 230)), "mint": ((211, 235, 221), (172, 212, 190)),
    "lavender": ((226, 218, 242), (197, 185, 226)), "gray": ((214, 217, 222), (181, 186, 194)),
    "slate": ((98, 110, 128), (74, 84, 101)), "navy": ((40, 52, 92), (25, 33, 64)),
    "charcoal": ((66, 68, 74), (44, 45, 50)), "forest": ((48, 82, 70), (31, 58, 50)),
}
STYLES = {  # what a clip in that style is called
    "gray": ("a black and white film", "a gray film without any color"),
    "sepia": ("an old sepia film", "a faded brown sepia photograph"),
    "green": ("a green night vision recording", "footage from a green night vision camera"),
    "negative": ("a photographic negative", "a film negative with inverted colors"),
    "night": ("a scene at night in blue moonlight", "a dark blue night scene"),
    "sunset": ("a scene in warm orange sunset light", "a warm scene at sunset"),
    "pastel": ("a pale pastel painting", "a soft picture in pale pastel colors"),
    "mosaic": ("a mosaic of large square tiles", "a coarse mosaic of square blocks"),
}
LUMA = (0.299, 0.587, 0.114)
COLOR_MAPS = {  # rgb -> M rgb + b; all styles but the mosaic are such maps
    "gray": (np.outer((1, 1, 1), LUMA), (0, 0, 0)),
    "sepia": (np.outer((0.92, 0.78, 0.6), LUMA), (20, 12, 4)),
    "green": (np.outer((0.3, 0.85, 0.4), LUMA), (0, 16, 6)),
    "negative": (-np.eye(3), (255, 255, 255)),
    "night": (np.diag((0.32, 0.42, 0.62)), (4, 10, 34)),
    "sunset": (np.diag((0.9, 0.58, 0.4)), (46, 14, 6)),
    "pastel": (np.eye(3) * 0.4, (153, 153, 153)),
}
HUELESS = ("gray", "sepia", "green", "negative")  # the caption of such a clip names no colours

REMOVE = ("remove {}", "delete {}", "erase {}", "take away {}", "get rid of {}", "remove {} from the video")
CHANGE = {  # what changes; the words
    ("color",): ("make {} {}", "paint {} {}", "turn {} {}", "change the color of {} to {}", "recolor {} in {}"),
    ("form",): ("turn {} into a {} of the same color", "change the shape of {} to a {}", "reshape {} into a {}"),
    ("size",): ("make {} {}", "resize {} to {}", "change the size of {} to {}"),
    ("color", "form"): ("replace {} with a {} {} of the same size", "swap {} for a {} {} of the same size"),
}
ADD = ("{} a {} {place}, {moving}", "{} a {} {place} that {moves}", "{place}, {} a {} {moving}")
ADD_VERBS = ("add", "insert", "place", "put", "draw")
RESTYLE = ("turn the video into {}", "make the whole video look like {}", "restyle the clip as {}",
           "render everything as {}")
JOIN = ("{} and {}", "{}, and {}", "{}, then {}", "{} and also {}")
# fmt: on

# What a clip must satisfy to be clear
MIN_AREA = 0.02  # part of the clip that the edit changes
MIN_CHANGE = 24  # of 255, root mean square over what is changed
MIN_CONTRAST = 100  # RGB distance of a shape from the background
MIN_GAP = 0.15  # "on the left" is further left by so much

# --- Scenes and how they are drawn ----------------------------------------------------------------

Extent = tuple[int, int, int]  # of a clip: T, H, W
TOY_EXTENT: Extent = (
    9,
    128,
    128,
)  # of the clips that the built-in toy was last trained on, and is measured on


@dataclass(frozen=True)
class Shape:
    form: str
    color: str
    size: str
    motion: str
    x: float  # centre in the first frame
    y: float


@dataclass(frozen=True)
class Scene:
    pattern: str  # of the background
    tone: str
    angle: float
    period: float
    shapes: tuple[Shape, ...]  # the last is on top
    style: str | None = None


@functools.lru_cache(maxsize=64)
def trajectory(shape: Shape, extent: Extent) -> np.ndarray:
    """The centre in every frame, (T, 2) as (x, y): straight on, reflected at the margins."""
    step = np.array(MOTIONS[shape.motion]) * SPEED
    step = step / math.sqrt(max(1, np.count_nonzero(step)))
    T, H, W = extent
    span = np.array([W, H]) / min(H, W) - 2 * MARGIN
    way = np.array([shape.x, shape.y]) - MARGIN + step * np.arange(T)[:, None]
    return MARGIN + span - np.abs(way % (2 * span) - span)  # a triangle wave


@functools.lru_cache(maxsize=16)  # source and target have most shapes in common
def _raster(shape: Shape, extent: Extent) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray]:
    """The box (T, h, w) of pixels that a shape comes to, how much of each it covers, and its colour (T, h, 1, 3)."""
    radius, unit = SIZES[shape.size], min(extent[1:])
    box, offsets = [slice(None)], []
    for pixels, centers in zip(
        extent[1:], trajectory(shape, extent).T[::-1], strict=True
    ):  # rows, columns
        low = max(0, math.floor((centers.min() - 1.25 * radius) * unit))
        high = min(pixels, math.ceil((centers.max() + 1.25 * radius) * unit))
        positions = (np.arange(low, high) + 0.5) / unit - centers[:, None]
        box.append(slice(low, high))
        offsets.append(
            (positions / radius).astype(np.float32)
        )  # (T, pixels), in radii from the centre
    y, x = offsets[0][:, :, None], offsets[1][:, None, :]
    distance = FORMS[shape.form](np, np.abs(x), y) * (radius * unit)  # (T, h, w), pixels
    light = 1.02 - 0.08 * y[..., None]  # a little brighter at the top
    return (
        tuple(box),
        np.clip(0.5 - distance, 0, 1),
        np.array(COLORS[shape.color], np.float32) * light,
    )


def _clear(scene: Scene, extent: Extent) -> bool:
    """Whether, in 3/4 of the frames, at least half of every shape is seen and it touches no other of its colour."""
    uncovered = np.ones(extent, np.float32)
    for shape in reversed(scene.shapes):
        box, coverage, _ = _raster(shape, extent)
        seen = (coverage * uncovered[box]).sum((1, 2)) / coverage.sum((1, 2))
        if (seen < 0.5).mean() > 0.25:
            return False
        uncovered[box] *= 1 - coverage
    for a, b in itertools.combinations(scene.shapes, 2):
        apart = np.linalg.norm(trajectory(a, extent) - trajectory(b, extent), axis=1) / (
            SIZES[a.size] + SIZES[b.size]
        )
        if a.color == b.color and (apart < 1).mean() > 0.25:
            return False
    return True


def _background(scene: Scene, extent: Extent) -> np.ndarray:
    """The background, the same in every frame, (H, W, 3)."""
    unit = min(extent[1:])
    y, x = ((np.arange(pixels, dtype=np.float32) + 0.5) / unit for pixels in extent[1:])
    u = x * math.cos(scene.angle) + y[:, None] * math.sin(
        scene.angle
    )  # (H, W), rotated coordinates
    v = y[:, None] * math.cos(scene.angle) - x * math.sin(scene.angle)
    ramp, k = (u - u.min()) / (u.max() - u.min()), 2 * math.pi / scene.period
    mix = PATTERNS[scene.pattern](np, u, v, ramp, k, unit / k)
    first, second = np.array(BACKGROUNDS[scene.tone], np.float32)
    return first + np.clip(mix, 0, 1)[..., None] * (second - first)


def stylize(frames: np.ndarray, style: str) -> np.ndarray:
    """A uint8 clip (T, H, W, 3) in one of `STYLES`."""
    if style != "mosaic":
        matrix, bias = (np.asarray(a, np.float32) for a in COLOR_MAPS[style])
        return np.clip(frames.astype(np.float32) @ matrix.T + bias + 0.5, 0, 255).astype(np.uint8)
    unit, tiles = min(frames.shape[1:3]), frames.astype(np.float32)
    for axis in (1, 2):  # averages over sixths of the shorter side
        starts = np.unique(np.arange(frames.shape[axis]) * 6 // unit, return_index=True)[1]
        lengths = np.diff(starts, append=frames.shape[axis])
        tiles = np.add.reduceat(tiles, starts, axis) / lengths.reshape(
            [-1 if a == axis else 1 for a in range(4)]
        )
        tiles = tiles.repeat(lengths, axis)
    return (tiles + 0.5).astype(np.uint8)


def render(scene: Scene, extent: Extent) -> np.ndarray:
    """Draw a scene: uint8 (T, H, W, 3)."""
    canvas = np.broadcast_to(_background(scene, extent), (*extent, 3)).copy()
    for shape in scene.shapes:
        box, coverage, color = _raster(shape, extent)
        canvas[box] += coverage[..., None] * (color - canvas[box])
    frames = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return stylize(frames, scene.style) if scene.style else frames


# --- Words and edits ------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, options: Sequence | dict) -> Any:
    return list(options)[int(rng.integers(len(options)))]


def _moving(shape: Shape) -> str:
    return "standing still" if shape.motion == "still" else f"moving {shape.motion}"


def caption(scene: Scene) -> str:
    """One sentence about all that a clip shows."""
    hue = scene.style not in HUELESS
    things = [f"a {s.size} {s.color if hue else ''} {s.form} {_moving(s)}" for s in scene.shapes]
    things = ", ".join(things[:-1]) + " and " * (len(things) > 1) + things[-1]
    kind = STYLES[scene.style][0] if scene.style else "a video"
    sentence = f"{kind.capitalize()} of {things} on a {scene.pattern} {scene.tone if hue else ''} background."
    return " ".join(sentence.split())


def refer(rng: np.random.Generator, shape: Shape, pool: Sequence[Shape], extent: Extent) -> str:
    """Words that name one shape of a pool and no other; "" if there are none."""

    def alike(*attributes: str) -> list[Shape]:
        return [
            s
            for s in pool
            if s != shape and all(getattr(s, a) == getattr(shape, a) for a in attributes)
        ]

    twins = alike("color", "form")
    names = [
        not alike("form") and f"the {shape.form}",
        not twins and f"the {shape.color} {shape.form}",
        not alike("size", "color", "form") and f"the {shape.size} {shape.color} {shape.form}",
        not alike("motion", "color", "form") and f"the {shape.color} {shape.form} {_moving(shape)}",
    ]
    for side, (axis, sign) in SIDES.items():
        gaps = [
            sign * (trajectory(twin, extent) - trajectory(shape, extent))[:, axis] for twin in twins
        ]
        names.append(
            bool(twins) and np.min(gaps) > MIN_GAP and f"the {shape.color} {shape.form} {side}"
        )
    return _pick(rng, [name for name in names if name] or [""])


@functools.cache
def _colors(tone: str) -> list[str]:
    """The colours that stand out from a background."""
    distance = {
        color: np.linalg.norm(np.subtract(BACKGROUNDS[tone], rgb), axis=1)
        for color, rgb in COLORS.items()
    }
    return [color for color in COLORS if distance[color].min() > MIN_CONTRAST]


def _sample_scene(rng: np.random.Generator, count: int, extent: Extent) -> Scene:
    """Some shapes on a background; a fifth of them differ from the one below in size, place and motion only."""
    angle, period = rng.uniform((0, 0.3), (math.pi, 0.5)).tolist()
    scene = Scene(_pick(rng, PATTERNS), _pick(rng, BACKGROUNDS), angle, period, ())
    for _ in range(count):
        form, color = _pick(rng, FORMS), _pick(rng, _colors(scene.tone))
        if scene.shapes and rng.random() < 0.2:
            form, color = scene.shapes[-1].form, scene.shapes[-1].color
        motion, start = _pick(rng, MOTIONS), []
        for direction, pixels in zip(MOTIONS[motion], extent[:0:-1], strict=True):  # along W, H
            low, high = MARGIN, pixels / min(extent[1:]) - MARGIN
            travel = direction * SPEED * (extent[0] - 1)
            if abs(travel) < high - low:  # there is room to move without bouncing
                low, high = low - min(travel, 0), high - max(travel, 0)
            start.append(rng.uniform(low, high))
        shape = Shape(form, color, _pick(rng, SIZES), motion, *start)
        scene = replace(scene, shapes=(*scene.shapes, shape))
    return scene


def _add(rng: np.random.Generator, scene: Scene, extent: Extent) -> tuple[Scene, str]:
    """A new shape on one of the places; it does not move towards the border it is near."""
    _, H, W = extent
    place = _pick(rng, PLACES)
    column, row = PLACES[place]
    center = np.array([column * W, row * H]) / (4 * min(H, W))
    inward = [
        m for m, (dx, dy) in MOTIONS.items() if (column - 2) * dx <= 0 and (row - 2) * dy <= 0
    ]
    looks = _pick(rng, FORMS), _pick(rng, _colors(scene.tone)), _pick(rng, SIZES)
    shape = Shape(*looks, _pick(rng, inward), *center.tolist())
    thing, moving = f"{shape.size} {shape.color} {shape.form}", _moving(shape)
    moves = moving.replace("standing", "stands").replace("moving", "moves")
    words = _pick(rng, ADD).format(
        _pick(rng, ADD_VERBS), thing, place=place, moving=moving, moves=moves
    )
    return replace(scene, shapes=(*scene.shapes, shape)), words


def _edit(
    rng: np.random.Generator, category: str, scene: Scene, source: Scene, extent: Extent
) -> tuple[Scene, str]:
    """One edit of a scene, in words that hold for it and for the source; "" if its object cannot be named."""
    if category == "Global Style":
        style = _pick(rng, STYLES)
        return replace(scene, style=style), _pick(rng, RESTYLE).format(_pick(rng, STYLES[style]))
    if category == "Local Add":
        return _add(rng, scene, extent)
    shape = _pick(
        rng, [s for s in scene.shapes if s in source.shapes]
    )  # not one that was edited already
    name = refer(rng, shape, tuple(dict.fromkeys(source.shapes + scene.shapes)), extent)
    index = scene.shapes.index(shape)
    below, above = scene.shapes[:index], scene.shapes[index + 1 :]
    if category == "Local Remove":
        return replace(scene, shapes=below + above), name and _pick(rng, REMOVE).format(name)
    others = dict(color=_colors(scene.tone), form=FORMS, size=SIZES)
    what = _pick(rng, CHANGE)
    new = {
        a: _pick(rng, [value for value in others[a] if value != getattr(shape, a)]) for a in what
    }
    words = _pick(rng, CHANGE[what]).format(name, *new.values()).replace(" a orange", " an orange")
    return replace(scene, shapes=(*below, replace(shape, **new), *above)), name and words


def _throw(rng: np.random.Generator, category: str, extent: Extent) -> tuple[Scene, Scene, str]:
    """A source, its edit and the instruction, "" if the edit cannot be said."""
    parts = [category]
    if category == COMPOSITION:  # at most one of the two is a style
        parts = rng.permutation([_pick(rng, CATEGORIES[:3]), _pick(rng, CATEGORIES)]).tolist()
    least = {"Local Add": 1, COMPOSITION: 3}.get(category, 2)
    source = target = _sample_scene(rng, int(rng.integers(least, 5)), extent)
    sentences = []
    for part in parts:
        target, words = _edit(rng, part, target, source, extent)
        sentences.append(words)
    instruction = _pick(rng, JOIN).format(*sentences) if len(parts) == 2 else sentences[0]
    if rng.random() < 0.5:  # the other half is as people type
        instruction = f"{instruction[:1].upper()}{instruction[1:]}."
    return source, target, instruction if all(sentences) else ""


def draw_edit(
    rng: np.random.Generator, category: str, extent: Extent, looked_at: Extent | None = None
) -> tuple[Scene, Scene, str]:
    """A source, its edit and the instruction: the dice roll until both are clear, in frames of `looked_at`'s size."""
    looked_at = looked_at or extent
    while True:
        source, target, instruction = _throw(rng, category, extent)
        if instruction and _clear(source, looked_at) and _clear(target, looked_at):
            return source, target, instruction


# --- The data set ---------------------------------------------------------------------------------


class ShapesDataset(Dataset):
    """`size` clips, each a function of (seed, index) and the arguments alone; the categories take turns.

    An item is a dict of source and target, uint8 (T, H, W, 3); mask, bool (T, H, W), of the pixels that the edit
    changes (all of them for a style); instruction; caption of the target; category.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        frames: int,
        height: int,
        width: int,
        categories: Sequence[str] = CATEGORIES,
    ) -> None:
        if not categories or not set(categories) <= {*EVERYTHING}:
            raise ValueError(f"categories {categories}: choose from {', '.join(EVERYTHING)}")
        if frames < 1 or min(height, width) < 32:
            raise ValueError(
                f"{frames} x {height} x {width}: clips of shapes need at least 1 frame of 32 x 32"
            )
        self.seed, self.size, self.categories = seed, size, tuple(categories)
        self.extent = (frames, height, width)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, target, instruction, clips, mask = self.sample(index)
        category = self.categories[index % len(self.categories)]
        words = dict(instruction=instruction, caption=caption(target), category=category)
        return (
            dict(
                zip(
                    ("source", "target", "mask"), map(torch.from_numpy, (*clips, mask)), strict=True
                )
            )
            | words
        )

    def sample(
        self, index: int
    ) -> tuple[Scene, Scene, str, tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Source and target scene, instruction, the two clips and the mask; the dice roll until all is clear."""
        if not 0 <= index < self.size:
            raise IndexError(f"clip {index} of {self.size}")
        rng, category = (
            np.random.default_rng((self.seed, index)),
            self.categories[index % len(self.categories)],
        )
        while True:
            source, target, instruction = draw_edit(rng, category, self.extent)
            clips = render(source, self.extent), render(target, self.extent)
            mask = (clips[0] != clips[1]).any(-1) | (target.style is not None)
            change = np.square(clips[0][mask].astype(np.float32) - clips[1][mask])
            if mask.mean() >= MIN_AREA and change.mean() >= MIN_CHANGE**2:
                return source, target, instruction, clips, mask
