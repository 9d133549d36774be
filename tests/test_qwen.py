"""Qwen2.5-VL against transformers, LoRA against PEFT."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import peers
import pytest
import torch
import torch.nn.functional as F
from helpers import merge_lora, relative_error
from peft import LoraConfig, get_peft_model
from tiny_qwen import HUB_CONFIG, qwen_tokenizer, tiny_hub_config
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

import convert
from qwen import Qwen2_5_VL, QwenConfig, add_lora

MANIFEST = Path(__file__).parent / "manifests" / "qwen2.5_vl_3b_hub.json"
NUM_QUERIES = 5


@pytest.fixture(scope="module")
def hub_config() -> dict:
    return tiny_hub_config(qwen_tokenizer())


@pytest.fixture(scope="module")
def config(hub_config: dict) -> QwenConfig:
    return QwenConfig.from_hub(
        hub_config, qwen_tokenizer().convert_tokens_to_ids("<|object_ref_start|>")
    )


def load_from(reference: Qwen2_5_VLModel, qwen: Qwen2_5_VL) -> None:
    """Copy transformers' weights, named as in a checkpoint of its full model, by our key map."""
    state = reference.state_dict().items()
    qwen.load_state_dict({convert.qwen_key(f"model.{name}"): value for name, value in state})


@pytest.fixture
def pair(hub_config: dict, config: QwenConfig) -> tuple[Qwen2_5_VL, Qwen2_5_VLModel]:
    """Ours and transformers' model with the same random weights."""
    torch.manual_seed(0)
    reference = Qwen2_5_VLModel(Qwen2_5_VLConfig(**copy.deepcopy(hub_config))).eval()
    for name, parameter in reference.named_parameters():
        is_norm = "norm" in name or "ln_q" in name
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.3 if is_norm else 0.15)
    qwen = Qwen2_5_VL(config).eval()
    load_from(reference, qwen)
    return qwen, reference


# (t, h, w) patch grids. A window is 8 x 8 patches.
GRIDS = {
    "one frame, one window": [[1, 8, 8]],
    "landscape, windows do not divide": [[2, 10, 22]],
    "portrait, windows do not divide": [[3, 26, 6]],
    "smaller than a window": [[2, 4, 6]],
    "three clips of different lengths": [[1, 4, 6], [2, 18, 10], [4, 10, 16]],
    "three clips of one size": [[2, 8, 12], [2, 8, 12], [2, 8, 12]],
}


def make_inputs(grids: list[list[int]], config: QwenConfig) -> dict[str, Tensor]:
    """Random patches; for each clip a sequence with text before, between and after, left-padded."""
    generator = torch.Generator().manual_seed(len(grids) + grids[0][1])
    rows = []
    for i, grid in enumerate(grids):
        video = [config.video_token_id] * (math.prod(grid) // 4)
        text = list(range(20, 24 + 3 * i))
        queries = [config.query_token_id] * NUM_QUERIES
        rows.append([7, 8, 9, *video, *text, *queries, 3, 4])
    length = max(len(row) for row in rows)
    num_patches = sum(math.prod(grid) for grid in grids)
    patch_dim = 6 * config.vision.patch_size**2
    return {
        "input_ids": torch.tensor([[1] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        ),
        "pixel_values": torch.randn(num_patches, patch_dim, generator=generator),
        "grid_thw": torch.tensor(grids),
        "queries": torch.randn(NUM_QUERIES, config.hidden_size, generator=generator),
    }


# --- Configuration --------------------------------------------------------------------------------


def test_full_model_has_the_keys_and_shapes_of_the_hub() -> None:
    """The default configuration is Qwen2.5-VL-3B's; its model on the meta device has its shapes."""
    config = QwenConfig.from_hub(HUB_CONFIG)
    assert config == QwenConfig()
    with torch.device("meta"):
        qwen = Qwen2_5_VL(config)
    shapes = {name: list(tensor.shape) for name, tensor in qwen.state_dict().items()}
    manifest = json.loads(MANIFEST.read_text())
    assert shapes == {name: entry["shape"] for name, entry in manifest.items()}
    assert sum(parameter.numel() for parameter in qwen.parameters()) == 3_754_622_976
    assert not list(qwen.buffers())


def test_config_reads_both_forms_and_survives_json() -> None:
    """transformers' re-saved config gives the same configuration, and so do our fields as JSON."""
    resaved = json.loads(Qwen2_5_VLConfig(**copy.deepcopy(HUB_CONFIG)).to_json_string())
    assert "text_config" in resaved and "hidden_size" not in resaved
    config = QwenConfig.from_hub(resaved)
    assert config == QwenConfig()
    assert QwenConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(ValueError, match="vision_config"):
        QwenConfig.from_hub({"hidden_size": 64})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "mrope_section": [1]}},
        {"rope_scaling": {"type": "mrope", "rope_type": "dynamic", "mrope_section": [1]}},
        {"use_sliding_window": True},
        {"hidden_act": "gelu"},
        {"text_config": {"hidden_act": "gelu"}},
        {"vision_config": HUB_CONFIG["vision_config"] | {"hidden_act": "quick_gelu"}},
    ],
)
def test_what_the_network_does_not_have_is_refused(change: dict) -> None:
    """Left out, it would give other hidden states than the model was trained with."""
    with pytest.raises(ValueError, match="is .*, which is not supported"):
        QwenConfig.from_hub(HUB_CONFIG | change)


def test_a_config_of_transformers_4_49_lacks_its_defaults() -> None:
    """It has only what differs from the 7B model; this is what it makes of the 3B's."""
    vision = {
        "hidden_size": 1280,
        "in_chans": 3,
        "model_type": "qwen2_5_vl",
        "out_hidden_size": 2048,
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
    }
    assert QwenConfig.from_hub(HUB_CONFIG | {"vision_config": vision}) == QwenConfig()
    seven_b = QwenConfig.from_hub(HUB_CONFIG | {"vision_config": {}}).vision
    assert (seven_b.hidden_size, seven_b.tokens_per_second) == (3584, 4)


# --- Both towers ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_both_towers_match_transformers(
    grids: list[list[int]], pair: tuple, config: QwenConfig
) -> None:
    """Visual tokens, position ids and last hidden states, to 1e-5 in float32."""
    qwen, reference = pair
    inputs = make_inputs(grids, config)
    input_ids, grid_thw = inputs["input_ids"], inputs["grid_thw"]
    real = inputs["attention_mask"].bool()

    visual = qwen.encode_video(inputs["pixel_values"], grid_thw)
    expected = reference.get_video_features(inputs["pixel_values"], grid_thw).pooler_output
    assert relative_error(visual, torch.cat(expected)) < 1e-5

    positions = qwen.position_ids(input_ids, grid_thw, inputs["attention_mask"])
    token_types = 2 * (input_ids == config.video_token_id).int()
    expected, _ = reference.get_rope_index(
        input_ids, token_types, None, grid_thw, attention_mask=inputs["attention_mask"]
    )
    assert torch.equal(positions, expected)

    hidden = qwen(**inputs)
    expected = peers.hidden_states(reference, config, **inputs)
    assert hidden.isfinite().all()
    assert relative_error(hidden[real], expected[real]) < 1e-5
    if len(grids) == 1:  # without a mask the attention takes another path
        assert relative_error(qwen(**inputs | {"attention_mask": None}), hidden) < 1e-5


@torch.no_grad()
def test_bf16_matches_transformers(pair: tuple, config: QwenConfig) -> None:
    """In bf16 hidden states agree to 2e-2; ours are nearer to float32 than transformers' are."""
    qwen, reference = pair
    for parameter in reference.parameters():  # weights of a usual size: large ones amplify rounding
        parameter.mul_(0.3 if parameter.ndim > 1 else 1)
    load_from(reference, qwen)
    inputs = make_inputs([[1, 4, 6], [2, 4, 8]], config)
    real = inputs["attention_mask"].bool()
    exact = peers.hidden_states(reference, config, **inputs)[real]
    expected = peers.hidden_states(reference.bfloat16(), config, **inputs)[real]
    hidden = qwen.bfloat16()(**inputs)[real]
    assert hidden.dtype == torch.bfloat16
    assert relative_error(hidden.float(), expected.float()) < 2e-2
    assert (hidden.float() - exact).norm() < 0.9 * (expected.float() - exact).norm()


@torch.no_grad()
def test_padding_is_finite_under_any_attention_kernel(
    pair: tuple, config: QwenConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain softmax makes NaN of a row that may look nowhere; no row of ours is NaN under it."""

    def plain(q, k, v, attn_mask=None, is_causal=False):
        if attn_mask is None:
            return v
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return scores.masked_fill(~attn_mask, -torch.inf).softmax(-1) @ v

    qwen, _ = pair
    inputs = make_inputs([[1, 4, 6], [2, 4, 8]], config)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    assert qwen(**inputs).isfinite().all()


def test_positions_step_by_two_for_each_pair_of_frames(config: QwenConfig) -> None:
    """Two text tokens, a clip of 2 pairs and 1 x 3 visual tokens, two text tokens, by hand."""
    with torch.device("meta"):
        qwen = Qwen2_5_VL(config)
    row = torch.tensor([[7, 8] + [config.video_token_id] * 6 + [9, 9]])
    time, rows, columns = qwen.position_ids(row, torch.tensor([[2, 2, 6]]))[:, 0].tolist()
    assert time == [0, 1, 2, 2, 2, 4, 4, 4, 5, 6]  # the text goes on at 2 + max(1, 3)
    assert rows == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert columns == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]

    # Three pairs of one token each: time reaches 2 + 4; the text goes on behind it, not at 2 + 1.
    row = torch.tensor([[7, 8] + [config.video_token_id] * 3 + [9, 9]])
    time, _, _ = qwen.position_ids(row, torch.tensor([[3, 2, 2]]))[:, 0].tolist()
    assert time == [0, 1, 2, 4, 6, 7, 8]


# --- LoRA -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_lora_matches_peft(pair: tuple, config: QwenConfig) -> None:
    """LoRA starts without effect, computes what PEFT does, and can be merged as PEFT does."""
    qwen, reference = pair
    inputs = make_inputs([[2, 8, 12]], config)
    keys, base = set(qwen.state_dict()), qwen(**inputs)
    add_lora(qwen, rank=4, alpha=6.0)
    assert torch.equal(qwen(**inputs), base)
    assert keys < set(qwen.state_dict())  # the hub's names are still there

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    peft = get_peft_model(reference, LoraConfig(r=4, lora_alpha=6, target_modules=targets)).eval()
    lora = {name: p for name, p in peft.named_parameters() if "lora_" in name}
    assert len(lora) == 2 * 4 * config.num_hidden_layers
    ours = dict(qwen.named_parameters())
    for name, parameter in lora.items():
        torch.nn.init.normal_(parameter, std=0.3)
        name = name.replace("base_model.model.language_model", "model")
        name = name.replace(".default.weight", "")
        assert ours[name].shape == parameter.shape
        ours[name].copy_(parameter)
    expected = peers.hidden_states(peft.base_model.model, config, **inputs)
    assert relative_error(base, expected) > 0.1  # the LoRA matters
    assert relative_error(qwen(**inputs), expected) < 1e-5

    merge_lora(qwen)
    assert set(qwen.state_dict()) == keys
    assert type(qwen.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert relative_error(qwen(**inputs), expected) < 1e-5
    merged = peers.hidden_states(peft.merge_and_unload(), config, **inputs)
    assert relative_error(qwen(**inputs), merged) < 1e-5


def test_lora_can_be_built_on_the_meta_device(config: QwenConfig) -> None:
    """Shapes are PEFT's: A (rank, in), B (out, rank)."""
    with torch.device("meta"):
        qwen = Qwen2_5_VL(config)
        add_lora(qwen, rank=4, alpha=4.0)
    k_proj = qwen.model.layers[1].self_attn.k_proj
    assert k_proj.lora_A.is_meta
    assert k_proj.lora_A.shape == (4, 64)
    assert k_proj.lora_B.shape == (32, 4)
