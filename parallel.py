"""How training is spread over processes: the ranks, FSDP2, and checkpoints that all ranks write.

`processes` joins the ranks, `make_mesh` arranges them, `shard` spreads a model over them, and
`write_shards` and `read_shards` keep its state in a folder, for any number of ranks. `shard` also
compiles the blocks; `compile_blocks` and `compile_norms` do so for edits as well.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import signal
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import cli
import weights
from rvedit import RVEDiT
from vae import RMSNorm

# A view would be a problem if it were changed in place, which nothing does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")

CHECKSUMS = "checksums.json"  # in a training checkpoint: SHA-256 of its other files

# --- Signals --------------------------------------------------------------------------------------


class Signals:
    """While this context lasts, signals leave notes that the loop reads at the end of each step.

    SIGTERM, Ctrl-C and a closed terminal: save and exit. SIGUSR1: save and go on. All ranks act on
    the same step. The second one that says exit ends the process at once, whatever it waits for. It
    counts as a second one only some seconds after the first, because torchrun and srun may pass one
    on twice.
    """

    HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows, where nothing is trained
    STOP = (signal.SIGTERM, signal.SIGINT, HANGUP)
    SECONDS_APART = 3.0

    def __init__(self) -> None:
        self.stop = False
        self.save = False

    def __enter__(self) -> Signals:
        # A thread reads the signals from a pipe. Handlers alone would have to wait until the main
        # thread comes back from a library, such as from a collective that never ends.
        read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.former_fd = signal.set_wakeup_fd(self.write_end)
        self.former = {}
        for kind in (*self.STOP, signal.SIGUSR1):
            if kind == self.HANGUP and signal.getsignal(kind) == signal.SIG_IGN:
                continue  # under nohup, a run outlives its terminal
            self.former[kind] = signal.signal(kind, lambda number, frame: None)
        threading.Thread(target=self.watch, args=(read_end,), daemon=True).start()
        return self

    def watch(self, read_end: int) -> None:
        first = None
        with open(read_end, "rb", buffering=0) as pipe:
            for byte in iter(lambda: pipe.read(1), b""):  # until `__exit__` closes the pipe
                if byte[0] == signal.SIGUSR1:
                    self.save = True
                elif byte[0] in self.STOP and first is None:
                    self.stop = True
                    first = time.monotonic()
                elif byte[0] in self.STOP and time.monotonic() - first > self.SECONDS_APART:
                    os._exit(128 + byte[0])

    def __exit__(self, *error: object) -> None:
        for kind, handler in self.former.items():
            signal.signal(kind, handler)
        signal.set_wakeup_fd(self.former_fd)
        os.close(self.write_end)


# --- Ranks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes() -> Iterator[torch.device]:
    """Join the ranks that torchrun has started, or be the only one; gives this rank's device."""
    device = torch.device("cpu")
    backend = "gloo_on_one_thread"
    if torch.cuda.is_available():
        cli.check_gpu(torch.cuda.device_count())
        device = torch.device("cuda", cli.LOCAL_RANK)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"

    if cli.ALONE:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        yield device
    except BaseException as error:
        # Leaving the group waits for the other ranks, which may wait for this one elsewhere: then
        # torchrun would not see that it failed. After a signal all ranks exit alike, with code 0.
        all_stop = isinstance(error, SystemExit) and error.code == 0
        if cli.ALONE or all_stop:
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


def ranks_per_node() -> int:
    """As torchrun says; without it, all ranks are taken to be on one node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or dist.get_world_size())


def make_mesh(device: torch.device, dtype: torch.dtype) -> DeviceMesh | None:
    """The ranks to shard over: all in a row, or on several nodes a row for each node (HSDP).

    With HSDP each node holds a whole model, sharded inside the node, and only gradients travel
    between nodes; all nodes must have equally many ranks. None for one process that computes in
    float32: it has nothing to shard, and no second precision to compute in.
    """
    ranks = dist.get_world_size()
    if ranks == 1 and dtype == torch.float32:
        return None
    on_nodes = from_all_ranks(ranks_per_node())
    on_node = on_nodes[0]
    if 1 < on_node < ranks and set(on_nodes) == {on_node}:
        shape, names = (ranks // on_node, on_node), ("replicate", "shard")
        return init_device_mesh(device.type, shape, mesh_dim_names=names)
    return init_device_mesh(device.type, (ranks,))


def neighbours(ranks: int, device: torch.device) -> dist.ProcessGroup | None:
    """The ranks of this one's node that share its clips (sequence.py); None if they are not shared.

    Ends all ranks if those of a node do not make groups of so many.
    """
    if ranks == 1:
        return None
    problem = None
    if ranks_per_node() % ranks:
        problem = (
            f"--sequence-parallel {ranks} must divide the number of processes of a node, which is "
            f"{ranks_per_node()}"
        )
    fail_together(problem)
    shape, names = (dist.get_world_size() // ranks, ranks), ("clips", "tokens")
    return init_device_mesh(device.type, shape, mesh_dim_names=names).get_group("tokens")


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is set on at least one rank."""
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]


def from_first_rank(value: Any) -> Any:
    """The value that rank 0 gives, on all ranks."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all_ranks(value: Any) -> list[Any]:
    """The value that each rank gives, on all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def fail_together(problem: str | None) -> None:
    """End all ranks if any has a problem: rank 0 by a ValueError with the first one."""
    found = [text for text in from_all_ranks(problem) if text is not None]
    if not found:
        return
    if dist.get_rank() == 0:
        raise ValueError(found[0])
    raise SystemExit(2)


def on_first_rank(function: Callable[..., Any], *args: Any) -> Any:
    """Call the function on rank 0 and return its result there; an error of it ends all ranks."""
    result = problem = None
    if dist.get_rank() == 0:
        try:
            result = function(*args)
        except (ValueError, OSError) as error:
            problem = cli.plain_reason(error)
    fail_together(problem)
    return result


def check_shared(folder: Path) -> None:
    """End all ranks unless they see the same folder.

    Without a shared file system, each node would keep its own part of every checkpoint.
    """
    token = folder / f".token-{from_first_rank(uuid.uuid4().hex)}"
    rank = dist.get_rank()
    if rank == 0:
        token.touch()
    dist.barrier()
    problem = None
    if not token.exists():
        problem = (
            f"rank {rank} on {socket.gethostname()} does not see the files of rank 0 in {folder}: "
            "give an --out on a file system that all nodes share"
        )
    try:
        fail_together(problem)
    finally:
        if rank == 0:
            token.unlink()


# --- The model ------------------------------------------------------------------------------------


def keep_or_recompute(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which results of a checkpointed block are kept for the backward pass.

    Those of attention and of matrix products, unless a product is wider than its input. At full
    size (S = 18,480 tokens, d = 3072, bfloat16) a result (S, d) takes 114 MB. To keep it saves 4.2
    of the block's 9.7 TFLOP for self-attention, 1.6 for the second product of the feed-forward, and
    0.35 for each other product. The first product of the feed-forward would take 530 MB to save
    1.6 TFLOP, so it is computed again, with the norms and the modulation: 17 % of a forward pass.
    All that is kept, with the float32 stream, is 1.3 GB a block, 39 GB in all 30 blocks. Messages
    between ranks that share a clip are sent again, by all of them alike.
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


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block by itself: all of one kind share what is compiled for the first."""
    allow_many_variants()
    for block in blocks:
        block.forward = torch.compile(block.forward)


def compile_norms(coder: nn.Module) -> None:
    """Compile the norms of a VAE's encoder or decoder, each with the SiLU after it.

    They are what repeats there besides convolutions. A norm then reads its input twice and writes
    it once; on GPUs it otherwise makes seven such passes. Each width takes two or three compiled
    variants, one of them for the first frame; size and number of frames are left open.
    """
    allow_many_variants()
    for module in coder.modules():
        if isinstance(module, RMSNorm):
            module.forward = torch.compile(module.forward, dynamic=True)


def allow_many_variants() -> None:
    """Let PyTorch compile more than 8 variants of a function, after which it would stop compiling.

    Blocks of DiT and MLLM, with and without gradients, count together. `torch.compile` has an
    option for it from PyTorch 2.12 on only.
    """
    torch._dynamo.config.recompile_limit = 64


def shard(
    model: RVEDiT,
    mesh: DeviceMesh | None,
    recompute: bool,
    compile: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Checkpoint activations, compile and shard (FSDP2) the model, in this order, block by block.

    A frozen vision tower stays whole on every rank. mesh: None does not shard. Parameters and sums
    of gradients are float32; blocks are gathered and computed in `dtype`. Inputs are not cast: the
    blocks know what has to stay float32.
    """
    blocks = blocks_of(model)
    if recompute:
        for block in blocks:
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
        compile_blocks(blocks)
    if mesh is None:
        return

    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
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


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered on all ranks at once if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- Training checkpoints -------------------------------------------------------------------------


def write_shards(folder: Path, state: dict[str, dict[str, Tensor]]) -> None:
    """Write named groups of tensors, each rank its own parts of them, with a checksum of each file.

    The files are safetensors: reading them runs no code, whoever made them. Each group has a file
    of its own, because a file is put together in memory. Raises CheckpointException on all ranks if
    one of them cannot write.
    """
    file_numbers = {}
    for number, (group, tensors) in enumerate(state.items(), start=1):
        for name in tensors:
            file_numbers[f"{group}.{name}"] = number
    writer = HuggingFaceStorageWriter(folder, file_numbers, save_distributed=True)
    dcp.save(state, storage_writer=writer)  # returns when all ranks are done

    rank = dist.get_rank()
    own_files = folder.glob(f"shard-{rank + 1:05d}-*.safetensors")
    checksums = {}
    for digests in from_all_ranks({file.name: sha256(file) for file in own_files}):
        checksums |= digests
    if rank == 0:
        cli.write_text(folder / CHECKSUMS, json.dumps(checksums, indent=1))


def read_shards(folder: Path, state: dict[str, dict[str, Tensor]]) -> None:
    """Fill the tensors of `state`, in place, with what any number of ranks has written.

    Ends all ranks if a file is damaged, or if the tensors are not those that were written.
    """
    checksums = from_first_rank(on_first_rank(weights.read_json, folder / CHECKSUMS))
    # The ranks share the work: each looks at some of the files.
    problem = None
    for name in sorted(checksums)[dist.get_rank() :: dist.get_world_size()]:
        file = folder / name
        if not file.is_file() or sha256(file) != checksums[name]:
            problem = f"{file} is damaged or missing: delete {folder} to go on from the one before"
    fail_together(problem)

    reader = HuggingFaceStorageReader(folder)
    names = {f"{group}.{name}" for group, tensors in state.items() for name in tensors}
    # By itself dcp leaves out what `state` lacks, such as a LoRA that is frozen from now on.
    fits = reader.read_metadata().state_dict_metadata.keys() == names
    try:
        if fits:
            dcp.load(state, storage_reader=reader)
    except dcp.api.CheckpointException:  # on all ranks, such as for other shapes
        fits = False
    if not fits:
        fail_together(
            f"{folder} holds other weights than these options train: resume with those of the "
            "run, or train its OUT/model in a new one, by --checkpoint"
        )


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        for chunk in iter(lambda: content.read(1 << 24), b""):
            digest.update(chunk)
    return digest.hexdigest()
