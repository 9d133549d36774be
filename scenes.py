"""Scenes of moving shapes: what they are made of, how they are drawn, which ones are clear.

Instructions for them are in shapes.py, and in people.py as people would type them.

Letters: T frames, H height, W width; a clip is uint8 (T, H, W, 3). Lengths are in units of
min(H, W), and y points down.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

# --- Categories of edits --------------------------------------------------------------------------

CATEGORIES = ("Local Change", "Local Remove", "Local Add", "Global Style")
COMPOSITION = "Composition"  # two edits in one instruction
EVERYTHING = (*CATEGORIES, COMPOSITION)
NOT_THERE = "Not There"  # a request for an object that the clip does not show: nothing changes

# --- What a scene is made of ----------------------------------------------------------------------

# fmt: off
COLORS = {"red": (214, 48, 58), "orange": (242, 134, 36), "yellow": (248, 208, 54),
          "green": (46, 148, 84), "cyan": (52, 196, 208), "blue": (44, 92, 206),
          "purple": (128, 62, 172), "pink": (242, 128, 178)}
SIZES = {"small": 0.105, "medium": 0.145, "large": 0.2}  # radius
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
           "diagonally up and left": (-1, -1), "diagonally up and right": (1, -1),
           "diagonally down and left": (-1, 1), "diagonally down and right": (1, 1)}
SPEED = 0.03  # a frame, also diagonally
MARGIN = 0.18  # the least distance of an object's centre from the border
PLACES = {  # (column, row) in quarters of the frame
    "at the top left": (1, 1), "at the top": (2, 1), "at the top right": (3, 1),
    "on the left": (1, 2), "in the center": (2, 2), "on the right": (3, 2),
    "at the bottom left": (1, 3), "at the bottom": (2, 3), "at the bottom right": (3, 3),
}
SIDES = {  # axis, and the sign that makes "further that way" positive
    "on the left": (0, 1), "on the right": (0, -1), "at the top": (1, 1), "at the bottom": (1, -1),
}
BACKGROUNDS = {  # the two tones of a pattern
    "cream": ((250, 243, 226), (235, 219, 187)), "sand": ((229, 211, 173), (205, 181, 138)),
    "sky": ((206, 227, 244), (170, 202, 230)), "mint": ((211, 235, 221), (172, 212, 190)),
    "lavender": ((226, 218, 242), (197, 185, 226)), "gray": ((214, 217, 222), (181, 186, 194)),
    "slate": ((98, 110, 128), (74, 84, 101)), "navy": ((40, 52, 92), (25, 33, 64)),
    "charcoal": ((66, 68, 74), (44, 45, 50)), "forest": ((48, 82, 70), (31, 58, 50)),
}
PLAIN_TONES = {"white": (255, 255, 255), "black": (0, 0, 0), **COLORS}  # what people ask for
TONES = BACKGROUNDS | {tone: (color, color) for tone, color in PLAIN_TONES.items()}
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
COLOR_MAPS = {  # rgb -> M rgb + b; every style but the mosaic is such a map
    "gray": (np.outer((1, 1, 1), LUMA), (0, 0, 0)),
    "sepia": (np.outer((0.92, 0.78, 0.6), LUMA), (20, 12, 4)),
    "green": (np.outer((0.3, 0.85, 0.4), LUMA), (0, 16, 6)),
    "negative": (-np.eye(3), (255, 255, 255)),
    "night": (np.diag((0.32, 0.42, 0.62)), (4, 10, 34)),
    "sunset": (np.diag((0.9, 0.58, 0.4)), (46, 14, 6)),
    "pastel": (np.eye(3) * 0.4, (153, 153, 153)),
}
HUELESS = ("gray", "sepia", "green", "negative")  # the caption of such a clip names no colours
# fmt: on

MIN_CONTRAST = 100  # RGB distance of a shape from the background
MIN_GAP = 0.15  # "on the left" is further left by at least this much

# --- Forms and patterns ---------------------------------------------------------------------------

FORMS = ("circle", "ring", "square", "diamond", "triangle", "cross", "heart", "star")
PATTERNS = ("plain", "gradient", "striped", "checkered", "cloudy")


def signed_distance(form: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far points are outside a form of radius 1; negative inside, exact near the outline.

    All forms are symmetric, so x is given as |x|. y points down.
    """
    if form == "circle":
        return np.hypot(x, y) - 0.95
    if form == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.28
    if form == "square":
        return np.maximum(x, np.abs(y)) - 0.86
    if form == "diamond":
        return 0.8 * x + 0.6 * np.abs(y) - 0.72
    if form == "triangle":
        below_base = y - 0.2
        beyond_side = 0.866 * x - 0.5 * (y - 0.2)
        return np.maximum(below_base, beyond_side) - 0.62
    if form == "cross":
        y = np.abs(y)
        beyond_ends = np.maximum(x, y) - 1
        beyond_arms = np.minimum(x, y) - 0.36
        return np.maximum(beyond_ends, beyond_arms)
    if form == "heart":
        square_on_its_corner = 0.7071 * (x + np.abs(y))
        half_disc = np.hypot(x - 0.4243, y + 0.4243)
        return np.minimum(square_on_its_corner, half_disc) - 0.6
    # A star. The plane is folded onto one of its ten edges, from a tip at radius 1.2 to a notch at
    # 0.6, 36 degrees (0.628) away. 1.1125 is the direction of that edge's normal, 0.531 its
    # distance.
    folded = np.abs((np.arctan2(x, -y) + 0.628) % 1.257 - 0.628)
    return np.hypot(x, y) * np.cos(folded - 1.1125) - 0.531


def second_tone(pattern: str, u: np.ndarray, v: np.ndarray, k: float, unit: int) -> np.ndarray:
    """The share of the background's second tone at (u, v); what is beyond [0, 1] gets clipped.

    k: the pattern's wave number. unit: pixels to a length of 1.
    """
    edge = unit / k  # turns the zeros of a wave into edges of one pixel
    if pattern == "gradient":
        return (u - u.min()) / (u.max() - u.min())
    if pattern == "striped":
        return 0.5 + edge * np.sin(k * u)
    if pattern == "checkered":
        return 0.5 + edge * np.sin(k * u) * np.sin(k * v)
    if pattern == "cloudy":
        wide = np.sin(k / 2 * u + 2 * np.sin(k / 3 * v))
        fine = np.sin(k / 1.5 * v + np.sin(k * u))
        return 0.5 + 0.25 * (wide + fine)
    return np.zeros_like(u)  # plain


# --- Scenes ---------------------------------------------------------------------------------------

Extent = tuple[int, int, int]  # of a clip: T, H, W


class World(NamedTuple):
    """What scenes and their edits are drawn from."""

    forms: tuple[str, ...]
    colors: tuple[str, ...]
    sizes: tuple[str, ...]
    motions: tuple[str, ...]
    tones: tuple[str, ...]
    patterns: tuple[str, ...]
    styles: tuple[str, ...]
    most: int  # objects in a scene


WORLDS = {
    "all": World(
        forms=FORMS,
        colors=tuple(COLORS),
        sizes=tuple(SIZES),
        motions=tuple(MOTIONS),
        tones=tuple(BACKGROUNDS),
        patterns=PATTERNS,
        styles=tuple(STYLES),
        most=4,
    ),
    # Learned soon, also on a CPU: there is little, and what differs, differs plainly.
    "small": World(
        forms=("circle", "cross"),
        colors=("red", "yellow", "blue"),
        sizes=("medium", "large"),
        motions=("still", "left", "right"),
        tones=("mint",),
        patterns=("plain",),
        styles=("gray", "negative"),
        most=2,
    ),
}


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
    world: World = field(default=WORLDS["all"], repr=False)  # what its edits are drawn from

    @property
    def visible_colors(self) -> list[str]:
        """The colours of its world that stand out from its background."""
        return visible_colors(self.tone, self.world)


@functools.lru_cache(maxsize=64)
def trajectory(shape: Shape, extent: Extent) -> np.ndarray:
    """The centre in every frame, (T, 2) as (x, y): a straight line, reflected at the margins."""
    T, H, W = extent
    step = np.array(MOTIONS[shape.motion]) * SPEED
    step = step / math.sqrt(max(1, np.count_nonzero(step)))  # a diagonal step is no longer
    span = np.array([W, H]) / min(H, W) - 2 * MARGIN  # between the margins
    start = np.array([shape.x, shape.y]) - MARGIN
    unfolded = start + step * np.arange(T)[:, None]  # (T, 2), as if there were no margins
    there_and_back = span - np.abs(unfolded % (2 * span) - span)  # a triangle wave from 0 to span
    return MARGIN + there_and_back


# --- Rendering ------------------------------------------------------------------------------------


class _Raster(NamedTuple):
    """A shape on the pixels that it can reach in any frame: a box of T x h x w."""

    box: tuple[slice, slice, slice]
    coverage: np.ndarray  # (T, h, w), the covered part of each pixel
    color: np.ndarray  # (T, h, 1, 3)


def _reach(centers: np.ndarray, radius: float, pixels: int, unit: int) -> tuple[slice, np.ndarray]:
    """Along one axis: the pixels that a shape can reach, and their offsets (T, n) in radii."""
    reach = 1.25 * radius  # the corners of the square are at 1.22; the rest is for soft edges
    low = max(0, math.floor((centers.min() - reach) * unit))
    high = min(pixels, math.ceil((centers.max() + reach) * unit))
    offsets = (np.arange(low, high) + 0.5) / unit - centers[:, None]
    return slice(low, high), (offsets / radius).astype(np.float32)


@functools.lru_cache(maxsize=16)  # source and target have most of their shapes in common
def _raster(shape: Shape, extent: Extent) -> _Raster:
    _, H, W = extent
    radius, unit = SIZES[shape.size], min(H, W)
    centers = trajectory(shape, extent)
    rows, y = _reach(centers[:, 1], radius, H, unit)
    columns, x = _reach(centers[:, 0], radius, W, unit)
    y = y[:, :, None]  # (T, h, 1)
    x = x[:, None, :]  # (T, 1, w)
    distance = signed_distance(shape.form, np.abs(x), y) * (radius * unit)  # (T, h, w), in pixels
    light = 1.02 - 0.08 * y[..., None]  # a little brighter at the top
    color = np.array(COLORS[shape.color], np.float32) * light
    coverage = np.clip(0.5 - distance, 0, 1)  # from 1 to 0 within a pixel of the outline
    return _Raster((slice(None), rows, columns), coverage, color)


def _background(scene: Scene, extent: Extent) -> np.ndarray:
    """The background, (H, W, 3); it is the same in every frame."""
    _, H, W = extent
    unit = min(H, W)
    y = ((np.arange(H, dtype=np.float32) + 0.5) / unit)[:, None]
    x = (np.arange(W, dtype=np.float32) + 0.5) / unit
    u = x * math.cos(scene.angle) + y * math.sin(scene.angle)  # (H, W)
    v = y * math.cos(scene.angle) - x * math.sin(scene.angle)
    share = second_tone(scene.pattern, u, v, 2 * math.pi / scene.period, unit)  # (H, W)
    share = np.clip(share, 0, 1)[..., None]
    first, second = np.array(TONES[scene.tone], np.float32)
    return first + share * (second - first)


def _to_levels(frames: np.ndarray) -> np.ndarray:
    """Round float frames to uint8; they are overwritten."""
    frames += 0.5
    return np.clip(frames, 0, 255, out=frames).astype(np.uint8)


def _mosaic(frames: np.ndarray) -> np.ndarray:
    """Average over square tiles, of which six fit into the shorter side."""
    # One axis after the other. Tiles differ in size by a pixel if six do not divide the side.
    unit = min(frames.shape[1:3])
    tiles = frames.astype(np.float32)
    for axis in (1, 2):
        tile_of_pixel = np.arange(frames.shape[axis]) * 6 // unit
        _, starts = np.unique(tile_of_pixel, return_index=True)
        lengths = np.diff(starts, append=frames.shape[axis])
        along_axis = [1, 1, 1, 1]
        along_axis[axis] = -1
        tiles = np.add.reduceat(tiles, starts, axis) / lengths.reshape(along_axis)
        tiles = tiles.repeat(lengths, axis)
    return (tiles + 0.5).astype(np.uint8)


def stylize(frames: np.ndarray, style: str) -> np.ndarray:
    """A uint8 clip (T, H, W, 3) in one of `STYLES`."""
    if style == "mosaic":
        return _mosaic(frames)
    matrix, bias = COLOR_MAPS[style]
    matrix, bias = np.asarray(matrix, np.float32), np.asarray(bias, np.float32)
    return _to_levels(frames.astype(np.float32) @ matrix.T + bias)


def render(scene: Scene, extent: Extent) -> np.ndarray:
    """Draw a scene: uint8 (T, H, W, 3)."""
    canvas = np.broadcast_to(_background(scene, extent), (*extent, 3)).copy()
    for shape in scene.shapes:
        box, coverage, color = _raster(shape, extent)
        behind = canvas[box]
        change = color - behind
        change *= coverage[..., None]  # in place: memory is what rendering waits for
        behind += change
    frames = _to_levels(canvas)
    return stylize(frames, scene.style) if scene.style else frames


# --- Drawing scenes -------------------------------------------------------------------------------


def pick(rng: np.random.Generator, options: Iterable) -> Any:
    options = list(options)
    return options[int(rng.integers(len(options)))]


@functools.cache
def visible_colors(tone: str, world: World) -> list[str]:
    """The colours of a world that stand out from both tones of a background."""
    visible = []
    for color in world.colors:
        difference = np.array(TONES[tone], np.float32) - COLORS[color]  # (2, 3)
        if np.linalg.norm(difference, axis=1).min() > MIN_CONTRAST:
            visible.append(color)
    return visible


def _sample_start(rng: np.random.Generator, motion: str, extent: Extent) -> list[float]:
    """Where a shape starts, (x, y). It does not bounce later if the frame has room for that."""
    T, H, W = extent
    start = []
    for direction, pixels in zip(MOTIONS[motion], (W, H), strict=True):
        low, high = MARGIN, pixels / min(H, W) - MARGIN
        travel = direction * SPEED * (T - 1)
        if abs(travel) < high - low:
            low, high = low - min(travel, 0), high - max(travel, 0)
        start.append(rng.uniform(low, high))
    return start


def sample_scene(
    rng: np.random.Generator, count: int, extent: Extent, world: World = WORLDS["all"]
) -> Scene:
    """`count` shapes on a background. One in five shares form and colour with the one before it."""
    angle, period = rng.uniform((0, 0.3), (math.pi, 0.5)).tolist()
    pattern = pick(rng, world.patterns)
    tone = pick(rng, world.tones)
    shapes: list[Shape] = []
    for _ in range(count):
        form = pick(rng, world.forms)
        color = pick(rng, visible_colors(tone, world))
        # Such pairs teach a model to mind size, motion and place.
        if shapes and rng.random() < 0.2:
            form, color = shapes[-1].form, shapes[-1].color
        motion = pick(rng, world.motions)
        x, y = _sample_start(rng, motion, extent)
        shapes.append(Shape(form, color, pick(rng, world.sizes), motion, x, y))
    return Scene(pattern, tone, angle, period, tuple(shapes), world=world)


def sample_source(
    rng: np.random.Generator, category: str, extent: Extent, world: World
) -> tuple[list[str], Scene]:
    """The categories of the edits in one instruction, and a scene with enough objects for them."""
    parts = [category]
    if category == COMPOSITION:  # at most one of the two is a style
        parts = rng.permutation([pick(rng, CATEGORIES[:3]), pick(rng, CATEGORIES)]).tolist()
    least = {"Local Add": 1, COMPOSITION: 3}.get(category, 2)
    count = int(rng.integers(least, world.most + 1))
    return parts, sample_scene(rng, count, extent, world)


def new_shape(rng: np.random.Generator, scene: Scene, place: str, extent: Extent) -> Shape:
    """A shape at one of PLACES. It does not move towards the border that it is near."""
    _, H, W = extent
    column, row = PLACES[place]
    quarter = 4 * min(H, W)  # quarters of the frame -> units of its shorter side
    x = column * W / quarter
    y = row * H / quarter
    inward = []
    for motion in scene.world.motions:
        dx, dy = MOTIONS[motion]
        if (column - 2) * dx <= 0 and (row - 2) * dy <= 0:
            inward.append(motion)
    form = pick(rng, scene.world.forms)
    color = pick(rng, scene.visible_colors)
    size = pick(rng, scene.world.sizes)
    motion = pick(rng, inward)
    return Shape(form, color, size, motion, x, y)


def is_clear(scene: Scene, extent: Extent) -> bool:
    """Whether every object can be told apart in at least 3/4 of the frames.

    There, at least half of it is seen, and it touches no other object of its colour.
    """
    uncovered = np.ones(extent, np.float32)  # what the shapes above leave of each pixel
    for shape in reversed(scene.shapes):
        box, coverage, _ = _raster(shape, extent)
        visible = coverage * uncovered[box]
        seen = visible.sum((1, 2)) / coverage.sum((1, 2))  # (T,)
        if (seen < 0.5).mean() > 0.25:
            return False
        uncovered[box] *= 1 - coverage
    for a, b in itertools.combinations(scene.shapes, 2):
        offset = trajectory(a, extent) - trajectory(b, extent)  # (T, 2)
        distance = np.linalg.norm(offset, axis=1)  # (T,)
        touching = distance / (SIZES[a.size] + SIZES[b.size]) < 1
        if a.color == b.color and touching.mean() > 0.25:
            return False
    return True


def twins_of(shape: Shape, pool: Iterable[Shape], *attributes: str) -> list[Shape]:
    """The other shapes that have the same values of these attributes."""
    same = []
    for other in pool:
        alike = all(getattr(other, name) == getattr(shape, name) for name in attributes)
        if other != shape and alike:
            same.append(other)
    return same


def is_furthest(shape: Shape, others: list[Shape], side: str, extent: Extent) -> bool:
    """Whether a shape is clearly nearer to a side of the frame than all others, in every frame."""
    axis, sign = SIDES[side]
    position = trajectory(shape, extent)[:, axis]  # (T,)
    for other in others:
        gap = sign * (trajectory(other, extent)[:, axis] - position)  # (T,)
        if gap.min() <= MIN_GAP:
            return False
    return True


def exchange(scene: Scene, shape: Shape, *new: Shape) -> Scene:
    """The scene with one shape replaced by others, or by none, at its place in the stack."""
    index = scene.shapes.index(shape)
    below = scene.shapes[:index]
    above = scene.shapes[index + 1 :]
    return replace(scene, shapes=below + new + above)
