"""Every layout of checkpoint that the README lists loads, and damaged ones are refused.

They are written here at toy size. The writers do not use the rules of `convert.py`: they have
tables of names of their own, and the manifests show that these are the names of the releases.
"""

import copy
import ctypes
import dataclasses
import functools
import gc
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import weakref
from pathlib import Path

import peers
import pytest
import torch
from helpers import make_clip, merge_lora, randomise, relative_error, tiny_config, tiny_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import cli
import rvedit
import weights
from mllm import chat_ids

MANIFESTS = Path(__file__).parent / "manifests"
STEM = "diffusion_pytorch_model"
OURS, WAN = "ours/model-00001-of-00001.safetensors", f"wan/{STEM}-00002-of-00003.safetensors"
INDEX, KIWI = f"wan/{STEM}.safetensors.index.json", f"kiwi/transformer/{STEM}.safetensors"
TRAINING, VAE, CONFIG = "training.safetensors", "wan/Wan2.2_VAE.pth", "ours/config.json"
FULL = rvedit.preset("wan2.2-ti2v-5b")


# --- Writers of the public layouts ----------------------------------------------------------------

TRANSFORMER = {  # original -> Diffusers
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn")):
    TRANSFORMER |= {f"{ours}.{x}": f"{theirs}.to_{x}" for x in "qkv"} | {
        f"{ours}.o": f"{theirs}.to_out.0"
    }
    TRANSFORMER |= {f"{ours}.norm_{x}": f"{theirs}.norm_{x}" for x in "qk"}

RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
}
RESIDUAL |= {"shortcut": "conv_shortcut"}


def diffusers_transformer_name(key):
    block, layer, suffix = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", key).groups(
        default=""
    )
    return block + TRANSFORMER.get(layer, layer) + suffix


def diffusers_vae_name(key):
    side, part, *rest = key.split(".")
    if side in ("conv1", "conv2"):
        return f"{'post_' * (side == 'conv2')}quant_conv.{part}"
    if part == "conv1":
        return ".".join([side, "conv_in", *rest])
    if part == "head":
        return ".".join([side, {"0": "norm_out", "2": "conv_out"}[rest[0]], *rest[1:]])
    if part == "middle":
        place = f"mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[int(rest.pop(0))]}"
    else:
        stage, _, number = rest[:3]
        rest = rest[3:]
        way, blocks = ("down", 2) if side == "encoder" else ("up", 3)
        place = f"{way}_blocks.{stage}.resnets.{number}"
        if int(number) == blocks:
            place = f"{way}_blocks.{stage}.{way}sampler"
    layer, suffix = ".".join(rest[:-1]), rest[-1]
    return f"{side}.{place}.{RESIDUAL.get(layer, layer)}.{suffix}"


def write(folder, stem, tensors, shards=1):
    """One safetensors file, or several over which the tensors are dealt out, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        names = [f"{stem}.safetensors"]
    keys = list(tensors)
    for i, name in enumerate(names):
        save_file(
            {key: tensors[key].contiguous() for key in keys[i::shards]},
            folder / name,
            {"format": "pt"},
        )
    if shards > 1:
        index = {
            "metadata": {},
            "weight_map": {key: names[i % shards] for i, key in enumerate(keys)},
        }
        write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def transformer_tensors(model):
    """Wan's transformer under its original names: no source embedding, but a text embedding that we
    do not use.
    """
    state = {
        key: value
        for key, value in model.dit.state_dict().items()
        if not key.startswith("source_embedding.")
    }
    for layer, shape in (("0", (24, 16)), ("2", (24, 24))):
        state |= {
            f"text_embedding.{layer}.weight": torch.rand(shape),
            f"text_embedding.{layer}.bias": torch.rand(24),
        }
    return state


def qwen_tensors(model, newer=False):
    """Qwen under the hub's names, or under those that newer versions of transformers write."""
    state = {
        key: value for key, value in model.encoder.qwen.state_dict().items() if "lora_" not in key
    }
    if not newer:
        return state
    head = {
        "lm_head.weight": state["model.embed_tokens.weight"].clone()
    }  # tied, and stored all the same
    rename = {"visual": "model.visual", "model": "model.language_model"}
    return {
        rename[(part := key.split(".", 1))[0]] + "." + part[1]: value
        for key, value in state.items()
    } | head


def qwen_json(config, nested=False):
    vision = dataclasses.asdict(config.vision) | {
        "hidden_act": "silu",
        "in_chans": 3,
        "out_hidden_size": 24,
    }
    ids = {
        "model_type": "qwen2_5_vl",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_config": vision,
    }
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps"
    )
    text = {name: getattr(config, name) for name in names.split()}
    rotary = {"type": "mrope", "mrope_section": list(config.mrope_section)}
    if nested:
        return ids | {
            "text_config": text | {"rope_parameters": rotary | {"rope_theta": config.rope_theta}}
        }
    return (
        ids
        | text
        | {"rope_theta": config.rope_theta, "rope_scaling": rotary, "tie_word_embeddings": True}
    )


def write_qwen(folder, model, newer=False, nested=False):
    write(folder, "model", qwen_tensors(model, newer), shards=2)
    write_json(folder / "config.json", qwen_json(model.config.qwen, nested))
    (folder / "tokenizer.json").write_text(model.encoder.tokenizer.to_str())


def wan_json(config):
    """The original layout's config.json; Wan's own has exactly these fields."""
    content = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "model_type": "ti2v",
        "text_len": 512,
    }
    content |= {
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
    }
    content |= {"num_heads": config.num_heads, "num_layers": config.num_blocks}
    return content | {"in_dim": config.in_channels, "out_dim": config.out_channels}


def write_wan_original(folder, model, vae):
    write(folder, STEM, transformer_tensors(model), shards=3)
    write_json(folder / "config.json", wan_json(model.config.dit))
    torch.save(vae.state_dict(), folder / "Wan2.2_VAE.pth")


def write_transformer_folder(folder, model):
    write(
        folder,
        STEM,
        {
            diffusers_transformer_name(key): value
            for key, value in transformer_tensors(model).items()
        },
    )
    config = model.config.dit
    content = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": config.num_heads,
        "eps": config.eps,
    }
    content |= {
        "attention_head_dim": config.dim // config.num_heads,
        "num_layers": config.num_blocks,
    }
    write_json(folder / "config.json", content)


def vae_json(config):
    names = "z_dim dim_mult num_res_blocks latents_mean latents_std".split()
    content = {name: getattr(config, name) for name in names}
    return content | {
        "temperal_downsample": config.temporal_downsample,
        "attn_scales": [],
        "dropout": 0.0,
    }


def write_wan_diffusers(folder, model, vae):
    write_transformer_folder(folder / "transformer", model)
    write(
        folder / "vae",
        STEM,
        {diffusers_vae_name(key): value for key, value in vae.state_dict().items()},
        shards=2,
    )
    config = {
        "base_dim": vae.config.dim,
        "decoder_base_dim": vae.config.dec_dim,
        "patch_size": 2,
        "clip_output": False,
    }
    write_json(folder / "vae" / "config.json", vae_json(vae.config) | config)


def kiwi_connector(model, name):
    return {
        f"{name}.{key}": value.clone()
        for key, value in model.encoder.editing_connector.state_dict().items()
    }


def write_kiwi(folder, model, vae, reference=None):
    """Kiwi-Edit's release of a model without LoRA. reference: None, "zeros" in ref_embedder, or
    "trained".
    """
    write_transformer_folder(folder / "transformer", model)
    write(folder / "vae", STEM, vae.state_dict())
    write_json(
        folder / "vae" / "config.json",
        vae_json(vae.config) | {"_class_name": "VAE", "dim": vae.config.dim},
    )
    write(folder / "source_embedder", STEM, source := embedder_tensors(model))
    custom = {
        "image_queries": model.encoder.image_queries.detach(),
        "video_queries": model.encoder.queries.detach(),
    }
    custom |= kiwi_connector(model, "connector")
    if reference == "trained":
        custom |= {"ref_queries": torch.rand(7, 24)} | kiwi_connector(model, "ref_connector")
    write(folder / "mllm_encoder", STEM, custom)
    write(
        folder / "mllm_encoder", "model", qwen_tensors(model, newer=reference == "zeros"), shards=2
    )
    write_json(
        folder / "mllm_encoder" / "config.json",
        {"max_frames": 4, "max_pixels_per_frame": 400**2, "dit_dim": 24},
    )
    write_json(folder / "ref_embedder" / "config.json", {"_class_name": "ConditionalEmbedder"})
    if reference:
        write(
            folder / "ref_embedder",
            STEM,
            {key: torch.zeros_like(value) for key, value in source.items()},
        )
    write_json(folder / "processor" / "qwen_config.json", qwen_json(model.config.qwen, nested=True))
    (folder / "processor" / "tokenizer.json").write_text(model.encoder.tokenizer.to_str())


def embedder_tensors(model):
    return {
        f"patch_embedding.{key}": value.clone()
        for key, value in model.dit.source_embedding.state_dict().items()
    }


def kiwi_training_tensors(model, reference=False):
    """What Kiwi-Edit's training script saves: the parameters that it trained."""
    state = {f"dit.{key}": value for key, value in transformer_tensors(model).items()}
    for key, value in model.encoder.qwen.model.state_dict().items():
        if "lora_" in key:
            state[f"mllm.model.model.language_model.{key}.default.weight"] = value
    state |= {
        "mllm.image_queries.q": model.encoder.image_queries.detach(),
        "mllm.video_queries.q": model.encoder.queries.detach(),
    }
    state |= kiwi_connector(model, "mllm.connetor")
    state |= {f"vae_condition.{key}": value for key, value in embedder_tensors(model).items()}
    if reference:
        state |= {"mllm.ref_queries.q": torch.rand(7, 24)} | kiwi_connector(
            model, "mllm.ref_connector"
        )
        state |= {
            f"ref_vae_condition.{key}": value for key, value in embedder_tensors(model).items()
        }
    return state


# --- The model that is written, and what it computes ----------------------------------------------


@functools.cache
def original():
    """A random model whose VAE has the full preset's structure, as Wan2.2_VAE.pth has no config to
    say another.
    """
    config = tiny_config()
    dit = dataclasses.replace(config.dit, in_channels=48, out_channels=48)
    return tiny_model(dit=dit, vae=dataclasses.replace(FULL.vae, dim=4, dec_dim=8))


@functools.cache
def merged():
    """The same with its LoRA merged and its editing connector in all three places: as Kiwi-Edit
    releases it.
    """
    model, vae = copy.deepcopy(original())
    merge_lora(model.encoder.qwen)
    return share_connector(model), vae


def share_connector(model):
    for connector in (model.encoder.visual_connector, model.encoder.textual_connector):
        connector.load_state_dict(model.encoder.editing_connector.state_dict())
    return model


@torch.no_grad()
def outputs(model, vae, depth=1):
    """The velocity, the three streams and a clip's latents and reconstruction, all of the same
    inputs.
    """
    condition = model.encoder.encode(
        original()[0].encoder.prepare([make_clip(5, 32, 32)], ["make it snow"])
    )
    generator = torch.Generator().manual_seed(5)
    z_t, source = torch.randn(2, 1, model.config.dit.in_channels, 2, 4, 4, generator=generator)
    model.config = dataclasses.replace(model.config, routing_depth=depth)
    velocity = model.dit(z_t, torch.tensor([0.7]), model.contexts(condition), source)
    video = torch.rand(1, 3, 5, 32, 32, generator=generator) * 2 - 1
    latents = vae.encode(video)
    return [velocity, *condition[:3], latents, vae.decode(latents)]


def assert_same(loaded, written, depth=1):
    for actual, expected in zip(outputs(*loaded, depth), outputs(*written, depth), strict=True):
        assert torch.equal(actual, expected)
        assert expected.std() > 1e-3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder or file of each layout; tests that damage one copy it first."""
    root = tmp_path_factory.mktemp("layouts")
    rvedit.save(root / "ours", *original())
    write_wan_original(root / "wan", *original())
    write_wan_diffusers(root / "wan_diffusers", *original())
    write_qwen(root / "qwen", original()[0])
    write_kiwi(root / "kiwi", *merged())
    save_file(kiwi_training_tensors(original()[0]), root / "training.safetensors")
    return root


def strip(keys):
    """Names without the numbers of blocks and layers, which a small model has fewer of."""
    return {re.sub(r"(blocks|layers)\.\d+\.", r"\1.#.", key) for key in keys}


def test_the_writers_know_the_layouts(folders, tmp_path):
    """The names in each written file are those that the manifests list for the release."""

    def manifest(name, part=None):
        content = json.loads((MANIFESTS / f"{name}.json").read_text())
        return strip(content[part] if part else content)

    def written(folder, stem=STEM):
        return strip(key for path in folder.glob(f"{stem}*.safetensors") for key in load_file(path))

    assert written(folders / "wan") == manifest("wan2.2_ti2v_5b_transformer_original")
    assert strip(torch.load(folders / "wan/Wan2.2_VAE.pth")) == manifest("wan2.2_vae_original")
    assert written(folders / "wan_diffusers/transformer") == manifest(
        "wan2.2_ti2v_5b_transformer_diffusers"
    )
    vae = {
        key
        for path in (folders / "wan_diffusers/vae").glob("*.safetensors")
        for key in load_file(path)
    }
    assert vae == json.loads((MANIFESTS / "wan2.2_vae_diffusers.json").read_text()).keys()
    assert written(folders / "qwen", "model") == manifest("qwen2.5_vl_3b_hub")
    for part in ("transformer", "vae", "source_embedder", "ref_embedder", "mllm_encoder"):
        names = written(folders / "kiwi" / part) | written(folders / "kiwi" / part, "model")
        assert names == manifest("kiwi_edit_5b_diffusers", part), part
    for part, reference in (("stage2_image_video", False), ("stage3_reference", True)):
        names = strip(kiwi_training_tensors(original()[0], reference))
        assert names == manifest("kiwi_edit_5b_training", part)


# --- Our own checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [5_000_000_000, 30_000])
def test_our_checkpoint_gives_back_the_model(tmp_path, monkeypatch, limit):
    """In one shard or many: the same outputs, configuration and tokenizer, and files that
    safetensors alone reads.
    """
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", limit)
    model, vae = original()
    rvedit.save(tmp_path / "new" / "ours", model, vae)
    folder = tmp_path / "new" / "ours"
    assert_same(loaded := rvedit.load(folder), (model, vae))
    assert loaded[0].config == model.config and loaded[1].config == vae.config
    assert loaded[0].encoder.tokenizer.to_str() == model.encoder.tokenizer.to_str()
    assert not loaded[0].training and not any(p.requires_grad for p in loaded[1].parameters())
    assert all(p.requires_grad for p in loaded[0].parameters())

    expected = model.state_dict() | {f"vae.{key}": value for key, value in vae.state_dict().items()}
    index, found = (
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"],
        {},
    )
    shards = sorted(folder.glob("*.safetensors"))
    for path in shards:
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
        assert all(index[key] == path.name for key in tensors)
        found |= tensors
    assert found.keys() == expected.keys() == index.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert (len(shards) == 1) == (limit > 30_000)
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    names = {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        *(path.name for path in shards),
    }
    assert {path.name for path in folder.iterdir()} == names


def test_saving_what_was_loaded_gives_the_same_files(folders, tmp_path):
    rvedit.save(tmp_path / "again", *rvedit.load(folders / "ours"))
    for path in (folders / "ours").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_comes_from_a_release_is_saved_as_ours(folders, tmp_path):
    """Kiwi-Edit's release, loaded, saved and loaded again, is the same model."""
    rvedit.save(tmp_path / "ours", *rvedit.load(folders / "kiwi"))
    assert_same(loaded := rvedit.load(tmp_path / "ours"), merged(), depth=3)
    assert loaded[0].config.lora_rank == 64 and loaded[0].config.routing_depth == 3


# --- Wan and Qwen ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("wan", ["wan", "wan_diffusers"])
@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_wan_and_qwen_are_a_start_for_training(folders, tmp_path, wan, newer, nested):
    """The networks are those that were written; what is new is reproducible and changes nothing
    yet.
    """
    model, vae = copy.deepcopy(original())
    write_qwen(tmp_path / "qwen", model, newer, nested)
    loaded, loaded_vae = rvedit.load(wan=folders / wan, qwen=tmp_path / "qwen")
    assert loaded.config.vae == vae.config and loaded.config.dit == model.config.dit
    assert loaded.config.qwen == model.config.qwen
    assert (
        loaded.config.routing_depth,
        loaded.config.num_editing_tokens,
        loaded.config.lora_rank,
    ) == (1, 512, 64)
    assert loaded.encoder.tokenizer.to_str() == model.encoder.tokenizer.to_str()

    again, _ = rvedit.load(wan=str(folders / wan), qwen=str(tmp_path / "qwen"))
    for (name, first), second in zip(loaded.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second), name
        fresh = re.search(r"source_embedding|queries|connector|lora_", name)
        zero = re.search(r"source_embedding|connector.*bias|connector.2|lora_B", name)
        assert bool(first.any()) != bool(zero), name
        if not fresh:
            assert torch.equal(first, model.get_parameter(name)), name

    for name, parameter in model.encoder.qwen.named_parameters():
        if "lora_" in name:
            parameter.zero_()
    inputs = model.encoder.prepare([make_clip(5, 32, 32)], ["make it snow"])
    hidden = [
        m.encoder.qwen(*inputs[:3], model.encoder.queries, inputs[3]) for m in (loaded, model)
    ]
    assert torch.equal(*hidden)
    torch.manual_seed(0)
    z_t, source, context = *torch.randn(2, 1, 48, 2, 4, 4), torch.randn(1, 5, 24)
    without_source = model.dit(z_t, torch.tensor([0.4]), [context] * 3)
    assert torch.equal(loaded.dit(z_t, torch.tensor([0.4]), [context] * 3, source), without_source)
    video = torch.rand(1, 3, 5, 32, 32)
    assert torch.equal(latents := loaded_vae.encode(video), vae.encode(video))
    assert torch.equal(loaded_vae.decode(latents), vae.decode(latents))


@torch.no_grad()
def test_what_diffusers_and_transformers_save_loads(tmp_path):
    """Their modules, saved by themselves, give what ours give with the weights so loaded."""
    model, vae = original()
    transformer, autoencoder = peers.wan_transformer(model.dit), peers.wan_vae(vae)
    statistics = {name: getattr(vae.config, name) for name in ("latents_mean", "latents_std")}
    autoencoder.register_to_config(**statistics)
    qwen = peers.qwen2_5_vl(model.encoder.qwen)
    transformer.save_pretrained(tmp_path / "wan/transformer", max_shard_size="50KB")
    autoencoder.save_pretrained(tmp_path / "wan/vae")
    qwen.save_pretrained(tmp_path / "qwen")
    (tmp_path / "qwen/tokenizer.json").write_text(model.encoder.tokenizer.to_str())
    assert len([*(tmp_path / "wan/transformer").glob("*.safetensors")]) > 1
    loaded, loaded_vae = rvedit.load(wan=tmp_path / "wan", qwen=tmp_path / "qwen")
    assert loaded.config.dit == model.config.dit and loaded.config.qwen == model.config.qwen

    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(1, 48, 2, 4, 4, generator=generator)
    context = torch.randn(1, 5, 24, generator=generator)
    expected = transformer(z_t, torch.tensor([400.0]), context, return_dict=False)[0]
    velocity = loaded.dit(z_t, torch.tensor([0.4]), [context] * 3)
    assert relative_error(velocity, expected) < 1e-5
    video = torch.rand(1, 3, 5, 32, 32, generator=generator) * 2 - 1
    latents = loaded_vae.encode(video)
    assert relative_error(latents, peers.encode(autoencoder, loaded_vae.config, video)) < 1e-5
    frames = peers.decode(autoencoder, loaded_vae.config, latents)
    assert relative_error(loaded_vae.decode(latents), frames) < 1e-5
    inputs = model.encoder.prepare([make_clip(5, 32, 32)], ["make it snow"])
    inputs = [*inputs[:3], model.encoder.queries, inputs[3]]
    expected = peers.hidden_states(qwen, model.config.qwen, *inputs)
    assert relative_error(loaded.encoder.qwen(*inputs), expected) < 1e-5


# --- Kiwi-Edit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [None, "zeros", "trained"])
def test_kiwi_edits_release_loads(tmp_path, reference):
    """With L_s = L, its connector in all three places, a LoRA without effect, and without its
    reference path.
    """
    write_kiwi(tmp_path / "kiwi", *merged(), reference)
    assert rvedit.layout(tmp_path / "kiwi") == "kiwi-edit"
    model, vae = rvedit.load(tmp_path / "kiwi")
    assert_same((model, vae), merged())
    assert_same((model, vae), merged(), depth=3)
    assert model.config.routing_depth == model.config.dit.num_blocks == 3
    assert (model.config.num_editing_tokens, model.config.lora_rank) == (5, 64)
    assert (model.config.max_mllm_frames, model.config.max_mllm_pixels) == (4, 400**2)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("lora_B"))
    unmerged = share_connector(copy.deepcopy(original()[0])), vae
    for actual, expected in zip(outputs(model, vae, 3), outputs(*unmerged, 3), strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("wan", ["wan", "wan_diffusers"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kiwi_edits_training_state_lies_over_wan_and_qwen(folders, tmp_path, wan, suffix, dtype):
    """What it trained replaces Wan's own, unmerged LoRA included; Qwen and the VAE are those of the
    folders.
    """
    model, vae = share_connector(copy.deepcopy(original()[0])), original()[1]
    randomise(model.dit, seed=7)  # so that it is not what lies under it
    state = {
        key: value.to(dtype)
        for key, value in kiwi_training_tensors(model, suffix == ".pth").items()
    }
    path = tmp_path / f"step-100{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = rvedit.load(path, folders / wan, folders / "qwen")
    config = loaded[0].config
    assert (config.routing_depth, config.num_editing_tokens, config.lora_rank) == (3, 5, 2)

    for name, parameter in model.named_parameters():  # in bf16, its rounded values
        if name.startswith("dit.") or re.search("lora_|queries|connector", name):
            parameter.data = parameter.data.to(dtype).float()
    assert_same(loaded, (model, vae), depth=3)
    assert_same(loaded, (model, vae))


def over_wan_and_qwen(folders, path, state):
    """The model and the VAE of a training state that is written to `path`."""
    save_file(state, path)
    return rvedit.load(path, folders / "wan", folders / "qwen")


FORMS = {  # how a key may stand in a training state, from how Kiwi-Edit's script writes it
    "the whole pipeline's": lambda key: f"pipe.{key}",
    "without the DiT's name": lambda key: key.removeprefix("dit."),
    "the pipeline's, without the DiT's": lambda key: f"pipe.{key}".removeprefix("pipe.dit."),
    "LoRA without an adapter": lambda key: key.replace(".default.weight", ".weight"),
    "their connector in its right spelling": lambda key: key.replace("connetor", "connector"),
}


@pytest.mark.parametrize("form", FORMS)
def test_training_states_have_their_keys_in_many_forms(folders, tmp_path, form):
    state = kiwi_training_tensors(original()[0])
    renamed = {FORMS[form](key): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    expected = over_wan_and_qwen(folders, tmp_path / "usual.safetensors", state)
    loaded = over_wan_and_qwen(folders, tmp_path / "other.safetensors", renamed)
    assert loaded[0].config == expected[0].config
    assert_same(loaded, expected, depth=3)


def test_a_training_state_without_lora_gets_a_new_one(folders, tmp_path):
    """Which has no effect yet."""
    state = kiwi_training_tensors(original()[0])
    without = {key: value for key, value in state.items() if "lora_" not in key}
    model, _ = over_wan_and_qwen(folders, tmp_path / "state.safetensors", without)
    assert model.config.lora_rank == 64
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("lora_B"))
    assert torch.equal(model.encoder.queries, original()[0].encoder.queries)


def test_half_a_lora_is_refused(folders, tmp_path):
    state = kiwi_training_tensors(original()[0])
    half = {key: value for key, value in state.items() if "layers.1.self_attn.o_proj" not in key}
    save_file(half, tmp_path / "half.safetensors")
    arguments = dict(wan=folders / "wan", qwen=folders / "qwen")
    refused(
        "2 missing .*layers.1.self_attn.o_proj", path=tmp_path / "half.safetensors", **arguments
    )


@pytest.mark.parametrize("dropped", [r"dit\.blocks\.0\.", r"dit\.", r"dit\.head\.modulation"])
def test_a_part_of_a_training_state_is_refused(folders, tmp_path, dropped):
    """One shard of several: Wan's own tensors do not stand in for what it lacks."""
    state = kiwi_training_tensors(original()[0])
    part = {key: value for key, value in state.items() if not re.match(dropped, key)}
    save_file(part, tmp_path / "part.safetensors")
    arguments = dict(wan=folders / "wan", qwen=folders / "qwen")
    number = len([key for key in state if re.match(dropped, key) and "text_emb" not in key])
    refused(
        rf"part.safetensors lacks {number} of the DiT's tensors \({dropped}.*\): is it one shard",
        path=tmp_path / "part.safetensors",
        **arguments,
    )


@pytest.mark.parametrize("with_lora", [True, False])
def test_kiwi_edits_first_stage_is_a_start_for_training(folders, tmp_path, capsys, with_lora):
    """Connector and queries for stills alone: clips begin with these, and the DiT is Wan's."""
    model = original()[0]
    state = {
        key: value
        for key, value in kiwi_training_tensors(model).items()
        if not key.startswith(("dit.", "vae_condition.", "mllm.video_queries"))
        and (with_lora or "lora_" not in key)
    }
    loaded, _ = over_wan_and_qwen(folders, tmp_path / "stage1.safetensors", state)
    assert torch.equal(loaded.encoder.queries, model.encoder.image_queries)
    assert torch.equal(loaded.encoder.image_queries, model.encoder.image_queries)
    assert loaded.config.num_editing_tokens == 3
    assert torch.equal(loaded.dit.blocks[0].ffn[0].weight, model.dit.blocks[0].ffn[0].weight)
    assert not loaded.dit.source_embedding.weight.any()
    err = capsys.readouterr().err
    assert err.startswith("note: ") and "stage1.safetensors is of Kiwi-Edit's first stage" in err
    assert err.count("\n") == 1


OTHER_FILES = {  # what people have as one file, by a name in it
    "PEFT's LoRA": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "musubi-tuner's LoRA": "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "diffusers' LoRA": "transformer.blocks.0.attn1.to_q.lora_A.weight",
    "DiffSynth's LoRA": "blocks.0.self_attn.q.lora_A.default.weight",
    "ComfyUI's Wan": "model.diffusion_model.blocks.0.self_attn.q.weight",
    "a VAE": "decoder.conv1.weight",
    "nothing": None,
}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("parts", [{}, {"wan": "wan", "qwen": "qwen"}])
def test_what_is_no_training_state_is_refused_without_a_note(
    folders, tmp_path, capsys, kind, parts
):
    """At once, and not only when Wan and Qwen are there, which nobody should download for it."""
    key = OTHER_FILES[kind]
    save_file({key: torch.ones(2, 24)} if key else {}, tmp_path / "file.safetensors")
    refused(
        f"file.safetensors is no training state of Kiwi-Edit's, .* it holds {key or 'nothing'}$",
        path=tmp_path / "file.safetensors",
        **{name: folders / folder for name, folder in parts.items()},
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["release", "training state"])
def test_references_are_not_used_and_a_note_says_so(folders, tmp_path, capsys, what):
    if what == "release":
        write_kiwi(tmp_path / "kiwi", *merged(), reference="zeros")
        rvedit.load(tmp_path / "kiwi")
        assert capsys.readouterr().err == ""  # it was not trained with any
        write_kiwi(tmp_path / "kiwi", *merged(), reference="trained")
        rvedit.load(tmp_path / "kiwi")
    else:
        state = kiwi_training_tensors(original()[0], reference=True)
        over_wan_and_qwen(folders, tmp_path / "kiwi.safetensors", state)
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"note: .*kiwi.* was trained with reference images, which are not used here\n", err
    )


def test_timesteps_are_rounded_as_those_weights_saw_them(folders, tmp_path):
    """1000·t in bf16 for what comes from Kiwi-Edit, also after saving as ours; not for others."""
    kiwi = rvedit.load(folders / "kiwi")
    state = rvedit.load(folders / "training.safetensors", folders / "wan", folders / "qwen")
    start = rvedit.load(wan=folders / "wan", qwen=folders / "qwen")
    assert kiwi[0].config.dit.bf16_timestep
    assert state[0].config.dit.bf16_timestep
    assert not start[0].config.dit.bf16_timestep
    assert not rvedit.load()[0].config.dit.bf16_timestep
    rvedit.save(tmp_path / "ours", *kiwi)
    assert rvedit.load(tmp_path / "ours")[0].config.dit.bf16_timestep


def test_stills_have_queries_of_their_own(folders, tmp_path):
    """Kiwi-Edit's are loaded; a new training begins with those for clips; the toy has none."""
    kiwi = rvedit.load(folders / "kiwi")[0]
    assert kiwi.config.num_image_tokens == 3
    assert torch.equal(kiwi.encoder.image_queries, original()[0].encoder.image_queries)
    start = rvedit.load(wan=folders / "wan", qwen=folders / "qwen")[0]
    assert start.encoder.queries.any()
    assert torch.equal(start.encoder.image_queries, start.encoder.queries)
    assert rvedit.load()[0].encoder.image_queries is None  # it was saved before there were such


@pytest.mark.parametrize("layout", ["kiwi", "training"])
def test_queries_for_stills_may_be_missing(copied, layout):
    """Some conversions leave them out: stills then begin with the queries for clips."""
    names = {"kiwi": ("image_queries", f"kiwi/mllm_encoder/{STEM}.safetensors")}
    names["training"] = ("mllm.image_queries.q", TRAINING)
    key, file = names[layout]
    change_tensors(copied / file, lambda state: state.pop(key))
    encoder = rvedit.load(**places(copied, layout))[0].encoder
    assert torch.equal(encoder.image_queries, encoder.queries)


# --- How it is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ours", "kiwi", "start", "training"])
@pytest.mark.parametrize("device", ["cpu", "meta"] + ["cuda"] * torch.cuda.is_available())
def test_weights_come_in_the_wanted_dtypes_but_the_vae_encoder_in_float32(folders, layout, device):
    """On the wanted device too; in bf16 each weight is the float32 one, rounded."""
    wan, qwen = folders / "wan", folders / "qwen"
    places = {"ours": [folders / "ours"], "kiwi": [folders / "kiwi"], "start": [None, wan, qwen]}
    places["training"] = [folders / "training.safetensors", wan, qwen]
    expected, expected_vae = rvedit.load(*places[layout])
    bf16 = torch.bfloat16
    model, vae = rvedit.load(*places[layout], device=device, dtype=bf16, decoder_dtype=bf16)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, device)}
    for name, p in vae.named_parameters():
        dtype = torch.float32 if name.startswith(("encoder.", "conv1.")) else torch.bfloat16
        assert (p.dtype, p.device.type) == (dtype, device), name
        assert p.is_meta or torch.equal(p.cpu(), expected_vae.get_parameter(name).to(dtype)), name
    for name, p in model.named_parameters():
        assert p.is_meta or torch.equal(p.cpu(), expected.get_parameter(name).to(torch.bfloat16)), (
            name
        )
    assert not [*model.buffers(), *vae.buffers()]


def test_a_model_is_stored_in_its_dtypes(folders, tmp_path):
    """A bf16 model takes half the space, and comes back the same."""
    bf16 = dict(dtype=torch.bfloat16, decoder_dtype=torch.bfloat16)
    model, vae = rvedit.load(folders / "ours", **bf16)
    rvedit.save(tmp_path / "ours", model, vae)
    with safe_open(tmp_path / "ours/model-00001-of-00001.safetensors", framework="pt") as file:
        dtypes = {
            (re.match("vae.(encoder|conv1)", key) is None, file.get_slice(key).get_dtype())
            for key in file.keys()
        }
    assert dtypes == {(True, "BF16"), (False, "F32")}
    for again, part in zip(rvedit.load(tmp_path / "ours", **bf16), (model, vae), strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(again.parameters(), part.parameters(), strict=True)
        )


def test_sharding_comes_before_the_weights(folders):
    """`shard` sees the whole model on the meta device, and what it does to the model stays."""
    seen = []

    def shard(model):
        seen.extend(p.is_meta for p in model.parameters())
        model.dit.requires_grad_(False)

    model, _ = rvedit.load(folders / "ours", shard=shard)
    assert seen and all(seen)
    assert {p.requires_grad for p in model.dit.parameters()} == {False}


@pytest.mark.parametrize("layout", ["ours", "kiwi", "training"])
def test_one_tensor_at_a_time_is_in_memory(folders, monkeypatch, layout):
    """When a tensor of a safetensors file is read, the one before it is gone."""
    alive, most = weakref.WeakSet(), []
    opened = weights.open_file

    def counted(path):
        def read(tensor):
            gc.collect(0)
            alive.add(value := tensor.read())
            most.append(len(alive))
            return value

        if path.suffix == ".pth":  # mapped, not read
            return opened(path)
        return {
            key: tensor._replace(read=lambda t=tensor: read(t))
            for key, tensor in opened(path).items()
        }

    monkeypatch.setattr(weights, "open_file", counted)
    parts = [folders / "wan", folders / "qwen"] if layout == "training" else []
    rvedit.load(folders / ("training.safetensors" if layout == "training" else layout), *parts)
    assert len(most) > 100 and max(most) == 1


def private_bytes():
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's account of this process's memory"
)
@pytest.mark.parametrize("kind", ["ours", "wan", "training"])
def test_loading_takes_the_memory_of_the_model(tmp_path, monkeypatch, kind):
    """90 MB of weights: at no time in loading has the process grown by more than the model and its
    largest tensor.
    """
    small = original()[0].config
    config = dataclasses.replace(
        small, dit=dataclasses.replace(small.dit, dim=768, ffn_dim=2048, num_blocks=2)
    )
    model, vae = rvedit.RVEDiT(config, original()[0].encoder.tokenizer), original()[1]
    if kind == "ours":
        rvedit.save(tmp_path / "large", model, vae)
        places = {"path": tmp_path / "large"}
    else:
        write_wan_original(tmp_path / "wan", model, vae)
        write_qwen(tmp_path / "qwen", model)
        places = {"wan": tmp_path / "wan", "qwen": tmp_path / "qwen"}
        if kind == "training":
            torch.save(
                kiwi_training_tensors(model), places.setdefault("path", tmp_path / "training.pth")
            )
    del model, vae
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(
        0
    )  # or glibc keeps what the model had, and uses it again
    grown, assign, before = [], weights.assign, private_bytes()

    def watched(parameter, value):
        assign(parameter, value)
        grown.append(private_bytes() - before)

    monkeypatch.setattr(weights, "assign", watched)
    sizes = [p.nbytes for p in rvedit.load(**places)[0].parameters()]
    assert sum(sizes) > 85e6 and max(grown) > 0.8 * sum(sizes)  # so it is seen
    assert max(grown) < sum(sizes) + max(sizes) + 3e6


# --- Writing over a former checkpoint -------------------------------------------------------------


def changed(seed):
    model, vae = copy.deepcopy(original())
    return randomise(model, seed), vae


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_saving_replaces_a_former_checkpoint(tmp_path, monkeypatch):
    """By the whole of the new one: no shard of the former, and nothing beside it, is left."""
    with monkeypatch.context() as patch:
        patch.setattr(weights, "MAX_SHARD_BYTES", 30_000)
        rvedit.save(tmp_path / "ours", *original())
    rvedit.save(tmp_path / "ours", *(new := changed(1)))
    assert names(tmp_path) == ["ours"] and len(names(tmp_path / "ours")) == 4
    assert_same(rvedit.load(tmp_path / "ours"), new)


@pytest.mark.parametrize("failing", ["save_file", "write_text", "first rename", "second rename"])
@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_former_checkpoint(tmp_path, monkeypatch, failing, error):
    """Wherever it fails, the former checkpoint is in its place, unchanged, and nothing is beside
    it.
    """
    rvedit.save(tmp_path / "ours", *original())
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}

    rename = Path.rename
    moved = {
        "first rename": tmp_path / "ours",
        "second rename": tmp_path / f".partial-{os.getpid()}-ours",
    }

    def fail(*_, **__):
        raise error

    def rename_or_fail(self, target):
        if self == moved[failing]:
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        if failing == "save_file":
            patch.setattr(weights, "save_file", fail)
        elif failing == "write_text":
            patch.setattr(Path, "write_text", fail)
        else:
            patch.setattr(Path, "rename", rename_or_fail)
        with pytest.raises(type(error)):
            rvedit.save(tmp_path / "ours", *changed(1))
    assert names(tmp_path) == ["ours"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before


def test_a_full_disk_is_one_line_with_the_checkpoints_name(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="ours cannot be written: I/O error: No space left") as error:
        rvedit.save(tmp_path / "ours", *original())
    assert "partial" not in str(error.value)
    assert names(tmp_path) == []


def test_a_failed_first_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rvedit.save(tmp_path / "ours", *original())
    assert names(tmp_path) == []


def dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    partial = tmp_path / f".partial-{os.getppid()}-ours"
    partial.mkdir()
    rvedit.save(tmp_path / "ours", *original())
    assert names(tmp_path) == [partial.name, "ours"]


def test_saving_to_a_link_writes_where_it_leads(tmp_path):
    """Again and again, such as to a larger disk; the link stays, and nothing is left at either."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "ours").symlink_to(tmp_path / "disk" / "model")
    (tmp_path / "disk" / f".partial-{dead_process()}-model").mkdir()
    for seed in range(3):
        rvedit.save(tmp_path / "ours", *changed(seed))
        assert names(tmp_path) == ["disk", "ours"] and names(tmp_path / "disk") == ["model"]
        assert (tmp_path / "ours").is_symlink()
    assert_same(rvedit.load(tmp_path / "disk" / "model"), changed(2))
    (tmp_path / "text").symlink_to(tmp_path / "disk" / "text")
    cli.write_text(tmp_path / "text", "a")
    cli.write_text(tmp_path / "text", "b")
    assert (tmp_path / "text").is_symlink() and (tmp_path / "disk/text").read_text() == "b"


@pytest.mark.parametrize("killed", ["while writing", "between the renames", "behind the renames"])
def test_the_leavings_of_a_killed_run_are_cleaned_up(tmp_path, killed):
    """The next save removes them, and first puts back a former checkpoint that the killed run had
    moved aside.
    """
    if killed != "between the renames":
        rvedit.save(tmp_path / "ours", *original())
    if killed != "behind the renames":
        for process in (dead_process(), os.getpid(), 10**12):  # a container gives numbers again
            (tmp_path / f".partial-{process}-ours").mkdir()
            (tmp_path / f".partial-{process}-ours" / "1").write_bytes(b"half a shard")
    if killed != "while writing":
        rvedit.save(tmp_path / ".former-ours", *original())

    def interrupted():
        yield "a", torch.ones(2)
        raise RuntimeError("killed again")

    with pytest.raises(RuntimeError, match="killed again"):
        weights.write_checkpoint(tmp_path / "ours", interrupted(), {})
    assert names(tmp_path) == ["ours"]
    assert_same(rvedit.load(tmp_path / "ours"), original())


def test_a_save_succeeds_after_a_kill_behind_the_renames(tmp_path):
    """The killed run has left the checkpoint before the last; it does not stop the next save."""
    rvedit.save(tmp_path / "ours", *changed(1))
    rvedit.save(tmp_path / ".former-ours", *changed(2))
    rvedit.save(tmp_path / "ours", *original())
    assert names(tmp_path) == ["ours"]
    assert_same(rvedit.load(tmp_path / "ours"), original())


# --- Damaged and mistaken checkpoints -------------------------------------------------------------

LAYOUTS = {  # a file of it, a tensor in that file and our name for it
    "ours": (
        "ours/model-00001-of-00001.safetensors",
        "dit.blocks.1.ffn.2.bias",
        "dit.blocks.1.ffn.2.bias",
    ),
    "wan": (f"wan/{STEM}-00001-of-00003.safetensors", None, None),
    "wan vae": ("wan/Wan2.2_VAE.pth", "decoder.conv1.bias", "decoder.conv1.bias"),
    "qwen": ("qwen/model-00001-of-00002.safetensors", None, None),
    "wan_diffusers": (
        f"wan_diffusers/transformer/{STEM}.safetensors",
        "blocks.1.ffn.net.2.bias",
        "dit.blocks.1.ffn.2.bias",
    ),
    "wan_diffusers vae": (f"wan_diffusers/vae/{STEM}-00001-of-00002.safetensors", None, None),
    "kiwi": (
        f"kiwi/transformer/{STEM}.safetensors",
        "blocks.1.ffn.net.2.bias",
        "dit.blocks.1.ffn.2.bias",
    ),
    "kiwi vae": (f"kiwi/vae/{STEM}.safetensors", "decoder.conv1.bias", "decoder.conv1.bias"),
    "kiwi mllm": (
        f"kiwi/mllm_encoder/{STEM}.safetensors",
        "connector.0.bias",
        "encoder.editing_connector.0.bias",
    ),
    "kiwi source": (
        f"kiwi/source_embedder/{STEM}.safetensors",
        "patch_embedding.bias",
        "dit.source_embedding.bias",
    ),
    "training": (
        "training.safetensors",
        "mllm.model.model.language_model.layers.1.self_attn.o_proj.lora_B.default.weight",
        "encoder.qwen.model.layers.1.self_attn.o_proj.lora_B",
    ),
}


def places(root, layout):
    """Arguments of `load` for a folder with the layouts in it."""
    if layout in ("ours", "kiwi"):
        return {"path": root / layout}
    path = {"path": root / "training.safetensors"} if layout == "training" else {}
    return path | {
        "wan": root / (layout if layout.startswith("wan") else "wan"),
        "qwen": root / "qwen",
    }


def change_tensors(file, change):
    """Change the tensors of a file, and its part of an index beside it."""
    state = torch.load(file) if file.suffix == ".pth" else load_file(file)
    change(state)
    torch.save(state, file) if file.suffix == ".pth" else save_file(state, file)
    for path in file.parent.glob("*.index.json"):
        index = json.loads(path.read_text())
        if file.name in index["weight_map"].values():
            index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != file.name}
            index["weight_map"] |= dict.fromkeys(state, file.name)
            path.write_text(json.dumps(index))


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of all layouts, for a test to damage."""
    return Path(shutil.copytree(folders, tmp_path / "copy"))


def refused(message, **arguments):
    """`load` raises ValueError with one line that matches, before it has read a tensor into the
    model.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            weights, "assign", lambda *_: pytest.fail("read before the mistake was found")
        )
        with pytest.raises(ValueError, match=message) as caught:
            rvedit.load(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_key_removed_added_or_misshapen_is_named(copied, layout):
    """In every layout and part: the message has the folder, how many keys, and their names."""
    name, key, ours = LAYOUTS[layout]
    file, folder = copied / name, layout.split()[0]
    if key is None:  # any in this shard will do that does not tell a size
        skip = (
            "patch_embed|ffn.0|head.head|time_embedding|text_embedding|"
            "^encoder.conv_in|norm_out|^post_quant"
        )
        key = next(key for key in load_file(file) if not re.search(skip, key))
        ours = {"wan": f"dit.{key}", "qwen": f"encoder.qwen.{key}"}.get(layout)
        ours = ours or next(k for k in original()[1].state_dict() if diffusers_vae_name(k) == key)
    arguments = places(copied, folder)
    source = re.escape(str(arguments.get("path") or arguments["wan"]))
    count = 3 if "connector" in ours else 1  # Kiwi-Edit's connector is taken for three
    ours, backup = re.escape(ours), file.read_bytes()

    change_tensors(file, lambda state: state.pop(key))
    refused(rf"{source}.* does not fit the model: {count} missing \({ours}[^;]*\)$", **arguments)
    file.write_bytes(backup)
    change_tensors(file, lambda state: state.update({"extra.weight": torch.ones(3)}))
    refused(
        rf"{source}.* does not fit the model: 1 unexpected \([\w.]*extra.weight\)$", **arguments
    )
    file.write_bytes(backup)
    change_tensors(file, lambda state: state.update({key: torch.ones(2, 3)}))
    refused(
        rf"{source}.* does not fit the model: {count} misshapen \({ours} \[2, 3\] instead of \[",
        **arguments,
    )


TWICE = [  # a layout, a file of it, and another name for a tensor that the layout has
    ("wan", WAN, "scale_shift_table"),
    ("wan", VAE, "quant_conv.bias"),
    ("qwen", "qwen/model-00001-of-00002.safetensors", "model.language_model.norm.weight"),
    ("kiwi", KIWI, "head.modulation"),
    ("kiwi", f"kiwi/mllm_encoder/{STEM}.safetensors", "model.norm.weight"),
    ("training", TRAINING, "pipe.head.modulation"),
]


@pytest.mark.parametrize(("layout", "file", "name"), TWICE)
def test_two_tensors_of_one_name_are_refused(copied, layout, file, name):
    """One of them would win, and nobody would know which."""
    file = copied / file
    change_tensors(file, lambda state: state.update({name: torch.zeros(24)}))
    message = refused("has .* twice, as .* and as ", **places(copied, layout))
    assert message.startswith(f"{file.parent} has ") and f"{name} in {file.name}" in message


def test_a_tensor_in_two_shards_is_refused(copied):
    shards = sorted((copied / "qwen").glob("model-*"))
    index = (copied / "qwen/model.safetensors.index.json").read_text()
    change_tensors(shards[0], lambda state: state.update(load_file(shards[1])))
    (copied / "qwen/model.safetensors.index.json").write_text(index)
    refused("qwen has .* twice, as .* in model-00001", **places(copied, "qwen"))


def test_many_wrong_keys_are_counted_and_three_named(copied):
    file = copied / "ours/model-00001-of-00001.safetensors"

    def change(state):
        for key in [key for key in state if key.startswith("dit.blocks.0.")]:
            state[key.replace("dit.blocks.0.", "dit.blocks.9.")] = state.pop(key)

    change_tensors(file, change)
    attention = "dit.blocks.{}.cross_attn."
    first = f"{attention}k.bias, {attention}k.weight, {attention}norm_k.weight"
    message = refused("does not fit the model", path=copied / "ours")
    for kind, block in (("missing", 0), ("unexpected", 9)):
        assert f"27 {kind} ({first.format(block, block, block)}, ...)" in message


@pytest.mark.parametrize("layout", ["wan", "wan_diffusers", "kiwi", "training"])
def test_a_tensor_that_tells_the_size_is_named_with_its_folder(copied, layout):
    """Sizes are read from some tensors: where one is missing, the message says which and where."""
    keys = {
        "wan": ("patch_embedding.weight", "dit.patch_embedding.weight"),
        "wan_diffusers": ("proj_out.weight", "dit.head.head.weight"),
        "kiwi": ("proj_out.weight", "dit.head.head.weight"),
        "training": ("mllm.video_queries.q", "encoder.queries"),
    }
    stored, ours = keys[layout]
    arguments = places(copied, layout)
    root = arguments.get("path") or arguments["wan"]
    for file in [root] if root.is_file() else root.rglob(f"{STEM}*.safetensors"):
        change_tensors(file, lambda state: state.pop(stored, None))
    message = refused(f"has no {ours}: it is another model, or was cut short", **arguments)
    assert str(root) in message


class Payload:
    """A pickle that, opened carelessly, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_a_pickle_holds_is_not_run(copied):
    """Neither as a state dict of torch.save, nor as a bare pickle, nor under a safetensors file's
    name.
    """
    bomb, vae, state = (
        Payload(copied / "exploded"),
        copied / "wan/Wan2.2_VAE.pth",
        copied / "training.safetensors",
    )
    tensors = torch.load(vae)
    refusal = f"{re.escape(str(vae))} is not a plain state dict of tensors"
    for content in (
        tensors | {"payload": bomb},
        {"state_dict": tensors},
        [*tensors.values()],
        bomb,
    ):
        torch.save(content, vae)
        message = refused(refusal, **places(copied, "wan"))
        assert "weights_only" not in message  # PyTorch's advice is to run it
    pickled = pickle.dumps({"payload": bomb})
    for content in (pickled, b"no weights\n", b""):
        vae.write_bytes(content)
        refused(refusal, **places(copied, "wan"))
    torch.save(tensors, vae)
    state.write_bytes(pickled)
    refused(
        f"{re.escape(str(state))} is damaged or not a safetensors file: ",
        **places(copied, "training"),
    )
    assert not (copied / "exploded").exists()
    pickle.loads(pickled)
    assert (copied / "exploded").exists()  # so it would have


ODD_STATES = {
    "numbers for names": lambda: {0: torch.ones(2)},
    "other than tensors": lambda: {"a": torch.ones(2), "step": 3},
}


@pytest.mark.parametrize("state", [*ODD_STATES, "script"])
def test_what_is_no_plain_state_dict_is_refused(folders, tmp_path, recwarn, state):
    """In one line, and without a warning."""
    file = tmp_path / "state.pth"
    if state == "script":
        torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    else:
        torch.save(ODD_STATES[state](), file)
    recwarn.clear()
    refused(
        "state.pth is not a plain state dict of tensors",
        path=file,
        wan=folders / "wan",
        qwen=folders / "qwen",
    )
    assert not recwarn.list


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def becomes(content):
    return lambda path: path.write_bytes(content)


def edited(change):
    def edit(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def only_pickles(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def to_another_shard(index):
    index["weight_map"]["head.modulation"] = next(
        name
        for name in index["weight_map"].values()
        if name != index["weight_map"]["head.modulation"]
    )


DAMAGED, NOT_JSON = "is damaged or not a safetensors file: ", "cannot be read as JSON: "
NEITHER = "is neither a checkpoint of ours nor Kiwi-Edit's release: it holds "
DISAGREE = rf"{INDEX} and its shards disagree on 1 tensors \({{}}\): download them again$"
# The layout that is loaded, what is damaged, how, and the message, which begins with a path.
DAMAGES = [
    ("ours", OURS, truncate, f"{OURS} {DAMAGED}"),
    ("wan", WAN, truncate, f"{WAN} {DAMAGED}"),
    ("kiwi", KIWI, truncate, f"{KIWI} {DAMAGED}"),
    ("training", TRAINING, truncate, f"{TRAINING} {DAMAGED}"),
    ("wan", VAE, truncate, f"{VAE} is not a plain state dict of tensors .* or is damaged"),
    ("ours", OURS, becomes(b"no weights\n"), f"{OURS} {DAMAGED}"),
    ("kiwi", KIWI, becomes(b""), f"{KIWI} {DAMAGED}"),
    (
        "ours",
        OURS,
        remove,
        f"ours/model.safetensors.index.json lists {OURS[5:]}, which is not there: download it",
    ),
    ("wan", WAN, remove, f"{INDEX} lists {WAN[4:]}, which is not there: download it again"),
    ("wan", INDEX, edited(to_another_shard), DISAGREE.format("head.modulation")),
    (
        "wan",
        INDEX,
        edited(lambda index: index["weight_map"].pop("head.modulation")),
        DISAGREE.format("head.modulation"),
    ),
    (
        "wan",
        INDEX,
        edited(lambda index: index["weight_map"].update({"more": WAN[4:]})),
        DISAGREE.format("more"),
    ),
    ("wan", INDEX, becomes(b"[]"), f"{INDEX} holds no JSON object"),
    ("wan", INDEX, becomes(b"{}"), f"{INDEX} has no weight_map of names"),
    ("wan", INDEX, becomes(b'{"weight_map": ["a"]}'), f"{INDEX} has no weight_map of names"),
    ("wan", INDEX, becomes(b'{"weight_map": {"a": 1}}'), f"{INDEX} has no weight_map of names"),
    ("wan", INDEX, becomes(b"{"), f"{INDEX} {NOT_JSON}"),
    (
        "wan",
        "wan",
        only_pickles,
        rf"wan has neither {STEM}.*: it holds Wan2.2_VAE.pth, config.json, pytorch_model.bin$",
    ),
    (
        "qwen",
        "qwen",
        only_pickles,
        r"qwen has neither model.*: it holds config.json, pytorch_model.bin, tokenizer.json$",
    ),
    ("wan", VAE, remove, "wan has no Wan2.2_VAE.pth, as Wan2.2-TI2V-5B has: it holds config.json"),
    (
        "wan_diffusers",
        "wan_diffusers/vae",
        remove,
        f"wan_diffusers/vae has neither {STEM}.safetensors nor ",
    ),
    (
        "kiwi",
        "kiwi/source_embedder",
        remove,
        f"kiwi/source_embedder has neither {STEM}.safetensors nor ",
    ),
    ("kiwi", "kiwi/transformer", remove, f"kiwi {NEITHER}mllm_encoder, processor, "),
    # config.json
    ("ours", CONFIG, becomes(b"{"), f"{CONFIG} {NOT_JSON}"),
    ("ours", CONFIG, becomes(b"\xff\xfe{}"), f"{CONFIG} {NOT_JSON}"),
    ("ours", CONFIG, becomes(b"[1]"), f"{CONFIG} holds no JSON object"),
    ("ours", CONFIG, becomes(b'{"a":' * 100_000), f"{CONFIG} {NOT_JSON}"),
    ("ours", CONFIG, becomes(b'{"a": ' + b"9" * 9999 + b"}"), f"{CONFIG} {NOT_JSON}"),
    ("ours", CONFIG, becomes(b'{"model_type": "qwen2_5_vl"}'), f"ours {NEITHER}config.json, "),
    ("ours", CONFIG, remove, f"ours {NEITHER}model-00001-of-00001.safetensors, "),
    (
        "ours",
        CONFIG,
        edited(lambda config: config.pop("dit")),
        f"{CONFIG}: the field dit is missing",
    ),
    (
        "ours",
        CONFIG,
        edited(lambda config: config["vae"].update(colour=1)),
        f"{CONFIG}: this model has no field 'vae.colour'",
    ),
    (
        "ours",
        CONFIG,
        edited(lambda config: config["qwen"]["vision"].clear()),
        f"{CONFIG}: the field qwen.vision.depth is missing",
    ),
    (
        "ours",
        CONFIG,
        edited(lambda config: config.update(routing_depth=4)),
        f"{CONFIG}: routing depth 4 is not",
    ),
    (
        "ours",
        CONFIG,
        edited(lambda config: config["dit"].update(ffn_dim=41)),
        r"ours does not fit .* 9 misshapen \(dit.blocks.0.ffn.0.bias \[40\] instead of \[41\], ",
    ),
    ("wan", "wan/config.json", remove, f"wan/config.json {NOT_JSON}.*No such file"),
    (
        "wan",
        "wan/config.json",
        becomes(b"{}"),
        "wan/config.json does not say how many heads and layers",
    ),
    ("qwen", "qwen/config.json", remove, f"qwen/config.json {NOT_JSON}.*No such file"),
    ("kiwi", "kiwi/vae/config.json", remove, f"kiwi/vae/config.json {NOT_JSON}.*No such file"),
    (
        "kiwi",
        "kiwi/processor/qwen_config.json",
        remove,
        f"kiwi/processor/qwen_config.json {NOT_JSON}.*No such file",
    ),
    # tokenizer.json
    ("ours", "ours/tokenizer.json", remove, "ours has no tokenizer.json: download it again"),
    ("qwen", "qwen/tokenizer.json", remove, "qwen has no tokenizer.json: download it again"),
    (
        "kiwi",
        "kiwi/processor/tokenizer.json",
        remove,
        "kiwi/processor has no tokenizer.json: download it again",
    ),
    ("qwen", "qwen/tokenizer.json", becomes(b"{}"), "qwen/tokenizer.json is not a tokenizer: "),
    ("ours", "ours/tokenizer.json", truncate, "ours/tokenizer.json is not a tokenizer: "),
]


@pytest.mark.parametrize(
    ("layout", "file", "damage", "message"),
    DAMAGES,
    ids=[f"{d[0]}-{i}" for i, d in enumerate(DAMAGES)],
)
def test_a_damaged_checkpoint_is_refused_by_its_file_and_its_fault(
    copied, layout, file, damage, message
):
    damage(copied / file)
    refused(f"{re.escape(str(copied))}/{message}", **places(copied, layout))


# --- Weights as people have them ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, math.nan), (torch.bfloat16, math.inf), (torch.float16, -math.inf)],
)
def test_weights_that_are_not_finite_are_refused_by_file_and_name(copied, dtype, value):
    """One value of one tensor, in the model or in the VAE."""
    file = copied / OURS
    whole = load_file(file)
    for key in ("dit.blocks.1.ffn.2.weight", "vae.decoder.conv1.weight"):
        state = {name: tensor.to(dtype) for name, tensor in whole.items()}
        state[key].view(-1)[-1] = value
        save_file(state, file)
        with pytest.raises(ValueError) as error:
            rvedit.load(copied / "ours")
        name = key.removeprefix("vae.")
        assert str(error.value).startswith(f"{file}: {name} has values that are not finite")
        assert "\n" not in str(error.value)


def test_a_sum_that_overflows_is_no_mistake():
    assert weights.is_finite(torch.full((100,), 60_000.0, dtype=torch.float16))
    assert weights.is_finite(torch.full((100,), 1e38))


@pytest.mark.parametrize(
    ("stored", "value", "wanted"),
    [(torch.float64, 1e39, torch.float32), (torch.float32, 70_000.0, torch.float16)],
)
def test_weights_that_overflow_the_wanted_dtype_are_refused(copied, stored, value, wanted):
    def change(state):
        state["dit.head.modulation"] = state["dit.head.modulation"].to(stored)
        state["dit.head.modulation"][0, 0, 0] = value

    change_tensors(copied / OURS, change)
    with pytest.raises(ValueError, match=f"{OURS}: .* are not finite in {str(wanted)[6:]},"):
        rvedit.load(copied / "ours", dtype=wanted)


def int32(*shape):
    return torch.ones(shape, dtype=torch.int32)


QUANTISED = {  # how one weight of Qwen is stored, by the end of its name
    "int8 without scales": lambda weight: {"weight": weight.to(torch.int8)},
    "bitsandbytes": lambda weight: {
        "weight": torch.ones(weight.numel() // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(3, dtype=torch.uint8),
    },
    "float8": lambda weight: {"weight": weight.to(torch.float8_e4m3fn)},
    "scaled float8": lambda weight: {
        "weight": weight.to(torch.float8_e4m3fn),
        "scale_weight": torch.ones(1),
    },
    "AWQ": lambda weight: {
        "qweight": int32(24, 3),
        "qzeros": int32(1, 3),
        "scales": torch.ones(1, 24),
    },
    "GPTQ": lambda weight: {"qweight": int32(3, 24), "g_idx": int32(24)},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_called_so(copied, kind):
    """Without their scales they have the right shapes, so that they would load as noise or worse
    than they should be.
    """
    layer = "model.layers.0.mlp.up_proj."

    def quantise(state):
        weight = state.pop(f"{layer}weight", None)
        if weight is not None:
            state |= {layer + end: value for end, value in QUANTISED[kind](weight).items()}

    for shard in (copied / "qwen").glob("model-*"):
        change_tensors(shard, quantise)
    refused("qwen/model-.* is quantised, .*: [12] of its tensors are", **places(copied, "qwen"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "more",
    [
        {"global_step": torch.tensor(5)},
        {"mask": torch.ones(24, dtype=torch.bool)},
    ],
)
def test_what_is_neither_a_weight_nor_quantised_is_unexpected(folders, tmp_path, suffix, more):
    path = tmp_path / f"state{suffix}"
    state = kiwi_training_tensors(original()[0]) | more
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    refused(
        rf"state{suffix} does not fit the model: 1 unexpected \({next(iter(more))}\)$",
        path=path,
        wan=folders / "wan",
        qwen=folders / "qwen",
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("layout", ["wan", "training"])
def test_names_of_wrappers_are_taken_off(copied, prefix, layout):
    """Those of DistributedDataParallel and torch.compile, in files and in an index."""
    expected = rvedit.load(**places(copied, layout))[0].state_dict()
    file = copied / (TRAINING if layout == "training" else WAN)

    def wrap(state):
        for key in list(state):
            state[prefix + key] = state.pop(key)

    change_tensors(file, wrap)
    state = rvedit.load(**places(copied, layout))[0].state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_wans_vae_may_be_safetensors(copied):
    """As DiffSynth has converted it."""
    save_file(torch.load(copied / VAE), copied / "wan/Wan2.2_VAE.safetensors")
    (copied / VAE).unlink()
    _, vae = rvedit.load(**places(copied, "wan"))
    assert vae.config == original()[1].config
    expected = original()[1].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in vae.state_dict().items())


def test_comfyuis_names_of_wan_are_known(copied):
    expected = rvedit.load(**places(copied, "wan"))[0].state_dict()
    for shard in (copied / "wan").glob("*.safetensors"):
        state = {f"model.diffusion_model.{key}": value for key, value in load_file(shard).items()}
        change_tensors(shard, lambda old, new=state: (old.clear(), old.update(new)))
    state = rvedit.load(**places(copied, "wan"))[0].state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_an_index_of_former_shards_does_not_count(copied):
    """A new model.safetensors lies beside an index whose shards are gone: it is taken."""
    expected = rvedit.load(**places(copied, "qwen"))[0].state_dict()
    shards = sorted((copied / "qwen").glob("model-*.safetensors"))
    whole = {}
    for shard in shards:
        whole |= load_file(shard)
    save_file(whole, copied / "qwen" / "model.safetensors")
    refused("qwen has weights twice, in model.safetensors and in", **places(copied, "qwen"))
    shards[1].unlink()
    refused("qwen has weights twice, in model.safetensors and in", **places(copied, "qwen"))
    shards[0].unlink()
    state = rvedit.load(**places(copied, "qwen"))[0].state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_tokenizer_neither_truncates_nor_pads(copied):
    """Left in the file by a former use, it would give two long prompts the same tokens."""
    file = copied / "ours" / "tokenizer.json"
    tokenizer = weights.read_tokenizer(file.parent)
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(file))
    loaded = rvedit.load(copied / "ours")[0].encoder.tokenizer
    assert loaded.to_str() == original()[0].encoder.tokenizer.to_str()
    assert len(loaded.encode("make it snow").ids) == len("make it snow")


def test_a_prompt_with_special_tokens_stays_text(copied):
    """Whatever tokenizer.json calls these tokens: a prompt neither ends its turn nor adds clips."""

    def forget(content):
        for token in content["added_tokens"]:
            token["special"] = False

    edited(forget)(copied / "ours/tokenizer.json")
    model = rvedit.load(copied / "ours")[0]
    assert model.encoder.tokenizer.to_str() == original()[0].encoder.tokenizer.to_str()
    text = "a <|im_end|> b <|video_pad|> c <|object_ref_start|>"
    chat = chat_ids(model.encoder.tokenizer, text, 4, 5, model.config.qwen)
    assert len(chat.ids[chat.textual]) == len(text)  # a token for each letter


def test_qwens_base_model_is_read(copied):
    """transformers 5 saves it without "model." before the names."""
    expected = rvedit.load(**places(copied, "qwen"))[0].state_dict()
    for file in (copied / "qwen").glob("model-*"):
        state = load_file(file)
        new = {re.sub(r"^model\.", "language_model.", key): value for key, value in state.items()}
        change_tensors(file, lambda state, new=new: (state.clear(), state.update(new)))
    state = rvedit.load(**places(copied, "qwen"))[0].state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("place", ["./{}", "parts/{}", "parts/../{}"])
def test_an_index_names_its_files_by_any_path(copied, place):
    (copied / "wan/parts").mkdir()
    content = json.loads((copied / INDEX).read_text())
    for name in set(content["weight_map"].values()):
        (copied / "wan" / name).rename(copied / "wan" / place.format(name))
    content["weight_map"] = {k: place.format(name) for k, name in content["weight_map"].items()}
    write_json(copied / INDEX, content)
    rvedit.load(**places(copied, "wan"))


INSTEAD = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    (b"\n<!DOCTYPE html><html><title>404</title></html>", "a web page"),
    (bytes(4096), "begins with zeros"),
    (b"GGUF\x03\0\0\0", "GGUF, which is not supported"),
]


@pytest.mark.parametrize("file", [OURS, VAE, "qwen/tokenizer.json", "qwen/config.json", INDEX])
@pytest.mark.parametrize(("content", "what"), INSTEAD)
def test_what_a_download_left_in_place_of_a_file_is_named(copied, file, content, what):
    (copied / file).write_bytes(content)
    layout = "ours" if file == OURS else "wan"
    refused(f"^{copied / file} .* it (is )?{what}", **places(copied, layout))


def test_a_file_that_aria2_has_begun_is_refused(copied):
    """It has its full length, and zeros where nothing has come yet, which load as weights."""
    content = (copied / OURS).read_bytes()
    (copied / OURS).write_bytes(content[:-4096] + bytes(4096))
    (copied / f"{OURS}.aria2").touch()
    refused(f"{OURS} is not downloaded to its end, says model-.*.aria2", **places(copied, "ours"))


def test_links_of_a_download_that_was_cut_short_are_not_there(copied, tmp_path):
    """In the cache of Hugging Face each file is a link to a blob."""
    (tmp_path / "blobs").mkdir()
    for path in (copied / "kiwi/transformer").iterdir():
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert_same(rvedit.load(copied / "kiwi"), merged())
    (tmp_path / "blobs" / f"{STEM}.safetensors").unlink()
    refused(f"transformer has neither {STEM}.* holds config.json$", **places(copied, "kiwi"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, "float32", None])
def test_dtypes_that_no_edit_works_in_are_refused(folders, dtype):
    for name in ("dtype", "decoder_dtype"):
        refused(f"{dtype} is not supported: take", path=folders / "ours", **{name: dtype})


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_a_qwen_configuration_with_null_ids_is_read(copied, where):
    """transformers 4.52 to 4.56 write such: the tokenizer knows the id."""
    expected = rvedit.load(**places(copied, "qwen"))[0].config
    content = qwen_json(original()[0].config.qwen, nested=where == "text_config")
    if where == "top":
        content["video_token_id"] = None
    else:
        content["text_config"]["video_token_id"] = None
    write_json(copied / "qwen" / "config.json", content)
    assert rvedit.load(**places(copied, "qwen"))[0].config == expected


WRONG_CONFIGS = [  # a file, what is changed in it, and the field that the line names
    ("wan/config.json", lambda c: c.update(num_heads="2"), "dit.num_heads is '2', not a whole"),
    ("wan/config.json", lambda c: c.update(num_layers=10**9), "dit.num_blocks is 1000000000, not"),
    ("wan/config.json", lambda c: c.update(eps=None), "dit.eps is None, not a number"),
    ("qwen/config.json", lambda c: c.update(hidden_size=24.5), "qwen.hidden_size is 24.5, not"),
    ("qwen/config.json", lambda c: c.update(vision_config=None), "no 'vision_config' in it"),
    ("qwen/config.json", lambda c: c["vision_config"].update(depth=True), "qwen.vision.depth is"),
    ("qwen/config.json", lambda c: c.update(vision_config=[1]), r"vision_config is \[1\], not an"),
    ("qwen/config.json", lambda c: c.update(text_config="x"), "text_config is 'x', not an object"),
    ("qwen/config.json", lambda c: c.update(rope_scaling="mrope"), "rope_scaling is 'mrope', not"),
    (
        "qwen/config.json",
        lambda c: c["rope_scaling"].update(mrope_section=7),
        "qwen.mrope_section is 7, not a list",
    ),
    (
        "qwen/config.json",
        lambda c: c["vision_config"].update(fullatt_block_indexes=1),
        "qwen.vision.fullatt_block_indexes is 1, not a list",
    ),
    ("kiwi/vae/config.json", lambda c: c.update(latents_std=[0] * 48), "vae.latents_std is 0, not"),
    ("kiwi/vae/config.json", lambda c: c.update(dim_mult="1224"), "vae.dim_mult is '1224', not"),
    (
        "kiwi/mllm_encoder/config.json",
        lambda c: c.update(max_frames=0),
        "max_mllm_frames is 0, not a whole number from 1 to",
    ),
]


@pytest.mark.parametrize(("file", "change", "message"), WRONG_CONFIGS)
def test_configurations_of_public_layouts_are_checked_too(copied, file, change, message):
    edited(change)(copied / file)
    layout = file.split("/")[0]
    refused(f"^{re.escape(str(copied / file))}: {message}", **places(copied, layout))


OTHER_SIZES = [
    ("wan", "wan", dict(dim=12, num_heads=1), "dim 12, the weights have 24"),
    ("wan", "wan", dict(ffn_dim=20), "ffn_dim 20, the weights have 40"),
    ("wan", "wan", dict(freq_dim=32), "freq_dim 32, the weights have 16"),
    ("wan", "wan", dict(in_dim=16), "in_dim 16, the weights have 48"),
    ("wan_diffusers", "transformer", dict(out_channels=16), "out_channels 16, the weights have 48"),
    ("wan_diffusers", "transformer", dict(patch_size=[1, 1, 1]), r"patch_size \[1, 1, 1\], the"),
    ("kiwi", "transformer", dict(num_attention_heads=4), "attention_head_dim 12, the weights have"),
    ("kiwi", "vae", dict(z_dim=16), "z_dim 16, the weights have 48"),
    ("wan_diffusers", "vae", dict(decoder_base_dim=9), "decoder_base_dim 9, the weights have 8"),
]


@pytest.mark.parametrize(("layout", "folder", "sizes", "message"), OTHER_SIZES)
def test_a_config_that_contradicts_the_weights_is_refused(copied, layout, folder, sizes, message):
    """It is that of another model, whose number of heads would be taken."""
    file = copied / layout / ("" if folder == layout else folder) / "config.json"
    edited(lambda config: config.update(sizes))(file)
    refused(f"^{re.escape(str(file))} says {message}", **places(copied, layout))


@pytest.mark.parametrize("layout", ["kiwi", "wan", "wan_diffusers", "training"])
def test_numbers_that_do_not_go_together_are_named_with_their_own_file(copied, layout):
    qwen = copied / ("kiwi/processor/qwen_config.json" if layout == "kiwi" else "qwen/config.json")
    if layout in ("kiwi", "wan_diffusers"):
        vae = copied / layout / "vae/config.json"
        backup = vae.read_bytes()
        edited(lambda config: config.update(latents_mean=[0.5]))(vae)
        refused(f"^{vae}: vae.latents_mean and vae.latents_std must have", **places(copied, layout))
        vae.write_bytes(backup)
    edited(lambda config: config["vision_config"].update(num_heads=5))(qwen)
    refused(f"^{qwen}: qwen.vision.hidden_size must divide", **places(copied, layout))


def test_another_models_config_is_refused(copied):
    shutil.copy(copied / "wan/config.json", copied / "qwen")
    refused(
        "config.json: no 'vision_config' in it, so it is not a Qwen2.5-VL model's",
        **places(copied, "qwen"),
    )


@pytest.mark.parametrize("file", [OURS, CONFIG, "moved.safetensors"])
def test_a_file_of_our_checkpoint_is_no_training_state(copied, file):
    """Taken for one, it would load with other connectors than its own."""
    shutil.copy(copied / OURS, copied / "moved.safetensors")
    refused(
        f"{file} is a file of our checkpoint: give its folder",
        path=copied / file,
        wan=copied / "wan",
        qwen=copied / "qwen",
    )


def test_arguments_that_do_not_go_together_are_refused(folders, tmp_path):
    wan, qwen, training = folders / "wan", folders / "qwen", folders / "training.safetensors"
    (tmp_path / "empty").mkdir()
    ours, empty, absent = folders / "ours", tmp_path / "empty", tmp_path / "absent"
    both = "needs both --wan DIR and --qwen DIR"
    refused(f"a start without a checkpoint {both}", wan=wan)
    refused(f"a start without a checkpoint {both}", qwen=qwen)
    for arguments in ({}, {"wan": wan}, {"qwen": qwen}):
        refused(
            rf"training.safetensors \(Kiwi-Edit's training state\) {both}",
            path=training,
            **arguments,
        )
    refused("ours holds its own Wan and Qwen: leave out --wan and --qwen", path=ours, wan=wan)
    refused(
        "kiwi holds its own Wan and Qwen: leave out --wan and --qwen",
        path=folders / "kiwi",
        wan=wan,
        qwen=qwen,
    )
    refused("kiwi is Kiwi-Edit's release: give it as --checkpoint", wan=folders / "kiwi", qwen=qwen)
    refused(f"empty {NEITHER}nothing", path=empty)
    refused(f"wan {NEITHER}Wan2.2_VAE.pth, config.json, ", path=wan)
    refused("checkpoint .*absent does not exist", path=absent)
    refused("absent is not a folder", wan=absent, qwen=qwen)
    refused("training.safetensors is not a folder", wan=wan, qwen=training)
    refused(
        f"empty has neither {STEM}.safetensors nor {STEM}.safetensors.index.json: it holds nothing",
        wan=empty,
        qwen=qwen,
    )
    refused(
        "empty has neither model.safetensors nor model.safetensors.index.json: it holds",
        wan=wan,
        qwen=empty,
    )
    refused(f"qwen has neither {STEM}.safetensors", wan=qwen, qwen=wan)


def test_saving_replaces_nothing_but_a_checkpoint(tmp_path):
    """A folder or a file of the user's stays as it is; an empty folder and a former checkpoint make
    way.
    """
    model, vae = tiny_model()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    (tmp_path / "notes").write_text("important")
    for name in ("photos", "notes"):
        with pytest.raises(ValueError, match=name):
            rvedit.save(tmp_path / name, model, vae)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"meow" and (
        tmp_path / "notes"
    ).read_text() == "important"
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        rvedit.save(tmp_path / "empty", model, vae)
        (tmp_path / "empty" / ".DS_Store").touch()
        (tmp_path / "empty" / "model.safetensors").touch()
    (tmp_path / "empty" / "README.md").write_text("important")
    with pytest.raises(ValueError, match="empty/README.md would be lost"):
        rvedit.save(tmp_path / "empty", model, vae)
    assert (tmp_path / "empty" / "README.md").read_text() == "important"
    assert rvedit.layout(tmp_path / "empty") == "rvedit"
