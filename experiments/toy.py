"""Make the built-in model from nothing, and measure it.

    python -m experiments.toy                      # makes it, in the stages below
    python -m experiments.toy evaluate             # how many clips it edits, and how well
    python -m experiments.toy evaluate --natural FILE --video CLIP   # a list of requests
    python -m experiments.toy ablate               # Table 2 of the paper at this scale

1. vae: a VAE, trained on crops of clips.
2. start: a tokenizer for these clips, and random weights of MLLM and DiT.
3. editor: train.py from there (Algorithm 1), with routing and alignment, on clips of many sizes.
4. export: all of it in half precision.

The same command makes it on one GPU and on CPUs; for CPUs that have instructions for bfloat16 add
`--train --dtype bfloat16`. It goes on where it was stopped, and a stage that is done is not done
again.
Letters: B batch, T H W frames, height and width of a video; C T' H' W' those of latents.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
import time
from pathlib import Path

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli

if __name__ == "__main__":
    cli.begin()

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import rvedit
import train
from experiments import ablation, scoring
from experiments.scoring import DEVICE
from experiments.workloads import fit_config
from mllm import CHAT_START
from muon import Muon
from scenes import EVERYTHING
from shapes import TOY_EXTENT, WORDINGS, ShapesDataset, caption, draw_edit
from vae import WanVAE, patchify, split_time, unpatchify
from video import to_float

# A GPU waits for its clips unless many processes draw them; on a CPU they would only take turns.
WORKERS = min(16, os.cpu_count() or 1) if DEVICE == "cuda" else 0

# --- The VAE --------------------------------------------------------------------------------------

VAE_SEED = 1
VAE_STEPS = (3000, 8000)  # of the whole VAE, then of its decoder alone, which keeps the latents
VAE_RATES = (5e-3, 4e-3)  # the highest of each part
WARMUP = 30  # steps of each part
REPORT_EVERY = 50  # steps
SAVE_SECONDS = 120
NOISES = (0.2, 0.1)  # at most added to the decoder's latents, in units of their scale
CROPS = (  # the minibatches, by turns: clips, frames, side that is drawn, side that is cut out
    (8, 5, 96, 48),
    (4, 5, 64, 64),
    (1, 9, 96, 96),
)


class Crops(Dataset):
    """Minibatches by step of crops of sources and targets: float (B, 3, T, H, W) in [-1, 1]."""

    def __getitem__(self, step: int) -> Tensor:
        number, frames, side, crop = CROPS[step % len(CROPS)]
        rng = np.random.default_rng((VAE_SEED, step))
        shapes = ShapesDataset(VAE_SEED, 2**31, frames, side, side, EVERYTHING, coarse=True)
        crops = []
        for _ in range((number + 1) // 2):
            clip = shapes[int(rng.integers(len(shapes)))]
            for name in rng.permutation(["source", "target"]):
                y, x = rng.integers(0, side - crop + 1, 2)
                crops.append(clip[name][:, y : y + crop, x : x + crop])
        return to_float(torch.stack(crops[:number]))


def reconstruct(vae: WanVAE, video: Tensor, noise: Tensor) -> Tensor:
    """`vae.encode` and `vae.decode` without clamp and statistics.

    noise: for each clip, how much of it is added to the latents, in units of their scale, (B,).
    """
    patch = vae.config.patch_size
    cache: dict = {}
    moments = []
    for block in split_time(video, video.shape[2]):
        moments.append(vae.conv1(vae.encoder(patchify(block, patch), cache)))
    z, _ = torch.cat(moments, dim=2).chunk(2, dim=1)  # (B, C, T', H', W')
    scale = z.float().square().mean().sqrt()
    z = z + (scale * noise.view(-1, 1, 1, 1, 1) * torch.randn_like(z)).to(z.dtype)
    cache = {}
    frames = []
    for block in split_time(z, z.shape[2]):
        frames.append(unpatchify(vae.decoder(vae.conv2(block), cache), patch))
    return torch.cat(frames, dim=2)


@torch.no_grad()
def untrained_vae() -> WanVAE:
    """The toy preset's VAE at a start from which it learns colours soon."""
    torch.manual_seed(0)
    vae = WanVAE(rvedit.preset("toy").vae)
    # RMSNorm divides out how bright a pixel is, unless something constant stands beside it. So one
    # channel before each of the two heads starts with a large bias.
    vae.encoder.middle[2].residual[6].bias[0] = 10
    vae.decoder.upsamples[-1].upsamples[-1].residual[6].bias[0] = 6
    # The latents start large beside the biases of the decoder.
    vae.conv1.weight *= 8
    vae.conv1.bias.zero_()
    # Attention stays off, as it starts: crops would teach it the wrong size of a clip.
    for block in (vae.encoder.middle[1], vae.decoder.middle[1]):
        block.requires_grad_(False)
    return vae


def cosine(step: int, steps: int, peak: float) -> float:
    """A learning rate that rises linearly in WARMUP steps and falls by a cosine to 0."""
    rising = min(1.0, (step + 1) / WARMUP)
    return peak * rising * (1 + math.cos(math.pi * step / steps)) / 2


def train_vae(state: Path, steps: tuple[int, int]) -> WanVAE:
    """Train the VAE as an autoencoder for the squared error, from what the file `state` holds.

    Noise in the latents stands in the place of a prior. It makes them smooth, and spends their one
    scale on what counts in the picture instead of whitening them. Muon gives 18.4 dB after 150
    steps, AdamW 15.6. On a GPU it computes in bfloat16 by autocast.
    A run that was stopped and begun again ends with the same weights: each minibatch, its noise and
    its learning rate are functions of the step.
    """
    vae = untrained_vae().to(DEVICE)
    weights = [weight for weight in vae.parameters() if weight.requires_grad]
    rates = {weight: 1.0 for weight in weights if weight.ndim > 3 and weight[0].numel() > 1}
    optimizer = Muon(weights, rates, betas=(0.9, 0.95), weight_decay=0)
    first = 0
    if state.exists():
        stored = torch.load(state, map_location="cpu", weights_only=True)
        first = stored["step"]
        vae.load_state_dict(stored["weights"])
        # Not by load_state_dict, which wants a "step" of every weight: Muon counts none.
        for weight, moments in zip(weights, stored["moments"], strict=True):
            for name, value in moments.items():  # AdamW counts its steps on the CPU
                optimizer.state[weight][name] = value if name == "step" else value.to(DEVICE)

    loader = DataLoader(Crops(), None, sampler=range(first, sum(steps)), num_workers=WORKERS)
    decibels: list[float] = []
    started = saved = time.monotonic()
    for step, video in enumerate(loader, start=first):
        part = int(step >= steps[0])
        if part == 1:  # the decoder alone
            vae.encoder.requires_grad_(False)
            vae.conv1.requires_grad_(False)
        torch.manual_seed(step)
        rate = cosine(step - part * steps[0], steps[part], VAE_RATES[part])
        optimizer.param_groups[0]["lr"] = rate
        video = video.to(DEVICE)
        noise = NOISES[part] * torch.rand(len(video), device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            decoded = reconstruct(vae, video, noise)
        loss = F.mse_loss(decoded.float(), video)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

        done = step + 1
        decibels.append(10 * math.log10(4 / loss.item()))
        if done % REPORT_EVERY == 0 or done == sum(steps):
            seconds = (time.monotonic() - started) / (done - first)
            mean = sum(decibels) / len(decibels)
            print(f"VAE step {done}/{sum(steps)}, {seconds:.2f} s each: {mean:.2f} dB", flush=True)
            decibels = []
        if time.monotonic() - saved > SAVE_SECONDS or done == sum(steps):
            stored = {
                "step": done,
                "weights": vae.state_dict(),
                "moments": [optimizer.state[weight] for weight in weights],
            }
            with cli.replacing(state) as temporary:
                torch.save(stored, temporary)
            saved = time.monotonic()
    return vae.cpu()


@torch.no_grad()
def latent_statistics(vae: WanVAE) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean of each channel, and one standard deviation for all: one for each would whiten them."""
    shapes = ShapesDataset(VAE_SEED + 1, 40, 5, 96, 96, EVERYTHING, coarse=True)
    latents = []
    for index in range(len(shapes)):
        latents.append(vae.encode(to_float(shapes[index]["target"][None]))[0])
    stacked = torch.stack(latents)  # (40, C, T', H', W')
    mean = stacked.mean((0, 2, 3, 4), keepdim=True)
    std = (stacked - mean).square().mean().sqrt().item()
    return tuple(mean.flatten().tolist()), (std,) * stacked.shape[1]


# --- The start of the editor ----------------------------------------------------------------------

# Qwen's, in its order, without their brackets.
SPECIAL_TOKENS = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad"
).split()


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE like Qwen's, for any text, made from the words of the clips' instructions."""
    texts = [re.sub(r"<\|\w+\|>", "", CHAT_START)] * 100
    rng = np.random.default_rng(VAE_SEED)
    extent = (5, 32, 32)
    for words in ("plain", "people"):
        for category in EVERYTHING * 100:
            _, target, instruction = draw_edit(rng, category, extent, words=words)
            texts += [instruction, caption(target)]
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
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_start(start: Path, vae: WanVAE) -> None:
    """What the editor is trained from: the VAE, and random weights of MLLM and DiT."""
    mean, std = latent_statistics(vae)
    vae.config = dataclasses.replace(vae.config, latents_mean=mean, latents_std=std)
    # The toy edits at home what it was trained on: the sizes and lengths of EDITOR_SIZES.
    config = dataclasses.replace(
        rvedit.preset("toy"),
        vae=vae.config,
        max_frames=max(T for T, _, _ in EDITOR_SIZES),
        max_pixels=max(H * W for _, H, W in EDITOR_SIZES),
        min_pixels=min(H * W for _, H, W in EDITOR_SIZES),
    )
    model = rvedit.RVEDiT(config, train_tokenizer())
    rvedit.initialise(model)
    rvedit.save(start, model, vae)


# --- The editor -----------------------------------------------------------------------------------

EDITOR_STEPS = 5000  # of 256 clips each
EDITOR_SIZES = (  # T, H, W: stills and clips, square, 4:3, 16:9 and portrait; one a step
    (1, 64, 64),
    (1, 96, 168),
    (1, 128, 128),
    (1, 192, 144),
    (5, 96, 96),
    (5, 168, 96),
    (9, 64, 64),
    (9, 96, 96),
    (9, 96, 128),
    (9, 96, 168),
    (9, 128, 128),
    (9, 168, 96),
    (9, 192, 192),
    (17, 64, 64),
    (17, 96, 96),
    (17, 128, 96),
)


def editor_options(run: Path, steps: int) -> list[str]:
    """The options of train.py for the editor. The clips of a step are the same on every machine."""
    out = run / "editor"
    options = ["--checkpoint", str(run / "start"), "--out", str(out), "--steps", str(steps)]
    options += ["--timestep-shift", "15", "--save-every", "200"]
    if DEVICE == "cuda":
        options += ["--batch", "256", "--workers", str(WORKERS)]
    else:
        options += ["--batch", "16", "--accumulate", "16"]
    for size in EDITOR_SIZES:
        options += ["--size", *map(str, size)]
    if (out / "run.json").exists():
        options.append("--resume")
    return options


def export(run: Path) -> None:
    """RUN/model: the editor in half precision, which halves its size."""
    model, vae = rvedit.load(run / "editor" / "model", dtype=torch.float16)
    rvedit.save(run / "model", model, vae.half())


def make(args: argparse.Namespace) -> None:
    """All stages that are not done yet."""
    run = args.run
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "start").exists():
        vae = train_vae(run / "vae.pt", tuple(args.vae_steps))
        write_start(run / "start", vae)
    if not (run / "editor" / "model").exists():
        train.main([*editor_options(run, args.steps), *args.train])
    if not (run / "model").exists():
        export(run)
    print(f"{run / 'model'} is made: sample.py --checkpoint {run / 'model'} edits with it")


# --- Command line ---------------------------------------------------------------------------------


def make_parser() -> cli.Parser:
    whole = cli.number(int, 1)
    parser = cli.Parser(
        prog="python -m experiments.toy",
        description="Make the built-in model from nothing, and measure it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/toy"), help="folder of the run (default runs/toy)"
    )
    parser.add_argument(
        "--vae-steps",
        type=whole,
        nargs=2,
        default=VAE_STEPS,
        metavar=("ALL", "DECODER"),
        help="steps of the whole VAE, then of its decoder alone (default 3000 8000)",
    )
    parser.add_argument(
        "--steps",
        type=whole,
        default=EDITOR_STEPS,
        help=f"steps of the editor, 256 clips each (default {EDITOR_STEPS})",
    )
    parser.add_argument(
        "--train",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="OPTIONS",
        help="all that follows are options of train.py, for the editor",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help="default: make it")

    judge = commands.add_parser(
        "evaluate", help="edit clips that were never trained on", allow_abbrev=False
    )
    judge.add_argument("--checkpoint", type=Path, help="one of ours; default: the built-in one")
    judge.add_argument(
        "--seed", type=cli.number(int, 0), default=2026, help="of the clips (default 2026)"
    )
    judge.add_argument("--clips", type=whole, default=50, help="of each category (default 50)")
    judge.add_argument(
        "--size",
        type=whole,
        nargs=3,
        default=TOY_EXTENT,
        metavar=tuple("THW"),
        help="frames, 4k + 1, height and width of the clips (default 9 128 128)",
    )
    judge.add_argument(
        "--words", choices=WORDINGS, default="plain", help="of the instructions (default plain)"
    )
    judge.add_argument(
        "--natural", type=Path, metavar="FILE", help="edit --video by the requests in FILE instead"
    )
    judge.add_argument("--video", type=Path, help="the clip that the requests are about")
    judge.add_argument(
        "--out",
        type=Path,
        default=Path("requests.png"),
        help="the contact sheet of these edits (default requests.png)",
    )

    table = commands.add_parser("ablate", help="Table 2 at this scale", allow_abbrev=False)
    ablation.add_arguments(table)
    return parser


@cli.guarded
def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if cli.RANKS > 1:
        cli.fail(
            "toy is one process: start it without torchrun; for more GPUs, continue RUN/editor "
            "with torchrun train.py --out RUN/editor --resume"
        )
    if args.command == "evaluate":
        if (args.natural is None) != (args.video is None):
            parser.error("--natural FILE and --video CLIP go together")
        model, vae = rvedit.load(args.checkpoint, device=DEVICE)
        if args.natural:
            scoring.try_requests(model, vae, args.natural, args.video, args.out)
        else:
            fit_config(model.config, args.size)  # a mistake shows before any work
            scoring.evaluate(model, vae, args.seed, args.clips, tuple(args.size), args.words)
    elif args.command == "ablate":
        ablation.ablate(args)
    else:
        make(args)


if __name__ == "__main__":
    main()
