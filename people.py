"""Edits of moving shapes in the words of people: synonyms, short forms, politeness, typing slips.

The rules are those of shapes.py, and these, for what people say and shapes.py does not:
- A reference names only what is needed: "the star", "the orange one", "the big one on the left".
- What an added object lacks is filled in: in the middle, medium, standing still, and of the first
  visible colour of `scenes.COLORS`.
- "All" and "everything" are every object of a colour, of a form, or of the scene.
- "Bigger" and "smaller" are one step in size.
- A new background has one tone of that colour and no pattern.
- A request for an object that is not there changes nothing.

A part of the words is held out of training: a held-out request has at least one of them, and no
other request has any.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

import scenes
from scenes import (
    Extent,
    Scene,
    Shape,
    World,
    exchange,
    is_furthest,
    new_shape,
    pick,
    sample_source,
    twins_of,
    visible_colors,
)

# --- Words ----------------------------------------------------------------------------------------

# What is meant, and the ways to say it; what stands there twice is said twice as often. Behind a
# bar are those that are held out. Each of them can be understood from its spelling or from the rest
# of the sentence: nothing else could be asked of a model that never met any other text.
# fmt: off
TABLE = {
    "circle": "circle, ball, disc, dot, sphere | disk",
    "ring": "ring, donut, hoop | doughnut",
    "square": "square, box, block, cube",
    "diamond": "diamond, rhombus, lozenge | rhomb",
    "triangle": "triangle",
    "cross": "cross, plus, plus sign, plus symbol",
    "heart": "heart",
    "star": "star",
    "thing": "one, thing, shape, object, figure | item, element",

    "red": "red, scarlet", "orange": "orange", "yellow": "yellow, golden, gold",
    "green": "green, dark green", "blue": "blue, dark blue",
    "cyan": "cyan, turquoise, aqua, teal, light blue | aquamarine",
    "purple": "purple, violet", "pink": "pink, rose, magenta",
    "white": "white", "black": "black", "gray": "gray, grey",

    "small": "small, little, tiny, mini", "medium": "medium, medium sized, normal",
    "large": "large, big, huge, giant",

    "still": "standing still, not moving, that stands still, that does not move, static "
             "| motionless",
    "moves": "moving {way}, going {way}, that moves {way}, flying {way}, heading {way}, "
             "that goes {way} | drifting {way}, that travels {way}",
    "left": "left, to the left | leftwards", "right": "right, to the right | rightwards",
    "up": "up, upwards", "down": "down, downwards",
    "diagonally": "diagonally {v} and {h}, diagonally {v} {h}, {v} and {h}, {v} {h}",

    "on the left": "on the left, on the left side, to the left, at the left "
                   "| on the left-hand side",
    "on the right": "on the right, on the right side, to the right, at the right "
                    "| on the right-hand side",
    "at the top": "at the top, on top, at the upper edge | at the very top",
    "at the bottom": "at the bottom, at the lower edge | at the very bottom",
    "in the center": "in the center, in the middle, at the center, in the middle of the frame "
                     "| in the centre",
    "corner": "at the {v} {h}, in the {v} {h} corner, {v} {h}, in the {v} {h} "
              "| at the very {v} {h}",
    "top": "top, top, upper", "bottom": "bottom, bottom, lower",

    "remove": "remove {it}, delete {it}, erase {it}, take away {it}, take {it} away, "
              "take out {it}, get rid of {it}, hide {it}, make {it} disappear, make {it} vanish, "
              "drop {it}, clear {it}, clear away {it}, make {it} go away, get {it} out of here, "
              "remove {it} from the video, remove {it} from the scene "
              "| eliminate {it}, cut out {it}, wipe {it} away",
    "remove alone": "no {bare}, without {it}, i don't want {it}, i don't want to see {it}, "
                    "{it} should go away, {it} should disappear, {it} should be removed, "
                    "i want {it} gone | {it} must go",
    "color": "make {it} {color}, paint {it} {color}, turn {it} {color}, color {it} {color}, "
             "recolor {it} in {color}, change {it} to {color}, "
             "change the color of {it} to {color}, "
             "make the color of {it} {color}, give {it} a {color} color, fill {it} with {color}, "
             "paint {it} in {color}, change the color of {it} into {color} "
             "| dye {it} {color}, colour {it} {color}, change the colour of {it} to {color}",
    "color alone": "{it} should be {color}, i want {it} in {color}, {it} in {color}, "
                   "i want {it} to be {color}, let {it} be {color}, {it} should become {color}",
    "form": "turn {it} into {new}, change {it} into {new}, change {it} to {new}, make {it} {new}, "
            "replace {it} with {new}, swap {it} for {new}, change the shape of {it} to {new}, "
            "make {it} into {new}, make {new} out of {it}, replace {it} by {new}, "
            "swap {it} with {new}, put {new} in the place of {it} "
            "| transform {it} into {new}, morph {it} into {new}, exchange {it} for {new}",
    "form alone": "{it} should be {new}, i want {new} instead of {it}, {new} instead of {it}, "
                  "{it} should become {new}, i want {it} to be {new}",
    "size": "make {it} {size}, resize {it} to {size}, change the size of {it} to {size}",
    "size alone": "{it} should be {size}, i want {it} to be {size}",
    "bigger alone": "{it} should be bigger, {it} should be larger, i want {it} bigger",
    "smaller alone": "{it} should be smaller, i want {it} smaller",
    "bigger": "make {it} bigger, make {it} larger, enlarge {it}, grow {it}, "
              "increase the size of {it}, make {it} much bigger, blow up {it}, "
              "double the size of {it} | scale {it} up, make {it} a bit bigger",
    "smaller": "make {it} smaller, shrink {it}, reduce the size of {it}, make {it} much smaller, "
               "decrease the size of {it}, halve the size of {it} "
               "| scale {it} down, make {it} a bit smaller",
    "background": "make the background {color}, change the background to {color}, "
                  "turn the background {color}, paint the background {color}, "
                  "set the background to {color}, give it a {color} background "
                  "| make the backdrop {color}, put it on a {color} backdrop",
    "background alone": "{color} background, the background should be {color}",
    "add": "add {it}, put {it}, draw {it}, insert {it}, place {it}, show {it}, give me {it}, "
           "create {it} "
           "| include {it}, paste {it}",
    "add alone": "i want {it}, there should be {it}, i would like {it}, can i have {it}, "
                 "let there be {it} | we need {it}",

    "gray style": "make it black and white, turn it black and white, "
                  "turn the video black and white, make it b/w, make it gray, "
                  "make it grey, convert it to grayscale, "
                  "remove all color, remove the colors, take out the color, make it monochrome, "
                  "turn it into a black and white movie, desaturate it "
                  "| convert it to greyscale, make it black n white",
    "gray style alone": "black and white, b/w, b&w, grayscale, no color, monochrome, "
                        "in black and white, "
                        "without color | greyscale",
    "sepia style": "make it sepia, turn the video sepia, make it look like an old photo, "
                   "make it look like an old film, make it look old, make it look vintage, "
                   "make it vintage, give it a retro look | make it sepia-colored",
    "sepia style alone": "sepia, like an old photo, old film, vintage, retro, in sepia "
                         "| sepia-toned",
    "green style": "make it look like night vision, turn on night vision, "
                   "make it green like night vision | switch on night vision",
    "green style alone": "night vision, green night vision, night vision camera | nightvision",
    "negative style": "invert the colors, invert it, make it negative, turn it into a negative, "
                      "reverse the colors, flip the colors, invert the video "
                      "| invert all colours, make it a photo-negative",
    "negative style alone": "negative, inverted colors, inverted",
    "night style": "make it night, make it look like night, turn day into night, "
                   "make it look like moonlight, set it at night, make it dark "
                   "| turn it into nighttime",
    "night style alone": "at night, night, night time, moonlight, in the moonlight | nighttime",
    "sunset style": "make it sunset, make it look like sunset, make it warm like at sunset, "
                    "make it look like golden hour, give it warm light "
                    "| give it a sunset mood",
    "sunset style alone": "sunset, at sunset, sunset light, warm light, golden hour, evening light",
    "pastel style": "make it pastel, make the colors pale, make the colors soft, "
                    "turn it into a pastel painting, make it pale, use pastel colors "
                    "| make it pastel-colored",
    "pastel style alone": "pastel, pastel colors, soft colors, pale colors",
    "mosaic style": "pixelate it, make it pixelated, make it blocky, turn it into a mosaic, "
                    "make it a mosaic, make it look like a mosaic, turn it into pixel art, "
                    "make it 8-bit "
                    "| pixelize it",
    "mosaic style alone": "mosaic, pixelated, big pixels, pixel art, 8-bit | pixelization",

    "everything": "everything, all shapes, all the shapes, all objects | all of the items",
    "all": "all {things}, all the {things} | every single one of the {things}",
    "join": "{a} and {b}, {a} and then {b}, {a} then {b}, {a} and also {b}, "
            "{a} & {b}, {a}. {b}, {a} plus {b}, first {a} and then {b} | {a} followed by {b}",
    "polite": "please {it}, {it} please, can you {it}, can you {it} please, could you {it}, "
              "i want you to {it}, now {it}, just {it}, i would like you to {it}, "
              "would you {it}, could you please {it}, let's {it}, hey {it}, go ahead and {it}, "
              "you should {it}, i need you to {it}, can you please {it} | kindly {it}, {it} thanks",
}
# fmt: on


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


TRAINED: dict[str, list[str]] = {}
HELD_OUT: dict[str, list[str]] = {}
for _meaning, _text in TABLE.items():
    _trained, _, _held_out = _text.partition("|")
    TRAINED[_meaning] = _split(_trained)
    if _held_out:
        HELD_OUT[_meaning] = _split(_held_out)


class CannotBeSaid(Exception):
    """The scene does not allow the edit, or the words do not name its object."""


class Talk:
    """A clip and what is said of it so far: chooses words, and objects that can be named.

    source: the scene before the request. scene: as the request has edited it so far. alone: whether
    the request is one edit only. held_out: whether held-out words are said, half of the time that
    there are some.
    """

    def __init__(
        self, rng: np.random.Generator, source: Scene, extent: Extent, alone: bool, held_out: bool
    ) -> None:
        self.rng = rng
        self.source = source
        self.scene = source
        self.extent = extent
        self.alone = alone
        self.held_out = held_out
        self.said_held_out = False  # whether any of the words so far was held out

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, options: Iterable) -> Any:
        return pick(self.rng, options)

    def say(self, meaning: str, **slots: str) -> str:
        """One of the ways to say `meaning`, a key of TABLE, with its slots filled in."""
        choices = TRAINED[meaning]
        if self.held_out and meaning in HELD_OUT and self.chance(0.5):
            choices = HELD_OUT[meaning]
            self.said_held_out = True
        return self.pick(choices).format(**slots)

    def command(self, meaning: str, **slots: str) -> str:
        """An imperative; if it stands alone, sometimes politely or as a sentence without a verb."""
        if self.alone and f"{meaning} alone" in TABLE and self.chance(1 / 3):
            return self.say(f"{meaning} alone", **slots)
        words = self.say(meaning, **slots)
        if self.alone and self.chance(0.4):
            words = self.say("polite", it=words)
        return words

    def choose(self) -> tuple[Shape, str]:
        """An object that is not edited yet, and its name. CannotBeSaid if none can be named."""
        # What the first edit took away or brought must not be meant by the second.
        pool = list(dict.fromkeys(self.source.shapes + self.scene.shapes))
        named = []
        for shape in self.scene.shapes:
            ways = references(shape, pool, self.extent)
            if shape in self.source.shapes and ways:
                named.append((shape, ways))
        if not named:
            raise CannotBeSaid
        shape, ways = self.pick(named)
        attributes, side = self.pick(ways)
        return shape, noun(self, shape, attributes, side)

    def choose_group(self) -> tuple[list[Shape], str]:
        """Everything, or all objects of a colour or of a form that several have, and their name."""
        shapes = self.scene.shapes
        groups = [("", "everything")]
        for attribute in ("color", "form"):
            values = [getattr(shape, attribute) for shape in shapes]
            for value in dict.fromkeys(values):
                if values.count(value) > 1:
                    groups.append((attribute, value))
        attribute, value = self.pick(groups)
        if value == "everything":
            return list(shapes), self.say("everything")
        members = [shape for shape in shapes if getattr(shape, attribute) == value]
        things = _plural(noun(self, members[0], [attribute]))
        return members, self.say("all", things=things)


# --- Noun phrases ---------------------------------------------------------------------------------

# The attributes that may name an object.
REFERENCES = (
    ("form",),
    ("color",),
    ("size",),
    ("color", "form"),
    ("size", "form"),
    ("size", "color"),
    ("motion",),
    ("form", "motion"),
    ("color", "motion"),
    ("size", "color", "form"),
    ("color", "form", "motion"),
)
# Those that may name it together with a side.
SIDED = ((), ("form",), ("color",), ("color", "form"))


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"


def _way(talk: Talk, motion: str) -> str:
    """How a motion is said: "moving to the left"."""
    if motion == "still":
        return talk.say("still")
    if motion in ("left", "right", "up", "down"):
        return talk.say("moves", way=talk.say(motion))
    _, vertical, _, horizontal = motion.split()  # "diagonally up and left"
    return talk.say("moves", way=talk.say("diagonally", v=vertical, h=horizontal))


def _place(talk: Talk, place: str) -> str:
    if place in TABLE:
        return talk.say(place)
    _, _, vertical, horizontal = place.split()  # "at the top left"
    return talk.say("corner", v=talk.say(vertical), h=horizontal)


def noun(talk: Talk, shape: Shape, attributes: Iterable[str], side: str = "") -> str:
    """An object by some of its attributes, without an article: "big red ball on the left"."""
    parts = []
    for attribute in ("size", "color"):
        if attribute in attributes:
            parts.append(talk.say(getattr(shape, attribute)))
    parts.append(talk.say(shape.form if "form" in attributes else "thing"))
    if "motion" in attributes:
        parts.append(_way(talk, shape.motion))
    if side:
        parts.append(talk.say(side))
    return " ".join(parts)


def references(shape: Shape, pool: Iterable[Shape], extent: Extent) -> list[tuple]:
    """All (attributes, side) that name one shape of a pool and no other; "" is no side."""
    pool = list(pool)
    found = []
    for attributes in REFERENCES:
        if not twins_of(shape, pool, *attributes):
            found.append((attributes, ""))
    for attributes in SIDED:
        twins = twins_of(shape, pool, *attributes)
        for side in scenes.SIDES:
            if twins and is_furthest(shape, twins, side, extent):
                found.append((attributes, side))
    return found


# --- Edits ----------------------------------------------------------------------------------------

# Each returns the target and the words, or raises CannotBeSaid.

Edit = tuple[Scene, str]


def remove_one(talk: Talk) -> Edit:
    shape, name = talk.choose()
    words = talk.command("remove", it=f"the {name}", bare=name)
    return exchange(talk.scene, shape), words


def recolor_one(talk: Talk) -> Edit:
    shape, name = talk.choose()
    colors = talk.scene.visible_colors
    color = talk.pick([color for color in colors if color != shape.color])
    words = talk.command("color", it=f"the {name}", color=talk.say(color))
    return exchange(talk.scene, shape, replace(shape, color=color)), words


def reshape_one(talk: Talk) -> Edit:
    """Another form; the colour changes as well if the new form is said with one."""
    shape, name = talk.choose()
    said = ["form"]
    forms = [form for form in talk.scene.world.forms if form != shape.form]
    new = replace(shape, form=talk.pick(forms))
    if talk.chance(0.4):
        said.append("color")
        new = replace(new, color=talk.pick(talk.scene.visible_colors))
    thing = _with_article(noun(talk, new, said))
    words = talk.command("form", it=f"the {name}", new=thing)
    return exchange(talk.scene, shape, new), words


def resize_one(talk: Talk) -> Edit:
    """A named size, or one step up or down."""
    shape, name = talk.choose()
    sizes = talk.scene.world.sizes
    size = talk.pick([size for size in sizes if size != shape.size])
    step = sizes.index(size) - sizes.index(shape.size)
    if abs(step) == 1 and talk.chance(0.7):
        words = talk.command("bigger" if step > 0 else "smaller", it=f"the {name}")
    else:
        words = talk.command("size", it=f"the {name}", size=talk.say(size))
    return exchange(talk.scene, shape, replace(shape, size=size)), words


def recolor_background(talk: Talk) -> Edit:
    """A background of one tone, in which every object can still be seen."""
    tones = []
    for tone in scenes.PLAIN_TONES:
        visible = visible_colors(tone, talk.scene.world)
        if all(shape.color in visible for shape in talk.scene.shapes):
            tones.append(tone)
    if not tones:
        raise CannotBeSaid
    tone = talk.pick(tones)
    words = talk.command("background", color=talk.say(tone))
    return replace(talk.scene, tone=tone, pattern="plain"), words


def remove_all(talk: Talk) -> Edit:
    members, name = talk.choose_group()
    rest = tuple(shape for shape in talk.scene.shapes if shape not in members)
    return replace(talk.scene, shapes=rest), talk.say("remove", it=name)


def recolor_all(talk: Talk) -> Edit:
    members, name = talk.choose_group()
    color = talk.pick(talk.scene.visible_colors)
    shapes = []
    for shape in talk.scene.shapes:
        shapes.append(replace(shape, color=color) if shape in members else shape)
    words = talk.say("color", it=name, color=talk.say(color))
    return replace(talk.scene, shapes=tuple(shapes)), words


def add_one(talk: Talk) -> Edit:
    """A new object; what is not said of it has its default."""
    says_place = talk.chance(0.7)
    place = talk.pick(scenes.PLACES) if says_place else "in the center"
    shape = new_shape(talk.rng, talk.scene, place, talk.extent)
    said = {"form"}
    for attribute, share, default in (
        ("color", 0.9, talk.scene.visible_colors[0]),
        ("size", 0.5, "medium"),
        ("motion", 0.5, "still"),
    ):
        if talk.chance(share):
            said.add(attribute)
        else:
            shape = replace(shape, **{attribute: default})
    thing = _with_article(noun(talk, shape, said - {"motion"}))
    if says_place:
        thing = f"{thing} {_place(talk, place)}"
    if "motion" in said:
        thing = f"{thing} {_way(talk, shape.motion)}"
    target = replace(talk.scene, shapes=(*talk.scene.shapes, shape))
    return target, talk.command("add", it=thing)


def restyle(talk: Talk) -> Edit:
    style = talk.pick(talk.scene.world.styles)
    return replace(talk.scene, style=style), talk.command(f"{style} style")


def ask_for_absent(talk: Talk) -> Edit:
    """An edit of an object whose colour and form no object has together: nothing changes."""
    there = [(shape.color, shape.form) for shape in talk.scene.shapes]
    world = talk.scene.world
    absent = [pair for pair in itertools.product(world.colors, world.forms) if pair not in there]
    color, form = talk.pick(absent)
    name = noun(talk, Shape(form, color, "medium", "still", 0.5, 0.5), ["color", "form"])
    action = talk.pick(["remove", "color", "bigger", "smaller"])
    slots = {"it": f"the {name}"}
    if action == "color":
        new_color = talk.pick([other for other in world.colors if other != color])
        slots["color"] = talk.say(new_color)
    return talk.scene, talk.say(action, **slots)


EDITS = {
    "Local Change": (recolor_one, recolor_one, reshape_one, reshape_one, resize_one, resize_one,
                     recolor_background, recolor_all),
    "Local Remove": (remove_one, remove_one, remove_one, remove_all),
    "Local Add": (add_one,),
    "Global Style": (restyle,),
    scenes.NOT_THERE: (ask_for_absent,),
}  # fmt: skip
OF_GROUPS = (remove_all, recolor_all)  # what they mean after another edit would not be clear


# --- Typing ---------------------------------------------------------------------------------------

ALL_WORDS = set(re.findall(r"[a-z]+", " ".join(TABLE.values())))


def _slip(rng: np.random.Generator, word: str) -> str:
    """A word with two letters exchanged, one left out or one typed twice."""
    at = int(rng.integers(1, len(word) - 1))
    kind = pick(rng, ["exchange", "leave out", "double"])
    if kind == "exchange":
        return word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
    if kind == "leave out":
        return word[:at] + word[at + 1 :]
    return word[:at] + word[at] + word[at:]


def typed(rng: np.random.Generator, text: str, slips: bool = True) -> str:
    """As people type: without articles, with a slip, in capitals, with or without a full stop."""
    if rng.random() < 0.3:
        text = re.sub(r" (and then|then|and also) ", r", \1 ", text)
    if rng.random() < 0.3:
        text = text.replace("'", "")
    if rng.random() < 0.2:
        text = re.sub(r"\b(the|a|an) (?=\w)", "", text)
    if slips and rng.random() < 0.15:
        long_words = [word for word in re.findall(r"[a-z]+", text) if len(word) >= 5]
        if long_words:
            word = pick(rng, long_words)
            slipped = _slip(rng, word)
            if slipped.rstrip("s") not in ALL_WORDS:  # a slip never makes another word
                text = text.replace(word, slipped, 1)
    case = rng.random()
    if case < 0.4:
        text = text[:1].upper() + text[1:]
    elif case < 0.45:
        text = text.upper()
    ends = ["", "", "", ".", "!"]
    if re.match(r"(can|could|would) ", text, re.IGNORECASE):
        ends += ["?", "?", "?"]
    return text + pick(rng, ends)


# --- Whole requests -------------------------------------------------------------------------------


def throw(
    rng: np.random.Generator,
    category: str,
    extent: Extent,
    world: World,
    held_out: bool = False,
) -> tuple[Scene, Scene, str]:
    """A source, its edit and the request; this is "" if the edit cannot be said of that source."""
    parts, source = sample_source(rng, category, extent, world)
    talk = Talk(rng, source, extent, len(parts) == 1, held_out)
    sentences = []
    for part in parts:
        rules = [rule for rule in EDITS[part] if talk.alone or rule not in OF_GROUPS]
        try:
            talk.scene, words = talk.pick(rules)(talk)
        except CannotBeSaid:
            return source, source, ""
        sentences.append(words)
    request = sentences[0]
    if not talk.alone:
        request = talk.say("join", a=sentences[0], b=sentences[1])
    if held_out and not talk.said_held_out:
        return source, source, ""
    return source, talk.scene, typed(rng, request, slips=not held_out)
