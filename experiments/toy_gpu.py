"""The last stage of the toy: its editor, made twice as wide, trained in minutes on one GPU.

Algorithm 1 is `train.training_step`, as everywhere. What is different here is what keeps a GPU busy that needs 0.15 s
for 256 clips: worker processes only throw the dice of shapes.py and pass on scenes as numbers, in words and in tokens;
the GPU paints the clips; every batch has the same sizes, so that blocks are compiled once and nothing waits for the
host. Weights are float32, computing is bfloat16 by autocast. It runs on a CPU as well, in float32, for days.

Letters: B clips, Z = 2B scenes (the sources, then the targets), T H W frames, height, width, K editing tokens,
V visual tokens of a clip, N tokens of a row, d width of the MLLM.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import mllm
import rvedit
import shapes
import train
from muon import Muon, muon_rates
from shapes import BACKGROUNDS, COLOR_MAPS, COLORS, FORMS, PATTERNS, SIZES, Extent, Scene

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 6  # shapes of a scene at most: four, and two added
WORDS, CAPTION_WORDS = 40, 72  # tokens of an instruction and of a caption at most
MIX = ("Local Change", "Composition") * 7 + ("Local Remove", "Local Add", "Global Style") * 2
STEPS, BATCH, RATE, WARMUP, SHIFT = 2509, 256, 8e-4, 150, 15.0
ALIGN_FROM = 0.956  # λ is 0 in so large a part of the steps, then the model's
SAVE_SECONDS = 60


# --- Twice as wide --------------------------------------------------------------------------------


@torch.no_grad()
def widen(model: rvedit.RVEDiT, seed: int = 0) -> rvedit.RVEDiT:
    """The same function by a DiT of twice the width: each channel, head and hidden unit of it stands there twice.

    What reads a channel twice gives each copy half of its weight, plus and minus the same noise: this cancels in the
    output but not in the gradients, so that the copies part in training.
    """
    dit = model.config.dit
    dit = dataclasses.replace(
        dit, dim=2 * dit.dim, ffn_dim=2 * dit.ffn_dim, num_heads=2 * dit.num_heads
    )
    wide = rvedit.RVEDiT(dataclasses.replace(model.config, dit=dit), model.encoder.tokenizer)
    weights, generator = model.state_dict(), torch.Generator().manual_seed(seed)
    for name, parameter in wide.named_parameters():
        w = weights[name].float()
        if name.endswith("modulation"):  # (1, 6, d) or (1, 2, d): not a matrix, outputs are last
            w = w.repeat(1, 1, 2)
        elif len(w) != len(parameter):  # outputs, of which time_projection has six groups
            w = w.unflatten(0, (6 if "time_projection" in name else 1, -1))
            w = torch.cat((w, w), dim=1).flatten(0, 1)
        if w.shape != parameter.shape:  # inputs
            noise = w.std() / 2 * torch.randn(w.shape, generator=generator)
            w = torch.cat((w / 2 + noise, w / 2 - noise), dim=1)
        parameter.copy_(w)
    return wide.eval()


# --- Scenes as numbers ----------------------------------------------------------------------------


class Scenes(NamedTuple):
    """What `paint` needs to know of Z scenes."""

    centers: Tensor  # (Z, SLOTS, T, 2), as (x, y)
    looks: Tensor  # (Z, SLOTS, 4): radius, 0 where there is no shape, and colour
    forms: Tensor  # (Z, SLOTS), as numbers
    ground: Tensor  # (Z, 11): cosine and sine of the angle, wave number, least and largest u, the two tones
    patterns: Tensor  # (Z,), as numbers
    grade: Tensor  # (Z, 12): matrix and bias of the style
    mosaics: Tensor  # which of the scenes are in that style, (number,)


class Draw(NamedTuple):
    """A minibatch before it is painted."""

    scenes: Scenes
    ids: Tensor  # the instructions in the frame of the chat, padded on the left, (B, N)
    words: Tensor  # how many tokens of a row are the instruction's, (B,)
    ref_ids: Tensor | None  # likewise the captions; None if λ = 0
    ref_words: Tensor | None


def pack(scene: Scene, extent: Extent) -> tuple[np.ndarray, ...]:
    """A scene's row in all but the last tensor of `Scenes`."""
    T, H, W = extent
    centers, looks, forms = (
        np.zeros((SLOTS, T, 2), np.float32),
        np.zeros((SLOTS, 4), np.float32),
        np.zeros(SLOTS, int),
    )
    for i, shape in enumerate(scene.shapes):
        centers[i] = shapes.trajectory(shape, extent)
        looks[i] = SIZES[shape.size], *COLORS[shape.color]
        forms[i] = [*FORMS].index(shape.form)
    cos, sin, unit = math.cos(scene.angle), math.sin(scene.angle), min(H, W)
    ends = [sorted((c * 0.5 / unit, c * (n - 0.5) / unit)) for c, n in ((cos, W), (sin, H))]
    limits = np.sum(ends, axis=0)  # u of the corners
    ground = [cos, sin, 2 * math.pi / scene.period, *limits, *np.ravel(BACKGROUNDS[scene.tone])]
    matrix, bias = COLOR_MAPS.get(scene.style, (np.eye(3), (0, 0, 0)))
    pattern, grade = [*PATTERNS].index(scene.pattern), [*np.ravel(matrix), *bias]
    return (
        centers,
        looks,
        forms,
        np.array(ground, np.float32),
        np.array(pattern),
        np.array(grade, np.float32),
    )


def pack_all(scenes: Sequence[Scene], extent: Extent) -> Scenes:
    """The rows of Z scenes, and which of them are mosaics."""
    columns = zip(*(pack(scene, extent) for scene in scenes), strict=True)
    mosaics = torch.tensor(
        [i for i, scene in enumerate(scenes) if scene.style == "mosaic"], dtype=torch.long
    )
    return Scenes(*(torch.from_numpy(np.stack(column)) for column in columns), mosaics)


class Draws(Dataset):
    """Minibatches by number, each a function of (seed, number); from `align_from` on with captions."""

    def __init__(
        self, encoder: mllm.EditEncoder, extent: Extent, batch: int, seed: int, align_from: int
    ) -> None:
        self.encoder, self.extent, self.batch, self.seed, self.align_from = (
            encoder,
            extent,
            batch,
            seed,
            align_from,
        )
        [(clip, _)] = encoder.prepare([torch.zeros(*extent, 3, dtype=torch.uint8)], ["x"]).spans
        self.visual = clip.stop - clip.start

    def __getitem__(self, number: int) -> Draw:
        rng, first = np.random.default_rng((self.seed, number)), number * self.batch
        coarse = (
            self.extent[0],
            self.extent[1] // 4,
            self.extent[2] // 4,
        )  # fine enough to see what is clear
        categories = [MIX[i % len(MIX)] for i in range(first, first + self.batch)]
        drawn = [shapes.draw_edit(rng, category, self.extent, coarse) for category in categories]
        sources, targets, instructions = zip(*drawn, strict=True)
        edit, ref = self.rows(instructions, WORDS), (None, None)
        if number >= self.align_from:
            ref = self.rows([shapes.caption(scene) for scene in targets], CAPTION_WORDS)
        return Draw(pack_all(sources + targets, self.extent), *edit, *ref)

    def rows(self, texts: Sequence[str], most: int) -> tuple[Tensor, Tensor]:
        """Token ids (B, N), and how many of a row are the text's, (B,). N, a multiple of 8, has room for `most`."""
        encoder, number = self.encoder, self.encoder.config.num_editing_tokens
        chats = [
            mllm.chat_ids(encoder.tokenizer, text, self.visual, number, encoder.qwen.config)
            for text in texts
        ]
        words = torch.tensor([span.stop - span.start for _, _, span in chats])
        if words.max() > most:
            raise ValueError(f"a text has {words.max()} tokens, more than {most}")
        frame = len(chats[0][0]) - int(words[0])  # tokens that are not the text's
        ids = torch.full((len(texts), -(-(frame + most) // 8) * 8), chats[0][0][0])
        for row, (chat, _, _) in zip(ids, chats, strict=True):
            row[-len(chat) :] = torch.tensor(chat)
        return ids, words


# --- The painter: shapes.render for many scenes ---------------------------------------------------


def choose(options: Sequence[Tensor], index: Tensor) -> Tensor:
    """Of tensors of one shape, in each place the one whose number the index, broadcast, has there."""
    out = options[0]
    for i, option in enumerate(options[1:], start=1):
        out = torch.where(index == i, option, out)
    return out


def pixel_centers(extent: Extent, device: torch.device) -> tuple[Tensor, Tensor]:
    y, x = ((torch.arange(n, device=device) + 0.5) / min(extent[1:]) for n in extent[1:])
    return y[:, None], x  # (H, 1), (W,)


def background(ground: Tensor, patterns: Tensor, extent: Extent) -> Tensor:
    """shapes._background, (Z, 3, T, H, W)."""
    y, x = pixel_centers(extent, ground.device)
    cos, sin, k, low, high = (c.view(-1, 1, 1) for c in ground[:, :5].unbind(1))
    u, v = x * cos + y * sin, y * cos - x * sin  # (Z, H, W)
    ramp, edge = (u - low) / (high - low), min(extent[1:]) / k
    mixes = [pattern(torch, u, v, ramp, k, edge) for pattern in PATTERNS.values()]
    mix = choose(mixes, patterns.view(-1, 1, 1)).clamp(0, 1)[:, None, None]  # (Z, 1, 1, H, W)
    first, second = ground[:, 5:].view(-1, 2, 3, 1, 1, 1).unbind(1)
    return (first + mix * (second - first)).repeat(1, 1, extent[0], 1, 1)


def lay(canvas: Tensor, centers: Tensor, looks: Tensor, forms: Tensor) -> Tensor:
    """One more shape on every canvas, (Z, 3, T, H, W); the others are one slot of `Scenes`."""
    extent = canvas.shape[2:]
    rows, columns = pixel_centers(extent, canvas.device)
    radius = looks[:, 0].view(-1, 1, 1, 1)
    unit = radius.clamp(min=1e-3)  # an absent shape has none
    x = (columns - centers[:, :, 0, None, None]) / unit  # (Z, T, 1, W), in radii from the centre
    y = (rows - centers[:, :, 1, None, None]) / unit  # (Z, T, H, 1)
    distances = [form(torch, x.abs(), y) for form in FORMS.values()]
    distance = choose(distances, forms.view(-1, 1, 1, 1)) * (
        unit * min(extent[1:])
    )  # (Z, T, H, W), pixels
    cover = ((0.5 - distance).clamp(0, 1) * (radius > 0))[:, None]
    light = (1.02 - 0.08 * y)[:, None]
    return canvas * (1 - cover) + cover * (looks[:, 1:, None, None, None] * light)


def develop(canvas: Tensor, grade: Tensor) -> Tensor:
    """Whole levels, then those of the style."""
    r, g, b = (canvas + 0.5).clamp(0, 255).floor().unbind(1)
    m = [number.view(-1, 1, 1, 1) for number in grade.unbind(1)]
    graded = [r * m[3 * i] + g * m[3 * i + 1] + b * m[3 * i + 2] + m[9 + i] for i in range(3)]
    return (torch.stack(graded, dim=1) + 0.5).clamp(0, 255).floor()


def tile(frames: Tensor) -> Tensor:
    """shapes.stylize(frames, "mosaic"), (number, 3, T, H, W)."""
    for axis in (-2, -1):
        index = torch.arange(frames.shape[axis], device=frames.device) * 6 // min(frames.shape[-2:])
        same = (index[:, None] == index).float()
        frames = (frames.movedim(axis, -1) @ (same / same.sum(0))).movedim(-1, axis)
    return (frames + 0.5).floor()


PAINTERS = {
    part.__name__: part for part in (background, lay, develop)
}  # or what they are compiled to


def paint(scenes: Scenes, extent: Extent) -> Tensor:
    """Z clips in whole levels, but float32 (Z, 3, T, H, W)."""
    canvas = PAINTERS["background"](scenes.ground, scenes.patterns, extent)
    for slot in range(SLOTS):
        canvas = PAINTERS["lay"](canvas, *(x[:, slot].contiguous() for x in scenes[:3]))
    frames = PAINTERS["develop"](canvas, scenes.grade)
    if len(scenes.mosaics):
        frames[scenes.mosaics] = tile(frames[scenes.mosaics])
    return frames


# --- The MLLM for batches of one size -------------------------------------------------------------


class Reader:
    """`EditEncoder.encode` of batches that all have the same sizes: none of them depends on how long a text is.

    Textual tokens are padded on the left and not on the right: to cross-attention, which knows no positions, the same.
    """

    def __init__(self, encoder: mllm.EditEncoder, extent: Extent, device: str) -> None:
        self.encoder, self.vision, most = (
            encoder,
            encoder.qwen.config.vision,
            encoder.config.max_mllm_frames,
        )
        inputs = encoder.prepare([torch.zeros(*extent, 3, dtype=torch.uint8)], ["x"])
        ids, grids, [(clip, _)] = inputs.input_ids, inputs.grid_thw, inputs.spans
        self.grid, self.V, self.before = (
            tuple(grids[0].tolist()),
            clip.stop - clip.start,
            ids.shape[1] + clip.start,
        )
        if [side * self.vision.patch_size for side in self.grid[1:]] != list(extent[1:]):
            raise ValueError(
                f"clips of {extent[1]} x {extent[2]} would be resized for the MLLM: choose another size"
            )
        positions = encoder.qwen.position_ids(ids, grids)[:, 0].T.to(device)  # (N, 3)
        self.cells = positions[self.before : self.before + self.V]
        self.behind = int(
            positions[self.before + self.V, 0]
        )  # where the text goes on behind the clip
        frames = (
            torch.arange(extent[0])
            if extent[0] <= most
            else torch.linspace(0, extent[0] - 1, most).round().long()
        )
        self.frames = torch.cat(
            (frames, frames[-1:].expand(-len(frames) % self.vision.temporal_patch_size))
        ).to(device)
        mean_and_std = (mllm.PIXEL_MEAN, mllm.PIXEL_STD)
        self.mean, self.std = (
            255 * torch.tensor(x, device=device).view(3, 1, 1, 1) for x in mean_and_std
        )

    def patches(self, video: Tensor) -> Tensor:
        """Of whole levels (B, 3, T, H, W), as `mllm.preprocess_frames` makes them of one clip."""
        (t, h, w), merge, patch = self.grid, self.vision.spatial_merge_size, self.vision.patch_size
        x = (video[:, :, self.frames] - self.mean) / self.std
        x = x.reshape(len(x), 3, t, -1, h // merge, merge, patch, w // merge, merge, patch)
        x = x.permute(
            0, 2, 4, 7, 5, 8, 1, 3, 6, 9
        )  # (B, t, h/merge, w/merge, merge, merge, 3, pair, patch, patch)
        return x.flatten(6).flatten(0, 5)

    def __call__(self, inputs: tuple[Tensor, Tensor, Tensor]) -> mllm.Condition:
        """inputs: whole levels (B, 3, T, H, W), ids (B, N), words (B,). The tokens that are not a text's are known."""
        (video, ids, words), encoder, qwen, V = inputs, self.encoder, self.encoder.qwen, self.V
        (B, N), K, device = ids.shape, len(encoder.queries), ids.device
        at, text_end = (
            torch.arange(N, device=device),
            N - K - 2,
        )  # behind the queries come two more tokens
        start = (text_end - words - 1 - V)[:, None]  # of the clip, (B, 1)
        cell = (at - start).clamp(0, V - 1)  # (B, N)
        is_clip = ((at >= start) & (at < start + V))[..., None]
        real = at >= start - self.before

        visual = qwen.visual(self.patches(video), (self.grid,) * B).unflatten(0, (B, V))
        visual = visual.gather(1, cell[..., None].expand(-1, -1, visual.shape[-1]))  # (B, N, d)
        x = qwen.model.embed_tokens(ids)
        x = torch.where(is_clip, visual.to(x.dtype), x)
        x = torch.cat((x[:, :text_end], encoder.queries.expand(B, -1, -1), x[:, -2:]), dim=1)
        text = at - start + torch.where(at < start, self.before, self.behind - V)
        positions = (
            torch.where(is_clip, self.cells[cell], text[..., None]) * real[..., None]
        )  # (B, N, 3)
        hidden = qwen.decode(x, positions.movedim(-1, 0), real)

        rows = (start + torch.arange(V, device=device))[..., None].expand(-1, -1, hidden.shape[-1])
        most = (N - K - 3 - V - self.before) // 8 * 8  # of a text
        editing = encoder.editing_connector(hidden[:, -K:])
        visual = encoder.visual_connector(hidden.gather(1, rows))
        textual = encoder.textual_connector(hidden[:, text_end - most : text_end])
        everything = real.new_ones(B, K + V)
        textual_mask = torch.arange(most, device=device) >= most - words[:, None]
        return mllm.Condition(
            editing, visual, textual, everything[:, :K], everything[:, :V], textual_mask
        )


# --- The run --------------------------------------------------------------------------------------


def save_state(state: dict[str, Any], file: Path) -> None:
    """Complete or not at all."""
    torch.save(state, f"{file}.partial")
    os.replace(f"{file}.partial", file)


class Editor:
    """What is trained, and how: from the last saved step in `out`, or from `start` made twice as wide."""

    def __init__(
        self, start: Path, out: Path, steps: int, batch: int, extent: Extent, seed: int = 1
    ) -> None:
        model, self.vae = rvedit.load(start)
        self.model, self.out, self.steps, self.extent, self.seed = (
            widen(model).to(DEVICE),
            out,
            steps,
            extent,
            seed,
        )
        self.config, self.step = self.model.config, 0
        self.vae.to(DEVICE)
        self.draws = Draws(model.encoder, extent, batch, seed, math.ceil(ALIGN_FROM * steps))
        self.model.encoder.encode = Reader(self.model.encoder, extent, DEVICE)
        # The networks compute in bfloat16, the losses do not.
        half, dit = torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"), self.model.dit
        for part, name in (
            (dit, "forward"),
            (dit, "features"),
            (self.model.encoder, "encode"),
            (self.vae, "encode"),
        ):
            setattr(part, name, half(getattr(part, name)))
        self.weights = dict(self.model.requires_grad_().named_parameters())
        rates = muon_rates(self.weights, train.RECIPES["toy"]["muon"])
        self.optimizer = Muon([*self.weights.values()], rates, betas=(0.9, 0.99), weight_decay=0.01)
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
            self.step = state["step"]
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])

    def save(self) -> None:
        state = {
            "step": self.step,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(state, self.out / "state.pt")

    def compile(self) -> None:
        """Every block of a kind has the same sizes in all steps, but those before and behind the routing boundary."""
        qwen = self.model.encoder.qwen
        for block in (*self.model.dit.blocks, *qwen.model["layers"], *qwen.visual.blocks):
            block.forward = torch.compile(block.forward, dynamic=False)
        PAINTERS.update(
            {name: torch.compile(part, dynamic=False) for name, part in PAINTERS.items()}
        )

    def minibatch(self, draw: Draw) -> data.Batch:
        """Line 3 of Algorithm 1, with t and noise from (seed, step)."""
        scenes = Scenes(*(x.to(DEVICE, non_blocking=True) for x in draw.scenes))
        edit, ref = (
            [x.to(DEVICE, non_blocking=True) for x in pair if x is not None]
            for pair in (draw[1:3], draw[3:])
        )
        random = torch.Generator(DEVICE).manual_seed(self.seed * 10**9 + self.step)
        B, vae, (T, H, W) = len(draw.ids), self.vae.config, self.extent
        size = (T - 1) // vae.temporal_factor + 1, H // vae.spatial_factor, W // vae.spatial_factor
        u = torch.rand(B, generator=random, device=DEVICE)
        noise = torch.randn(B, vae.z_dim, *size, generator=random, device=DEVICE)
        source, target = paint(scenes, self.extent).split(B)
        ref_inputs = (target, *ref) if ref else None
        clips = source.movedim(1, -1), target.movedim(1, -1)
        return data.Batch(
            *clips, SHIFT * u / (1 + (SHIFT - 1) * u), noise, (source, *edit), ref_inputs, 0
        )

    def advance(self, draw: Draw) -> Tensor:
        """One step of Algorithm 1; its flow loss and alignment loss, (2,)."""
        batch = self.minibatch(draw)
        weight = self.config.align_weight if batch.ref_inputs else 0
        self.model.config = dataclasses.replace(self.config, align_weight=weight)
        depth = data.generator(self.seed, "depth", self.step)
        depth = int(torch.randint(1, self.config.dit.num_blocks + 1, (), generator=depth))
        total, flow, align = train.training_step(self.model, self.vae, batch, depth)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0, foreach=True)
        rate = RATE * min(1, (self.step + 1) / WARMUP) * (1 - self.step / self.steps)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return torch.stack((flow.mean(), align))


def train_editor(start: Path, out: Path, workers: int = os.cpu_count() or 1, **given: Any) -> None:
    """Train the editor from `start` and write it to out/model; goes on where it was stopped, with the same options.

    given: steps, batch and size (T, H, W) where they are not STEPS, BATCH and the size that the toy ships for.
    """
    if not start.exists():
        raise ValueError(f"{start} does not exist yet: an earlier stage makes it")
    options, file = dict(steps=STEPS, batch=BATCH, size=shapes.TOY_EXTENT), out / "run.json"
    options |= (json.loads(file.read_text()) if file.exists() else {}) | given
    steps = options["steps"]
    editor = Editor(start, out, steps, options["batch"], tuple(options["size"]))
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options))
    fork = dict(multiprocessing_context="fork", prefetch_factor=6) if workers else {}
    draws = DataLoader(
        editor.draws, None, sampler=range(editor.step, steps), num_workers=workers, **fork
    )
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        editor.compile()
    losses, saved = [], time.monotonic()
    with (
        tqdm(draws, total=steps, initial=editor.step, unit="step") as bar,
        open(out / "log.jsonl", "a") as log,
    ):
        for draw in bar:
            losses.append(editor.advance(draw))
            due = time.monotonic() - saved > SAVE_SECONDS or editor.step == steps
            if due or editor.step % 50 == 0:
                flow, align = torch.stack(losses).mean(0).tolist()
                report = dict(
                    step=editor.step,
                    flow=flow,
                    align=align,
                    lr=editor.optimizer.param_groups[0]["lr"],
                )
                log.write(json.dumps(report) + "\n")
                log.flush()
                bar.set_postfix(flow=f"{flow:.4f}", align=f"{align:.3f}")
                losses = []
                if not math.isfinite(flow):
                    raise ValueError(
                        f"the loss is not finite at step {editor.step}: {out} has the last good state"
                    )
            if due:
                editor.save()
                saved = time.monotonic()
    editor.model.config = editor.config
    rvedit.save(out / "model", editor.model, editor.vae)
