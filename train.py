"""Train RVEDiT: Algorithm 1 of the paper, which is `training_step`, and the loop around it.

    python train.py                                         # the toy preset on moving shapes, in one process
    torchrun --nproc_per_node 4 train.py --out runs/shapes  # the same on 4 GPUs, or in 4 processes without any
    torchrun --nproc_per_node 8 train.py --preset wan2.2-ti2v-5b --wan DIR --qwen DIR --data FILE...  # the paper's run
    torchrun --nproc_per_node 8 train.py --checkpoint DIR --data FILE...  # likewise, from Kiwi-Edit's weights or ours
    torchrun --nproc_per_node 2 train.py --out runs/shapes --resume       # goes on, on any number of processes

Departures from Algorithm 1, where it is silent or would not match Algorithm 2:
1. "v_t" and "v*_t" are both z_t = (1 - t)·VAE(v*) + t·ε, with u* = ε - VAE(v*); beside it goes VAE(v), then VAE(v*).
2. The depth of line 16 is drawn first, and the reference branch ends there: its other features are never read. It is
   the same for all samples of an optimiser step, because the collectives of all ranks must match.
3. L_fm is a mean (losses.py). A minibatch is split over ranks and accumulation steps; gradients are clipped at norm 1.
4. A triplet without a caption ℓ* has its instruction in that place.
5. The toy preset has nothing pretrained: its MLLM trains whole, by a recipe of its own (`RECIPES`).

What is random is a function of (seed, step, sample), so no random state is saved, and only rounding depends on the
number of ranks. Letters: B clips of a rank, T H W frames, height, width, C T' H' W' those of latents, L blocks.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

import data
import losses
import rvedit
import video
from cli import Parser, fail, number
from muon import Muon, muon_rates
from parallel import shard
from rvedit import RVEDiT, RVEDiTConfig
from sample import edit_video
from shapes import TRAINING_MIX, ShapesDataset
from vae import WanVAE

# What holds where no option says otherwise; the first is §5 and App. D.1, on 8 GPUs. steps None: one epoch;
# warmup: share of the steps in which the rate rises; decay: by a cosine to 0 then; muon: for matrices instead of AdamW,
# at so many times its rate (a quarter of that in the MLLM, whose words the DiT has to keep up with); average: decay of
# the running mean of the weights that is exported; recompute: activations.
RECIPES: dict[str, dict[str, Any]] = {
    "wan2.2-ti2v-5b": dict(size=(81, 704, 1280), batch=1, steps=None, lr=1e-5, timestep_shift=1.0,
                           warmup=0.0, decay=False, muon=0.0, average=0.0, recompute=True),
    "toy": dict(size=(9, 64, 64), batch=16, steps=2000, lr=2e-3, timestep_shift=5.0,
                warmup=0.05, decay=True, muon=5.0, average=0.998, recompute=False),
}  # fmt: skip
CUDA = torch.cuda.is_available()
T_BINS, MAX_BAD_STEPS = (
    5,
    10,
)  # parts of [0, 1] with a flow loss of their own; steps in a row that are not finite

# --- Algorithm 1 ----------------------------------------------------------------------------------


def training_step(
    model: RVEDiT, vae: WanVAE, batch: data.Batch, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines 4-19 of Algorithm 1 for a minibatch on the model's device; depth, from 1 to L, is that of line 16.

    Returns the loss and, without gradients, L_fm of each sample, (B,), and L_align.
    """
    with torch.no_grad():
        videos = map(video.to_float, (batch.source, batch.target))
        source_latents, target_latents = map(
            vae.encode, videos
        )  # (B, 3, T, H, W) in [-1, 1] -> (B, C, T', H', W')
    t = batch.t.view(-1, 1, 1, 1, 1)
    z_t = (1 - t) * target_latents + t * batch.noise

    edit_condition = model.encoder.encode(
        batch.edit_inputs
    )  # lines 5 and 7: X_v, X_ℓ and X_e, in one pass of the MLLM
    edit_contexts = model.contexts(edit_condition)  # line 9, Eq. 3
    velocity, edit_features = model.dit(
        z_t, batch.t, edit_contexts, source_latents, capture=depth
    )  # line 11

    flow = torch.vmap(losses.flow_matching_loss)(
        velocity, batch.noise, target_latents
    )  # line 14, (B,), Eq. 6
    if model.config.align_weight == 0:
        return flow.mean(), flow.detach(), torch.zeros_like(flow[0])

    with torch.no_grad():  # line 12, and lines 5-9 for its branch
        ref_contexts = model.contexts(model.encoder.encode(batch.ref_inputs))
        ref_features = model.dit.features(z_t, batch.t, ref_contexts, target_latents, depth)
    align = losses.alignment_loss(
        edit_features, ref_features, model.config.temperature
    )  # lines 17-18, Eq. 4-5
    total = flow.mean() + model.config.align_weight * align  # line 19, Eq. 6
    return total, flow.detach(), align.detach()


# --- The model: what trains, and how it is spread over the ranks ----------------------------------


def table(model: RVEDiT, vae: WanVAE) -> str:
    """How many parameters of each part train, and how many do not."""
    counts: dict[str, list[int]] = {}
    for name, parameter in (*model.named_parameters(), *vae.named_parameters("vae")):
        part = (
            "lora"
            if ".lora_" in name
            else re.match(r"dit\.source_embedding|encoder(\.qwen)?\.\w+|\w+", name)[0]
        )
        counts.setdefault(part, [0, 0])[not parameter.requires_grad] += parameter.numel()
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [
        f"{part:<28}{trainable:>16,}{frozen:>16,}" for part, (trainable, frozen) in counts.items()
    ]
    note = (
        []
        if model.config.lora_rank
        else ["There is no pretrained Qwen to adapt by LoRA: this one trains whole."]
    )
    return "\n".join([f"{'parameters':<28}{'trainable':>16}{'frozen':>16}", *rows, *note])


def choose_trained(model: RVEDiT, freeze_lora: bool = False) -> None:
    """As in §5, DiT, source embedding, connectors, queries and LoRA train; all, if there is no LoRA (the toy)."""
    trained = r"dit\.|encoder\.queries|encoder\.\w+_connector" + (
        "" if freeze_lora else r"|.*\.lora_"
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.config.lora_rank == 0 or bool(re.match(trained, name)))


def prepare(model: RVEDiT, args: argparse.Namespace, mesh: DeviceMesh | None) -> None:
    """What comes before the weights are loaded."""
    choose_trained(model, args.freeze_lora)
    shard(model, mesh, args.recompute, args.compile)


def with_options(config: RVEDiTConfig, args: argparse.Namespace) -> RVEDiTConfig:
    options = {
        name: getattr(args, name) for name in ("routing_depth", "align_weight", "temperature")
    }
    return dataclasses.replace(
        config, **{name: value for name, value in options.items() if value is not None}
    )


def load_model(
    args: argparse.Namespace, mesh: DeviceMesh | None, device: torch.device
) -> tuple[RVEDiT, WanVAE]:
    """The networks in float32, on the meta device until they are sharded: no rank ever holds the editor whole."""
    before_loading = functools.partial(prepare, args=args, mesh=mesh)
    if args.preset == "toy" and args.checkpoint is None:
        model, vae = rvedit.scratch(args.seed, device, before_loading)
    else:
        model, vae = rvedit.load(args.checkpoint, args.wan, args.qwen, device, shard=before_loading)
    if CUDA and model.config.lora_rank:
        model.encoder.qwen.visual.to(
            torch.bfloat16
        )  # frozen, and outside FSDP; so are the weights that Qwen publishes
    if (
        args.routing_depth is None
        and args.checkpoint
        and rvedit.layout(args.checkpoint) != "rvedit"
    ):
        args.routing_depth = (
            model.config.dit.num_blocks // 2
        )  # Kiwi-Edit's, which is now to learn Eq. 3
    model.config = with_options(model.config, args)
    return model, vae


# --- The run: its checkpoints and its loop --------------------------------------------------------


class Run:
    """What training changes, and where it stands: where its last finished checkpoint does, if it has one."""

    def __init__(
        self, model: RVEDiT, vae: WanVAE, device: torch.device, args: argparse.Namespace
    ) -> None:
        self.model, self.vae, self.device, self.out, self.decay = (
            model,
            vae,
            device,
            args.out,
            args.average,
        )
        self.rank, self.ranks, self.step, self.samples = (
            dist.get_rank(),
            dist.get_world_size(),
            0,
            0,
        )
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rates = muon_rates(self.weights, args.muon) if args.muon else {}
        self.optimizer = Muon(
            [*self.weights.values()], rates, betas=(0.9, 0.999), weight_decay=0.01
        )  # or AdamW
        self.average = (
            {name: p.detach().clone() for name, p in self.weights.items()} if args.average else {}
        )
        for folder in finished(self.out)[-1:]:
            state = self.state()
            try:
                dcp.load(state, checkpoint_id=folder)  # in place
            except dcp.api.CheckpointException:
                raise ValueError(f"{folder} is of another model, or damaged") from None
            self.step, self.samples = state["progress"].tolist()

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Line 20, and the running mean of the weights, short at first so that it forgets the start."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        if self.average:
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(
                list(self.average.values()), list(self.weights.values()), 1 - decay
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, if it has any; afterwards its own are back, bit for bit."""
        for entering in (True, False):
            for name, mean in self.average.items():
                weight, kept = self.weights[name].detach(), mean.clone()
                mean.copy_(weight)
                weight.copy_(kept)
            if entering:
                yield

    def state(self) -> dict[str, Any]:
        """What a training checkpoint holds: all but the frozen weights, which come from where the run started."""
        moments = {name: self.optimizer.state[p] for name, p in self.weights.items()}
        progress = torch.tensor([self.step, self.samples])
        return dict(weights=self.weights, moments=moments, average=self.average, progress=progress)

    def save(self, keep: int) -> None:
        """A distributed checkpoint, which gets its name only when complete; then all but the last `keep` go."""
        partial = self.out / "checkpoints" / "partial"
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        dcp.save(self.state(), checkpoint_id=partial)  # returns when all ranks are done
        if self.rank == 0:
            partial.rename(partial.with_name(f"step-{self.step:08d}"))
            for former in finished(self.out)[:-keep]:
                shutil.rmtree(former)
        dist.barrier()

    def export(self) -> None:
        """Our checkpoint, for sample.py: gathered tensor by tensor on all ranks, written by the first."""
        with self.averaged():
            state = self.model.state_dict().items()
            tensors = (
                (name, t.full_tensor() if isinstance(t, DTensor) else t) for name, t in state
            )
            if self.rank == 0:
                rvedit.save(self.out / "model", self.model, self.vae, tensors)
            for _ in tensors:
                pass
        dist.barrier()

    def validate(self, clips: data.Batches) -> None:
        """Edit four clips or more, each rank its own but all as many; write source, edit and target side by side."""
        with self.averaged():
            for index in range(self.rank, math.ceil(4 / self.ranks) * self.ranks, self.ranks):
                source, instruction, target, _ = clips.fit(
                    index % len(clips.triplets), step=self.step
                )
                clip = torch.cat(
                    (source, edit_video(self.model, self.vae, source, instruction), target), dim=2
                )
                video.write_video(
                    self.out / "validation" / f"step-{self.step:08d}-{index}.mp4", clip
                )


def make_batches(triplets: Dataset, run: Run, args: argparse.Namespace) -> data.Batches:
    return data.Batches(
        triplets,
        run.model.encoder,
        run.model.config,
        sizes=[tuple(args.size)],
        batch=args.batch,
        accumulate=args.accumulate,
        seed=args.seed,
        timestep_shift=args.timestep_shift,
        rank=run.rank,
        ranks=run.ranks,
        first_step=run.step,
        first_sample=run.samples,
        broken_file=run.out / "broken.txt",
    )


def finished(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def compute_gradients(
    run: Run, batches: Iterator[data.Batch], args: argparse.Namespace, stop: list[int]
) -> dict[str, Any]:
    """Lines 3-19 for one optimiser step. Leaves the gradients; returns what is reported, the same on all ranks."""
    config = run.model.config
    depth = int(
        torch.randint(
            1, config.dit.num_blocks + 1, (), generator=data.generator(args.seed, "depth", run.step)
        )
    )
    tally = torch.zeros(4 + 2 * T_BINS, dtype=torch.float64, device=run.device)
    for _ in range(args.accumulate):
        batch = next(batches)
        batch = data.Batch(*(x.to(run.device, non_blocking=True) for x in batch[:4]), *batch[4:])
        total, flow, align = training_step(run.model, run.vae, batch, depth)
        (total / args.accumulate).backward()
        tally[:2] += torch.stack((flow.mean(), align)) / (args.accumulate * run.ranks)
        tally[2] += batch.broken
        bins = F.one_hot(
            (batch.t * T_BINS).long().clamp(max=T_BINS - 1), T_BINS
        ).double()  # (B, T_BINS)
        tally[4:] += torch.cat((flow.double() @ bins, bins.sum(0)))
    tally[3] = len(stop)
    dist.all_reduce(tally)
    flow, align, broken, stopped, *bins = tally.tolist()
    by_t = [
        part / count if count else None
        for part, count in zip(bins[:T_BINS], bins[T_BINS:], strict=True)
    ]
    tokens = batch.noise[0, 0].numel() // math.prod(config.dit.patch_size)  # of a sample
    report = dict(
        step=run.step + 1,
        loss=flow + config.align_weight * align,
        flow=flow,
        align=align,
        flow_by_t=by_t,
    )
    return report | dict(depth=depth, broken=int(broken), stopped=stopped > 0, tokens=tokens)


def train(
    run: Run,
    batches: Iterator[data.Batch],
    validation: data.Batches,
    args: argparse.Namespace,
    stop: list[int],
) -> None:
    """Lines 2-21. Exits with 0 after a signal and 1 after too many bad steps; ValueError for too many broken clips."""
    size = args.batch * args.accumulate * run.ranks  # samples of an optimiser step
    bad = broken = read = 0
    with tqdm(total=args.steps, initial=run.step, unit="step", disable=run.rank > 0) as bar:
        while run.step < args.steps:
            start = time.perf_counter()
            report = compute_gradients(run, batches, args, stop)
            norm = torch.nn.utils.clip_grad_norm_(run.weights.values(), 1.0, foreach=True)
            norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            finite = math.isfinite(report["loss"]) and math.isfinite(norm)  # the same on all ranks
            lr = args.lr * min(1.0, (run.step + 1) / max(1.0, args.warmup * args.steps))
            lr *= (1 + math.cos(math.pi * run.step / args.steps)) / 2 if args.decay else 1
            if finite:
                run.update(lr)
            run.optimizer.zero_grad()
            run.step, run.samples = run.step + 1, run.samples + size
            speed, stopped = size / (time.perf_counter() - start), report.pop("stopped")
            peak = (
                torch.cuda.max_memory_allocated()
                if CUDA
                else getrusage(RUSAGE_SELF).ru_maxrss * 1024
            )
            report |= dict(grad_norm=norm, lr=lr, skipped=not finite, samples_per_s=speed)
            report |= dict(tokens_per_s=speed * report.pop("tokens"), peak_gb=peak / 1e9)
            if run.rank == 0:
                with open(run.out / "log.jsonl", "a", encoding="utf-8") as log:  # JSON knows no NaN
                    log.write(
                        json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None))
                        + "\n"
                    )
            bar.set_postfix(
                {name: f"{x:.3g}" for name, x in report.items() if isinstance(x, float)},
                refresh=False,
            )
            bar.update()
            read, broken, bad = read + size, broken + report["broken"], 0 if finite else bad + 1
            if bad == MAX_BAD_STEPS:
                raise SystemExit(
                    f"error: the loss or its gradient was not finite in {bad} steps in a row"
                )
            if stopped or run.step % args.save_every == 0 or run.step == args.steps:
                run.save(args.keep)
            if stopped:
                raise SystemExit(0)
            if broken >= 20 and broken > args.max_bad * read:  # fewer may be bad luck
                raise ValueError(
                    f"{broken} of {read} clips are broken, see {run.out / 'broken.txt'} and --max-bad"
                )
            if run.step % args.validate_every == 0:
                run.validate(validation)


# --- Command line ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Train RVEDiT. Defaults not given here are the preset's RECIPES.",
        allow_abbrev=False,
    )
    natural, positive = number(int, 1), number(float, 1e-9)
    net = parser.add_argument_group("the model")
    net.add_argument(
        "--preset", choices=RECIPES, help="default: toy, but wan2.2-ti2v-5b with --data or --wan"
    )
    net.add_argument(
        "--checkpoint", type=Path, help="to start from: a folder of ours or Kiwi-Edit's"
    )
    net.add_argument(
        "--wan", type=Path, help="folder of Wan2.2-TI2V-5B, to start from without a checkpoint"
    )
    net.add_argument("--qwen", type=Path, help="folder of Qwen2.5-VL-3B-Instruct, likewise")
    net.add_argument(
        "--routing-depth",
        type=number(int, 0),
        help="L_s, in blocks; default: the model's, or half of L",
    )
    net.add_argument(
        "--freeze-lora",
        action="store_true",
        help="as in App. D.1; by default it trains, as in Alg. 1",
    )
    loss = parser.add_argument_group("the loss")
    loss.add_argument(
        "--align-weight", type=number(float, 0), help="λ of Eq. 6; default: the model's, 0.75"
    )
    loss.add_argument("--temperature", type=positive, help="τ of Eq. 5; default: the model's, 0.07")
    loss.add_argument(
        "--timestep-shift", type=positive, help="of t towards noise; 1 is Algorithm 1's uniform t"
    )
    clips = parser.add_argument_group("the clips")
    clips.add_argument(
        "--data",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=".csv or .jsonl; default: moving shapes",
    )
    clips.add_argument(
        "--size",
        nargs=3,
        type=natural,
        metavar=tuple("THW"),
        help="to crop to: 4k + 1 frames, pixels",
    )
    clips.add_argument(
        "--max-bad",
        type=number(float, 0, 1),
        default=0.01,
        help="broken share allowed (default 0.01)",
    )
    clips.add_argument(
        "--workers",
        type=number(int, 0),
        default=2,
        help="processes a rank that read them (default 2)",
    )
    opt = parser.add_argument_group("optimisation")
    opt.add_argument(
        "--steps", type=natural, help="of the optimiser, from the start of the run; None: one epoch"
    )
    opt.add_argument("--batch", type=natural, help="clips a rank in each forward pass")
    opt.add_argument(
        "--accumulate", type=natural, default=1, help="passes to an optimiser step (default 1)"
    )
    opt.add_argument("--lr", type=positive, help="AdamW's rate at its highest")
    opt.add_argument(
        "--seed", type=number(int, 0), default=0, help="of all that is random (default 0)"
    )
    opt.add_argument("--compile", action="store_true", help="torch.compile, block by block")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--out", type=Path, default=Path("runs/train"), help="its folder (default runs/train)"
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUT, with its options",
    )
    run.add_argument(
        "--save-every", type=natural, default=500, help="steps between checkpoints (default 500)"
    )
    run.add_argument("--keep", type=natural, default=2, help="so many last checkpoints (default 2)")
    run.add_argument(
        "--validate-every",
        type=natural,
        default=500,
        help="steps between edits to look at (default 500)",
    )
    run.add_argument(
        "--plan",
        type=natural,
        metavar="RANKS",
        help="print the memory of a run on so many, and stop",
    )
    run.add_argument(
        "--export", action="store_true", help="write OUT/model from the last checkpoint, and stop"
    )
    args = parser.parse_args(argv)
    preset = args.preset or ("wan2.2-ti2v-5b" if args.data or args.wan else "toy")
    parser.set_defaults(**RECIPES[preset], preset=preset)
    if (args.resume or args.export) and (args.out / "run.json").is_file():
        parser.set_defaults(**json.loads((args.out / "run.json").read_text()))
    args = parser.parse_args(argv)
    if args.preset != "toy" and not args.data and not args.plan:
        fail(f"--preset {args.preset} needs --data FILE: triplets of videos and instructions")
    return args


def launch(args: argparse.Namespace, device: torch.device, stop: list[int]) -> None:
    """From the options to the exported checkpoint."""
    ranks, rank, former = dist.get_world_size(), dist.get_rank(), finished(args.out)
    if former and not (args.resume or args.export):
        raise ValueError(
            f"{args.out} holds a run: add --resume to go on with it, or give another --out"
        )
    if args.export and not former:
        raise ValueError(f"{args.out} holds no training checkpoint to export")
    # One process without a GPU has nothing to shard and no second precision.
    mesh = init_device_mesh(device.type, (ranks,)) if CUDA or ranks > 1 else None
    model, vae = load_model(args, mesh, device)
    if args.data:
        triplets = validation = ConcatDataset(
            [data.TripletDataset(f, max_frames=args.size[0]) for f in args.data]
        )
    else:
        triplets, validation = (
            ShapesDataset(args.seed + i, 1_000_000, *args.size, TRAINING_MIX) for i in range(2)
        )
    args.steps = args.steps or max(1, len(triplets) // (args.batch * args.accumulate * ranks))
    run = Run(model, vae, device, args)
    if rank == 0:
        print(table(model, vae), flush=True)
        (args.out / "validation").mkdir(parents=True, exist_ok=True)
        options, log = vars(args) | {"resume": False, "export": False}, args.out / "log.jsonl"
        options = json.dumps(options, default=str, indent=1)
        lines = (
            log.read_text().splitlines(keepends=True) if log.exists() else []
        )  # one for each step
        for name, text in (
            ("run.json", options),
            ("log.jsonl", "".join(lines[: run.step])),
        ):  # complete or not at all
            (args.out / "new").write_text(text)
            (args.out / "new").replace(args.out / name)
    dist.barrier()
    if not args.export:
        keys = (
            (step, micro)
            for step in range(run.step, args.steps)
            for micro in range(args.accumulate)
        )
        loading = dict(
            num_workers=args.workers, multiprocessing_context="fork" if args.workers else None
        )
        loading |= dict(
            pin_memory=CUDA, generator=torch.Generator()
        )  # of its own, not the global one
        # A signal to all processes of a job must not take away the workers before the step and the checkpoint are done.
        loading |= dict(worker_init_fn=lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN))
        # After an error that nobody foresaw, Python would wait for ever for what it ends by that signal.
        atexit.register(lambda: [worker.kill() for worker in multiprocessing.active_children()])
        batches = DataLoader(
            make_batches(triplets, run, args), batch_size=None, sampler=keys, **loading
        )
        train(run, iter(batches), make_batches(validation, run, args), args, stop)
    run.export()


def main(argv: list[str] | None = None) -> None:
    args, stop = parse_arguments(argv), []
    if args.plan:
        from experiments import plan  # which imports this file

        return plan.main(args)
    # A handler only takes a note: all ranks agree on stopping at the end of a step.
    former = {
        kind: signal.signal(kind, lambda *_: stop.append(1))
        for kind in (signal.SIGTERM, signal.SIGINT)
    }
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
    )
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    if CUDA:
        if device.index >= torch.cuda.device_count():
            fail(
                f"this machine has no GPU for its rank {device.index}: give a smaller --nproc_per_node"
            )
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo_on_one_thread", **alone)
    try:
        launch(args, device, stop)
    except torch.OutOfMemoryError:
        fail(
            f"out of memory on {device}: take more GPUs, a smaller --batch, or smaller or shorter clips"
        )
    except (
        dcp.api.CheckpointException
    ) as error:  # a BaseException, whose message is a traceback for each rank
        cause, _ = next(iter(error.failures.values()))
        fail(
            f"the checkpoint of this step cannot be written to {args.out}: {cause}".splitlines()[0]
        )
    except (ValueError, OSError) as error:
        fail(
            str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        )  # those of a reader end a traceback
    finally:
        # A rank that failed must not wait here for those that wait for it elsewhere: torchrun would not see it end.
        if alone or not getattr(
            error := sys.exc_info()[1], "code", error
        ):  # all stop alike with SystemExit(0)
            dist.destroy_process_group()
        for kind, handler in former.items():
            signal.signal(kind, handler)


if __name__ == "__main__":
    main()
