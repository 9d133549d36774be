"""The synthetic set says what it shows, in words that fix the target."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import scenes
import shapes
from scenes import CATEGORIES, COMPOSITION, Scene, Shape, render, stylize
from shapes import ShapesDataset

ALL = (*CATEGORIES, COMPOSITION)
EXTENT = (9, 64, 64)


def digest(sample: dict) -> str:
    """All of a sample in one short string."""
    parts = [
        v.numpy().tobytes() if torch.is_tensor(v) else v.encode() for _, v in sorted(sample.items())
    ]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


@pytest.fixture(scope="module")
def samples() -> list[tuple]:
    """150 clips: (category, source scene, target scene, instruction, (source, target), mask)."""
    dataset = ShapesDataset(3, 150, *EXTENT, ALL)
    return [(ALL[i % 5], *dataset.sample(i)) for i in range(len(dataset))]


# --- Determinism ----------------------------------------------------------------------------------


def test_sample_is_a_function_of_seed_and_index():
    """Another instance, size of the set, process or worker gives the same clip; others differ."""
    dataset = ShapesDataset(7, 12, 5, 48, 64, ALL)
    first = [digest(dataset[i]) for i in range(12)]
    assert len(set(first)) == 12
    larger = ShapesDataset(7, 10**9, 5, 48, 64, ALL)
    assert [digest(larger[i]) for i in reversed(range(12))] == first[::-1]
    assert not set(first) & {digest(ShapesDataset(8, 12, 5, 48, 64, ALL)[i]) for i in range(12)}

    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    assert [digest(sample) for sample in loader] == first

    root = Path(shapes.__file__).parent
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]; import shapes, test_shapes as t;"
        "print(t.digest(shapes.ShapesDataset(7, 12, 5, 48, 64, t.ALL)[9]))"
    )
    command = [sys.executable, "-c", program, str(root), str(Path(__file__).parent)]
    output = subprocess.run(
        command, env={"PYTHONHASHSEED": "5"}, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == first[9]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("plain", "d1b9940455ef385a"),
        ("people", "ab3aab273337f515"),
        ("held-out", "361f17e5b95ad913"),
    ],
)
def test_the_draws_stay_what_they_were(words: str, expected: str):
    """The README's numbers are of these clips: a change of words or scenes would void them."""
    dataset = ShapesDataset(2026, 100, 9, 128, 128, ALL, words=words)
    digest = hashlib.sha256()
    for index in range(100):
        source, target, instruction, *_ = dataset.sample(index)
        digest.update(repr((source, target, instruction)).encode())
    assert digest.hexdigest()[:16] == expected


def test_the_coarse_check_draws_clips_that_are_clear_at_full_size():
    """Nearly all: a small frame shows what is hidden a little less exactly."""
    dataset = ShapesDataset(4, 60, 5, 96, 128, ALL, coarse=True)
    assert dataset.looked_at == (5, 32, 42)
    clear = 0
    for index in range(60):
        source, target, *_ = dataset.sample(index)
        clear += scenes.is_clear(source, dataset.extent) and scenes.is_clear(target, dataset.extent)
    assert clear >= 57


def test_items_have_the_promised_form():
    """Types, shapes and categories in turn; the length is right and iteration ends."""
    dataset = ShapesDataset(0, 8, 5, 40, 72)
    items = list(dataset)
    assert len(dataset) == len(items) == 8
    assert [item["category"] for item in items] == list(CATEGORIES) * 2
    for item in items:
        assert set(item) == {"source", "target", "mask", "instruction", "caption", "category"}
        assert item["source"].shape == item["target"].shape == (5, 40, 72, 3)
        assert item["source"].dtype == item["target"].dtype == torch.uint8
        assert item["mask"].shape == (5, 40, 72) and item["mask"].dtype == torch.bool
    with pytest.raises(IndexError):
        dataset[8]


@pytest.mark.parametrize(
    "change",
    [
        dict(categories=("Local Chance",)),
        dict(categories=()),
        dict(height=16),
        dict(words="polite"),
        dict(categories=("Not There",)),
        dict(world="large"),
        dict(world="small", categories=("Composition",)),
    ],
)
def test_impossible_sets_are_refused(change: dict):
    """An unknown category, none at all, and frames too small for shapes are one-line errors."""
    with pytest.raises(ValueError, match=r"categories|32 x 32|words|world") as error:
        ShapesDataset(**(dict(seed=0, size=1, frames=5, height=64, width=64) | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", shapes.WORDINGS)
def test_the_small_world_is_never_left(words: str):
    """Neither by the sources nor by what the edits bring."""
    world = scenes.WORLDS["small"]
    clips = ShapesDataset(5, 60, 5, 48, 48, CATEGORIES, coarse=True, words=words, world="small")
    seen: dict[str, set] = {"form": set(), "color": set(), "size": set(), "motion": set()}
    styles = set()
    for index in range(len(clips)):
        sample = clips.sample(index)
        assert sample.source.tone in world.tones and sample.source.pattern in world.patterns
        assert len(sample.source.shapes) <= world.most
        styles.add(sample.target.style)
        for shape in sample.source.shapes + sample.target.shapes:
            for attribute, values in seen.items():
                values.add(getattr(shape, attribute))
    assert seen["form"] == set(world.forms) and seen["color"] == set(world.colors)
    assert seen["motion"] == set(world.motions)
    assert styles == {None, *world.styles}
    # "medium" is what an added object is in people's words without a size.
    assert seen["size"] == set(world.sizes)


# --- The words fix the target ---------------------------------------------------------------------

SIZE, COLOR, FORM = (
    "small|medium|large",
    "red|orange|yellow|green|cyan|blue|purple|pink",
    "|".join(scenes.FORMS),
)
GO = "diagonally (?:up|down) and (?:left|right)|left|right|up|down"
PLACE = {
    f"{a} {b}".strip(): (x, y)
    for a, b, x, y in (
        ("at the top", "left", 1, 1), ("at the top", "", 2, 1), ("at the top", "right", 3, 1),
        ("on the left", "", 1, 2), ("in the center", "", 2, 2), ("on the right", "", 3, 2),
        ("at the bottom", "left", 1, 3), ("at the bottom", "", 2, 3),
        ("at the bottom", "right", 3, 3),
    )
}  # fmt: skip
WHERE = "|".join(sorted(PLACE, key=len, reverse=True))
REF = (
    rf"the (?:(?P<size>{SIZE}) )?(?:(?P<color>{COLOR}) )?(?P<form>{FORM})"
    rf"(?: moving (?P<go>{GO})| (?P<still>standing still))?"
    r"(?: (?P<side>on the left|on the right|at the top|at the bottom))?"
)
NEW = rf"a (?P<size>{SIZE}) (?P<color>{COLOR}) (?P<form>{FORM})"
VERB = "(?:add|insert|place|put|draw)"
GRAMMAR = {
    "remove": [rf"(?:remove|delete|erase|take away|get rid of) {REF}(?: from the video)?"],
    "change": [
        rf"(?:make|paint|turn) {REF} (?P<to_color>{COLOR})",
        rf"change the color of {REF} to (?P<to_color>{COLOR})",
        rf"recolor {REF} in (?P<to_color>{COLOR})",
        rf"turn {REF} into a (?P<to_form>{FORM}) of the same color",
        rf"change the shape of {REF} to a (?P<to_form>{FORM})",
        rf"reshape {REF} into a (?P<to_form>{FORM})",
        rf"make {REF} (?P<to_size>{SIZE})",
        rf"resize {REF} to (?P<to_size>{SIZE})",
        rf"change the size of {REF} to (?P<to_size>{SIZE})",
        rf"(?:replace {REF} with|swap {REF.replace('?P<', '?P<swap_')} for) an? "
        rf"(?P<to_color>{COLOR}) (?P<to_form>{FORM}) of the same size",
    ],
    "add": [
        rf"{VERB} {NEW} (?P<place>{WHERE}), (?:moving (?P<go>{GO})|standing still)",
        rf"{VERB} {NEW} (?P<place>{WHERE}) that (?:moves (?P<go>{GO})|stands still)",
        rf"(?P<place>{WHERE}), {VERB} {NEW} (?:moving (?P<go>{GO})|standing still)",
    ],
    "style": [
        r"(?:turn the video into|make the whole video look like) (?P<style>.*)",
        r"(?:restyle the clip as|render everything as) (?P<style>.*)",
    ],
}


def resolve(words: dict, scene: Scene) -> Shape:
    """The one shape of a scene that is meant; fails if it is not exactly one."""
    found = [
        s
        for s in scene.shapes
        if all(words[k] in (None, getattr(s, k)) for k in ("size", "color", "form"))
    ]
    if words["go"] or words["still"]:
        found = [s for s in found if s.motion == (words["go"] or "still")]
    if words["side"]:
        axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[
            words["side"].split()[-1]
        ]
        first = [sign * scenes.trajectory(s, EXTENT)[0, axis] for s in found]
        found = [s for s, p in zip(found, first, strict=True) if p == min(first)]
    assert len(found) == 1, f"{len(found)} shapes are meant by {words}"
    return found[0]


def apply(sentence: str, scene: Scene, source: Scene) -> list[Scene]:
    """The scenes that the sentence can make of `scene`, one for each way to read it."""
    results = []
    for kind, patterns in GRAMMAR.items():
        for match in filter(None, (re.fullmatch(p, sentence) for p in patterns)):
            words = match.groupdict()
            if words.get("swap_form"):
                words |= {k[5:]: v for k, v in words.items() if k.startswith("swap_")}
            if kind == "style":
                style = [k for k, names in scenes.STYLES.items() if words["style"] in names]
                results += [replace(scene, style=style[0])] if style else []
            elif kind == "add":
                (column, row), (_, H, W) = PLACE[words["place"]], EXTENT
                center = column / 4 * W / min(H, W), row / 4 * H / min(H, W)
                new = Shape(
                    words["form"], words["color"], words["size"], words["go"] or "still", *center
                )
                results.append(replace(scene, shapes=(*scene.shapes, new)))
            else:
                shape = resolve(words, source)
                assert shape == resolve(words, scene), (
                    "the words change their meaning after the first edit"
                )
                to = {k[3:]: v for k, v in words.items() if k.startswith("to_") and v}
                new = {shape: [] if kind == "remove" else [replace(shape, **to)]}
                results.append(
                    replace(scene, shapes=tuple(n for s in scene.shapes for n in new.get(s, [s])))
                )
    return results


def test_instruction_alone_leads_from_source_to_target():
    """A parser written here sees words and source only, and finds the target and no other."""
    rng = np.random.default_rng(5)
    for category in ALL * 600:
        source, target, instruction = shapes._throw(rng, category, EXTENT, scenes.WORLDS["all"])
        if not instruction:  # could not be said
            continue
        text = instruction.removesuffix(".")
        text = text[0].lower() + text[1:]
        readings = apply(text, source, source)
        for joint in re.finditer(", then |,? and(?: also)? ", text):
            for middle in apply(text[: joint.start()], source, source):
                readings += apply(text[joint.end() :], middle, source)
        assert readings and all(reading == target for reading in readings), instruction
        assert bool(category == COMPOSITION) == (not apply(text, source, source)), instruction


def test_instructions_are_clean_text(samples: list[tuple]):
    """Printable ASCII of limited length, no leftovers of a template, some as sentences."""
    instructions = [sample[3] for sample in samples]
    for text in instructions:
        assert text.isascii() and text.isprintable() and 10 <= len(text) <= 200
        assert not re.search(r"[{}]|  | a orange|None|False", text)
        assert text.endswith(".") == text[0].isupper()
    assert {text[0].isupper() for text in instructions} == {True, False}
    assert len(set(instructions)) > 0.9 * len(instructions)


@pytest.mark.slow
def test_every_word_of_the_vocabulary_occurs():
    """500 instructions name every colour, form, size, motion, place, style and verb."""
    dataset = ShapesDataset(11, 500, 5, 48, 48, ALL)
    text = "\n".join(dataset.sample(i)[2].lower() for i in range(500))
    words = [
        *scenes.COLORS,
        *scenes.FORMS,
        *scenes.SIZES,
        *shapes.ADD_VERBS,
        *scenes.PLACES,
        *scenes.MOTIONS,
    ]
    words += ["stands still", *(name for names in scenes.STYLES.values() for name in names)]
    for templates in (shapes.REMOVE, *shapes.CHANGE.values(), shapes.RESTYLE):
        words += [template.split(" {}")[0] for template in templates]
    assert [word for word in words if word not in text] == []


def test_caption_tells_what_the_target_shows(samples: list[tuple]):
    """Background and every object of the target, style included; nothing that was removed."""
    for _, source, target, _, _, _ in samples:
        text = shapes.caption(target)
        assert (
            text[0].isupper()
            and text.endswith(" background.")
            and text.isascii()
            and "  " not in text
        )
        assert target.pattern in text
        gone = [f"{s.size} {s.color} {s.form}" for s in source.shapes if s not in target.shapes]
        for shape in target.shapes:
            hue = target.style not in ("gray", "sepia", "green", "negative")
            look = f"{shape.size} {shape.color} {shape.form}"
            assert (look if hue else f"a {shape.size} {shape.form} ") in text
            assert (
                "standing still" if shape.motion == "still" else f"moving {shape.motion}"
            ) in text
            gone = [g for g in gone if g != look]
        assert not [g for g in gone if g in text]
        assert target.style is None or text.lower().startswith(scenes.STYLES[target.style][0])


# --- The clips show it ----------------------------------------------------------------------------


def test_mask_is_where_source_and_target_differ(samples: list[tuple]):
    """Pixel by pixel for local edits, everything for a style; never tiny."""
    for _, _, target, _, (before, after), mask in samples:
        differs = np.zeros(EXTENT, bool)
        for channel in range(3):
            differs |= before[..., channel] != after[..., channel]
        assert np.array_equal(mask, np.ones_like(mask) if target.style else differs)
        assert mask.mean() > 0.015


def test_clips_are_the_scenes_drawn_again(samples: list[tuple]):
    """Each target is its scene rendered anew, and a removal is the source without that shape."""
    for category, source, target, _, (before, after), _ in samples[:50]:
        assert np.array_equal(before, render(source, EXTENT)) and np.array_equal(
            after, render(target, EXTENT)
        )
        if category == "Local Remove":
            rest = tuple(s for s in source.shapes if s in target.shapes)
            assert len(rest) == len(source.shapes) - 1
            assert np.array_equal(after, render(replace(source, shapes=rest), EXTENT))
        if category == "Global Style":
            assert np.array_equal(after, stylize(before, target.style))


def test_every_object_stays_identifiable(samples: list[tuple]):
    """In most frames about half of each object's pixels are its own; yet objects do overlap."""
    overlaps = 0
    for _, source, target, _, _, _ in samples[:60]:
        for scene in (source, replace(target, style=None)):
            ground, full = render(replace(scene, shapes=()), EXTENT), render(scene, EXTENT)
            for shape in scene.shapes:
                area = (
                    (render(replace(scene, shapes=(shape,)), EXTENT) != ground).any(-1).sum((1, 2))
                )
                others = tuple(s for s in scene.shapes if s != shape)
                seen = (render(replace(scene, shapes=others), EXTENT) != full).any(-1).sum((1, 2))
                assert (seen > 0.4 * area).mean() >= 0.7
                overlaps += bool((seen < 0.9 * area).any())
    assert overlaps > 20


def test_added_object_is_inside_the_frame_at_its_place(samples: list[tuple]):
    """It starts on the 3 x 3 grid, goes straight at the fixed speed, and stays in the frame."""
    added = [target.shapes[-1] for category, _, target, *_ in samples if category == "Local Add"]
    assert len(added) == 30
    for shape in added:
        way = scenes.trajectory(shape, EXTENT)
        assert (
            np.allclose(way[0] * 4, np.rint(way[0] * 4)) and (np.abs(way[0] * 4 - 2) < 1.01).all()
        )
        steps = np.diff(way, axis=0)
        assert np.allclose(steps, steps[0])
        assert math.isclose(
            np.linalg.norm(steps[0]), 0.03 if shape.motion != "still" else 0, abs_tol=1e-9
        )
        assert (way - scenes.SIZES[shape.size] > -0.02).all() and (
            way + scenes.SIZES[shape.size] < 1.02
        ).all()


def test_motion_is_the_same_for_more_frames_and_bounces():
    """A longer clip begins as the shorter one; a walk that turns round at the margins agrees."""
    extent = (120, 48, 80)
    for motion in scenes.MOTIONS:
        shape = Shape("circle", "red", "small", motion, 0.5, 0.7)
        way = scenes.trajectory(shape, extent)
        assert np.array_equal(way[:9], scenes.trajectory(shape, (9, 48, 80)))
        position, step = np.array([0.5, 0.7]), np.array(scenes.MOTIONS[motion], float)
        step *= 0.03 / max(1, np.linalg.norm(step))
        high = np.array([80, 48]) / 48 - scenes.MARGIN
        for t in range(120):
            assert np.allclose(way[t], position, atol=1e-9)
            position = position + step
            for axis in range(2):
                if not scenes.MARGIN <= position[axis] <= high[axis]:
                    border = high[axis] if position[axis] > high[axis] else scenes.MARGIN
                    position[axis], step[axis] = 2 * border - position[axis], -step[axis]


@pytest.mark.parametrize("form", scenes.FORMS)
def test_forms_have_their_area(form: str):
    """What is drawn covers the area of the form, from closed formulas, at any position."""
    tip, notch, h = 1.2, 0.6, 0.6
    area = {
        "circle": math.pi * 0.95**2, "ring": math.pi * (1 - 0.44**2), "square": (2 * 0.86) ** 2,
        "diamond": 2 * (0.72 / 0.8) * (0.72 / 0.6), "triangle": 3 * math.sqrt(3) * 0.62**2,
        "cross": 4 * 2 * 0.36 - (2 * 0.36) ** 2, "heart": (2 * h) ** 2 + math.pi * h**2,
        "star": 10 * 0.5 * tip * notch * math.sin(math.pi / 5),
    }[form]  # fmt: skip
    shape = Shape(form, "red", "large", "diagonally up and right", 0.41, 0.57)
    _, coverage, _ = scenes._raster(shape, (5, 128, 128))
    assert np.allclose(coverage.sum((1, 2)), area * (0.2 * 128) ** 2, rtol=0.015)


def test_styles_do_what_they_are_called():
    """A mosaic's tiles have their mean; gray has no hue; the negative undoes itself."""
    clip = np.random.default_rng(0).integers(0, 256, (2, 50, 75, 3), dtype=np.uint8)
    mosaic = stylize(clip, "mosaic")
    for row in range(6):
        for column in range(9):
            inside = np.ix_(
                range(2),
                [y for y in range(50) if math.floor(y * 6 / 50) == row],
                [x for x in range(75) if math.floor(x * 6 / 50) == column],
            )
            assert np.abs(mosaic[inside] - clip[inside].mean((1, 2), keepdims=True)).max() <= 0.51
    gray = stylize(clip, "gray").astype(int)
    assert (gray == gray[..., :1]).all() and np.abs(
        gray[..., 0] - clip @ [0.299, 0.587, 0.114]
    ).max() <= 0.51
    assert np.array_equal(stylize(stylize(clip, "negative"), "negative"), clip)
    assert set(scenes.STYLES) == {*scenes.COLOR_MAPS, "mosaic"}
