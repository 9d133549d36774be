"""How fast each part of the system is, and how much memory it takes, beside its FLOPs.

    B="python -m experiments.bench"
    $B                                                             # the toy, on any machine
    $B --preset wan2.2-ti2v-5b --peer                              # full size, beside its peers
    $B --preset wan2.2-ti2v-5b --growth --parts dit decode         # more frames, at 480p and 720p
    $B --preset wan2.2-ti2v-5b --shrink 4 --size 9 128 160 --peer  # its proportions, for a CPU
    $B --preset wan2.2-ti2v-5b --parts rank                        # a training step, as rank 0 of 8
    $B --preset wan2.2-ti2v-5b --parts edit --memory-limit 24      # offloaded, in 24 GB of a GPU
    $B --preset wan2.2-ti2v-5b --parts load                        # loading, beside a plain read
    $B --preset wan2.2-ti2v-5b --all                               # all of this, on one GPU

Weights and clips are random, which changes no amount of work. What is compared runs in turn, so
that other load on the machine meets both sides, and ratios are taken round by round. The table has
medians, with the quartiles in brackets.

"Of peak" is the rate of FLOPs over that of the fastest large matrix product in this dtype on this
machine, which is called MFU. Memory is the peak, weights included: on a GPU what the allocator gave
out, on Linux without a GPU what was resident of the process (VmHWM).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import shlex
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
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
from experiments import workloads
from experiments.workloads import ALONE, PARTS, Job, Runs
from sample import matmul_rate

# The shortest first: a run of --all may have no time for the others.
GROWTH = [(T, H, W) for T in (17, 33, 49, 81, 121) for H, W in ((480, 832), (704, 1280))]
# What --all measures, the most important first: the options of each run, and about how many seconds
# it takes, those of compiling included. The last ones have what is left of ALL_SECONDS, which with
# the start make 9 minutes. An edit takes few steps, as what another step adds is that of the DiT.
ALL_SECONDS = 510
ALL = {
    "--parts dit": 20,
    "--parts dit --compile": 70,
    "--parts rank": 60,
    "--parts edit --steps 5 --memory-limit 24": 80,
    "--parts dit --peer": 30,
    "--parts encode decode --peer --growth": 15,
    "--parts rank --compile": 110,
    "--parts edit --steps 5 --compile": 70,
    "--parts dit --peer --compile": 40,
    "--parts dit --growth": 40,
}

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


def measure(job: Job, rounds: int, device: torch.device) -> dict[str, Any]:
    """A row of results: seconds and bytes of each in every round, and how far results differ."""
    row: dict[str, Any] = {"part": job.part, "size": job.size, "flops": job.flops}
    if job.plan is not None:
        row["plan"] = job.plan
    seconds: dict[str, list[float]] = {who: [] for who in job.runs}
    most = {who: 0 for who in job.runs}
    with torch.set_grad_enabled(job.gradients):
        results = [run() for run in job.runs.values()]  # which compiles and fills caches
        if len(results) > 1 and results[0] is not None:
            row["counted"] = job.counted
            row["difference"] = largest_difference(*results)
        del results
        for i in tqdm(range(rounds), desc=job.part, unit="round", disable=None, leave=False):
            for who in in_turn(job.runs, i):
                time_taken, held = timed(job.runs[who], device)
                seconds[who].append(time_taken)
                most[who] = max(held, most[who])
    return row | {"seconds": seconds, "bytes": most}


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


def table_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_cells(row: dict[str, Any], peak: float) -> list[str]:
    """A row of results as cells under COLUMNS."""
    ours = row["seconds"]["ours"]
    size = row["size"] if isinstance(row["size"], str) else "x".join(map(str, row["size"]))
    work = ["", "", ""]
    if row["flops"]:
        rate = row["flops"] / statistics.median(ours)
        work = [f"{row['flops'] / 1e12:.4g}", f"{rate / 1e12:.3g}", f"{rate / peak:.0%}"]
    held = f"{row['bytes']['ours'] / 1e9:.3g}"
    beside, times, memory, difference = "", "", "", ""
    if "plan" in row:
        beside = "the plan"
        memory = f"{row['plan'] / 1e9:.3g}"
    for other in row["seconds"]:
        if other != "ours":
            pairs = zip(row["seconds"][other], ours, strict=True)
            ratios = [theirs / our for theirs, our in pairs]
            beside = other
            times = spread(ratios)
            memory = f"{row['bytes'][other] / 1e9:.3g}"
    if "difference" in row:
        times += f", counted {row['counted']:.3f}"
        difference = f"{row['difference']:.1e}"
    return [row["part"], size, spread(ours), *work, held, beside, times, memory, difference]


class Report:
    """What has been measured: a line of the table, and a JSON file that is complete after each."""

    def __init__(self, path: Path, about: str, peak: float) -> None:
        self.path = path
        self.about = about
        self.peak = peak
        self.rows: list[dict[str, Any]] = []
        print(f"{about}\nMatrix products reach {peak / 1e12:.3g} TFLOP/s.\n")
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


# --- The command ----------------------------------------------------------------------------------


def bench(args: argparse.Namespace, report: Report) -> None:
    """Measure what was asked for, and print a line for each part."""
    if args.memory_limit and args.device.type == "cuda":
        total = torch.cuda.get_device_properties(args.device).total_memory
        share = min(1.0, args.memory_limit * 1e9 / total)
        torch.cuda.set_per_process_memory_fraction(share, args.device.index)
    for job in workloads.jobs(args.config, args):
        report.add(measure(job, args.rounds, args.device))
        del job  # and with it the networks, before the next ones are made


def clean_up(args: argparse.Namespace) -> None:
    """Give what comes next the whole memory."""
    if dist.is_initialized():  # by part rank
        dist.destroy_process_group()
    if args.compile:
        torch.compiler.reset()
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, args.device.index)
        torch.cuda.empty_cache()


class TimeUp(BaseException):
    """No Exception: a library that goes on after any error, as compilers do, would go on."""


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


def bench_all(argv: list[str], report: Report) -> None:
    """All of ALL, in 2 rounds. What fails, or takes too long, leaves a row that says why.

    A run may take twice as long as foreseen, at the cost of the last ones.
    """
    shared = ["--rounds", "2", *(word for word in argv if word != "--all")]
    end = time.monotonic() + ALL_SECONDS
    for options, seconds in ALL.items():
        args = parse_arguments([*shared, *options.split()])
        try:
            with time_limit(min(2 * seconds, end - time.monotonic())):
                bench(args, report)
        except (TimeUp, Exception) as error:  # whatever it is, the next ones have their turn
            if not isinstance(error, TimeUp):
                traceback.print_exc(limit=-5)  # on stderr: where it was
            report.stop(options, (str(error).splitlines() or [type(error).__name__])[0])
        clean_up(args)


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
        const=GROWTH,
        help="instead of --size: 17 to 121 frames at 480p and 720p",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--parts",
        nargs="+",
        choices=(*PARTS, *ALONE),
        default=(*PARTS, "edit"),
        help="default: all but load and rank",
    )
    what.add_argument(
        "--all",
        action="store_true",
        help="all that there is to report of a GPU, the most important first, in 9 minutes",
    )
    add(
        "--memory-limit",
        type=cli.number(float, 0.1),
        metavar="GB",
        help="use so much of the GPU's memory; an edit then keeps its networks on the CPU",
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
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    args.size = args.size or train.RECIPES[args.preset]["size"]
    args.config = workloads.shrink(rvedit.preset(args.preset), args.shrink)
    for size in args.size:
        workloads.fit_config(args.config, size)  # a mistake shows before any work
    return args


@cli.guarded
@cli.memory_advice("take fewer --parts, a smaller --size, or --shrink")
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    peak = matmul_rate(args.device, getattr(torch, args.dtype), times=20)
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    command = shlex.join(["python", "-m", "experiments.bench", *argv])
    about = f"{machine}, torch {torch.__version__}, {args.dtype}{', compiled' * args.compile}, "
    about += f"{time.strftime('%Y-%m-%d')}: {command}"
    report = Report(args.out, about, peak)
    try:
        if args.all:
            bench_all(argv, report)
        else:
            bench(args, report)
    except ImportError as error:
        cli.fail(f"--peer needs requirements-dev.txt: {error}")
    finally:
        clean_up(args)


if __name__ == "__main__":
    main()
