"""The MLLM of §4.2: Qwen2.5-VL turns a clip and an instruction into the DiT's three token streams.

    clip v ────────> preprocess_frames ─> patches ──┐
    instruction ℓ ─> chat_ids ──────────> token ids ┼─> Qwen2.5-VL (qwen.py) ─> hidden states
    K learnable queries ────────────────────────────┘

    hidden states at the last K positions  ─> editing_connector ─> X_e   (g_φ of Algorithm 1)
    hidden states at the visual tokens     ─> visual_connector  ─> X_v   (T_v)
    hidden states at the instruction       ─> textual_connector ─> X_ℓ   (T_ℓ)

Prompt, preprocessing and connectors are those of Kiwi-Edit's `mllm_encoder.py`, whose trained
weights can be loaded. The paper does not say where T_v and T_ℓ come from; here one MLLM pass gives
all three.

Letters: B batch, N tokens of a sequence, K editing tokens, d width of the DiT; T H W frames, height
and width in pixels; t h w the patch grid of a clip, where t counts pairs of frames; P = t·h·w
patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qwen import Qwen2_5_VL, QwenConfig, VisionConfig

# --- Frames -> patches ----------------------------------------------------------------------------

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # Qwen's (and CLIP's), of pixels in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Qwen's rule for a frame's new height and width.

    Each side is rounded to a multiple of `factor`. If their product is out of range, both sides are
    scaled by the same number first. Raises ValueError if one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"the video is {width}x{height}: crop it, no side may be 200 times the other"
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize_by_pillow(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's bicubic `resize`, antialiased, of uint8 frames (T, 3, H, W)."""
    height, width = size
    resized = []
    for frame in frames.permute(0, 2, 3, 1).numpy():  # (H, W, 3)
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        resized.append(torch.from_numpy(np.array(image)))
    return torch.stack(resized).permute(0, 3, 1, 2)


def resize_as_torchvision(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """torchvision's antialiased bicubic `resize` of uint8 frames (T, 3, H, W), in float32."""
    resized = F.interpolate(frames.float(), size=size, mode="bicubic", antialias=True)
    return resized.clamp(0, 255).round()


def normalise(frames: Tensor) -> Tensor:
    """Frames (T, 3, H, W) from 0 to 255 -> float32, as Qwen takes them."""
    mean = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD).view(3, 1, 1)
    return (frames / 255 - mean) / std


def cut_patches(frames: Tensor, config: VisionConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """Cut normalised frames (T, 3, H, W) into patches (P, 3 * 2 * patch²); return their grid too.

    The patches of one visual token are neighbours. In the order of the patches, time is outermost,
    then row and column of the visual token, then row and column of the patch within that token.
    """
    pair, patch, merge = config.temporal_patch_size, config.patch_size, config.spatial_merge_size
    missing = -len(frames) % pair
    last_frame = frames[-1:].expand(missing, -1, -1, -1)  # repeated if their number is odd
    frames = torch.cat([frames, last_frame])

    t = len(frames) // pair
    h = frames.shape[2] // patch
    w = frames.shape[3] // patch
    x = frames.reshape(t, pair, 3, h // merge, merge, patch, w // merge, merge, patch)
    # -> (t, h / merge, w / merge, merge, merge, 3, pair, patch, patch)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, -1), (t, h, w)


def evenly_spaced(count: int, limit: int) -> Tensor:
    """At most `limit` of the numbers 0 ... count - 1, from the first to the last, as int64."""
    if count <= limit:
        return torch.arange(count)
    return torch.linspace(0, count - 1, limit).round().long()


def max_visual_tokens(config: Any) -> int:
    """N_v of a clip, at most. `config` is an `rvedit.RVEDiTConfig`."""
    vision = config.qwen.vision
    pairs_of_frames = math.ceil(config.max_mllm_frames / vision.temporal_patch_size)
    return pairs_of_frames * (config.max_mllm_pixels // vision.token_side**2)


def preprocess_frames(
    frames: Tensor, config: VisionConfig, max_frames: int, min_pixels: int, max_pixels: int
) -> tuple[Tensor, tuple[int, int, int]]:
    """Turn a clip into normalised patches as Kiwi-Edit was trained on, and their grid (t, h, w).

    frames: uint8 (T, H, W, 3) on the CPU. At most `max_frames` of them are used, evenly spaced, and
    each is resized to between `min_pixels` and `max_pixels`. Returns float32 patches, as
    `cut_patches` orders them.
    """
    x = frames[evenly_spaced(len(frames), max_frames)].permute(0, 3, 1, 2)  # (T, 3, H, W)

    # Kiwi-Edit resizes twice. By Pillow, the sides become multiples of two visual tokens, and only
    # tiny frames are enlarged. Then, by torchvision, they become multiples of one.
    token = config.token_side
    unit = 2 * token
    size = smart_resize(*x.shape[2:], unit, 4 * unit**2, max_pixels)
    x = resize_by_pillow(x, size)
    size = smart_resize(*x.shape[2:], token, min_pixels, max_pixels)
    x = resize_as_torchvision(x, size)
    return cut_patches(normalise(x), config)


def preprocess_still(frames: Tensor, config: VisionConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """Turn one frame, uint8 (1, H, W, 3), into patches by Kiwi-Edit's image path, and their grid.

    It is resized once, to between 4 and 16384 visual tokens, which is Qwen's own range for images.
    """
    x = frames.permute(0, 3, 1, 2)  # (1, 3, H, W)
    token = config.token_side
    area = token**2
    size = smart_resize(*x.shape[2:], token, 4 * area, 16384 * area)
    x = resize_by_pillow(x, size)
    return cut_patches(normalise(x), config)


# --- The chat text --------------------------------------------------------------------------------

CHAT_START = (
    "<|im_start|>system\nYou will be given an image and instruction. Please describe the content "
    "of the image in detail based on instruction in your own words.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>"
)


class Chat(NamedTuple):
    """One edit's token ids. Slices count from the end, so left padding does not move them."""

    ids: list[int]
    visual: slice  # the placeholders of the clip's visual tokens
    textual: slice  # the instruction


def chat_ids(
    tokenizer: Tokenizer,
    instruction: str,
    num_visual: int,
    num_queries: int,
    config: QwenConfig,
    still: bool = False,
) -> Chat:
    """Tokenize Qwen's chat text of an edit, the layout that Kiwi-Edit was trained with:

        system prompt, <|vision_start|>, num_visual × <|video_pad|>, <|vision_end|>,
        instruction, num_queries × <|object_ref_start|>, <|im_end|>, newline

    A still has <|image_pad|> in the place of <|video_pad|>.
    The parts meet at special tokens, so tokenizing them one by one gives the ids of the whole text.
    An instruction is always ordinary text: an `<|im_end|>` in it does not end the turn. Raises
    ValueError if the instruction is empty or too long for the model, or if the tokenizer is not the
    model's.
    """
    if not instruction.strip():
        raise ValueError("the instruction is empty: say what to change in the video")
    if any("\ud800" <= letter <= "\udfff" for letter in instruction):
        raise ValueError("the instruction is no valid text: it has halves of UTF-16 characters")
    visual_token = "<|image_pad|>" if still else "<|video_pad|>"
    visual_id = config.image_token_id if still else config.video_token_id
    placeholders = (visual_token, "<|object_ref_start|>")
    placeholder_ids = [tokenizer.token_to_id(name) for name in placeholders]
    if placeholder_ids != [visual_id, config.query_token_id]:
        raise ValueError(
            f"the tokenizer has the model's placeholder tokens at {placeholder_ids}: "
            "it is another model's"
        )

    def encode(text: str, special_as_text: bool = False) -> list[int]:
        tokenizer.encode_special_tokens = special_as_text
        return tokenizer.encode(text, add_special_tokens=False).ids

    words = encode(instruction, special_as_text=True)
    closing = encode("<|im_end|>\n")
    vision_end = encode("<|vision_end|>")
    before_words = encode(CHAT_START) + [visual_id] * num_visual + vision_end
    after_words = [config.query_token_id] * num_queries + closing
    ids = before_words + words + after_words

    limit = config.max_position_embeddings
    if len(ids) > limit:
        raise ValueError(
            f"the instruction makes {len(ids)} tokens, the model takes {limit}: shorten it"
        )
    textual = slice(-len(after_words) - len(words), -len(after_words))
    visual_end = textual.start - len(vision_end)
    return Chat(ids, slice(visual_end - num_visual, visual_end), textual)


# --- The encoder ----------------------------------------------------------------------------------


class Condition(NamedTuple):
    """The three streams, padded on the right. Both masks are None if nothing is padded."""

    editing: Tensor  # X_e (B, K, d), never padded
    visual: Tensor  # X_v (B, N_v, d)
    textual: Tensor  # X_ℓ (B, N_ℓ, d)
    visual_mask: Tensor | None = None  # (B, N_v), True at real tokens
    textual_mask: Tensor | None = None  # (B, N_ℓ)


class EncoderInputs(NamedTuple):
    """What `EditEncoder.encode` reads: B edits, tokenized and cut into patches, on the CPU."""

    input_ids: Tensor  # (B, N), padded on the left
    pixel_values: Tensor  # (P, 3 * 2 * patch²), the patches of all clips, clip after clip
    grid_thw: Tensor  # (B, 3), each clip's patch grid
    attention_mask: Tensor | None  # (B, N), True at real tokens; None if nothing is padded
    spans: list[tuple[slice, slice]]  # where visual tokens and instruction are in each sequence
    still: bool  # all of them are stills, for the image path


def pad(rows: Sequence[Tensor], side: str = "right", value: int = 0) -> Tensor:
    """Stack B rows (n, ...) of different lengths: (B, N, ...)."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def real_tokens(rows: Sequence[Tensor], side: str = "right") -> Tensor:
    """The mask (B, N) of `pad`: False at padding."""
    real = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
    return pad(real, side)


def lengths_differ(rows: Sequence[Tensor]) -> bool:
    return len({len(row) for row in rows}) > 1


def connector(in_dim: int, dim: int) -> nn.Sequential:
    """Map hidden states of the MLLM to the DiT's width; beside a trained DiT, to 0 at first."""
    return nn.Sequential(nn.Linear(in_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))


class EditEncoder(nn.Module):
    """g_φ, T_v and T_ℓ in one pass of Qwen2.5-VL. `config` is an `rvedit.RVEDiTConfig`."""

    def __init__(self, qwen: Qwen2_5_VL, tokenizer: Tokenizer | None, config: Any) -> None:
        super().__init__()
        self.qwen = qwen
        self.tokenizer = tokenizer
        self.config = config
        in_dim, dim = qwen.config.hidden_size, config.dit.dim
        self.queries = nn.Parameter(torch.zeros(config.num_editing_tokens, in_dim))
        # Kiwi-Edit reads a still with queries of its own. Without them it is read as a short clip.
        self.image_queries = None
        if config.num_image_tokens:
            self.image_queries = nn.Parameter(torch.zeros(config.num_image_tokens, in_dim))
        self.editing_connector = connector(in_dim, dim)
        self.visual_connector = connector(in_dim, dim)
        self.textual_connector = connector(in_dim, dim)

    def forward(self, frames: list[Tensor], instructions: list[str]) -> Condition:
        """Encode B clips, uint8 (T, H, W, 3), and their instructions. Errors: see `chat_ids`."""
        return self.encode(self.prepare(frames, instructions))

    def prepare(self, frames: list[Tensor], instructions: list[str]) -> EncoderInputs:
        """Do the part of `forward` that needs no weights, so that a data loader can do it.

        Raises ValueError for stills (clips of one frame) beside longer clips, if the model has
        queries for stills.
        """
        config, qwen = self.config, self.qwen.config
        still = False
        if self.image_queries is not None:
            still = len(frames[0]) == 1
            if any((len(clip) == 1) != still for clip in frames):
                raise ValueError("stills and clips cannot share a minibatch")
        num_queries = config.num_image_tokens if still else config.num_editing_tokens
        limits = (config.max_mllm_frames, config.min_mllm_pixels, config.max_mllm_pixels)
        rows, patches, grids, spans = [], [], [], []
        for clip, instruction in zip(frames, instructions, strict=True):
            if still:
                clip_patches, grid = preprocess_still(clip, qwen.vision)
            else:
                clip_patches, grid = preprocess_frames(clip, qwen.vision, *limits)
            num_visual = len(clip_patches) // qwen.vision.spatial_merge_size**2
            chat = chat_ids(self.tokenizer, instruction, num_visual, num_queries, qwen, still)
            rows.append(torch.tensor(chat.ids))
            patches.append(clip_patches)
            grids.append(grid)
            spans.append((chat.visual, chat.textual))

        some_text_token = int(rows[0][0])  # fills the padding: any id but a placeholder's will do
        input_ids = pad(rows, "left", value=some_text_token)
        mask = real_tokens(rows, "left") if lengths_differ(rows) else None
        return EncoderInputs(input_ids, torch.cat(patches), torch.tensor(grids), mask, spans, still)

    def encode(self, inputs: EncoderInputs) -> Condition:
        """Do the part of `forward` that is the network."""
        input_ids, pixel_values, grid_thw, mask, spans, still = inputs
        device = self.queries.device
        grid_thw = grid_thw.cpu()  # under FSDP2 every input of `encode` arrives on the GPU
        if mask is not None:
            mask = mask.to(device)
        queries = self.image_queries if still else self.queries
        if self.image_queries is not None:
            unused = self.queries if still else self.image_queries
            # One rank may read a clip while another reads a still. FSDP2's collectives match only
            # if both kinds of queries get a gradient on every rank.
            queries = queries + 0 * unused.sum()
        input_ids = input_ids.to(device)
        pixel_values = pixel_values.to(device)
        hidden = self.qwen(input_ids, pixel_values, grid_thw, queries, mask)  # (B, N, d of Qwen)

        # "Last-position hidden states" (§4.2): the last K positions, not the K placeholders. As in
        # Kiwi-Edit, the two closing tokens are among them and the first two placeholders are not.
        num_queries = len(queries)
        editing = self.editing_connector(hidden[:, -num_queries:])  # X_e (B, K, d)

        at_clip = [row[visual] for row, (visual, _) in zip(hidden, spans, strict=True)]
        at_text = [row[textual] for row, (_, textual) in zip(hidden, spans, strict=True)]
        visual = self.visual_connector(pad(at_clip))  # X_v (B, N_v, d)
        textual = self.textual_connector(pad(at_text))  # X_ℓ (B, N_ℓ, d)
        if lengths_differ(at_clip) or lengths_differ(at_text):
            return Condition(editing, visual, textual, real_tokens(at_clip), real_tokens(at_text))
        return Condition(editing, visual, textual)
