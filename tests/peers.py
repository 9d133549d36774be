"""The peers in tests and in `bench --peer`: diffusers' and transformers' modules on our weights.

A peer's parameters are our tensors, not copies. Its buffers, which no state dict has, are its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

import convert
from model import WanDiT
from qwen import Qwen2_5_VL, QwenConfig
from rvedit import RVEDiT
from vae import VAEConfig, WanVAE


def borrow(
    peer: nn.Module, module: nn.Module, key: Callable[[str], str]
) -> tuple[nn.Module, list[str]]:
    """Give a peer our tensors. `key` maps its names to ours; also returns our names not used."""
    state = module.state_dict()
    names = {name: key(name) for name in peer.state_dict()}
    peer.load_state_dict({name: state[ours] for name, ours in names.items()}, assign=True)
    return peer.eval(), sorted(state.keys() - names.values())


# --- The DiT --------------------------------------------------------------------------------------


def wan_transformer(dit: WanDiT) -> WanTransformer3DModel:
    """Our DiT as diffusers has it, but like ours it takes contexts already embedded."""
    config = dit.config
    with init_empty_weights():
        peer = WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.dim // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_blocks,
            eps=config.eps,
        )
    peer.condition_embedder.text_embedder = nn.Identity()
    peer, unused = borrow(peer, dit, convert.wan_transformer_key)
    assert unused == ["source_embedding.bias", "source_embedding.weight"]
    return peer.to(dit.patch_embedding.weight.device)


# --- The VAE --------------------------------------------------------------------------------------


def wan_vae(vae: WanVAE) -> AutoencoderKLWan:
    """Our VAE as diffusers has it; its latents are not normalised."""
    config = vae.config
    pixels = 3 * config.patch_size**2
    with init_empty_weights():
        peer = AutoencoderKLWan(
            base_dim=config.dim,
            decoder_base_dim=config.dec_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
            is_residual=True,
            in_channels=pixels,
            out_channels=pixels,
            patch_size=config.patch_size,
            scale_factor_spatial=config.spatial_factor,
            scale_factor_temporal=config.temporal_factor,
        )
    peer, unused = borrow(peer, vae, lambda name: convert.wan_vae_key(name, config.num_res_blocks))
    assert not unused
    return peer


def vae_statistics(config: VAEConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, (1, C, 1, 1, 1) each."""
    mean = torch.tensor(config.latents_mean or [0.0] * config.z_dim, device=device)
    std = torch.tensor(config.latents_std or [1.0] * config.z_dim, device=device)
    return mean[None, :, None, None, None], std[None, :, None, None, None]


def encode(peer: AutoencoderKLWan, config: VAEConfig, video: Tensor) -> Tensor:
    """Latents normalised as ours are."""
    mean, std = vae_statistics(config, video.device)
    return (peer.encode(video).latent_dist.mode() - mean) / std


def decode(peer: AutoencoderKLWan, config: VAEConfig, latents: Tensor) -> Tensor:
    mean, std = vae_statistics(config, latents.device)
    return peer.decode((latents * std + mean).to(peer.post_quant_conv.weight.dtype)).sample


# --- The MLLM -------------------------------------------------------------------------------------


def qwen2_5_vl(qwen: Qwen2_5_VL) -> Qwen2_5_VLModel:
    """Our Qwen2.5-VL, without its LoRA, as transformers has it."""
    config = dataclasses.asdict(qwen.config)
    config["vision_config"] = config.pop("vision") | {"out_hidden_size": qwen.config.hidden_size}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": list(qwen.config.mrope_section)}
    with init_empty_weights():
        peer = Qwen2_5_VLModel(Qwen2_5_VLConfig(**config))
    peer, unused = borrow(peer, qwen, lambda name: convert.qwen_key(f"model.{name}"))
    assert all(".lora_" in name for name in unused)
    return peer.to(qwen.model.norm.weight.device)


def hidden_states(
    peer: Qwen2_5_VLModel,
    config: QwenConfig,
    input_ids: Tensor,
    pixel_values: Tensor,
    grid_thw: Tensor,
    queries: Tensor,
    attention_mask: Tensor | None = None,
    still: bool = False,
) -> Tensor:
    """transformers' last hidden states for the arguments of our `Qwen2_5_VL.forward`.

    still: give it the patches as an image's and not as a video's.
    """
    embeddings = peer.get_input_embeddings()(input_ids)
    is_query = (input_ids == config.query_token_id)[..., None]
    queries = queries.to(embeddings.dtype).expand(len(input_ids), -1, -1)
    grid_thw = grid_thw.to(input_ids.device)
    if still:
        visual = dict(pixel_values=pixel_values, image_grid_thw=grid_thw)
        token_types = (input_ids == config.image_token_id).int()
    else:
        visual = dict(pixel_values_videos=pixel_values, video_grid_thw=grid_thw)
        token_types = (input_ids == config.video_token_id).int() * 2
    return peer(
        input_ids=input_ids,
        inputs_embeds=embeddings.masked_scatter(is_query, queries),
        attention_mask=attention_mask,
        mm_token_type_ids=token_types,
        use_cache=False,
        **visual,
    ).last_hidden_state


# --- For bench --peer -----------------------------------------------------------------------------


def runs(
    model: RVEDiT,
    vae: WanVAE,
    z: Tensor,
    t: Tensor,
    context: Tensor,
    video: Tensor,
    inputs: tuple[Any, ...],
    compiled: bool,
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """For each network two functions that do the same on the same tensors, ours and the peer's."""
    device, dtype = z.device, model.dit.patch_embedding.weight.dtype
    blocks = model.config.dit.num_blocks
    with torch.device("meta"):
        qwen = Qwen2_5_VL(model.config.qwen)
    # strict=False, because the state dict has the LoRA, too.
    qwen.load_state_dict(model.encoder.qwen.state_dict(), strict=False, assign=True)
    wan, autoencoder, hub = wan_transformer(model.dit), wan_vae(vae), qwen2_5_vl(qwen)
    if compiled:
        theirs = (*wan.blocks, *hub.language_model.layers, *hub.visual.blocks)
        for block in (*theirs, *qwen.model.layers, *qwen.visual.blocks):
            block.compile()
    input_ids, pixel_values, grid_thw = inputs[:3]
    texts = (input_ids.to(device), pixel_values.to(device), grid_thw, model.encoder.queries)

    def encode_in_float32() -> Tensor:
        """As diffusers computes with our weights, whatever is our default on this device."""
        vae.encoder_dtype = torch.float32
        latents = vae.encode(video)
        vae.encoder_dtype = None
        return latents

    return {
        "dit as Wan's": {
            "ours": lambda: model.dit(z, t, [context] * blocks),
            "diffusers": lambda: wan(z.to(dtype), 1000 * t, context, return_dict=False)[0],
        },
        "encode in float32": {
            "ours": encode_in_float32,
            "diffusers": lambda: encode(autoencoder, vae.config, video),
        },
        "decode": {
            "ours": lambda: vae.decode(z),
            "diffusers": lambda: decode(autoencoder, vae.config, z),
        },
        "mllm as Qwen's": {
            "ours": lambda: qwen(*texts),
            "transformers": lambda: hidden_states(hub, qwen.config, *texts),
        },
    }
