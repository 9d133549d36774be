"""Train RVEDiT: `training_step` is Algorithm 1 of the paper, `train` is the loop around it.

    python train.py                                         # the toy preset on moving shapes
    torchrun --nproc_per_node 4 train.py --out runs/shapes  # the same on 4 GPUs, or 4 CPU processes
    torchrun --nproc_per_node 8 train.py --preset wan2.2-ti2v-5b --wan DIR --qwen DIR --data FILE...
                                                            # the paper's run, from the base models
    torchrun --nproc_per_node 8 train.py --checkpoint DIR --data FILE...
                                                            # from Kiwi-Edit's weights, or from ours
    torchrun --nproc_per_node 2 train.py --out runs/shapes --resume
                                                            # continue, on any number of processes
    torchrun --nproc_per_node 8 train.py --checkpoint DIR --data FILE... --out DIR --resume
                                                            # begin or continue, in a batch script
    torchrun --nproc_per_node 8 train.py --sequence-parallel 4 --size 121 704 1280 --batch 1 ...
                                                            # long clips, each shared by 4 GPUs

Lines of Algorithm 1 are numbered as in arXiv's HTML, where line 1 has the inputs. Departures from
it, where it is silent or would not match Algorithm 2:
1. Its "v_t" and "v*_t" are both z_t = (1 - t)·VAE(v*) + t·ε, and its u* is ε - VAE(v*). The editing
   branch sees VAE(v) beside z_t, the reference branch VAE(v*).
2. The depth of line 16 is drawn before the forward passes, so that the reference branch can stop at
   that block: its other features are never used. All ranks and all samples of an optimiser step
   share one depth, because FSDP's collectives must match on all ranks.
3. L_fm is a mean, not a sum (losses.py). A minibatch is split over ranks and accumulation steps.
   The gradient is clipped at norm 1.
4. In a triplet without a caption ℓ* its instruction ℓ takes that place. A table without any
   caption is refused, unless --caption-fallback allows it.
5. The toy preset has no pretrained MLLM to adapt. It trains all weights, by a recipe of its own.

Everything random is a function of (seed, step, sample), so checkpoints hold no random state, and
another number of ranks changes the result by rounding only.

Shape letters: B clips of a rank; T, H, W frames, height and width of a clip; C, T', H', W' channels
and sides of its latents; L blocks of the DiT.
"""

from __future__ import annotations

import cli

if __name__ == "__main__":
    cli.begin()

import argparse
import dataclasses
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import ConcatDataset, Dataset

import data
import losses
import parallel
import rvedit
import sequence
from muon import Muon, muon_rates
from run import (
    Bar,
    Run,
    begin_log,
    check_out,
    check_workers,
    load_in_workers,
    lock_out,
    peak_memory,
    read_run,
    resumed_accumulation,
    samples_per_step,
    trainable,
    write_log,
)
from rvedit import RVEDiT, RVEDiTConfig
from shapes import training_set
from vae import WanVAE

# --- Recipes --------------------------------------------------------------------------------------

# Defaults that depend on the preset. Most are options of the command line, see `cli.train_parser`.
RECIPES: dict[str, dict[str, Any]] = {
    # The paper's run (§5, App. D.1) on 8 GPUs. What it leaves open is in the README's table.
    "wan2.2-ti2v-5b": dict(
        size=[(81, 704, 1280)],  # T, H, W; 720 is no multiple of 32, 704 is
        batch=1,  # clips of a rank in a forward pass
        steps=None,  # as many as one epoch has
        lr=1e-5,  # AdamW, at a constant rate
        timestep_shift=1.0,  # t is uniform, as in line 3
        warmup=0.0,
        decay=False,
        muon=0.0,
        average=0.0,
        recompute=True,  # activations, see parallel.py
    ),
    # Found by experiments on the toy preset (RESULTS.md); it starts from random weights.
    "toy": dict(
        size=[(9, 64, 64)],
        batch=16,
        steps=2000,
        lr=2e-3,
        timestep_shift=5.0,  # moves t towards noise
        warmup=0.05,  # share of the steps in which the rate rises from 0
        decay=True,  # afterwards the rate falls to 0 along a cosine
        muon=5.0,  # matrices are trained by Muon, at this multiple of the rate
        average=0.998,  # export a running mean of the weights, with this decay
        recompute=False,
    ),
}

NUM_T_BINS = 5  # the flow loss is also logged for each fifth of t in [0, 1]
MAX_BAD_STEPS = 10  # so many steps in a row may have a loss or a gradient that is not finite

# --- Algorithm 1 ----------------------------------------------------------------------------------


def training_step(
    model: RVEDiT, vae: WanVAE, batch: data.Batch, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1, lines 4-19: the loss of one minibatch.

    batch: (v, ℓ, v*, ℓ*), t and ε of line 3, on the model's device. depth: the ℓ_idx of line 16,
    from 1 to L. Returns L (a scalar), and without gradients L_fm of each sample (B,) and L_align.
    """
    # The VAE is frozen: its latents are data. With --latents they were encoded before.
    with torch.no_grad():
        source_latents = data.latents_of(vae, batch.source)  # VAE(v), (B, C, T', H', W')
        target_latents = data.latents_of(vae, batch.target)  # VAE(v*)
    # z_t lies on the straight line from the target's latents (t = 0) to the noise (t = 1).
    t = batch.t.view(-1, 1, 1, 1, 1)  # beside (B, C, T', H', W')
    z_t = (1 - t) * target_latents + t * batch.noise

    # Lines 5 and 7, editing branch: one pass of the MLLM gives X_v, X_ℓ and X_e of (v, ℓ).
    edit_condition = model.encoder.encode(batch.edit_inputs)

    # Line 9, Eq. 3: C^(l) is X_e up to block L_s, then [X_e; X_v; X_ℓ].
    edit_contexts = model.contexts(edit_condition)

    # Line 11: the velocity û, and the cross-attention features A^(l) at the drawn depth. The DiT
    # sees the source beside z_t, so that it can keep what the edit does not touch.
    velocity, edit_features = model.dit(z_t, batch.t, edit_contexts, source_latents, capture=depth)

    # Line 14: L_fm of each sample, so that it can be logged by t.
    flow = torch.vmap(losses.flow_matching_loss)(velocity, batch.noise, target_latents)  # (B,)

    # The paper's "w/o RAAA": without alignment the reference branch has nothing to do.
    if model.config.align_weight == 0:
        return flow.mean(), flow.detach(), torch.zeros_like(flow[0])

    # Lines 5-9 and 12, reference branch: the same weights read (v*, ℓ*), without gradients. It is
    # shown the finished edit, in clip and words, so its attention is where a good edit's should be.
    with torch.no_grad():
        ref_condition = model.encoder.encode(batch.ref_inputs)
        ref_contexts = model.contexts(ref_condition)
        ref_features = model.dit.features(z_t, batch.t, ref_contexts, target_latents, depth)

    # Lines 17-18, Eq. 4-5: normalise both features, symmetric InfoNCE between them. A position of
    # one branch has to find itself among all positions of the other.
    align = losses.alignment_loss(edit_features, ref_features, model.config.temperature)

    # Line 19, Eq. 6. What λ means depends on L_fm being a mean: see the README's table.
    total = flow.mean() + model.config.align_weight * align
    return total, flow.detach(), align.detach()


def compute_gradients(
    run: Run, minibatches: Iterable[data.Batch], args: argparse.Namespace
) -> dict[str, Any]:
    """Algorithm 1, lines 3-19, for one optimiser step: the gradients of all its samples.

    minibatches: one for each accumulation step. Leaves the gradients in `.grad`, and returns what
    is logged about the step, the same on all ranks. Ends all of them if ranks that share clips have
    not read the same ones.
    """
    config = run.model.config

    # Line 16: ℓ_idx ~ U{1, ..., L}, drawn from (seed, step), so that it is the same on all ranks.
    random = data.generator(args.seed, "depth", run.step)
    depth = int(torch.randint(1, config.dit.num_blocks + 1, (), generator=random))

    # Sums in float64 of what is logged, over all samples of the step.
    flow_mean, align_mean, num_tokens, num_broken = torch.zeros(
        4, dtype=torch.float64, device=run.device
    )
    flow_by_t, count_by_t = torch.zeros(2, NUM_T_BINS, dtype=torch.float64, device=run.device)

    # Line 3: each minibatch (v, ℓ, v*, ℓ*) comes with its t ~ U[0, 1] and ε ~ N(0, I).
    for batch in minibatches:
        run.check_same_clips(batch.broken)
        batch = to_device(batch, run.device)

        # Lines 4-19. Gradients add up over the passes, and FSDP averages them over the ranks. With
        # --sequence-parallel that is right as well: see `sequence.Tokens`.
        total, flow, align = training_step(run.model, run.vae, batch, depth)
        (total / args.accumulate).backward()

        # What is logged: means over all passes and ranks, and the flow loss by t, because a loss at
        # one t says little about one at another.
        share = args.accumulate * run.ranks
        flow_mean += flow.mean() / share
        align_mean += align / share
        num_tokens += batch.noise[:, 0].numel() // math.prod(config.dit.patch_size)  # B · S
        num_broken += batch.broken
        bins = (batch.t * NUM_T_BINS).long().clamp(max=NUM_T_BINS - 1)  # (B,)
        one_hot = F.one_hot(bins, NUM_T_BINS).double()  # (B, NUM_T_BINS)
        flow_by_t += flow.double() @ one_hot
        count_by_t += one_hot.sum(0)

    # One collective for all sums: on many GPUs each has a price, whatever its size.
    sums = torch.stack((flow_mean, align_mean, num_tokens, num_broken))
    sums = torch.cat((sums, flow_by_t, count_by_t))
    dist.all_reduce(sums)
    flow_mean, align_mean, num_tokens, num_broken = sums[:4].tolist()
    flow_by_t, count_by_t = sums[4:].view(2, NUM_T_BINS).tolist()
    return dict(
        step=run.step + 1,
        loss=flow_mean + config.align_weight * align_mean,
        flow=flow_mean,
        align=align_mean,
        flow_by_t=[x / n if n else None for x, n in zip(flow_by_t, count_by_t, strict=True)],
        depth=depth,
        broken=int(num_broken) // run.ranks_per_clip,
        tokens=int(num_tokens) // run.ranks_per_clip,  # of all samples
    )


def to_device(batch: data.Batch, device: torch.device) -> data.Batch:
    """Copy the batch's clips, t and noise; the MLLM's inputs are copied by `EditEncoder.encode`."""
    return batch._replace(
        source=batch.source.to(device, non_blocking=True),
        target=batch.target.to(device, non_blocking=True),
        t=batch.t.to(device, non_blocking=True),
        noise=batch.noise.to(device, non_blocking=True),
    )


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The rate of a step, counted from 0. The paper's is constant."""
    lr = args.lr  # the paper's recipe ends here: no warm-up, no decay
    # 1) It rises linearly in the first steps.
    warmup_steps = max(1.0, args.warmup * args.steps)
    lr *= min(1.0, (step + 1) / warmup_steps)
    # 2) It falls to 0 along half a cosine over the whole run.
    if args.decay:
        lr *= (1 + math.cos(math.pi * step / args.steps)) / 2
    return lr


def train(
    run: Run,
    batches: Iterator[data.Batch],
    validation: data.Batches,
    args: argparse.Namespace,
    signals: parallel.Signals,
) -> None:
    """Algorithm 1, lines 2-21: all optimiser steps that are left to do.

    Raises SystemExit(0) after a signal and ValueError if too many clips are broken, both when the
    state is saved; ValueError too if too many steps in a row were not finite.
    """
    num_samples = samples_per_step(args)
    num_read = num_broken = bad_steps = 0
    if run.rank == 0:
        left = max(0, args.steps - run.step)
        print(f"{left:,} steps to go, each of {num_samples} clips", flush=True)
    with Bar(total=args.steps, initial=run.step, unit="step", disable=run.rank > 0) as bar:
        # Line 2: "while not converged" is a given number of steps.
        while run.step < args.steps:
            start = time.perf_counter()

            # Lines 3-19: the gradients of the loss.
            minibatches = (run.read(next, batches) for _ in range(args.accumulate))
            log_norms = args.log_gradients and (run.step + 1) % args.log_gradients == 0
            if log_norms:
                minibatches = list(minibatches)  # to be read twice
            report = compute_gradients(run, minibatches, args)
            if log_norms:
                report |= norms_by_loss(run, minibatches, args)

            # Line 20: update θ and φ. A step with a number that is not finite is skipped; the loss
            # and the norm are the same on all ranks, so they all skip it.
            grad_norm = clip_gradients(run.weights)
            finite = math.isfinite(report["loss"]) and math.isfinite(grad_norm)
            lr = learning_rate(run.step, args)
            if finite:
                run.update(lr)
            run.optimizer.zero_grad()
            run.step += 1
            run.samples += num_samples

            # Log the step. The speed includes waiting for data and for other ranks.
            seconds = time.perf_counter() - start
            report |= dict(
                grad_norm=grad_norm,
                lr=lr,
                skipped=not finite,
                samples_per_s=num_samples / seconds,
                tokens_per_s=report["tokens"] / seconds,
                peak_gb=peak_memory() / 1e9,
            )
            if run.rank == 0:
                write_log(run.out, report)
            numbers = {name: f"{x:.3g}" for name, x in report.items() if isinstance(x, float)}
            bar.set_postfix(numbers, refresh=False)
            bar.update()

            # Give up on a run that has diverged. Its last good checkpoints stay.
            bad_steps = 0 if finite else bad_steps + 1
            if bad_steps == MAX_BAD_STEPS:
                raise ValueError(
                    f"the loss or its gradient was not finite in {bad_steps} steps in a row"
                )

            # Save, and leave if a signal to any rank asked for it.
            stop, save = parallel.any_rank([signals.stop, signals.save], run.device)
            if stop or save or run.step % args.save_every == 0 or run.step == args.steps:
                signals.save = False
                run.save()
            if stop:
                raise SystemExit(0)

            # Fewer than 20 broken clips may be bad luck.
            num_read += num_samples + report["broken"]
            num_broken += report["broken"]
            if num_broken >= 20 and num_broken > args.max_bad * num_read:
                run.save_progress()
                raise ValueError(
                    f"{num_broken} of {num_read} clips are broken: see {run.out / 'broken.txt'}, "
                    "or allow more by --max-bad and go on with --resume"
                )

            # Edit some clips, for a person to look at: losses do not show what edits look like.
            if run.step % args.validate_every == 0:
                run.validate(validation)

    if num_broken:
        broken = run.out / "broken.txt"
        cli.note(f"{num_broken} of {num_read} clips were broken and replaced: see {broken}")

    # Line 21: end while. Line 22, "return θ and φ": `launch` writes them to OUT/model.


def clip_gradients(weights: dict[str, Tensor]) -> float:
    """Scale all gradients so that their norm over all weights and ranks is at most 1; that norm."""
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), max_norm=1.0, foreach=True)
    return float(parallel.whole(norm))


def norms_by_loss(
    run: Run, minibatches: list[data.Batch], args: argparse.Namespace
) -> dict[str, float]:
    """Norms of the gradients of L_fm and of λ·L_align, whose sum `.grad` holds. Leaves it as it is.

    Under FSDP a backward pass adds to `.grad`, so the first of the two gradients takes a second
    pass over the same minibatches, with λ = 0; the other one is what is left of the sum.
    """
    weights = [p for p in run.weights.values() if p.grad is not None]
    total = [p.grad for p in weights]
    config = run.model.config
    run.optimizer.zero_grad()
    run.model.config = dataclasses.replace(config, align_weight=0.0)
    compute_gradients(run, minibatches, args)
    run.model.config = config

    flow = [p.grad for p in weights]
    align = torch._foreach_sub(total, flow)
    for p, gradient in zip(weights, total, strict=True):
        p.grad = gradient
    return dict(grad_norm_flow=whole_norm(flow), grad_norm_align=whole_norm(align))


def whole_norm(gradients: Iterable[Tensor]) -> float:
    """The norm over all tensors, and over all ranks if they are sharded."""
    return float(parallel.whole(torch.nn.utils.get_total_norm(gradients, foreach=True)))


# --- The model and what of it trains --------------------------------------------------------------


def choose_trained(model: RVEDiT, freeze_lora: bool = False) -> None:
    """Set requires_grad as in §5: DiT, source embedding, editing queries, connectors and LoRA.

    A model without LoRA, such as the toy, trains whole. freeze_lora: as in App. D.1. With L_s = L
    no block reads native tokens, so their connectors get no gradient and do not train.
    """
    trained = [r"dit\.", r"encoder\.(image_)?queries", r"encoder\.\w+_connector"]
    if not freeze_lora:
        trained.append(r".*\.lora_")
    pattern = re.compile("|".join(trained))
    unused = () if model.config.native_trained else ("visual_connector", "textual_connector")
    for name, parameter in model.named_parameters():
        trains = model.config.lora_rank == 0 or pattern.match(name) is not None
        parameter.requires_grad_(trains and not any(part in name for part in unused))


def parameter_table(model: RVEDiT, vae: WanVAE) -> str:
    """The number of trainable and of frozen parameters of each part, as a table to print."""
    counts: dict[str, list[int]] = {}  # trainable and frozen
    for name, parameter in (*model.named_parameters(), *vae.named_parameters("vae")):
        both = counts.setdefault(part_of_model(name), [0, 0])
        both[not parameter.requires_grad] += parameter.numel()
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]

    lines = [f"{'parameters':<28}{'trainable':>16}{'frozen':>16}"]
    for part, (trained, frozen) in counts.items():
        lines.append(f"{part:<28}{trained:>16,}{frozen:>16,}")
    if model.config.lora_rank == 0:
        lines.append("This model has no LoRA on a pretrained Qwen, so it trains whole.")
    return "\n".join(lines)


def part_of_model(name: str) -> str:
    """The part that a parameter belongs to, such as "dit" or "encoder.qwen.visual"."""
    if ".lora_" in name:
        return "lora"
    return re.match(r"dit\.source_embedding|encoder(\.qwen)?\.\w+|\w+", name)[0]


def prepare(
    model: RVEDiT,
    args: argparse.Namespace,
    mesh: DeviceMesh | None,
    group: dist.ProcessGroup | None = None,
    foreign: bool = False,
) -> None:
    """Set the options that change the model, choose what trains, and shard the model.

    Called before its weights are loaded. group: the ranks that share each clip, None if each has
    its own. foreign: the weights are Kiwi-Edit's.
    """
    model.config = with_options(model.config, args, foreign)
    choose_trained(model, args.freeze_lora)
    parallel.shard(model, mesh, args.recompute, args.compile, getattr(torch, args.dtype))
    if group is not None:
        sequence.TokenParallel(model.dit, group)
        sequence.MLLMParallel(model.encoder.qwen, group)


def with_options(
    config: RVEDiTConfig, args: argparse.Namespace, foreign: bool = False
) -> RVEDiTConfig:
    """The configuration, with what the options change of it. foreign: see `prepare`."""
    for size in args.size:
        data.check_size(config, size)
    # A model that is trained on longer or larger clips knows them afterwards.
    changes: dict[str, Any] = dict(
        max_frames=max(config.max_frames, *(T for T, _, _ in args.size)),
        max_pixels=max(config.max_pixels, *(H * W for _, H, W in args.size)),
    )
    # Kiwi-Edit's checkpoints have L_s = L. Training from them is to learn the routing of Eq. 3.
    if foreign:
        changes["routing_depth"] = config.dit.num_blocks // 2
    for name in ("routing_depth", "align_weight", "temperature"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    return dataclasses.replace(config, **changes)


def load_model(
    args: argparse.Namespace,
    mesh: DeviceMesh | None,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    triplets: Dataset | None = None,
) -> tuple[RVEDiT, WanVAE]:
    """The networks in float32, shared out over the ranks of a mesh and of a group.

    They are built on the meta device, sharded, and only then filled, so that no rank ever holds a
    whole model. triplets: those to train on. What would be wrong with them raises ValueError before
    the weights are read, which takes minutes.
    """
    foreign = args.checkpoint is not None and rvedit.layout(args.checkpoint) != "rvedit"

    def before_loading(model: RVEDiT) -> None:
        prepare(model, args, mesh, group, foreign)
        if triplets is None:
            return
        if model.config.align_weight > 0 and not args.caption_fallback:
            data.require_captions(triplets)
        check_workers(model.config, args)

    if args.preset == "toy" and args.checkpoint is None:
        model, vae = rvedit.scratch(args.seed, device, before_loading)
    else:
        model, vae = rvedit.load(
            args.checkpoint,
            args.wan,
            args.qwen,
            device=device,
            shard=before_loading,
            seed=args.seed,
        )

    # The frozen vision tower stays outside FSDP, which would cast it. Qwen's weights are bfloat16.
    if args.dtype == "bfloat16" and model.config.lora_rank:
        model.encoder.qwen.visual.to(torch.bfloat16)

    if args.compile:
        parallel.compile_norms(vae.encoder)
    if group is not None:
        sequence.RowParallel(vae, group)
    return model, vae


def make_optimizer(weights: dict[str, Tensor], args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, as in §5; the toy's recipe trains its matrices by Muon instead."""
    if args.muon:
        rates = muon_rates(weights, args.muon)
        optimizer = Muon(list(weights.values()), rates, betas=(0.9, 0.999), weight_decay=0.01)
    else:
        # foreach has to be asked for: with sharded weights PyTorch loops over them by default.
        optimizer = torch.optim.AdamW(
            weights.values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.01, foreach=True
        )
    # PyTorch makes the moments in the first step, but a checkpoint is loaded in place before it.
    for weight in weights.values():
        optimizer.state[weight] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer


def make_run(model: RVEDiT, vae: WanVAE, device: torch.device, args: argparse.Namespace) -> Run:
    """A run at its first step or, if OUT has a checkpoint, where that was written."""
    optimizer = make_optimizer(trainable(model), args)
    return Run(model, vae, optimizer, device, args)


# --- The clips ------------------------------------------------------------------------------------


def open_triplets(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The triplets to train on, and those of which validation shows the first ones."""
    if args.data:
        max_frames = max(frames for frames, _, _ in args.size)
        tables = [data.TripletDataset(file, args.root, max_frames) for file in args.data]
        triplets = ConcatDataset(tables)
        return triplets, triplets  # nothing of a table is held out
    # Moving shapes, painted as they are needed; those of another seed validate.
    size = args.size[0]
    shapes = training_set(args.seed, size, args.world)
    return shapes, training_set(args.seed + 1, size, args.world)


def make_batches(triplets: Dataset, run: Run, args: argparse.Namespace) -> data.Batches:
    return data.Batches(
        triplets,
        run.model.encoder,
        run.model.config,
        sizes=[tuple(size) for size in args.size],
        batch=args.batch,
        accumulate=args.accumulate,
        seed=args.seed,
        timestep_shift=args.timestep_shift,
        rank=run.group,
        ranks=run.groups,
        first_step=run.step,
        first_sample=run.samples,
        broken_file=run.out / "broken.txt",
        latents=data.Latents(args.latents, run.vae) if args.latents else None,
    )


# --- Options --------------------------------------------------------------------------------------

# Defaults of the options that do not depend on the preset. None: the model's own, or nothing.
DEFAULTS: dict[str, Any] = dict(
    checkpoint=None,
    wan=None,
    qwen=None,
    routing_depth=None,
    freeze_lora=False,
    align_weight=None,
    temperature=None,
    data=None,
    world="all",
    root=None,
    caption_fallback=False,
    latents=None,
    max_bad=0.01,
    workers=2,
    accumulate=1,
    seed=0,
    dtype=None,  # bfloat16 on GPUs
    compile=None,  # True on GPUs
    log_gradients=None,
    sequence_parallel=1,
    out=Path("runs/train"),
    resume=False,
    save_every=500,
    keep=2,
    validate_every=500,
    plan=None,
    export=False,
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options: as given, else those of the run that goes on, else the preset's and DEFAULTS."""
    given = vars(cli.train_parser().parse_args(argv))
    out = given.get("out", DEFAULTS["out"])
    # A cluster starts a job again by the same command, so --resume also begins a run. It has to say
    # of what, because OUT alone, where nothing is, is rather a mistake.
    says_what = given.keys() & {"preset", "checkpoint", "wan", "data"}
    if given.get("resume") and says_what and not (out / "run.json").exists():
        cli.note(f"{out} holds no run to resume, so one begins there")
        del given["resume"]
    saved = {}
    if given.get("resume") or given.get("export"):
        saved = read_run(out)["options"]
    chosen = saved | given
    if "preset" not in chosen:
        chosen["preset"] = fitting_preset(chosen)
    args = argparse.Namespace(**(DEFAULTS | RECIPES[chosen["preset"]] | chosen))
    if args.dtype is None:
        for_gpus = args.plan or torch.cuda.is_available()
        args.dtype = "bfloat16" if for_gpus else "float32"
    if args.compile is None:
        args.compile = torch.cuda.is_available()
    if args.data and given.get("world"):
        cli.fail(
            "--world is about moving shapes, and --data has other clips: leave one of them out"
        )
    if args.preset == "toy" and args.checkpoint is None and (args.wan or args.qwen):
        cli.fail("--preset toy starts from random weights: leave out --wan and --qwen")
    if args.preset != "toy" and not args.data and not args.plan:
        cli.fail(f"--preset {args.preset} needs --data FILE: triplets of videos and instructions")
    begins = not (args.plan or args.resume or args.export)
    if begins and args.preset != "toy" and args.checkpoint is None and args.wan is None:
        cli.fail(
            f"--preset {args.preset} needs weights to start from: --checkpoint DIR, or --wan DIR "
            "and --qwen DIR; to train the small model instead, add --preset toy"
        )
    return args


def fitting_preset(chosen: dict[str, Any]) -> str:
    """The preset for options without --preset: that of the model which they start from."""
    if chosen.get("checkpoint"):
        return rvedit.preset_of(chosen["checkpoint"])
    return "wan2.2-ti2v-5b" if chosen.get("data") or chosen.get("wan") else "toy"


# --- Start and end --------------------------------------------------------------------------------


def launch(args: argparse.Namespace, device: torch.device, signals: parallel.Signals) -> None:
    """A whole run, from the options to the exported checkpoint."""
    if args.export:
        args.sequence_parallel = 1  # nothing is computed, so any number of ranks will do
    group = parallel.neighbours(args.sequence_parallel, device)

    # OUT: what it holds fits the options, no other run writes to it, and all ranks see it.
    parallel.on_first_rank(check_out, args)
    lock = parallel.on_first_rank(lock_out, args.out)
    parallel.check_shared(args.out)
    # As rank 0 sees it: other nodes may not see yet what was written a minute ago.
    if parallel.from_first_rank(args.resume):
        accumulate = parallel.on_first_rank(resumed_accumulation, args)
        args.accumulate = parallel.from_first_rank(accumulate)

    # The tables come before the networks, because a mistake in them takes seconds to find.
    triplets = None
    if not args.export:
        triplets, validation = open_triplets(args)

    # The networks, sharded over the ranks; the optimiser, and all that a former checkpoint holds.
    mesh = parallel.make_mesh(device, getattr(torch, args.dtype))
    model, vae = load_model(args, mesh, device, group, triplets)
    run = make_run(model, vae, device, args)

    # Train, and write the model that sample.py takes.
    if not args.export:
        if args.steps is None:
            args.steps = max(1, len(triplets) // samples_per_step(args))
        if run.rank == 0:
            print(parameter_table(model, vae))
            share = data.caption_share(triplets)
            print(f"captions: {share:.0%} of the {len(triplets):,} triplets have one")
        batches = make_batches(triplets, run, args)
        validation = make_batches(validation, run, args)
        # Only now, when no option is refused any more: --resume takes them all up again.
        parallel.on_first_rank(begin_log, run, args)
        train(run, load_in_workers(batches, run, args), validation, args, signals)
    run.export()
    if run.rank == 0:
        model = args.out / "model"
        cli.say_last(f"{model}: edit with `python sample.py --checkpoint {model} --video ...`")
    if lock is not None:
        lock.close()


@cli.guarded
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.plan:
        plan = Path(__file__).parent / "experiments" / "plan.py"
        options = sys.argv[1:] if argv is None else argv
        raise SystemExit(subprocess.run([sys.executable, plan, *options]).returncode)
    with parallel.Signals() as signals, parallel.processes() as device:
        try:
            with cli.memory_advice(
                "take more GPUs, a smaller --batch, or smaller or shorter clips"
            ):
                launch(args, device, signals)
        except (OSError, ValueError, cli.Stop) as error:
            # Printed here and not by `guarded`: torchrun sends SIGTERM to this rank as soon as
            # another one has ended, and only within `Signals` does that not end it.
            cli.fail(error)
        except RuntimeError as error:
            # PyTorch raises it wherever the main thread is when a worker process dies.
            if "DataLoader worker" not in str(error):
                raise
            cli.fail(
                "a process that reads clips was killed, perhaps for lack of memory: give fewer "
                "--workers, or smaller or shorter clips"
            )


if __name__ == "__main__":
    main()
