"""The Wan2.2 diffusion transformer: the backbone f_θ of the paper (wan/modules/model.py, TI2V-5B).

Two things are added to Wan, both for the editor around it:
1. Each block attends to a context of its own. Which one, Eq. 3 decides in `rvedit.route_context`.
2. The cross-attention features of one block, the A^(l) of Eq. 4, can be returned.
umT5's text embedding is left out: contexts arrive in the width of the transformer.

Letters: B batch, C latent channels, t h w the latent grid in patches, S = t·h·w tokens, N context
tokens, d width, n heads, D head width, L blocks (counted from 1, as in the paper).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A context (B, N, d), or a pair with a mask (B, N), True where a token counts (None: everywhere).
Context = Tensor | tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class DiTConfig:
    dim: int  # d
    ffn_dim: int  # hidden width of the feed-forward
    num_heads: int  # n
    num_blocks: int  # L: 30 in the public TI2V-5B, whatever the paper says
    in_channels: int  # C of z_t
    out_channels: int  # C of the velocity
    patch_size: tuple[int, int, int]  # frames, height, width of a token, in latents
    freq_dim: int = 256  # width of the sinusoidal timestep embedding
    eps: float = 1e-6  # of all norms
    bf16_timestep: bool = False  # embed 1000·t rounded to bfloat16: Kiwi-Edit trains and samples so
    # (h, w) in tokens of the clips it was trained on, if all were alike: see `rope_table`.
    home_grid: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # JSON has only lists
        object.__setattr__(self, "home_grid", tuple(self.home_grid))
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(
                f"dim {self.dim} does not split into {self.num_heads} heads of an even width"
            )


# --- Positions and time ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # the cache outlives a sampling pass, and training may need it then
def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    device: torch.device,
    home_grid: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, 1, D) of the rotary angles of a (t, h, w) grid, in float32.

    The D/2 pairs of channels are shared out to time, height and width; time takes the remainder. As
    in the official code, angles are formed in float64 on the CPU, so that far positions are exact.
    Both channels of a pair have the same numbers, but for the sign of the sine, as `apply_rope`
    needs them.
    home_grid: (h, w), over which the rows and columns of any grid are spread (position
    interpolation, arXiv 2306.15595). A model that was trained on one size then finds the middle and
    the borders of every frame at the positions that it knows. Wan's is (): tokens count 0, 1, 2 ...
    """
    size_h = size_w = 2 * (head_dim // 6)
    size_t = head_dim - size_h - size_w
    angles = []
    for axis, size in enumerate((size_t, size_h, size_w)):
        exponents = torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size
        positions = torch.arange(grid[axis], dtype=torch.float64, device="cpu")
        if home_grid and axis > 0:
            scale = home_grid[axis - 1] / grid[axis]
            positions = (positions + 0.5) * scale - 0.5  # the frame's borders stay in their places
        angle = torch.outer(positions, 10000.0**-exponents)  # (length of the axis, size / 2)
        shape = [1, 1, 1, size // 2]
        shape[axis] = grid[axis]
        angles.append(angle.view(shape).expand(*grid, size // 2))
    angles = torch.cat(angles, dim=-1)  # (t, h, w, D/2)
    angles = angles.flatten(0, 2).unsqueeze(1)  # (S, 1, D/2)
    cos = angles.cos().float()
    sin = angles.sin().float()
    cos = torch.stack((cos, cos), dim=-1).flatten(-2)  # (S, 1, D)
    sin = torch.stack((-sin, sin), dim=-1).flatten(-2)  # (S, 1, D)
    return cos.to(device), sin.to(device)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring channels of x (B, S, n, D) by their token's angles, in float32."""
    cos, sin = rope
    # With the channels of each pair exchanged by a copy, all products are of whole rows. On a CPU
    # that is twice as fast as products of every second channel.
    pairs = x.unflatten(-1, (-1, 2))  # (B, S, n, D/2, 2)
    first, second = pairs.unbind(-1)  # (B, S, n, D/2) each
    exchanged = torch.stack((second, first), dim=-1).flatten(-2)  # (B, S, n, D)
    # x * cos + exchanged * sin; the float32 tables make the products float32.
    return torch.addcmul(x * cos, exchanged, sin).to(x.dtype)


def timestep_embedding(t: Tensor, dim: int, bf16_timestep: bool = False) -> Tensor:
    """Sinusoids of 1000·t, cosines first: t (B,) in [0, 1] -> (B, dim) float32.

    bf16_timestep: round 1000·t to bfloat16 first; above 512 that means to a multiple of 4.
    """
    timestep = 1000 * t.float()
    if bf16_timestep:
        timestep = timestep.bfloat16().float()
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    frequencies = torch.exp(-math.log(10000) * exponents)
    angles = timestep[:, None] * frequencies  # (B, dim / 2)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


# --- Layers that compute in float32 in a bf16 model -----------------------------------------------

# In a bf16 model only the products are in bf16. Norms, modulation, the timestep's layers, the head
# and the residual stream are float32, as in the official code under autocast. Here this is done by
# explicit casts: an autocast region in a block breaks its recomputation under FSDP2.


class Float32Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters, then AdaLN's scale and shift, which come from the timestep.

    x (B, S, d), shift and scale (B, 1, d) -> (B, S, d); all float32.
    """
    scale = 1 + scale
    if len(x) == 1:  # as weight and bias of the norm: one pass over x, and not three
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), eps)
    return F.layer_norm(x, x.shape[-1:], eps=eps) * scale + shift


# --- Attention and blocks -------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention. The RMS norms of queries and keys go over all heads together."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        # Whatever dtype these norms are given, PyTorch computes them in float32.
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (B, S, d) attends to context (B, N, d), where the mask (B, N) is True -> (B, S, d)."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)  # (B, S, n, D)
        k = self.norm_k(self.k(context)).unflatten(-1, heads)  # (B, N, n, D)
        v = self.v(context).unflatten(-1, heads)  # (B, N, n, D)
        if rope is not None:
            q = apply_rope(q, rope)
            k = apply_rope(k, rope)
        if mask is not None:
            mask = mask[:, None, None, :]  # (B, 1, 1, N): the same for every head and query
        q = q.transpose(1, 2)  # (B, n, S, D)
        k = k.transpose(1, 2)  # (B, n, N, D)
        v = v.transpose(1, 2)
        out = self.attend(q, k, v, mask)  # (B, n, S, D)
        return self.o(out.transpose(1, 2).flatten(2))  # (B, S, d)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # A method of its own, so that sequence.py can put attention over several GPUs here.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the timestep modulates first and last."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(config.dim, eps=config.eps)  # Wan's norm1, norm2: no parameters
        self.cross_attn = Attention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rope: tuple[Tensor, Tensor],
        context: Context,
    ) -> tuple[Tensor, Tensor]:
        """x (B, S, d) and time (B, 6, d), float32 -> the residual stream, float32, and A^(l).

        With a stream in bf16 the error of 30 blocks would be 2.5 to 3 times as large. In float32 it
        takes 114 MB more for each block whose input is kept for the backward pass (S = 18,480).
        """
        tokens, mask = context if isinstance(context, tuple) else (context, None)
        dtype = self.ffn[0].weight.dtype  # of all products
        vectors = self.modulation.float() + time.float()  # (B, 6, d)
        attn_shift, attn_scale, attn_gate, ffn_shift, ffn_scale, ffn_gate = vectors.chunk(6, dim=1)

        y = modulate(x, attn_shift, attn_scale, self.eps).to(dtype)
        x = torch.addcmul(x, self.self_attn(y, y, rope=rope), attn_gate)  # x + attention * gate

        y = self.norm3(x).to(dtype)
        features = self.cross_attn(y, tokens.to(dtype), mask)  # A^(l), Eq. 4
        x = x + features

        y = modulate(x, ffn_shift, ffn_scale, self.eps).to(dtype)
        x = torch.addcmul(x, self.ffn(y), ffn_gate)
        return x, features


class Head(nn.Module):
    """The last layer: each token becomes one patch of velocity."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.head = Float32Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, S, d), time (B, d) float32 -> (B, S, pt · ph · pw · C) float32."""
        vectors = self.modulation.float() + time.float().unsqueeze(1)  # (B, 2, d)
        shift, scale = vectors.chunk(2, dim=1)
        return self.head(modulate(x, shift, scale, self.eps))


# --- The transformer ------------------------------------------------------------------------------


class WanDiT(nn.Module):
    """Predicts the velocity û_θ(z_t, t | C).

    Its state dict has Wan's key names, and `source_embedding` for the clip that is to be edited.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=patch, stride=patch)
        # Zero at first beside Wan's weights, which know no source clip: see `rvedit.initialise`.
        self.source_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=patch, stride=patch)
        self.time_embedding = nn.Sequential(
            Float32Linear(config.freq_dim, dim), nn.SiLU(), Float32Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(dim, 6 * dim))
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
        """Predict the velocity at z_t, float32 in its shape; with capture=l, return A^(l) as well.

        z_t, source_latents: (B, C, T', H', W') normalised latents, whose sides are multiples of the
        patch. t: (B,) in [0, 1], where 1 is pure noise. contexts: C^(1) ... C^(L), one for each
        block. A^(l): (B, S, d). Raises ValueError if a shape does not fit, or there is no block l.
        """
        self._check(z_t, contexts, source_latents, capture)
        x, rope = self._embed(z_t, t, source_latents)
        time, block_time = self._embed_time(t)
        captured = None
        for number, (block, context) in enumerate(zip(self.blocks, contexts, strict=True), start=1):
            x, features = block(x, block_time, rope, context)
            if number == capture:
                captured = features
        velocity = self._unpatchify(self.head(x, time), z_t.shape)
        return velocity if capture is None else (velocity, captured)

    def features(
        self,
        z_t: Tensor,
        t: Tensor,
        contexts: list[Context],
        source_latents: Tensor | None,
        block: int,
    ) -> Tensor:
        """A^(block) alone, bit for bit as forward captures it. Later blocks do not run."""
        self._check(z_t, contexts, source_latents, block)
        x, rope = self._embed(z_t, t, source_latents)
        _, block_time = self._embed_time(t)
        for number in range(block):
            x, features = self.blocks[number](x, block_time, rope, contexts[number])
        return features

    def _embed(
        self, z_t: Tensor, t: Tensor, source_latents: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Latents -> tokens (B, S, d), float32, and the rotary table of their grid."""
        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(z_t.to(dtype)).float()  # (B, d, t, h, w)
        if source_latents is not None:
            # Scaled by t, as in Kiwi-Edit: the more noise z_t has, the more the source has to say.
            source = self.source_embedding(source_latents.to(dtype))  # (B, d, t, h, w)
            x = x + t.view(-1, 1, 1, 1, 1) * source
        head_dim = self.config.dim // self.config.num_heads
        rope = rope_table(tuple(x.shape[2:]), head_dim, x.device, self.config.home_grid)
        return x.flatten(2).transpose(1, 2).contiguous(), rope

    def _embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) -> its embedding for the head (B, d) and for the blocks (B, 6, d), float32."""
        config = self.config
        time = self.time_embedding(timestep_embedding(t, config.freq_dim, config.bf16_timestep))
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def _check(
        self,
        z_t: Tensor,
        contexts: list[Context],
        source_latents: Tensor | None,
        block: int | None,
    ) -> None:
        patch_size = self.config.patch_size
        if block is not None and not 1 <= block <= len(self.blocks):
            raise ValueError(f"block {block} of {len(self.blocks)}, which are counted from 1")
        if len(contexts) != len(self.blocks):
            raise ValueError(
                f"{len(contexts)} contexts for {len(self.blocks)} blocks: give one for each"
            )
        if any(side % patch for side, patch in zip(z_t.shape[2:], patch_size, strict=True)):
            raise ValueError(
                f"latents {tuple(z_t.shape)} do not divide into patches of {patch_size}"
            )
        if source_latents is not None and source_latents.shape != z_t.shape:
            raise ValueError(
                f"source latents {tuple(source_latents.shape)} beside z_t {tuple(z_t.shape)}"
            )

    def _unpatchify(self, patches: Tensor, shape: torch.Size) -> Tensor:
        """Put patches (B, S, pt · ph · pw · C) back in their places: (B, C, T', H', W')."""
        pt, ph, pw = self.config.patch_size
        grid = (shape[2] // pt, shape[3] // ph, shape[4] // pw)  # t, h, w
        x = patches.unflatten(2, (pt, ph, pw, -1))  # (B, S, pt, ph, pw, C)
        x = x.unflatten(1, grid)  # (B, t, h, w, pt, ph, pw, C)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, t, pt, h, ph, w, pw)
        return x.reshape(shape[0], -1, *shape[2:])


def flops(config: DiTConfig, S: int, context: list[int]) -> int:
    """Floating-point operations of a pass over S tokens; block l reads context[l - 1] tokens.

    A product of (m, k) and (k, n) has 2·m·k·n. Embeddings and head are left out: they are few.
    """
    d = config.dim
    total = 0
    for N in context:
        self_attention = 2 * S * 4 * d * d + 2 * (2 * S * S * d)
        cross_attention = 2 * S * 2 * d * d + 2 * N * 2 * d * d + 2 * (2 * S * N * d)
        feed_forward = 2 * (2 * S * d * config.ffn_dim)
        total += self_attention + cross_attention + feed_forward
    return total
