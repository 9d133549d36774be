"""How fast each part of the system is, and how much memory it takes, beside its FLOPs.

    B="python -m experiments.bench"
    $B                                                             # the toy, on any machine
    $B --preset wan2.2-ti2v-5b --peer                              # full size, beside its peers
    $B --preset wan2.2-ti2v-5b --growth --parts dit decode         # more frames, at 480p and 720p
    $B --preset wan2.2-ti2v-5b --shrink 4 --size 9 128 160 --peer  # its proportions, for a CPU
    $B --preset wan2.2-ti2v-5b --parts rank                        # a training step, as rank 0 of 8
    $B --preset wan2.2-ti2v-5b --parts edit --memory-limit 24      # offloaded, in 24 GB of a GPU
    $B --preset wan2.2-ti2v-5b --parts load                        # loading, beside a plain read
    $B --plan 8 --preset wan2.2-ti2v-5b                            # memory only: see plan.py

Weights and clips are random, which changes no amount of work. What is compared runs in turn, so
that other load on the machine meets both sides, and ratios are taken round by round. The table has
medians, with the quartiles in brackets.

"Of peak" is the rate of FLOPs over that of the fastest large matrix product in this dtype on this
machine, which is called MFU. Memory is the peak, weights included: on a GPU what the allocator gave
out, on Linux without a GPU what was resident of the process (VmHWM).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli

if __name__ == "__main__":
    cli.begin()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import rvedit
import train
import video
from experiments import plan
from experiments.plan import Size
from losses import info_nce_as_printed, symmetric_info_nce
from parallel import shard
from rvedit import RVEDiT, RVEDiTConfig
from sample import edit_video
from vae import WanVAE

Runs = dict[str, Callable[[], Any]]  # what is compared: "ours", and perhaps a peer's

PARTS = ("dit", "step", "info_nce", "encode", "decode", "mllm", "edit")
WITH_GRADIENTS = ("step", "info_nce", "rank")
RANKS = 8  # of which part "rank" is the first
GROWTH = [(T, H, W) for H, W in ((480, 832), (704, 1280)) for T in (17, 33, 49, 81)]

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

    return RVEDiTConfig(**divide(dataclasses.asdict(config)))


@torch.no_grad()
def random_networks(
    config: RVEDiTConfig,
    device: torch.device,
    dtype: torch.dtype,
    shard: Callable[[RVEDiT], None] | None = None,
) -> tuple[RVEDiT, WanVAE]:
    """Networks as `rvedit.load` gives them, with weights drawn on the device in seconds.

    Slower is `rvedit.initialise`: it draws on the CPU, so that weights are the same everywhere.
    """
    with torch.device("meta"):
        model = RVEDiT(config, plan.stand_in_tokenizer(config))
        vae = WanVAE(config.vae)
    train.choose_trained(model)
    for part in (model, vae.conv2, vae.decoder):  # the VAE's encoder stays float32
        part.to(dtype)
    if shard is not None:
        shard(model)
    model.to_empty(device=device)
    vae.to_empty(device=device)
    for parameter in (*model.parameters(), *vae.parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.ndim > 1 and len(local) > 0:  # a rank's shard can be empty
            fan_in = local[0].numel()
            local.normal_(0.0, fan_in**-0.5)
        else:
            local.uniform_(0.5, 1.5)
    return model.eval(), vae.eval().requires_grad_(False)


# --- What is timed --------------------------------------------------------------------------------


def fit_config(config: RVEDiTConfig, size: Size) -> RVEDiTConfig:
    """The configuration with a window as large as the clip. ValueError if no clip has this size."""
    T, H, W = size
    frames, pixels = config.vae.temporal_factor, config.spatial_factor
    if (T - 1) % frames or H % pixels or W % pixels:
        raise ValueError(
            f"--size {T} {H} {W}: take {frames}k + 1 frames with sides in multiples of {pixels}"
        )
    return dataclasses.replace(config, max_frames=T, max_pixels=H * W)


def parts(model: RVEDiT, vae: WanVAE, size: Size, args: argparse.Namespace) -> dict[str, Runs]:
    """What to run for each part, on a random clip of this size."""
    model.config = config = fit_config(model.config, size)
    batch = plan.random_batch(model, vae, size, 1, args.device)
    z, t, inputs = batch.noise, batch.t, batch.edit_inputs
    source_latents = torch.randn_like(z)
    clip = video.to_float(batch.source)  # (1, 3, T, H, W)
    frames = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
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
        "edit": {"ours": lambda: edit_video(model, vae, frames, plan.INSTRUCTION, args.steps)},
    }
    if args.peer:
        from tests import peers  # which needs requirements-dev.txt

        context, _ = contexts[0]
        runs |= peers.runs(model, vae, z, t, context, clip, inputs, args.compile)
    return runs


# --- FLOPs ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def meta_networks(config: RVEDiTConfig) -> tuple[RVEDiT, WanVAE]:
    return random_networks(config, torch.device("meta"), torch.float32)


def counted(run: Callable[[], Any]) -> int:
    """Floating-point operations as PyTorch counts them, 2·m·k·n for a product of (m, k) and (k, n).

    On the meta device attention is two plain products, so all of it is counted, causal or not.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def flops(
    config: RVEDiTConfig, size: Size, names: tuple[str, ...], args: argparse.Namespace
) -> dict[str, int]:
    """The FLOPs of the parts of these names, by running them on the meta device.

    What is computed again in a backward pass does not count as work: recomputed blocks, which the
    meta device does not recompute, and the logits of InfoNCE.
    """
    on_meta = argparse.Namespace(**vars(args) | {"device": torch.device("meta"), "compile": False})
    runs = parts(*meta_networks(config), size, on_meta)

    @functools.cache
    def work(name: str) -> int:
        if name == "edit":  # it moves frames to the CPU, which the meta device cannot
            once = work("encode") + work("mllm") + work("decode")
            return once + args.steps * work("dit")
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
    if "step" in names and args.peer:
        counts["literal step"] = counted(runs["step"]["literal"])
    return counts


# --- What is not one of the system's parts --------------------------------------------------------


def training_options(args: argparse.Namespace, size: Size) -> argparse.Namespace:
    """The options of train.py for a run of this preset on clips of this size."""
    options = ["--preset", args.preset, "--out", os.devnull]
    options += ["--plan", str(RANKS)]  # such a run needs no --data
    options += ["--size", *(str(side) for side in size)]
    if args.compile:
        options.append("--compile")
    return train.parse_arguments(options)


def rank_step(
    config: RVEDiTConfig, size: Size, args: argparse.Namespace
) -> tuple[Callable[[], None], plan.Plan, int]:
    """An optimiser step of `train.py` as the first of 8 ranks has it, its plan, and its samples.

    The process group only pretends to send. Shapes and memory are right, gradients are not, so the
    step does not look whether they are finite. Its time is that without communication.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = init_device_mesh(args.device.type, (RANKS,))
    cuda = args.device.type == "cuda"
    options = training_options(args, size)
    before_weights = functools.partial(train.prepare, args=options, mesh=mesh)
    model, vae = random_networks(config, args.device, torch.float32, before_weights)
    if cuda and config.lora_rank:
        model.encoder.qwen.visual.to(torch.bfloat16)  # as in train.load_model
    run = train.Run(model, vae, args.device, options)
    batch = plan.random_batch(model, vae, options.size, options.batch, "cpu")

    def step() -> None:
        train.compute_gradients(run, iter([batch] * options.accumulate), options)
        torch.nn.utils.clip_grad_norm_(run.weights.values(), 1.0, foreach=True)
        run.update(options.lr)
        run.optimizer.zero_grad()
        run.step += 1

    dtype = torch.bfloat16 if cuda else torch.float32
    planned = plan.plan(config, options, RANKS, dtype)
    return step, planned, options.batch * options.accumulate


def offloaded_edit(
    config: RVEDiTConfig, size: Size, args: argparse.Namespace
) -> Callable[[], Tensor]:
    """An edit by networks that rest on the CPU; the GPU gives out no more than --memory-limit."""
    if args.device.type == "cuda":
        total = torch.cuda.get_device_properties(args.device).total_memory
        share = min(1.0, args.memory_limit * 1e9 / total)
        torch.cuda.set_per_process_memory_fraction(share, args.device.index)
    resting = torch.device("cpu")
    model, vae = random_networks(fit_config(config, size), resting, getattr(torch, args.dtype))
    clip = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    return lambda: edit_video(model, vae, clip, plan.INSTRUCTION, args.steps, device=args.device)


def forget(file: Path) -> None:
    """Drop a file from the cache of the system, so that it is read from the disk."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())  # what is not yet written would stay in the cache
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading(
    config: RVEDiTConfig, folder: Path, args: argparse.Namespace
) -> tuple[dict[str, list[float]], int]:
    """Seconds to load a checkpoint of random weights and to read its files; its bytes."""
    dtype = getattr(torch, args.dtype)
    model, vae = random_networks(config, torch.device("cpu"), dtype)
    rvedit.save(folder / "model", model, vae)
    del model, vae
    files = sorted((folder / "model").glob("*.safetensors"))
    buffer = bytearray(1 << 24)

    def read() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    def load() -> None:
        rvedit.load(folder / "model", device=args.device, dtype=dtype)

    def timed_cold(run: Callable[[], None]) -> float:
        for file in files:
            forget(file)
        return timed(run, args.device)[0]

    runs = {"ours": load, "read": read}
    seconds: dict[str, list[float]] = {"ours": [], "read": []}
    for i in range(args.rounds):
        for who in in_turn(runs, i):
            seconds[who].append(timed_cold(runs[who]))
    return seconds, sum(file.stat().st_size for file in files)


# --- Timing ---------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Seconds, and the most bytes held meanwhile, 0 where nobody counts them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start, torch.cuda.max_memory_allocated(device)

    process = Path("/proc/self")
    counts_memory = (process / "clear_refs").exists()
    if counts_memory:
        (process / "clear_refs").write_text("5")  # forget the former peak
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    if not counts_memory:
        return seconds, 0
    _, _, after = (process / "status").read_text().partition("VmHWM:")
    kilobytes, *_ = after.split()
    return seconds, 1024 * int(kilobytes)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square products."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = [timed(lambda: a @ b, device)[0] for _ in range(20)]
    return 2 * n**3 / min(seconds)


def in_turn(runs: Runs, i: int) -> list[str]:
    """The order of round i: who ran first in the last round runs last."""
    names = list(runs)
    return names if i % 2 else names[::-1]


def measure(name: str, runs: Runs, rounds: int, device: torch.device) -> dict[str, Any]:
    """A row of results: seconds and bytes of each, and of two of them how far results differ."""
    row: dict[str, Any] = {"part": name}
    first = {who: run() for who, run in runs.items()}  # compiles, and fills caches
    if len(runs) > 1:
        ours, theirs, *_ = first.values()
        row["difference"] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        del ours, theirs
    del first

    row["seconds"] = {who: [] for who in runs}
    row["bytes"] = {who: 0 for who in runs}
    for i in tqdm(range(rounds), desc=name, unit="round", disable=None, leave=False):
        for who in in_turn(runs, i):
            seconds, held = timed(runs[who], device)
            row["seconds"][who].append(seconds)
            row["bytes"][who] = max(held, row["bytes"][who])
    return row


# --- The table ------------------------------------------------------------------------------------

COLUMNS = (
    "part",
    "clip",
    "seconds",
    "TFLOP",
    "TFLOP/s",
    "of peak",
    "GB",
    "beside",
    "takes times",
    "GB",
    "differs by",
)


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_cells(row: dict[str, Any], peak: float) -> list[str]:
    """A row of results as cells under COLUMNS."""
    ours = row["seconds"]["ours"]
    rate = row["flops"] / statistics.median(ours)
    cells = [
        row["part"],
        "x".join(str(side) for side in row["size"]),
        spread(ours),
        f"{row['flops'] / 1e12:.4g}",
        f"{rate / 1e12:.3g}",
        f"{rate / peak:.0%}",
        f"{row['bytes']['ours'] / 1e9:.3g}",
    ]
    others = [who for who in row["seconds"] if who != "ours"]
    if "plan" in row:
        return [*cells, "the plan", "", f"{row['plan'] / 1e9:.3g}", ""]
    if not others:
        return [*cells, "", "", "", ""]
    (other,) = others
    ratios = [theirs / our for theirs, our in zip(row["seconds"][other], ours, strict=True)]
    return [
        *cells,
        other,
        f"{spread(ratios)}, counted {row['counted']:.3f}",
        f"{row['bytes'][other] / 1e9:.3g}",
        f"{row['difference']:.0e}",
    ]


class Report:
    """What has been measured, in a JSON file that is complete after every row."""

    def __init__(self, path: Path, about: str, peak: float) -> None:
        self.path = path
        self.about = about
        self.peak = peak
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        content = {"about": self.about, "matmul": self.peak, "rows": self.rows}
        cli.write_text(self.path, json.dumps(content, indent=1))


# --- The command ----------------------------------------------------------------------------------


def bench(args: argparse.Namespace) -> None:
    """Measure the parts that were asked for, and print a line for each."""
    config = shrink(rvedit.preset(args.preset), args.shrink)
    peak = matmul_peak(args.device, getattr(torch, args.dtype))
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    about = f"{machine}, torch {torch.__version__}, {args.dtype}{', compiled' * args.compile}"
    print(f"{about}; matrix products reach {peak / 1e12:.3g} TFLOP/s\n")
    report = Report(args.out, about, peak)

    if "load" in args.parts:
        bench_loading(config, report, args)
        return
    print(table_line(list(COLUMNS)))
    print("|" + " --- |" * len(COLUMNS))
    if "rank" in args.parts:
        bench_rank(config, report, args)
    elif args.memory_limit:
        bench_offloaded_edit(config, report, args)
    else:
        bench_parts(config, report, args)


def bench_parts(config: RVEDiTConfig, report: Report, args: argparse.Namespace) -> None:
    model, vae = random_networks(config, args.device, getattr(torch, args.dtype))
    recompute = "step" in args.parts and train.RECIPES[args.preset]["recompute"]
    shard(model, None, recompute, args.compile)
    for size in args.size:
        runs = parts(model, vae, size, args)
        chosen = tuple(name for name in runs if name.split()[0] in args.parts)
        work = flops(config, size, chosen, args)
        for name in chosen:
            candidates = runs[name] if args.peer else {"ours": runs[name]["ours"]}
            with torch.set_grad_enabled(name in WITH_GRADIENTS):
                row = measure(name, candidates, args.rounds, args.device)
            row |= {"size": size, "flops": work[name]}
            row["counted"] = work.get(f"literal {name}", work[name]) / work[name]
            report.add(row)
            print(table_line(as_cells(row, report.peak)), flush=True)


def bench_rank(config: RVEDiTConfig, report: Report, args: argparse.Namespace) -> None:
    for size in args.size:
        step, planned, samples = rank_step(config, size, args)
        row = measure("rank", {"ours": step}, args.rounds, args.device)
        work = flops(config, size, ("step",), args)["step"]
        row |= {"size": size, "flops": samples * work, "plan": planned.total}
        report.add(row)
        print(table_line(as_cells(row, report.peak)), flush=True)


def bench_offloaded_edit(config: RVEDiTConfig, report: Report, args: argparse.Namespace) -> None:
    for size in args.size:
        runs = {"ours": offloaded_edit(config, size, args)}
        row = measure("edit", runs, args.rounds, args.device)
        row |= {"size": size, "flops": flops(config, size, ("edit",), args)["edit"]}
        report.add(row)
        print(table_line(as_cells(row, report.peak)), flush=True)


def bench_loading(config: RVEDiTConfig, report: Report, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        seconds, size = loading(config, Path(folder), args)
    report.add({"part": "load", "seconds": seconds, "size": size})
    load_rates = [size / x / 1e9 for x in seconds["ours"]]
    read_rates = [size / x / 1e9 for x in seconds["read"]]
    ratios = [load / read for load, read in zip(*seconds.values(), strict=True)]
    print(
        f"{size / 1e9:.3g} GB loaded at {spread(load_rates)} GB/s, its files read at "
        f"{spread(read_rates)} GB/s: takes times {spread(ratios)}"
    )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        description="Time each part of the system beside its FLOPs.", allow_abbrev=False
    )
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--preset", choices=train.RECIPES, default="toy", help="default: toy")
    add(
        "--shrink",
        type=int,
        choices=(1, 2, 4),
        default=1,
        help="divide all widths and depths by this, for a CPU",
    )
    add(
        "--size",
        type=cli.number(int, 1),
        nargs=3,
        action="append",
        metavar=("T", "H", "W"),
        help="frames, height and width of a clip; repeatable; default: the preset's",
    )
    add(
        "--growth",
        dest="size",
        action="store_const",
        const=GROWTH,
        help="instead of --size: 17 to 81 frames at 480p and 720p",
    )
    add(
        "--parts",
        nargs="+",
        choices=(*PARTS, "rank", "load"),
        default=PARTS,
        help="default: all but rank and load",
    )
    add(
        "--memory-limit",
        type=cli.number(float, 0.1),
        metavar="GB",
        help="measure the part edit with offloading, in so much of the GPU's memory",
    )
    add(
        "--peer",
        action="store_true",
        help="compare with diffusers, transformers and Algorithm 1 to the letter",
    )
    add("--compile", action="store_true", help="compile the blocks of DiT and MLLM, the peers' too")
    add("--rounds", type=cli.number(int, 2), default=7, help="measurements of each (default 7)")
    add("--steps", type=cli.number(int, 1), default=50, help="sampling steps of an edit (50)")
    add(
        "--device",
        type=cli.device_of,
        default=default_device,
        help="default: a GPU if there is one",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    add(
        "--out",
        type=Path,
        default=Path("bench.json"),
        help="file of the measurements (default bench.json)",
    )
    add(
        "--plan",
        type=cli.number(int, 1),
        metavar="RANKS",
        help="print the memory that training on RANKS GPUs takes; other options are train.py's",
    )
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    args.size = args.size or [train.RECIPES[args.preset]["size"]]
    if args.memory_limit and args.parts != ["edit"]:
        cli.fail("--memory-limit is for --parts edit alone")
    if {"rank", "load"} & set(args.parts) and len(args.parts) > 1:
        cli.fail("--parts rank and --parts load go alone: each needs the memory for itself")
    return args


def ranks_to_plan(argv: list[str]) -> int | None:
    """The value of --plan, whose other options are not ours but train.py's."""
    parser = cli.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", type=cli.number(int, 1))
    known, _ = parser.parse_known_args(argv)
    return known.plan


@cli.guarded
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if ranks_to_plan(argv):
        plan.main(train.parse_arguments(argv))
        return
    args = parse_arguments(argv)
    try:
        bench(args)
    except torch.OutOfMemoryError:
        cli.fail(
            f"out of memory on {args.device}: take fewer --parts, a smaller --size, or --shrink"
        )
    except ImportError as error:
        cli.fail(f"--peer needs requirements-dev.txt: {error}")
    finally:
        if dist.is_initialized():  # by rank_step
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
