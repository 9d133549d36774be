"""Requests in people's words name one object, mean one edit, and keep some words for the test."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import people
import shapes
from scenes import COLORS, FORMS, NOT_THERE, SIZES, WORLDS, Scene, Shape, sample_scene, trajectory
from shapes import EVERYTHING, ShapesDataset

EXTENT = (5, 64, 64)
# The dictionary of this test, written apart from the tables of people.py.
FORM_WORDS = {
    "circle": "circle", "ball": "circle", "disc": "circle", "dot": "circle", "disk": "circle",
    "sphere": "circle",
    "ring": "ring", "donut": "ring", "hoop": "ring", "doughnut": "ring",
    "square": "square", "box": "square", "block": "square", "cube": "square",
    "diamond": "diamond", "rhombus": "diamond", "rhomb": "diamond", "lozenge": "diamond",
    "triangle": "triangle",
    "cross": "cross", "plus": "cross", "heart": "heart", "star": "star",
}  # fmt: skip
COLOR_WORDS = {color: color for color in COLORS} | {
    "turquoise": "cyan", "aqua": "cyan", "aquamarine": "cyan", "teal": "cyan", "violet": "purple",
    "scarlet": "red", "golden": "yellow", "gold": "yellow", "rose": "pink", "magenta": "pink",
}  # fmt: skip
SIZE_WORDS = {
    "small": "small", "little": "small", "tiny": "small", "medium": "medium", "normal": "medium",
    "large": "large", "big": "large", "huge": "large", "mini": "small", "giant": "large",
}  # fmt: skip
WORD = r"[a-z'&/-]+"
WORDS = {"form": FORM_WORDS, "color": COLOR_WORDS, "size": SIZE_WORDS}

RED_BALL = Shape("circle", "red", "small", "still", 0.25, 0.25)
BLUE_BALL = Shape("circle", "blue", "large", "left", 0.75, 0.25)
RED_STAR = Shape("star", "red", "medium", "still", 0.25, 0.75)
SCENE = Scene("plain", "cream", 0.5, 0.4, (RED_BALL, BLUE_BALL, RED_STAR))


def make_talk(seed: int, scene: Scene = SCENE, held_out: bool = False) -> people.Talk:
    return people.Talk(np.random.default_rng(seed), scene, EXTENT, alone=True, held_out=held_out)


def mentioned(text: str) -> dict[str, list[str]]:
    """The forms, colours and sizes that a text names, each in the order of the text."""
    found: dict[str, list[str]] = {"form": [], "color": [], "size": []}
    text = text.lower().replace("light blue", "cyan")
    for word in re.findall(r"[a-z]+", text):
        for kind, words in WORDS.items():
            if word in words:
                found[kind].append(words[word])
    return found


def meant(name: str, scene: Scene) -> list[Shape]:
    """The shapes that a noun phrase can mean."""
    found = mentioned(name)
    shapes = list(scene.shapes)
    for kind, values in found.items():
        shapes = [shape for shape in shapes if not values or getattr(shape, kind) == values[0]]
    name = f" {name} "
    if re.search(r" (standing still|not moving|stands still|not move|static|motionless) ", name):
        shapes = [shape for shape in shapes if shape.motion == "still"]
    motion = re.search(r" (?:moving|going|goes|moves|flying|heading|drifting|travels) (.*)$", name)
    if motion:
        ways = set(re.findall(r"left|right|up|down", motion[1]))
        shapes = [s for s in shapes if set(re.findall(r"left|right|up|down", s.motion)) == ways]
    name = re.sub(" on top ", " at the top ", name).replace("upper edge", "top")
    name = name.replace("lower edge", "bottom")
    side = re.search(r" (?:on|at|to) the (?:very )?(left|right|top|bottom)(?:-hand)?", name)
    if side and not motion:
        axis = 0 if side[1] in ("left", "right") else 1
        sign = 1 if side[1] in ("left", "top") else -1
        first = min(sign * trajectory(shape, EXTENT)[0, axis] for shape in shapes)
        shapes = [s for s in shapes if sign * trajectory(s, EXTENT)[0, axis] == first]
    return shapes


@pytest.mark.parametrize("held_out", [False, True])
def test_a_reference_means_one_object(held_out: bool):
    """Read with another dictionary, in random scenes: the object that was chosen and no other."""
    rng = np.random.default_rng(0)
    lengths = set()
    for seed in range(400):
        scene = sample_scene(rng, 4, EXTENT)
        try:
            shape, name = make_talk(seed, scene, held_out).choose()
        except people.CannotBeSaid:
            continue
        assert meant(name, scene) == [shape], (name, scene)
        lengths.add(len(name.split()))
    assert {1, 2} <= lengths  # "star", "orange one": nothing that is not needed


def test_references_leave_out_what_is_not_needed():
    """The only star is "the star"; a red ball beside a blue one is never just "the ball"."""
    assert (("form",), "") in people.references(RED_STAR, SCENE.shapes, EXTENT)
    assert (("form",), "") not in people.references(RED_BALL, SCENE.shapes, EXTENT)
    assert (("size",), "") in people.references(RED_BALL, SCENE.shapes, EXTENT)
    assert ((), "on the right") in people.references(BLUE_BALL, SCENE.shapes, EXTENT)
    assert ((), "on the left") not in people.references(RED_BALL, SCENE.shapes, EXTENT)


def difference(target: Scene, scene: Scene = SCENE) -> tuple[list[Shape], list[Shape]]:
    """The shapes that are gone, and those that are new."""
    gone = [shape for shape in scene.shapes if shape not in target.shapes]
    new = [shape for shape in target.shapes if shape not in scene.shapes]
    return gone, new


def test_removing_takes_the_named_object_away():
    for seed in range(60):
        target, words = people.remove_one(make_talk(seed))
        gone, new = difference(target)
        assert len(gone) == 1 and new == []
        for kind, values in mentioned(words).items():
            assert set(values) <= {getattr(gone[0], kind)}, words


def test_recoloring_gives_the_named_object_the_last_color():
    for seed in range(60):
        target, words = people.recolor_one(make_talk(seed))
        ([former], [new]) = difference(target)
        assert new == replace(former, color=mentioned(words)["color"][-1]) != former, words


def test_reshaping_gives_the_form_and_the_color_that_are_said():
    with_color = 0
    for seed in range(60):
        target, words = people.reshape_one(make_talk(seed))
        ([former], [new]) = difference(target)
        # "i want a star instead of the ball"
        first = re.search("instead of|out of|in the place of", words)
        said = mentioned(words)
        assert new.form == said["form"][0 if first else -1] != former.form, words
        assert replace(new, form=former.form, color=former.color) == former
        if new.color != former.color:
            with_color += 1
            assert new.color == said["color"][0 if first else -1], words
    assert 5 < with_color < 40


def test_bigger_and_smaller_are_one_step():
    sizes, steps = list(SIZES), set()
    for seed in range(60):
        target, words = people.resize_one(make_talk(seed))
        ([former], [new]) = difference(target)
        step = sizes.index(new.size) - sizes.index(former.size)
        assert replace(new, size=former.size) == former
        if re.search("bigger|larger|enlarge|grow|increase|blow|double", words):
            assert step == 1, words
        elif re.search("smaller|shrink|reduce|decrease|halve", words):
            assert step == -1, words
        else:
            assert mentioned(words)["size"][-1] == new.size, words
        steps.add(step)
    assert steps == {-2, -1, 1, 2}


def test_a_new_background_has_one_tone_and_hides_nothing():
    for seed in range(40):
        target, words = people.recolor_background(make_talk(seed))
        assert target.pattern == "plain" and target.shapes == SCENE.shapes
        assert re.search(r"background", words)
        assert target.tone not in ("red", "blue")  # of its objects
        assert target.tone in words or mentioned(words)["color"] == [target.tone], words


def test_all_and_everything_are_every_one():
    groups = set()
    for seed in range(60):
        target, words = people.remove_all(make_talk(seed))
        gone, _ = difference(target)
        if re.search("red|scarlet", words):
            expected = [RED_BALL, RED_STAR]
        elif mentioned(re.sub(r"s\b", "", words))["form"]:
            expected = [RED_BALL, BLUE_BALL]
        else:
            expected = [RED_BALL, BLUE_BALL, RED_STAR]
        assert gone == expected, words
        groups.add(len(gone))
    assert groups == {2, 3}
    target, words = people.recolor_all(make_talk(3))
    gone, new = difference(target)
    assert {shape.color for shape in new} == {mentioned(words)["color"][-1]}


def test_what_an_added_object_lacks_has_its_default():
    seen = set()
    for seed in range(120):
        target, words = people.add_one(make_talk(seed))
        assert target.shapes[:-1] == SCENE.shapes
        new, said = target.shapes[-1], mentioned(words)
        assert said["form"] == [new.form]
        assert said["color"] == [new.color] or (said["color"], new.color) == ([], "red"), words
        assert said["size"] == [new.size] or (said["size"], new.size) == ([], "medium"), words
        moves = re.search("moving|going|goes|moves|flying|heading|still|static|does not", words)
        assert moves or new.motion == "still", words
        place = re.search("left|right|top|bottom|upper|lower|center|middle", words)
        assert place or (new.x, new.y) == (0.5, 0.5), words
        seen.add((bool(said["color"]), bool(said["size"]), bool(moves), bool(place)))
    assert len(seen) > 10


def test_a_request_for_what_is_not_there_changes_nothing():
    for seed in range(60):
        target, words = people.ask_for_absent(make_talk(seed))
        said = mentioned(words)
        assert target == SCENE
        assert not any(
            s.form == said["form"][0] and s.color == said["color"][0] for s in SCENE.shapes
        )
    sample = ShapesDataset(0, 3, *EXTENT, [NOT_THERE], words="people")[0]
    assert (sample["source"] == sample["target"]).all() and not sample["mask"].any()


def test_every_style_is_said_in_its_own_words():
    """No sentence means two styles."""
    sentences: dict[str, str] = {}
    for meaning in people.TABLE:
        if "style" in meaning:
            for words in people.TRAINED[meaning] + people.HELD_OUT.get(meaning, []):
                assert sentences.setdefault(words, meaning.split()[0]) == meaning.split()[0]
    assert len(sentences) > 60


def test_held_out_words_are_never_trained_on_and_always_asked():
    """Every held-out entry has a word of its own; one of these is in each held-out request."""
    trained = set(re.findall(WORD, " ".join(sum(people.TRAINED.values(), []))))
    held_out = set()
    for entries in people.HELD_OUT.values():
        for entry in entries:
            own = set(re.findall(WORD, entry)) - trained - {"it", "color", "way", "bare"}
            assert own, entry
            held_out |= own | {f"{word}s" for word in own}  # "all doughnuts"
    rng = np.random.default_rng(0)
    for category in (*EVERYTHING, NOT_THERE) * 250:
        _, _, learnt = people.throw(rng, category, EXTENT, WORLDS["all"])
        _, _, asked = people.throw(rng, category, EXTENT, WORLDS["all"], held_out=True)
        assert not held_out & set(re.findall(WORD, learnt.lower())), learnt
        assert asked == "" or held_out & set(re.findall(WORD, asked.lower())), asked
    for category in EVERYTHING * 100:  # "people" has plain instructions, too
        _, _, plain = shapes._throw(rng, category, EXTENT, WORLDS["all"])
        assert not held_out & set(re.findall(WORD, plain.lower())), plain


def test_people_type_slips_capitals_and_leave_out_articles():
    """One slip in a long word at most, and never one that makes another word of the tables."""
    rng = np.random.default_rng(0)
    texts = [people.typed(rng, "make the orange circle purple") for _ in range(300)]
    plain = [re.sub(r"[.!?]$", "", text).lower() for text in texts]
    assert any(text.isupper() for text in texts) and any("the" not in text for text in plain)
    slipped = 0
    for text in plain:
        words = text.replace("the ", "").split()
        wrong = [word for word in words if word not in "make orange circle purple".split()]
        assert len(words) == 4 and len(wrong) <= 1
        assert not set(wrong) & people.ALL_WORDS
        slipped += len(wrong)
    assert 20 < slipped < 80


def test_every_form_and_color_has_a_name():
    assert set(FORMS) | set(COLORS) <= set(people.TABLE)
