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
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import weights
from mllm import Condition, EditEncoder, Qwen2_5_VL, QwenConfig, VisionConfig, add_lora
from model import DiTConfig, WanDiT
from vae import VAEConfig, WanVAE

TOY = Path(__file__).parent / "assets" / "toy"  # the built-in checkpoint


def route_context(condition: Condition, block: int, routing_depth: int) -> tuple[Tensor, Tensor | None]:
    """Eq. 3: the context C^(l) that block l (from 1 to L) may read, (B, N, d), and its mask, (B, N) or None.

    Shallow blocks, l <= L_s, see only the editing tokens and so commit to a global intent; deep blocks see the native
    visual and textual tokens as well and ground it. routing_depth = L is Kiwi-Edit's conditioning ("w/o GRTC"),
    routing_depth = 0 the undifferentiated one that §1 argues against.
    """
    if block <= routing_depth:
        return condition.editing, condition.editing_mask
    tokens = torch.cat((condition.editing, condition.visual, condition.textual), dim=1)  # [X_e; X_v; X_ℓ]
    masks = condition.editing_mask, condition.visual_mask, condition.textual_mask
    return tokens, None if masks[0] is None else torch.cat(masks, dim=1)


# --- Configuration ----------------------------------------------------------------------------------------------------

# Mean and standard deviation of each latent channel over Wan's training data: constants of the official code.
# fmt: off
LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class RVEDiTConfig:
    dit: DiTConfig
    vae: VAEConfig
    qwen: QwenConfig
    routing_depth: int  # L_s of Eq. 3: blocks 1 ... L_s read only the editing tokens
    num_editing_tokens: int = 512  # K
    align_weight: float = 0.75  # λ_align of Eq. 6
    temperature: float = 0.07  # τ of Eq. 5
    lora_rank: int = 64  # on q, k, v, o of the language tower (§5); alpha is the rank, so the scale is 1
    max_mllm_frames: int = 16  # frames of a clip that the MLLM sees, evenly spaced
    min_mllm_pixels: int = 128 * 28**2  # of each of those frames, after resizing
    max_mllm_pixels: int = 512**2
    max_pixels: int = 704 * 1280  # of a frame in the VAE and the DiT; larger clips are scaled down and back up
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
            vae=VAEConfig(
                dim=160,
                dec_dim=256,
                z_dim=48,
                dim_mult=(1, 2, 4, 4),
                num_res_blocks=2,
                temporal_downsample=(False, True, True),
                latents_mean=LATENTS_MEAN,
                latents_std=LATENTS_STD,
            ),
            qwen=QwenConfig(),  # whose defaults are Qwen2.5-VL-3B's
            routing_depth=15,
        )
    if name == "toy":
        # Tokens are single latents, unlike the full model's: of 2 x 2, most would show more than one shape, and it
        # takes about twice as many clips until words are matched with shapes.
        return RVEDiTConfig(
            dit=DiTConfig(
                dim=256, ffn_dim=768, num_heads=8, num_blocks=6, in_channels=24, out_channels=24, patch_size=(1, 1, 1)
            ),
            vae=VAEConfig(
                dim=8, dec_dim=12, z_dim=24, dim_mult=(1, 4, 4), num_res_blocks=1, temporal_downsample=(True, True)
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


# --- The model --------------------------------------------------------------------------------------------------------


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

    def contexts(self, condition: Condition, routing_depth: int | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """C^(1) ... C^(L). Only two of them differ, so each is built once and shared by its blocks."""
        depth = self.config.routing_depth if routing_depth is None else routing_depth
        shallow = route_context(condition, depth, depth)
        deep = route_context(condition, depth + 1, depth)
        return [shallow] * depth + [deep] * (self.config.dit.num_blocks - depth)


# --- Initial weights --------------------------------------------------------------------------------------------------


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
    zero = r"\.bias$|lora_B$|head\.head\." + ("" if all_new else r"|connector\.2\.|source_embedding\.")
    for name in names:
        parameter = parameters[name]
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
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


# --- Loading and saving -----------------------------------------------------------------------------------------------

# What a source may lack, as regular expressions over parameter names: it is then initialised.
NEW_TO_WAN_AND_QWEN = r"^encoder\.(queries|\w+_connector\.)|lora_[AB]$|^dit\.source_embedding\."
NEW_TO_KIWI = r"lora_[AB]$"


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
    if kind in ("rvedit", "kiwi-edit"):
        if wan is not None or qwen is not None:
            raise ValueError(f"{path} holds its own Wan and Qwen: leave out --wan and --qwen")
        config, tokenizer, tensors, optional = _open_ours(path) if kind == "rvedit" else _open_kiwi(path)
    else:
        if wan is None or qwen is None:
            what = f"{path} (Kiwi-Edit's training state)" if path else "a start without a checkpoint"
            raise ValueError(f"{what} needs both --wan DIR and --qwen DIR")
        config, tokenizer, tensors, optional = _open_parts(wan, qwen, path)

    with torch.device("meta"):
        model, vae = RVEDiT(config, tokenizer), WanVAE(config.vae)
    if shard is not None:
        shard(model)
    source = path or f"{wan} with {qwen}"
    vae_tensors = {key.removeprefix("vae."): tensors.pop(key) for key in list(tensors) if key.startswith("vae.")}
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
        model = RVEDiT(dataclasses.replace(preset("toy"), vae=vae.config), built_in.encoder.tokenizer)
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
    if (path / "config.json").is_file() and weights.read_json(path / "config.json").get("model_type") == "rvedit":
        return "rvedit"
    holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise ValueError(f"{path} is neither a checkpoint of ours nor Kiwi-Edit's release: it holds {holds}")


def save(path: str | Path, model: RVEDiT, vae: WanVAE, tensors: Iterable[tuple[str, Tensor]] | None = None) -> None:
    """Write a self-contained checkpoint (unmerged LoRA, VAE and tokenizer included); complete or not at all.

    tensors: those of the model's state dict, if it is sharded and they are to be gathered one at a time. Takes the
    place of a former checkpoint; raises ValueError if something else is there.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())) and layout(path) != "rvedit":
        raise ValueError(f"{path} is not a checkpoint of ours, so it will not be replaced: choose another name")
    config = {"model_type": "rvedit"} | dataclasses.asdict(model.config)
    texts = {"config.json": json.dumps(config, indent=2), "tokenizer.json": model.encoder.tokenizer.to_str(pretty=True)}
    tensors = model.state_dict().items() if tensors is None else tensors
    vae_tensors = ((f"vae.{key}", value) for key, value in vae.state_dict().items())
    weights.write_checkpoint(path, itertools.chain(tensors, vae_tensors), texts)


Opened = tuple[RVEDiTConfig, Tokenizer, dict[str, weights.Stored], str]  # the last: what the source may lack


def _open_ours(folder: Path) -> Opened:
    config = weights.read_json(folder / "config.json")
    config.pop("model_type")
    try:
        config = RVEDiTConfig(**config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe this model: {error}") from None
    return config, _tokenizer(folder), weights.open_folder(folder, "model"), weights.NOTHING


def _open_kiwi(folder: Path) -> Opened:
    tensors, tokenizer = weights.open_kiwi(folder), _tokenizer(folder / "processor")
    encoder = weights.read_json(folder / "mllm_encoder" / "config.json")
    dit = _dit_config(folder / "transformer" / "config.json", tensors)
    config = RVEDiTConfig(
        dit=dit,
        vae=_vae_config(weights.read_json(folder / "vae" / "config.json"), tensors, folder),
        qwen=_qwen_config(folder / "processor" / "qwen_config.json", tokenizer),
        routing_depth=dit.num_blocks,  # it never saw native tokens
        num_editing_tokens=_shape(tensors, "encoder.queries", folder)[0],
        max_mllm_frames=encoder.get("max_frames", RVEDiTConfig.max_mllm_frames),
        max_mllm_pixels=encoder.get("max_pixels_per_frame", RVEDiTConfig.max_mllm_pixels),
    )
    return config, tokenizer, with_native_connectors(tensors), NEW_TO_KIWI


def _open_parts(wan: Path, qwen: Path, training_state: Path | None) -> Opened:
    base = preset("wan2.2-ti2v-5b")
    transformer, vae = weights.open_wan(wan, base.vae.num_res_blocks)
    tensors = transformer | vae | weights.open_qwen(qwen)
    optional = NEW_TO_WAN_AND_QWEN
    if training_state is not None:
        tensors |= weights.open_kiwi_training(training_state)
        optional = weights.NOTHING
    diffusers = (wan / "transformer").is_dir()
    dit = _dit_config(wan / ("transformer" if diffusers else ".") / "config.json", tensors)
    tokenizer = _tokenizer(qwen)
    config = dataclasses.replace(
        base,
        dit=dit,
        vae=_vae_config(weights.read_json(wan / "vae" / "config.json") if diffusers else {}, tensors, wan),
        qwen=_qwen_config(qwen / "config.json", tokenizer),
        routing_depth=dit.num_blocks // 2,
    )
    if training_state is not None:
        config = dataclasses.replace(
            config,
            routing_depth=dit.num_blocks,
            num_editing_tokens=_shape(tensors, "encoder.queries", training_state)[0],
            lora_rank=_shape(tensors, "encoder.qwen.model.layers.0.self_attn.q_proj.lora_A", training_state)[0],
        )
        tensors = with_native_connectors(tensors)
    return config, tokenizer, tensors, optional


def with_native_connectors(tensors: dict[str, weights.Stored]) -> dict[str, weights.Stored]:
    """Kiwi-Edit has one connector; those of X_v and X_ℓ begin as copies of it."""
    copies = {
        key.replace("editing", stream): tensor
        for key, tensor in tensors.items()
        for stream in ("visual", "textual")
        if key.startswith("encoder.editing_connector.")
    }
    return tensors | copies


def _dit_config(file: Path, tensors: dict[str, weights.Stored]) -> DiTConfig:
    """Sizes from the tensors; what these do not show, and the number of blocks, from either layout's config.json."""
    config = weights.read_json(file)
    heads, blocks = config.get("num_heads", config.get("num_attention_heads")), config.get("num_layers")
    if not isinstance(heads, int) or not isinstance(blocks, int):
        raise ValueError(f"{file} does not say how many heads and layers the transformer has")
    dim, in_channels, *patch = _shape(tensors, "dit.patch_embedding.weight", file.parent)
    return DiTConfig(
        dim=dim,
        ffn_dim=_shape(tensors, "dit.blocks.0.ffn.0.weight", file.parent)[0],
        num_heads=heads,
        num_blocks=blocks,
        in_channels=in_channels,
        out_channels=_shape(tensors, "dit.head.head.weight", file.parent)[0] // math.prod(patch),
        patch_size=tuple(patch),
        freq_dim=_shape(tensors, "dit.time_embedding.0.weight", file.parent)[1],
        eps=config.get("eps", 1e-6),
    )


def _qwen_config(file: Path, tokenizer: Tokenizer) -> QwenConfig:
    config, query_token_id = weights.read_json(file), tokenizer.token_to_id("<|object_ref_start|>")
    try:
        return QwenConfig.from_hub(config, query_token_id)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _vae_config(config: dict[str, Any], tensors: dict[str, weights.Stored], source: Path) -> VAEConfig:
    """Widths from the tensors, the rest from config.json where the layout has one; Wan2.2_VAE.pth has none."""
    base = preset("wan2.2-ti2v-5b").vae
    return VAEConfig(
        dim=_shape(tensors, "vae.encoder.conv1.weight", source)[0],
        dec_dim=_shape(tensors, "vae.decoder.head.0.gamma", source)[0],
        z_dim=_shape(tensors, "vae.conv2.weight", source)[0],
        dim_mult=tuple(config.get("dim_mult", base.dim_mult)),
        num_res_blocks=config.get("num_res_blocks", base.num_res_blocks),
        temporal_downsample=tuple(config.get("temperal_downsample", base.temporal_downsample)),  # their spelling
        latents_mean=tuple(config.get("latents_mean", base.latents_mean)),
        latents_std=tuple(config.get("latents_std", base.latents_std)),
        patch_size=config.get("patch_size", base.patch_size),
    )


def _shape(tensors: dict[str, weights.Stored], key: str, source: Path) -> tuple[int, ...]:
    if key not in tensors:
        raise ValueError(f"{source} has no {key}: it is another model, or was cut short")
    return tensors[key].shape


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: download it again")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{file} is not a tokenizer: {error}") from None
