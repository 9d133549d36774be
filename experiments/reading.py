"""Teach the MLLM to read clips and instructions before it edits.

The paper's MLLM, Qwen2.5-VL, comes pretrained. The toy's starts from random weights: from the flow
loss alone, it takes very many clips until it matches words with objects. Here it learns as Qwen
did, by next tokens: of captions, and of answers to questions about a clip whose scene is known.
A question is about one object or one edit, so that an answer says what was understood.

The network is vision tower and language tower, with the transposed word embedding as its output
head (as in Qwen2.5-VL-3B). There is no DiT and no VAE. One row holds a clip and several questions:

    chat frame, clip, question <|im_end|> answer <|im_end|> question <|im_end|> answer ...

so that an instruction later stands where the first question stood.
Letters: B clips, N tokens of a row, M answer tokens of a batch, d width of the language tower.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

import rvedit
from experiments.learning import DEVICE, cosine, learn
from mllm import CHAT_START, EditEncoder, preprocess_frames
from muon import Muon
from scenes import (
    COLORS,
    FORMS,
    PLACES,
    SIZES,
    STYLES,
    WORLDS,
    Extent,
    Scene,
    Shape,
    pick,
    render,
    twins_of,
)
from shapes import caption, draw_edit, training_set

SEED = 3
SIZES_READ: tuple[Extent, ...] = (  # T, H, W of a step's clips, by turns
    (1, 64, 64),
    (1, 64, 96),
    (1, 96, 64),
    (5, 64, 64),
    (1, 96, 96),
    (1, 64, 128),
)
BATCH = 48  # clips of a minibatch
QUESTIONS = 6  # of each clip
RATE, WARMUP = 2e-3, 20
MATRIX_RATE = 5.0  # of Muon's matrices, in units of RATE
NUMBERS = ("no", "one", "two", "three", "four")

# --- Questions ------------------------------------------------------------------------------------


def full_name(shape: Shape) -> str:
    return f"{shape.size} {shape.color} {shape.form}"


def name_without(rng: np.random.Generator, shape: Shape, scene: Scene, asked: str) -> str:
    """Words for one object, by attributes other than the one that is asked for; "" if none do."""
    names = []
    for attributes in (("color",), ("form",), ("color", "form"), ("size",), ("size", "form")):
        if asked not in attributes and not twins_of(shape, scene.shapes, *attributes):
            words = [getattr(shape, name) for name in ("size", "color") if name in attributes]
            words.append(shape.form if "form" in attributes else "one")
            names.append("the " + " ".join(words))
    return pick(rng, names or [""])


def nearest_place(shape: Shape, extent: Extent) -> str:
    """The one of PLACES that an object's centre is nearest to in the first frame."""
    _, H, W = extent
    distances = {}
    for place, (column, row) in PLACES.items():
        x, y = column * W / (4 * min(H, W)), row * H / (4 * min(H, W))
        distances[place] = math.hypot(x - shape.x, y - shape.y)
    return min(distances, key=distances.get)


def ask_attribute(rng: np.random.Generator, scene: Scene, extent: Extent) -> tuple[str, str]:
    """What colour, form, size, place or motion one object has."""
    T, _, _ = extent
    asked = pick(rng, ["color", "color", "form", "form", "size", "place"] + ["motion"] * (T > 1))
    shape = pick(rng, scene.shapes)
    name = name_without(rng, shape, scene, asked)
    if not name:
        return "", ""
    if asked == "place":
        return f"where is {name}?", nearest_place(shape, extent)
    if asked == "motion":
        return f"how does {name} move?", shape.motion
    question = {"color": "what color is {}?", "form": "what is {}?", "size": "how big is {}?"}
    return question[asked].format(name), getattr(shape, asked)


def ask_place(rng: np.random.Generator, scene: Scene, extent: Extent) -> tuple[str, str]:
    """What is at a place where one object is, in the first frame."""
    shape = pick(rng, scene.shapes)
    place = nearest_place(shape, extent)
    if sum(nearest_place(other, extent) == place for other in scene.shapes) > 1:
        return "", ""
    return f"what is {place}?", full_name(shape)


def ask_number(rng: np.random.Generator, scene: Scene, extent: Extent) -> tuple[str, str]:
    """How many objects there are, of a colour, of a form, or in all."""
    attribute, values = pick(rng, [("color", scene.world.colors), ("form", scene.world.forms)])
    value = pick(rng, values)
    if rng.random() < 0.5:  # of a kind that is there
        value = getattr(pick(rng, scene.shapes), attribute)
    if rng.random() < 0.2:
        return "how many objects are there?", NUMBERS[len(scene.shapes)]
    number = sum(getattr(shape, attribute) == value for shape in scene.shapes)
    return f"how many are {value}?", NUMBERS[number]


def ask_background(rng: np.random.Generator, scene: Scene, extent: Extent) -> tuple[str, str]:
    return "what is the background?", f"{scene.pattern} {scene.tone}"


def ask_caption(rng: np.random.Generator, scene: Scene, extent: Extent) -> tuple[str, str]:
    return "describe the video.", caption(scene).lower()


ABOUT_SCENES = (ask_attribute,) * 6 + (ask_place,) * 2 + (ask_number, ask_background, ask_caption)


def effect(source: Scene, target: Scene) -> str:
    """What an edit does, in one kind of words whatever the words of the instruction were."""
    parts = []
    gone = [shape for shape in source.shapes if shape not in target.shapes]
    new = [shape for shape in target.shapes if shape not in source.shapes]
    for shape in gone:
        # A changed object keeps its place and motion.
        same = [other for other in new if (other.x, other.y) == (shape.x, shape.y)]
        becomes = full_name(same[0]) if same else "nothing"
        parts.append(f"{full_name(shape)} becomes {becomes}")
        new = [other for other in new if other not in same]
    for shape in new:
        parts.append(f"new {full_name(shape)}")
    if target.tone != source.tone:
        parts.append(f"background becomes {target.tone}")
    if target.style is not None:
        parts.append(f"all becomes {STYLES[target.style][0]}")
    return ", ".join(parts) or "nothing"


# --- Minibatches ----------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """B clips with questions and answers."""

    ids: Tensor  # (B, N), padded on the right
    targets: Tensor  # (B, N), the next token where it is an answer's, elsewhere -1
    patches: Tensor  # of all clips, as `mllm.preprocess_frames` makes them
    grids: Tensor  # (B, 3)


class Lessons(Dataset):
    """Minibatches by step, each a function of the step alone; no clip comes twice.

    world: a key of `scenes.WORLDS`.
    """

    def __init__(self, encoder: EditEncoder, batch: int, world: str = "all") -> None:
        self.tokenizer = encoder.tokenizer
        self.config = encoder.config
        self.qwen_config = encoder.qwen.config
        self.batch = batch
        self.world = world

    def __getitem__(self, step: int) -> Lesson:
        rng = np.random.default_rng((SEED, step))
        extent = SIZES_READ[step % len(SIZES_READ)]
        rows, targets, patches, grids = [], [], [], []
        for _ in range(self.batch):
            scene, pairs = draw_questions(rng, extent, self.world)
            clip = torch.from_numpy(render(scene, extent))
            clip_patches, grid = preprocess_frames(
                clip,
                self.qwen_config.vision,
                self.config.max_mllm_frames,
                self.config.min_mllm_pixels,
                self.config.max_mllm_pixels,
            )
            num_visual = len(clip_patches) // self.qwen_config.vision.spatial_merge_size**2
            ids, is_answer = self.encode(num_visual, pairs)
            rows.append(torch.tensor(ids[:-1]))
            following = torch.tensor(ids[1:])
            targets.append(following.where(torch.tensor(is_answer[1:]), -1))
            patches.append(clip_patches)
            grids.append(grid)
        return Lesson(
            ids=pad_sequence(rows, batch_first=True),
            targets=pad_sequence(targets, batch_first=True, padding_value=-1),
            patches=torch.cat(patches),
            grids=torch.tensor(grids),
        )

    def encode(self, num_visual: int, pairs: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """Token ids of a row, and which of them are an answer's."""

        def encode(text: str) -> list[int]:
            return self.tokenizer.encode(text).ids

        ids = encode(CHAT_START)
        ids += [self.qwen_config.video_token_id] * num_visual + encode("<|vision_end|>")
        is_answer = [False] * len(ids)
        for question, answer in pairs:
            question_ids = encode(f"{question}<|im_end|>")
            # The space makes its first word the same token as within a sentence.
            answer_ids = encode(f" {answer}<|im_end|>")
            ids += question_ids + answer_ids
            is_answer += [False] * len(question_ids) + [True] * len(answer_ids)
        return ids, is_answer


def draw_questions(
    rng: np.random.Generator, extent: Extent, world: str = "all"
) -> tuple[Scene, list[tuple[str, str]]]:
    """A scene, and pairs of questions and answers about it. One of them is about an edit."""
    # The clips, words and categories that the editor will meet.
    clips = training_set(SEED, extent, world)
    category = pick(rng, clips.categories)
    source, target, instruction = draw_edit(
        rng, category, extent, clips.looked_at, clips.words, WORLDS[world]
    )
    pairs = [(instruction, effect(source, target))]
    while len(pairs) < QUESTIONS:
        question, answer = pick(rng, ABOUT_SCENES)(rng, source, extent)
        if question and question not in [asked for asked, _ in pairs]:
            pairs.append((question, answer))
    rng.shuffle(pairs)
    return source, pairs


# --- Training -------------------------------------------------------------------------------------


def next_token_logits(encoder: EditEncoder, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Logits (M, vocabulary) and answers (M,) of the tokens that are to be predicted."""
    qwen = encoder.qwen
    device = encoder.queries.device
    # Padding on the right needs no mask: a causal model never looks there.
    hidden = qwen(lesson.ids.to(device), lesson.patches.to(device), lesson.grids, encoder.queries)
    targets = lesson.targets.to(device)
    asked = targets >= 0
    words = qwen.model.embed_tokens.weight  # (vocabulary, d), of variance 1
    logits = hidden[asked] @ words.T / math.sqrt(words.shape[1])
    return logits.float(), targets[asked]


def word_tokens(tokenizer: Tokenizer, words: list[str]) -> Tensor:
    """The tokens of words that are one token each."""
    found = []
    for word in words:
        ids = tokenizer.encode(f" {word}").ids
        if len(ids) == 1:
            found.append(ids[0])
    return torch.tensor(found)


def read_lessons(
    model: rvedit.RVEDiT, steps: int, batch: int, state: Path, world: str = "all"
) -> None:
    """Train the MLLM of an editor for `steps`, from what the file `state` holds."""
    encoder = model.encoder
    qwen = encoder.qwen.to(DEVICE)
    encoder.queries.data = encoder.queries.data.to(DEVICE)
    named = dict(qwen.named_parameters())
    matrices = {}
    for name, weight in named.items():
        if weight.ndim == 2 and "embed_tokens" not in name:
            matrices[weight] = MATRIX_RATE
    optimizer = Muon(list(named.values()), matrices, betas=(0.9, 0.95), weight_decay=0.01)
    content = word_tokens(encoder.tokenizer, [*COLORS, *FORMS, *SIZES]).to(DEVICE)

    def loss(lesson: Lesson, step: int) -> tuple[Tensor, dict[str, float]]:
        logits, answers = next_token_logits(encoder, lesson)
        value = F.cross_entropy(logits, answers)
        # Every clip is new, so this is measured on what was never trained on.
        is_content = torch.isin(answers, content)
        right = (logits.argmax(1) == answers)[is_content].float().mean()
        return value, {"loss": value.item(), "colour, form and size words right": right.item()}

    def rate(step: int) -> float:
        return cosine(step, steps, RATE, WARMUP)

    learn("MLLM", qwen, optimizer, Lessons(encoder, batch, world), steps, rate, loss, state)
    encoder.cpu()
