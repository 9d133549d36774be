"""Qwen2.5-VL in plain PyTorch, with LoRA: the network that `mllm.EditEncoder` reads clips and instructions with.

The behaviour is that of transformers' `modeling_qwen2_5_vl.py`; the state dict has the hub's names.

Letters: B batch, N tokens of a row, K editing tokens, P patches and M visual tokens of all clips together,
d width of the tower at hand, D head width, t h w the patch grid of a clip, t counting pairs of frames.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, under config.json's field names. The defaults are Qwen2.5-VL-3B's."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    patch_size: int = 14
    temporal_patch_size: int = 2  # frames to a patch
    spatial_merge_size: int = 2  # 2 x 2 patches make one visual token
    window_size: int = 112  # side of an attention window in pixels
    fullatt_block_indexes: tuple[int, ...] = (
        7,
        15,
        23,
        31,
    )  # the blocks without windows, counted from 0
    tokens_per_second: int = 2  # M-RoPE: time steps to a second of video


@dataclass(frozen=True)
class QwenConfig:
    """The language tower, under config.json's field names, with the vision tower in it."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    max_position_embeddings: int = 128_000  # the longest sequence
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (
        16,
        24,
        24,
    )  # rotary frequencies that turn with time, row, column
    video_token_id: int = 151656  # <|video_pad|>, the placeholder of a visual token
    query_token_id: int = 151646  # <|object_ref_start|>, the placeholder of an editing-token query

    def __post_init__(self) -> None:
        if isinstance(self.vision, dict):  # read from JSON, where a tuple is a list
            blocks = tuple(self.vision["fullatt_block_indexes"])
            vision = VisionConfig(**self.vision | {"fullatt_block_indexes": blocks})
            object.__setattr__(self, "vision", vision)
        object.__setattr__(self, "mrope_section", tuple(self.mrope_section))

    @classmethod
    def from_hub(cls, config_json: dict[str, Any], query_token_id: int = 151646) -> QwenConfig:
        """Read a Qwen2.5-VL config.json, flat as on the hub or nested as newer transformers write it."""
        text = config_json | config_json.get("text_config", {}) | {"query_token_id": query_token_id}
        text |= text.get("rope_parameters") or text.get("rope_scaling") or {}
        try:
            vision = {f.name: config_json["vision_config"][f.name] for f in fields(VisionConfig)}
            return cls(
                **{f.name: vision if f.name == "vision" else text[f.name] for f in fields(cls)}
            )
        except KeyError as error:
            raise ValueError(f"no {error} in it, so it is not a Qwen2.5-VL model's") from None


class RMSNorm(nn.RMSNorm):
    """RMSNorm that computes in float32 whatever the model's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(
            x.dtype
        )


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, ffn_dim: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=bias)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=bias)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    return theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)  # (dim/2,)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in float32: x (..., D), cos and sin (..., D/2); channel i turns with i + D/2."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(
    False
)  # the layout outlives the call: training may need it after a sampling pass
def patch_layout(
    grids: tuple[tuple[int, int, int], ...], merge: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Row and column (P, 2) of each patch; window order (P,); its runs, (number of windows, patches in each).

    Window order makes the patches of a window neighbours. A window is `window` patches wide and high, less
    where the grid ends. Equal ones stand side by side: each size is one attention call without a mask.
    """
    positions = []  # clip, pair of frames, row, column
    for clip, (t, h, w) in enumerate(grids):
        at = torch.cartesian_prod(
            torch.tensor([clip]), torch.arange(t), torch.arange(h), torch.arange(w)
        )
        at = at.view(t, h // merge, merge, w // merge, merge, 4)
        positions.append(at.transpose(2, 3).reshape(-1, 4))  # the order of preprocess_frames
    positions = torch.cat(positions)
    cells = (
        positions // torch.tensor([1, 1, window, window]) @ torch.tensor([2**48, 2**32, 2**16, 1])
    )
    _, index, sizes = cells.unique(
        return_inverse=True, return_counts=True
    )  # one number for each window
    order = torch.argsort(sizes[index] * len(sizes) + index, stable=True)  # by size, then by window
    sizes, numbers = sizes.unique(return_counts=True)
    runs = list(zip(numbers.tolist(), sizes.tolist(), strict=True))
    return positions[:, 2:].to(device), order.to(device), runs


class VisionAttention(nn.Module):
    """Self-attention within groups of neighbouring patches."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # (P, heads, D)
        qkv = torch.stack([rotate(q, cos, sin), rotate(k, cos, sin), v])
        out = []
        for run, (number, size) in zip(
            qkv.split([n * s for n, s in runs], dim=1), runs, strict=True
        ):
            q, k, v = run.unflatten(1, (number, size)).transpose(2, 3)  # (number, heads, size, D)
            out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
        return self.proj(torch.cat(out).flatten(1))  # (P, d)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=1e-6)
        self.norm2 = RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, runs)
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Patches to visual tokens. "Full" attention spans a pair of frames; no attention goes over time."""

    def __init__(self, config: VisionConfig, out_dim: int) -> None:
        super().__init__()
        self.config = config
        dim, merged_dim = config.hidden_size, config.hidden_size * config.spatial_merge_size**2
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv3d(3, dim, kernel, stride=kernel, bias=False)}
        )
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        mlp = nn.Sequential(
            nn.Linear(merged_dim, merged_dim), nn.GELU(), nn.Linear(merged_dim, out_dim)
        )
        self.merger = nn.ModuleDict({"ln_q": RMSNorm(dim, eps=1e-6), "mlp": mlp})

    def forward(self, pixel_values: Tensor, grids: tuple[tuple[int, int, int], ...]) -> Tensor:
        """pixel_values (P, 3 * 2 * patch * patch) of clips with (t, h, w) grids -> (M, out_dim)."""
        config, merge = self.config, self.config.spatial_merge_size
        weight = self.patch_embed.proj.weight.flatten(
            1
        )  # patches do not overlap: a matrix product does it
        x = F.linear(pixel_values.to(weight.dtype), weight)  # (P, d)
        window = config.window_size // (config.patch_size * merge) * merge
        positions, order, windows = patch_layout(grids, merge, window, x.device)
        back, frames = order.argsort(), [(t, h * w) for t, h, w in grids]
        # Half of the rotary frequencies turn with the row, half with the column.
        frequencies = rotary_frequencies(
            config.hidden_size // config.num_heads // 2, 10_000.0, x.device
        )
        angles = (positions[..., None] * frequencies).flatten(1).unsqueeze(1)  # (P, 1, D/2)
        cos, sin = angles.cos(), angles.sin()

        # Patches stay in window order and return to frame order around the few blocks with full attention.
        x, window_cos, window_sin = x[order], cos[order], sin[order]
        for i, block in enumerate(self.blocks):
            if i in config.fullatt_block_indexes:
                x = block(x[back], cos, sin, frames)[order]
            else:
                x = block(x, window_cos, window_sin, windows)
        x = self.merger.ln_q(x[back]).unflatten(0, (-1, merge**2))  # (M, 4, d)
        return self.merger.mlp(x.flatten(1))


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key-value head."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        dim, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim // self.group_size)
        self.v_proj = nn.Linear(dim, dim // self.group_size)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        qkv = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in qkv
        )  # (B, heads, N, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Repeating the few key-value heads is cheap and, unlike enable_gqa, works with every fused kernel.
        k, v = (y.repeat_interleave(self.group_size, dim=1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, N, d)


class DecoderLayer(nn.Module):
    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, d), cos and sin (B, 1, N, D/2), mask (B, 1, N, N) true where a row looks, or None."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2_5_VL(nn.Module):
    """Qwen2.5-VL without its output head. The state dict has the hub's names, `visual.*` and `model.*`."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision, config.hidden_size)
        self.model = nn.ModuleDict()
        # Not nn.Embedding(...), whose `normal_` on the meta device imports torch._dynamo: seconds.
        words = torch.randn(config.vocab_size, config.hidden_size)
        self.model["embed_tokens"] = nn.Embedding.from_pretrained(words, freeze=False)
        self.model["layers"] = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.model["norm"] = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def encode_video(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches (P, 3 * 2 * patch^2) of B clips, grid_thw (B, 3) on the CPU -> visual tokens (M, d)."""
        return self.visual(pixel_values, tuple(map(tuple, grid_thw.tolist())))

    def position_ids(
        self, input_ids: Tensor, grid_thw: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """M-RoPE positions (3, B, N): time, row, column of each token. One clip in a row, padding is at 0.

        Text counts up in all three. The clip begins where the text before it ends, in time it steps by
        `tokens_per_second` (a pair of frames counts as a second, as in Kiwi-Edit), and the text behind it goes on
        after its largest index on any axis. So Qwen2.5-VL and Kiwi-Edit were trained; transformers 5 leaves the time
        axis out of that maximum, which differs for long clips of very small frames.
        """
        vision, device = self.config.vision, input_ids.device
        size = grid_thw // torch.tensor([1, vision.spatial_merge_size, vision.spatial_merge_size])
        step = torch.tensor([vision.tokens_per_second, 1, 1])
        cells = [torch.cartesian_prod(*map(torch.arange, clip)) * step for clip in size.tolist()]
        extent = ((size - 1) * step).amax(1, keepdim=True).to(device) + 1  # (B, 1)
        cells = torch.cat(cells).to(device)

        is_video = input_ids == self.config.video_token_id  # (B, N)
        is_real = torch.ones_like(is_video) if attention_mask is None else attention_mask.bool()
        num_text = (is_real & ~is_video).cumsum(-1)  # text tokens up to and with this one
        text = num_text - 1 + (is_video.cumsum(-1) > 0) * extent
        cell = num_text.new_zeros(*num_text.shape, 3).masked_scatter(is_video[..., None], cells)
        positions = torch.where(is_video[..., None], num_text[..., None] + cell, text[..., None])
        return (positions * is_real[..., None]).movedim(-1, 0)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        grid_thw: Tensor,
        queries: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states (B, N, d), after the final norm.

        input_ids (B, N), a row with placeholders for one clip's visual tokens and K queries; pixel_values and
        grid_thw as in `encode_video`; queries (K, d); attention_mask (B, N) true for real tokens, or None.
        """
        is_video = (input_ids == self.config.video_token_id)[..., None]  # (B, N, 1)
        is_query = (input_ids == self.config.query_token_id)[..., None]
        x = self.model.embed_tokens(input_ids)  # (B, N, d)
        x = x.masked_scatter(is_video, self.encode_video(pixel_values, grid_thw).to(x.dtype))
        x = x.masked_scatter(is_query, queries.to(x.dtype).expand(len(x), -1, -1))

        return self.decode(
            x, self.position_ids(input_ids, grid_thw, attention_mask), attention_mask
        )

    def decode(self, x: Tensor, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The language tower on embedded tokens x (B, N, d) at M-RoPE positions (3, B, N)."""
        config = self.config
        head_dim = config.hidden_size // config.num_attention_heads
        sections = rotary_frequencies(head_dim, config.rope_theta, x.device).split(
            config.mrope_section
        )
        angles = [
            axis[..., None] * section for axis, section in zip(positions, sections, strict=True)
        ]
        angles = torch.cat(angles, dim=-1).unsqueeze(1)  # (B, 1, N, D/2)
        cos, sin, mask = angles.cos(), angles.sin(), None
        if attention_mask is not None:
            itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # (N, N)
            mask = attention_mask.bool()[:, None, None, :] & torch.ones_like(itself).tril()
            mask = (
                mask | itself
            )  # (B, 1, N, N); for padding, as a row that sees nothing would be NaN
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
        return self.model.norm(x)


class LoRALinear(nn.Linear):
    """A Linear plus scale * B A x (arXiv 2106.09685); `weight` and `bias` keep their state-dict names."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_empty(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)  # the layer starts as its base

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(qwen: Qwen2_5_VL, rank: int, alpha: float) -> None:
    """Give q, k, v, o of each language layer a LoRA of scale alpha / rank, in place, without effect yet."""
    for layer in qwen.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(
                layer.self_attn,
                name,
                LoRALinear(getattr(layer.self_attn, name), rank, alpha / rank),
            )


@torch.no_grad()
def merge_lora(qwen: Qwen2_5_VL) -> None:
    """Fold each LoRA into its weight, in place: the same outputs, and the hub's state dict again."""
    for layer in qwen.model.layers:
        for name, lora in list(layer.self_attn.named_children()):
            if isinstance(lora, LoRALinear):
                plain = nn.Linear(
                    lora.in_features, lora.out_features, lora.bias is not None, device="meta"
                )
                plain.weight, plain.bias = lora.weight, lora.bias
                plain.weight += lora.scale * (lora.lora_B.float() @ lora.lora_A.float())
                setattr(layer.self_attn, name, plain)
