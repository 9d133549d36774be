"""One clip on several GPUs: the networks' tokens, frames and rows are shared out over the ranks.

`torchrun --nproc_per_node N sample.py ...` and `train.py --sequence-parallel N` use this. The
networks know nothing of it: what is below changes the calls of an existing network, which then
gives the same on every rank.

    windows of a long clip   each group of ranks takes some of them; a group works on one at a time
    minibatches of training  each group of ranks takes its own, as a single rank does otherwise
    DiT, language tower      Ulysses (arXiv 2309.14509): each rank of a group holds S/N tokens; for
                             self-attention, ranks exchange tokens for heads, and back
    vision tower             each rank of a group sees some of the frames
    VAE                      each rank of a group, or of all for an edit, holds some rows of the
                             picture, and borrows its neighbours' nearest row before a convolution

In training, each rank of a group does the rest of a step for itself: it reads the clips, and
computes InfoNCE in float32.

Letters: N ranks of a group, B batch, n heads, S tokens, s tokens of a rank, D head width, d width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh

from model import WanDiT
from qwen import Qwen2_5_VL
from rvedit import RVEDiT
from vae import AttentionBlock, CausalConv3d, Downsample, Upsample, WanVAE

# --- Messages about tokens ------------------------------------------------------------------------


class Tokens:
    """The ranks of a group that share the tokens of a sequence, and the messages between them.

    Each holds s = ⌈S/N⌉ tokens; the last rank's are filled up with zeros. Gradients go back the
    same way.

    In training, each rank of a group computes the loss of the whole clip. As collectives pass
    gradients on, those that the N ranks find for a weight add up to N times the clip's. FSDP takes
    the mean over all ranks, which so becomes the mean over the groups: no factor is missing.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens, s of the S in dimension `dim`."""
        missing = -x.shape[dim] % self.ranks
        after_dim = x.ndim - 1 - dim
        x = F.pad(x, (0, 0) * after_dim + (0, missing))
        return x.chunk(self.ranks, dim)[self.rank].contiguous()

    def gather(self, x: Tensor, num_tokens: int) -> Tensor:
        """The tokens of all ranks, (B, S, ...), from this rank's (B, s, ...). num_tokens: S."""
        to_all = x.expand(self.ranks, *x.shape)
        parts = self.exchange(to_all)  # (N, B, s, ...)
        tokens = parts.movedim(0, 1).flatten(1, 2)  # (B, N s, ...)
        return tokens[:, :num_tokens]

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Own tokens of all heads -> all tokens of own heads: (B, n, s, D) -> (B, n/N, N s, D)."""
        qkv = torch.stack((q, k, v))  # (3, B, n, s, D)
        # To rank r go the heads of part r; from it come its tokens.
        qkv = qkv.unflatten(2, (self.ranks, -1)).movedim(2, 0)  # (N, 3, B, n/N, s, D)
        qkv = self.exchange(qkv)  # the same shape, by the rank that holds the tokens
        return qkv.movedim(0, 3).flatten(3, 4)  # (3, B, n/N, N s, D)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back, (B, n/N, N s, D) -> (B, n, s, D)."""
        x = x.unflatten(2, (self.ranks, -1)).movedim(2, 0)  # (N, B, n/N, s, D)
        x = self.exchange(x)  # by the rank that holds the heads
        return x.movedim(0, 1).flatten(1, 2)  # (B, n, s, D)

    def exchange(self, x: Tensor) -> Tensor:
        """Send x[r] to rank r, for each r: the same shape, with what rank r sent at [r]."""
        flat = x.contiguous().flatten(0, 1)
        sizes = [len(flat) // self.ranks] * self.ranks
        return all_to_all_single_autograd(flat, sizes, sizes, self.group).view(x.shape)


# --- The DiT: tokens ------------------------------------------------------------------------------


class TokenParallel:
    """Shares a DiT's tokens out over the ranks of a group.

    Outside self-attention no token needs the others, so each is computed by one rank alone. What
    the DiT returns is whole on every rank.

    Raises ValueError if the ranks cannot share the DiT's heads.
    """

    def __init__(self, dit: WanDiT, group: dist.ProcessGroup) -> None:
        self.tokens = Tokens(group)
        # By how many tokens the last rank's are filled up. Compiled blocks have a variant for each
        # number: for S itself that would be one for each clip. It is the same in both branches of a
        # training step, so backward may compute blocks again.
        self.missing = 0
        ranks = self.tokens.ranks
        if dit.config.num_heads % ranks:
            raise ValueError(
                f"{ranks} processes cannot share {dit.config.num_heads} attention heads: give "
                "--sequence-parallel a number that divides them"
            )
        # What changes is what makes the tokens, what mixes them, and what comes after the last
        # layer that treats them one by one.
        self.embed_all = dit._embed
        dit._embed = self.embed
        for block in dit.blocks:
            block.self_attn.attend = self.attend
        dit.head.register_forward_hook(lambda module, inputs, patches: self.gather(patches))
        self.own_forward, self.own_features = dit.forward, dit.features
        dit.forward, dit.features = self.forward, self.features

    def embed(self, *inputs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`WanDiT._embed`, and of its tokens this rank's: (B, s, d), with their rotary tables."""
        x, rope = self.embed_all(*inputs)
        self.missing = -x.shape[1] % self.tokens.ranks
        own_rope = tuple(self.tokens.own(table, dim=0) for table in rope)  # (s, 1, D) each
        return self.tokens.own(x, dim=1), own_rope

    def forward(self, *inputs: Any, capture: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """`WanDiT.forward`, whose head has gathered the velocity, but not A^(l)."""
        output = self.own_forward(*inputs, capture=capture)
        if capture is None:
            return output
        velocity, features = output
        return velocity, self.gather(features)

    def features(self, *inputs: Any) -> Tensor:
        """`WanDiT.features`, of all tokens."""
        return self.gather(self.own_features(*inputs))

    def gather(self, x: Tensor) -> Tensor:
        return self.tokens.gather(x, x.shape[1] * self.tokens.ranks - self.missing)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention over the tokens of all ranks: q, k, v (B, n, s, D) -> (B, n, s, D).

        Stands in the place of `model.Attention.attend`. In self-attention the mask is None.
        """
        q, k, v = self.tokens.to_heads(q, k, v).unbind()  # (B, n/N, N s, D) each
        # Nothing may attend to the zeros that fill up the last rank.
        num_tokens = k.shape[2] - self.missing  # S
        k = k[:, :, :num_tokens]
        v = v[:, :, :num_tokens]
        out = F.scaled_dot_product_attention(q, k, v)  # (B, n/N, N s, D)
        return self.tokens.to_tokens(out)


# --- The MLLM: frames, then tokens ----------------------------------------------------------------


class MLLMParallel:
    """Shares an MLLM's frames and tokens out over the ranks of a group.

    What it returns is whole on every rank. Where the ranks cannot share its heads (16 in
    Qwen2.5-VL-3B), each computes the language tower for itself.
    """

    def __init__(self, qwen: Qwen2_5_VL, group: dist.ProcessGroup) -> None:
        self.tokens = Tokens(group)
        self.merge = qwen.config.vision.spatial_merge_size
        self.see_own = qwen.visual.forward
        qwen.visual.forward = self.see
        if qwen.config.num_attention_heads % self.tokens.ranks == 0:
            self.decode_own = qwen.decode
            qwen.decode = self.decode
            for layer in qwen.model.layers:
                layer.self_attn.attend = self.attend

    def see(self, pixel_values: Tensor, grids: tuple[tuple[int, int, int], ...]) -> Tensor:
        """`VisionTower.forward`: no attention goes over time, so each rank sees some frames."""
        ranks = self.tokens.ranks
        num_frames = sum(t for t, _, _ in grids)
        if num_frames < ranks:  # such as a still: every rank sees all of it
            return self.see_own(pixel_values, grids)
        bounds = [num_frames * rank // ranks for rank in range(ranks + 1)]
        shares = [part_of(grids, first, end) for first, end in itertools.pairwise(bounds)]
        num_patches = [sum(t * h * w for t, h, w in share) for share in shares]
        own_patches = pixel_values.split(num_patches)[self.tokens.rank]
        visual = self.see_own(own_patches, shares[self.tokens.rank])  # (m, d), of this rank
        # Each rank sends all it has to every other.
        sent = [len(visual)] * ranks
        received = [patches // self.merge**2 for patches in num_patches]
        to_all = visual.repeat(ranks, 1)
        return all_to_all_single_autograd(to_all, received, sent, self.tokens.group)  # (M, d)

    def decode(self, x: Tensor, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`Qwen2_5_VL.decode` of this rank's tokens; the hidden states of all."""
        own_x = self.tokens.own(x, dim=1)  # (B, s, d)
        own_positions = self.tokens.own(positions, dim=2)  # (3, B, s)
        hidden = self.decode_own(own_x, own_positions, attention_mask)  # (B, s, d)
        return self.tokens.gather(hidden, x.shape[1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`qwen.Attention.attend` over the tokens of all ranks: (B, n, s, D) -> (B, n, s, D)."""
        q, k, v = self.tokens.to_heads(q, k, v).unbind()  # (B, n/N, N s, D) each
        # Behind the S tokens there may be zeros. Causal attention never looks at what comes later.
        if mask is not None:  # (B, 1, S, S)
            missing = k.shape[2] - mask.shape[-1]
            mask = F.pad(mask, (0, missing), value=False)
            # What they look at themselves is not used, but a softmax over nothing would be NaN.
            mask = F.pad(mask, (0, 0, 0, missing), value=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.tokens.to_tokens(out)


def part_of(
    grids: tuple[tuple[int, int, int], ...], first: int, end: int
) -> tuple[tuple[int, int, int], ...]:
    """The (t, h, w) grids of the pairs of frames from `first` to `end`, counted over all clips."""
    part = []
    start = 0
    for t, h, w in grids:
        frames = min(end, start + t) - max(first, start)
        if frames > 0:
            part.append((frames, h, w))
        start += t
    return tuple(part)


# --- The VAE: rows of the picture -----------------------------------------------------------------


class RowParallel:
    """Shares the rows of a VAE's picture out over the ranks of a group.

    Each holds whole rows of latents, and their pixels. Each convolution over space needs one more
    row on either side, which the neighbours send. The attention in the middle, over all pixels of
    a small frame, is computed by every rank.
    """

    def __init__(self, vae: WanVAE, group: dist.ProcessGroup) -> None:
        self.group = group
        self.factor = vae.config.spatial_factor
        self.encode_own, self.decode_own = vae._posterior_mean, vae.decode_chunks
        vae._posterior_mean, vae.decode_chunks = self.encode, self.decode_chunks
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

    def share_out(self, latent_height: int) -> None:
        """Choose the rows of latents that each rank holds."""
        ranks = dist.get_world_size(self.group)
        # If there are too few, the picture is small, and every rank computes all of it.
        parts = torch.arange(latent_height).tensor_split(ranks if latent_height >= ranks else 1)
        self.rank = dist.get_rank(self.group) % len(parts)
        self.starts = [int(part[0]) for part in parts]
        self.counts = [len(part) for part in parts]

    def encode(self, block: Tensor, *options: Any) -> Tensor:
        """`WanVAE._posterior_mean`: a whole block in, whole latents out, on every rank.

        So all ranks see alike whether float16 has overflowed.
        """
        self.share_out(block.shape[-2] // self.factor)
        return self.gather(self.encode_own(self.own(block, self.factor), *options))

    def decode_chunks(self, latents: Tensor, *options: Any) -> Iterator[Tensor]:
        """`WanVAE.decode_chunks`: whole latents in, whole blocks of frames out, on every rank."""
        self.share_out(latents.shape[-2])
        for frames in self.decode_own(self.own(latents), *options):
            yield self.gather(frames)

    def own(self, x: Tensor, unit: int = 1) -> Tensor:
        """This rank's rows of (..., H, W), where `unit` rows belong to a row of latents."""
        first = self.starts[self.rank] * unit
        count = self.counts[self.rank] * unit
        return x[..., first : first + count, :].contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks, (..., H, W), from this rank's."""
        if len(self.counts) == 1:
            return x
        unit = x.shape[-2] // self.counts[self.rank]  # rows of x to a row of latents
        # all_gather takes tensors of one shape: those with fewer rows are filled up with zeros.
        missing = unit * max(self.counts) - x.shape[-2]
        x = F.pad(x, (0, 0, 0, missing)).contiguous()
        parts = [torch.empty_like(x) for _ in self.counts]
        dist.all_gather(parts, x, self.group)
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
            messages.append(self.message(dist.isend, first, self.rank - 1))
            messages.append(self.message(dist.irecv, above, self.rank - 1))
        if self.rank < len(self.counts) - 1:
            last = x[..., -1:, :].contiguous()
            messages.append(self.message(dist.irecv, below, self.rank + 1))
            messages.append(self.message(dist.isend, last, self.rank + 1))
        for request in dist.batch_isend_irecv(messages) if messages else ():
            request.wait()
        return torch.cat((above, x, below), dim=-2)

    def message(self, operation: Any, row: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(operation, row, group=self.group, group_peer=rank)

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

    num_windows: of the clip. Raises ValueError if the ranks cannot share the DiT's heads.
    """

    def __init__(self, model: RVEDiT, vae: WanVAE, num_windows: int) -> None:
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
            MLLMParallel(model.encoder.qwen, mesh.get_group("tokens"))
        RowParallel(vae, dist.group.WORLD)

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


def finish() -> None:
    """Leave the other processes. On GPUs this waits for them: not after an error of one alone."""
    dist.destroy_process_group()
