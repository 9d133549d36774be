"""What a training run takes of each GPU's memory, from shapes, before it starts: `train.py --plan RANKS`.

What stays is counted from the parameters. What a step adds is found by running `train.training_step` itself on the meta
device, whose tensors have shapes only, and adding up what is alive: so it cannot differ from the code.

Not counted: work space of convolutions, CUDA's context (0.5 GB), what the allocator loses between its blocks.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import losses
import rvedit
import train
from rvedit import RVEDiT, RVEDiTConfig
from vae import WanVAE


class Plan(NamedTuple):
    """Bytes of a rank, of which rank 0 has the most."""

    state: dict[str, int]  # what is there from the first step to the last
    gathered: int  # what FSDP2 puts together beside it, at most
    peaks: dict[
        str, int
    ]  # what each part of a step needs beside those, what earlier parts left included
    held: dict[str, int]  # what each part leaves for the backward pass, likewise

    @property
    def total(self) -> int:
        return sum(self.state.values()) + self.gathered + max(self.peaks.values())


# --- What is alive --------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors of a kind of device that operations made and something still needs."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.now, self.part = device, 0, "start"
        self.seen = weakref.WeakSet()
        self.peaks: dict[str, int] = {}
        self.held: dict[str, int] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **kwargs or {})
        # What an operation reads and did not make was there before: parameters, and the inputs.
        self.seen.update(
            x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        )
        for x in tree_leaves(result):
            if (
                isinstance(x, Tensor)
                and x.device.type == self.device
                and x.untyped_storage() not in self.seen
            ):
                self.add(x.untyped_storage())
        self.peaks[self.part] = max(self.now, self.peaks.get(self.part, 0))
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.seen.add(storage)
        self.now += size
        weakref.finalize(storage, lambda: setattr(self, "now", self.now - size))

    def begin(self, part: str) -> None:
        """What follows is booked as this part of the step."""
        self.held[self.part] = self.now
        self.part = part

    def mark(self, function: Callable, *parts: str) -> Callable:
        """The function, whose calls begin these parts, in this order."""
        names = iter(parts)

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.begin(next(names))
            return function(*args, **kwargs)

        return marked


def fused_attention(*args: Any, **kwargs: Any) -> Tensor:
    """On the meta device attention would write its S x S weights, which no fused kernel does."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)[0]


# --- A run without weights ------------------------------------------------------------------------


def stand_in_tokenizer(config: RVEDiTConfig) -> Tokenizer:
    """One that knows the placeholders, and a single word."""
    ids = {
        "word": 0,
        "<|video_pad|>": config.qwen.video_token_id,
        "<|object_ref_start|>": config.qwen.query_token_id,
    }
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def a_batch(
    model: RVEDiT, vae: WanVAE, args: argparse.Namespace, device: torch.device | str
) -> data.Batch:
    """A rank's minibatch of black clips, with an instruction as long as they are."""
    clip = torch.zeros(*args.size, 3, dtype=torch.uint8)
    item = dict(
        source=clip,
        target=torch.ones_like(clip),  # training refuses a pair that is the same
        instruction="make it snow on all the hills",
        caption="snow on all the hills",
    )
    batches = data.Batches(
        [item] * args.batch,
        model.encoder,
        model.config,
        sizes=[tuple(args.size)],
        batch=args.batch,
        accumulate=args.accumulate,
        seed=args.seed,
        timestep_shift=args.timestep_shift,
        broken_file=args.out / "broken.txt",
    )
    batch = batches[0, 0]
    return data.Batch(*(x.to(device) for x in batch[:4]), *batch[4:])


def part_of(parameter: Tensor, ranks: int) -> int:
    """Elements of rank 0's part: FSDP2 cuts the first dimension, and rounds up."""
    return -(-len(parameter) // ranks) * parameter[0].numel()


def plan(
    config: RVEDiTConfig,
    args: argparse.Namespace,
    ranks: int,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
) -> Plan:
    """For a training run with these options that computes in dtype."""
    with torch.device("meta"):
        model, vae = (
            RVEDiT(config, tokenizer or stand_in_tokenizer(config)),
            WanVAE(config.vae).requires_grad_(False),
        )
    train.prepare(model, args, mesh=None)
    model.to(dtype)
    whole = {id(p) for p in model.encoder.qwen.visual.parameters() if not p.requires_grad}
    sharded = [p for p in model.parameters() if id(p) not in whole]
    trained = [p for p in sharded if p.requires_grad]
    copy = 4 * sum(part_of(p, ranks) for p in trained)
    state = {"parameters, sharded, float32": 4 * sum(part_of(p, ranks) for p in sharded)}
    state |= {"AdamW's moments, sharded, float32": 2 * copy}
    state |= {"average of the weights": copy if args.average else 0}
    state |= {
        "frozen vision tower": sum(
            p.nbytes for p in model.encoder.qwen.visual.parameters() if id(p) in whole
        )
    }
    state |= {"frozen VAE, float32": sum(p.nbytes for p in vae.parameters())}

    alive, batch = Alive("meta"), a_batch(model, vae, args, "meta")
    state["clips"] = sum(x.nbytes for x in batch[:4])
    gradients = []

    def reduce(parameter: Tensor) -> None:
        """As FSDP2 does once a gradient is there: only this rank's part of the sum stays, in float32."""
        gradients.append(torch.empty(part_of(parameter, ranks), dtype=torch.float32, device="meta"))
        parameter.grad = None

    for p in trained:
        p.register_post_accumulate_grad_hook(reduce)
    vae.encode = alive.mark(vae.encode, "VAE, source", "VAE, target")
    model.encoder.encode = alive.mark(model.encoder.encode, "MLLM", "MLLM, reference branch")
    model.dit.forward = alive.mark(model.dit.forward, "DiT")
    model.dit.features = alive.mark(model.dit.features, "DiT, reference branch")
    info_nce = mock.patch.object(
        losses, "alignment_loss", alive.mark(losses.alignment_loss, "InfoNCE")
    )
    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention), info_nce, alive:
        loss, *_ = train.training_step(model, vae, batch, depth=config.dit.num_blocks)
        alive.begin("backward")
        loss.backward()
    del loss
    alive.begin("update")
    update = sum(g.nbytes for g in gradients) + copy  # the copy is the root of the second moments
    peaks = alive.peaks | {"update": update}
    return Plan(state, gathered(model, ranks), peaks, alive.held | {"update": 0})


def gathered(model: RVEDiT, ranks: int) -> int:
    """FSDP2's buffers at their largest, in the backward pass of the DiT's blocks.

    Whole are: what is not in a block; a block; the next one twice, as received and as cut into parameters. Then its
    gradients, and as float32 those that are being summed over the ranks and those that were.
    """
    if ranks == 1:
        return 0
    block = list(model.dit.blocks[0].parameters())
    outside = sum(p.nbytes for p in model.dit.parameters()) - sum(
        p.nbytes for p in model.dit.blocks.parameters()
    )
    return outside + sum(4 * p.nbytes + 2 * 4 * p.numel() for p in block)


def report(plan: Plan, blocks: int) -> str:
    def row(name: str, *sizes: float) -> str:
        return f"{name:<40}" + "".join(f"{size / 1e9:>9.3f}" for size in sizes) + " GB"

    peaks, held, parts = plan.peaks, plan.held, list(plan.held)
    before = held[parts[parts.index("backward") - 1]]
    lines = [row(name, size) for name, size in plan.state.items() if size]
    lines += [row("gathered by FSDP2, at most", plan.gathered)]
    lines += [f"\n{'in a step, beside those':<40}{'peak':>9}{'kept':>9}"]
    lines += [row(part, peak, held[part]) for part, peak in peaks.items()]
    block = peaks["backward"] - before, (held["DiT"] - held["MLLM"]) / blocks
    lines += [row(f"  of these, each of {blocks} blocks of the DiT", *block)]
    return "\n".join([*lines, "\n" + row("in all", plan.total)])


def main(args: argparse.Namespace) -> None:
    """`train.py --plan`: in bfloat16, as on GPUs."""
    config = train.with_options(rvedit.preset(args.preset), args)
    print(report(plan(config, args, args.plan, torch.bfloat16), config.dit.num_blocks))
