"""How the small checkpoint in assets/toy is made, end to end, and how well it edits.

    python toy.py                       # makes it, from where the last call was stopped: the stages below
    python toy.py evaluate              # how many clips that were never trained on it edits, and how well
    python toy.py clips --steps 20000   # one stage alone; from stills to narrow_editor they take options of train.py
    python toy.py ablate                # the paper's Table 2 at this scale

vae: a tokenizer for the words of the instructions, and a VAE, trained on crops of clips; two hours on a CPU core.
stills: train.py, on those latents, from random weights and in the place of Kiwi-Edit: all blocks read only the editing
tokens, and there is no alignment. Stills are cheap, and it takes very many until words are matched with objects.
clips: the same, from there, on clips that move.
large_clips: train.py from there, as the paper's run from Kiwi-Edit: with the routing rule and the alignment.
large_stills: without the alignment, for the forms of what is painted, which stills teach sooner than clips; and nearer
to pure noise, where the few steps of its sampler look.
small_editor: as large_clips, from there, and as near to pure noise.
narrow_editor: the same, from there, on clips of the size that it ships for.
editor: from there by toy_gpu.py, twice as wide and with batches 16 times as large, in minutes on a GPU.
export: all of it in half precision as assets/toy.

Letters: B batch, T H W frames, height and width of a video; C t h w channels and sides of the latents.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import cli
import convert
import rvedit
import sample
import train
from experiments import toy_gpu
from experiments.toy_gpu import DEVICE
from mllm import CHAT_START
from muon import Muon
from shapes import EVERYTHING, TOY_EXTENT, ShapesDataset
from vae import WanVAE, patchify, split_time, unpatchify
from video import to_float, to_uint8

SPECIAL_TOKENS = (  # Qwen's, in its order, without their brackets
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
).split()
VAE_SEED, SAVE_SECONDS = 1, 120
VAE_STEPS = (
    3000,
    17800,
)  # of the whole VAE, and then of its decoder alone, which leaves the latents as they are
VAE_RATES = 5e-3, 4e-3  # of either, at their highest
NOISES = (
    0.2,
    0.1,
)  # at most, added to the latents that the decoder learns from, in units of their scale
BASE = "--routing-depth 6 --align-weight 0"  # as Kiwi-Edit
LAST = "--timestep-shift 15"  # of the last three of these stages
NARROW = dict(dim=128, ffn_dim=384, num_heads=4)  # the DiT of all of them
STAGES = {  # of train.py: the checkpoint that each starts from, and its options
    "stills": ("start", f"{BASE} --size 1 64 64 --steps 12000"),
    "clips": ("stills/model", f"{BASE} --steps 7200"),
    "large_clips": ("base", "--size 9 96 96 --steps 3050 --lr 1e-3"),
    "large_stills": (
        "large_clips/model",
        f"{LAST} --lr 1e-3 --align-weight 0 --size 1 96 96 --steps 10300",
    ),
    "small_editor": (
        "large_stills/model",
        f"{LAST} --lr 1e-3 --align-weight 0.005 --size 9 96 96 --steps 29850",
    ),
    "narrow_editor": ("small_editor/model", f"{LAST} --lr 5e-4 --size 9 128 128 --steps 3900"),
}
CLIPS = (
    (8, 5, 96, 48),
    (4, 5, 64, 64),
    (1, 9, 96, 96),
)  # of a batch: clips, frames, side drawn, side cut; by turns


# --- The VAE --------------------------------------------------------------------------------------


class Crops(Dataset):
    """Batches of crops of sources and targets by step: float (B, 3, T, H, W) in [-1, 1]."""

    def __getitem__(self, step: int) -> Tensor:
        number, frames, side, crop = CLIPS[step % len(CLIPS)]
        rng = np.random.default_rng((VAE_SEED, step))
        shapes = ShapesDataset(VAE_SEED, 2**31, frames, side, side, EVERYTHING)
        crops = []
        for _ in range((number + 1) // 2):
            clip = shapes[int(rng.integers(len(shapes)))]
            for name in rng.permutation(["source", "target"]):
                y, x = rng.integers(0, side - crop + 1, 2)
                crops.append(clip[name][:, y : y + crop, x : x + crop])
        return to_float(torch.stack(crops[:number]))


def reconstruct(vae: WanVAE, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """`vae.encode` and `vae.decode` without clamp and statistics: the video again, and the scale of the latents.

    noise: for each clip, how much of it the decoder finds added to its latents, in units of their scale, (B,).
    """
    patch, cache = vae.config.patch_size, {}
    moments = [
        vae.conv1(vae.encoder(patchify(x, patch), cache)) for x in split_time(video, video.shape[2])
    ]
    z, cache = torch.cat(moments, dim=2).chunk(2, dim=1)[0], {}  # (B, C, t, h, w)
    scale = z.float().square().mean().sqrt()
    z = z + (scale * noise.view(-1, 1, 1, 1, 1) * torch.randn_like(z)).to(z.dtype)
    frames = [
        unpatchify(vae.decoder(vae.conv2(x), cache), patch) for x in split_time(z, z.shape[2])
    ]
    return torch.cat(frames, dim=2), scale


@torch.no_grad()
def untrained_vae() -> WanVAE:
    """The toy preset's VAE at a start from which it learns colours soon.

    RMSNorm divides out how bright a pixel is, unless something constant stands beside it: one channel before each of
    the two heads starts with a large bias. And the latents start large beside the biases of the decoder.
    """
    torch.manual_seed(0)
    vae = WanVAE(rvedit.preset("toy").vae)
    vae.encoder.middle[2].residual[6].bias[0] = 10
    vae.decoder.upsamples[-1].upsamples[-1].residual[6].bias[0] = 6
    vae.conv1.weight *= 8
    vae.conv1.bias.zero_()
    for block in (vae.encoder.middle[1], vae.decoder.middle[1]):
        block.requires_grad_(
            False
        )  # attention stays off, as it starts: crops would teach it the wrong size of a clip
    return vae


def train_vae(run: Path, steps: Sequence[int]) -> WanVAE:
    """Train the toy preset's VAE, from the last saved step if there is one; on a GPU the forward pass is in bfloat16.

    steps: of the whole VAE, and of its decoder alone.

    An autoencoder for the squared error, with noise in the latents in the place of a prior: it makes them smooth, and
    spends their one scale on what counts in the picture instead of whitening them. Muon makes the pictures 18.4 dB
    after 150 steps, AdamW 15.6.
    """
    run.mkdir(parents=True, exist_ok=True)
    vae, state, step = untrained_vae().to(DEVICE), run / "vae.pt", 0
    weights = [p for p in vae.parameters() if p.requires_grad]
    rates = {p: 1.0 for p in weights if p.ndim > 3 and p[0].numel() > 1}
    optimizer = Muon(weights, rates, betas=(0.9, 0.95), weight_decay=0)
    if state.exists():
        stored = torch.load(
            state, map_location="cpu", weights_only=True
        )  # where AdamW counts its steps
        step = stored["step"]
        vae.load_state_dict(stored["weights"])
        optimizer.load_state_dict(stored["optimizer"])
    recent, saved = deque(maxlen=50), time.monotonic()
    for video in DataLoader(
        Crops(), None, sampler=range(step, sum(steps)), num_workers=8 if DEVICE == "cuda" else 0
    ):
        torch.manual_seed(step)
        part = int(step >= steps[0])
        done = step - part * steps[0]
        if part:
            for frozen in (vae.encoder, vae.conv1):
                frozen.requires_grad_(False)
        video = video.to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            decoded, scale = reconstruct(
                vae, video, NOISES[part] * torch.rand(len(video), device=DEVICE)
            )
        loss = F.mse_loss(decoded.float(), video)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        rate = (
            VAE_RATES[part]
            * min(1, (done + 1) / 30)
            * (1 + math.cos(math.pi * done / steps[part]))
            / 2
        )
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        step += 1
        recent.append(10 * math.log10(4 / loss.item()))
        if step % 50 == 0:
            print(
                f"VAE step {step}/{sum(steps)}: {sum(recent) / len(recent):.2f} dB, latents {scale:.1f}",
                flush=True,
            )
        if time.monotonic() - saved > SAVE_SECONDS or step == sum(steps):
            stored = {
                "step": step,
                "weights": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            toy_gpu.save_state(stored, state)
            saved = time.monotonic()
    return vae


# --- The editor -----------------------------------------------------------------------------------


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE like Qwen's, for any text, whose words are those of the instructions, captions and chat frame."""
    clips = map(ShapesDataset(VAE_SEED, 2000, 5, 32, 32, EVERYTHING).__getitem__, range(2000))
    texts = [clip[name] for clip in clips for name in ("instruction", "caption")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=rvedit.preset("toy").qwen.vocab_size,
        special_tokens=[f"<|{name}|>" for name in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    frame = re.sub(r"<\|\w+\|>", "", CHAT_START)
    tokenizer.train_from_iterator([*texts, *[frame] * 100], trainer)
    return tokenizer


@torch.no_grad()
def write_start(run: Path, vae: WanVAE) -> None:
    """The checkpoint that the editor's training starts from: the VAE, a tokenizer, and an editor of random weights.

    The latents are centred and divided by one number for all channels: one for each would whiten them.
    """
    shapes = ShapesDataset(VAE_SEED + 1, 50, 9, 96, 96, EVERYTHING)
    latents = torch.stack(
        [vae.encode(to_float(shapes[i]["target"][None]))[0] for i in range(len(shapes))]
    )
    mean = latents.mean((0, 2, 3, 4), keepdim=True)  # (1, C, 1, 1, 1)
    std = (latents - mean).square().mean().sqrt().item()
    config, mean = rvedit.preset("toy"), tuple(mean.flatten().tolist())
    vae.config = dataclasses.replace(config.vae, latents_mean=mean, latents_std=(std,) * len(mean))
    config = dataclasses.replace(
        config, vae=vae.config, dit=dataclasses.replace(config.dit, **NARROW)
    )
    model = rvedit.RVEDiT(config, train_tokenizer())
    rvedit.initialise(model)
    rvedit.save(run / "start", model, vae)


def train_from(start: Path, out: Path, options: list[str]) -> None:
    """A run of train.py on moving shapes, from its last checkpoint if it has one."""
    if not start.exists():
        raise ValueError(f"{start} does not exist yet: an earlier stage makes it")
    resume = ["--resume"] if (out / "run.json").exists() else []
    train.main(["--checkpoint", str(start), "--out", str(out), *resume, *options])


def train_stage(run: Path, stage: str, options: list[str]) -> None:
    """The last stage like Kiwi-Edit also writes the paper's start from it, where all connectors are copies."""
    start, recipe = STAGES[stage]
    recipe = (
        [] if (run / stage / "run.json").exists() else recipe.split()
    )  # a run that goes on has its own
    train_from(run / start, run / stage, [*recipe, *options])
    if stage == "clips":
        model, vae = rvedit.load(run / stage / "model")
        model.load_state_dict(convert.with_native_connectors(model.state_dict()))
        model.config = dataclasses.replace(
            rvedit.preset("toy"), vae=vae.config, dit=model.config.dit
        )
        rvedit.save(run / "base", model, vae)


def export(run: Path) -> None:
    """The editor as the built-in checkpoint: in half precision, which halves its size."""
    model, vae = rvedit.load(run / "editor" / "model", dtype=torch.float16)
    rvedit.save(rvedit.TOY, model, vae.half())


# --- How well it edits ----------------------------------------------------------------------------


@torch.no_grad()
def edit_clips(model: rvedit.RVEDiT, vae: WanVAE, clips: Tensor, instructions: list[str]) -> Tensor:
    """`sample.edit_video`, with its defaults, of many short clips at once: uint8 (B, T, H, W, 3), likewise."""
    contexts, source = (
        model.contexts(model.encoder(list(clips), instructions)),
        vae.encode(to_float(clips)),
    )
    noise = (
        sample.initial_noise((1, *source.shape[1:]), seed=0)
        .expand(len(source), -1, -1, -1, -1)
        .to(source.device)
    )
    steps = model.config.sampling_steps
    latents = sample.denoise(
        lambda z, t: model.dit(z, t.expand(len(z)), contexts, source), noise, steps, shift=5.0
    )
    return to_uint8(vae.decode(latents))


class Score(NamedTuple):
    inside: float  # PSNR inside the mask in dB
    outside: float  # and outside it; NaN if nothing is
    temporal: float  # root mean square difference between the two clips' changes from frame to frame, of 255 levels
    edited: bool


def psnr(squared_error: Tensor) -> float:
    return (10 * torch.log10(255**2 / squared_error.mean())).item()


def score(output: Tensor, clip: dict[str, Any], ceiling: Tensor) -> Score:
    """How close an output is to the target of a clip of `ShapesDataset`; ceiling: the target through the VAE.

    It counts as edited if inside the mask its squared error to the target is at most a quarter of that to the source,
    and outside the PSNR is at least 28 dB or within 3 dB of the ceiling's. All clips are uint8 (T, H, W, 3).
    """
    output, ceiling, source, target = (
        x.float() for x in (output, ceiling, clip["source"], clip["target"])
    )
    mask, error = clip["mask"], (output - target).square()  # (T, H, W), (T, H, W, 3)
    temporal = (output.diff(dim=0) - target.diff(dim=0)).square().mean().sqrt().item()
    edited = error[mask].mean() <= (output - source)[mask].square().mean() / 4
    outside, limit = (
        psnr(error[~mask]),
        psnr((ceiling - target)[~mask].square()),
    )  # NaN if nothing is outside
    return Score(
        psnr(error[mask]), outside, temporal, bool(edited) and not outside < min(28, limit - 3)
    )


def assess(
    model: rvedit.RVEDiT,
    vae: WanVAE,
    seed: int,
    number: int,
    frames: int,
    size: int,
    batch: int = 25,
) -> Iterator[tuple[str, str, list[float]]]:
    """Category, what is judged, and its mean `Score` over `number` clips: of the edits, and of what bounds them."""
    for category in EVERYTHING:
        shapes, rows = ShapesDataset(seed, number, frames, size, size, [category]), {}
        for first in tqdm(range(0, number, batch), desc=category, disable=None, leave=False):
            clips = [shapes[i] for i in range(first, min(first + batch, number))]
            sources, targets = (
                torch.stack([clip[name] for clip in clips]) for name in ("source", "target")
            )
            edits = edit_clips(model, vae, sources, [clip["instruction"] for clip in clips])
            ceilings = to_uint8(vae.decode(vae.encode(to_float(targets))))
            outputs = {
                "edit": edits,
                "source unchanged": sources,
                "target through the VAE": ceilings,
            }
            for name, videos in outputs.items():
                rows.setdefault(name, []).extend(map(score, videos, clips, ceilings))
        for name, scores in rows.items():
            yield category, name, torch.tensor(scores, dtype=torch.float64).nanmean(0).tolist()


def evaluate(
    model: rvedit.RVEDiT, vae: WanVAE, seed: int, number: int, frames: int, size: int
) -> None:
    """Print a table of `assess`."""
    print(f"{'':<36}PSNR inside   outside   temporal error   edited")
    for category, name, (inside, outside, temporal, edited) in assess(
        model, vae, seed, number, frames, size
    ):
        row = f"{inside:>8.2f} dB{outside:>7.2f} dB{temporal:>17.2f}{edited:>9.1%}"
        print(f"{category:<13}{name:<23}{row}", flush=True)


# --- Table 2 at this scale ------------------------------------------------------------------------

VARIANTS = {  # of Table 2, as options of train.py; the preset has 6 blocks
    "components": {
        "full": [],
        "w/o GRTC (L_s = L)": ["--routing-depth", "6"],
        "w/o RAAA (λ = 0)": ["--align-weight", "0"],
        "w/o both": ["--routing-depth", "6", "--align-weight", "0"],
        "all tokens everywhere (L_s = 0)": [
            "--routing-depth",
            "0",
        ],  # the control that the paper lacks
    },
    "depth": {f"L_s = {depth}": ["--routing-depth", str(depth)] for depth in range(7)},
    "weight": {
        f"λ = {weight}": ["--align-weight", str(weight)]
        for weight in (0, 0.005, 0.02, 0.05, 0.25, 0.75)
    },
}


def ablate(run: Path, group: str, seeds: int, clips: int, options: list[str]) -> None:
    """Train each variant of a group from large_clips' start with each seed, assess it, print the means as Markdown.

    Finished runs are kept in the run's folder and not done again; an unfinished one goes on from its last checkpoint.
    The same seed means the same clips and noise for all variants. Spread: standard deviation over the seeds.
    """
    steps = 2000 if DEVICE == "cuda" else 140  # 7 minutes on a CPU core; on a GPU not yet measured
    table, recipe = {}, f"--steps {steps} --lr 3e-4 --validate-every 1000000".split()
    for seed, variant in itertools.product(range(seeds), VARIANTS[group]):
        out = run / "ablate" / f"{re.sub(r'[^a-zL0-9.]+', '-', variant).strip('-')}-{seed}"
        if not (out / "scores.json").exists():
            train_from(
                run / "base",
                out,
                [*recipe, *VARIANTS[group][variant], "--seed", str(seed), *options],
            )
            model, vae = rvedit.load(out / "model", device=DEVICE)
            rows = assess(
                model, vae, 2026, clips, *json.loads((out / "run.json").read_text())["size"][:2]
            )
            scores = {name: values for name, what, values in rows if what == "edit"}
            (out / "partial").write_text(json.dumps(scores))
            (out / "partial").replace(out / "scores.json")
        table.setdefault(variant, []).append(
            list(json.loads((out / "scores.json").read_text()).values())
        )
    print("| variant | overall | " + " | ".join(EVERYTHING) + " |")
    print("| --- |" + " ---: |" * (1 + len(EVERYTHING)))
    for variant, scores in table.items():
        edited, inside = (
            torch.tensor(scores)[:, :, index] for index in (3, 0)
        )  # (seeds, categories) each
        edited, inside = (
            torch.cat((x.mean(1, keepdim=True), x), dim=1) for x in (100 * edited, inside)
        )
        deviations, means = zip(
            *(torch.std_mean(x, dim=0, correction=0) for x in (edited, inside)), strict=True
        )
        cells = zip(
            *(x.tolist() for pair in zip(means, deviations, strict=True) for x in pair), strict=True
        )
        print(
            f"| {variant} | "
            + " | ".join("{:.0f} ± {:.0f} %, {:.1f} ± {:.1f} dB".format(*x) for x in cells)
            + " |"
        )


# --- Command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(
        description="Make assets/toy, from where it was left, and evaluate it.", allow_abbrev=False
    )
    whole = cli.number(int, 1)
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/toy"),
        help="folder of the training (default runs/toy)",
    )
    parser.add_argument(
        "--vae-steps",
        type=whole,
        nargs=2,
        default=VAE_STEPS,
        metavar=("VAE", "DECODER"),
        help="default 3000 17800",
    )
    stages = parser.add_subparsers(
        dest="stage", metavar="STAGE", help="one alone; default: all up to export in turn"
    )
    stages.add_parser("vae", help="train tokenizer and VAE")
    for stage, (start, recipe) in STAGES.items():
        stages.add_parser(
            stage, help=f"train.py from RUN/{start}, {recipe}; takes more of its options"
        )
    wide = stages.add_parser(
        "editor", help="by toy_gpu.py from RUN/narrow_editor", argument_default=argparse.SUPPRESS
    )
    wide.add_argument("--steps", type=whole, help=f"default {toy_gpu.STEPS}")
    wide.add_argument("--batch", type=whole, help=f"clips of a step (default {toy_gpu.BATCH})")
    wide.add_argument(
        "--size", nargs=3, type=whole, metavar=tuple("THW"), help="of the clips (default 9 128 128)"
    )
    wide.add_argument(
        "--workers",
        type=cli.number(int, 0),
        help="processes that draw scenes (default: one a core)",
    )
    stages.add_parser("export", help="write assets/toy from the editor")
    judge = stages.add_parser(
        "evaluate", help="edit clips that were never trained on", allow_abbrev=False
    )
    judge.add_argument("--checkpoint", type=Path, help="of ours; default: the built-in one")
    judge.add_argument(
        "--seed", type=cli.number(int, 0), default=2026, help="of the clips (default 2026)"
    )
    judge.add_argument("--clips", type=whole, default=50, help="of each category (default 50)")
    judge.add_argument(
        "--frames", type=whole, default=TOY_EXTENT[0], help="of each, 4k + 1 (default %(default)s)"
    )
    judge.add_argument(
        "--size",
        type=whole,
        default=TOY_EXTENT[1],
        help="of their sides, pixels (default %(default)s)",
    )
    table = stages.add_parser(
        "ablate", help="Table 2 at this scale; takes options of train.py", allow_abbrev=False
    )
    table.add_argument(
        "--group", choices=VARIANTS, default="components", help="a block of it (default components)"
    )
    table.add_argument(
        "--seeds", type=whole, default=3, help="trainings of each variant (default 3)"
    )
    table.add_argument(
        "--clips", type=whole, default=25, help="of each category to judge by (default 25)"
    )
    args, options = parser.parse_known_args(argv)  # the rest is train.py's
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cli.fail(
            "toy.py is one process; for more, go on with a stage by torchrun train.py --out RUN/STAGE --resume"
        )
    if options and args.stage not in (*STAGES, "ablate"):
        parser.error(
            f"{' '.join(options)}: only {', '.join(STAGES)} and ablate take options of train.py"
        )
    try:
        if args.stage == "evaluate":
            return evaluate(
                *rvedit.load(args.checkpoint, device=DEVICE),
                args.seed,
                args.clips,
                args.frames,
                args.size,
            )
        if args.stage == "ablate":
            return ablate(args.run, args.group, args.seeds, args.clips, options)
        if args.stage in (None, "vae") and not (args.run / "start").exists():
            write_start(args.run, train_vae(args.run, args.vae_steps).cpu())
        for stage in STAGES:
            if args.stage in (None, stage):
                train_stage(args.run, stage, options)
        if args.stage in (None, "editor"):
            given = {
                name: value
                for name, value in vars(args).items()
                if name in ("steps", "batch", "size", "workers")
            }
            toy_gpu.train_editor(args.run / "narrow_editor" / "model", args.run / "editor", **given)
        if args.stage in (None, "export"):
            export(args.run)
    except (ValueError, OSError) as error:
        cli.fail(error)


if __name__ == "__main__":
    main()
