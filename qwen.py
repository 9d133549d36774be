"""Qwen2.5-VL in plain PyTorch, with LoRA: the network that `mllm.EditEncoder` reads clips with.

Its behaviour is that of transformers' `modeling_qwen2_5_vl.py`; its state dict has the hub's names.

Letters: B batch, N tokens of a sequence, K editing tokens; P patches and M visual tokens of all
clips together; d width of the tower at hand, D width of an attention head; t h w the patch grid of
a clip, where t counts pairs of frames.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- Configuration --------------------------------------------------------------------------------


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
    window_size: int = 112  # side of an attention window, in pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)  # blocks without windows, from 0
    tokens_per_second: int = 2  # M-RoPE: time steps to a second of video

    def __post_init__(self) -> None:
        _list_to_tuple(self, "fullatt_block_indexes")

    @property
    def token_side(self) -> int:
        """Side of a visual token, in pixels."""
        return self.patch_size * self.spatial_merge_size


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
    mrope_section: tuple[int, ...] = (16, 24, 24)  # rotary frequencies for time, row, column
    image_token_id: int = 151655  # <|image_pad|>, the placeholder of a still's visual token
    video_token_id: int = 151656  # <|video_pad|>, the placeholder of a clip's visual token
    query_token_id: int = 151646  # <|object_ref_start|>, the placeholder of an editing-token query

    def __post_init__(self) -> None:
        if isinstance(self.vision, dict):  # as it comes from JSON
            object.__setattr__(self, "vision", VisionConfig(**self.vision))
        _list_to_tuple(self, "mrope_section")

    @classmethod
    def from_hub(cls, config_json: dict[str, Any], query_token_id: int = 151646) -> QwenConfig:
        """Read a Qwen2.5-VL config.json, flat as on the hub or nested as transformers 5 writes it.

        Raises ValueError if a field is missing, or if it asks for what this network does not have.
        """
        defaults = {"image_token_id": cls.image_token_id, "query_token_id": query_token_id}
        text = defaults | config_json | _object(config_json, "text_config")
        rope = _object(text, "rope_parameters") or _object(text, "rope_scaling")
        text |= rope
        # transformers 4.49 leaves out what is its own default, and these two are the 7B model's.
        vision = asdict(VisionConfig(hidden_size=3584, tokens_per_second=4))
        vision |= _object(config_json, "vision_config")
        for where, name, supported in (
            (rope, "rope_type", ("default", "mrope")),
            (rope, "type", ("default", "mrope")),
            (text, "hidden_act", ("silu",)),
            (vision, "hidden_act", ("silu",)),
            (text, "use_sliding_window", (False,)),
        ):
            if where.get(name, supported[0]) not in supported:
                raise ValueError(f"{name} is {where[name]!r}, which is not supported")
        names = [f.name for f in fields(cls) if f.name != "vision"]
        for name in ("vision_config", *names):
            if name not in text:
                raise ValueError(f"no {name!r} in it, so it is not a Qwen2.5-VL model's")
        vision = {f.name: vision[f.name] for f in fields(VisionConfig)}
        return cls(vision=vision, **{name: text[name] for name in names})


def _object(config_json: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within a JSON object; empty if it is absent."""
    value = config_json.get(name)
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} is {value!r}, not an object")
    return value or {}


def _list_to_tuple(config: Any, name: str) -> None:
    """JSON has lists for tuples. What is neither is left for `weights.build_config` to refuse."""
    value = getattr(config, name)
    if isinstance(value, list):
        object.__setattr__(config, name, tuple(value))  # the dataclass is frozen


# --- Layers of both towers ------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """RMSNorm of the float32 residual stream. The result has the weights' dtype, for the products.

    In a bf16 model a stream rounded after each sub-layer would double the error of 36 layers.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        normed = F.rms_norm(x, self.normalized_shape, weight.float(), self.eps)
        return normed.to(weight.dtype)


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=bias)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=bias)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


def rotary_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """The angles per position of the dim / 2 rotated pairs of channels, (dim / 2,)."""
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    return theta**-exponents


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channels i and i + D/2 of x (..., D) by one angle, in float32. cos, sin: (..., D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    return torch.cat([turned_a, turned_b], dim=-1).to(x.dtype)


# --- The vision tower: patches -> visual tokens ---------------------------------------------------


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # the cache outlives a sampling pass, and training may need it then
def patch_layout(
    grids: tuple[tuple[int, int, int], ...], merge: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Where each patch is, and an order in which the patches of an attention window are neighbours.

    A window is `window` patches wide and high within one pair of frames; at the right and at the
    bottom of the grid it may be smaller. Windows of equal size stand side by side in that order, so
    that each size is one attention call without a mask. Returns

    - positions (P, 2): row and column of each patch;
    - order (P,): `x[order]` puts patches into window order;
    - runs: for each size of window, (number of windows, patches in each).
    """
    clips = []
    for clip, (t, h, w) in enumerate(grids):
        sides = (torch.arange(t), torch.arange(h), torch.arange(w))
        # (t * h * w, 4): clip, pair of frames, row, column
        cells = torch.cartesian_prod(torch.tensor([clip]), *sides)
        # The order of mllm.cut_patches: patches of one visual token are neighbours.
        cells = cells.view(t, h // merge, merge, w // merge, merge, 4)
        clips.append(cells.transpose(2, 3).reshape(-1, 4))
    cells = torch.cat(clips)  # (P, 4)

    windows = cells // torch.tensor([1, 1, window, window])
    _, window_of, sizes = windows.unique(dim=0, return_inverse=True, return_counts=True)
    # One number to sort by: first the size of a patch's window, then which window it is.
    by_size_then_window = sizes[window_of] * len(sizes) + window_of  # (P,)
    order = torch.argsort(by_size_then_window, stable=True)
    sizes, numbers = sizes.unique(return_counts=True)
    runs = list(zip(numbers.tolist(), sizes.tolist(), strict=True))
    return cells[:, 2:].to(device), order.to(device), runs


class VisionAttention(nn.Module):
    """Self-attention within groups of neighbouring patches."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """x (P, d); cos, sin (P, 1, D/2); runs of (number of groups, patches in each) -> (P, d)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (P, 3, heads, D)
        q, k, v = qkv.unbind(1)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        qkv = torch.stack([q, k, v])  # (3, P, heads, D)
        lengths = [number * size for number, size in runs]
        out = []
        for group, (number, size) in zip(qkv.split(lengths, dim=1), runs, strict=True):
            group = group.unflatten(1, (number, size))  # (3, number, size, heads, D)
            q, k, v = group.transpose(2, 3)  # (number, heads, size, D)
            attended = F.scaled_dot_product_attention(q, k, v)
            out.append(attended.transpose(1, 2).flatten(0, 1))  # (number * size, heads, D)
        return self.proj(torch.cat(out).flatten(1))


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
    """Patches to visual tokens. No attention goes over time: "full" spans one pair of frames."""

    def __init__(self, config: VisionConfig, out_dim: int) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        merged_dim = dim * config.spatial_merge_size**2
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        proj = nn.Conv3d(3, dim, kernel, stride=kernel, bias=False)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        mlp = nn.Sequential(
            nn.Linear(merged_dim, merged_dim), nn.GELU(), nn.Linear(merged_dim, out_dim)
        )
        self.merger = nn.ModuleDict({"ln_q": RMSNorm(dim, eps=1e-6), "mlp": mlp})

    def forward(self, pixel_values: Tensor, grids: tuple[tuple[int, int, int], ...]) -> Tensor:
        """Patches (P, 3 * 2 * patch²) of clips with (t, h, w) grids -> visual tokens (M, out_dim).

        out_dim is the width of the language tower.
        """
        config = self.config
        # Patches do not overlap, so the convolution is a matrix product.
        weight = self.patch_embed.proj.weight.flatten(1)
        x = F.linear(pixel_values.to(weight.dtype), weight).float()  # (P, d), the residual stream

        # Windows are made of whole visual tokens.
        merge = config.spatial_merge_size
        window = config.window_size // (config.patch_size * merge) * merge
        positions, order, windows = patch_layout(grids, merge, window, x.device)
        back = order.argsort()
        pairs_of_frames = [(t, h * w) for t, h, w in grids]

        # Half of the rotary frequencies turn with the row, half with the column.
        head_dim = config.hidden_size // config.num_heads
        frequencies = rotary_frequencies(head_dim // 2, 10_000.0, x.device)  # (D/4,)
        angles = positions[..., None] * frequencies  # (P, 2, D/4)
        angles = angles.flatten(1).unsqueeze(1)  # (P, 1, D/2)
        cos, sin = angles.cos(), angles.sin()

        # Patches stay in window order, and return to frame order for the few blocks of full
        # attention.
        window_cos, window_sin = cos[order], sin[order]
        x = x[order]
        for i, block in enumerate(self.blocks):
            if i in config.fullatt_block_indexes:
                x = block(x[back], cos, sin, pairs_of_frames)[order]
            else:
                x = block(x, window_cos, window_sin, windows)

        x = self.merger.ln_q(x[back])
        x = x.unflatten(0, (-1, merge**2)).flatten(1)  # (M, 4 * d)
        return self.merger.mlp(x)


# --- The language tower ---------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key-value head."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.head_dim = dim // config.num_attention_heads
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim // self.group_size)
        self.v_proj = nn.Linear(dim, dim // self.group_size)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, d), cos and sin (B, 1, N, D/2), mask (B, 1, N, N) or None -> (B, N, d)."""
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, heads, N, D)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, key-value heads, N, D)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Not by enable_gqa, which some kernels lack; and repeating few heads is cheap.
        k = k.repeat_interleave(self.group_size, dim=1)
        v = v.repeat_interleave(self.group_size, dim=1)
        out = self.attend(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # A method of its own, so that sequence.py can put attention over several GPUs here.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class DecoderLayer(nn.Module):
    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


# --- The model ------------------------------------------------------------------------------------


class Qwen2_5_VL(nn.Module):
    """Qwen2.5-VL without its output head; its state dict has the hub's names."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision, config.hidden_size)
        # Not nn.Embedding(...): drawing its words on the meta device imports sympy, half a second.
        words = torch.zeros(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding.from_pretrained(words, freeze=False)
        self.model["layers"] = nn.ModuleList(layers)
        self.model["norm"] = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        grid_thw: Tensor,
        queries: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states (B, N, d), after the final norm.

        input_ids: (B, N); each row has placeholders for the visual tokens of one clip or still, and
        for K queries.
        pixel_values, grid_thw: see `encode_video`. queries: (K, d).
        attention_mask: (B, N), True at real tokens, or None if there is no padding.
        """
        is_visual = self.is_visual(input_ids)[..., None]  # (B, N, 1)
        is_query = (input_ids == self.config.query_token_id)[..., None]
        visual = self.encode_video(pixel_values, grid_thw)  # (M, d)
        x = self.model.embed_tokens(input_ids)  # (B, N, d)
        # Placeholders are replaced in order: by visual tokens, and in each row by all queries.
        x = x.masked_scatter(is_visual, visual.to(x.dtype))
        queries = queries.to(x.dtype).expand(len(x), -1, -1)  # (B, K, d)
        x = x.masked_scatter(is_query, queries)

        positions = self.position_ids(input_ids, grid_thw, attention_mask)
        return self.decode(x, positions, attention_mask)

    def is_visual(self, input_ids: Tensor) -> Tensor:
        """Where input_ids (B, N) has the placeholders of visual tokens, (B, N)."""
        of_clip = input_ids == self.config.video_token_id
        of_still = input_ids == self.config.image_token_id
        return of_clip | of_still

    def encode_video(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches (P, 3 * 2 * patch²) of B clips, grid_thw (B, 3) on the CPU -> visual (M, d)."""
        grids = tuple(tuple(grid) for grid in grid_thw.tolist())
        return self.visual(pixel_values, grids)

    def position_ids(
        self, input_ids: Tensor, grid_thw: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """M-RoPE positions (3, B, N): time, row and column of each token. A sequence has one clip.

        A still is a clip of one pair of frames.

        - Text before the clip counts 0, 1, 2, ... on all three axes.
        - The clip's first token is at the next number on all axes. From there rows and columns
          count visual tokens, and time steps by `tokens_per_second` for each pair of frames (a
          pair counts as a second, as in Kiwi-Edit).
        - Text after the clip goes on behind the clip's largest position on any axis. Qwen2.5-VL and
          Kiwi-Edit were trained so; transformers 5 leaves time out of that maximum, which differs
          for long clips of very small frames.
        - Padding is at 0.
        """
        vision, device = self.config.vision, input_ids.device
        merge = vision.spatial_merge_size
        sizes = grid_thw // torch.tensor([1, merge, merge])  # (B, 3), in visual tokens
        step = torch.tensor([vision.tokens_per_second, 1, 1])
        clips = []
        for t, h, w in sizes.tolist():
            axes = (torch.arange(t), torch.arange(h), torch.arange(w))
            clips.append(torch.cartesian_prod(*axes) * step)  # (t * h * w, 3)
        in_clip = torch.cat(clips).to(device)  # (M, 3), counted from the clip's first token
        last_cell = (sizes - 1) * step  # (B, 3)
        extent = last_cell.amax(1, keepdim=True).to(device) + 1  # (B, 1)

        is_visual = self.is_visual(input_ids)  # (B, N)
        is_real = torch.ones_like(is_visual) if attention_mask is None else attention_mask.bool()
        num_text = (is_real & ~is_visual).cumsum(-1)  # text tokens up to and including this one
        after_clip = is_visual.cumsum(-1) > 0
        text = num_text - 1 + after_clip * extent  # (B, N), valid at text tokens

        is_visual, is_real = is_visual[..., None], is_real[..., None]  # (B, N, 1)
        cell = in_clip.new_zeros(*input_ids.shape, 3).masked_scatter(is_visual, in_clip)
        at_clip = num_text[..., None] + cell  # (B, N, 3), valid at visual tokens
        positions = torch.where(is_visual, at_clip, text[..., None])  # (B, N, 3)
        return (positions * is_real).movedim(-1, 0)

    def decode(self, x: Tensor, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Run the language tower on embedded tokens x (B, N, d) at M-RoPE positions (3, B, N)."""
        config = self.config
        head_dim = config.hidden_size // config.num_attention_heads
        frequencies = rotary_frequencies(head_dim, config.rope_theta, x.device)  # (D/2,)
        # M-RoPE: the first frequencies turn with time, the next with the row, the last with the
        # column of a token.
        sections = frequencies.split(config.mrope_section)
        angles = []
        for axis, part in zip(positions, sections, strict=True):
            angles.append(axis[..., None] * part)
        angles = torch.cat(angles, dim=-1).unsqueeze(1)  # (B, 1, N, D/2)
        cos, sin = angles.cos(), angles.sin()

        mask = None  # causal attention needs none
        if attention_mask is not None:
            # Not x.shape[1]: with sequence.py, x has only some of the N tokens.
            num_tokens = attention_mask.shape[1]
            itself = torch.eye(num_tokens, dtype=torch.bool, device=x.device)  # (N, N)
            causal = torch.ones_like(itself).tril()
            mask = attention_mask.bool()[:, None, None, :] & causal  # (B, 1, N, N)
            # Padding looks at itself: a softmax over nothing would be NaN.
            mask = mask | itself
        x = x.float()  # the residual stream
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
        return self.model.norm(x)


# --- LoRA (arXiv 2106.09685) ----------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """A Linear plus scale * B A x. `weight` and `bias` are the base's and keep their names."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        has_bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, bias=has_bias, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = scale
        self.lora_A = nn.Parameter(base.weight.new_zeros(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return super().forward(x) + self.scale * update


def add_lora(qwen: Qwen2_5_VL, rank: int, alpha: float) -> None:
    """Give q, k, v, o of each language layer a LoRA, in place. It is zero until weights come."""
    for layer in qwen.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            base = getattr(attention, name)
            setattr(attention, name, LoRALinear(base, rank, alpha / rank))
