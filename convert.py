"""The public layouts of Wan2.2, Qwen2.5-VL and Kiwi-Edit: their names of tensors, and their configurations.

Every name becomes ours, which are those of the original Wan and of the hub's Qwen. Only names and shapes are read here;
`rvedit.load` fills them into a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import weights
from model import DiTConfig
from qwen import QwenConfig
from vae import WAN2_2_VAE, VAEConfig

# What a source may lack, as regular expressions over parameter names: it is then initialised.
NEW_TO_WAN_AND_QWEN = r"^encoder\.(queries|\w+_connector\.)|lora_[AB]$|^dit\.source_embedding\."
NEW_TO_KIWI = r"lora_[AB]$"

# Fields of an RVEDiTConfig, the tokenizer, the tensors, and what the source may lack.
Opened = tuple[dict[str, Any], Tokenizer, dict[str, weights.Stored], str]


# --- Names: every layout -> ours ------------------------------------------------------------------

_TRANSFORMER = [  # Diffusers -> original, which the rules leave as it is
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_out\.0\.", "_attn.o."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"\.norm2\.", ".norm3."),  # the norm before cross-attention; the other two have no parameters
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
]

_VAE = [
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".downsamples.\1.downsamples.\2."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".upsamples.\1.upsamples.\2."),
    (r"^((?:en|de)coder\.(?:middle|downsamples|upsamples)\..*)norm1\.", r"\1residual.0."),
    (r"^((?:en|de)coder\.(?:middle|downsamples|upsamples)\..*)conv1\.", r"\1residual.2."),
    (r"^((?:en|de)coder\.(?:middle|downsamples|upsamples)\..*)norm2\.", r"\1residual.3."),
    (r"^((?:en|de)coder\.(?:middle|downsamples|upsamples)\..*)conv2\.", r"\1residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
]

_QWEN = [
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "model."),
]  # transformers 4.52 and later

_KIWI_TRAINING = [
    (r"^vae_condition\.patch_embedding\.", "dit.source_embedding."),
    (r"^ref_vae_condition\.patch_embedding\.", "kiwi.ref_embedder."),
    (r"^mllm\.model\.(.*lora_[AB])\.default\.weight$", r"encoder.qwen.\1"),
    (r"^encoder\.qwen\.model\.language_model\.", "encoder.qwen.model."),
    (r"^mllm\.video_queries\.q$", "encoder.queries"),
    (r"^mllm\.connetor\.", "encoder.editing_connector."),  # their spelling
    (r"^mllm\.(image|ref)_queries\.q$", r"kiwi.\1_queries"),
    (r"^mllm\.ref_connector\.", "kiwi.ref_connector."),
]

_KIWI_ENCODER = [
    (r"^video_queries$", "encoder.queries"),
    (r"^connector\.", "encoder.editing_connector."),
    (r"^(image_queries|ref_queries|ref_connector\..*)$", r"kiwi.\1"),
    (r"^(model|visual|lm_head)\.", r"encoder.qwen.\1."),
    (r"^encoder\.qwen\.(model\.visual|visual)\.", "encoder.qwen.visual."),
    (r"^encoder\.qwen\.model\.language_model\.", "encoder.qwen.model."),
]


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def wan_transformer_key(key: str) -> str:
    """Diffusers' or the original name of a Wan transformer tensor -> the original name."""
    return _rename(key, _TRANSFORMER)


def wan_vae_key(key: str, num_res_blocks: int) -> str:
    """Diffusers' or the original name of a Wan VAE tensor -> the original name; resampling comes after the blocks."""
    key = _rename(key, _VAE)
    key = re.sub(
        r"\.down_blocks\.(\d+)\.downsampler\.",
        rf".downsamples.\1.downsamples.{num_res_blocks}.",
        key,
    )
    return re.sub(
        r"\.up_blocks\.(\d+)\.upsampler\.", rf".upsamples.\1.upsamples.{num_res_blocks + 1}.", key
    )


def qwen_key(key: str) -> str:
    """The hub's or the newer transformers' name of a Qwen2.5-VL tensor -> the hub's name."""
    return _rename(key, _QWEN)


def renamed(
    tensors: dict[str, weights.Stored], name: Callable[[str], str], prefix: str = ""
) -> dict[str, weights.Stored]:
    return {prefix + name(key): tensor for key, tensor in tensors.items()}


# --- Folders of the public releases ---------------------------------------------------------------


def open_wan(
    folder: Path, num_res_blocks: int
) -> tuple[dict[str, weights.Stored], dict[str, weights.Stored]]:
    """The transformer (names under dit.) and the VAE (names under vae.) of a Wan2.2-TI2V-5B folder in either layout."""
    if (folder / "transformer").is_dir():
        transformer = weights.open_folder(folder / "transformer", "diffusion_pytorch_model")
        vae = weights.open_folder(folder / "vae", "diffusion_pytorch_model")
    else:
        transformer = weights.open_folder(folder, "diffusion_pytorch_model")
        if not (folder / "Wan2.2_VAE.pth").is_file():
            raise ValueError(f"{folder} has no Wan2.2_VAE.pth: download it again")
        vae = weights.open_file(folder / "Wan2.2_VAE.pth")
    vae = renamed(vae, lambda key: wan_vae_key(key, num_res_blocks), "vae.")
    return renamed(transformer, wan_transformer_key, "dit."), vae


def open_qwen(folder: Path) -> dict[str, weights.Stored]:
    """Qwen2.5-VL under the names encoder.qwen.*"""
    return renamed(weights.open_folder(folder, "model"), qwen_key, "encoder.qwen.")


def kiwi_training_key(key: str) -> str:
    """A name in Kiwi-Edit's training state -> ours; dit.* is already the same."""
    return _rename(key, _KIWI_TRAINING)


def open_kiwi_training(file: Path) -> dict[str, weights.Stored]:
    """What Kiwi-Edit's training has changed and added; the rest is Wan's and Qwen's."""
    return renamed(weights.open_file(file), kiwi_training_key)


def kiwi_release_names(
    transformer: dict[str, weights.Stored],
    source_embedder: dict[str, weights.Stored],
    mllm_encoder: dict[str, weights.Stored],
) -> dict[str, weights.Stored]:
    """The sub-folders of Kiwi-Edit's release under our names. Its Qwen is whole, with the LoRA merged into it."""
    return (
        renamed(transformer, wan_transformer_key, "dit.")
        | renamed(
            source_embedder, lambda key: key.replace("patch_embedding.", "dit.source_embedding.")
        )
        | renamed(mllm_encoder, lambda key: _rename(key, _KIWI_ENCODER))
    )


def open_kiwi(folder: Path) -> dict[str, weights.Stored]:
    """Kiwi-Edit's release: everything but the connectors and the LoRA that are new in our model."""
    stem = "diffusion_pytorch_model"
    tensors = kiwi_release_names(
        weights.open_folder(folder / "transformer", stem),
        weights.open_folder(folder / "source_embedder", stem),
        weights.open_folder(folder / "mllm_encoder", stem)
        | weights.open_folder(folder / "mllm_encoder", "model"),
    )
    if any(
        (folder / "ref_embedder").glob("*.safetensors")
    ):  # an instruct-only release has just a config there
        tensors |= renamed(
            weights.open_folder(folder / "ref_embedder", stem), str, "kiwi.ref_embedder."
        )
    return tensors | renamed(weights.open_folder(folder / "vae", stem), str, "vae.")


# --- Configurations -------------------------------------------------------------------------------


def open_kiwi_release(folder: Path) -> Opened:
    tensors, tokenizer = open_kiwi(folder), weights.read_tokenizer(folder / "processor")
    encoder = weights.read_json(folder / "mllm_encoder" / "config.json")
    dit = _dit_config(folder / "transformer" / "config.json", tensors)
    fields = dict(
        dit=dit,
        vae=_vae_config(weights.read_json(folder / "vae" / "config.json"), tensors, folder),
        qwen=_qwen_config(folder / "processor" / "qwen_config.json", tokenizer),
        routing_depth=dit.num_blocks,  # it never saw native tokens
        num_editing_tokens=_shape(tensors, "encoder.queries", folder)[0],
    )
    for theirs, ours in (
        ("max_frames", "max_mllm_frames"),
        ("max_pixels_per_frame", "max_mllm_pixels"),
    ):
        if theirs in encoder:
            fields[ours] = encoder[theirs]
    return fields, tokenizer, with_native_connectors(tensors), NEW_TO_KIWI


def open_parts(wan: Path, qwen: Path, training_state: Path | None) -> Opened:
    transformer, vae = open_wan(wan, WAN2_2_VAE.num_res_blocks)
    tensors = transformer | vae | open_qwen(qwen)
    optional = NEW_TO_WAN_AND_QWEN
    if training_state is not None:
        tensors |= open_kiwi_training(training_state)
        optional = weights.NOTHING
    diffusers = (wan / "transformer").is_dir()
    dit = _dit_config(wan / ("transformer" if diffusers else ".") / "config.json", tensors)
    tokenizer = weights.read_tokenizer(qwen)
    fields = dict(
        dit=dit,
        vae=_vae_config(
            weights.read_json(wan / "vae" / "config.json") if diffusers else {}, tensors, wan
        ),
        qwen=_qwen_config(qwen / "config.json", tokenizer),
        routing_depth=dit.num_blocks // 2,
    )
    if training_state is not None:
        fields |= dict(
            routing_depth=dit.num_blocks,
            num_editing_tokens=_shape(tensors, "encoder.queries", training_state)[0],
            lora_rank=_shape(
                tensors, "encoder.qwen.model.layers.0.self_attn.q_proj.lora_A", training_state
            )[0],
        )
        tensors = with_native_connectors(tensors)
    return fields, tokenizer, tensors, optional


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
    heads, blocks = (
        config.get("num_heads", config.get("num_attention_heads")),
        config.get("num_layers"),
    )
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


def _vae_config(
    config: dict[str, Any], tensors: dict[str, weights.Stored], source: Path
) -> VAEConfig:
    """Widths from the tensors, the rest from config.json where the layout has one; Wan2.2_VAE.pth has none."""
    base = WAN2_2_VAE
    return VAEConfig(
        dim=_shape(tensors, "vae.encoder.conv1.weight", source)[0],
        dec_dim=_shape(tensors, "vae.decoder.head.0.gamma", source)[0],
        z_dim=_shape(tensors, "vae.conv2.weight", source)[0],
        dim_mult=tuple(config.get("dim_mult", base.dim_mult)),
        num_res_blocks=config.get("num_res_blocks", base.num_res_blocks),
        temporal_downsample=tuple(
            config.get("temperal_downsample", base.temporal_downsample)
        ),  # their spelling
        latents_mean=tuple(config.get("latents_mean", base.latents_mean)),
        latents_std=tuple(config.get("latents_std", base.latents_std)),
        patch_size=config.get("patch_size", base.patch_size),
    )


def _shape(tensors: dict[str, weights.Stored], key: str, source: Path) -> tuple[int, ...]:
    if key not in tensors:
        raise ValueError(f"{source} has no {key}: it is another model, or was cut short")
    return tensors[key].shape
