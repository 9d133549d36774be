"""Qwen2.5-VL's configuration and tokenizer as transformers has them, in full and at tiny size."""

from __future__ import annotations

import copy

import helpers
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

# The hub's config.json of Qwen2.5-VL-3B-Instruct, without fields that do not concern the network.
HUB_CONFIG = {
    "model_type": "qwen2_5_vl",
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}

SPECIAL_TOKENS = helpers.SPECIAL_TOKENS[1:]  # transformers adds <|endoftext|> by itself


def qwen_tokenizer() -> Qwen2Tokenizer:
    """transformers' Qwen tokenizer over bytes and a few merges."""
    merges = ["t h", "th e", "Ġ the", "i n", "Ġ in", "in g", "Ġ s", "o w"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for first, second in pairs:
        vocab[first + second] = len(vocab)
    return Qwen2Tokenizer(vocab=vocab, merges=pairs, additional_special_tokens=SPECIAL_TOKENS)


def tiny_hub_config(tokenizer: Qwen2Tokenizer) -> dict:
    """`HUB_CONFIG` with all its structure at a few thousand parameters, for this tokenizer."""
    config = copy.deepcopy(HUB_CONFIG)
    config["vision_config"] |= dict(
        depth=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        patch_size=4,
        window_size=32,  # 8 x 8 patches, 4 x 4 visual tokens
        fullatt_block_indexes=[1],
    )
    config |= dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    config["rope_scaling"]["mrope_section"] = [2, 3, 3]
    for field, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
    ):
        config[field] = tokenizer.convert_tokens_to_ids(token)
    return config
