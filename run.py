"""What surrounds a training run: its state and checkpoints, its folder, and its worker processes.

OUT, the folder of a run, holds

    run.json      its options, with which `--resume` continues
    log.jsonl     a line for each optimiser step
    checkpoints/  all that `--resume` needs, for the last steps that were saved
    validation/   source, edit and target side by side, in videos
    broken.txt    triplets that were skipped, and why
    model/        at the end, the checkpoint that sample.py takes

The training itself, Algorithm 1, is in train.py.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import itertools
import json
import math
import multiprocessing
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Listener
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import cli
import data
import parallel
import rvedit
import video
import weights
from rvedit import RVEDiT, RVEDiTConfig
from sample import edit_video
from vae import WanVAE

PREFETCH = 2  # minibatches that each worker process reads ahead
# Not in run.json: what to do with a run, and what is no option but part of the preset's recipe.
NOT_SAVED = {"out", "resume", "plan", "export", "warmup", "decay", "muon", "average", "recompute"}

# --- State and checkpoints ------------------------------------------------------------------------


def samples_per_pass(args: argparse.Namespace) -> int:
    """Samples that all ranks together pass forward at once; a step makes --accumulate passes."""
    return args.batch * (dist.get_world_size() // args.sequence_parallel)


def samples_per_step(args: argparse.Namespace) -> int:
    """Samples of an optimiser step, over all ranks."""
    return args.accumulate * samples_per_pass(args)


def trainable(model: RVEDiT) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Run:
    """What training changes, and how far it is. Goes on from the last checkpoint in OUT, if any."""

    def __init__(
        self,
        model: RVEDiT,
        vae: WanVAE,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        args: argparse.Namespace,
    ) -> None:
        self.model = model
        self.vae = vae
        self.device = device
        self.out = args.out
        self.rank = dist.get_rank()
        self.ranks = dist.get_world_size()
        self.ranks_per_clip = args.sequence_parallel
        self.groups = self.ranks // self.ranks_per_clip  # of ranks that share their clips
        self.group = self.rank // self.ranks_per_clip
        self.step = 0  # optimiser steps done
        self.samples = 0  # samples trained on, over all ranks
        self.weights = trainable(model)
        self.optimizer = optimizer
        self.average_decay = args.average
        self.average: dict[str, Tensor] = {}
        if args.average:
            self.average = {name: p.detach().clone() for name, p in self.weights.items()}
        # Of rank 0: other nodes may not see yet what was written last.
        checkpoints = parallel.from_first_rank(finished(self.out))
        if checkpoints:
            self.load(checkpoints[-1])
        self.keep = args.keep  # so many checkpoints stay
        self.saved = self.step  # the step of the last one

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """One step of the optimiser, and of the running mean of the weights if there is one."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.average:
            # A shorter mean in the first steps forgets the initial weights.
            decay = min(self.average_decay, (1 + self.step) / (10 + self.step))
            means, weights = list(self.average.values()), list(self.weights.values())
            torch._foreach_lerp_(means, weights, 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the model has its averaged weights, if there are any."""
        self.swap_averages()
        yield
        self.swap_averages()

    def swap_averages(self) -> None:
        """Exchange the weights and their running means, bit for bit."""
        for name, mean in self.average.items():
            weight = self.weights[name].detach()
            kept = mean.clone()
            mean.copy_(weight)
            weight.copy_(kept)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a training checkpoint. Frozen weights are not among them: --resume reads
        those from where the run started."""
        state = {
            "progress": {"step": torch.tensor(self.step), "samples": torch.tensor(self.samples)},
            "weights": self.weights,
        }
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            state[moment] = {n: self.optimizer.state[p][moment] for n, p in self.weights.items()}
        if self.average:
            state["average"] = self.average
        return state

    def load(self, checkpoint: Path) -> None:
        """Continue from a training checkpoint, written by any number of ranks."""
        state = self.state()
        parallel.read_shards(checkpoint, state)  # in place
        self.step = int(state["progress"]["step"])
        self.samples = int(state["progress"]["samples"])

    def save(self) -> None:
        """Write a training checkpoint, and delete all but the last `keep`.

        It gets its final name when it is complete, so a kill at any time loses none.
        """
        folder = self.out / "checkpoints" / f"step-{self.step:08d}"
        state = self.state()
        try:
            replacing = cli.replacing(folder) if self.rank == 0 else contextlib.nullcontext()
            with replacing as partial:
                if self.rank == 0:
                    # Not by all at once: some shared file systems then fail on some of them.
                    partial.mkdir(parents=True)
                parallel.write_shards(parallel.from_first_rank(partial), state)
        except (OSError, dcp.api.CheckpointException) as error:
            self.fail_to_write(folder, error, state.values())
        self.saved = self.step
        if self.rank == 0:
            for former in finished(self.out)[: -self.keep]:
                remove(former)
        dist.barrier()

    def save_progress(self) -> None:
        """Save what the last checkpoint lacks, before an error that all ranks raise."""
        if self.step > self.saved:
            self.save()

    def read(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function reads; if it fails on any rank, the run ends on all of them."""
        result = problem = None
        try:
            result = function(*args, **kwargs)
        except (ValueError, OSError) as error:
            problem = cli.plain_reason(error)
        # All ranks have to know: they would wait for this one in their next collective. They say so
        # by their CPUs, because GPUs may still be at work on the minibatch before.
        if parallel.any_rank([problem is not None], torch.device("cpu"))[0]:
            self.save_progress()
            parallel.fail_together(problem)
        return result

    def check_same_clips(self, broken: int) -> None:
        """End all ranks if some of those that share clips have replaced what others could read.

        broken: how many clips this rank has replaced. To be called before any of them is computed
        with: ranks with clips of different sizes would wait for each other, or crash.
        """
        if self.ranks_per_clip == 1:
            return
        counts = parallel.from_all_ranks(broken)
        for first in range(0, self.ranks, self.ranks_per_clip):
            if len({*counts[first : first + self.ranks_per_clip]}) > 1:
                self.save_progress()
                parallel.fail_together(
                    "a clip could be read by some of the ranks that share it, and not by others: "
                    f"see {self.out / 'broken.txt'}, and go on with --resume"
                )

    def export(self) -> None:
        """Write OUT/model, a checkpoint for sample.py."""
        with self.averaged():
            tensors = self.whole_tensors()
            if self.rank == 0:
                try:
                    rvedit.save(self.out / "model", self.model, self.vae, tensors)
                except OSError as error:
                    parts = (self.model.state_dict(), self.vae.state_dict())
                    self.fail_to_write(self.out / "model", error, parts)
            for _ in tensors:  # the other ranks only take part in gathering
                pass
        dist.barrier()

    def fail_to_write(
        self, path: Path, error: BaseException, groups: Iterable[dict[str, Tensor]]
    ) -> NoReturn:
        """End the run, usually because the disk is full: say how much room `path` needs."""
        if self.rank > 0:
            raise SystemExit(2)  # rank 0 prints the message
        if isinstance(error, dcp.api.CheckpointException):
            error, _ = next(iter(error.failures.values()))
        said = str(error).removeprefix(f"{path} cannot be written: ")
        reason = getattr(error, "strerror", None) or said
        needed, free = gigabytes(groups), shutil.disk_usage(self.out).free / 1e9
        checkpoints = finished(self.out)
        kept = f"{checkpoints[-1]} is whole" if checkpoints else "There is no earlier checkpoint"
        raise cli.Stop(
            f"{path} cannot be written: {reason} (it needs {needed:.3g} GB, {free:.3g} GB are "
            f"free). {kept}: make room and continue with --resume"
        )

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of the model's tensors, gathered one at a time on all ranks at once."""
        for name, tensor in self.model.state_dict().items():
            yield name, parallel.whole(tensor)

    def validate(self, clips: data.Batches) -> None:
        """Edit at least four clips, and write source, edit and target side by side.

        Each group of ranks edits other clips, but all of them equally many: FSDP's gathers are
        collective.
        """
        clips_per_group = math.ceil(4 / self.groups)
        for number in range(clips_per_group):
            index = number * self.groups + self.group
            place = index % len(clips.triplets)
            triplet, broken = self.read(clips.next_good, place, self.step)
            self.check_same_clips(broken)
            with self.averaged():
                edit = edit_video(self.model, self.vae, triplet.source, triplet.instruction)
                side_by_side = torch.cat((triplet.source, edit, triplet.target), dim=2)
                name = f"step-{self.step:08d}-{index}.mp4"
                if self.rank % self.ranks_per_clip == 0:  # the first of its group
                    video.write_video(self.out / "validation" / name, side_by_side)


def gigabytes(groups: Iterable[dict[str, Tensor]]) -> float:
    """The size of all tensors, over all ranks."""
    return sum(t.numel() * t.element_size() for group in groups for t in group.values()) / 1e9


def remove(folder: Path) -> None:
    """Delete a folder that is no longer needed. If it stays, that costs room but ends no run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        cli.note(f"{folder} stays, it cannot be deleted: {error.strerror or error}")


def finished(out: Path) -> list[Path]:
    """The training checkpoints of a run, the newest last."""
    folders = (out / "checkpoints").glob("step-*")
    return sorted(folder for folder in folders if re.fullmatch(r"step-\d{8,}", folder.name))


# --- The folder -----------------------------------------------------------------------------------


def check_out(args: argparse.Namespace) -> None:
    """Find out whether OUT is what the options take it for, before anything is loaded."""
    out, model, log = args.out, args.out / "model", args.out / "log.jsonl"
    rvedit.check_replaceable(model)
    checkpoints = finished(out)
    steps = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
    if args.export and not checkpoints:
        raise ValueError(f"{out} holds no training checkpoint to export")
    if model.exists() and not checkpoints:
        raise ValueError(
            f"{model} would be replaced, and it has no checkpoint to go on from: give another "
            f"--out, and --checkpoint {model} to train it further"
        )
    if (checkpoints or steps) and not (args.resume or args.export):
        raise ValueError(f"{out} holds a run: add --resume to go on with it, or give another --out")
    if steps and not checkpoints:
        # With so many steps and no more, it may be the first checkpoint that could not be written.
        if steps > read_run(out)["options"].get("save_every", args.save_every):
            raise ValueError(
                f"{log} has {steps} steps, and their checkpoints are gone: bring them back to "
                f"{out / 'checkpoints'}, or give another --out"
            )
        cli.note(f"the run in {out} was ended before its first checkpoint, and begins again")
    out.mkdir(parents=True, exist_ok=True)


def lock_out(out: Path) -> IO[str]:
    """Take OUT for this run, until the process ends in whatever way.

    Raises ValueError if another run has it. Unlike `flock`, this lock is not inherited by the
    processes that read clips, which may outlive a run that was killed by some seconds.
    """
    lock = open(out / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"another run writes to {out}: give another --out; if its machine has crashed, delete "
            f"{out / '.lock'}"
        ) from None
    except OSError as error:
        cli.note(f"{out} cannot be locked ({error.strerror}): start one run only")
    # Left by a run that was killed while it wrote a checkpoint.
    for partial in (out / "checkpoints").glob(".partial-*"):
        remove(partial)
    return lock


def saved_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a run takes up again with `--resume`, from whatever folder that is given."""
    options = {}
    for name, value in vars(args).items():
        if isinstance(value, Path):
            value = value.absolute()
        if name == "data" and value:
            value = [table.absolute() for table in value]
        if name not in NOT_SAVED:
            options[name] = value
    return options


def begin_log(run: Run, args: argparse.Namespace) -> None:
    """Write run.json, which --resume reads, and cut log.jsonl at the run's step.

    A run that was killed may have logged steps after its last checkpoint, which are done again.
    """
    (run.out / "validation").mkdir(exist_ok=True)
    # Said now and not after hours. While a checkpoint is written, there is one more than stay.
    needed = (run.keep + 1 - len(finished(run.out))) * gigabytes(run.state().values())
    free = shutil.disk_usage(run.out).free / 1e9
    if free < needed:
        cli.note(f"{run.out} has {free:.3g} GB left, and its checkpoints will take {needed:.3g}")
    description = dict(
        options=saved_options(args),
        samples_per_step=samples_per_step(args),
        tables=dict(sha256=data.fingerprint(args.data)) if args.data else None,
    )
    cli.write_text(run.out / "run.json", json.dumps(description, default=str, indent=1))
    log = run.out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    cli.write_text(log, "".join(lines[: run.step]))


def peak_memory() -> int:
    """Bytes that this process held at most: of the GPU's memory, if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_log(out: Path, report: dict[str, Any]) -> None:
    """Add a line to log.jsonl, with null for numbers that are not finite: JSON has none."""
    line = json.loads(json.dumps(report), parse_constant=lambda name: None)
    file = out / "log.jsonl"
    try:
        with open(file, "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    except OSError as error:  # which names no file
        raise OSError(f"{file} cannot be written: {error.strerror}") from None


class Bar(tqdm):
    """A progress bar. That nobody can read it, or its log's disk is full, does not end the run."""

    def display(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(OSError):
            super().display(*args, **kwargs)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


# --- A run that goes on ---------------------------------------------------------------------------


class SavedOptions(cli.Parser):
    """Reads the options of run.json, which the user has not typed."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def read_run(out: Path) -> dict[str, Any]:
    """The run.json that `begin_log` writes. ValueError if OUT holds no run, or a damaged one."""
    file = out / "run.json"
    if not file.is_file():
        raise ValueError(f"{out} holds no run to resume or export: it has no run.json")
    run = weights.read_json(file)
    try:
        # Parsed again, so that a damaged value is found now and not in the middle of the run.
        parser = cli.train_parser(SavedOptions)
        run["options"] = vars(parser.parse_args(as_words(run["options"])))
        run["samples_per_step"] = int(run["samples_per_step"])
        run["tables"] = run["tables"] and run["tables"]["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged or of an earlier version ({error}): give another --out"
        ) from None
    return run


def as_words(options: dict[str, Any]) -> list[str]:
    """The options as they would be given on the command line."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif name == "compile":
            words.append("--no-compile")
        elif name == "size":
            for size in value:
                words += [flag, *map(str, size)]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words


def resumed_accumulation(args: argparse.Namespace) -> int:
    """The accumulation steps with which an optimiser step has as many samples as before.

    They take the place of --accumulate, with a note if that is another number.
    Raises ValueError if there is none, or if the tables are not those of the run.
    """
    former = read_run(args.out)
    if args.data and data.fingerprint(args.data) != former["tables"]:
        files = ", ".join(str(file) for file in args.data)
        raise ValueError(
            f"{files} changed since the run began, so its clips would come in another order: "
            f"restore it, or start a new run with --checkpoint {args.out / 'model'}"
        )
    samples = former["samples_per_step"]
    in_a_pass = samples_per_pass(args)
    if samples % in_a_pass:
        raise ValueError(
            f"the run in {args.out} has {samples} samples in an optimiser step, which "
            f"{dist.get_world_size()} processes with --batch {args.batch} cannot make: change "
            "--batch, --sequence-parallel or the number of processes"
        )
    accumulate = samples // in_a_pass
    if accumulate != args.accumulate:
        cli.note(f"an optimiser step keeps its {samples} clips, by --accumulate {accumulate}")
    return accumulate


# --- Worker processes -----------------------------------------------------------------------------


def check_workers(config: RVEDiTConfig, args: argparse.Namespace) -> None:
    """Raise ValueError if worker processes could not hand minibatches over: a run would hang.

    They do so through /dev/shm, of which Docker gives a container 64 MB, and by sockets in TMPDIR,
    whose paths may have about 100 characters.
    """
    if not args.workers:
        return
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise ValueError(
            f"--workers {args.workers}: no socket can be made for them ({error}): set TMPDIR to a "
            "folder that can be written to and has a short path, or give --workers 0"
        ) from None

    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    T, H, W = max(args.size, key=math.prod)
    clip = 0 if args.latents else T * H * W * 3
    mllm_frames = min(T, config.max_mllm_frames) * config.max_mllm_pixels * 3 * 4  # float32
    minibatch = args.batch * 2 * (clip + mllm_frames)  # source and target
    needed = parallel.ranks_per_node() * args.workers * PREFETCH * minibatch
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e9:.3g} GB left, and the minibatches in flight take up to "
            f"{needed / 1e9:.3g} GB: enlarge it (docker run --shm-size), or give fewer --workers; "
            "--workers 0 needs none"
        )


def load_in_workers(
    batches: data.Batches, run: Run, args: argparse.Namespace
) -> Iterator[data.Batch]:
    """The minibatches that are left to train on, made by worker processes."""
    keys = list(itertools.product(range(run.step, args.steps), range(args.accumulate)))
    loader = DataLoader(
        batches,
        batch_size=None,  # an item is a minibatch already
        sampler=keys,
        num_workers=args.workers,
        prefetch_factor=PREFETCH if args.workers else None,
        multiprocessing_context="fork" if args.workers else None,
        worker_init_fn=ignore_signals,
        pin_memory=run.device.type == "cuda",
        generator=torch.Generator(),  # else it would draw from the global one
    )
    # Workers ignore SIGTERM, by which Python ends them at exit and then waits for them: after an
    # error that nobody foresaw it would wait for ever.
    atexit.register(kill_workers)
    try:
        yield from loader
    except (ValueError, OSError) as error:
        # One from a worker has the worker's whole traceback before its own message.
        message = str(error).strip().splitlines()[-1]
        raise ValueError(message.removeprefix("ValueError: ")) from None


def ignore_signals(worker: int) -> None:
    """A signal to all processes of a job must not end the workers before the step is done."""
    signal.set_wakeup_fd(-1)  # that of the main process, see `parallel.Signals`
    for kind in (*parallel.Signals.STOP, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)


def kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler calls their end an error
    for worker in multiprocessing.active_children():
        worker.kill()
