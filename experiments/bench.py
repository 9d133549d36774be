"""How fast each part of the system is, and how much memory it takes, beside its FLOPs.

    B="python -m experiments.bench"
    $B                                                             # the toy, on any machine
    $B --preset wan2.2-ti2v-5b --peer                              # full size, beside its peers
    $B --preset wan2.2-ti2v-5b --growth --parts dit decode         # more frames, at 480p and 720p
    $B --preset wan2.2-ti2v-5b --shrink 4 --size 9 128 160 --peer  # its proportions, for a CPU
    $B --preset wan2.2-ti2v-5b --parts rank                        # a training step, as rank 0 of 8
    $B --preset wan2.2-ti2v-5b --parts edit --memory-limit 24      # offloaded, in 24 GB of a GPU
    $B --preset wan2.2-ti2v-5b --parts load                        # loading, beside a plain read
    $B --preset wan2.2-ti2v-5b --all                               # all of this, in 9 minutes

Weights and clips are random, which changes no amount of work. What is compared runs in turn, so
that other load on the machine meets both sides, and ratios are taken round by round. The table has
medians, with the quartiles in brackets.

"Of peak" is the rate of FLOPs over that of the fastest large matrix product in this dtype on this
machine, which is called MFU. Memory is the peak, weights included: on a GPU what the allocator gave
out, on Linux without a GPU what was resident of the process (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli

if __name__ == "__main__":
    cli.begin()

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import rvedit
import train
from experiments import runbook, workloads
from experiments.workloads import Job, Runs
from rvedit import RVEDiTConfig
from sample import matmul_rate

PARTS = ("dit", "step", "info_nce", "encode", "decode", "mllm", "edit")

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


def in_turn(runs: Runs, i: int) -> list[str]:
    """The order of round i: who ran first in the last round runs last."""
    names = list(runs)
    return names if i % 2 else names[::-1]


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def error_of_spread(ours: Tensor, expected: Tensor) -> float:
    """The root mean square of the error, in standard deviations of what is expected."""
    return ((ours - expected).square().mean().sqrt() / expected.std()).item()


def measure(job: Job, rounds: int, device: torch.device, limit: float = math.inf) -> dict[str, Any]:
    """A row of results: seconds and bytes of each, and how far results differ.

    limit: no further round begins after this many seconds.
    """
    row: dict[str, Any] = {"part": job.part, "size": job.size, "flops": job.flops}
    if job.plan is not None:
        row["plan"] = job.plan
    with torch.set_grad_enabled(job.gradients):
        if not job.warm:
            row |= compare(job)
        row |= repeat(job, rounds, device, limit)
    return row


def compare(job: Job) -> dict[str, Any]:
    """Run each once, which compiles and fills caches. Returns how far results differ."""
    results = [run() for run in job.runs.values()]
    if len(results) > 1:
        difference = largest_difference(results[0], results[1])
        return {"counted": job.counted, "difference": difference}
    if job.expected is not None:
        return {"difference": error_of_spread(results[0], job.expected)}
    return {}


def repeat(job: Job, rounds: int, device: torch.device, limit: float) -> dict[str, Any]:
    """The seconds of every round, and the most bytes of all."""
    measured: dict[str, list[float]] = {who: [] for who in job.runs}
    most = {who: 0 for who in job.runs}
    start = time.perf_counter()
    for i in tqdm(range(rounds), desc=job.part, unit="round", disable=None, leave=False):
        for who in in_turn(job.runs, i):
            seconds, held = timed(job.runs[who], device)
            if job.seconds is not None:
                seconds = job.seconds()
            measured[who].append(seconds)
            most[who] = max(held, most[who])
        if time.perf_counter() - start > limit:
            break
    return {"seconds": measured, "bytes": most}


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
    if len(values) == 1:
        return f"{values[0]:.3g}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def table_line(cells: Iterable[str]) -> str:
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
    beside, times, memory, difference = "", "", "", ""
    if "plan" in row:
        beside = "the plan"
        memory = f"{row['plan'] / 1e9:.3g}"
    for other in row["seconds"]:
        if other != "ours":
            pairs = zip(row["seconds"][other], ours, strict=True)
            ratios = [theirs / our for theirs, our in pairs]
            beside = other
            times = f"{spread(ratios)}, counted {row['counted']:.3f}"
            memory = f"{row['bytes'][other] / 1e9:.3g}"
    if "difference" in row:
        difference = f"{row['difference']:.1e}"
    return [*cells, beside, times, memory, difference]


class Report:
    """What has been measured: a line of the table, and a JSON file that is complete after each."""

    def __init__(self, path: Path, about: str, peak: float) -> None:
        self.path = path
        self.about = about
        self.peak = peak
        self.rows: list[dict[str, Any]] = []

    def begin_table(self) -> None:
        print(table_line(COLUMNS))
        print("|" + " --- |" * len(COLUMNS))

    def add(self, row: dict[str, Any]) -> None:
        print(table_line(as_cells(row, self.peak)), flush=True)
        self.write(row)

    def stop(self, part: str, reason: str) -> None:
        print(f"| {part} | stopped: {reason} |", flush=True)
        self.write({"part": part, "stopped": reason})

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        content = {"about": self.about, "matmul": self.peak, "rows": self.rows}
        cli.write_text(self.path, json.dumps(content, indent=1))


# --- Loading a checkpoint -------------------------------------------------------------------------


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
    resting = torch.device("cpu")
    model, vae = workloads.random_networks(config, resting, dtype, draw_on=args.device)
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


def bench_loading(config: RVEDiTConfig, report: Report, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        seconds, size = loading(config, Path(folder), args)
    report.write({"part": "load", "seconds": seconds, "size": size})
    load_rates = [size / x / 1e9 for x in seconds["ours"]]
    read_rates = [size / x / 1e9 for x in seconds["read"]]
    ratios = [load / read for load, read in zip(*seconds.values(), strict=True)]
    print(
        f"{size / 1e9:.3g} GB loaded at {spread(load_rates)} GB/s, its files read at "
        f"{spread(read_rates)} GB/s: takes times {spread(ratios)}"
    )


# --- The command ----------------------------------------------------------------------------------


def bench(args: argparse.Namespace, command: str) -> None:
    """Measure what was asked for, and print a line for each part."""
    config = workloads.shrink(rvedit.preset(args.preset), args.shrink)
    for size in args.size:
        workloads.fit_config(config, size)  # a mistake shows before any work
    peak = matmul_rate(args.device, getattr(torch, args.dtype), times=20)
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    about = f"{machine}, torch {torch.__version__}, {args.dtype}{', compiled' * args.compile}, "
    about += f"{time.strftime('%Y-%m-%d')}: {command}"
    print(f"{about}\nMatrix products reach {peak / 1e12:.3g} TFLOP/s.\n")
    report = Report(args.out, about, peak)

    if "load" in args.parts and not args.all:
        bench_loading(config, report, args)
        return

    def add(job: Job) -> None:
        limit = runbook.SECONDS_OF_A_ROW if args.all else math.inf
        report.add(measure(job, args.rounds, args.device, limit))

    report.begin_table()
    if args.all:
        runbook.run(config, args, add, report.stop)
    elif "rank" in args.parts:
        for size in args.size:
            add(workloads.rank_job(config, size, args))
    elif args.memory_limit:
        for size in args.size:
            add(workloads.edit_job(config, size, args))
    else:
        for job in workloads.jobs_of_parts(config, args):
            add(job)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m experiments.bench",
        description="Time each part of the system beside its FLOPs.",
        allow_abbrev=False,
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
        const=runbook.GROWTH,
        help="instead of --size: 17 to 121 frames at 480p and 720p",
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
        "--all",
        type=cli.number(float, 0.1),
        nargs="?",
        const=9.0,
        metavar="MINUTES",
        help="measure everything in these minutes (9), the most important first; see runbook.py",
    )
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    args.few_steps = None
    if args.all and args.size is None:
        args.size = [*train.RECIPES[args.preset]["size"], *runbook.GROWTH]
    args.size = args.size or train.RECIPES[args.preset]["size"]
    if args.memory_limit and args.parts != ["edit"]:
        cli.fail("--memory-limit is for --parts edit alone")
    if {"rank", "load"} & set(args.parts) and len(args.parts) > 1:
        cli.fail("--parts rank and --parts load go alone: each needs the memory for itself")
    return args


@cli.guarded
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    command = shlex.join(["python", "-m", "experiments.bench", *argv])
    try:
        bench(args, command)
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
