"""What several tests share."""

import dataclasses
from pathlib import Path

import av
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import data
import rvedit
from mllm import Condition
from model import DiTConfig
from qwen import LoRALinear, QwenConfig, VisionConfig
from vae import VAEConfig, WanVAE

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def randomise(module, seed=0, scale=0.3):
    """Draw every parameter anew, those that start at zero or one included, so that no branch can
    hide.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * scale / p[0].numel() ** 0.5 * 3)
            else:
                p.copy_(
                    scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
                )
    return module


def relative_error(actual, expected):
    """max |actual - expected| / max |expected|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return (
        (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    ).item()


def make_features(*shape, dtype=torch.float64, seed=0):
    """Two related but different sets of features, of which the first wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    a_ref = torch.randn(shape, generator=generator, dtype=torch.float64)
    a = 0.5 * a_ref + torch.randn(shape, generator=generator, dtype=torch.float64)
    return a.to(dtype).requires_grad_(), a_ref.to(dtype)


def value_and_gradient(function, x, *arguments, **options):
    """The scalar function(x, ...) and its gradient in x."""
    value = function(x, *arguments, **options)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def random_condition(dim, lengths=(4, 6, 3), batch=1):
    """X_e, X_v and X_ℓ of so many tokens each, without masks."""
    return Condition(*(torch.randn(batch, n, dim) for n in lengths))


def residual_stream(model, condition, routing_depth):
    """The DiT's residual stream behind each block, for a fixed input and the given condition."""
    streams = []
    hooks = []
    for block in model.dit.blocks:
        hook = block.register_forward_hook(lambda _, __, out: streams.append(out[0]))
        hooks.append(hook)
    generator = torch.Generator().manual_seed(1)
    shape = (2, 1, model.config.dit.in_channels, 2, 4, 4)
    z_t, source = torch.randn(shape, generator=generator)
    former = model.config
    model.config = dataclasses.replace(former, routing_depth=routing_depth)
    model.dit(z_t, torch.tensor([0.6]), model.contexts(condition), source)
    model.config = former
    for hook in hooks:
        hook.remove()
    return streams


def make_clip(frames, height, width, seed=0):
    """A uint8 (T, H, W, 3) clip of a bright square drifting over a gradient, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.linspace(0, 200, height).view(1, -1, 1),
        torch.linspace(0, 100, width).view(1, 1, -1),
    )
    clip = (rows + columns / 2).expand(frames, -1, -1).unsqueeze(-1) * torch.tensor([1.0, 0.6, 0.3])
    clip = clip + torch.randint(0, 9, clip.shape, generator=generator)
    for i in range(frames):
        left = i % max(1, width - 8)
        clip[i, height // 4 : height // 2, left : left + 8] = torch.tensor([250.0, 250.0, 40.0])
    return clip.clamp(0, 255).to(torch.uint8)


def write_clip(path: Path, frames: int, level: int, rate: int = 8, size=(16, 32)) -> None:
    """Write a lossless clip of one colour whose brightness grows by 2 a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "bgr0"
        for t in range(frames):
            image = np.full((*size, 3), level + 2 * t, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def tiny_tokenizer():
    """A byte-level tokenizer without merges, with Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def tiny_config(**changes):
    """Every structural switch of the full preset at a few thousand parameters."""
    tokenizer = tiny_tokenizer()
    config = rvedit.RVEDiTConfig(
        dit=DiTConfig(
            dim=24,
            ffn_dim=40,
            num_heads=2,
            num_blocks=3,
            in_channels=8,
            out_channels=8,
            patch_size=(1, 2, 2),
            freq_dim=16,
        ),
        vae=VAEConfig(
            dim=4,
            dec_dim=4,
            z_dim=8,
            dim_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            temporal_downsample=(False, True, True),
            latents_mean=tuple(0.1 * i for i in range(8)),
            latents_std=tuple(1 + 0.1 * i for i in range(8)),
        ),
        qwen=QwenConfig(
            vision=VisionConfig(
                depth=2,
                hidden_size=16,
                intermediate_size=24,
                num_heads=2,
                patch_size=4,
                window_size=16,
                fullatt_block_indexes=(1,),
            ),
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=600,
            mrope_section=(2, 2, 2),
            image_token_id=tokenizer.token_to_id("<|image_pad|>"),
            video_token_id=tokenizer.token_to_id("<|video_pad|>"),
            query_token_id=tokenizer.token_to_id("<|object_ref_start|>"),
        ),
        routing_depth=1,
        num_editing_tokens=5,
        num_image_tokens=3,
        lora_rank=2,
        max_mllm_frames=4,
        min_mllm_pixels=4 * 8**2,
        max_mllm_pixels=32**2,
        max_pixels=64**2,
        max_frames=17,
    )
    return dataclasses.replace(config, **changes)


def tiny_model(**changes):
    """A model and a VAE of `tiny_config`, every parameter random."""
    config = tiny_config(**changes)
    model, vae = rvedit.RVEDiT(config, tiny_tokenizer()), WanVAE(config.vae)
    return randomise(model).eval(), randomise(vae).eval().requires_grad_(False)


def make_batch(model, vae, size=64):
    """Line 3 of Algorithm 1: two triplets of 5 frames, whose texts differ in length, t and ε."""
    source = torch.stack([make_clip(5, size, size, seed) for seed in (1, 2)])
    target = torch.stack([make_clip(5, size, size, seed) for seed in (3, 4)])
    generator = torch.Generator().manual_seed(0)
    side = size // vae.config.spatial_factor
    return data.Batch(
        source=source,
        target=target,
        t=torch.tensor([0.8, 0.3]),
        noise=torch.randn(2, vae.config.z_dim, 2, side, side, generator=generator),
        edit_inputs=model.encoder.prepare(list(source), ["remove it", "make it snow on the hill"]),
        ref_inputs=model.encoder.prepare(list(target), ["a hill in the snow", "a hill"]),
        broken=0,
    )


@torch.no_grad()
def merge_lora(qwen):
    """Fold each LoRA of a Qwen2_5_VL into its weight, in place, as Kiwi-Edit's release has it.

    The outputs stay the same, and the state dict is the hub's again.
    """
    for layer in qwen.model.layers:
        for name, lora in list(layer.self_attn.named_children()):
            if isinstance(lora, LoRALinear):
                has_bias = lora.bias is not None
                plain = torch.nn.Linear(lora.in_features, lora.out_features, bias=has_bias)
                plain.weight, plain.bias = lora.weight, lora.bias
                plain.weight += lora.scale * (lora.lora_B.float() @ lora.lora_A.float())
                setattr(layer.self_attn, name, plain)
