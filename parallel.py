"""How the model is spread over the ranks (FSDP2), what of a block is kept for the backward pass, and gloo for CPUs."""

from __future__ import annotations

import functools
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from rvedit import RVEDiT

warnings.filterwarnings(
    "ignore", message="FSDP2-wrapped module .* returned a view"
)  # which nothing changes in place


def gloo_on_one_thread(
    store: dist.Store, rank: int, size: int, timeout: timedelta
) -> dist.ProcessGroupGloo:
    """Gloo with one thread in the place of two, which damage the heap when two collectives end at once.

    Seen in PyTorch 2.13: each thread notes the name of its last collective in one string for both, without a lock, and
    a long one, ALLGATHER_COALESCED, is freed twice. Runs on CPUs died of it after some hours. The main thread waits for
    every collective before it asks for the next, so there is nothing that a second thread could do meanwhile.
    """
    gloo, names = (
        dist.ProcessGroupGloo,
        filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")),
    )
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=name) for name in names] or [
        gloo.create_default_device()
    ]
    options._threads, options._timeout = 1, timeout
    return gloo(store, rank, size, options)


dist.Backend.register_backend("gloo_on_one_thread", gloo_on_one_thread, devices="cpu")


def keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Of a recomputed block, keep what attention and matrix products return, unless it is wider than what they read.

    At full size (S = 18,480 tokens, d = 3072, bfloat16) a result (S, d) takes 114 MB. For so much self-attention's
    saves 4.2 of the block's 9.7 TFLOP, the second product of the feed-forward 1.6, each other one 0.35. The first,
    which widens, would take 530 MB to save 1.6, and is run again, with the norms and the modulation: 17 % of a forward
    pass. What is kept comes to 1.2 GB a block, 36 GB in all 30, and rank 0 of 8 to 59 GB (`train.py --plan 8`).
    """
    kept = "scaled_dot_product" in str(operation)
    if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        inside, outside = args[
            -1
        ].shape  # of the weight, the last of (x, weight) or (bias, x, weight)
        kept = outside <= inside
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def shard(model: RVEDiT, mesh: DeviceMesh | None, recompute: bool, compile: bool) -> None:
    """Checkpoint activations, compile and shard (FSDP2), in this order, block by block. mesh: None does not shard.

    A frozen vision tower stays whole on every rank. Parameters and sums of gradients are float32, but on GPUs what is
    gathered and computed with is bfloat16. Inputs are not cast: the blocks know what has to stay float32.
    """
    visual = model.encoder.qwen.visual
    frozen = set() if next(visual.parameters()).requires_grad else set(visual.parameters())
    blocks = [
        *model.dit.blocks,
        *model.encoder.qwen.model["layers"],
        *(() if frozen else visual.blocks),
    ]
    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    selective = dict(use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    for block in blocks:
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, **selective)
        if compile:
            # All blocks of DiT and MLLM, with and without gradients, count together: 8, the default, are too few.
            block.forward = torch.compile(block.forward, recompile_limit=64)
    if mesh is None:
        return
    dtype = torch.bfloat16 if mesh.device_type == "cuda" else torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*blocks, model.dit, model.encoder):
        # Even after the last module: weights that validation left gathered would be those of an earlier step.
        fully_shard(
            module, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=frozen
        )
    register_fsdp_forward_method(model.dit, "features")
    register_fsdp_forward_method(model.encoder, "encode")
