"""The two presets against the public checkpoints, initial weights, and batches of clips."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import make_clip, randomise, relative_error, residual_stream, tiny_model

import convert
import rvedit
import weights

MANIFESTS = Path(__file__).parent / "manifests"
FULL = rvedit.preset("wan2.2-ti2v-5b")


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch():
    """Three clips of different sizes and instructions of different lengths, together and one by
    one.
    """
    model, _ = tiny_model()
    clips = [make_clip(5, 32, 48), make_clip(2, 64, 32), make_clip(9, 48, 48)]
    texts = ["remove it", "make the small red circle in the corner green", "add snow"]
    z_t, source, t = *torch.randn(2, 3, model.config.dit.in_channels, 2, 4, 4), torch.rand(3)
    together = model.dit(z_t, t, model.contexts(model.encoder(clips, texts)), source)
    for i in range(3):
        contexts = model.contexts(model.encoder(clips[i : i + 1], texts[i : i + 1]))
        alone = model.dit(z_t[i : i + 1], t[i : i + 1], contexts, source[i : i + 1])
        assert relative_error(together[i : i + 1], alone) < 1e-5


def stored(manifest, part=None):
    """A manifest as if its file had been opened: names and shapes, and nothing to read."""
    content = json.loads((MANIFESTS / manifest).read_text())
    content = content[part] if part else content
    return {
        key: weights.Stored(Path(manifest), tuple(entry["shape"]), None)
        for key, entry in content.items()
    }


def full_size(**changes):
    config = dataclasses.replace(FULL, **changes)
    with torch.device("meta"):
        return rvedit.RVEDiT(config), rvedit.WanVAE(config.vae)


def wan_and_qwen(layout):
    transformer = stored(f"wan2.2_ti2v_5b_transformer_{layout}.json")
    qwen = stored("qwen2.5_vl_3b_hub.json")
    return convert.renamed(transformer, convert.wan_transformer_key, "dit.") | convert.renamed(
        qwen, convert.qwen_key, "encoder.qwen."
    )


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_full_preset_fits_wan_and_qwen(layout):
    """On the meta device it has every key and shape of the official files, and the numbers of
    parameters they have.
    """
    model, vae = full_size()
    may_lack = convert.NEW_TO_WAN_AND_QWEN
    fresh = weights.match(model, wan_and_qwen(layout), "manifest", may_lack)
    assert len(fresh) == 2 + 2 + 12 + 288  # source embedding, queries, connectors, LoRA
    vae_tensors = stored(f"wan2.2_vae_{layout}.json")
    ours = convert.renamed(vae_tensors, lambda key: convert.wan_vae_key(key, num_res_blocks=2))
    weights.match(vae, ours, "manifest")

    def count(module):
        return sum(p.numel() for p in module.parameters())

    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert (count(model.dit), count(vae)) == (4_978_354_368, 704_688_668)
    assert count(model.encoder.qwen) - lora == 3_754_622_976


def test_the_full_preset_fits_kiwi_edits_release():
    """All but the LoRA, which the release has merged into its Qwen."""
    model, vae = full_size(num_image_tokens=256)
    tensors = convert.kiwi_release_names(
        transformer=stored("kiwi_edit_5b_diffusers.json", "transformer"),
        source_embedder=stored("kiwi_edit_5b_diffusers.json", "source_embedder"),
        mllm_encoder=stored("kiwi_edit_5b_diffusers.json", "mllm_encoder"),
    )
    tensors = convert.with_native_connectors(tensors)
    fresh = weights.match(model, tensors, "manifest", convert.LORA)
    assert len(fresh) == 288 and all("lora_" in name for name in fresh)
    weights.match(vae, stored("kiwi_edit_5b_diffusers.json", "vae"), "manifest")


@pytest.mark.parametrize("stage", ["stage2_image_video", "stage3_reference"])
def test_the_full_preset_fits_kiwi_edits_training_states(stage):
    """Laid over Wan and Qwen, they fill everything."""
    model, _ = full_size(num_image_tokens=256)
    trained = stored("kiwi_edit_5b_training.json", stage)
    tensors = wan_and_qwen("original") | convert.renamed(trained, convert.kiwi_training_key)
    assert weights.match(model, convert.with_native_connectors(tensors), "manifest") == []


def test_the_full_preset_fits_kiwi_edits_first_stage():
    """It knows stills alone: the source embedding and the queries for clips are missing."""
    model, _ = full_size(num_image_tokens=256)
    trained = stored("kiwi_edit_5b_training.json", "stage1_image")
    tensors = wan_and_qwen("original") | convert.renamed(trained, convert.kiwi_training_key)
    may_lack = f"{convert.SOURCE_EMBEDDING}|^encoder.queries$"
    tensors = convert.with_native_connectors(tensors)
    fresh = weights.match(model, tensors, "manifest", may_lack)
    assert len(fresh) == 2 + 1


@pytest.mark.parametrize("name", ["toy", "wan2.2-ti2v-5b"])
def test_a_config_survives_json(name):
    config = rvedit.preset(name)
    assert rvedit.RVEDiTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_native_connectors_are_trained_only_if_some_block_reads_native_tokens():
    """Not with L_s = L, the paper's "w/o GRTC"."""
    assert FULL.native_trained
    assert dataclasses.replace(FULL, routing_depth=0).native_trained
    assert not dataclasses.replace(FULL, routing_depth=30).native_trained


def test_unknown_presets_and_depths_are_refused():
    with pytest.raises(ValueError, match="'wan2.2-ti2v-5b' and 'toy'"):
        rvedit.preset("14b")
    with pytest.raises(ValueError, match="routing depth 31 is not between 0 and the 30 blocks"):
        dataclasses.replace(FULL, routing_depth=31)


def test_initial_weights_depend_on_seed_and_name_alone():
    """Drawing some parameters or all, in this order or that, gives the same values; another seed
    others.
    """
    first, second = (rvedit.WanDiT(tiny_model()[0].config.dit) for _ in range(2))
    names = [name for name, _ in first.named_parameters()]
    rvedit.initialise(first, seed=3)
    randomise(second)
    rvedit.initialise(second, seed=3, names=reversed(names))
    for name, p in first.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name
    rvedit.initialise(second, seed=4)
    assert not torch.equal(first.blocks[0].ffn[0].weight, second.blocks[0].ffn[0].weight)


def test_initial_weights_do_not_depend_on_the_default_dtype():
    first, second = (rvedit.WanDiT(tiny_model()[0].config.dit) for _ in range(2))
    rvedit.initialise(first)
    torch.set_default_dtype(torch.bfloat16)
    try:
        rvedit.initialise(second)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True)
    )


@torch.no_grad()
def test_initial_weights_keep_activations_in_scale_and_new_parts_silent():
    """Streams neither vanish nor explode; the velocity is zero; what is new beside trained weights
    adds nothing.
    """
    model, _ = tiny_model()
    rvedit.initialise(model)
    inputs = [make_clip(5, 32, 32)], ["add snow"]
    condition = model.encoder(*inputs)
    for stream in (*condition[:3], residual_stream(model, condition, 1)[-1]):
        assert 0.1 < stream.std() < 10
    z_t = torch.randn(1, model.config.dit.in_channels, 2, 4, 4)
    assert torch.equal(
        model.dit(z_t, torch.ones(1), model.contexts(condition)), torch.zeros_like(z_t)
    )
    new = [name for name in model.state_dict() if re.search(convert.NEW_TO_WAN_AND_QWEN, name)]
    rvedit.initialise(model, names=new)
    assert not any(
        stream.any() for stream in (*model.encoder(*inputs)[:3], model.dit.source_embedding(z_t))
    )
