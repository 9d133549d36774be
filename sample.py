"""Edit a video by an instruction: Algorithm 2 of the paper and the command line around it.

    python sample.py --video assets/shapes.mp4 --prompt "remove the red circle"  # built-in model
    python sample.py --video in.mp4 --prompt "..." --checkpoint kiwi-edit-5b     # full size, GPU

The edit has the length, resolution, timing and sound of the source (Eq. 1). A clip that is larger
than the model allows is scaled down, and its edit back up. A clip that is longer is denoised in
overlapping windows. Frames are read, resized, encoded, decoded and written in blocks, so memory
grows with the latents and not with the frames.

Letters: T H W frames, height and width of a video; h w those at which the model works on it; C T'
H' W' channels and sides of the latents; n frames of a block; t in [0, 1], the sampler's time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cli

if __name__ == "__main__":
    cli.begin()
    cli.edit_parser().parse_args()  # before PyTorch is imported, so that mistakes are found at once

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

import rvedit
import video
from cli import LOCAL_RANK, RANK, RANKS
from mllm import evenly_spaced, max_visual_tokens
from model import Context, flops
from rvedit import RVEDiT, RVEDiTConfig
from vae import WanVAE
from weights import digest_of

if TYPE_CHECKING:  # its import takes as long as half of PyTorch, and most edits run on one GPU
    from sequence import Spread

# Bars, for terminals only, and of one of torchrun's processes only, which share one edit.
progress = functools.partial(tqdm, disable=True if RANK else None, leave=False)

# --- Algorithm 2 ----------------------------------------------------------------------------------


def timesteps(steps: int, shift: float) -> Tensor:
    """The times of the sampler, (steps + 1,) float32: from t_N = 1, its first, to t_0 = 0.

    Evenly spaced u in [0, 1] are mapped to s·u / (1 + (s - 1)·u): a shift s > 1 spends more of
    the steps near pure noise.
    """
    # In float64, so that only the result is rounded.
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Line 4: z at t = 1, drawn in float32 on the CPU: a seed means the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def denoise(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    shift: float,
    unfinished: Unfinished | None = None,
) -> Tensor:
    """Lines 5-7: Euler's method from noise at t = 1 to clean latents at t = 0.

    velocity(z, t) is dz/dt, of z's shape; t is (1,). noise is (1, C, T', H', W'), float32.
    unfinished: where the steps of an edit that may be stopped are kept, and continued from.
    """
    # z stays float32 whatever the model computes in. The first of 50 steps is 0.004 long, which
    # bfloat16, with a spacing of 0.008 at 1, would round away.
    z, first = (noise, 0) if unfinished is None else unfinished.load(noise)
    times = timesteps(steps, shift).to(noise.device)
    bar = progress(range(first, steps), desc="denoising", unit="step", initial=first, total=steps)
    for i in bar:
        t, t_next = times[i], times[i + 1]
        z = z + (t_next - t) * velocity(z, t.view(1))  # line 6; t falls, so the step is negative
        if unfinished is not None:
            unfinished.save(z, i + 1)
    return z


class Clip(NamedTuple):
    """A clip that is read when it is needed, as often as it is needed."""

    frames: Callable[[], Iterator[Tensor]]  # from the first on, one by one: uint8 (H, W, 3)
    shape: tuple[int, int, int]  # (T, H, W)


class Inference:
    """Algorithm 2 with the networks of a model.

    device: for offloading, where the networks rest on the CPU and the one in use is moved to this
    device; without it they compute where they are. spread: how several processes share an edit,
    each of which gets the whole of it. `times` has the seconds that each stage took.
    """

    def __init__(
        self,
        model: RVEDiT,
        vae: WanVAE,
        device: torch.device | None = None,
        spread: Spread | None = None,
    ) -> None:
        self.model, self.vae, self.spread = model, vae, spread
        self.offload = device is not None
        self.device = device or model.dit.patch_embedding.weight.device
        self.times: dict[str, float] = {}

    @torch.no_grad()
    def edit_latents(
        self,
        clip: Clip,
        instruction: str,
        steps: int,
        shift: float,
        seed: int,
        unfinished: Unfinished | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Lines 1-7: the latents of the edit and those of its source, (1, C, T', H', W') each."""
        model, vae, spread = self.model, self.vae, self.spread
        num_frames, height, width = clip.shape
        size = size_for(model.config, height, width)
        factor = vae.config.temporal_factor
        length, slices = clip_windows(num_frames, model.config)  # in latent frames
        weights = window_weights(slices, length)
        # Which of the windows this process computes: all of them, unless processes share the edit.
        mine = slice(None) if spread is None else spread.windows

        # The clip is read twice, for the MLLM and for the VAE, rather than kept in memory.
        with self.stage("understand", model.encoder):
            limit = model.config.max_mllm_frames
            seen = [window_frames(window, num_frames, factor, limit) for window in slices[mine]]
            clips = (video.resize(frames, *size) for frames in pick(clip.frames(), seen))
            contexts = understand(model, clips, instruction)  # lines 2-3

        with self.stage("encode", vae.encoder, vae.conv1):
            blocks = latent_blocks(clip.frames(), length, factor)
            source = encode(vae, (video.resize(block, *size) for block in blocks), length)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            """û_θ(z_t, t | C), each window on its own, with positions that start at 0.

            The DiT never saw positions beyond its window, so a later window cannot have its own.
            """
            total = torch.zeros_like(z)
            for window, weight, context in zip(slices[mine], weights[mine], contexts, strict=True):
                part = model.dit(z[:, :, window], t, context, source[:, :, window])
                total[:, :, window] += weight.to(z.device) * part
            return total if spread is None else spread.add_up(total)

        with self.stage("denoise", model.dit):
            noise = initial_noise(source.shape, seed).to(source.device)  # line 4
            latents = denoise(velocity, noise, steps, shift, unfinished)  # lines 5-7
        return latents, source

    @torch.no_grad()
    def decode_edit(
        self, clip: Clip, latents: Tensor, mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Line 8: the edit of a clip as uint8 (n, H, W, 3) blocks, T frames in all.

        mask: that of `change_mask`, if the source's own pixels are to be kept where it is 0.
        """
        vae = self.vae
        with self.stage("decode and write", vae.decoder, vae.conv2):
            edited = decode(vae, latents, clip.shape)
            if mask is not None:
                blocks = latent_blocks(clip.frames(), len(mask), vae.config.temporal_factor)
                edited = restore_source(edited, blocks, mask)
            yield from edited

    @contextlib.contextmanager
    def stage(self, name: str, *modules: nn.Module) -> Iterator[None]:
        """Time a stage. If offloading, its modules are on the device only while it runs."""
        start = time.perf_counter()
        try:
            if self.offload:
                for module in modules:
                    module.to(self.device)
            yield
        finally:  # also after an error, which the caller may live through
            if self.offload:
                for module in modules:
                    module.cpu()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        if self.device.type == "cuda":
            # A GPU works on while Python goes on: without waiting, the next stage would be charged.
            torch.cuda.synchronize(self.device)
        self.times[name] = time.perf_counter() - start


def edit_video(
    model: RVEDiT,
    vae: WanVAE,
    frames: Tensor,
    instruction: str,
    steps: int | None = None,
    shift: float = cli.SHIFT,
    seed: int = 0,
    device: torch.device | str | None = None,
    keep_source: bool = False,
) -> Tensor:
    """Edit a clip: uint8 (T, H, W, 3) of any length and size -> uint8 (T, H, W, 3), the same shape.

    steps and shift set the sampler's schedule; without steps it is the model's own number, which is
    50 except for the toy. The same seed on the same machine gives the same frames. device: where to
    compute when the networks rest on the CPU (offloading); without it they compute where they are.
    keep_source: where nothing was edited, give back the source's own pixels (see `change_mask`).

    Raises ValueError for a clip of another form, steps or a shift that make no schedule, and an
    instruction that is empty or longer than the MLLM's context.
    """
    check_frames(frames)
    if steps is None:
        steps = model.config.sampling_steps
    if steps < 1:
        raise ValueError(f"steps is {steps}, but the sampler needs at least 1")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift is {shift}, not a positive number")
    inference = Inference(model, vae, None if device is None else torch.device(device))
    clip = Clip(lambda: iter(frames), tuple(frames.shape[:3]))
    latents, source = inference.edit_latents(clip, instruction, steps, shift, seed)
    mask = change_mask(latents, source) if keep_source else None
    blocks = inference.decode_edit(clip, latents, mask)
    edited = torch.empty(frames.shape, dtype=torch.uint8)  # once: joining a list would hold two
    done = 0
    for block in blocks:
        edited[done : done + len(block)] = block
        done += len(block)
    return edited


def check_frames(frames: Tensor) -> None:
    """Raise ValueError unless they are a clip, uint8 (T, H, W, 3), of at least one pixel."""
    if not isinstance(frames, Tensor):
        raise ValueError(f"frames must be a tensor, not {type(frames).__name__}")
    shape = tuple(frames.shape)
    if frames.dtype != torch.uint8 or len(shape) != 4 or shape[3] != 3 or not frames.numel():
        dtype = str(frames.dtype).removeprefix("torch.")
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {dtype} {shape}")


# --- The stages of an edit ------------------------------------------------------------------------


def window_frames(window: slice, num_frames: int, factor: int, limit: int) -> list[int]:
    """Which frames, `limit` at most, the MLLM sees of a window of latent frames."""
    # Latent frame 0 is frame 0. Latent frame k > 0 is frames factor·(k - 1) + 1 to factor·k.
    first = max(0, factor * (window.start - 1) + 1)
    last = factor * (window.stop - 1)
    chosen = first + evenly_spaced(last - first + 1, limit)
    # A clip is padded to 4k + 1 frames by repeating its last one.
    return chosen.clamp(max=num_frames - 1).tolist()


def pick(frames: Iterator[Tensor], of_windows: list[list[int]]) -> Iterator[Tensor]:
    """The frames that are wanted of each window, as a clip (n, H, W, 3), in one pass over all."""
    wanted = {index for indices in of_windows for index in indices}
    numbered = enumerate(frames)
    kept: dict[int, Tensor] = {}  # by index
    for indices in of_windows:
        while indices[-1] not in kept:
            index, frame = next(numbered)
            if index in wanted:
                kept[index] = frame
        yield torch.stack([kept[index] for index in indices])
        # Later windows start later: they may need frames of this one again, but none before it.
        kept = {index: frame for index, frame in kept.items() if index >= indices[0]}


def understand(model: RVEDiT, clips: Iterator[Tensor], instruction: str) -> list[list[Context]]:
    """Algorithm 2, lines 2-3: C^(1) ... C^(L) for the uint8 (n, h, w, 3) clip of each window."""
    contexts = []
    for clip in progress(clips, desc="reading", unit="window"):
        # Not `encoder(...)`: FSDP2 would move the frames to the GPU before they are prepared.
        inputs = model.encoder.prepare([clip], [instruction])
        condition = model.encoder.encode(inputs)
        contexts.append(model.contexts(condition))
    return contexts


def latent_blocks(frames: Iterator[Tensor], length: int, factor: int) -> Iterator[Tensor]:
    """The frames in blocks (n, H, W, 3) of one latent frame each: 1 frame, then `factor` at a time.

    The last frame is repeated until there are `length` blocks.
    """
    frame = None
    for number in range(length):
        block = []
        for _ in range(1 if number == 0 else factor):
            frame = next(frames, frame)  # at the end of the clip, its last frame again
            block.append(frame)
        yield torch.stack(block)


def encode(vae: WanVAE, blocks: Iterator[Tensor], length: int) -> Tensor:
    """Blocks of uint8 (n, h, w, 3) frames -> source latents (1, C, T', H', W'). length: T'."""
    inputs = (video.to_float(block).unsqueeze(0) for block in blocks)  # (1, 3, n, h, w)
    # The VAE asks for a block when it has encoded the one before, so one is in memory at a time.
    latents = progress(vae.encode_chunks(inputs), desc="encoding", unit="block", total=length)
    return torch.cat(list(latents), dim=2)


def decode(vae: WanVAE, latents: Tensor, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Algorithm 2, line 8: latents (1, C, T', H', W') -> blocks of frames, uint8 (n, H, W, 3).

    shape: (T, H, W) of the clip. One latent frame is decoded at a time, because decoding, and not
    the DiT, is the memory peak of an edit.
    """
    frames_left, height, width = shape
    length = latents.shape[2]
    decoded = vae.decode_chunks(latents)
    for block in progress(decoded, desc="decoding", unit="block", total=length):
        frames = video.to_uint8(block[0])[:frames_left]  # the last block may end with padding
        yield video.resize(frames, height, width)
        frames_left -= len(frames)


# --- Clips longer than the model's window ---------------------------------------------------------

# The paper edits clips of 81 frames only. For longer ones we chose overlapping windows, which are
# denoised together: in every step, their velocities are averaged where they overlap, so that the
# windows cannot drift apart. Windows count latent frames.


def windows(length: int, size: int) -> list[slice]:
    """Slices of `size` that cover range(length) and overlap by at least a quarter.

    The last one is moved back, so that it ends with the clip.
    """
    if length <= size:
        return [slice(0, length)]
    stride = size - size // 4
    starts = [*range(0, length - size, stride), length - size]
    return [slice(start, start + size) for start in starts]


def window_weights(slices: list[slice], length: int) -> list[Tensor]:
    """How much each window counts at each of its frames, (size, 1, 1): linear ramps at its ends.

    The weights of all windows at a frame sum to 1.
    """
    size = slices[0].stop - slices[0].start
    from_start = torch.arange(1, size + 1)  # from 1, because some frames have one window only
    to_nearer_end = torch.minimum(from_start, from_start.flip(0))
    # The ramps are as long as the overlap of two windows, so that one fades out as the next fades
    # in. The last overlap may be longer; dividing by the total makes up for it.
    ramp = to_nearer_end.clamp(max=size // 4 + 1).float().view(-1, 1, 1)
    total = torch.zeros(length, 1, 1)
    for window in slices:
        total[window] += ramp
    return [ramp / total[window] for window in slices]


def clip_windows(num_frames: int, config: RVEDiTConfig) -> tuple[int, list[slice]]:
    """The length of a clip in latent frames, and its windows of at most `max_frames` frames."""
    factor = config.vae.temporal_factor
    # The first frame is a latent frame by itself, then each `factor` frames make one. An incomplete
    # last group counts as a whole one: `latent_blocks` fills it up.
    length = math.ceil((num_frames - 1) / factor) + 1
    return length, windows(length, (config.max_frames - 1) // factor + 1)


# --- Sizes ----------------------------------------------------------------------------------------


def model_size(
    height: int, width: int, max_pixels: int, factor: int, min_pixels: int = 0
) -> tuple[int, int]:
    """The (height, width) at which the model works on a frame.

    The frame is scaled down to `max_pixels`, and up only if it has less than `min_pixels`. Then
    each side becomes the nearest multiple of `factor`, such that the product still fits.
    """
    pixels = min(max(height * width, min_pixels), max_pixels)
    scale = math.sqrt(pixels / (height * width))
    exact = [side * scale / factor for side in (height, width)]  # in units of `factor`, not whole
    sides = [max(1, round(side)) for side in exact]
    while math.prod(sides) * factor**2 > max_pixels and max(sides) > 1:
        # Rounding went over the limit: shorten the side that was rounded up by more.
        excess = []
        for side, wanted in zip(sides, exact, strict=True):
            excess.append(side / wanted if side > 1 else 0)  # no side can become 0
        longer = 0 if excess[0] >= excess[1] else 1
        sides[longer] -= 1
    return sides[0] * factor, sides[1] * factor


def size_for(config: RVEDiTConfig, height: int, width: int) -> tuple[int, int]:
    """`model_size` for a model."""
    limits = (config.max_pixels, config.spatial_factor, config.min_pixels)
    return model_size(height, width, *limits)


# --- What was not edited stays as it was (--keep-source) ------------------------------------------

# Root mean square difference of a latent before and after the edit, in standard deviations of the
# latents. Up to the first it counts as unchanged, from the second on as edited. Chosen on the
# built-in model, whose unchanged latents differ by about 0.05 and edited ones by 1 and more.
UNCHANGED, CHANGED = 0.15, 0.4


def change_mask(latents: Tensor, source: Tensor) -> Tensor:
    """How far each latent was edited, from 0 to 1: two (1, C, T', H', W') -> (T', 1, H', W').

    The mask is widened by one latent in time and space, so that a removed object leaves no ghost of
    its fine detail, and then smoothed, so that it has no hard edge and does not flicker.
    """
    # Latents are normalised, so their difference is in standard deviations already.
    distance = (latents - source).float().square().mean(dim=1).sqrt()  # (1, T', H', W')
    mask = ((distance - UNCHANGED) / (CHANGED - UNCHANGED)).clamp(0, 1).unsqueeze(1)
    for pool in (F.max_pool3d, F.avg_pool3d):  # widen, then smooth
        mask = pool(F.pad(mask, (1,) * 6, mode="replicate"), kernel_size=3, stride=1)
    return mask[0].transpose(0, 1).cpu()  # where frames are blended


def restore_source(
    edited: Iterator[Tensor], source: Iterator[Tensor], mask: Tensor
) -> Iterator[Tensor]:
    """Blend blocks of uint8 (n, H, W, 3): the source where the mask is 0, the edit where it is 1.

    mask (T', 1, H', W') has one image for each block; from block to block it changes linearly.
    """
    before = mask[0]
    for edited_block, source_block, after in zip(edited, source, mask, strict=True):
        for i, frame in enumerate(edited_block):  # one by one: float32 frames of 4K are large
            # source_block is always whole, the last edited_block may be shorter: see `decode`.
            now = torch.lerp(before, after, (i + 1) / len(source_block))  # (1, H', W')
            weight = F.interpolate(now.unsqueeze(0), frame.shape[:2], mode="bilinear")
            weight = weight[0].movedim(0, -1)  # (H, W, 1)
            blended = torch.lerp(source_block[i].float(), frame.float(), weight)
            frame.copy_(blended.round())
        yield edited_block
        before = after


# --- What an edit will take -----------------------------------------------------------------------


class Forecast(NamedTuple):
    windows: int
    step: int  # FLOPs of a step
    memory: int  # bytes at the peak


def forecast(model: RVEDiT, vae: WanVAE, shape: tuple[int, int, int], offload: bool) -> Forecast:
    """What an edit of a clip (T, H, W) takes.

    Instruction, embeddings and head are not counted, because they are small, nor are libraries.
    """
    config = model.config
    num_frames, *sides = shape
    height, width = size_for(config, *sides)
    length, slices = clip_windows(num_frames, config)
    window = slices[0].stop - slices[0].start
    tokens = window * height * width // config.spatial_factor**2  # S

    K, L, L_s = config.num_editing_tokens, config.dit.num_blocks, config.routing_depth
    context = [K] * L_s + [K + max_visual_tokens(config)] * (L - L_s)  # Eq. 3
    step = len(slices) * flops(config.dit, tokens, context)

    # The two stages that need most. Their factors, counted on the meta device, say how many tensors
    # of the largest kind are alive at a time.
    denoising = 8 * 4 * tokens * config.dit.dim
    block = vae.config.temporal_factor * height * width // vae.config.patch_size**2
    decoding = 14 * block * vae.config.dec_dim * vae.conv2.weight.itemsize
    networks = (model.encoder, model.dit, vae.decoder)
    encoder, dit, decoder = (sum(p.nbytes for p in network.parameters()) for network in networks)
    if offload:
        peak = max(encoder, dit + denoising, decoder + decoding)
    else:
        peak = encoder + dit + decoder + max(denoising, decoding)

    # What grows with the clip: noise, source, z, and while a new z is computed, it, the velocity,
    # and that times the step.
    latents = 4 * vae.config.z_dim * length * height * width // vae.config.spatial_factor**2
    return Forecast(len(slices), step, memory=peak + 6 * latents)


def matmul_rate(device: torch.device, dtype: torch.dtype, times: int = 3) -> float:
    """FLOP/s of the product of two square matrices, the fastest of some."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # which waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def announce(args: Namespace, plan: Forecast, steps: int) -> None:
    """Say on stderr what an edit takes, before it begins, if it will denoise for over a minute.

    steps: that are still to be done.
    """
    if RANK > 0 or steps * plan.step < 1e12:  # so few take less on any machine
        return
    rate = RANKS * matmul_rate(args.device, getattr(torch, args.dtype))
    minutes = steps * plan.step / rate / 60
    if minutes > 1:
        in_windows = "1 window" if plan.windows == 1 else f"{plan.windows} windows"
        cli.say(
            f"plan: {in_windows} and {steps} steps of {plan.step / 1e12:.3g} TFLOP, at least "
            f"{minutes:,.0f} min of denoising; {plan.memory / 1e9:.2g} GB of memory"
        )


# FLOPs of denoising from which a single edit on a GPU is compiled by default. That is 15 seconds of
# an H100. Compiling saves some of these seconds. It costs about as many where PyTorch's cache has
# the code of an earlier edit, and more where not.
COMPILE_FROM = 1e16


def pays_to_compile(args: Namespace, plan: Forecast, steps: int) -> bool:
    """What --compile or --no-compile says, and without them what a single edit gains by."""
    if args.compile is not None:
        return args.compile
    return args.device.type == "cuda" and steps * plan.step > COMPILE_FROM


def compile_networks(model: RVEDiT, vae: WanVAE) -> None:
    """Compile what runs often in an edit. The MLLM reads the clip only once, and stays as it is."""
    import parallel  # only here: it imports much that other edits do not need

    parallel.compile_blocks(model.dit.blocks)
    parallel.compile_norms(vae)


# --- Command line ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The options, with the defaults of --out, --device and --dtype; a model's: `load_model`."""
    args = cli.edit_parser().parse_args(argv)
    if args.out is None:
        args.out = Path(f"{args.video.stem}_edited{video.default_ending(args.video)}")
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if RANKS > 1 and args.device.type == "cuda":
        args.device = torch.device("cuda", LOCAL_RANK)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    return args


def load_model(args: Namespace) -> tuple[RVEDiT, WanVAE]:
    """The checkpoint, with the options that change its configuration.

    Raises ValueError where it does not exist or cannot edit with these options.
    """
    if args.device.type == "cuda":
        cli.check_gpu(torch.cuda.device_count())
    if args.checkpoint is None and (args.wan or args.qwen):
        raise ValueError(
            "--wan and --qwen alone cannot edit yet, but start a training: add --checkpoint"
        )
    model, vae = rvedit.load(
        args.checkpoint,
        args.wan,
        args.qwen,
        device=torch.device("cpu") if args.offload else args.device,
        dtype=getattr(torch, args.dtype),
        decoder_dtype=getattr(torch, args.decode_dtype),
    )
    if args.routing_depth is not None:
        check_routing_depth(args.routing_depth, model.config)
    # These options change no weights, so they can be applied to a model that is already filled.
    names = ("routing_depth", "max_pixels", "max_frames")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model.config = dataclasses.replace(model.config, **given)
    return model, vae


def check_routing_depth(depth: int, config: RVEDiTConfig) -> None:
    """Raise ValueError where --routing-depth does not fit the checkpoint."""
    num_blocks = config.dit.num_blocks
    if depth > num_blocks:
        raise ValueError(f"--routing-depth {depth}: the model has only {num_blocks} blocks")
    # With such a depth, blocks would read visual and textual tokens through connectors that never
    # had a gradient. Kiwi-Edit's release is such a checkpoint.
    if depth < num_blocks and not config.native_trained:
        raise ValueError(
            f"--routing-depth {depth}: this checkpoint's blocks were never shown visual and "
            "textual tokens; train it at that depth first, or leave the option out"
        )


def check_output(option: str, path: Path, source: Path) -> None:
    """Raise ValueError or OSError if `path` cannot be written, or is the source."""
    video.check_writable(path)
    if path.exists() and source.exists() and path.samefile(source):
        raise ValueError(
            f"{option} would write {path}, the source itself, which would be lost: choose another "
            "name for --out"
        )


def check_outputs(args: Namespace) -> Path:
    """Where --compare goes. Raises ValueError or OSError for outputs that could not be written."""
    check_output("--out", args.out, args.video)
    compare = args.out.with_stem(f"{args.out.stem}_compare")
    if args.compare:
        check_output("--compare", compare, args.video)
    return compare


# Frames of the built-in model's own world come out of its VAE at this PSNR or more, in dB. Of three
# real clips the best frame reached 25.1; of 60 synthetic ones of 96 x 96 the worst 28.7.
OWN_WORLD_PSNR = 26.0
OWN_WORLD_SIDES = range(64, 193)  # pixels


@torch.no_grad()
def note_foreign_clip(
    checkpoint: Path | None, model: RVEDiT, vae: WanVAE, frames: Iterator[Tensor]
) -> None:
    """Say on stderr if the built-in model is given a clip that is not of its own world.

    checkpoint: where the model came from. frames: of the clip, uint8 (H, W, 3). For other models
    none is asked for, so that none is decoded.
    """
    if checkpoint is not None and checkpoint.resolve() != rvedit.TOY.resolve():
        return
    frame = next(frames)
    sides = frame.shape[:2]
    resized = video.resize(frame.unsqueeze(0), *size_for(model.config, *sides))  # (1, h, w, 3)
    picture = video.to_float(resized).unsqueeze(0).to(vae.conv1.weight.device)  # (1, 3, 1, h, w)
    # The toy's VAE has only seen shapes, so it blurs everything else: a cheap test of its world.
    error = (vae.decode(vae.encode(picture)) - picture).square().mean()
    psnr = 10 * math.log10(4 / error.item())  # of values in [-1, 1]: the peak is 2, its square 4
    if psnr < OWN_WORLD_PSNR or any(side not in OWN_WORLD_SIDES for side in sides):
        cli.note(
            "the built-in model knows only moving shapes at about 128x128, such as "
            "assets/shapes.mp4; for real footage add --checkpoint (README, Checkpoints)"
        )


class Unfinished:
    """The latents of an edit that was stopped, in a file beside its output, for --resume.

    They are written at most every SAVE_SECONDS, so a short edit leaves no file. As a context it
    forgets them when the edit is written, and says that they are there when it is not.

    Raises ValueError if there is nothing to resume, or it is of another edit.
    """

    SAVE_SECONDS = 30

    def __init__(self, args: Namespace, model: RVEDiT, vae: WanVAE) -> None:
        self.path = cli.beside(args.out, "", ".unfinished.safetensors")
        # What must be the same for the steps to be worth anything. Options that are not named here,
        # such as --keep-source, do not change them.
        names = ("prompt", "steps", "shift", "seed", "dtype")
        self.edit = {name: str(getattr(args, name)) for name in names}
        for name in ("routing_depth", "max_pixels", "max_frames"):
            self.edit[name] = str(getattr(model.config, name))
        # Not the checkpoint's path, at which others may lie by now, or the same at another; and not
        # the decoder, whose precision an edit may have to change to go on.
        self.edit["weights"] = digest_of(model, vae.encoder, vae.conv1)
        source = args.video.stat()
        self.edit["video"] = f"{source.st_size} bytes, {source.st_mtime_ns}"
        self.saved_at = time.monotonic()
        self.done = 0  # steps that the file has
        self.z: Tensor | None = None  # after them, if --resume asks for it
        if args.resume:
            self.read()

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if RANK > 0:
            return
        if error is None:
            self.path.unlink(missing_ok=True)
        elif self.done:
            cli.note(f"with --resume this edit goes on after step {self.done}")

    def read(self) -> None:
        """Take z and the number of steps done from the file, if it is of this edit."""
        try:
            with safe_open(self.path, framework="pt") as file:
                edit = dict(file.metadata())
                self.z = file.get_tensor("z")
        except (OSError, SafetensorError, TypeError):  # TypeError: a file without metadata
            raise ValueError(
                f"--resume: there is no unfinished edit at {self.path}; leave --resume out. The "
                f"steps of an edit are saved every {self.SAVE_SECONDS} seconds"
            ) from None
        self.done = int(edit.pop("done", 0))
        different = [name for name in self.edit if self.edit[name] != edit.get(name)]
        if different:
            raise ValueError(
                f"--resume: {self.path} is of another edit, which differs in {', '.join(different)}"
            )

    def load(self, noise: Tensor) -> tuple[Tensor, int]:
        """z and the number of steps done: the noise and 0 unless an edit is resumed."""
        return (noise, 0) if self.z is None else (self.z.to(noise.device), self.done)

    def save(self, z: Tensor, done: int) -> None:
        # After every step all processes have the same z, so one of them writes it.
        if RANK > 0 or time.monotonic() - self.saved_at < self.SAVE_SECONDS:
            return
        with cli.replacing(self.path) as temporary:
            # Not by save_file, whose error on a full disk is no OSError.
            temporary.write_bytes(save({"z": z.cpu()}, self.edit | {"done": str(done)}))
        self.saved_at, self.done = time.monotonic(), done


@contextlib.contextmanager
def share_out(
    args: Namespace, model: RVEDiT, vae: WanVAE, num_frames: int
) -> Iterator[Spread | None]:
    """Within this context torchrun's processes, if there are several, share the edit of a clip."""
    if RANKS == 1:
        yield None
        return
    import sequence  # only here: see TYPE_CHECKING above

    sequence.start(args.device)
    _, slices = clip_windows(num_frames, model.config)  # which the edit computes again
    yield sequence.Spread(model, vae, len(slices))
    sequence.finish()  # not after an error, see there


def clip_of(source: video.Video) -> Clip:
    """A clip whose frames are decoded as they are needed."""

    def frames() -> Iterator[Tensor]:
        for block in source.blocks(8):
            yield from block

    return Clip(frames, (len(source.timestamps), source.height, source.width))


def side_by_side(source: Iterator[Tensor], edited: Iterator[Tensor]) -> Iterator[Tensor]:
    """Pairs of uint8 (H, W, 3) frames, the edit perhaps one pixel smaller -> (1, h, 2 w, 3)."""
    for left, right in zip(source, edited, strict=True):
        height, width, _ = right.shape
        yield torch.cat((left[:height, :width], right), dim=1).unsqueeze(0)


@cli.guarded
@cli.memory_advice("add --offload on a GPU, or --max-pixels with a smaller number")
def edit(args: Namespace) -> None:
    """Run the command with its parsed options."""
    start = time.perf_counter()
    # All that can be wrong with files is found before the model is loaded.
    compare = check_outputs(args)
    source = video.open_video(args.video)
    if RANK == 0:  # which writes, and says what of the sound is lost
        video.prepare_edit(source, args.out)
    if args.compare:
        video.check_size(compare, source.height, 2 * source.width)
    clip = clip_of(source)
    num_frames, full_height, full_width = clip.shape

    model, vae = load_model(args)
    args.steps = args.steps or model.config.sampling_steps
    unfinished = Unfinished(args, model, vae)
    note_foreign_clip(args.checkpoint, model, vae, clip.frames())
    plan = forecast(model, vae, clip.shape, args.offload)
    steps_left = args.steps - unfinished.done
    announce(args, plan, steps_left)

    with unfinished, share_out(args, model, vae, num_frames) as spread:
        if pays_to_compile(args, plan, steps_left):
            compile_networks(model, vae)
        inference = Inference(model, vae, args.device if args.offload else None, spread)
        sampling = (args.steps, args.shift, args.seed)
        latents, unedited = inference.edit_latents(clip, args.prompt, *sampling, unfinished)
        mask = change_mask(latents, unedited)
        if not mask.any():  # without a word, one would look for the change
            cli.note(
                "nothing was changed; say it in other words (for the built-in model, in those that "
                "`sample.py -h` lists)"
            )
        # Frames are decoded, scaled and written as they come.
        blocks = inference.decode_edit(clip, latents, mask if args.keep_source else None)
        if RANK > 0:
            for _ in blocks:  # its share of the work; the first process writes
                pass
            return
        height, width = video.write_video(args.out, blocks, like=source)
    if args.compare:
        edited = clip_of(video.open_video(args.out))
        video.write_video(compare, side_by_side(clip.frames(), edited.frames()), like=source)

    if (height, width) != (full_height, full_width):
        cli.note(f"H.264 has no odd sides, {full_width}x{full_height} became {width}x{height}")
    frames = "1 frame" if num_frames == 1 else f"{num_frames} frames"
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in inference.times.items())
    seconds = time.perf_counter() - start
    cli.say_last(f"{args.out}: {frames} of {width}x{height} in {seconds:.1f} s ({stages})")


def main(argv: list[str] | None = None) -> None:
    edit(parse_arguments(argv))


if __name__ == "__main__":
    main()
