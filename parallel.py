"""How training is spread over processes: the ranks, FSDP2, and what is kept for the backward pass.

`processes` joins the ranks, `make_mesh` arranges them, and `shard` spreads a model over them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import cli
from rvedit import RVEDiT

# A view would be a problem if it were changed in place, which nothing does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")

# --- Ranks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes() -> Iterator[torch.device]:
    """Join the ranks that torchrun has started, or be the only one; gives this rank's device."""
    alone = "RANK" not in os.environ
    device = torch.device("cpu")
    backend = "gloo_on_one_thread"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise cli.Stop(
                f"this machine has no GPU for its rank {device.index}: give a smaller "
                "--nproc_per_node"
            )
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"

    if alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        yield device
    except BaseException as error:
        # Leaving the group waits for the other ranks, which may wait for this one elsewhere: then
        # torchrun would not see that it failed. After a signal all ranks exit alike, with code 0.
        all_stop = isinstance(error, SystemExit) and error.code == 0
        if alone or all_stop:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def gloo_on_one_thread(
    store: dist.Store, rank: int, size: int, timeout: timedelta
) -> dist.ProcessGroupGloo:
    """Gloo with one thread instead of two, which damage the heap when two collectives end at once.

    Seen in PyTorch 2.13: each thread stores the name of its last collective in one string that they
    share, without a lock, and a long one, ALLGATHER_COALESCED, is freed twice. Runs on CPUs died of
    it after some hours. The main thread waits for every collective before it asks for the next, so
    a second thread would have nothing to do.
    """
    options = dist.ProcessGroupGloo._Options()
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    devices = []
    for name in interfaces.split(","):
        if name:
            devices.append(dist.ProcessGroupGloo.create_device(interface=name))
    options._devices = devices or [dist.ProcessGroupGloo.create_default_device()]
    options._threads = 1
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


dist.Backend.register_backend("gloo_on_one_thread", gloo_on_one_thread, devices="cpu")


def make_mesh(device: torch.device) -> DeviceMesh | None:
    """All ranks in a row, to shard over.

    None for one process on a CPU: it has nothing to shard, and no second precision to compute in.
    """
    ranks = dist.get_world_size()
    if ranks == 1 and device.type == "cpu":
        return None
    return init_device_mesh(device.type, (ranks,))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank."""
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return count.item() > 0


# --- The model ------------------------------------------------------------------------------------


def keep_or_recompute(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which results of a checkpointed block are kept for the backward pass.

    Those of attention and of matrix products, unless a product is wider than its input. At full
    size (S = 18,480 tokens, d = 3072, bfloat16) a result (S, d) takes 114 MB. To keep it saves 4.2
    of the block's 9.7 TFLOP for self-attention, 1.6 for the second product of the feed-forward, and
    0.35 for each other product. The first product of the feed-forward would take 530 MB to save
    1.6 TFLOP, so it is computed again, with the norms and the modulation: 17 % of a forward pass.
    All that is kept comes to 1.2 GB a block, 36 GB in all 30 (`train.py --plan 8`).
    """
    keep = "scaled_dot_product" in str(operation)
    if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        weight = args[-1]  # of (x, weight) or (bias, x, weight); (inputs, outputs)
        num_inputs, num_outputs = weight.shape
        keep = num_outputs <= num_inputs
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def blocks_of(model: RVEDiT) -> list[nn.Module]:
    """All transformer blocks, but not those of a vision tower that is frozen."""
    qwen = model.encoder.qwen
    blocks = [*model.dit.blocks, *qwen.model["layers"]]
    if not is_frozen(qwen.visual):
        blocks += qwen.visual.blocks
    return blocks


def is_frozen(module: nn.Module) -> bool:
    return not next(module.parameters()).requires_grad


def shard(model: RVEDiT, mesh: DeviceMesh | None, recompute: bool, compile: bool) -> None:
    """Checkpoint activations, compile and shard (FSDP2) the model, in this order, block by block.

    A frozen vision tower stays whole on every rank. mesh: None does not shard. Parameters and sums
    of gradients are float32; on GPUs, blocks are gathered and computed in bfloat16. Inputs are not
    cast: the blocks know what has to stay float32.
    """
    blocks = blocks_of(model)
    for block in blocks:
        if recompute:
            block.forward = functools.partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing random happens in a block
                context_fn=functools.partial(
                    create_selective_checkpoint_contexts, keep_or_recompute
                ),
            )
        if compile:
            # DiT and MLLM blocks, with and without gradients, count together: the default of 8
            # compiled variants is too few.
            block.forward = torch.compile(block.forward, recompile_limit=64)
    if mesh is None:
        return

    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mesh.device_type == "cuda" else torch.float32,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    visual = model.encoder.qwen.visual
    whole = set(visual.parameters()) if is_frozen(visual) else set()
    for module in (*blocks, model.dit, model.encoder):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            # Also after the last module: what validation left gathered would be outdated weights.
            reshard_after_forward=True,
            ignored_params=whole,
        )
    # Entries to the networks besides `forward`, which have to gather weights as well.
    register_fsdp_forward_method(model.dit, "features")
    register_fsdp_forward_method(model.encoder, "encode")
