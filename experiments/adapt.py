"""Teach the built-in model people's words and other sizes than 9 x 128 x 128, on CPUs.

    python -m experiments.adapt words --seconds 5250   # the MLLM, the DiT frozen
    python -m experiments.adapt sizes --seconds 5250   # the DiT, the MLLM frozen; at the same time
    python -m experiments.adapt join                   # RUN/model: both

Each can be learned without the other, because what the MLLM tells the DiT about an edit does not
depend on the size of the clip. Products are in bfloat16: worth it on CPUs that have instructions
for it. RESULTS.md has what came of it.
Letters: B clips, d width, T H W frames, height and width.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import cli
import people
import rvedit
import shapes
from mllm import Condition, EditEncoder
from muon import Muon, muon_rates
from scenes import (
    CATEGORIES,
    COMPOSITION,
    PLACES,
    SIDES,
    WORLDS,
    Extent,
    Scene,
    Shape,
    is_clear,
    is_furthest,
    pick,
    render,
    twins_of,
)
from shapes import ShapesDataset
from video import to_float

# --- The same edit in the words of shapes.py ------------------------------------------------------


def plain_words(
    rng: np.random.Generator | None, source: Scene, target: Scene, extent: Extent
) -> str:
    """The edit from source to target by the templates of shapes.py; "" if they cannot say it.

    rng: draws among the templates; None takes the first one always.
    """
    if (target.pattern, target.tone) != (source.pattern, source.tone):
        return ""

    def choose(options):
        return list(options)[0] if rng is None else pick(rng, options)

    pool = tuple(dict.fromkeys(source.shapes + target.shapes))
    # An edited object keeps its motion and its start, by which it is found again.
    left = {(shape.motion, shape.x, shape.y): shape for shape in target.shapes}
    parts = []
    for shape in source.shapes:
        edited = left.pop((shape.motion, shape.x, shape.y), None)
        if edited == shape:
            continue
        if rng is None:
            name = first_name(shape, pool, extent)
        else:
            name = shapes.refer(rng, shape, pool, extent)
        if not name:
            return ""
        if edited is None:
            parts.append(choose(shapes.REMOVE).format(name))
            continue
        names = ("color", "form", "size")
        attributes = tuple(a for a in names if getattr(shape, a) != getattr(edited, a))
        if attributes not in shapes.CHANGE:
            return ""
        values = [getattr(edited, attribute) for attribute in attributes]
        words = choose(shapes.CHANGE[attributes]).format(name, *values)
        parts.append(words.replace(" a orange", " an orange"))
    for shape in left.values():
        place = place_of(shape, extent)
        if not place:
            return ""
        moving = shapes._moving(shape)
        moves = moving.replace("standing", "stands").replace("moving", "moves")
        thing = f"{shape.size} {shape.color} {shape.form}"
        verb = choose(shapes.ADD_VERBS)
        words = choose(shapes.ADD).format(verb, thing, place=place, moving=moving, moves=moves)
        parts.append(words)
    if target.style != source.style:
        parts.append(choose(shapes.RESTYLE).format(choose(shapes.STYLES[target.style])))
    if not 1 <= len(parts) <= 2:
        return ""
    text = parts[0] if len(parts) == 1 else choose(shapes.JOIN).format(*parts)
    return text if rng is None else shapes._as_typed(rng, text)


def first_name(shape: Shape, pool: tuple[Shape, ...], extent: Extent) -> str:
    """The first of the names that `shapes.refer` chooses from; "" if there is none."""
    twins = twins_of(shape, pool, "color", "form")
    thing = f"{shape.color} {shape.form}"
    if not twins:
        return f"the {thing}"
    if not twins_of(shape, pool, "size", "color", "form"):
        return f"the {shape.size} {thing}"
    if not twins_of(shape, pool, "motion", "color", "form"):
        return f"the {thing} {shapes._moving(shape)}"
    for side in SIDES:
        if is_furthest(shape, twins, side, extent):
            return f"the {thing} {side}"
    return ""


def place_of(shape: Shape, extent: Extent) -> str:
    """Which of PLACES an object was added at; "" if at none."""
    _, H, W = extent
    quarter = 4 * min(H, W)
    for place, (column, row) in PLACES.items():
        at = (column * W / quarter, row * H / quarter)
        if np.allclose(at, (shape.x, shape.y)):
            return place
    return ""


# --- Clips and requests ---------------------------------------------------------------------------

MIX = (*CATEGORIES, COMPOSITION, "Local Change", "Local Remove", "Local Add")
REQUESTS = 4  # about each clip: what they have in common is seen once
WORDS_SIZES = ((9, 128, 128),) * 5 + (
    (1, 128, 128), (9, 96, 96), (9, 96, 128), (9, 96, 168), (9, 168, 96), (9, 64, 64),
    (17, 96, 96), (5, 128, 128),
)  # fmt: skip


def request(
    rng: np.random.Generator, category: str, source: Scene, extent: Extent
) -> tuple[Scene, str]:
    """An edit of a scene and a person's words for it, as `people.throw` makes them."""
    parts = [category]
    if category == COMPOSITION:
        parts = rng.permutation([pick(rng, CATEGORIES[:3]), pick(rng, CATEGORIES)]).tolist()
    talk = people.Talk(rng, source, extent, alone=len(parts) == 1, held_out=False)
    sentences = []
    for part in parts:
        rules = [r for r in people.EDITS[part] if talk.alone or r not in people.OF_GROUPS]
        edit = talk.pick(rules)(talk)
        if edit is None:
            return source, ""
        talk.scene, words = edit
        sentences.append(words)
    text = sentences[0] if talk.alone else talk.say("join", a=sentences[0], b=sentences[1])
    return talk.scene, people.typed(rng, text)


def requests(rng: np.random.Generator, scene: Scene, extent: Extent) -> list[tuple[str, str]]:
    """REQUESTS pairs: what is asked, and plain words for the same edit; [] if too few are found.

    A third of what is asked is plain itself, and stays as it is, so that it is not forgotten.
    """
    least = {"Local Add": 1, COMPOSITION: 3}
    categories = [name for name in MIX if len(scene.shapes) >= least.get(name, 2)]
    pairs = []
    for _ in range(40):
        target, natural = request(rng, pick(rng, categories), scene, extent)
        # Always by the same templates: of two ways to say it the student would learn the mean.
        plain = plain_words(None, scene, target, extent)
        if not natural or target == scene or not plain:
            continue
        if rng.random() < 0.35:
            plain = plain_words(rng, scene, target, extent) or plain
            natural = plain
        pairs.append((natural, plain))
        if len(pairs) == REQUESTS:
            return pairs
    return []


class Pairs(IterableDataset):
    """Minibatches without end: clips, and REQUESTS pairs of words for each, clip by clip."""

    def __init__(self, seed: int, batch: int) -> None:
        self.seed, self.batch = seed, batch

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[str], list[str]]]:
        rng = np.random.default_rng(self.seed)
        while True:
            extent = pick(rng, WORDS_SIZES)
            factor = min(extent[1:]) // 32
            looked_at = (extent[0], extent[1] // factor, extent[2] // factor)
            clips, natural, plain = [], [], []
            while len(clips) < self.batch:
                scene = people.throw(rng, pick(rng, MIX), extent, WORLDS["all"])[0]
                if not is_clear(scene, looked_at):
                    continue
                pairs = requests(rng, scene, extent)
                if pairs:
                    clips.append(torch.from_numpy(render(scene, extent)))
                    natural += [words for words, _ in pairs]
                    plain += [words for _, words in pairs]
            yield clips, natural, plain


HOME = (9, 128, 128)  # what the built-in checkpoint was trained on
SIZES = (HOME,) * 15 + ((9, 96, 96), (9, 64, 64)) * 2 + (
    (9, 96, 168), (9, 168, 96), (9, 96, 128), (9, 128, 96), (1, 128, 128), (1, 96, 96),
    (1, 96, 168), (17, 96, 96), (17, 64, 64), (17, 128, 128), (5, 96, 96),
)  # fmt: skip
TOKENS = 8192  # of the DiT, in a minibatch


class Edits(IterableDataset):
    """Minibatches without end of one size each: sources, targets, plain instructions."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        rng = np.random.default_rng(self.seed)
        while True:
            T, H, W = pick(rng, SIZES)
            shapes_set = ShapesDataset(self.seed, 2**31, T, H, W, MIX, coarse=True)
            number = round(TOKENS / (((T - 1) // 4 + 1) * (H // 8) * (W // 8)))
            clips = [shapes_set[int(rng.integers(2**30))] for _ in range(number)]
            sources = torch.stack([clip["source"] for clip in clips])
            targets = torch.stack([clip["target"] for clip in clips])
            yield sources, targets, [clip["instruction"] for clip in clips]


# --- Words: what the MLLM tells the DiT -----------------------------------------------------------


def encode(
    encoder: EditEncoder, clips: list[Tensor], words: list[str], visual: Tensor | None = None
) -> tuple[Condition, Tensor]:
    """X_e, X_v and X_ℓ of REQUESTS instructions about each clip; each clip is looked at once."""
    inputs = encoder.prepare([clip for clip in clips for _ in range(REQUESTS)], words)
    qwen = encoder.qwen
    if visual is None:
        of_clips = inputs.pixel_values.chunk(len(words))[::REQUESTS]
        patches = torch.cat(of_clips)
        with torch.no_grad():
            visual = type(qwen).encode_video(qwen, patches, inputs.grid_thw[::REQUESTS])
        visual = visual.view(len(clips), 1, -1, visual.shape[-1])
        visual = visual.expand(-1, REQUESTS, -1, -1).flatten(0, 2)
    qwen.encode_video = lambda *_: visual
    condition = encoder.encode(inputs)
    del qwen.encode_video
    return condition, visual


@torch.no_grad()
def attention_inputs(model: rvedit.RVEDiT, vae: nn.Module) -> list[Tensor]:
    """For each block (M, d): what its cross-attention is given while real clips are edited."""
    kept: list[list[Tensor]] = [[] for _ in model.dit.blocks]

    def keep(block: int, x: Tensor) -> None:
        rows = x.flatten(0, 1)
        kept[block].append(rows[torch.randperm(len(rows))[:512]])

    hooks = []
    for i, block in enumerate(model.dit.blocks):
        hook = block.cross_attn.register_forward_pre_hook(lambda _, given, i=i: keep(i, given[0]))
        hooks.append(hook)
    shapes_set = ShapesDataset(5, 100_000, 9, 128, 128, coarse=True)
    for first in range(0, 32, 8):
        clips = [shapes_set[first + i] for i in range(8)]
        source = torch.stack([clip["source"] for clip in clips])
        target = torch.stack([clip["target"] for clip in clips])
        words = [clip["instruction"] for clip in clips]
        contexts = model.contexts(model.encoder(list(source), words))
        source, target = vae.encode(to_float(source)), vae.encode(to_float(target))
        for shift in (1, 5):
            u = torch.rand(8)
            t = shift * u / (1 + (shift - 1) * u)
            t[0] = 1
            share = t.view(-1, 1, 1, 1, 1)
            z_t = (1 - share) * target + share * torch.randn_like(target)
            model.dit(z_t, t, contexts, source)
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in kept]


def read_out(model: rvedit.RVEDiT, condition: Condition, x: list[Tensor]) -> list[Tensor]:
    """What the cross-attention of each block makes of a condition, for given inputs (n, d)."""
    contexts = model.contexts(condition)
    rows = zip(model.dit.blocks, x, contexts, strict=True)
    return [
        block.cross_attn(given.expand(len(tokens), -1, -1), tokens, mask)
        for block, given, (tokens, mask) in rows
    ]


def floats(condition: Condition) -> Condition:
    values = [v.float() if v is not None and v.is_floating_point() else v for v in condition]
    return Condition(*values)


def learn_words(run: Path, seconds: float) -> None:
    """Person's words are to tell the DiT, in each block, what plain words for the same edit do."""
    teacher, vae = rvedit.load()
    student, _ = rvedit.load()
    student.requires_grad_(False)
    student.encoder.requires_grad_(True)
    student.encoder.qwen.visual.requires_grad_(False)
    bank = attention_inputs(teacher, vae)

    def some_inputs() -> list[Tensor]:
        return [rows[torch.randperm(len(rows))[:64]] for rows in bank]

    with torch.no_grad():  # the spread over clips and words, in which errors are measured
        clips, _, plain = next(iter(Pairs(99, 8)))
        told = read_out(teacher, encode(teacher.encoder, clips, plain)[0], some_inputs())
        spreads = [(x - x.mean(0)).square().mean() for x in told]

    def loss(minibatch: tuple) -> Tensor:
        clips, natural, plain = minibatch
        x = some_inputs()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                goal, visual = encode(teacher.encoder, clips, plain)
                goal = floats(goal)
                told = read_out(student, goal, x)
            ours = floats(encode(student.encoder, clips, natural, visual)[0])
            errors = []
            for a, b, spread in zip(read_out(student, ours, x), told, spreads, strict=True):
                errors.append((a - b).square().mean().float() / spread)
        editing = (ours.editing - goal.editing).square().mean() / goal.editing.var()
        return torch.stack(errors).mean() + editing / 2

    learn(student, Pairs(1, 16), loss, seconds, 1e-3, muon=20, average=0.998, out=run / "words.pt")


# --- Sizes: the DiT -------------------------------------------------------------------------------


def learn_sizes(run: Path, seconds: float) -> None:
    """The flow loss (λ = 0) at other sizes; at home the goal is the built-in DiT's velocity."""
    model, vae = rvedit.load()
    model.requires_grad_(False)
    teacher = copy.deepcopy(model.dit)
    model.dit.requires_grad_(True)

    def loss(minibatch: tuple) -> Tensor:
        sources, targets, words = minibatch
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                source = vae.encode(to_float(sources))
                target = vae.encode(to_float(targets))
                contexts = model.contexts(model.encoder(list(sources), words))
            u = torch.rand(len(source))
            t = 15 * u / (1 + 14 * u)
            share = t.view(-1, 1, 1, 1, 1)
            noise = torch.randn_like(source)
            z_t = (1 - share) * target + share * noise
            velocity = model.dit(z_t, t, contexts, source).float()
            if sources.shape[1:4] != HOME:
                return (velocity - (noise - target)).square().mean()
            with torch.no_grad():
                goal = teacher(z_t, t, contexts, source).float()
        return 4 * (velocity - goal).square().mean()

    learn(model, Edits(101), loss, seconds, 4e-4, muon=5, average=0.995, out=run / "sizes.pt")


# --- Both -----------------------------------------------------------------------------------------


def learn(
    model: nn.Module,
    minibatches: IterableDataset,
    loss: Callable[[tuple], Tensor],
    seconds: float,
    rate: float,
    muon: float,
    average: float,
    out: Path,
) -> None:
    """Train what has a gradient for so many seconds, and write the mean of its weights to `out`."""
    torch.manual_seed(0)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = muon_rates(weights, muon)
    optimizer = Muon(list(weights.values()), rates, betas=(0.9, 0.99), weight_decay=0)
    means = {name: p.detach().clone() for name, p in weights.items()}
    losses: list[float] = []
    started = time.monotonic()
    for step, minibatch in enumerate(DataLoader(minibatches, None, num_workers=1), start=1):
        past = (time.monotonic() - started) / seconds
        if past >= 1:
            break
        # A rate that rises for 50 steps and falls to 0 by a cosine.
        lr = rate * min(1, step / 50) * (1 + math.cos(math.pi * past)) / 2
        optimizer.param_groups[0]["lr"] = lr
        value = loss(minibatch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        decay = min(average, step / (step + 10))
        with torch.no_grad():
            for name, p in weights.items():
                means[name].lerp_(p, 1 - decay)
        losses.append(value.item())
        if step % 50 == 0:
            mean = sum(losses[-50:]) / 50
            print(f"step {step}, {past * seconds:.0f} s: loss {mean:.4f}", flush=True)
            torch.save(means, out)
    torch.save(means, out)


def join(run: Path) -> None:
    """RUN/model: the built-in model with the MLLM of `words` and the DiT of `sizes`."""
    model, vae = rvedit.load()
    for name in ("words.pt", "sizes.pt"):
        if (run / name).exists():
            model.load_state_dict(torch.load(run / name), strict=False)
    rvedit.save(run / "model", model, vae)


@cli.guarded
def main() -> None:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("words", "sizes", "join"))
    parser.add_argument("--run", type=Path, default=Path("runs/adapt"))
    parser.add_argument("--seconds", type=cli.number(float, 1), default=3000)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if args.part == "words":
        learn_words(args.run, args.seconds)
    elif args.part == "sizes":
        learn_sizes(args.run, args.seconds)
    else:
        join(args.run)


if __name__ == "__main__":
    main()
