"""The multimodal encoder: Qwen2.5-VL reads clip and instruction and gives the DiT its three token streams.

Paper section 4.2: one pass yields the editing tokens X_e (learnable queries, in which the language tower
leaves what the edit means) and the native visual and textual tokens X_v, X_l. The network is transformers'
`modeling_qwen2_5_vl.py`; prompt, preprocessing and connectors are those of Kiwi-Edit's `mllm_encoder.py`.

Letters: B batch, N tokens of a row, K editing tokens, P patches and M visual tokens of all clips together,
d width (of the tower at hand; of the DiT behind the connectors), D head width, T H W frames, height, width,
t h w the patch grid of a clip, t counting pairs of frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qwen import Qwen2_5_VL, QwenConfig, VisionConfig

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # Qwen's (and CLIP's), of pixels in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Qwen's rule: the nearest multiples of `factor`, scaled together until their product is in range."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"the video is {width}x{height}: crop it, no side may be 200 times the other"
        )
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = [
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        ]
    elif math.prod(sides) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def preprocess_frames(
    frames: Tensor, config: VisionConfig, max_frames: int, min_pixels: int, max_pixels: int
) -> tuple[Tensor, tuple[int, int, int]]:
    """A clip as the normalised patches that Kiwi-Edit was trained on, and their grid (t, h, w).

    frames: uint8 (T, H, W, 3) on the CPU. At most `max_frames` of them are used, evenly spaced, each resized
    to between `min_pixels` and `max_pixels`. The patches, float32 (t*h*w, 3 * 2 * patch * patch), are in the
    order time, row, column of visual tokens, then row, column of patches in a visual token.
    """
    if len(frames) > max_frames:
        frames = frames[torch.linspace(0, len(frames) - 1, max_frames).round().long()]
    x = frames.permute(0, 3, 1, 2)  # (T, 3, H, W)
    pair, patch, merge = config.temporal_patch_size, config.patch_size, config.spatial_merge_size
    # Kiwi-Edit resizes twice: its frame loader to multiples of two visual tokens with a small lower bound,
    # its video loader to multiples of one. On uint8, antialiased bicubic is Pillow's up to a rounding.
    token = patch * merge
    for factor, lowest in ((2 * token, 4 * (2 * token) ** 2), (token, min_pixels)):
        size = smart_resize(x.shape[2], x.shape[3], factor, lowest, max_pixels)
        if size != x.shape[2:]:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True)

    x = (x / 255 - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]
    x = torch.cat([x, x[-1:].expand(-len(x) % pair, -1, -1, -1)])  # repeat an odd last frame
    t, h, w = len(x) // pair, x.shape[2] // patch, x.shape[3] // patch
    x = x.reshape(t, pair, 3, h // merge, merge, patch, w // merge, merge, patch)
    x = x.permute(
        0, 3, 6, 4, 7, 2, 1, 5, 8
    )  # (t, h/merge, w/merge, merge, merge, 3, pair, patch, patch)
    return x.reshape(t * h * w, -1), (t, h, w)


CHAT_START = (
    "<|im_start|>system\nYou will be given an image and instruction. Please describe the content of the "
    "image in detail based on instruction in your own words.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)


def chat_ids(
    tokenizer: Tokenizer, instruction: str, num_visual: int, num_queries: int, config: QwenConfig
) -> tuple[list[int], slice, slice]:
    """Token ids of an edit's chat text; where in them, counted from the end, clip and instruction are.

    Its pieces meet at special tokens, so that encoded one by one they give the ids of the whole text; but
    what the instruction spells is always ordinary text: an `<|im_end|>` in it does not end the turn. Raises
    ValueError for an empty instruction, one too long for the model, and a tokenizer that is not Qwen's.
    """
    if not instruction.strip():
        raise ValueError("the instruction is empty: say what to change in the video")
    ids = [tokenizer.token_to_id(name) for name in ("<|video_pad|>", "<|object_ref_start|>")]
    if ids != [config.video_token_id, config.query_token_id]:
        raise ValueError(
            f"the tokenizer has the model's placeholder tokens at {ids}: it is another model's"
        )

    def encode(text: str, verbatim: bool = False) -> list[int]:
        tokenizer.encode_special_tokens = verbatim
        return tokenizer.encode(text, add_special_tokens=False).ids

    words, closing = encode(instruction, verbatim=True), encode("<|im_end|>\n")
    ids = (
        encode(CHAT_START) + [config.video_token_id] * num_visual + encode("<|vision_end|>") + words
    )
    ids += [config.query_token_id] * num_queries + closing
    if len(ids) > (limit := config.max_position_embeddings):
        raise ValueError(
            f"the instruction makes {len(ids)} tokens, the model takes {limit}: shorten it"
        )
    end = -num_queries - len(closing)
    start = end - len(words)
    return ids, slice(start - 1 - num_visual, start - 1), slice(start, end)


class Condition(NamedTuple):
    """The three streams of section 4.2, padded on the right; masks, true for real tokens, if B > 1."""

    editing: Tensor  # X_e (B, K, d)
    visual: Tensor  # X_v (B, N_v, d)
    textual: Tensor  # X_l (B, N_l, d)
    editing_mask: Tensor | None  # (B, K), all true
    visual_mask: Tensor | None  # (B, N_v)
    textual_mask: Tensor | None  # (B, N_l)


def pad(
    rows: Sequence[Tensor], side: str = "right", value: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Stack rows (n, ...) to (B, N, ...), with a mask (B, N) false for padding, None for a single row."""
    padded = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
    real = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
    return padded, pad_sequence(real, batch_first=True, padding_side=side) if len(
        rows
    ) > 1 else None


class EditEncoder(nn.Module):
    """g_phi, T_v and T_l of section 4.2 in one pass of Qwen2.5-VL; `config` is an `rvedit.RVEDiTConfig`."""

    def __init__(self, qwen: Qwen2_5_VL, tokenizer: Tokenizer | None, config: Any) -> None:
        super().__init__()
        self.qwen, self.tokenizer, self.config = qwen, tokenizer, config
        in_dim, dim = qwen.config.hidden_size, config.dit.dim
        self.queries = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(config.num_editing_tokens, in_dim), std=0.02)
        )
        for name in ("editing_connector", "visual_connector", "textual_connector"):
            layers = (nn.Linear(in_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
            for parameter in layers[
                2
            ].parameters():  # training starts from a DiT without conditions, as Kiwi-Edit's
                nn.init.zeros_(parameter)
            self.add_module(name, nn.Sequential(*layers))

    def prepare(self, frames: list[Tensor], instructions: list[str]) -> tuple[Any, ...]:
        """The part of `forward` that needs no weights (a data loader's): `encode`'s inputs, on the CPU."""
        config, qwen = self.config, self.qwen.config
        limits = (config.max_mllm_frames, config.min_mllm_pixels, config.max_mllm_pixels)
        samples = []
        for clip, instruction in zip(frames, instructions, strict=True):
            patches, grid = preprocess_frames(clip, qwen.vision, *limits)
            num_visual = len(patches) // qwen.vision.spatial_merge_size**2
            ids, *spans = chat_ids(
                self.tokenizer, instruction, num_visual, config.num_editing_tokens, qwen
            )
            samples.append((torch.tensor(ids), patches, grid, spans))
        rows, patches, grids, spans = zip(*samples, strict=True)
        input_ids, mask = pad(
            rows, "left", value=int(rows[0][0])
        )  # with any id but a placeholder's
        return input_ids, torch.cat(patches), torch.tensor(grids), mask, spans

    def encode(self, inputs: tuple[Any, ...]) -> Condition:
        """The part of `forward` that is the network."""
        input_ids, pixel_values, grid_thw, mask, spans = inputs
        device, grid_thw = (
            self.queries.device,
            grid_thw.cpu(),
        )  # on GPUs FSDP2 moves all that its root is given
        mask = None if mask is None else mask.to(device)
        hidden = self.qwen(
            input_ids.to(device), pixel_values.to(device), grid_thw, self.queries, mask
        )

        # The last K positions, not the K placeholders: as in Kiwi-Edit, two are the turn's closing tokens.
        editing = self.editing_connector(hidden[:, -len(self.queries) :])
        visual, visual_mask = pad([row[span] for row, (span, _) in zip(hidden, spans, strict=True)])
        textual, textual_mask = pad(
            [row[span] for row, (_, span) in zip(hidden, spans, strict=True)]
        )
        editing_mask = None if mask is None else mask.new_ones(editing.shape[:2])
        streams = (editing, self.visual_connector(visual), self.textual_connector(textual))
        return Condition(*streams, editing_mask, visual_mask, textual_mask)

    def forward(self, frames: list[Tensor], instructions: list[str]) -> Condition:
        """Encode edits: clips, each uint8 (T, H, W, 3), and instructions. Errors are those of `chat_ids`."""
        return self.encode(self.prepare(frames, instructions))
