"""How fast, and in how much memory: each part of the system beside its FLOPs, counted from shapes.

    python bench.py                                                             # the toy preset, on any machine
    python bench.py --preset wan2.2-ti2v-5b --peer                              # full size on a GPU, beside its peers
    python bench.py --preset wan2.2-ti2v-5b --growth --parts dit decode         # 17 to 81 frames at 480p and 720p
    python bench.py --preset wan2.2-ti2v-5b --shrink 4 --size 9 128 160 --peer  # its proportions, for a CPU
    python bench.py --preset wan2.2-ti2v-5b --parts rank                        # a training step of one rank of 8
    python bench.py --preset wan2.2-ti2v-5b --parts edit --memory-limit 24      # offloaded, in 24 GB of a GPU
    python bench.py --preset wan2.2-ti2v-5b --parts load                        # a checkpoint, beside reading its files

Weights and clips are random, which changes no amount of work. What is compared runs in turn, so that whatever else the
machine does meets both, and ratios are taken round by round. Printed are medians, with the quartiles in brackets.

"Of peak" is the rate of FLOPs (flops.py) over that of the fastest large matrix product in this dtype on this machine,
which is called MFU. Memory is the peak, weights included: on a GPU what the allocator gave out, else what Linux had
resident of the process (VmHWM).
"""

from __future__ import annotations

import argparse
import dataclasses
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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import rvedit
import train
import video
from cli import Parser, device_of, fail, number
from experiments import plan
from experiments.flops import Size, flops
from losses import symmetric_info_nce
from parallel import shard
from rvedit import RVEDiT, RVEDiTConfig
from sample import edit_video
from vae import WanVAE

Runs = dict[str, Callable[[], Tensor]]  # "ours", and perhaps another that does the same
PARTS = ("dit", "step", "info_nce", "encode", "decode", "mllm", "edit")
RANKS = 8  # of which part "rank" is the first
GROWTH = [(frames, *sides) for sides in ((480, 832), (704, 1280)) for frames in (17, 33, 49, 81)]

# --- Algorithm 1 to the letter, which `train.training_step` is measured against -------------------


def literal_info_nce(a: Tensor, a_ref: Tensor, temperature: float) -> Tensor:
    """Î of Eq. 5 from all S x S similarities at once, for features (B, S, d)."""
    logits = (
        F.normalize(a.float(), dim=-1)
        @ F.normalize(a_ref.detach().float(), dim=-1).mT
        / temperature
    )
    return (logits.log_softmax(1) + logits.log_softmax(2)).diagonal(dim1=1, dim2=2).mean() / 2


def literal_step(model: RVEDiT, vae: WanVAE, batch: data.Batch, depth: int) -> Tensor:
    """The loss of lines 4-19 as printed: two whole passes, which record every block's features; then one is read."""
    with torch.no_grad():
        source, target = (vae.encode(video.to_float(clip)) for clip in (batch.source, batch.target))
    t = batch.t.view(-1, 1, 1, 1, 1)
    z_t = (1 - t) * target + t * batch.noise
    features: list[
        Tensor
    ] = []  # of all blocks, in the editing branch, then in the reference branch
    hooks = [
        block.register_forward_hook(lambda _, __, out: features.append(out[1]))
        for block in model.dit.blocks
    ]
    velocity = model.dit(
        z_t, batch.t, model.contexts(model.encoder.encode(batch.edit_inputs)), source
    )
    with torch.no_grad():
        model.dit(z_t, batch.t, model.contexts(model.encoder.encode(batch.ref_inputs)), target)
    for hook in hooks:
        hook.remove()
    a, a_ref = features[depth - 1], features[len(hooks) + depth - 1]
    align = -literal_info_nce(a, a_ref, model.config.temperature)
    return F.mse_loss(velocity, batch.noise - target) + model.config.align_weight * align


# --- What is timed --------------------------------------------------------------------------------


def shrink(config: RVEDiTConfig, by: int) -> RVEDiTConfig:
    """Widths, heads and depths divided; the width of a head, the latents and the numbers of tokens stay."""
    names = "dim dec_dim ffn_dim hidden_size intermediate_size num_heads num_attention_heads num_key_value_heads "
    names += "num_blocks routing_depth depth num_hidden_layers"

    def divide(fields: dict[str, Any]) -> dict[str, Any]:
        divided = {name: -(-value // by) for name, value in fields.items() if name in names.split()}
        return (
            fields
            | divided
            | {name: divide(value) for name, value in fields.items() if isinstance(value, dict)}
        )

    return RVEDiTConfig(**divide(dataclasses.asdict(config)))


@torch.no_grad()
def random_networks(
    config: RVEDiTConfig,
    device: torch.device,
    dtype: torch.dtype,
    shard: Callable[[RVEDiT], None] | None = None,
) -> tuple[RVEDiT, WanVAE]:
    """As by `rvedit.load`. Drawn in place: `rvedit.initialise` takes minutes for the full size."""
    with torch.device("meta"):
        model, vae = RVEDiT(config, plan.stand_in_tokenizer(config)), WanVAE(config.vae)
    train.choose_trained(model)
    for part in (model, vae.conv2, vae.decoder):
        part.to(dtype)
    if shard is not None:
        shard(model)
    for p in (
        *model.to_empty(device=device).parameters(),
        *vae.to_empty(device=device).parameters(),
    ):
        p = p.to_local() if isinstance(p, DTensor) else p
        p.normal_(0.0, p[0].numel() ** -0.5) if p.ndim > 1 and len(p) else p.uniform_(0.5, 1.5)
    return model.eval(), vae.eval().requires_grad_(False)


def parts(
    model: RVEDiT, vae: WanVAE, size: Size, args: argparse.Namespace
) -> tuple[dict[str, Runs], dict[str, int]]:
    """What to run for each part, and its FLOPs."""
    factors, text, device = (
        (vae.config.temporal_factor, model.config.spatial_factor),
        "make it snow",
        args.device,
    )
    if (size[0] - 1) % factors[0] or size[1] % factors[1] or size[2] % factors[1]:
        raise ValueError(
            "--size {} {} {}: take {}k + 1 frames with sides in multiples of {}".format(
                *size, *factors
            )
        )
    model.config = config = dataclasses.replace(
        model.config, max_frames=size[0], max_pixels=size[1] * size[2]
    )
    clips = torch.randint(0, 256, (2, 1, *size, 3), dtype=torch.uint8)
    inputs = model.encoder.prepare([clips[0, 0]], [text])
    grid = (
        (size[0] - 1) // factors[0] + 1,
        size[1] // vae.config.spatial_factor,
        size[2] // vae.config.spatial_factor,
    )
    z, noise = torch.randn(2, 1, vae.config.z_dim, *grid, device=device)
    t = torch.full((1,), 0.5, device=device)
    batch = data.Batch(*clips.to(device), t, noise, inputs, inputs, 0)
    films = video.to_float(batch.source)
    with torch.no_grad():
        contexts = model.contexts(model.encoder.encode(inputs))
        a_ref = model.dit.features(z, t, contexts, noise, 1)
    a = torch.randn_like(a_ref, requires_grad=True)

    def step(loss_of: Callable[..., Tensor]) -> Tensor:
        loss = loss_of(
            model, vae, batch, (config.dit.num_blocks + 1) // 2
        )  # the mean of the depths in Eq. 4
        loss.backward()
        model.zero_grad()
        return loss.detach()

    def info_nce(estimate: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.grad(estimate(a, a_ref, config.temperature), a)[0]

    runs = {
        "dit": {"ours": lambda: model.dit(z, t, contexts, noise)},
        "step": {
            "ours": lambda: step(lambda *x: train.training_step(*x)[0]),
            "literal": lambda: step(literal_step),
        },
        "info_nce": {
            "ours": lambda: info_nce(symmetric_info_nce),
            "literal": lambda: info_nce(literal_info_nce),
        },
        "encode": {"ours": lambda: vae.encode(films)},
        "decode": {"ours": lambda: vae.decode(z)},
        "mllm": {"ours": lambda: model.encoder.encode(inputs)},
        "edit": {"ours": lambda: edit_video(model, vae, clips[0, 0], text, args.steps)},
    }
    if args.peer:
        from tests import peers  # which needs requirements-dev.txt

        runs |= peers.runs(model, vae, z, t, contexts[0][0], films, inputs, args.compile)
    return runs, flops(config, size, inputs, args.steps)


# --- What is not one of the system's parts --------------------------------------------------------


def rank_step(
    config: RVEDiTConfig, size: Size, args: argparse.Namespace
) -> tuple[dict[str, Runs], dict[str, int]]:
    """An optimiser step of `train.py` as the first of 8 ranks has it; its FLOPs, and the bytes that `plan.py` foresees.

    Its process group only pretends to send: shapes and memory are right, gradients are not, so it does not look whether
    they are finite; the time is that without communication.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh, cuda = init_device_mesh(args.device.type, (RANKS,)), args.device.type == "cuda"
    options = ["--preset", args.preset, "--plan", RANKS, "--out", os.devnull, "--size", *size]
    options = train.parse_arguments(
        [str(option) for option in options] + ["--compile"] * args.compile
    )
    networks = random_networks(
        config, args.device, torch.float32, lambda model: train.prepare(model, options, mesh)
    )
    if cuda and config.lora_rank:
        networks[0].encoder.qwen.visual.to(torch.bfloat16)  # as in train.load_model
    run, batch = train.Run(*networks, args.device, options), plan.a_batch(*networks, options, "cpu")

    def step() -> None:
        train.compute_gradients(run, iter([batch] * options.accumulate), options, [])
        torch.nn.utils.clip_grad_norm_(run.weights.values(), 1.0, foreach=True)
        run.update(options.lr)
        run.optimizer.zero_grad()
        run.step += 1

    planned = plan.plan(config, options, RANKS, torch.bfloat16 if cuda else torch.float32).total
    one = networks[0].encoder.prepare([batch.source[0]], ["make it snow"])
    work = flops(config, size, one, args.steps)["step"] * options.batch * options.accumulate
    return {"rank": {"ours": step}}, {"rank": work, "plan": planned}


def offloaded_edit(
    config: RVEDiTConfig, size: Size, args: argparse.Namespace
) -> tuple[dict[str, Runs], dict[str, int]]:
    """An edit by networks that rest on the CPU, in no more of the GPU's memory than was allowed."""
    if args.device.type == "cuda":
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, args.memory_limit * 1e9 / total), args.device.index
        )
    config = dataclasses.replace(config, max_frames=size[0], max_pixels=size[1] * size[2])
    model, vae = random_networks(config, torch.device("cpu"), getattr(torch, args.dtype))
    clip = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    inputs = model.encoder.prepare([clip], ["make it snow"])
    runs = {
        "ours": lambda: edit_video(model, vae, clip, "make it snow", args.steps, device=args.device)
    }
    return {"edit": runs}, flops(config, size, inputs, args.steps)


def load_seconds(
    config: RVEDiTConfig, folder: Path, args: argparse.Namespace
) -> tuple[dict[str, list[float]], int]:
    """Seconds to load a checkpoint of random weights and to read its files, neither of them cached, and its bytes."""
    dtype, buffer = getattr(torch, args.dtype), bytearray(1 << 24)
    rvedit.save(folder / "model", *random_networks(config, torch.device("cpu"), dtype))
    files = sorted((folder / "model").glob("*.safetensors"))

    def read() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    runs = {
        "ours": lambda: rvedit.load(folder / "model", device=args.device, dtype=dtype),
        "read": read,
    }
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for i in range(args.rounds):
        for who in list(runs)[:: 1 if i % 2 else -1]:
            for file in files:
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())  # what is not yet written would stay in the cache
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            seconds[who].append(timed(runs[who], args.device)[0])
    return seconds, sum(file.stat().st_size for file in files)


# --- Timing, and the command line -----------------------------------------------------------------


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Seconds, and the most bytes held meanwhile, 0 where nobody counts them."""
    cuda, clear = device.type == "cuda", Path("/proc/self/clear_refs")
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif clear.exists():
        clear.write_text("5")  # forget the former peak
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    took, status = time.perf_counter() - start, clear.with_name("status")
    if cuda:
        return took, torch.cuda.max_memory_allocated(device)
    return took, 1024 * int(
        status.read_text().partition("VmHWM:")[2].split()[0]
    ) if status.exists() else 0


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square products."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / min(timed(lambda: a @ b, device)[0] for _ in range(20))


def measure(name: str, runs: Runs, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds and bytes of each; with two of them also how far their results differ."""
    results = [run() for run in runs.values()]  # compiles, and fills caches
    row: dict[str, Any] = {
        "part": name,
        "seconds": {who: [] for who in runs},
        "bytes": dict.fromkeys(runs, 0),
    }
    if len(results) > 1:
        row["difference"] = ((results[0] - results[1]).abs().max() / results[1].abs().max()).item()
    results.clear()
    for i in tqdm(range(rounds), desc=name, unit="round", disable=None, leave=False):
        for who in list(runs)[:: 1 if i % 2 else -1]:
            took, held = timed(runs[who], device)
            row["seconds"][who].append(took)
            row["bytes"][who] = max(held, row["bytes"][who])
    return row


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def line(row: dict[str, Any], peak: float) -> str:
    """Of the table."""
    (_, ours), *others = row["seconds"].items()
    rate, clip = row["flops"] / statistics.median(ours), "x".join(map(str, row["size"]))
    text = f"| {row['part']} | {clip} | {spread(ours)} | {row['flops'] / 1e12:.4g} | {rate / 1e12:.3g} "
    text += f"| {rate / peak:.0%} | {row['bytes']['ours'] / 1e9:.3g} |"
    if "plan" in row:
        return text + f" the plan | | {row['plan'] / 1e9:.3g} | |"
    for who, theirs in others:
        ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
        text += f" {who} | {spread(ratios)}, counted {row['counted']:.3f} | {row['bytes'][who] / 1e9:.3g} "
        text += f"| {row['difference']:.0e} |"
    return text if others else text + " |" * 4


def bench(args: argparse.Namespace) -> None:
    config, dtype, cuda = (
        rvedit.preset(args.preset),
        getattr(torch, args.dtype),
        args.device.type == "cuda",
    )
    config, peak, rows = shrink(config, args.shrink), matmul_peak(args.device, dtype), []
    threads = f"{torch.get_num_threads()} threads of {platform.machine()}"
    machine = torch.cuda.get_device_name(args.device) if cuda else threads
    about = f"{machine}, torch {torch.__version__}, {args.dtype}{', compiled' * args.compile}"
    print(f"{about}; matrix products reach {peak / 1e12:.3g} TFLOP/s\n")

    def note(row: dict[str, Any], text: str) -> None:
        rows.append(row)
        print(text, flush=True)
        partial = args.out.with_name(f".{args.out.name}.partial")
        partial.write_text(
            json.dumps(dict(about=about, matmul=peak, rows=rows), indent=1), encoding="utf-8"
        )
        partial.replace(args.out)

    if "load" in args.parts:
        with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
            seconds, size = load_seconds(config, Path(folder), args)
        rates = {who: spread([size / x / 1e9 for x in took]) for who, took in seconds.items()}
        ratios = spread([ours / read for ours, read in zip(*seconds.values(), strict=True)])
        text = f"{size / 1e9:.3g} GB loaded at {rates['ours']} GB/s, its files read at {rates['read']} GB/s"
        return note(dict(part="load", seconds=seconds, size=size), f"{text}: takes times {ratios}")
    print(
        "| part | clip | seconds | TFLOP | TFLOP/s | of peak | GB | beside | takes times | GB | differs by |"
    )
    print("|" + " --- |" * 11)
    networks = None
    for size in args.size:
        if "rank" in args.parts:
            runs, work = rank_step(config, size, args)
        elif args.memory_limit:
            runs, work = offloaded_edit(config, size, args)
        else:
            if networks is None:
                networks = random_networks(config, args.device, dtype)
                shard(
                    networks[0],
                    None,
                    train.RECIPES[args.preset]["recompute"] and "step" in args.parts,
                    args.compile,
                )
            runs, work = parts(*networks, size, args)
        for name, candidates in runs.items():
            if name.split()[0] in args.parts:
                candidates = candidates if args.peer else {"ours": candidates["ours"]}
                with torch.set_grad_enabled(name in ("step", "info_nce", "rank")):
                    row = measure(name, candidates, args.rounds, args.device) | dict(
                        size=size, flops=work[name]
                    )
                row["counted"] = work.get(f"literal {name}", work[name]) / work[name]
                row |= {"plan": work["plan"]} if name == "rank" else {}
                note(row, line(row, peak))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Time each part of the system beside its FLOPs.", allow_abbrev=False
    )
    add, cuda = parser.add_argument, torch.cuda.is_available()
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
        type=number(int, 1),
        nargs=3,
        action="append",
        metavar=("T", "H", "W"),
        help="of a clip; repeatable",
    )
    add(
        "--growth",
        dest="size",
        action="store_const",
        const=GROWTH,
        help="17 to 81 frames at 480p and 720p",
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
        type=number(float, 0.1),
        metavar="GB",
        help="of the GPU, for the part edit with offloading",
    )
    add(
        "--peer",
        action="store_true",
        help="beside diffusers, transformers and Algorithm 1 to the letter",
    )
    add("--compile", action="store_true", help="the blocks of DiT and MLLM, on both sides")
    add("--rounds", type=number(int, 2), default=7, help="default: 7")
    add("--steps", type=number(int, 1), default=50, help="of the edit (default 50)")
    add(
        "--device",
        type=device_of,
        default="cuda" if cuda else "cpu",
        help="default: a GPU if there is one",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    add(
        "--out",
        type=Path,
        default=Path("bench.json"),
        help="the measurements as JSON (default bench.json)",
    )
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    args.size = args.size or [train.RECIPES[args.preset]["size"]]
    if args.memory_limit and args.parts != ["edit"]:
        fail("--memory-limit is for --parts edit alone")
    if {"rank", "load"} & set(args.parts) and len(args.parts) > 1:
        fail("--parts rank and --parts load go alone: their networks would stand beside the others")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        bench(args)
    except torch.OutOfMemoryError:
        fail(f"out of memory on {args.device}: take fewer --parts, a smaller --size, or --shrink")
    except ImportError as error:
        fail(f"--peer needs requirements-dev.txt: {error}")
    except (ValueError, OSError) as error:
        fail(error)
    finally:
        if dist.is_initialized():  # that of rank_step
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
