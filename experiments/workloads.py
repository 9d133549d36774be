"""What `bench` measures: each part of the system as a function of no arguments, and its FLOPs.

Networks and clips are random, which changes no amount of work. A `Job` is one row of the table;
the last section makes jobs of what the options ask for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

import data
import parallel
import rvedit
import train
import video
from experiments import plan
from experiments.plan import Size
from losses import info_nce_as_printed, symmetric_info_nce
from rvedit import RVEDiT, RVEDiTConfig
from sample import compile_networks, edit_video
from vae import WanVAE

Runs = dict[str, Callable[[], Any]]  # what is compared: "ours", and perhaps a peer's

# What --parts names: parts on one set of networks, and those that take the memory for themselves.
PARTS = ("dit", "step", "info_nce", "encode", "decode", "mllm")
ALONE = ("edit", "load", "rank")
WITH_GRADIENTS = ("step", "info_nce")
RANKS = 8  # of which part "rank" is the first

# --- Algorithm 1 to the letter, which `train.training_step` is measured against -------------------


def literal_info_nce(a: Tensor, a_ref: Tensor, temperature: float) -> Tensor:
    """Î of Eq. 5 from all S x S similarities at once, for features (B, S, d)."""
    pairs = zip(a.float(), a_ref.float(), strict=True)
    estimates = [info_nce_as_printed(x, x_ref, temperature) for x, x_ref in pairs]
    return torch.stack(estimates).mean()


def literal_step(model: RVEDiT, vae: WanVAE, batch: data.Batch, depth: int) -> Tensor:
    """The loss of lines 4-19 as printed.

    Both branches run all L blocks and record the features of each; then one depth is read.
    """
    with torch.no_grad():
        source = vae.encode(video.to_float(batch.source))
        target = vae.encode(video.to_float(batch.target))
    t = batch.t.view(-1, 1, 1, 1, 1)
    z_t = (1 - t) * target + t * batch.noise

    recorded: list[Tensor] = []  # A^(1) ... A^(L), then those of the reference branch

    def record(block: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        recorded.append(outputs[1])

    hooks = [block.register_forward_hook(record) for block in model.dit.blocks]
    edit_contexts = model.contexts(model.encoder.encode(batch.edit_inputs))
    velocity = model.dit(z_t, batch.t, edit_contexts, source)
    with torch.no_grad():
        ref_contexts = model.contexts(model.encoder.encode(batch.ref_inputs))
        model.dit(z_t, batch.t, ref_contexts, target)
    for hook in hooks:
        hook.remove()

    L = len(model.dit.blocks)
    edit_features, ref_features = recorded[:L], recorded[L:]
    align = -literal_info_nce(
        edit_features[depth - 1], ref_features[depth - 1], model.config.temperature
    )
    return F.mse_loss(velocity, batch.noise - target) + model.config.align_weight * align


# --- Networks of random weights -------------------------------------------------------------------

# Fields of the configuration that `shrink` divides. The width of a head, the latents and the
# numbers of tokens stay as they are.
WIDTHS_AND_DEPTHS = (
    "dim",
    "dec_dim",
    "ffn_dim",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_blocks",
    "routing_depth",
    "depth",
    "num_hidden_layers",
)


def shrink(config: RVEDiTConfig, by: int) -> RVEDiTConfig:
    """The configuration with widths, heads and depths divided, rounded up."""

    def divide(fields: dict[str, Any]) -> dict[str, Any]:
        divided = {}
        for name, value in fields.items():
            if isinstance(value, dict):
                value = divide(value)
            elif name in WIDTHS_AND_DEPTHS:
                value = -(-value // by)
            divided[name] = value
        return divided

    shrunk = divide(dataclasses.asdict(config))
    vision = shrunk["qwen"]["vision"]
    kept = [block for block in vision["fullatt_block_indexes"] if block < vision["depth"]]
    vision["fullatt_block_indexes"] = kept
    return RVEDiTConfig(**shrunk)


@torch.no_grad()
def random_networks(
    config: RVEDiTConfig,
    device: torch.device,
    dtype: torch.dtype,
    shard: Callable[[RVEDiT], None] | None = None,
    draw_on: torch.device | None = None,
) -> tuple[RVEDiT, WanVAE]:
    """Networks as `rvedit.load` gives them, with weights drawn on the device in seconds.

    Slower is `rvedit.initialise`: it draws on the CPU, so that weights are the same everywhere.
    draw_on: a faster device that draws the weights one by one, if they are to rest on a slow one.
    """
    with torch.device("meta"):
        model = RVEDiT(config, plan.stand_in_tokenizer(config))
        vae = WanVAE(config.vae)
    train.choose_trained(model)
    model.to(dtype)  # the VAE stays float32
    if shard is not None:
        shard(model)
    model.to_empty(device=device)
    vae.to_empty(device=device)
    for parameter in (*model.parameters(), *vae.parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        drawn = torch.empty_like(local, device=draw_on)
        if local.ndim > 1 and len(local) > 0:  # a rank's shard can be empty
            fan_in = local[0].numel()
            drawn.normal_(0.0, fan_in**-0.5)
        else:
            drawn.uniform_(0.5, 1.5)
        local.copy_(drawn)
    return model.eval(), vae.eval().requires_grad_(False)


# --- What is timed --------------------------------------------------------------------------------


def fit_config(config: RVEDiTConfig, size: Size) -> RVEDiTConfig:
    """The configuration with a window as large as the clip. ValueError if no clip has this size."""
    data.check_size(config, size)
    T, H, W = size
    return dataclasses.replace(config, max_frames=T, max_pixels=H * W)


def parts(model: RVEDiT, vae: WanVAE, size: Size, args: argparse.Namespace) -> dict[str, Runs]:
    """What to run for each part, on a random clip of this size."""
    model.config = config = fit_config(model.config, size)
    batch = plan.random_batch(model, vae, size, 1, args.device)
    z, t, inputs = batch.noise, batch.t, batch.edit_inputs
    source_latents = torch.randn_like(z)
    clip = video.to_float(batch.source)  # (1, 3, T, H, W)
    with torch.no_grad():
        contexts = model.contexts(model.encoder.encode(inputs))
        ref_features = model.dit.features(z, t, contexts, source_latents, 1)  # (1, S, d)
    features = torch.randn_like(ref_features, requires_grad=True)
    mean_depth = (config.dit.num_blocks + 1) // 2  # of the depths that Eq. 4 draws

    def dit() -> Tensor:
        return model.dit(z, t, contexts, source_latents)

    def step() -> Tensor:
        loss, *_ = train.training_step(model, vae, batch, mean_depth)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    def step_to_the_letter() -> Tensor:
        loss = literal_step(model, vae, batch, mean_depth)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    def info_nce(estimate: Callable[..., Tensor]) -> Tensor:
        value = estimate(features, ref_features, config.temperature)
        (gradient,) = torch.autograd.grad(value, features)
        return gradient

    runs = {
        "dit": {"ours": dit},
        "step": {"ours": step, "literal": step_to_the_letter},
        "info_nce": {
            "ours": lambda: info_nce(symmetric_info_nce),
            "literal": lambda: info_nce(literal_info_nce),
        },
        "encode": {"ours": lambda: vae.encode(clip)},
        "decode": {"ours": lambda: vae.decode(z)},
        "mllm": {"ours": lambda: model.encoder.encode(inputs)},
    }
    if args.peer:
        # By its file's own name: a package called "tests" may be installed, too.
        sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
        import peers  # which needs requirements-dev.txt

        context, _ = contexts[0]
        runs |= peers.runs(model, vae, z, t, context, clip, inputs, args.compile)
    return runs


# --- FLOPs ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def meta_networks(config: RVEDiTConfig) -> tuple[RVEDiT, WanVAE]:
    """Networks of shapes only."""
    return random_networks(config, torch.device("meta"), torch.float32)


def counted(run: Callable[[], Any]) -> int:
    """Floating-point operations as PyTorch counts them, 2·m·k·n for a product of (m, k) and (k, n).

    On the meta device attention is two plain products, so all of it is counted, causal or not.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@functools.cache  # at full size it takes some seconds, and --all asks for most of them twice
def flops(
    config: RVEDiTConfig, size: Size, names: tuple[str, ...], steps: int = 0, peer: bool = False
) -> dict[str, int]:
    """The FLOPs of the parts of these names, by running them on the meta device.

    steps: of an edit. peer: also those of what is compared with peers, and of the literal step.

    What is computed again in a backward pass does not count as work: recomputed blocks, which the
    meta device does not recompute, and the logits of InfoNCE.
    """
    on_meta = argparse.Namespace(device=torch.device("meta"), peer=peer, compile=False)
    runs = parts(*meta_networks(config), size, on_meta)

    @functools.cache
    def work(name: str) -> int:
        if name == "edit":
            once = work("encode") + work("mllm") + work("decode")
            return once + steps * work("dit")
        with torch.set_grad_enabled(name in WITH_GRADIENTS):
            total = counted(runs[name]["ours"])
            if name in ("step", "info_nce"):
                total -= logits_again()
        return total

    @functools.cache
    def logits_again() -> int:
        """Ours makes the logits in chunks, and again in the backward pass; this is that surplus."""
        return counted(runs["info_nce"]["ours"]) - counted(runs["info_nce"]["literal"])

    counts = {name: work(name) for name in names}
    if "step" in names and peer:
        with torch.enable_grad():
            counts["literal step"] = counted(runs["step"]["literal"])
    return counts


# --- A training step of one rank ------------------------------------------------------------------


def training_options(
    preset: str, size: Size, dtype: str, compile: bool = False
) -> argparse.Namespace:
    """The options of train.py for a run of this preset on clips of this size."""
    options = ["--preset", preset, "--out", os.devnull]
    options += ["--plan", str(RANKS)]  # such a run needs no --data
    options += ["--size", *(str(side) for side in size), "--dtype", dtype]
    options.append("--compile" if compile else "--no-compile")
    return train.parse_arguments(options)


def rank_step(
    config: RVEDiTConfig, options: argparse.Namespace, device: torch.device
) -> Callable[[], None]:
    """An optimiser step of `train.py` as the first of 8 ranks has it.

    The process group only pretends to send. Shapes and memory are right, gradients are not, so the
    step does not look whether they are finite. Its time is that without communication.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = init_device_mesh(device.type, (RANKS,))
    before_weights = functools.partial(train.prepare, args=options, mesh=mesh)
    model, vae = random_networks(config, device, torch.float32, before_weights)
    if options.dtype == "bfloat16" and config.lora_rank:  # as in train.load_model
        model.encoder.qwen.visual.to(torch.bfloat16)
    if options.compile:
        parallel.compile_norms(vae.encoder)
    run = train.make_run(model, vae, device, options)
    batch = plan.random_batch(model, vae, options.size[0], options.batch, "cpu")

    def step() -> None:
        train.compute_gradients(run, iter([batch] * options.accumulate), options)
        train.clip_gradients(run.weights)
        run.update(options.lr)
        run.optimizer.zero_grad()
        run.step += 1

    return step


@functools.cache
def planned_bytes(config: RVEDiTConfig, preset: str, size: Size, dtype: str) -> int:
    """The memory that `plan` foresees for `rank_step`."""
    options = training_options(preset, size, dtype)
    return plan.plan(config, options, RANKS).total


# --- Loading a checkpoint -------------------------------------------------------------------------


def forget(files: list[Path]) -> None:
    """Drop files from the cache of the system, so that they are read from the disk."""
    for file in files:
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())  # what is not yet written would stay in the cache
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading(config: RVEDiTConfig, folder: Path, args: argparse.Namespace) -> tuple[Runs, int]:
    """Loading a checkpoint of random weights, beside a plain read of its files; its bytes."""
    dtype = getattr(torch, args.dtype)
    resting = torch.device("cpu")
    rvedit.save(folder / "model", *random_networks(config, resting, dtype, draw_on=args.device))
    files = sorted((folder / "model").glob("*.safetensors"))
    buffer = bytearray(1 << 24)

    def read() -> None:
        forget(files)
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    def load() -> None:
        forget(files)
        rvedit.load(folder / "model", device=args.device, dtype=dtype)

    return {"ours": load, "plain read": read}, sum(file.stat().st_size for file in files)


# --- Jobs -----------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What to measure for one row of the table."""

    part: str
    size: Size | str  # of the clip, or of the files
    runs: Runs
    flops: int = 0
    counted: float = 1.0  # the other's FLOPs in units of ours
    plan: int | None = None  # bytes that `plan.plan` foresees
    gradients: bool = False  # it makes some


def label(part: str, args: argparse.Namespace) -> str:
    return f"{part}, compiled" if args.compile else part


def jobs(config: RVEDiTConfig, args: argparse.Namespace) -> Iterator[Job]:
    """The parts --parts at each --size. Each job should be deleted before the next is asked for."""
    if {*args.parts} & {*PARTS}:
        yield from jobs_of_parts(config, args)
    for size in args.size:
        if "edit" in args.parts:
            yield edit_job(config, size, args)
    if "load" in args.parts:
        with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
            runs, size = loading(config, Path(folder), args)
            yield Job("load", f"{size / 1e9:.3g} GB", runs)
    for size in args.size:
        if "rank" in args.parts:
            yield rank_job(config, size, args)


def jobs_of_parts(config: RVEDiTConfig, args: argparse.Namespace) -> Iterator[Job]:
    """Those of PARTS, which share their networks."""
    model, vae = random_networks(config, args.device, getattr(torch, args.dtype))
    recompute = "step" in args.parts and train.RECIPES[args.preset]["recompute"]
    parallel.shard(model, None, recompute, args.compile)
    if args.compile:
        parallel.compile_norms(vae)
    for size in args.size:
        runs = parts(model, vae, size, args)
        chosen = tuple(name for name in runs if name.split()[0] in args.parts)
        work = flops(config, tuple(size), chosen, peer=args.peer)
        for name in chosen:
            yield Job(
                part=label(name, args),
                size=size,
                runs=runs[name] if args.peer else {"ours": runs[name]["ours"]},
                flops=work[name],
                counted=work.get(f"literal {name}", work[name]) / work[name],
                gradients=name in WITH_GRADIENTS,
            )


def rank_job(config: RVEDiTConfig, size: Size, args: argparse.Namespace) -> Job:
    """A training step as rank 0 of 8, beside its plan."""
    options = training_options(args.preset, size, args.dtype, args.compile)
    samples = options.batch * options.accumulate
    return Job(
        part=label("rank", args),
        size=size,
        runs={"ours": rank_step(config, options, args.device)},
        flops=samples * flops(config, tuple(size), ("step",))["step"],
        plan=planned_bytes(config, args.preset, tuple(size), args.dtype),
        gradients=True,
    )


def edit_job(config: RVEDiTConfig, size: Size, args: argparse.Namespace) -> Job:
    """A whole edit; with --memory-limit by networks that rest on the CPU."""
    resting, device = args.device, None
    name = f"edit in {args.steps} steps"
    if args.memory_limit:
        resting, device = torch.device("cpu"), args.device
        name += f" and {args.memory_limit:g} GB"
    dtype = getattr(torch, args.dtype)
    model, vae = random_networks(fit_config(config, size), resting, dtype, draw_on=args.device)
    if args.compile:
        compile_networks(model, vae)
    clip = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    edit = functools.partial(
        edit_video, model, vae, clip, plan.INSTRUCTION, args.steps, device=device
    )
    work = flops(config, tuple(size), ("edit",), args.steps)["edit"]
    return Job(label(name, args), size, {"ours": edit}, work)
