"""The Wan2.2 diffusion transformer, the backbone f_θ of the paper (behaviour of wan/modules/model.py, TI2V-5B).

Two things are added to Wan, both asked for by the editor around it: each block attends to a context of its own (Eq. 3
is decided outside, in `rvedit.route_context`), and one block's cross-attention features, the A^(l) of Eq. 4, can be
returned. umT5's text embedding is left out: contexts arrive in the width of the transformer.

Letters: B batch, C latent channels, t h w the latent grid in patches, S = t·h·w tokens, N context tokens, d width,
n heads, D head width, L blocks (counted from 1, as in the paper).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Context = (
    Tensor | tuple[Tensor, Tensor | None]
)  # (B, N, d), or with a (B, N) bool mask, True where a token counts


@dataclass(frozen=True)
class DiTConfig:
    dim: int  # d
    ffn_dim: int
    num_heads: int
    num_blocks: int  # L: 30 in the public TI2V-5B, whatever the paper says
    in_channels: int  # C of z_t
    out_channels: int  # C of the velocity
    patch_size: tuple[int, int, int]  # frames, height, width of a token, in latents
    freq_dim: int = 256  # width of the sinusoidal timestep embedding
    eps: float = 1e-6

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # JSON has only lists
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(
                f"dim {self.dim} does not split into {self.num_heads} heads of an even width"
            )


# --- Positions ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def rope_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (S, 1, D) each, of the rotary angles of a (t, h, w) grid: made once for a grid.

    The D/2 rotated pairs are shared out to time, height and width, time taking the remainder. Angles are formed in
    float64 on the CPU, as in the official code, so that far positions are exact; the tables are float32. They hold a
    pair's numbers for both of its channels, and the first one's sine is negative, as `apply_rope` has it.
    """
    sizes = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    angles = []
    with torch.inference_mode(
        False
    ):  # the table outlives the call: training may need it after a sampling pass
        for axis, (length, size) in enumerate(zip(grid, sizes, strict=True)):
            rate = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)
            angle = (
                torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * rate
            )  # (length, size/2)
            shape = [1, 1, 1, -1]
            shape[axis] = length
            angles.append(angle.view(shape).expand(*grid, -1))
        angles = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)  # (S, 1, D/2)
        cos, sin = angles.cos().float(), angles.sin().float()
        return tuple(
            torch.stack(pair, dim=-1).flatten(-2).to(device) for pair in ((cos, cos), (-sin, sin))
        )


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring pairs of x, (B, S, n, D), by their token's angles, in float32.

    Exchanging the two of a pair is one copy, after which all products are of whole rows: on a CPU twice as fast as
    products of every second channel.
    """
    cos, sin = rope
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, n, D/2) each
    exchanged = torch.stack((second, first), dim=-1).flatten(-2)
    return (x * cos + exchanged * sin).to(x.dtype)  # the tables make the products float32


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000·t: (B,) in [0, 1] -> (B, dim) float32, cosines first."""
    rate = torch.exp(
        -math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    )
    angle = (1000 * t.float())[:, None] * rate
    return torch.cat((angle.cos(), angle.sin()), dim=1)


# --- Layers that stay in float32 under a bf16 model, by explicit casts: autocast breaks recomputation under FSDP2


class Float32Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(
            x.dtype
        )


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Modulation(NamedTuple):
    """AdaLN's three vectors for one sub-layer, (B, 1, d) float32 each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def modulate(x: Tensor, modulation: Modulation, eps: float) -> Tensor:
    """Parameter-free LayerNorm, then scale and shift; float32 inside and out."""
    return (
        F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + modulation.scale) + modulation.shift
    )


# --- Attention and blocks -------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention whose queries and keys are RMS-normalised over the whole width, before the heads part."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, eps=config.eps)
        self.norm_k = RMSNorm(config.dim, eps=config.eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (B, S, d) attends to context (B, N, d), all of it or where the (B, N) mask is True -> (B, S, d)."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)  # (B, S, n, D)
        k = self.norm_k(self.k(context)).unflatten(-1, heads)  # (B, N, n, D)
        v = self.v(context).unflatten(-1, heads)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if mask is not None:
            mask = mask[:, None, None, :]  # (B, N) -> the same for every head and query
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        return self.o(out.transpose(1, 2).flatten(2))  # (B, n, S, D) -> (B, S, d)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and the last modulated by the timestep."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(
            config.dim, eps=config.eps
        )  # Wan's name; its norm1 and norm2 have no parameters
        self.cross_attn = Attention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, 6, config.dim), std=config.dim**-0.5)
        )

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rope: tuple[Tensor, Tensor],
        context: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, S, d), time (B, 6, d) float32 -> the stream and A^(l), the cross-attention output, both (B, S, d)."""
        vectors = (self.modulation.float() + time.float()).chunk(6, dim=1)  # 6 × (B, 1, d)
        attn, ffn = Modulation(*vectors[:3]), Modulation(*vectors[3:])
        y = modulate(x, attn, self.eps).to(x.dtype)
        x = (x + self.self_attn(y, y, rope=rope) * attn.gate).to(
            x.dtype
        )  # the gate makes the sum float32
        features = self.cross_attn(self.norm3(x), context, mask)
        x = x + features
        y = modulate(x, ffn, self.eps).to(x.dtype)
        x = (x + self.ffn(y) * ffn.gate).to(x.dtype)
        return x, features


class Head(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.head = Float32Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.modulation = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, 2, config.dim), std=config.dim**-0.5)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, S, d), time (B, d) float32 -> one patch of velocity a token, (B, S, C·prod(patch_size)) float32."""
        shift, scale = (self.modulation.float() + time.float().unsqueeze(1)).chunk(2, dim=1)
        return self.head(modulate(x, Modulation(shift, scale), self.eps))


class WanDiT(nn.Module):
    """The velocity û_θ(z_t, t | C). State dict: Wan's key names, and source_embedding for the clip to be edited."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patch_embedding = nn.Conv3d(
            config.in_channels, config.dim, kernel_size=patch, stride=patch
        )
        self.source_embedding = nn.Conv3d(
            config.in_channels, config.dim, kernel_size=patch, stride=patch
        )
        # Training starts from a backbone that knows no source clip, so at first its embedding must change nothing.
        nn.init.zeros_(self.source_embedding.weight)
        nn.init.zeros_(self.source_embedding.bias)
        self.time_embedding = nn.Sequential(
            Float32Linear(config.freq_dim, config.dim),
            nn.SiLU(),
            Float32Linear(config.dim, config.dim),
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.head = Head(config)

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        contexts: list[Context],
        source_latents: Tensor | None = None,
        capture: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict the velocity at z_t.

        z_t, source_latents: (B, C, T', H', W') normalised latents, sides multiples of the patch. t: (B,) in [0, 1],
        1 is pure noise. contexts: C^(1) ... C^(L), one for each block. Returns the velocity, float32 in z_t's shape;
        with capture=l also A^(l), (B, S, d). Raises ValueError where a shape does not fit.
        """
        time = self.time_embedding(timestep_embedding(t, self.config.freq_dim))  # (B, d)
        captured = None
        for number, (x, features) in enumerate(
            self._stream(z_t, t, time, contexts, source_latents), start=1
        ):
            last, captured = x, features if number == capture else captured
        velocity = self._unpatchify(self.head(last, time), z_t.shape)
        return velocity if capture is None else (velocity, captured)

    def features(
        self,
        z_t: Tensor,
        t: Tensor,
        contexts: list[Context],
        source_latents: Tensor | None,
        block: int,
    ) -> Tensor:
        """A^(block) alone, (B, S, d), bit for bit that of forward(capture=block): the pass ends at that block."""
        time = self.time_embedding(timestep_embedding(t, self.config.freq_dim))
        stream = self._stream(z_t, t, time, contexts, source_latents)
        _, features = next(itertools.islice(stream, block - 1, None))
        return features

    def _stream(
        self,
        z_t: Tensor,
        t: Tensor,
        time: Tensor,
        contexts: list[Context],
        source_latents: Tensor | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, block after block, the residual stream and the cross-attention features, (B, S, d) each."""
        self._check(z_t, contexts, source_latents)
        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(z_t.to(dtype))  # (B, d, t, h, w)
        if source_latents is not None:
            # Scaled by t: the more of z_t is noise, the more the source has to say (Kiwi-Edit's rule).
            x = x + (t.view(-1, 1, 1, 1, 1) * self.source_embedding(source_latents.to(dtype))).to(
                dtype
            )
        rope = rope_table(tuple(x.shape[2:]), self.config.dim // self.config.num_heads, x.device)
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, S, d)
        time = self.time_projection(time).unflatten(-1, (6, -1))  # (B, 6, d)
        for block, context in zip(self.blocks, contexts, strict=True):
            context, mask = context if isinstance(context, tuple) else (context, None)
            x, features = block(x, time, rope, context.to(dtype), mask)
            yield x, features

    def _check(self, z_t: Tensor, contexts: list[Context], source_latents: Tensor | None) -> None:
        if len(contexts) != len(self.blocks):
            raise ValueError(
                f"{len(contexts)} contexts for {len(self.blocks)} blocks: give one for each"
            )
        if any(
            side % patch for side, patch in zip(z_t.shape[2:], self.config.patch_size, strict=True)
        ):
            raise ValueError(
                f"latents {tuple(z_t.shape)} do not divide into patches of {self.config.patch_size}"
            )
        if source_latents is not None and source_latents.shape != z_t.shape:
            raise ValueError(
                f"source latents {tuple(source_latents.shape)} beside z_t {tuple(z_t.shape)}"
            )

    def _unpatchify(self, patches: Tensor, shape: torch.Size) -> Tensor:
        """(B, S, pt·ph·pw·C), each token ordered as patch frame, row, column, channel -> (B, C, T', H', W')."""
        grid = [
            side // patch for side, patch in zip(shape[2:], self.config.patch_size, strict=True)
        ]
        x = patches.unflatten(2, (*self.config.patch_size, -1)).unflatten(
            1, grid
        )  # (B, t, h, w, pt, ph, pw, C)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
