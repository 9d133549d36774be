"""`bench --all`: all that there is to report of a GPU, in one call of a few minutes.

The chapters come in the order of their importance. Each has a share of the time; what one leaves,
the next may use. A chapter whose time is up, or that fails, leaves a row that says why, and the
next one begins. Every row is on the disk as soon as it is measured, so that a run that is cut short
loses only the rest.

The first --size is that of the chapters, all others are those of the last one, on growth. Compiled
is measured on GPUs, and elsewhere with --compile.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

import parallel
import video
from experiments import workloads
from experiments.workloads import Job, changed
from rvedit import RVEDiTConfig
from vae import CausalConv3d

GROWTH = [(T, H, W) for H, W in ((480, 832), (704, 1280)) for T in (17, 33, 49, 81, 121)]
SECONDS_OF_A_ROW = 10  # no further round begins after them
FEW_STEPS = 5  # from which the time of a whole edit is computed
MEMORY_LIMIT = 24.0  # GB for an edit with --offload
CHUNK = 5  # latent frames that are encoded at a time, to compare with one

Jobs = Iterator[Job]

# --- Chapters -------------------------------------------------------------------------------------


def eager_and_compiled(args: argparse.Namespace) -> list[bool]:
    return [False, True] if args.device.type == "cuda" or args.compile else [False]


def dit(config: RVEDiTConfig, args: argparse.Namespace) -> Jobs:
    """One forward pass."""
    for compiled in eager_and_compiled(args):
        chosen = changed(args, parts=["dit"], compile=compiled)
        yield from workloads.jobs_of_parts(config, chosen)


def rank(config: RVEDiTConfig, args: argparse.Namespace) -> Jobs:
    """A training step as rank 0 of 8, encoding included, with its peak of memory and the plan."""
    (size,) = args.size
    for compiled in eager_and_compiled(args):
        yield workloads.rank_job(config, size, changed(args, compile=compiled))


def edit(config: RVEDiTConfig, args: argparse.Namespace) -> Jobs:
    """A whole edit, its --steps computed from a few."""
    (size,) = args.size
    compiled = eager_and_compiled(args)[-1]
    chosen = changed(args, compile=compiled, few_steps=FEW_STEPS)
    yield workloads.edit_job(config, size, chosen)


def offloaded_edit(config: RVEDiTConfig, args: argparse.Namespace) -> Jobs:
    """The same with --offload in 24 GB."""
    (size,) = args.size
    chosen = changed(args, compile=False, few_steps=FEW_STEPS, memory_limit=MEMORY_LIMIT)
    yield workloads.edit_job(config, size, chosen)


def precisions(config: RVEDiTConfig, args: argparse.Namespace) -> Jobs:
    """The VAE's encoder in each precision, and what else may make it faster in float16.

    The last column is its error against float32: root mean square, in units of the latents' spread.
    An overflow of float16 shows in the time: what follows in the clip is encoded in float32.
    """
    (size,) = args.size
    vae = workloads.random_networks(config, args.device, torch.bfloat16)[1]  # in float32
    frames = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
    clip = video.to_float(frames.to(args.device))
    work = workloads.flops(config, size, ("encode",), args)["encode"]

    def job(name: str, chunk: int = 1, **fields: Any) -> Job:
        runs = {"ours": lambda: vae.encode(clip, chunk)}
        return Job(f"encode, {name}", size, runs, work, **fields)

    was_allowed = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        vae.encoder_dtype = torch.float32
        expected = vae.encode(clip)
        yield job("float32", warm=True)
        torch.backends.cudnn.allow_tf32 = True
        yield job("TF32", expected=expected)
        for dtype in (torch.bfloat16, torch.float16):
            vae.encoder_dtype = dtype
            yield job(str(dtype).removeprefix("torch."), expected=expected)
        # Still in float16: whether chunks are worth their memory, what compiling saves, and whether
        # cuDNN likes the other layout, with norms compiled where they are.
        yield job(f"{CHUNK} latent frames at a time", CHUNK, expected=expected)
        if eager_and_compiled(args)[-1]:
            parallel.compile_norms(vae.encoder)
            yield job("norms compiled", expected=expected)
        for module in vae.encoder.modules():
            if isinstance(module, CausalConv3d):
                module.to(memory_format=torch.channels_last_3d)
        yield job("channels last", expected=expected)
    finally:
        torch.backends.cudnn.allow_tf32 = was_allowed


def peers(config: RVEDiTConfig, args: argparse.Namespace) -> Jobs:
    """DiT and VAE beside diffusers'; only the DiT is compiled, on both sides."""
    for compiled in eager_and_compiled(args):
        parts = ["dit"] if compiled else ["dit", "encode", "decode"]
        chosen = changed(args, parts=parts, compile=compiled, peer=True)
        for job in workloads.jobs_of_parts(config, chosen):
            if len(job.runs) > 1:
                yield job


def growth(config: RVEDiTConfig, args: argparse.Namespace) -> Jobs:
    """Time against FLOPs over frames and resolutions."""
    chosen = changed(args, parts=["dit", "encode", "decode"], size=args.growth)
    yield from workloads.jobs_of_parts(config, chosen)


# Each with its share of the time.
CHAPTERS: list[tuple[Callable[[RVEDiTConfig, argparse.Namespace], Jobs], float]] = [
    (dit, 0.12),
    (rank, 0.26),
    (edit, 0.11),
    (offloaded_edit, 0.12),
    (precisions, 0.09),
    (peers, 0.16),
    (growth, 0.14),
]

# --- The run --------------------------------------------------------------------------------------


class TimeUp(Exception):
    pass


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block when its time is up; a call into CUDA ends first."""

    def stop(kind: int, frame: FrameType | None) -> None:
        raise TimeUp("its time is up")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def clean_up(device: torch.device) -> None:
    """Give the next chapter the whole memory."""
    if dist.is_initialized():  # by rank
        dist.destroy_process_group()
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)
        torch.cuda.empty_cache()


def run(
    config: RVEDiTConfig,
    args: argparse.Namespace,
    add: Callable[[Job], None],
    stop: Callable[[str, str], None],
) -> None:
    """All chapters, in args.all minutes.

    add: measures a job and reports it. stop: reports why a chapter of this name ended early.
    """
    first, *others = args.size
    args = changed(args, size=[first], growth=others, peer=False, memory_limit=None)
    start = time.monotonic()
    share_until_now = 0.0
    for chapter, share in CHAPTERS:
        share_until_now += share
        end = start + 60 * args.all * share_until_now
        try:
            with time_limit(end - time.monotonic()):
                for job in chapter(config, args):
                    add(job)
                    del job  # and with it the networks, before the next ones are made
        except (TimeUp, torch.OutOfMemoryError, ImportError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            stop(chapter.__name__, reason)
        clean_up(args.device)
