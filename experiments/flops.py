"""The work of each part of the system, in floating-point operations counted from shapes, to the last one.

2·m·k·n for a product of (m, k) and (k, n), likewise for convolutions; causal attention in full; a backward pass as two
forward passes; what is recomputed does not count.
"""

from __future__ import annotations

import math
from typing import Any

from model import DiTConfig
from qwen import QwenConfig, VisionConfig
from rvedit import RVEDiTConfig
from vae import VAEConfig

Size = tuple[int, int, int]  # T, H, W


def dit_flops(
    config: DiTConfig, tokens: int, contexts: list[int], source: bool = True, head: bool = True
) -> int:
    """A pass over S tokens through as many blocks as there are contexts, of N tokens each."""
    d, patch = config.dim, math.prod(config.patch_size)
    embeddings = 2 * tokens * d * patch * config.in_channels * (1 + source) + 2 * d * (
        config.freq_dim + 7 * d
    )
    # Of a token q, k, v, o, cross-attention's q and o, and the feed-forward; of a context token k and v.
    linear = sum(2 * tokens * d * (6 * d + 2 * config.ffn_dim) + 4 * n * d * d for n in contexts)
    attention = sum(4 * tokens * (tokens + n) * d for n in contexts)
    return embeddings + linear + attention + head * 2 * tokens * d * patch * config.out_channels


def vae_flops(config: VAEConfig, size: Size) -> tuple[int, int]:
    """Encoding and decoding; the first frame takes no part in resampling time, and nothing is before it."""

    def conv(grid: Size, inside: int, outside: int, kernel: int = 27) -> int:
        taps = 9 * (3 * grid[0] - 2) if kernel == 27 else kernel * grid[0]
        return 2 * taps * grid[1] * grid[2] * inside * outside

    def residuals(grid: Size, inside: int, outside: int, number: int) -> int:
        first = conv(grid, inside, outside) + (inside != outside) * conv(grid, inside, outside, 1)
        return first + (2 * number - 1) * conv(grid, outside, outside)

    def middle(grid: Size, dim: int) -> int:
        attention = 4 * math.prod(grid) * grid[1] * grid[2] * dim
        return residuals(grid, dim, dim, 2) + conv(grid, dim, 4 * dim, 1) + attention

    pixels, z, temporal = 3 * config.patch_size**2, config.z_dim, config.temporal_downsample
    grids = [
        (size[0], size[1] // config.patch_size, size[2] // config.patch_size)
    ]  # of each stage of the encoder
    for halve in temporal:
        t, h, w = grids[-1]
        grids.append(((t - 1) // (1 + halve) + 1, h // 2, w // 2))
    dims, last = [config.dim * m for m in (1, *config.dim_mult)], grids[-1]
    encode = conv(grids[0], pixels, dims[0]) + middle(last, dims[-1])
    encode += conv(last, dims[-1], 2 * z) + conv(last, 2 * z, 2 * z, 1)
    encode += sum(map(residuals, grids, dims, dims[1:], [config.num_res_blocks] * len(grids)))
    for (t, _, _), (shorter, h, w), dim, halve in zip(
        grids, grids[1:], dims[1:], temporal, strict=False
    ):
        encode += conv((t, h, w), dim, dim, 9) + halve * conv((shorter - 1, h, w), dim, dim, 3)

    grids, dims = (
        grids[::-1],
        [config.dec_dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])],
    )
    decode = (
        conv(last, z, z, 1)
        + conv(last, z, dims[0])
        + middle(last, dims[0])
        + conv(grids[-1], dims[-1], pixels)
    )
    decode += sum(map(residuals, grids, dims, dims[1:], [config.num_res_blocks + 1] * len(grids)))
    for (t, h, w), larger, dim, double in zip(
        grids, grids[1:], dims[1:], temporal[::-1], strict=False
    ):
        decode += double * conv((t - 1, h, w), dim, 2 * dim, 3) + conv(larger, dim, dim, 9)
    return encode, decode


def vision_flops(config: VisionConfig, out_dim: int, grid: Size) -> int:
    """The MLLM's vision tower over a (t, h, w) grid of patches, which attend within a frame or a window of it."""
    (t, h, w), d, merge = grid, config.hidden_size, config.spatial_merge_size
    side = config.window_size // (config.patch_size * merge) * merge  # of a window, in patches
    squares = [n // side * side**2 + (n % side) ** 2 for n in (h, w)]
    full = sum(block < config.depth for block in config.fullatt_block_indexes)
    pairs = full * (h * w) ** 2 + (config.depth - full) * math.prod(squares)
    patch = 3 * config.temporal_patch_size * config.patch_size**2
    linear = config.depth * (4 * d * d + 3 * d * config.intermediate_size) + patch * d
    return 2 * t * h * w * (linear + d * (merge**2 * d + out_dim)) + 4 * t * pairs * d


def language_flops(config: QwenConfig, tokens: int, rank: int) -> tuple[int, int]:
    """The language tower: products with its own weights; attention and a LoRA of that rank."""
    d, kv = (
        config.hidden_size,
        config.hidden_size * config.num_key_value_heads // config.num_attention_heads,
    )
    own = 2 * tokens * (2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size)
    lora = 2 * tokens * rank * (6 * d + 2 * kv)
    return config.num_hidden_layers * own, config.num_hidden_layers * (4 * tokens**2 * d + lora)


def flops(config: RVEDiTConfig, size: Size, inputs: tuple[Any, ...], steps: int) -> dict[str, int]:
    """Of each part, for a clip and what the MLLM reads of it (`EditEncoder.prepare`)."""
    K, L, D, d = (
        config.num_editing_tokens,
        config.dit.num_blocks,
        config.qwen.hidden_size,
        config.dit.dim,
    )
    S = (
        ((size[0] - 1) // config.vae.temporal_factor + 1)
        * size[1]
        * size[2]
        // config.spatial_factor**2
    )
    (_, N), grid, (spans,) = inputs[0].shape, inputs[2][0].tolist(), inputs[4]
    everything = K + sum(
        span.stop - span.start for span in spans
    )  # editing, visual and textual tokens
    contexts = [K] * config.routing_depth + [everything] * (L - config.routing_depth)
    dit, (encode, decode) = dit_flops(config.dit, S, contexts), vae_flops(config.vae, size)
    vision, (own, rest) = (
        vision_flops(config.qwen.vision, D, grid),
        language_flops(config.qwen, N, config.lora_rank),
    )
    rest += 2 * everything * (D * d + d * d)  # connectors
    mllm, info_nce = vision + own + rest, 2 * 2 * S * S * d
    work = dict(dit=dit, info_nce=info_nce, encode=encode, decode=decode, mllm=mllm)
    # With LoRA the vision tower and the weights under it get no gradient; the toy trains whole.
    backward = own + 2 * rest if config.lora_rank else 2 * mllm
    work["literal step"] = 2 * encode + 2 * mllm + backward + 4 * dit + info_nce
    work["step"] = (
        work["literal step"] - dit + dit_flops(config.dit, S, contexts[: (L + 1) // 2], head=False)
    )
    work["dit as Wan's"] = dit_flops(config.dit, S, [K] * L, source=False)
    work["mllm as Qwen's"] = vision + sum(language_flops(config.qwen, N, 0))
    return work | {"edit": encode + mllm + steps * dit + decode}
