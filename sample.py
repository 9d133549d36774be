"""Edit a video by an instruction: Algorithm 2 of the paper and the command line around it.

    python sample.py --video in.mp4 --prompt "make it snow"                       # the small built-in checkpoint
    python sample.py --video in.mp4 --prompt "..." --checkpoint kiwi-edit-5b ...   # the full-size model, on a GPU

The edit has the length, resolution, timing and sound of the source (Eq. 1). Where the model's limits are narrower than
the clip, the clip is scaled down and the edit back up, and long clips are denoised in overlapping windows.

Letters: T H W frames, height and width of a video; C t h w channels and sides of the latents.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cli import edit_parser, fail

if __name__ == "__main__":
    edit_parser().parse_args()  # so that --help, and most mistakes, do not wait for PyTorch to be imported

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rvedit
import video
from vae import WanVAE

# --- Algorithm 2 ----------------------------------------------------------------------------------


def timesteps(steps: int, shift: float) -> Tensor:
    """1 = t_N > ... > t_0 = 0, (steps + 1,): evenly spaced u mapped to s·u / (1 + (s - 1)·u), denser near noise."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def denoise(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, shift: float
) -> Tensor:
    """Algorithm 2, lines 4-7, with Euler's step: from noise z at t = 1 to clean latents at t = 0, in float32.

    velocity(z, t) -> dz/dt in z's shape; t is (1,). noise: (1, C, t, h, w).
    """
    z, ts = noise, timesteps(steps, shift).to(noise.device)
    for k in tqdm(range(steps), desc="denoising", unit="step", disable=None, leave=False):
        z = z + (ts[k + 1] - ts[k]) * velocity(z, ts[k : k + 1])
    return z


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """z at t = 1, drawn in float32 on the CPU, so that a seed means the same noise on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Clips longer than the model's window ---------------------------------------------------------


def windows(length: int, size: int) -> list[slice]:
    """Slices of `size` that cover range(length) and overlap by a quarter; the last is moved back to end in time."""
    if length <= size:
        return [slice(0, length)]
    stride = size - size // 4
    starts = [*range(0, length - size, stride), length - size]
    return [slice(start, start + size) for start in starts]


def blend(parts: list[Tensor], slices: list[slice], length: int) -> Tensor:
    """Average windows of (1, C, t, h, w) back into (1, C, length, h, w), with linear ramps at their ends."""
    if len(parts) == 1:
        return parts[0]
    size = parts[0].shape[2]
    distance = torch.arange(
        1, size + 1, device=parts[0].device
    )  # of each frame to the window's nearer end
    ramp = torch.minimum(distance, distance.flip(0)).clamp(max=size // 4 + 1).float().view(-1, 1, 1)
    total = parts[0].new_zeros(*parts[0].shape[:2], length, *parts[0].shape[3:])
    weight = total.new_zeros(length, 1, 1)
    for part, where in zip(parts, slices, strict=True):
        total[:, :, where] += ramp * part
        weight[where] += ramp
    return total / weight


# --- From clip to clip ----------------------------------------------------------------------------


def model_size(height: int, width: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """The sides at which the model works: scaled down to max_pixels, then the nearest multiples of factor that fit."""
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    exact = height * scale / factor, width * scale / factor
    sides = [max(1, round(side)) for side in exact]
    while math.prod(sides) * factor**2 > max_pixels and max(sides) > 1:
        # Rounding went over: take from the side that was rounded up by more.
        i = max((0, 1), key=lambda i: (sides[i] > 1, sides[i] / exact[i]))
        sides[i] -= 1
    return sides[0] * factor, sides[1] * factor


def to_blocks(frames: Tensor, length: int, size: int) -> Iterator[Tensor]:
    """uint8 (T, H, W, 3), the last frame repeated to length -> float (1, 3, n, H, W) in [-1, 1]; n = 1, then size."""
    index = torch.arange(length).clamp(max=len(frames) - 1)
    for part in index.tensor_split(list(range(1, length, size))):
        yield video.to_float(frames[part]).unsqueeze(0)


def decode(vae: WanVAE, latents: Tensor, shape: torch.Size) -> Tensor:
    """Latents (1, C, t, h, w) -> uint8 frames of a (T, H, W, 3) shape on the CPU, one latent frame at a time.

    This, not the DiT, is the memory peak of an edit.
    """
    frames, done = torch.empty(shape, dtype=torch.uint8), 0
    blocks = vae.decode_chunks(latents)
    for block in tqdm(blocks, desc="decoding", total=latents.shape[2], disable=None, leave=False):
        block = video.to_uint8(block[0])  # (n, h, w, 3)
        block = block[: shape[0] - done]  # the last repeats frames that only filled up to 4k + 1
        frames[done : done + len(block)] = video.resize(block, *shape[1:3])
        done += len(block)
    return frames


@contextlib.contextmanager
def stage(
    name: str, times: dict[str, float], device: torch.device, *modules: nn.Module, offload: bool
) -> Iterator[None]:
    """Time a stage of the edit and, if offloading, keep on the device only the modules it uses, only while it runs."""
    start = time.perf_counter()
    if offload:
        for module in modules:
            module.to(device)
    yield
    if offload:
        for module in modules:
            module.cpu()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times[name] = time.perf_counter() - start


@torch.no_grad()
def edit_video(
    model: rvedit.RVEDiT,
    vae: WanVAE,
    frames: Tensor,
    instruction: str,
    steps: int | None = None,
    shift: float = 5.0,
    seed: int = 0,
    device: torch.device | None = None,
    times: dict[str, float] | None = None,
) -> Tensor:
    """Edit a clip: uint8 (T, H, W, 3) of any length and size -> uint8 (T, H, W, 3), the same length and size.

    steps, shift: of the sampler's schedule; None: the model's sampling_steps, 50 but for the toy. The same seed on the
    same machine gives the same frames. device: where to compute if the networks rest on the CPU (offloading: only the
    one in use is moved there); None computes where the networks are. times: filled with the seconds of each stage.
    Raises ValueError for an instruction that is empty or longer than the MLLM's context.
    """
    times = {} if times is None else times
    offload, device = device is not None, device or model.dit.patch_embedding.weight.device
    config, factor = model.config, vae.config.temporal_factor
    height, width = model_size(*frames.shape[1:3], config.max_pixels, config.spatial_factor)
    small = video.resize(frames, height, width)
    length = math.ceil((len(frames) - 1) / factor) + 1  # in latent frames
    slices = windows(length, (config.max_frames - 1) // factor + 1)

    with stage("understand", times, device, model.encoder, offload=offload):  # Alg. 2, lines 2-3
        contexts = []
        for where in tqdm(slices, desc="reading", unit="window", disable=None, leave=False):
            first, last = (
                max(0, factor * (where.start - 1) + 1),
                factor * (where.stop - 1),
            )  # frames of the window
            index = torch.arange(first, last + 1).clamp(max=len(frames) - 1)
            # Not `encoder(...)`: under FSDP2 it would find its frames on the GPU, before they are prepared.
            inputs = model.encoder.prepare([small[index]], [instruction])
            contexts.append(model.contexts(model.encoder.encode(inputs)))

    with stage("encode", times, device, vae.encoder, vae.conv1, offload=offload):
        blocks = to_blocks(small, factor * (length - 1) + 1, factor)
        progress = tqdm(
            vae.encode_chunks(blocks), desc="encoding", total=length, disable=None, leave=False
        )
        source = torch.cat(list(progress), dim=2)  # (1, C, t, h, w)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        """û_θ(z_t, t | C), each window on its own, with positions that start at 0."""
        parts = [
            model.dit(z[:, :, where], t, context, source[:, :, where])
            for where, context in zip(slices, contexts, strict=True)
        ]
        return blend(parts, slices, length)

    with stage("denoise", times, device, model.dit, offload=offload):
        noise = initial_noise(source.shape, seed).to(device)
        latents = denoise(velocity, noise, steps or config.sampling_steps, shift)

    with stage("decode", times, device, vae.decoder, vae.conv2, offload=offload):
        return decode(vae, latents, frames.shape)


# --- Command line ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    args = edit_parser().parse_args(argv)
    args.out = args.out or Path(f"{args.video.stem}_edited.mp4")
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    return args


def load_model(args: argparse.Namespace) -> tuple[rvedit.RVEDiT, WanVAE]:
    """The checkpoint with the options that change its configuration, or ValueError where it cannot edit."""
    if args.checkpoint is None and (args.wan or args.qwen):
        raise ValueError(
            "--wan and --qwen alone cannot edit yet, they are a start for training: add --checkpoint"
        )
    resting = torch.device("cpu") if args.offload else args.device
    model, vae = rvedit.load(
        args.checkpoint, args.wan, args.qwen, resting, getattr(torch, args.dtype)
    )
    config, depth = model.config, args.routing_depth
    args.steps = args.steps or config.sampling_steps
    if depth is not None:
        if depth > config.dit.num_blocks:
            raise ValueError(
                f"--routing-depth {depth}: the model has only {config.dit.num_blocks} blocks"
            )
        if depth < config.dit.num_blocks and rvedit.layout(
            args.checkpoint or rvedit.TOY
        ).startswith("kiwi-edit"):
            raise ValueError(
                f"--routing-depth {depth}: Kiwi-Edit's blocks were never shown visual and textual tokens; "
                f"train it at that depth first, or leave the option out"
            )
        config = dataclasses.replace(config, routing_depth=depth)
    if args.max_pixels is not None:
        config = dataclasses.replace(config, max_pixels=args.max_pixels)
    model.config = config
    return model, vae


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    times: dict[str, float] = {}
    try:
        if not args.prompt.strip():
            raise ValueError("--prompt is empty: say what to change")
        video.check_writable(args.out)
        if args.out.exists() and args.video.exists() and args.out.samefile(args.video):
            raise ValueError(
                f"--out {args.out} is the source itself, which would be lost: choose another name"
            )
        compare = args.out.with_stem(f"{args.out.stem}_compare")
        if args.compare:
            video.check_writable(compare)
        with stage("read", times, args.device, offload=False):
            clip = video.read_video(args.video)
        with stage("load", times, args.device, offload=False):
            model, vae = load_model(args)
        frames = edit_video(
            model,
            vae,
            clip.frames,
            args.prompt,
            args.steps,
            args.shift,
            args.seed,
            device=args.device if args.offload else None,
            times=times,
        )
        with stage("write", times, args.device, offload=False):
            height, width = video.write_video(args.out, frames, like=clip)
            if args.compare:
                side_by_side = (
                    torch.cat(pair, dim=2)
                    for pair in zip(clip.frames.split(8), frames.split(8), strict=True)
                )
                video.write_video(compare, side_by_side, like=clip)
    except torch.OutOfMemoryError:
        fail(
            f"out of memory on {args.device}: add --offload, or --max-pixels with a smaller number"
        )
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if (height, width) != tuple(frames.shape[1:3]):
        print(
            f"note: H.264 has no odd sides, {frames.shape[2]}x{frames.shape[1]} became {width}x{height}",
            file=sys.stderr,
        )
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in times.items())
    print(f"{args.out}: {len(frames)} frames of {width}x{height} ({seconds})")


if __name__ == "__main__":
    main()
