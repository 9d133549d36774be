"""Zero-initialised layers, as in Kiwi-Edit: at first, what is new changes nothing."""

import re

import torch
from helpers import make_clip, random_condition, tiny_model

import convert
import rvedit


def new_parts(model):
    """Names of what a start from Wan and Qwen has to draw: queries, connectors, LoRA, source."""
    names = dict(model.named_parameters())
    return [name for name in names if re.search(convert.NEW_TO_WAN_AND_QWEN, name)]


@torch.no_grad()
def test_a_new_source_embedding_leaves_the_backbone_as_it_is():
    model, _ = tiny_model()
    rvedit.initialise(model, names=new_parts(model))
    z_t, source = torch.randn(2, 1, model.config.dit.in_channels, 2, 4, 4)
    t = torch.tensor([0.6])
    contexts = model.contexts(random_condition(model.config.dit.dim))
    assert torch.equal(model.dit(z_t, t, contexts, source), model.dit(z_t, t, contexts))


@torch.no_grad()
def test_new_connectors_give_the_dit_zeros():
    """X_e, X_v and X_ℓ are zero, though the queries and the first layers are not."""
    model, _ = tiny_model()
    rvedit.initialise(model, names=new_parts(model))
    condition = model.encoder([make_clip(5, 32, 32)], ["make it snow"])
    assert not any(stream.any() for stream in condition[:3])
    assert model.encoder.queries.any()


@torch.no_grad()
def test_a_new_lora_leaves_the_mllm_as_it_is():
    with_lora, _ = tiny_model()
    lora = [name for name in new_parts(with_lora) if "lora_" in name]
    rvedit.initialise(with_lora, names=lora)
    without, _ = tiny_model(lora_rank=0)
    state = with_lora.state_dict()
    without.load_state_dict({name: state[name] for name in state if name not in lora})
    edit = [make_clip(5, 32, 32)], ["make it snow"]
    for stream, expected in zip(with_lora.encoder(*edit), without.encoder(*edit), strict=True):
        assert stream is expected is None or torch.equal(stream, expected)
