"""What all command lines share: parsing, errors in one line, and files that are never half written.

Nothing here imports PyTorch, whose import takes seconds, so that mistakes are found at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

# Packages of requirements.txt, by the names under which they are imported.
REQUIRED = ("torch", "safetensors", "numpy", "av", "PIL", "tokenizers", "tqdm")

# Which of torchrun's processes this is, of how many, and which on its node. Without RANK it is the
# only one, whatever WORLD_SIZE says: batch scripts set that for purposes of their own.
ALONE = not os.environ.get("RANK")
RANK = 0 if ALONE else int(os.environ["RANK"])
RANKS = 1 if ALONE else int(os.environ.get("WORLD_SIZE") or 1)
LOCAL_RANK = 0 if ALONE else int(os.environ.get("LOCAL_RANK") or 0)

SHIFT = 5.0  # of the sampler's timesteps, if not another is given: Kiwi-Edit's

# --- Errors ---------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a command with its message in one line, wherever it is raised."""


def fail(message: object) -> NoReturn:
    """Print one line on stderr and exit with code 2, as every mistake of a user does."""
    if isinstance(message, OSError):
        message = plain_reason(message)
    lines = str(message).strip().splitlines() or ["unknown error"]
    say(f"error: {lines[0]}")
    raise SystemExit(2)


def note(text: str) -> None:
    """Print a line on stderr, once for all processes of torchrun."""
    if RANK == 0:
        say(f"note: {text}")


def say(line: str) -> None:
    """Print on stderr; that nobody can read it, or its disk is full, costs no work."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def say_last(text: str) -> None:
    """Print what was done. That nobody can read it makes no failure of it."""
    try:
        print(text, flush=True)
    except OSError:  # a full disk, or a pipe whose reader has left
        # Python tries once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain_reason(error: Exception) -> str:
    """What an error says; of a file's, without Python's "[Errno 2]" and quotes."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror.lower()}"


def guarded(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command's main: errors that a user can mend become one line and exit code 2."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            check_tasks()
            return main(*args, **kwargs)
        except (OSError, ValueError, Stop) as error:
            fail(error)
        except RecursionError:
            fail("the input is nested too deeply, such as JSON of thousands of brackets")
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason, _, _ = str(error).partition("\n\n")  # advice for developers follows
            fail(f"compiling failed, --no-compile goes without: {' '.join(reason.split())}")
        except MemoryError as error:
            fail(f"out of memory: {error}" if str(error) else "out of memory")
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Decorate a command: where PyTorch runs out of memory, it says what would help."""
    try:
        yield
    except RuntimeError as error:
        # By its words, because on a CPU it is an error like any other.
        if not re.search("out of memory|allocate memory|enough memory|ALLOC_FAILED", str(error)):
            raise
        raise Stop(f"out of memory: {advice}") from None


# What srun and mpirun call the number of processes that they have started. SLURM_NTASKS does not
# tell: a batch script has it as well, and is one process.
NUM_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def check_tasks() -> None:
    """Raise Stop if several processes were started that do not know of each other."""
    for name in NUM_TASKS:
        tasks = int(os.environ.get(name) or 1)
        if ALONE and tasks > 1:
            raise Stop(
                f"{tasks} tasks were started, each of which would do all the work: start one "
                "torchrun a node instead (srun --ntasks-per-node 1 torchrun ...), or unset "
                f"{name} if each task has work of its own"
            )


def begin() -> None:
    """Call first in a script: Ctrl-C during slow imports is silent, a missing package one line.

    SIGUSR1, by which a run is asked to save, is ignored until `parallel.Signals` takes it: before
    that there is nothing to save, and by default it would end the process. SIGTERM and a closed
    terminal end the command as an error does, so that no half-written file is left. One of several
    ranks they end at once, as it may be waiting for the others for ever.
    """

    def report(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:
            raise SystemExit(130)
        if kind is ModuleNotFoundError and error.name in REQUIRED:
            fail(f"{error.name} is not installed: run `pip install -r requirements.txt`")
        sys.__excepthook__(kind, error, traceback)

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    sys.excepthook = report
    # Where stderr is closed (`2>&-`) it is None, which bars and notes cannot be written to.
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.stdout is not None:  # `>&-` closes that
        # As stderr does by itself: what the terminal's encoding lacks, such as λ, is spelt out.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not hasattr(signal, "SIGUSR1"):  # Windows
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for kind in (signal.SIGTERM, signal.SIGHUP):
        if ALONE and signal.getsignal(kind) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(kind, leave)


def check_gpu(count: int) -> None:
    """Raise ValueError if this process has none of the machine's `count` GPUs."""
    if LOCAL_RANK >= count:
        raise ValueError(
            f"this machine has no GPU for its rank {LOCAL_RANK}: give a smaller --nproc_per_node"
        )


# --- Options --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        if RANK > 0:  # all processes of torchrun have the same options: one reports
            raise SystemExit(2)
        if "arguments" in message:  # some are missing, or there is no such option
            message += " (-h lists the options; a text with spaces needs quotes)"
        fail(message.removeprefix("argument "))


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Make a parser (for `type=`) of finite numbers of `kind` from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and value != math.inf:
            return value
        name = "a whole number" if kind is int else "a number"
        bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bounds}")

    return parse


def device_of(text: str) -> Any:
    """Parse the name of a torch.device that exists on this machine."""
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # an unknown name; a GPU that is not there
        message = f"this machine and this PyTorch have no {text!r}; leave it out"
        raise argparse.ArgumentTypeError(message) from None
    return device


# --- Files ----------------------------------------------------------------------------------------


def beside(path: Path, before: str, behind: str) -> Path:
    """`path` with something before and behind its name, which file systems allow 255 bytes.

    Where that is too long, a hash and the ending stand for the name: some writers choose their
    format by the ending.
    """
    name = path.name
    if len(os.fsencode(f"{before}{name}{behind}")) > 255:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + path.suffix
    return path.with_name(f"{before}{name}{behind}")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what is written there becomes `path` at the end.

    For a file or a folder. After an error nothing is left over, and a former `path` is untouched.
    An OSError, such as that of a full disk, is raised again with the final name in its message.
    """
    target = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
    # Several may write at once. Some writers choose their format by the ending, that of the link.
    ending = "" if target.suffix == Path(path).suffix else Path(path).suffix
    temporary = beside(target, f".partial-{os.getpid()}-", ending)
    former = beside(target, ".former-", "")
    try:
        # A kill between the two renames below leaves the former folder under this name,
        # a kill right after them leaves it beside the new one.
        if former.exists() and not target.exists():
            former.rename(target)
        else:
            _delete(former)
        yield temporary
        if temporary.is_dir() and target.exists():
            # A folder cannot replace another in one step: the former one moves aside first.
            target.rename(former)
            temporary.rename(target)
        else:
            os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if former.exists() and not target.exists():
            former.rename(target)
        for leftover in (temporary, former):
            _delete(leftover)


def _delete(path: Path) -> None:
    """Delete a file, a folder or a link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # of a read-only disk, say
            path.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- The options of sample.py ---------------------------------------------------------------------


def prompt(text: str) -> str:
    """Parse an instruction: it must say something, in valid UTF-8."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; say what to change")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        # Python's way to hand over bytes that are not UTF-8.
        raise argparse.ArgumentTypeError(
            "it is not valid UTF-8; check the encoding of your terminal"
        )
    return text


def edit_parser() -> Parser:
    parser = Parser(
        usage="%(prog)s --video VIDEO --prompt PROMPT [options]",
        description="Edit a video or a photo by an instruction. Without --checkpoint this is the "
        "built-in toy, which knows only moving shapes at 128x128; try --video assets/shapes.mp4 "
        '--prompt "remove the red circle".',
        epilog="Words of the built-in toy: circle, ring, square, diamond, triangle, cross, heart, "
        "star; red, orange, yellow, green, cyan, blue, purple, pink; small, medium, large; "
        "remove, make, turn, replace, resize, add; at the top left, in the center, ...; moving "
        "left, standing still, ...; a black and white film, an old sepia film, a mosaic, ...",
        allow_abbrev=False,
    )
    natural = number(int, 1)
    group = parser.add_argument_group("the edit")
    group.add_argument(
        "--video",
        type=Path,
        required=True,
        help="video or photo to edit, in any format FFmpeg reads",
    )
    group.add_argument(
        "--prompt", type=prompt, required=True, help='what to change, as "make the circle blue"'
    )
    group.add_argument(
        "--out",
        type=Path,
        help=".mp4 or .mov, for a photo .png, .jpg or .webp; default: NAME_edited in this folder",
    )
    group.add_argument(
        "--compare",
        action="store_true",
        help="also write source and edit side by side: OUT_compare",
    )
    group.add_argument(
        "--keep-source",
        action="store_true",
        help="where nothing was edited, keep the source's own pixels at full resolution",
    )
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--checkpoint", type=Path, help="our or Kiwi-Edit's checkpoint; default: the built-in toy"
    )
    group.add_argument(
        "--wan", type=Path, help="folder of Wan2.2-TI2V-5B, which Kiwi-Edit's training states need"
    )
    group.add_argument(
        "--qwen", type=Path, help="folder of Qwen2.5-VL-3B-Instruct, which they need as well"
    )
    group.add_argument(
        "--routing-depth", type=number(int, 0), help="L_s of Eq. 3; default: the checkpoint's"
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--steps", type=natural, help="Euler steps; default: the checkpoint's, mostly 50"
    )
    group.add_argument(
        "--shift",
        type=number(float, 0.01),
        default=SHIFT,
        help=f"timestep shift (default {SHIFT:g})",
    )
    group.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the noise (default 0)"
    )
    group.add_argument(
        "--max-pixels",
        type=natural,
        help="the largest frame, in pixels, that the model works on; default: the checkpoint's",
    )
    group.add_argument(
        "--max-frames",
        type=natural,
        help="frames in one pass, longer clips take overlapping windows; default: the checkpoint's",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue an edit that was stopped; its steps are saved every 30 seconds",
    )
    group = parser.add_argument_group("the machine")
    group.add_argument("--device", type=device_of, help="default: a GPU if there is one")
    group.add_argument(
        "--offload", action="store_true", help="keep only the network in use on the GPU"
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPUs, else float32"
    )
    group.add_argument(
        "--decode-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the VAE's decoder; bfloat16 halves the memory peak of an edit (default float32)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the DiT's blocks and the VAE's norms by torch.compile (default on GPUs, for "
        "edits that take long enough to gain by it)",
    )
    return parser


# --- The options of train.py ----------------------------------------------------------------------


def train_parser(kind: type[Parser] = Parser) -> Parser:
    """Options that are not given are left out of the result: `train.parse_arguments` adds them."""
    parser = kind(
        description="Train RVEDiT. Defaults that are not given here are those of the preset.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    natural, positive = number(int, 1), number(float, 1e-9)

    group = parser.add_argument_group("the model")
    group.add_argument(
        "--preset",
        choices=("wan2.2-ti2v-5b", "toy"),
        help="sizes, rates and steps, and what a start without --checkpoint looks like; default: "
        "that of the checkpoint, else toy, or wan2.2-ti2v-5b with --data or --wan",
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        help="start from this: a checkpoint of ours or Kiwi-Edit's; a training state of the latter "
        "is a file, and needs --wan and --qwen as well",
    )
    group.add_argument(
        "--wan", type=Path, help="else start from the base models: this folder of Wan2.2-TI2V-5B"
    )
    group.add_argument("--qwen", type=Path, help="and this folder of Qwen2.5-VL-3B-Instruct")
    group.add_argument(
        "--routing-depth",
        type=number(int, 0),
        help="L_s of Eq. 3, in blocks; default: the model's, or L/2 from Kiwi-Edit",
    )
    group.add_argument(
        "--freeze-lora",
        action="store_true",
        help="do not train the LoRA, as in App. D.1; by default it trains, as in Algorithm 1",
    )

    group = parser.add_argument_group("the loss")
    group.add_argument(
        "--align-weight",
        type=number(float, 0, 1e6),  # as config.json may have it, see weights.BOUNDS
        help="λ of Eq. 6; default: the model's, which is 0.75, and for the toy 0.005",
    )
    group.add_argument(
        "--temperature",
        type=number(float, 1e-4, 1e4),
        help="τ of Eq. 5; default: the model's, 0.07",
    )
    group.add_argument(
        "--timestep-shift",
        type=positive,
        help="draw t closer to noise if above 1; 1 is Algorithm 1's uniform t",
    )

    group = parser.add_argument_group("the clips")
    group.add_argument(
        "--data",
        nargs="+",
        action="extend",
        type=Path,
        metavar="FILE",
        help="tables of triplets, .csv, .tsv, .json or .jsonl; default: moving shapes",
    )
    group.add_argument(
        "--world",
        choices=("all", "small"),
        help="without --data: all moving shapes (default), or a few forms, colors and words, which "
        "are learned sooner",
    )
    group.add_argument(
        "--root", type=Path, help="folder of the tables' relative paths; default: the table's own"
    )
    group.add_argument(
        "--size",
        nargs=3,
        action="append",
        type=natural,
        metavar=("T", "H", "W"),
        help="at most 4k + 1 frames of H x W pixels, at the clip's own aspect; clips are cropped "
        "to it if --batch is above 1. Given several times, each step takes one of the sizes",
    )
    group.add_argument(
        "--caption-fallback",
        action="store_true",
        help="train on tables without captions ℓ*, with the instructions in their place",
    )
    group.add_argument(
        "--latents",
        type=Path,
        metavar="DIR",
        help="take the clips' latents from this folder, which `datasets encode` has written",
    )
    group.add_argument(
        "--max-bad",
        type=number(float, 0, 1),
        help="stop if a larger share of the clips is broken (default 0.01)",
    )
    group.add_argument(
        "--workers",
        type=number(int, 0),
        help="processes that read clips, for each rank (default 2)",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--steps",
        type=natural,
        help="optimiser steps of the whole run; default: one epoch, for the toy 2000",
    )
    group.add_argument(
        "--batch",
        type=natural,
        help="clips of a rank, or of N that share them, in one forward pass",
    )
    group.add_argument(
        "--sequence-parallel",
        type=natural,
        metavar="N",
        help="let N ranks of a node share their clips, which may then be longer (default 1)",
    )
    group.add_argument(
        "--accumulate", type=natural, help="forward passes in one optimiser step (default 1)"
    )
    group.add_argument("--lr", type=positive, help="the highest learning rate of AdamW")
    group.add_argument(
        "--seed", type=number(int, 0), help="determines everything random (default 0)"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="what blocks are computed in; weights and optimiser stay float32 (default bfloat16 on "
        "GPUs, else float32; CPUs that have bfloat16 instructions are faster with it)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile each block, and the VAE's norms, by torch.compile (default on GPUs)",
    )
    group.add_argument(
        "--log-gradients",
        type=natural,
        metavar="N",
        help="every N steps log the gradients' norms of L_fm and of λ·L_align, by a second pass",
    )

    group = parser.add_argument_group("the run")
    group.add_argument("--out", type=Path, help="folder to write to (default runs/train)")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in OUT from its last checkpoint, with its options; given with "
        "--preset, --checkpoint, --wan or --data it begins one where there is none",
    )
    group.add_argument(
        "--save-every", type=natural, help="steps between two checkpoints (default 500)"
    )
    group.add_argument("--keep", type=natural, help="keep this many checkpoints (default 2)")
    group.add_argument(
        "--validate-every",
        type=natural,
        help="steps between two sets of edits to look at (default 500)",
    )
    group.add_argument(
        "--plan", type=natural, metavar="RANKS", help="print the memory that a run needs, and stop"
    )
    group.add_argument(
        "--export", action="store_true", help="write OUT/model from the last checkpoint, and stop"
    )
    return parser
