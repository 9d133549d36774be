"""One clip on several GPUs: the DiT's tokens and the VAE's rows are shared out over the ranks.

`torchrun --nproc_per_node N sample.py ...` uses this. The networks know nothing of it: what is
below changes the calls of an existing network, which then gives the same on every rank.

    windows of a long clip   each group of ranks takes some of them; a group works on one at a time
    DiT                      Ulysses (arXiv 2309.14509): each rank of a group holds S/N tokens; for
                             self-attention, ranks exchange tokens for heads, and back
    VAE                      each of all ranks holds some rows of the picture, and borrows its
                             neighbours' nearest row before a convolution

Letters: N ranks of a group, B batch, n heads, S tokens, s tokens of a rank, D head width.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh

from model import WanDiT
from rvedit import RVEDiT
from vae import AttentionBlock, CausalConv3d, Downsample, Upsample, WanVAE

# --- The DiT: tokens ------------------------------------------------------------------------------


class TokenParallel:
    """Shares a DiT's tokens out over the ranks of a group.

    Every token but those of self-attention is computed by one rank alone: products, cross-attention
    and norms need only their own tokens. Training works as well: collectives pass gradients on.
    """

    def __init__(self, dit: WanDiT, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.num_tokens = 0  # S of the current clip
        # Three places change: what makes the tokens, what mixes them, and what comes after the last
        # layer that treats them one by one.
        self.embed_all = dit._embed
        dit._embed = self.embed
        for block in dit.blocks:
            block.self_attn.attend = self.attend
        dit.head.register_forward_hook(lambda module, inputs, patches: self.gather(patches))

    def embed(self, *inputs: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`WanDiT._embed`, and of its tokens this rank's: (B, s, d), with their rotary tables."""
        x, rope = self.embed_all(*inputs)
        self.num_tokens = x.shape[1]
        # The last rank's tokens are filled up with zeros, so that all have as many.
        missing = -self.num_tokens % self.ranks
        x = F.pad(x, (0, 0, 0, missing))
        own_tokens = x.chunk(self.ranks, dim=1)[self.rank].contiguous()
        own_rope = []
        for table in rope:  # (S, 1, D)
            table = F.pad(table, (0, 0, 0, 0, 0, missing))
            own_rope.append(table.chunk(self.ranks)[self.rank])
        return own_tokens, tuple(own_rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention over the tokens of all ranks: q, k, v (B, n, s, D) -> (B, n, s, D).

        Stands in the place of `model.Attention.attend`. In self-attention the mask is None.
        """
        N = self.ranks
        qkv = torch.stack((q, k, v))  # (3, B, n, s, D)
        # To rank r go the heads of part r; from it come its tokens.
        qkv = qkv.unflatten(2, (N, -1)).movedim(2, 0)  # (N, 3, B, n/N, s, D)
        qkv = self.exchange(qkv)  # the same shape, by the rank that holds the tokens
        qkv = qkv.movedim(0, 3).flatten(3, 4)  # (3, B, n/N, N s, D)
        q, k, v = qkv.unbind()
        # Nothing may attend to the zeros that fill up the last rank.
        k = k[:, :, : self.num_tokens]
        v = v[:, :, : self.num_tokens]
        out = F.scaled_dot_product_attention(q, k, v)  # (B, n/N, N s, D)
        out = out.unflatten(2, (N, -1)).movedim(2, 0)  # (N, B, n/N, s, D)
        out = self.exchange(out)  # by the rank that holds the heads
        return out.movedim(0, 1).flatten(1, 2)  # (B, n, s, D)

    def exchange(self, x: Tensor) -> Tensor:
        """Send x[r] to rank r, for each r: the same shape, with what rank r sent at [r]."""
        flat = x.contiguous().flatten(0, 1)
        sizes = [len(flat) // self.ranks] * self.ranks
        return all_to_all_single_autograd(flat, sizes, sizes, self.group).view(x.shape)

    def gather(self, x: Tensor) -> Tensor:
        """The tokens of all ranks, (B, S, ...), from this rank's (B, s, ...)."""
        to_all = x.expand(self.ranks, *x.shape)
        parts = self.exchange(to_all)  # (N, B, s, ...)
        tokens = parts.movedim(0, 1).flatten(1, 2)  # (B, N s, ...)
        return tokens[:, : self.num_tokens]


# --- The VAE: rows of the picture -----------------------------------------------------------------


class RowParallel:
    """Shares the rows of a VAE's picture out over all ranks.

    Each holds whole rows of latents, and their pixels. Each convolution over space needs one more
    row on either side, which the neighbours send. The attention in the middle, over all pixels of
    a small frame, is computed by every rank.
    """

    def __init__(self, vae: WanVAE, latent_height: int) -> None:
        ranks = dist.get_world_size()
        self.rank = dist.get_rank()
        parts = torch.arange(latent_height).tensor_split(ranks)
        self.starts = [int(part[0]) for part in parts]  # rows of latents
        self.counts = [len(part) for part in parts]
        self.factor = vae.config.spatial_factor
        self.encode_own, self.decode_own = vae.encode_chunks, vae.decode_chunks
        vae.encode_chunks, vae.decode_chunks = self.encode_chunks, self.decode_chunks
        for module in vae.modules():
            if isinstance(module, CausalConv3d) and module.kernel_size[1] > 1:
                module.forward = functools.partial(self.convolve, module, module.forward)
            elif isinstance(module, Downsample):
                resample = module.resample.forward
                module.resample.forward = functools.partial(self.downsample, resample)
            elif isinstance(module, Upsample):
                resample = module.resample.forward
                module.resample.forward = functools.partial(self.upsample, resample)
            elif isinstance(module, AttentionBlock):
                module.forward = functools.partial(self.attend, module.forward)

    def encode_chunks(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """`WanVAE.encode_chunks`: whole blocks in, whole latents out, on every rank."""
        for latents in self.encode_own(self.own(block, self.factor) for block in blocks):
            yield self.gather(latents)

    def decode_chunks(self, latents: Tensor, *options: Any) -> Iterator[Tensor]:
        """`WanVAE.decode_chunks`: whole latents in, whole blocks of frames out, on every rank."""
        for frames in self.decode_own(self.own(latents), *options):
            yield self.gather(frames)

    def own(self, x: Tensor, unit: int = 1) -> Tensor:
        """This rank's rows of (..., H, W), where `unit` rows belong to a row of latents."""
        first = self.starts[self.rank] * unit
        count = self.counts[self.rank] * unit
        return x[..., first : first + count, :].contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks, (..., H, W), from this rank's."""
        unit = x.shape[-2] // self.counts[self.rank]  # rows of x to a row of latents
        # all_gather takes tensors of one shape: those with fewer rows are filled up with zeros.
        missing = unit * max(self.counts) - x.shape[-2]
        x = F.pad(x, (0, 0, 0, missing)).contiguous()
        parts = [torch.empty_like(x) for _ in self.counts]
        dist.all_gather(parts, x)
        rows = []
        for part, count in zip(parts, self.counts, strict=True):
            rows.append(part[..., : unit * count, :])
        return torch.cat(rows, dim=-2)

    def borrow(self, x: Tensor) -> Tensor:
        """Put the nearest row of each neighbour above and below (..., H, W): (..., H + 2, W).

        Beyond the edges of the picture there are zeros, as in a convolution with padding.
        """
        above = torch.zeros_like(x[..., :1, :]).contiguous()
        below = torch.zeros_like(above)
        # Sent and received in one batch: one by one, two neighbours could wait for each other.
        messages = []
        if self.rank > 0:
            first = x[..., :1, :].contiguous()
            messages.append(dist.P2POp(dist.isend, first, self.rank - 1))
            messages.append(dist.P2POp(dist.irecv, above, self.rank - 1))
        if self.rank < len(self.counts) - 1:
            last = x[..., -1:, :].contiguous()
            messages.append(dist.P2POp(dist.irecv, below, self.rank + 1))
            messages.append(dist.P2POp(dist.isend, last, self.rank + 1))
        for request in dist.batch_isend_irecv(messages):
            request.wait()
        return torch.cat((above, x, below), dim=-2)

    def convolve(self, conv: CausalConv3d, forward: Any, x: Tensor, cache: dict) -> Tensor:
        y = forward(self.borrow(x), cache)
        # What the next chunk looks back at is cached without the borrowed rows.
        past = cache[conv]
        cache[conv] = past[..., 1:-1, :].clone()
        return y[..., 1:-1, :]

    def downsample(self, resample: Any, x: Tensor) -> Tensor:
        # A stride of 2 from the first row on: each rank has an even number, and needs one below.
        with_next_row = self.borrow(x)[..., 1:, :]
        y = resample(with_next_row)
        own_rows = x.shape[-2] // 2
        return y[..., :own_rows, :]

    def upsample(self, resample: Any, x: Tensor) -> Tensor:
        y = resample(self.borrow(x))
        return y[..., 2:-2, :]  # a borrowed row has become two

    def attend(self, forward: Any, x: Tensor) -> Tensor:
        whole = self.gather(x)
        return self.own(forward(whole))


# --- One edit -------------------------------------------------------------------------------------


class Spread:
    """Shares one edit out over all ranks, and says which windows this one's group takes.

    num_windows: of the clip. latent_height: rows of its latents. Raises ValueError if the ranks of
    a group cannot share the DiT's heads.
    """

    def __init__(self, model: RVEDiT, vae: WanVAE, num_windows: int, latent_height: int) -> None:
        ranks = dist.get_world_size()
        device_type = model.dit.patch_embedding.weight.device.type
        groups = number_of_groups(ranks, num_windows, model.config.dit.num_heads)
        # The ranks as a table: each row is a group, which shares the tokens of its windows.
        names = ("windows", "tokens")
        mesh = init_device_mesh(device_type, (groups, ranks // groups), mesh_dim_names=names)
        self.windows = slice(mesh.get_local_rank("windows"), None, groups)
        self.between_groups = mesh.get_group("windows")
        if ranks > groups:
            TokenParallel(model.dit, mesh.get_group("tokens"))
        if latent_height >= ranks:  # or it is a small picture: every rank computes all of it
            RowParallel(vae, latent_height)

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over all groups, which have computed different windows."""
        dist.all_reduce(x, group=self.between_groups)
        return x


def number_of_groups(ranks: int, num_windows: int, num_heads: int) -> int:
    """As many as there are windows, if the ranks and the heads can be shared out evenly.

    Windows are shared out first, because they need one message a step; tokens need two a block.
    Raises ValueError if no number of groups fits.
    """
    for groups in range(min(num_windows, ranks), 0, -1):
        if ranks % groups == 0 and num_heads % (ranks // groups) == 0:
            return groups
    raise ValueError(
        f"{ranks} processes cannot share {num_heads} attention heads: "
        "give --nproc_per_node a number that divides them"
    )


def start(device: torch.device) -> None:
    """Join the other processes that torchrun has started."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
