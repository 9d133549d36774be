"""The public layouts of Wan2.2, Qwen2.5-VL and Kiwi-Edit: names of tensors, and configurations.

Every tensor gets our name, which is that of the original Wan or of the hub's Qwen. Only names and
shapes are read here; `rvedit.load` fills them into a model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import cli
import weights
from model import DiTConfig
from qwen import QwenConfig
from vae import WAN2_2_VAE, VAEConfig
from weights import Opened, Stored

# --- Names: of every layout, in ours --------------------------------------------------------------

Rules = list[tuple[str, str]]  # regular expressions and replacements, applied one after the other

WRAPPERS = r"^module\.|_orig_mod\."  # what DistributedDataParallel and torch.compile add to names

WAN_TRANSFORMER: Rules = [  # from Diffusers' names; they leave the original names as they are
    (WRAPPERS, ""),
    (r"^model\.diffusion_model\.", ""),  # ComfyUI's
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

# From Diffusers' names too. The resampling layers are missing here, because their number in the
# original names depends on how many residual blocks a stage has: see `wan_vae_key`.
WAN_VAE: Rules = [
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
    (r"\.(\d+)\.norm1\.", r".\1.residual.0."),
    (r"\.(\d+)\.conv1\.", r".\1.residual.2."),
    (r"\.(\d+)\.norm2\.", r".\1.residual.3."),
    (r"\.(\d+)\.conv2\.", r".\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
]

QWEN: Rules = [  # from the names of transformers 4.52 and later; those of 5.x may lack the "model."
    (r"^model\.visual\.", "visual."),
    (r"^(model\.)?language_model\.", "model."),
]

KIWI_TRAINING: Rules = [  # dit.* has our names already
    (WRAPPERS, ""),
    (r"^pipe\.", ""),  # some files keep the name of the whole pipeline, some lack that of the DiT
    (r"^(blocks|patch_embedding|(?:text|time)_embedding|time_projection|head)\.", r"dit.\1."),
    (r"^vae_condition\.patch_embedding\.", "dit.source_embedding."),
    (r"^ref_vae_condition\.patch_embedding\.", "kiwi.ref_embedder."),
    (r"^mllm\.model\.(.*lora_[AB])(\.default)?\.weight$", r"encoder.qwen.\1"),
    (r"^encoder\.qwen\.model\.language_model\.", "encoder.qwen.model."),
    (r"^mllm\.video_queries\.q$", "encoder.queries"),
    (r"^mllm\.connec?tor\.", "encoder.editing_connector."),  # both spellings are theirs
    (r"^mllm\.image_queries\.q$", "encoder.image_queries"),
    (r"^mllm\.ref_queries\.q$", "kiwi.ref_queries"),
    (r"^mllm\.ref_connector\.", "kiwi.ref_connector."),
]

KIWI_ENCODER: Rules = [  # mllm_encoder/ and source_embedder/ of the release
    *QWEN,
    (r"^(model|visual|lm_head)\.", r"encoder.qwen.\1."),
    (r"^video_queries$", "encoder.queries"),
    (r"^connector\.", "encoder.editing_connector."),
    (r"^image_queries$", "encoder.image_queries"),
    (r"^(ref_queries$|ref_connector\.)", r"kiwi.\1"),
    (r"^patch_embedding\.", "dit.source_embedding."),
]

# Tensors that we know and do not use: umT5's projection, Qwen's output head (tied to its words, but
# sometimes stored all the same), and Kiwi-Edit's path for reference images.
UNUSED = re.compile(r"dit\.text_embedding\.|encoder\.qwen\.lm_head\.|kiwi\.")

# Parameters that a source may lack and that are then initialised, as regular expressions.
LORA = r"lora_[AB]$"
SOURCE_EMBEDDING = r"^dit\.source_embedding\."
NEW_TO_WAN_AND_QWEN = rf"^encoder\.(\w*queries|\w+_connector\.)|{LORA}|{SOURCE_EMBEDDING}"


def rename(key: str, rules: Rules) -> str:
    # One after the other: a rule may meet what an earlier one has made.
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def wan_vae_key(key: str, num_res_blocks: int) -> str:
    """Diffusers' or the original name of a tensor of Wan's VAE -> the original name."""
    down, up = num_res_blocks, num_res_blocks + 1  # the resampling layer comes after the blocks
    key = rename(key, WAN_VAE)
    key = re.sub(
        r"\.down_blocks\.(\d+)\.downsampler\.", rf".downsamples.\1.downsamples.{down}.", key
    )
    return re.sub(r"\.up_blocks\.(\d+)\.upsampler\.", rf".upsamples.\1.upsamples.{up}.", key)


# Functions from a name in any form that the rules know to ours.
wan_transformer_key = functools.partial(rename, rules=WAN_TRANSFORMER)
qwen_key = functools.partial(rename, rules=QWEN)
kiwi_training_key = functools.partial(rename, rules=KIWI_TRAINING)
kiwi_encoder_key = functools.partial(rename, rules=KIWI_ENCODER)


def renamed(
    tensors: dict[str, Stored], name: Callable[[str], str], prefix: str = ""
) -> dict[str, Stored]:
    """The tensors under our names, prefix + name(key), without those that we do not use."""
    ours = weights.unique((prefix + name(key), tensor) for key, tensor in tensors.items())
    return {key: tensor for key, tensor in ours.items() if not UNUSED.match(key)}


def with_native_connectors(tensors: dict[str, Any]) -> dict[str, Any]:
    """Kiwi-Edit has one connector; those of X_v and X_ℓ begin as copies of it."""
    # All three map hidden states of the same MLLM to the same DiT. Copied, they begin in a place
    # that the DiT can read.
    copies = {}
    for key, tensor in tensors.items():
        if key.startswith("encoder.editing_connector."):
            copies[key.replace("editing", "visual")] = tensor
            copies[key.replace("editing", "textual")] = tensor
    return tensors | copies


def with_image_queries(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Stills begin with the queries for clips, where a source has none for them."""
    queries = tensors.get("encoder.queries")
    return tensors if queries is None else {"encoder.image_queries": queries} | tensors


# --- Tensors: the folders and files of the public releases ----------------------------------------

STEM = "diffusion_pytorch_model"  # how Wan and Diffusers call their files


def open_wan(folder: Path) -> tuple[dict[str, Stored], dict[str, Path]]:
    """Wan2.2-TI2V-5B in either layout: its transformer under dit. and its VAE under vae.

    Also returns the files that say the sizes of both.
    """
    if (folder / "mllm_encoder").is_dir():
        raise ValueError(f"{folder} is Kiwi-Edit's release: give it as --checkpoint")
    if (folder / "transformer").is_dir():
        files = {
            "dit": folder / "transformer" / "config.json",
            "vae": folder / "vae" / "config.json",
        }
        transformer = weights.open_folder(folder / "transformer", STEM)
        vae = weights.open_folder(folder / "vae", STEM)
    else:
        # The official .pth, or DiffSynth's conversion of it.
        vaes = [folder / f"Wan2.2_VAE{suffix}" for suffix in (".pth", ".safetensors")]
        vaes = [file for file in vaes if file.is_file()]
        transformer = weights.open_folder(folder, STEM)
        if not vaes:
            raise ValueError(
                f"{folder} has no Wan2.2_VAE.pth, as Wan2.2-TI2V-5B has: "
                f"it holds {weights.contents(folder)}"
            )
        files = {"dit": folder / "config.json", "vae": vaes[0]}
        vae = weights.open_file(vaes[0])
    vae_key = functools.partial(wan_vae_key, num_res_blocks=WAN2_2_VAE.num_res_blocks)
    tensors = renamed(transformer, wan_transformer_key, "dit.") | renamed(vae, vae_key, "vae.")
    return tensors, files


def open_qwen(folder: Path) -> dict[str, Stored]:
    """Qwen2.5-VL under encoder.qwen."""
    return renamed(weights.open_folder(folder, "model"), qwen_key, "encoder.qwen.")


def open_kiwi(folder: Path) -> dict[str, Stored]:
    """Kiwi-Edit's release: all but the native connectors and the LoRA, which are new in ours."""
    own = weights.open_folder(folder / "mllm_encoder", STEM)
    note_references(own, folder)
    qwen = weights.open_folder(folder / "mllm_encoder", "model")  # with the LoRA merged in
    tensors = kiwi_release_names(
        transformer=weights.open_folder(folder / "transformer", STEM),
        source_embedder=weights.open_folder(folder / "source_embedder", STEM),
        mllm_encoder=weights.joined(own, qwen),
    )
    return tensors | renamed(weights.open_folder(folder / "vae", STEM), str, "vae.")


def kiwi_release_names(
    transformer: dict[str, Stored],
    source_embedder: dict[str, Stored],
    mllm_encoder: dict[str, Stored],
) -> dict[str, Stored]:
    """The sub-folders of Kiwi-Edit's release under our names."""
    own = weights.joined(source_embedder, mllm_encoder)
    return weights.joined(
        renamed(transformer, wan_transformer_key, "dit."), renamed(own, kiwi_encoder_key)
    )


# --- Configurations -------------------------------------------------------------------------------


def dit_config(file: Path, tensors: dict[str, Stored]) -> DiTConfig:
    """Sizes from the tensors. The heads and blocks are read from config.json, in either layout."""
    config = weights.read_json(file)
    heads = config.get("num_heads", config.get("num_attention_heads"))
    blocks = config.get("num_layers")
    if heads is None or blocks is None:
        raise ValueError(f"{file} does not say how many heads and layers the transformer has")
    # (dim, in_channels, frames, height, width of a patch)
    dim, in_channels, *patch = shape_of(tensors, "dit.patch_embedding.weight", 5, file.parent)
    # The last layer has a row for each channel of each latent in a patch.
    head_rows = shape_of(tensors, "dit.head.head.weight", 2, file.parent)[0]
    fields = dict(
        dim=dim,
        ffn_dim=shape_of(tensors, "dit.blocks.0.ffn.0.weight", 2, file.parent)[0],
        num_heads=heads,
        num_blocks=blocks,
        in_channels=in_channels,
        out_channels=head_rows // math.prod(patch),
        patch_size=tuple(patch),
        freq_dim=shape_of(tensors, "dit.time_embedding.0.weight", 2, file.parent)[1],
        eps=config.get("eps", 1e-6),
    )
    dit = weights.build_config(DiTConfig, fields, file, "dit.")
    check_sizes(
        file,
        config,
        dim=dit.dim,
        ffn_dim=dit.ffn_dim,
        freq_dim=dit.freq_dim,
        in_dim=dit.in_channels,  # Wan's name; the next is Diffusers'
        in_channels=dit.in_channels,
        out_dim=dit.out_channels,
        out_channels=dit.out_channels,
        patch_size=patch,
        attention_head_dim=dit.dim // dit.num_heads,
    )
    return dit


def check_sizes(file: Path, config: dict[str, Any], **sizes: Any) -> None:
    """Raise ValueError if config.json says another size than the tensors have.

    It is another model's then, and what only it says, such as the number of heads, would be wrong.
    """
    for name, size in sizes.items():
        if config.get(name) not in (None, size):
            raise ValueError(f"{file} says {name} {config[name]}, the weights have {size}")


def vae_config(file: Path, tensors: dict[str, Stored]) -> VAEConfig:
    """Widths from the tensors, the rest from config.json, which Wan2.2_VAE.pth comes without."""
    config = weights.read_json(file) if file.suffix == ".json" else {}
    base = WAN2_2_VAE
    downsample = config.get("temperal_downsample", base.temporal_downsample)  # their spelling
    fields = dict(
        dim=shape_of(tensors, "vae.encoder.conv1.weight", 5, file.parent)[0],
        dec_dim=shape_of(tensors, "vae.decoder.head.0.gamma", 4, file.parent)[0],
        z_dim=shape_of(tensors, "vae.conv2.weight", 5, file.parent)[0],
        dim_mult=config.get("dim_mult", base.dim_mult),
        num_res_blocks=config.get("num_res_blocks", base.num_res_blocks),
        temporal_downsample=downsample,
        latents_mean=config.get("latents_mean", base.latents_mean),
        latents_std=config.get("latents_std", base.latents_std),
        patch_size=config.get("patch_size", base.patch_size),
    )
    vae = weights.build_config(VAEConfig, fields, file, "vae.")
    check_sizes(
        file,
        config,
        dim=vae.dim,  # Kiwi-Edit's name; the next is Diffusers'
        base_dim=vae.dim,
        decoder_base_dim=vae.dec_dim,
        z_dim=vae.z_dim,
    )
    return vae


def qwen_config(file: Path, tokenizer: Tokenizer) -> QwenConfig:
    config = without_nulls(weights.read_json(file))
    # transformers 4.52 to 4.56 save the ids of these tokens as null.
    config.setdefault("video_token_id", tokenizer.token_to_id("<|video_pad|>"))
    try:
        config = QwenConfig.from_hub(config, tokenizer.token_to_id("<|object_ref_start|>"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return weights.build_config(QwenConfig, dataclasses.asdict(config), file, "qwen.")


def without_nulls(value: Any) -> Any:
    """A JSON object without the fields that are null, in the objects in it as well."""
    if not isinstance(value, dict):
        return value
    return {name: without_nulls(x) for name, x in value.items() if x is not None}


def shape_of(
    tensors: dict[str, Stored], key: str, dimensions: int, source: Path
) -> tuple[int, ...]:
    """The shape of a tensor that tells sizes. Raises ValueError if it is absent or misshapen."""
    if key not in tensors:
        raise ValueError(f"{source} has no {key}: it is another model, or was cut short")
    shape = tensors[key].shape
    if len(shape) != dimensions or 0 in shape:
        file = tensors[key].file
        raise ValueError(f"{file}: {key} has the shape {list(shape)}, not {dimensions} dimensions")
    return shape


# --- Whole checkpoints ----------------------------------------------------------------------------


def open_kiwi_release(folder: Path) -> Opened:
    """Kiwi-Edit's release, with L_s = L: its blocks never saw native tokens."""
    tensors = with_image_queries(open_kiwi(folder))
    tokenizer = weights.read_tokenizer(folder / "processor")
    files = {
        "dit": folder / "transformer" / "config.json",
        "vae": folder / "vae" / "config.json",
        "qwen": folder / "processor" / "qwen_config.json",
    }
    dit = dit_config(files["dit"], tensors)
    fields = dict(
        dit=dataclasses.replace(dit, bf16_timestep=True),  # as it was trained
        vae=vae_config(files["vae"], tensors),
        qwen=qwen_config(files["qwen"], tokenizer),
        routing_depth=dit.num_blocks,
        num_editing_tokens=shape_of(tensors, "encoder.queries", 2, folder)[0],
        num_image_tokens=shape_of(tensors, "encoder.image_queries", 2, folder)[0],
    )
    file = folder / "mllm_encoder" / "config.json"
    encoder = weights.read_json(file)
    for name, ours in (
        ("max_frames", "max_mllm_frames"),
        ("max_pixels_per_frame", "max_mllm_pixels"),
    ):
        if name in encoder:
            fields[ours] = weights.checked(encoder[name], int, file, ours)
    tensors = with_native_connectors(tensors)
    return Opened(folder, fields, file, tokenizer, tensors, LORA, files)


def open_wan_and_qwen(wan: Path, qwen: Path) -> Opened:
    """A start for training: with L_s = L/2, and without queries, connectors and LoRA."""
    tensors, files = open_wan(wan)
    files["qwen"] = qwen / "config.json"
    tensors |= open_qwen(qwen)
    tokenizer = weights.read_tokenizer(qwen)
    dit = dit_config(files["dit"], tensors)
    fields = dict(
        dit=dit,
        vae=vae_config(files["vae"], tensors),
        qwen=qwen_config(files["qwen"], tokenizer),
        routing_depth=dit.num_blocks // 2,
    )
    source = f"{wan} with {qwen}"
    return Opened(source, fields, wan, tokenizer, tensors, NEW_TO_WAN_AND_QWEN, files)


def open_kiwi_training(file: Path) -> dict[str, Stored]:
    """What Kiwi-Edit's training script has saved: the tensors that it changed and added."""
    stored = weights.open_file(file)
    if "encoder.queries" in stored:  # our name for them, not Kiwi-Edit's
        raise ValueError(f"{file} is a file of our checkpoint: give its folder")
    trained = renamed(stored, kiwi_training_key)
    if trained.keys().isdisjoint(("encoder.queries", "encoder.image_queries")):
        raise ValueError(
            f"{file} is no training state of Kiwi-Edit's, which has queries: "
            f"it holds {weights.few(stored) or 'nothing'}"
        )
    note_references(stored, file)
    return trained


def over_wan_and_qwen(trained: dict[str, Stored], file: Path, wan: Path, qwen: Path) -> Opened:
    """A training state of Kiwi-Edit's, from `file`, laid over Wan and Qwen.

    Its first stage trains the connector and the queries for stills alone, and LoRA if there is one.
    Then clips begin with the queries for stills, and the source embedding is new.
    """
    base = open_wan_and_qwen(wan, qwen)
    may_lack = []
    lacking = [key for key in base.tensors if key.startswith("dit.") and key not in trained]
    if not any(key.startswith("dit.") for key in trained):
        may_lack.append(SOURCE_EMBEDDING)
        trained.setdefault("encoder.queries", trained.get("encoder.image_queries"))
        cli.note(
            f"{file} is of Kiwi-Edit's first stage, which trains no DiT: train it before editing"
        )
    elif lacking:  # Wan's own would stand in for them, and nobody would see it
        raise ValueError(
            f"{file} lacks {len(lacking)} of the DiT's tensors ({weights.few(lacking)}): "
            f"is it one shard of several?"
        )
    trained = with_image_queries(trained)
    dit = dataclasses.replace(base.fields["dit"], bf16_timestep=True)  # as it was trained
    fields = base.fields | dict(
        dit=dit,
        routing_depth=dit.num_blocks,  # it never saw native tokens
        num_editing_tokens=shape_of(trained, "encoder.queries", 2, file)[0],
        num_image_tokens=shape_of(trained, "encoder.image_queries", 2, file)[0],
    )
    if any(re.search(LORA, key) for key in trained):  # its rank may be another than ours
        lora = "encoder.qwen.model.layers.0.self_attn.q_proj.lora_A"
        fields["lora_rank"] = shape_of(trained, lora, 2, file)[0]
    else:
        may_lack.append(LORA)
    return base._replace(
        source=file,
        fields=fields,
        tensors=with_native_connectors(base.tensors | trained),
        may_lack="|".join(may_lack) or None,
    )


def note_references(names: Iterable[str], source: Path) -> None:
    """Say so if a checkpoint of Kiwi-Edit's was trained with reference images."""
    if any("ref_queries" in name for name in names):
        cli.note(f"{source} was trained with reference images, which are not used here")
