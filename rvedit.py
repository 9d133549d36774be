"""RVEDiT, the model of the paper: an editor whose diffusion transformer reasons implicitly (§3, §4.1-4.2).

What the paper adds to a Wan DiT with a Qwen2.5-VL in front of it is the first function below, `route_context`: which
tokens which block may read. Its other half, what the attention features are trained to resemble, is in `losses.py`.

    clip, instruction ─> EditEncoder (mllm.py) ─> X_e, X_v, X_ℓ ─> route_context ─> C^(1) ... C^(L) ┐
    clip ─> WanVAE (vae.py) ─> source latents ──────────────────────────────────────────────────────┼─> WanDiT
    noise z_1 ──────────────────────────────────────────────────────────────────────────────────────┘     │
    edited clip <─ WanVAE <─ z_0 <─ ... <─ z_t, t from 1 to 0 (sample.py) <───────────────────────────────┘

Departures from the paper, with reasons, are the table in the README. The depth L is the checkpoint's, 30 for the public
Wan2.2-TI2V-5B, and the routing depth L_s half of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import convert
import weights
from mllm import Condition, EditEncoder
from model import DiTConfig, WanDiT
from qwen import Qwen2_5_VL, QwenConfig, VisionConfig, add_lora
from vae import WAN2_2_VAE, VAEConfig, WanVAE

TOY = Path(__file__).parent / "assets" / "toy"  # the built-in checkpoint


def route_context(
    condition: Condition, block: int, routing_depth: int
) -> tuple[Tensor, Tensor | None]:
    """Eq. 3: the context C^(l) that block l (from 1 to L) may read, (B, N, d), and its mask, (B, N) or None.

    Shallow blocks, l <= L_s, see only the editing tokens and so commit to a global intent; deep blocks see the native
    visual and textual tokens as well and ground it. routing_depth = L is Kiwi-Edit's conditioning ("w/o GRTC"),
    routing_depth = 0 the undifferentiated one that §1 argues against.
    """
    if block <= routing_depth:
        return condition.editing, condition.editing_mask
    tokens = torch.cat(
        (condition.editing, condition.visual, condition.textual), dim=1
    )  # [X_e; X_v; X_ℓ]
    masks = condition.editing_mask, condition.visual_mask, condition.textual_mask
    return tokens, None if masks[0] is None else torch.cat(masks, dim=1)


# --- Configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RVEDiTConfig:
    dit: DiTConfig
    vae: VAEConfig
    qwen: QwenConfig
    routing_depth: int  # L_s of Eq. 3: blocks 1 ... L_s read only the editing tokens
    num_editing_tokens: int = 512  # K
    align_weight: float = 0.75  # λ_align of Eq. 6
    temperature: float = 0.07  # τ of Eq. 5
    lora_rank: int = (
        64  # on q, k, v, o of the language tower (§5); alpha is the rank, so the scale is 1
    )
    max_mllm_frames: int = 16  # frames of a clip that the MLLM sees, evenly spaced
    min_mllm_pixels: int = 128 * 28**2  # of each of those frames, after resizing
    max_mllm_pixels: int = 512**2
    max_pixels: int = (
        704 * 1280
    )  # of a frame in the VAE and the DiT; larger clips are scaled down and back up
    max_frames: int = 81  # in one DiT pass; longer clips take overlapping windows
    sampling_steps: int = 50  # of Euler's method, where no other number is asked for

    def __post_init__(self):
        for name, kind in (("dit", DiTConfig), ("vae", VAEConfig), ("qwen", QwenConfig)):
            if isinstance(getattr(self, name), dict):  # as it comes from JSON
                object.__setattr__(self, name, kind(**getattr(self, name)))
        if not 0 <= self.routing_depth <= self.dit.num_blocks:
            raise ValueError(
                f"routing depth {self.routing_depth} is not between 0 and the {self.dit.num_blocks} blocks"
            )

    @property
    def spatial_factor(self) -> int:
        """Both sides of a frame are multiples of this many pixels: 32 for the full model."""
        return self.vae.spatial_factor * max(self.dit.patch_size[1:])


def preset(name: str) -> RVEDiTConfig:
    """The paper's system, "wan2.2-ti2v-5b", or "toy", the same system for a laptop. Raises ValueError for others."""
    if name == "wan2.2-ti2v-5b":
        return RVEDiTConfig(
            dit=DiTConfig(
                dim=3072,
                ffn_dim=14336,
                num_heads=24,
                num_blocks=30,
                in_channels=48,
                out_channels=48,
                patch_size=(1, 2, 2),
            ),
            vae=WAN2_2_VAE,
            qwen=QwenConfig(),  # whose defaults are Qwen2.5-VL-3B's
            routing_depth=15,
        )
    if name == "toy":
        # Tokens are single latents, unlike the full model's: of 2 x 2, most would show more than one shape, and it
        # takes about twice as many clips until words are matched with shapes.
        return RVEDiTConfig(
            dit=DiTConfig(
                dim=256,
                ffn_dim=768,
                num_heads=8,
                num_blocks=6,
                in_channels=24,
                out_channels=24,
                patch_size=(1, 1, 1),
            ),
            vae=VAEConfig(
                dim=8,
                dec_dim=12,
                z_dim=24,
                dim_mult=(1, 4, 4),
                num_res_blocks=1,
                temporal_downsample=(True, True),
            ),
            qwen=QwenConfig(
                vision=VisionConfig(
                    depth=2,
                    hidden_size=96,
                    intermediate_size=192,
                    num_heads=4,
                    patch_size=8,
                    window_size=64,
                    fullatt_block_indexes=(1,),
                ),
                vocab_size=768,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                mrope_section=(4, 6, 6),
                video_token_id=13,
                query_token_id=3,
            ),
            routing_depth=3,
            num_editing_tokens=16,
            align_weight=0.005,  # RESULTS.md: more costs edits
            lora_rank=0,  # it has no pretrained Qwen to adapt, so training trains it whole
            max_mllm_frames=4,
            min_mllm_pixels=4 * 16**2,
            max_mllm_pixels=128**2,
            max_pixels=128**2,
            max_frames=17,  # it trains on 9: in windows of 33 it edits far less
            sampling_steps=2,  # few end near the mean of what it holds possible, many at one draw: README
        )
    raise ValueError(f"no preset is called {name!r}: there are 'wan2.2-ti2v-5b' and 'toy'")


# --- The model ------------------------------------------------------------------------------------


class RVEDiT(nn.Module):
    """f_θ and g_φ of the paper: the DiT, and the MLLM that conditions it. The VAE, which is frozen, stays outside."""

    def __init__(self, config: RVEDiTConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        qwen = Qwen2_5_VL(config.qwen)
        if config.lora_rank:
            add_lora(qwen, config.lora_rank, alpha=config.lora_rank)
        self.encoder = EditEncoder(qwen, tokenizer, config)
        self.dit = WanDiT(config.dit)

    def contexts(
        self, condition: Condition, routing_depth: int | None = None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """C^(1) ... C^(L). Only two of them differ, so each is built once and shared by its blocks."""
        depth = self.config.routing_depth if routing_depth is None else routing_depth
        shallow = route_context(condition, depth, depth)
        deep = route_context(condition, depth + 1, depth)
        return [shallow] * depth + [deep] * (self.config.dit.num_blocks - depth)


# --- Initial weights ------------------------------------------------------------------------------


@torch.no_grad()
def initialise(module: nn.Module, seed: int = 0, names: Iterable[str] | None = None) -> None:
    """Draw the parameters (all, or those named) from (seed, parameter name), whatever the device or the sharding.

    Linear and convolution weights are normal with variance 1 / fan-in, so that activations keep their scale. Some
    kinds start at zero, so that a new part changes nothing until it is trained: LoRA's B and the DiT's head (a new
    model predicts no motion), besides all biases; and the connectors' last layers and the source embedding, but if all
    is new there is nothing that they could disturb, and a model sooner learns to keep the source and to read. For the
    same reason words start large beside what the layers of a language model add to them.
    """
    parameters = dict(module.named_parameters())
    names = list(parameters if names is None else names)
    all_new = any(name.endswith("patch_embedding.weight") for name in names)
    zero = r"\.bias$|lora_B$|head\.head\." + (
        "" if all_new else r"|connector\.2\.|source_embedding\."
    )
    for name in names:
        parameter = parameters[name]
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        noise = torch.randn(
            parameter.shape,
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")),
        )
        if re.search(zero, name):
            value = torch.zeros_like(noise)
        elif name.endswith("gamma") or re.search(r"(norm\w*|ln_q)\.weight$", name):
            value = torch.ones_like(noise)
        elif name.endswith("modulation"):
            value = noise / parameter.shape[-1] ** 0.5
        elif name.endswith("queries"):
            value = 0.02 * noise
        elif name.endswith("embed_tokens.weight"):
            value = noise
        elif name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
            value = 0.3 * noise / noise[0].numel() ** 0.5
        else:
            value = noise / noise[0].numel() ** 0.5
        weights.assign(parameter, value)


# --- Loading and saving ---------------------------------------------------------------------------


def load(
    path: str | Path | None = None,
    wan: str | Path | None = None,
    qwen: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    shard: Callable[[RVEDiT], None] | None = None,
) -> tuple[RVEDiT, WanVAE]:
    """The model and its VAE from what the user has: each row of the README's table of checkpoints.

    path: our checkpoint or Kiwi-Edit's release (folders), or Kiwi-Edit's training state (a file, with wan and qwen).
    wan: a Wan2.2-TI2V-5B folder, qwen: a Qwen2.5-VL-3B-Instruct folder; without a path they give a start for training,
    with random queries and LoRA and zero connectors. Nothing at all gives the built-in toy.
    The model and the VAE's decoder are in `dtype`, its encoder always in float32 (as PyTorch has it on GPUs: TF32 in
    convolutions), because bf16 there harms the conditioning.
    shard: called on the model between its construction on the meta device and the streaming of its weights.
    Raises ValueError for anything that does not fit.
    """
    path, wan, qwen = (None if p is None else Path(p) for p in (path, wan, qwen))
    if path is None and wan is None and qwen is None:
        path = TOY
    for folder in (wan, qwen):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
    kind = "start" if path is None else layout(path)
    self_contained = kind in ("rvedit", "kiwi-edit")
    if self_contained and (wan is not None or qwen is not None):
        raise ValueError(f"{path} holds its own Wan and Qwen: leave out --wan and --qwen")
    if not self_contained and (wan is None or qwen is None):
        what = f"{path} (Kiwi-Edit's training state)" if path else "a start without a checkpoint"
        raise ValueError(f"{what} needs both --wan DIR and --qwen DIR")
    if kind == "rvedit":
        config, tokenizer, tensors = _open_ours(path)
        optional = weights.NOTHING
    else:
        if kind == "kiwi-edit":
            fields, tokenizer, tensors, optional = convert.open_kiwi_release(path)
        else:
            fields, tokenizer, tensors, optional = convert.open_parts(wan, qwen, path)
        config = RVEDiTConfig(**fields)

    with torch.device("meta"):
        model, vae = RVEDiT(config, tokenizer), WanVAE(config.vae)
    if shard is not None:
        shard(model)
    source = path or f"{wan} with {qwen}"
    vae_tensors = {
        key.removeprefix("vae."): tensors.pop(key)
        for key in list(tensors)
        if key.startswith("vae.")
    }
    weights.match(model, tensors, source, optional)  # so that both fit before either is read
    weights.fill(vae, vae_tensors, f"the VAE of {source}", device)
    for part in (vae.conv2, vae.decoder):
        part.to(dtype)
    fresh = weights.fill(model, tensors, source, device, dtype, optional)
    initialise(model, names=fresh)
    return model.eval(), vae.eval().requires_grad_(False)


def scratch(
    seed: int, device: torch.device | str = "cpu", shard: Callable[[RVEDiT], None] | None = None
) -> tuple[RVEDiT, WanVAE]:
    """The toy preset with random weights, beside the tokenizer and the VAE of the built-in checkpoint."""
    built_in, vae = load(TOY, device=device)
    with torch.device("meta"):
        model = RVEDiT(
            dataclasses.replace(preset("toy"), vae=vae.config), built_in.encoder.tokenizer
        )
    if shard is not None:
        shard(model)
    initialise(model.to_empty(device=device), seed)
    return model.eval(), vae


def layout(path: str | Path) -> str:
    """What is stored at `path`: "rvedit", "kiwi-edit" or "kiwi-edit-training". Raises ValueError for anything else."""
    path = Path(path)
    if path.is_file():
        return "kiwi-edit-training"
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} does not exist")
    if (path / "mllm_encoder").is_dir() and (path / "transformer").is_dir():
        return "kiwi-edit"
    if (path / "config.json").is_file() and weights.read_json(path / "config.json").get(
        "model_type"
    ) == "rvedit":
        return "rvedit"
    holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise ValueError(
        f"{path} is neither a checkpoint of ours nor Kiwi-Edit's release: it holds {holds}"
    )


def save(
    path: str | Path,
    model: RVEDiT,
    vae: WanVAE,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a self-contained checkpoint (unmerged LoRA, VAE and tokenizer included); complete or not at all.

    tensors: those of the model's state dict, if it is sharded and they are to be gathered one at a time. Takes the
    place of a former checkpoint; raises ValueError if something else is there.
    """
    path = Path(path)
    if (
        path.exists()
        and not (path.is_dir() and not any(path.iterdir()))
        and layout(path) != "rvedit"
    ):
        raise ValueError(
            f"{path} is not a checkpoint of ours, so it will not be replaced: choose another name"
        )
    config = {"model_type": "rvedit"} | dataclasses.asdict(model.config)
    texts = {
        "config.json": json.dumps(config, indent=2),
        "tokenizer.json": model.encoder.tokenizer.to_str(pretty=True),
    }
    tensors = model.state_dict().items() if tensors is None else tensors
    vae_tensors = ((f"vae.{key}", value) for key, value in vae.state_dict().items())
    weights.write_checkpoint(path, itertools.chain(tensors, vae_tensors), texts)


def _open_ours(folder: Path) -> tuple[RVEDiTConfig, Tokenizer, dict[str, weights.Stored]]:
    config = weights.read_json(folder / "config.json")
    config.pop("model_type")
    try:
        config = RVEDiTConfig(**config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} does not describe this model: {error}"
        ) from None
    return config, weights.read_tokenizer(folder), weights.open_folder(folder, "model")
