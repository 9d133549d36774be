"""Teach the built-in model's MLLM people's words, on CPUs and without its DiT's forward pass.

    torchrun --nproc_per_node 2 -m experiments.words --seconds 5400

What the MLLM says about an edit in a person's words is to be what it says today about the same edit
in plain words, the only ones that it knew: the DiT, which stays as it is, then makes the same edit.
Both are compared where the DiT reads them, in its cross-attention (`read_out`).

A request is short beside the clip that it is about, so all requests about a clip share what comes
before them: the system prompt and the visual tokens are read once (`read`).

Letters: B clips, R requests about each, P tokens before a request, S of a request; d width of a
tower, D width of an attention head; n queries of a cross-attention.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli

if __name__ == "__main__":
    cli.begin()

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import people
import rvedit
import shapes
from mllm import CHAT_START, EditEncoder, preprocess_frames
from muon import Muon, muon_rates
from qwen import DecoderLayer, Qwen2_5_VL, rotary_frequencies, rotate
from scenes import (
    CATEGORIES,
    COMPOSITION,
    NOT_THERE,
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
from video import to_float

# --- The same edit in plain words -----------------------------------------------------------------


def plain_words(source: Scene, target: Scene, extent: Extent) -> str:
    """The edit from source to target by the templates of shapes.py; "" if they cannot say it.

    Always by the first of them: of several ways to say an edit a student would learn the mean.
    """
    if (target.pattern, target.tone) != (source.pattern, source.tone):
        return ""
    # An edited object keeps its motion and its start, by which it is found again.
    left = {(shape.motion, shape.x, shape.y): shape for shape in target.shapes}
    parts = []
    for shape in source.shapes:
        edited = left.pop((shape.motion, shape.x, shape.y), None)
        if edited == shape:
            continue
        # It has to be told apart from all others, but not from what it becomes.
        others = tuple(other for other in target.shapes if other != edited)
        name = first_name(shape, tuple(dict.fromkeys(source.shapes + others)), extent)
        if not name:
            return ""
        if edited is None:
            parts.append(shapes.REMOVE[0].format(name))
            continue
        names = ("color", "form", "size")
        attributes = tuple(a for a in names if getattr(shape, a) != getattr(edited, a))
        if attributes not in shapes.CHANGE:
            return ""
        values = [getattr(edited, attribute) for attribute in attributes]
        words = shapes.CHANGE[attributes][0].format(name, *values)
        parts.append(words.replace(" a orange", " an orange"))
    for shape in left.values():
        place = place_of(shape, extent)
        if not place:
            return ""
        thing = f"{shape.size} {shape.color} {shape.form}"
        verb, moving = shapes.ADD_VERBS[0], shapes._moving(shape)
        parts.append(shapes.ADD[0].format(verb, thing, place=place, moving=moving))
    if target.style != source.style:
        parts.append(shapes.RESTYLE[0].format(shapes.STYLES[target.style][0]))
    if not parts:
        return nothing(source, extent)
    if len(parts) == 1:
        return parts[0]
    if len(parts) > 3:
        return ""
    # Three are more than the plain clips have, and yet the former model does many of them.
    return ", ".join([*parts[:-2], shapes.JOIN[0].format(*parts[-2:])])


def nothing(scene: Scene, extent: Extent) -> str:
    """Plain words that change nothing: the leftmost object in the colour that it has."""
    for shape in sorted(scene.shapes, key=lambda shape: shape.x):
        name = first_name(shape, scene.shapes, extent)
        if name:
            return shapes.CHANGE[("color",)][0].format(name, shape.color)
    return ""


def first_name(shape: Shape, pool: tuple[Shape, ...], extent: Extent) -> str:
    """The first of the names that `shapes.refer` chooses from, with its colour; "" if none."""
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

CHANGE, REMOVE, ADD, _ = CATEGORIES
MIX = (*CATEGORIES, COMPOSITION) * 2 + (CHANGE, REMOVE, CHANGE, COMPOSITION, COMPOSITION, NOT_THERE)
LEAST = {ADD: 1, COMPOSITION: 3}  # objects in a scene; 2 for the others
PLAIN = 0.6  # of the requests are plain themselves, and stay what they were
SIZES = ((9, 128, 128),) * 7 + (
    (1, 128, 128),
    (5, 128, 128),
    (9, 96, 168),
    (9, 168, 96),
    (17, 128, 96),
)


class Request(NamedTuple):
    asked: str
    plain: str  # the same edit in plain words
    kind: int  # 0 plain itself, 1 in a person's words


def ask(
    rng: np.random.Generator, category: str, source: Scene, extent: Extent
) -> tuple[Scene, str]:
    """An edit of a scene and a person's words for it, "" if there are none: see `people.throw`."""
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


def ask_plainly(rng: np.random.Generator, category: str, source: Scene, extent: Extent) -> str:
    """An edit in the words of shapes.py, "" if there are none: see `shapes._throw`."""
    parts = [category]
    if category == COMPOSITION:
        parts = rng.permutation([pick(rng, CATEGORIES[:3]), pick(rng, CATEGORIES)]).tolist()
    target = source
    sentences = []
    for part in parts:
        target, words = shapes._edit(rng, part, target, source, extent)
        sentences.append(words)
    if not all(sentences):
        return ""
    text = sentences[0] if len(parts) == 1 else pick(rng, shapes.JOIN).format(*sentences)
    return shapes._as_typed(rng, text)


def requests(rng: np.random.Generator, scene: Scene, extent: Extent, number: int) -> list[Request]:
    """Requests about one scene; [] if too few are found."""
    categories = [name for name in MIX if len(scene.shapes) >= LEAST.get(name, 2)]
    found = []
    for _ in range(4 * number):
        category = pick(rng, categories)
        if category != NOT_THERE and rng.random() < PLAIN:
            words = plain = ask_plainly(rng, category, scene, extent)
            kind = 0
        else:
            target, words = ask(rng, category, scene, extent)
            plain = words and plain_words(scene, target, extent)
            kind = 1
        if plain:
            found.append(Request(words, plain, kind))
        if len(found) == number:
            return found
    return []


class Minibatch(NamedTuple):
    pixels: Tensor  # the patches of all clips
    grids: Tensor  # (B, 3)
    before: Tensor  # (P,) the tokens before a request
    asked: list[Tensor]  # parts (B, R, S) of the requests' tokens, padded on the left by -1
    plain: list[Tensor]
    kinds: list[Tensor]  # parts (B, R)


def minibatches(encoder: EditEncoder, seed: int, B: int, R: int) -> Iterator[Minibatch]:
    """Without end: B clips of one size and R requests about each."""
    rng = np.random.default_rng(seed)
    config = encoder.config
    limits = (config.max_mllm_frames, config.min_mllm_pixels, config.max_mllm_pixels)
    while True:
        extent = pick(rng, SIZES)
        factor = min(extent[1:]) // 32
        looked_at = (extent[0], extent[1] // factor, extent[2] // factor)
        patches, grids, found = [], [], []
        while len(grids) < B:
            scene = people.throw(rng, pick(rng, MIX), extent, WORLDS["all"])[0]
            if not is_clear(scene, looked_at):
                continue
            about = requests(rng, scene, extent, R)
            if about:
                clip = torch.from_numpy(render(scene, extent))
                pixels, grid = preprocess_frames(clip, config.qwen.vision, *limits)
                patches.append(pixels)
                grids.append(grid)
                found += about
        asked = tokens(encoder, [request.asked for request in found]).view(B, R, -1)
        plain = tokens(encoder, [request.plain for request in found]).view(B, R, -1)
        kinds = torch.tensor([request.kind for request in found]).view(B, R)
        order = (asked >= 0).sum(-1).argsort()  # the short ones first, so that they need no padding
        asked = asked.take_along_dim(order[..., None], 1)
        plain = plain.take_along_dim(order[..., None], 1)
        kinds = kinds.take_along_dim(order, 1)
        parts = [R // 2, R // 4, R - R // 2 - R // 4]
        before = tokens_before(encoder, len(patches[0]) // 4)
        yield Minibatch(
            torch.cat(patches),
            torch.tensor(grids),
            before,
            [trim(part) for part in asked.split(parts, 1)],
            [trim(part) for part in plain.split(parts, 1)],
            list(kinds.split(parts, 1)),
        )


def trim(ids: Tensor) -> Tensor:
    """Without the columns that hold padding only."""
    return ids[..., int((ids >= 0).flatten(0, 1).any(0).int().argmax()) :]


def tokens_before(encoder: EditEncoder, num_visual: int) -> Tensor:
    """The ids of `mllm.chat_ids` before the instruction, (P,)."""
    encoder.tokenizer.encode_special_tokens = False
    start = encoder.tokenizer.encode(CHAT_START, add_special_tokens=False).ids
    end = encoder.tokenizer.encode("<|vision_end|>", add_special_tokens=False).ids
    return torch.tensor(start + [encoder.qwen.config.video_token_id] * num_visual + end)


def tokens(encoder: EditEncoder, texts: list[str]) -> Tensor:
    """The ids of `mllm.chat_ids` from the instruction on, (N, S), padded on the left by -1."""
    encoder.tokenizer.encode_special_tokens = False
    closing = encoder.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
    ends = [encoder.qwen.config.query_token_id] * len(encoder.queries) + closing
    rows = []
    for encoding in encoder.tokenizer.encode_batch(texts, add_special_tokens=False):
        rows.append(torch.tensor(encoding.ids + ends))
    return nn.utils.rnn.pad_sequence(rows, True, -1, padding_side="left")


# --- What the MLLM says ---------------------------------------------------------------------------


class Said(NamedTuple):
    editing: Tensor  # X_e (B, R, K, d)
    visual: Tensor  # X_v (B, N_v, d), the same for all requests about a clip
    textual: Tensor  # X_ℓ (B, R, N_ℓ, d), padded on the left
    is_text: Tensor  # (B, R, N_ℓ)


def read(
    encoder: EditEncoder, minibatch: Minibatch, requests: list[Tensor], visual: Tensor
) -> list[Said]:
    """`EditEncoder.encode` of requests about each of B clips, in parts of similar length.

    requests: the parts, (B, R, S). visual: the clips' visual tokens (M, d).
    A request's tokens see those before them and their own.
    """
    qwen: Qwen2_5_VL = encoder.qwen
    B = len(minibatch.grids)
    K = len(encoder.queries)
    before = minibatch.before.expand(B, -1)  # (B, P)
    is_visual = qwen.is_visual(before)[..., None]
    x = qwen.model.embed_tokens(before).masked_scatter(is_visual, visual)  # (B, P, d)
    at_x = qwen.position_ids(before, minibatch.grids)  # (3, B, P)
    rope_x = rope(qwen, at_x)

    parts = []
    for ids in requests:
        R, S = ids.shape[1:]
        is_real = ids >= 0
        y = qwen.model.embed_tokens(ids.clamp(min=0))
        queries = encoder.queries.expand(B, R, -1, -1)
        y = y.masked_scatter((ids == qwen.config.query_token_id)[..., None], queries)
        at_y = at_x[..., -1:] + is_real.cumsum(-1).flatten(1)  # (3, B, R * S)
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        sees_own = is_real[..., None, :] & causal | torch.eye(S, dtype=torch.bool)
        sees = F.pad(sees_own, (before.shape[1], 0), value=True)  # (B, R, S, P + S)
        sees = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf).flatten(0, 1)[:, None]
        parts.append((y.flatten(0, 1), rope(qwen, at_y), sees))
    for layer in qwen.model.layers:
        x, parts = layer_of_all(layer, x, rope_x, parts)
    clip = encoder.visual_connector(qwen.model.norm(x)[:, is_visual[0, :, 0]])

    said = []
    for ids, (y, _, _) in zip(requests, parts, strict=True):
        y = qwen.model.norm(y).view(*ids.shape, -1)
        words = ids.shape[-1] - K - 2
        editing = encoder.editing_connector(y[:, :, -K:])
        textual = encoder.textual_connector(y[:, :, :words])
        said.append(Said(editing, clip, textual, ids[..., :words] >= 0))
    return said


def rope(qwen: Qwen2_5_VL, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, N, D/2) of M-RoPE at positions (3, B, N), as in `Qwen2_5_VL.decode`."""
    config = qwen.config
    head_dim = config.hidden_size // config.num_attention_heads
    frequencies = rotary_frequencies(head_dim, config.rope_theta, positions.device)
    sections = frequencies.split(config.mrope_section)
    angles = [axis[..., None] * part for axis, part in zip(positions, sections, strict=True)]
    angles = torch.cat(angles, dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def layer_of_all(
    layer: DecoderLayer, x: Tensor, rope_x: tuple[Tensor, Tensor], parts: list[tuple]
) -> tuple[Tensor, list[tuple]]:
    """A layer of what comes before, x (B, P, d), and of the requests, (B * R, S, d)."""
    attention = layer.self_attn
    B, D = len(x), attention.head_dim

    def project(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = layer.input_layernorm(z)
        q = attention.q_proj(z).unflatten(-1, (-1, D)).transpose(1, 2)  # (B, heads, N, D)
        k = attention.k_proj(z).unflatten(-1, (-1, D)).transpose(1, 2)
        v = attention.v_proj(z).unflatten(-1, (-1, D)).transpose(1, 2)
        k = k.repeat_interleave(attention.group_size, dim=1)
        v = v.repeat_interleave(attention.group_size, dim=1)
        return q, k, v

    def finish(z: Tensor, attended: Tensor) -> Tensor:
        z = z + attention.o_proj(attended.transpose(1, 2).flatten(2))
        return z + layer.mlp(layer.post_attention_layernorm(z))

    q, k, v = project(x)
    q, k = rotate(q, *rope_x), rotate(k, *rope_x)
    new_x = finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    new_parts = []
    for y, (cos, sin), sees in parts:
        N, S = y.shape[:2]
        own_q, own_k, own_v = project(y)
        cos, sin = (angle.view(N, 1, S, -1) for angle in (cos, sin))
        own_q, own_k = rotate(own_q, cos, sin), rotate(own_k, cos, sin)

        def with_before(before: Tensor, own: Tensor) -> Tensor:
            before = before[:, None].expand(-1, len(own) // B, -1, -1, -1)
            return torch.cat([before.flatten(0, 1), own], dim=2)  # (B * R, heads, P + S, D)

        attended = F.scaled_dot_product_attention(
            own_q, with_before(k, own_k), with_before(v, own_v), attn_mask=sees
        )
        new_parts.append((finish(y, attended), (cos, sin), sees))
    return new_x, new_parts


# --- What the DiT reads of it ---------------------------------------------------------------------


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
    clips_of = shapes.ShapesDataset(5, 100_000, 9, 128, 128, MIX[:5], coarse=True)
    for first in range(0, 40, 8):
        clips = [clips_of[first + i] for i in range(8)]
        source = torch.stack([clip["source"] for clip in clips])
        target = torch.stack([clip["target"] for clip in clips])
        words = [clip["instruction"] for clip in clips]
        contexts = model.contexts(model.encoder(list(source), words))
        source, target = vae.encode(to_float(source)), vae.encode(to_float(target))
        t = torch.linspace(0.3, 1, 8)
        share = t.view(-1, 1, 1, 1, 1)
        z_t = (1 - share) * target + share * torch.randn_like(target)
        model.dit(z_t, t, contexts, source)
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in kept]


def read_out(block: nn.Module, said: Said, given: Tensor, deep: bool) -> Tensor:
    """What a block's cross-attention makes of all requests for inputs (n, d): (B, R, n, d).

    deep: whether the block reads X_v and X_ℓ as well as X_e (Eq. 3).
    """
    attention = block.cross_attn
    heads = (attention.num_heads, -1)

    def keys_and_values(context: Tensor) -> tuple[Tensor, Tensor]:
        k = attention.norm_k(attention.k(context)).unflatten(-1, heads)
        v = attention.v(context).unflatten(-1, heads)
        return k.transpose(-3, -2), v.transpose(-3, -2)  # (..., heads, N, D)

    q = attention.norm_q(attention.q(given)).unflatten(-1, heads).transpose(0, 1)  # (heads, n, D)
    q = q * q.shape[-1] ** -0.5
    k, v = keys_and_values(said.editing)
    scores = q @ k.mT  # (B, R, heads, n, K)
    if deep:
        text_k, text_v = keys_and_values(said.textual)
        padded = ~said.is_text[:, :, None, None]
        text_scores = (q @ text_k.mT).masked_fill(padded, -torch.inf)
        clip_k, clip_v = keys_and_values(said.visual)
        clip_scores = q @ clip_k.mT  # (B, heads, n, N_v): once for all requests
        clip_total = clip_scores.logsumexp(-1, keepdim=True)
        of_clip = (clip_scores - clip_total).exp() @ clip_v  # (B, heads, n, D)
        scores = torch.cat([scores, text_scores], dim=-1)
        v = torch.cat([v, text_v], dim=-2)
        total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), clip_total[:, None])
        out = (scores - total).exp() @ v + (clip_total[:, None] - total).exp() * of_clip[:, None]
    else:
        out = scores.softmax(-1) @ v  # (B, R, heads, n, D)
    return attention.o(out.transpose(-3, -2).flatten(-2))


# --- Training -------------------------------------------------------------------------------------


def deepen(model: rvedit.RVEDiT) -> rvedit.RVEDiT:
    """The same function with two layers more in the language tower, the first and the third."""
    config = model.config
    number = config.qwen.num_hidden_layers + 2
    config = dataclasses.replace(
        config, qwen=dataclasses.replace(config.qwen, num_hidden_layers=number)
    )
    deeper = rvedit.RVEDiT(config, model.encoder.tokenizer)
    deeper.load_state_dict(model.state_dict(), strict=False)
    old = list(copy.deepcopy(model.encoder.qwen.model.layers))
    new = []
    for _ in range(2):
        layer = DecoderLayer(config.qwen)
        for name, weight in layer.named_parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            elif "bias" in name:
                nn.init.zeros_(weight)
        nn.init.zeros_(layer.self_attn.o_proj.weight)  # it adds nothing yet
        nn.init.zeros_(layer.mlp.down_proj.weight)
        new.append(layer)
    deeper.encoder.qwen.model["layers"] = nn.ModuleList([new[0], old[0], new[1], *old[1:]])
    return deeper


def learn(args: argparse.Namespace) -> None:
    rank, ranks = cli.RANK, cli.RANKS
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    teacher, vae = rvedit.load()
    L_s = teacher.config.routing_depth
    blocks = teacher.dit.blocks
    teacher.requires_grad_(False)
    student = deepen(teacher) if args.weights is None else rvedit.load(args.weights)[0]
    student.requires_grad_(False)
    student.encoder.requires_grad_(True)
    student.encoder.qwen.visual.requires_grad_(False)
    bank = attention_inputs(teacher, vae)
    torch.manual_seed(rank + 1)

    weights = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = Muon(
        list(weights.values()), muon_rates(weights, args.muon), betas=(0.9, 0.99), weight_decay=0
    )
    means = {name: p.detach().clone() for name, p in weights.items()}
    data = minibatches(teacher.encoder, 1000 * args.draw + rank, args.clips, args.requests)

    def errors_of(minibatch: Minibatch, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """For each request (B * R,): the errors of what is read, and of X_e."""
        with torch.no_grad():
            visual = teacher.encoder.qwen.encode_video(minibatch.pixels, minibatch.grids)
            goal = read(teacher.encoder, minibatch, minibatch.plain, visual)
        ours = read(student.encoder, minibatch, minibatch.asked, visual)
        right_e = torch.cat([said.editing for said in goal], dim=1).flatten(0, 1)
        told_e = torch.cat([said.editing for said in ours], dim=1).flatten(0, 1)
        spread = (right_e - right_e.mean(0)).square().mean()
        editing = (told_e - right_e).square().mean((1, 2)) / spread
        total = 0
        for i in chosen:
            given = bank[i][torch.randperm(len(bank[i]))[: args.inputs]]
            deep = i >= L_s
            with torch.no_grad():
                right = [read_out(blocks[i], said, given, deep) for said in goal]
                right = torch.cat(right, dim=1).flatten(0, 1)  # (B * R, n, d)
                spread = (right - right.mean(0)).square().mean()
            told = [read_out(blocks[i], said, given, deep) for said in ours]
            told = torch.cat(told, dim=1).flatten(0, 1)
            total = total + (told - right).square().mean((1, 2)) / spread
        return total / len(chosen), editing

    started = time.monotonic()
    sums = torch.zeros(2, 3)
    step = 0
    while True:
        past = (time.monotonic() - started) / args.seconds
        if ranks > 1:
            clock = torch.tensor(past)
            dist.broadcast(clock, 0)
            past = clock.item()
        if past >= 1:
            break
        step += 1
        # A rate that rises for 30 steps and falls to 0 by a cosine.
        lr = args.rate * min(1, step / 30) * (1 + math.cos(math.pi * past)) / 2
        optimizer.param_groups[0]["lr"] = lr
        minibatch = next(data)
        shallow = int(torch.randint(L_s, ()))
        deep = L_s + int(torch.randint(len(blocks) - L_s, ()))
        read_errors, editing_errors = errors_of(minibatch, [shallow, deep])
        kinds = torch.cat(minibatch.kinds, dim=1).flatten()
        weight = torch.where(kinds == 0, args.plain_weight, 1.0)
        weight = weight / weight.sum()
        loss = ((read_errors + editing_errors / 2) * weight).sum()
        optimizer.zero_grad()
        loss.backward()
        if ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in weights.values()])
            dist.all_reduce(flat)
            parts = (flat / ranks).split([p.numel() for p in weights.values()])
            for p, part in zip(weights.values(), parts, strict=True):
                p.grad.copy_(part.view_as(p))
        nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        decay = min(args.ema, step / (step + 10))
        with torch.no_grad():
            for name, p in weights.items():
                means[name].lerp_(p, 1 - decay)
            for kind in (0, 1):
                of_kind = kinds == kind
                rows = (read_errors[of_kind].sum(), editing_errors[of_kind].sum(), of_kind.sum())
                sums[kind] += torch.stack(rows)
        if step % args.note_every == 0 and rank == 0:
            rows = sums[:, :2] / sums[:, 2:]
            told = " ".join(f"{value:.4f}" for value in rows.flatten().tolist())
            print(f"step {step}, {past * args.seconds:.0f} s: plain, people's: {told}", flush=True)
            sums.zero_()
        if step % 500 == 0 and rank == 0:
            write(args.out / "model", student, vae, means)
    if rank == 0:
        write(args.out / "model", student, vae, means)


def write(folder: Path, student: rvedit.RVEDiT, vae: nn.Module, means: dict[str, Tensor]) -> None:
    mean_of = copy.deepcopy(student)
    mean_of.load_state_dict(means, strict=False)
    rvedit.save(folder, mean_of.half(), copy.deepcopy(vae).half())


@cli.guarded
def main() -> None:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/words"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seconds", type=float, default=5400)
    parser.add_argument("--draw", type=int, default=1)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--muon", type=float, default=20)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--note-every", type=int, default=100)
    parser.add_argument("--plain-weight", type=float, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    learn(args)


if __name__ == "__main__":
    main()
