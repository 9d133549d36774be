"""A synthetic data set without files: moving shapes, an edit in words, and the exact clip after it.

The edits are of the paper's four categories (§5), or two of them in one instruction. The words fix
the target, because the world has these rules:
- An object has one of 8 forms, 8 colours and 3 sizes. It stands still or moves in one of 8
  directions, always at the same speed, and bounces off the margins.
- Of overlapping objects the later one is on top, and an added object is the last.
- An object is named by attributes that no other object shares all of. "On the left" means: in every
  frame further left than all other objects of its colour and form.

Letters: T frames, H height, W width; a clip is uint8 (T, H, W, 3). Lengths are in units of
min(H, W), and y points down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

import people
from scenes import (
    CATEGORIES,
    COMPOSITION,
    EVERYTHING,
    HUELESS,
    NOT_THERE,
    PLACES,
    SIDES,
    STYLES,
    WORLDS,
    Extent,
    Scene,
    Shape,
    World,
    exchange,
    is_clear,
    is_furthest,
    new_shape,
    pick,
    render,
    sample_source,
    twins_of,
)

# What training draws from: what is learnt last comes more often.
TRAINING_MIX = (*EVERYTHING, "Local Change", "Local Remove", "Local Change")

# The clips that the built-in checkpoint was last trained on, and that it is measured on.
TOY_EXTENT: Extent = (9, 128, 128)

# How instructions are worded. "plain": by the templates of this file. "people": a third by these,
# the rest by people.py. "held-out": by people.py, each with words that "people" never has.
WORDINGS = ("plain", "people", "held-out")

# --- Instructions ---------------------------------------------------------------------------------

# fmt: off
REMOVE = ("remove {}", "delete {}", "erase {}", "take away {}", "get rid of {}",
          "remove {} from the video")
CHANGE = {  # what changes, and the words for it
    ("color",): ("make {} {}", "paint {} {}", "turn {} {}", "change the color of {} to {}",
                 "recolor {} in {}"),
    ("form",): ("turn {} into a {} of the same color", "change the shape of {} to a {}",
                "reshape {} into a {}"),
    ("size",): ("make {} {}", "resize {} to {}", "change the size of {} to {}"),
    ("color", "form"): ("replace {} with a {} {} of the same size",
                        "swap {} for a {} {} of the same size"),
}
ADD = ("{} a {} {place}, {moving}", "{} a {} {place} that {moves}", "{place}, {} a {} {moving}")
ADD_VERBS = ("add", "insert", "place", "put", "draw")
RESTYLE = ("turn the video into {}", "make the whole video look like {}", "restyle the clip as {}",
           "render everything as {}")
JOIN = ("{} and {}", "{}, and {}", "{}, then {}", "{} and also {}")
# fmt: on

# What a clip must satisfy, so that its edit can be seen.
MIN_AREA = 0.02  # part of the clip that the edit changes
MIN_CHANGE = 24  # of 255, root mean square over what is changed

# --- Words ----------------------------------------------------------------------------------------


def _moving(shape: Shape) -> str:
    return "standing still" if shape.motion == "still" else f"moving {shape.motion}"


def _listed(things: list[str]) -> str:
    """ "a, b and c"."""
    if len(things) < 2:
        return things[0] if things else "nothing"
    return ", ".join(things[:-1]) + " and " + things[-1]


def caption(scene: Scene) -> str:
    """One sentence that says all that a clip shows."""
    # The reference branch reads it (ℓ*), so it must not tell what a style has made invisible.
    has_hue = scene.style not in HUELESS
    things = []
    for shape in scene.shapes:
        color = shape.color if has_hue else ""
        things.append(f"a {shape.size} {color} {shape.form} {_moving(shape)}")
    kind = STYLES[scene.style][0] if scene.style else "a video"
    tone = scene.tone if has_hue else ""
    ground = f"a {scene.pattern} {tone} background"
    sentence = f"{kind.capitalize()} of {_listed(things)} on {ground}."
    return " ".join(sentence.split())  # without the gaps where no colour is named


def refer(rng: np.random.Generator, shape: Shape, pool: Sequence[Shape], extent: Extent) -> str:
    """Words that name one shape of a pool and no other; "" if there are none."""
    name = f"{shape.color} {shape.form}"
    ways = {  # attributes, and the words that say them
        ("form",): f"the {shape.form}",
        ("color", "form"): f"the {name}",
        ("size", "color", "form"): f"the {shape.size} {name}",
        ("motion", "color", "form"): f"the {name} {_moving(shape)}",
    }
    names = [words for attributes, words in ways.items() if not twins_of(shape, pool, *attributes)]
    twins = twins_of(shape, pool, "color", "form")
    for side in SIDES:
        if twins and is_furthest(shape, twins, side, extent):
            names.append(f"the {name} {side}")
    return pick(rng, names or [""])


# --- Edits ----------------------------------------------------------------------------------------


def _restyle(rng: np.random.Generator, scene: Scene) -> tuple[Scene, str]:
    style = pick(rng, scene.world.styles)
    template = pick(rng, RESTYLE)
    return replace(scene, style=style), template.format(pick(rng, STYLES[style]))


def _add(rng: np.random.Generator, scene: Scene, extent: Extent) -> tuple[Scene, str]:
    place = pick(rng, PLACES)
    shape = new_shape(rng, scene, place, extent)
    moving = _moving(shape)
    moves = moving.replace("standing", "stands").replace("moving", "moves")
    template, verb = pick(rng, ADD), pick(rng, ADD_VERBS)
    thing = f"{shape.size} {shape.color} {shape.form}"
    words = template.format(verb, thing, place=place, moving=moving, moves=moves)
    return replace(scene, shapes=(*scene.shapes, shape)), words


def _change(rng: np.random.Generator, scene: Scene, shape: Shape, name: str) -> tuple[Scene, str]:
    """Other values for some attributes of a shape that is called `name`."""
    values = {
        "color": scene.visible_colors,
        "form": scene.world.forms,
        "size": scene.world.sizes,
    }
    attributes = pick(rng, CHANGE)
    new = {}
    for attribute in attributes:
        former = getattr(shape, attribute)
        new[attribute] = pick(rng, [value for value in values[attribute] if value != former])
    words = pick(rng, CHANGE[attributes]).format(name, *new.values())
    return exchange(scene, shape, replace(shape, **new)), words.replace(" a orange", " an orange")


def _edit(
    rng: np.random.Generator, category: str, scene: Scene, source: Scene, extent: Extent
) -> tuple[Scene, str]:
    """One edit of a scene, in words that hold for it and for the source.

    The words are "" if its object cannot be named.
    """
    if category == "Global Style":
        return _restyle(rng, scene)
    if category == "Local Add":
        return _add(rng, scene, extent)
    # In a composition, the second edit is about an object that the first has left alone.
    untouched = [shape for shape in scene.shapes if shape in source.shapes]
    shape = pick(rng, untouched)
    pool = tuple(dict.fromkeys(source.shapes + scene.shapes))  # without repetitions
    name = refer(rng, shape, pool, extent)
    if category == "Local Remove":
        target = exchange(scene, shape)
        return target, pick(rng, REMOVE).format(name) if name else ""
    target, words = _change(rng, scene, shape, name)
    return target, words if name else ""


def _as_typed(rng: np.random.Generator, instruction: str) -> str:
    """Half of the instructions become sentences, the other half stay as people type them."""
    if rng.random() < 0.5:
        return f"{instruction[:1].upper()}{instruction[1:]}."
    return instruction


def _throw(
    rng: np.random.Generator, category: str, extent: Extent, world: World
) -> tuple[Scene, Scene, str]:
    """A source, its edit and the instruction; this is "" if the edit cannot be said."""
    parts, source = sample_source(rng, category, extent, world)
    target = source
    sentences = []
    for part in parts:
        target, words = _edit(rng, part, target, source, extent)
        sentences.append(words)
    if category == COMPOSITION:
        instruction = pick(rng, JOIN).format(*sentences)
    else:
        instruction = sentences[0]
    instruction = _as_typed(rng, instruction)
    return source, target, instruction if all(sentences) else ""


def draw_edit(
    rng: np.random.Generator,
    category: str,
    extent: Extent,
    looked_at: Extent | None = None,
    words: str = "plain",
    world: World = WORLDS["all"],
) -> tuple[Scene, Scene, str]:
    """Draw a source, its edit and the instruction, again and again until both scenes are clear.

    looked_at: the size of the frames in which this is checked, `extent` by default.
    words: one of WORDINGS.
    """
    looked_at = looked_at or extent
    while True:
        plain = words == "plain"
        if words == "people" and category in EVERYTHING:
            plain = rng.random() < 1 / 3  # so that a model learns both
        if plain:
            source, target, instruction = _throw(rng, category, extent, world)
        else:
            held_out = words == "held-out"
            source, target, instruction = people.throw(rng, category, extent, world, held_out)
        if instruction and is_clear(source, looked_at) and is_clear(target, looked_at):
            return source, target, instruction


# --- The data set ---------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One clip and its edit, before it becomes a dict of tensors."""

    source: Scene
    target: Scene
    instruction: str
    clips: tuple[np.ndarray, np.ndarray]  # source and target, uint8 (T, H, W, 3)
    mask: np.ndarray  # bool (T, H, W): the pixels that the edit changes, all of them for a style


class ShapesDataset(Dataset):
    """`size` clips, each a function of (seed, index) and the arguments; the categories take turns.

    world: what scenes and edits are drawn from, a key of `scenes.WORLDS`.
    words: how the instructions are worded, one of WORDINGS. All but "plain" also have the category
    "Not There", whose target is the source.
    coarse: check in small frames whether objects can be told apart, which is several times faster.
    The draws are then others than without it, because the two checks can disagree.

    An item is a dict of source and target, uint8 (T, H, W, 3); mask, bool (T, H, W), of the pixels
    that the edit changes (all of them for a style); instruction; caption of the target; category.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        frames: int,
        height: int,
        width: int,
        categories: Sequence[str] = CATEGORIES,
        coarse: bool = False,
        words: str = "plain",
        world: str = "all",
    ) -> None:
        if words not in WORDINGS:
            raise ValueError(f"words {words!r}: choose from {', '.join(WORDINGS)}")
        if world not in WORLDS:
            raise ValueError(f"world {world!r}: choose from {', '.join(WORLDS)}")
        choices = categories_of(world)
        if words != "plain":
            choices = (*choices, NOT_THERE)
        if not categories or not set(categories) <= set(choices):
            raise ValueError(f"categories {categories}: choose from {', '.join(choices)}")
        if frames < 1 or min(height, width) < 32:
            size_text = f"{frames} x {height} x {width}"
            raise ValueError(f"{size_text}: clips of shapes need at least 1 frame of 32 x 32")
        self.seed, self.size, self.categories = seed, size, tuple(categories)
        self.extent = (frames, height, width)
        self.words = words
        self.world = world
        self.coarse = coarse
        self.looked_at = self.extent
        if coarse:  # the shorter side gets 32 to 63 pixels
            factor = min(height, width) // 32
            self.looked_at = (frames, height // factor, width // factor)

    def __len__(self) -> int:
        return self.size

    def at(self, extent: Extent) -> ShapesDataset:
        """A set with the same arguments but another size of the clips."""
        options = (self.categories, self.coarse, self.words, self.world)
        return ShapesDataset(self.seed, self.size, *extent, *options)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, target, instruction, (before, after), mask = self.sample(index)
        return {
            "source": torch.from_numpy(before),
            "target": torch.from_numpy(after),
            "mask": torch.from_numpy(mask),
            "instruction": instruction,
            "caption": caption(target),
            "category": self._category(index),
        }

    def _category(self, index: int) -> str:
        return self.categories[index % len(self.categories)]

    def sample(self, index: int) -> Sample:
        """Draw scenes, words and clips until the edit is large and strong enough to be seen."""
        if not 0 <= index < self.size:
            raise IndexError(f"clip {index} of {self.size}")
        category = self._category(index)
        rng = np.random.default_rng((self.seed, index))
        while True:
            source, target, instruction = draw_edit(
                rng, category, self.extent, self.looked_at, self.words, WORLDS[self.world]
            )
            before, after = render(source, self.extent), render(target, self.extent)
            mask = _differs(before, after)
            if target.style is not None:
                mask[:] = True
            # Too small or too faint an edit teaches nothing, so another one is drawn. A request for
            # what is not there has none.
            if target == source or _is_visible(before, after, mask):
                return Sample(source, target, instruction, (before, after), mask)


def _differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The pixels in which two clips differ in any channel, (T, H, W)."""
    differs = a != b  # (T, H, W, 3)
    return differs[..., 0] | differs[..., 1] | differs[..., 2]  # any(-1) takes four times as long


def _is_visible(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> bool:
    """Whether an edit is large and strong enough to be seen."""
    change = np.square(before[mask].astype(np.float32) - after[mask])  # (pixels, 3)
    return mask.mean() >= MIN_AREA and change.mean() >= MIN_CHANGE**2


def categories_of(world: str) -> tuple[str, ...]:
    """The categories of edits in a world, a key of `scenes.WORLDS`, without what is not there."""
    # Two edits in one take three objects, for which not every world has room.
    return EVERYTHING if WORLDS[world].most >= 3 else CATEGORIES


def training_set(seed: int, extent: Extent, world: str = "all") -> ShapesDataset:
    """What the toy is trained on, practically without end: people's words, coarse checks.

    In the small world the words are plain and there is one edit in an instruction.
    """
    if world == "small":
        return ShapesDataset(seed, 1_000_000, *extent, CATEGORIES, coarse=True, world="small")
    mix = (*TRAINING_MIX, NOT_THERE)
    return ShapesDataset(seed, 1_000_000, *extent, mix, coarse=True, words="people")
