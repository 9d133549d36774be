"""How much of each GPU's memory a training run takes, counted before it starts.

    python train.py --plan 8 --preset wan2.2-ti2v-5b  # with all options of the run

What stays in memory from step to step is counted from the shapes of the parameters. What a step
adds is found by running `train.training_step` itself on the meta device, whose tensors have shapes
but no memory, and by adding up the tensors that are alive. So the plan cannot differ from the code.

Not counted: the work space of convolutions, CUDA's context (0.5 GB), and what the allocator loses
in gaps between its blocks. With --sequence-parallel the VAE counts as if it were not shared.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli

if __name__ == "__main__":
    cli.begin()

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, library
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import rvedit
import train
from rvedit import RVEDiT, RVEDiTConfig
from vae import WanVAE

Size = tuple[int, int, int]  # T, H, W of a clip

INSTRUCTION = "make it snow on all the hills"
CAPTION = "snow on all the hills"

# --- Counting the tensors that are alive ----------------------------------------------------------


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on the meta device keeps what a fused kernel keeps, and never its S x S weights.

    Left to itself, the meta device chooses the unfused formula, which writes them.
    """

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **defaults: Any,
    ) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, _ = flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask)
        return out

    kernels = library.Library("aten", "IMPL")
    kernels.impl("scaled_dot_product_attention", attend, "AutogradMeta")
    yield
    del kernels  # which takes the kernel back


class Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations made and that something still holds.

    device: the type of device whose tensors count. `begin` names the part of the step that follows;
    `peaks` and `held` then have the most bytes alive during each part, and those left at its end.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.now = 0
        self.part = "start"
        self.peaks: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.known = weakref.WeakSet()  # storages, shared by a tensor and its views

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        # What an operation only reads was there before: parameters and the inputs of the step.
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.known.add(x.untyped_storage())
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == self.device:
                self.add(x.untyped_storage())
        self.peaks[self.part] = max(self.now, self.peaks.get(self.part, 0))
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.now += storage.nbytes()
        weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size: int) -> None:
        self.now -= size

    def begin(self, part: str) -> None:
        """Book what follows as this part of the step."""
        self.held[self.part] = self.now
        self.part = part

    def mark(self, function: Callable, *parts: str) -> Callable:
        """Wrap a function so that its calls begin these parts, one after the other."""
        names = iter(parts)

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.begin(next(names))
            return function(*args, **kwargs)

        return marked


# --- A run without a data set ---------------------------------------------------------------------


def stand_in_tokenizer(config: RVEDiTConfig) -> Tokenizer:
    """A tokenizer that knows the placeholders and takes every other word for the same one."""
    vocabulary = {
        "word": 0,
        "<|image_pad|>": config.qwen.image_token_id,
        "<|video_pad|>": config.qwen.video_token_id,
        "<|object_ref_start|>": config.qwen.query_token_id,
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def random_batch(
    model: RVEDiT, vae: WanVAE, size: Size, batch: int, device: torch.device | str
) -> data.Batch:
    """A minibatch (v, ℓ, v*, ℓ*) of clips of noise, with texts of usual length and t = 0.5."""
    T, H, W = size
    source, target = torch.randint(0, 256, (2, batch, T, H, W, 3), dtype=torch.uint8)
    length = (T - 1) // vae.config.temporal_factor + 1
    factor = vae.config.spatial_factor
    noise = torch.randn(batch, vae.config.z_dim, length, H // factor, W // factor, device=device)
    return data.Batch(
        source=source.to(device),
        target=target.to(device),
        t=torch.full((batch,), 0.5, device=device),
        noise=noise,
        edit_inputs=model.encoder.prepare(list(source), [INSTRUCTION] * batch),
        ref_inputs=model.encoder.prepare(list(target), [CAPTION] * batch),
        broken=0,
    )


# --- The plan -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Bytes on one rank; rank 0 has the most, because FSDP2 rounds its shards up."""

    state: dict[str, int]  # what is in memory from the first step to the last
    gathered: int  # what FSDP2 gathers beside it, at most
    peaks: dict[str, int]  # the most that is alive during each part of a step, beside those two
    held: dict[str, int]  # what of it is left when the part ends, such as for the backward pass

    @property
    def total(self) -> int:
        return sum(self.state.values()) + self.gathered + max(self.peaks.values())


def shard_size(parameter: Tensor, ranks: int) -> int:
    """Elements in rank 0's shard: FSDP2 cuts the first dimension, and rounds up."""
    rows = -(-len(parameter) // ranks)
    return rows * parameter[0].numel()


def gathered_bytes(model: RVEDiT, ranks: int) -> int:
    """FSDP2's buffers where they are largest: in the backward pass of the DiT's blocks.

    Gathered at that time are the DiT's parameters outside its blocks, a block, and the next block
    twice: as received, and as cut into parameters. To these come the gradients of a block, and in
    float32 those that are being summed over the ranks and those that were.
    """
    if ranks == 1:
        return 0
    block = list(model.dit.blocks[0].parameters())
    all_bytes = sum(p.nbytes for p in model.dit.parameters())
    block_bytes = sum(p.nbytes for p in model.dit.blocks.parameters())
    outside = all_bytes - block_bytes
    copies = sum(4 * p.nbytes for p in block)  # three of parameters and one of gradients
    sums = sum(2 * 4 * p.numel() for p in block)
    return outside + copies + sums


def state_bytes(
    model: RVEDiT, vae: WanVAE, batch: data.Batch, args: argparse.Namespace, ranks: int
) -> dict[str, int]:
    """What stays in memory between the steps."""
    vision = [p for p in model.encoder.qwen.visual.parameters() if not p.requires_grad]
    frozen_vision = {id(p) for p in vision}
    sharded = [p for p in model.parameters() if id(p) not in frozen_vision]
    trained_elements = sum(shard_size(p, ranks) for p in sharded if p.requires_grad)
    clips = (batch.source, batch.target, batch.t, batch.noise)
    return {
        "parameters, sharded, float32": 4 * sum(shard_size(p, ranks) for p in sharded),
        "AdamW's moments, sharded, float32": 2 * 4 * trained_elements,
        "average of the weights": 4 * trained_elements if args.average else 0,
        "frozen vision tower": sum(p.nbytes for p in vision),
        "frozen VAE, float32": sum(p.nbytes for p in vae.parameters()),
        "clips": sum(x.nbytes for x in clips),
    }


def pretended_group(ranks: int) -> dist.ProcessGroup | None:
    """A group of which this process is the first rank, and whose messages go nowhere."""
    if ranks == 1:
        return None
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return dist.group.WORLD


def plan(
    config: RVEDiTConfig,
    args: argparse.Namespace,
    ranks: int,
    tokenizer: Tokenizer | None = None,
) -> Plan:
    """Plan a training run on `ranks` GPUs; args are train.py's options."""
    with torch.device("meta"):
        model = RVEDiT(config, tokenizer or stand_in_tokenizer(config))
        vae = WanVAE(config.vae).requires_grad_(False)
    eager = argparse.Namespace(**(vars(args) | {"compile": False}))  # shapes are the same
    train.prepare(model, eager, mesh=None, group=pretended_group(args.sequence_parallel))
    model.to(getattr(torch, args.dtype))
    largest = max(args.size, key=math.prod)
    batch = random_batch(model, vae, largest, args.batch, "meta")
    if args.latents:  # the VAE has nothing to do
        source, target = torch.randn_like(batch.noise), torch.randn_like(batch.noise)
        batch = batch._replace(source=source, target=target)
    state = state_bytes(model, vae, batch, args, ranks)

    gradients = []

    def reduce(parameter: Tensor) -> None:
        """As FSDP2 does with a complete gradient: keep this rank's shard of the sum, in float32."""
        size = shard_size(parameter, ranks)
        gradients.append(torch.empty(size, dtype=torch.float32, device="meta"))
        parameter.grad = None

    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.register_post_accumulate_grad_hook(reduce)

    alive = Alive("meta")
    reference_features = model.dit.features

    def features_then_loss(*inputs: Any) -> Tensor:
        alive.begin("DiT, reference branch")
        features = reference_features(*inputs)
        alive.begin("InfoNCE")  # the line of Algorithm 1 that follows
        return features

    vae.encode = alive.mark(vae.encode, "VAE, source", "VAE, target")
    model.encoder.encode = alive.mark(model.encoder.encode, "MLLM", "MLLM, reference branch")
    model.dit.forward = alive.mark(model.dit.forward, "DiT")
    model.dit.features = features_then_loss
    with fused_attention(), alive:
        # The deepest block takes the most memory.
        loss, *_ = train.training_step(model, vae, batch, depth=config.dit.num_blocks)
        alive.begin("backward")
        loss.backward()
    alive.begin("update")
    # AdamW's update makes the square root of the second moments, in one piece for all parameters.
    root = 4 * sum(shard_size(p, ranks) for p in trained)
    update = sum(gradient.nbytes for gradient in gradients) + root
    return Plan(
        state=state,
        gathered=gathered_bytes(model, ranks),
        peaks=alive.peaks | {"update": update},
        held=alive.held | {"update": 0},
    )


# --- The report -----------------------------------------------------------------------------------


def row(name: str, *sizes: float) -> str:
    columns = "".join(f"{size / 1e9:>9.3f}" for size in sizes)
    return f"{name:<40}{columns} GB"


def report(plan: Plan, num_blocks: int) -> str:
    """The plan as a table in gigabytes."""
    parts = list(plan.held)
    before_backward = plan.held[parts[parts.index("backward") - 1]]
    block_peak = plan.peaks["backward"] - before_backward
    block_held = (plan.held["DiT"] - plan.held["MLLM"]) / num_blocks

    lines = [row(name, size) for name, size in plan.state.items() if size]
    lines.append(row("gathered by FSDP2, at most", plan.gathered))
    lines.append(f"\n{'in a step, beside those':<40}{'peak':>9}{'kept':>9}")
    for part, peak in plan.peaks.items():
        lines.append(row(part, peak, plan.held[part]))
    lines.append(row(f"  of these, each of {num_blocks} blocks of the DiT", block_peak, block_held))
    lines.append("\n" + row("in all", plan.total))
    return "\n".join(lines)


@cli.guarded
def main(argv: list[str] | None = None) -> None:
    """Print the plan of a run with these options of train.py, --plan among them."""
    args = train.parse_arguments(argv)
    if args.plan is None:
        raise ValueError("--plan RANKS is missing: for how many GPUs?")
    config = train.with_options(rvedit.preset(args.preset), args)
    planned = plan(config, args, args.plan)
    print(report(planned, config.dit.num_blocks))


if __name__ == "__main__":
    main()
