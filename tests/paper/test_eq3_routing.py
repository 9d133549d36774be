"""§4.2, Eq. 3: shallow blocks read the editing tokens, deep blocks read all tokens."""

import dataclasses

import pytest
import torch
from helpers import random_condition, residual_stream, tiny_model

import rvedit
from mllm import Condition


@pytest.mark.parametrize("routing_depth", range(4))
def test_blocks_up_to_the_routing_depth_see_the_editing_tokens_alone(routing_depth):
    """C^(l) is X_e for l <= L_s and [X_e; X_v; X_ℓ] for l > L_s, for every L_s from 0 to L = 3."""
    condition = random_condition(dim=8)
    x_e, x_v, x_l = condition[:3]
    for block in (1, 2, 3):
        context, mask = rvedit.route_context(condition, block, routing_depth)
        expected = x_e if block <= routing_depth else torch.cat([x_e, x_v, x_l], dim=1)
        assert torch.equal(context, expected)
        assert mask is None


def test_masks_of_padded_tokens_travel_with_the_tokens():
    streams = random_condition(dim=8, batch=2)[:3]
    masks = [torch.rand(2, n) > 0.5 for n in (6, 3)]
    condition = Condition(*streams, *masks)
    _, shallow_mask = rvedit.route_context(condition, block=2, routing_depth=2)
    _, deep_mask = rvedit.route_context(condition, block=3, routing_depth=2)
    assert shallow_mask is None  # editing tokens are never padded
    assert torch.equal(deep_mask, torch.cat([torch.ones(2, 4, dtype=torch.bool), *masks], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("routing_depth", range(4))
def test_native_tokens_reach_the_deep_blocks_only(routing_depth):
    """Other visual and textual tokens change no shallow block's output, and every deep one's."""
    model, _ = tiny_model()
    condition = random_condition(model.config.dit.dim)
    changed = condition._replace(
        visual=torch.randn_like(condition.visual), textual=torch.randn_like(condition.textual)
    )
    before = residual_stream(model, condition, routing_depth)
    after = residual_stream(model, changed, routing_depth)
    unchanged = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert unchanged == [block <= routing_depth for block in (1, 2, 3)]


@torch.no_grad()
def test_editing_tokens_remain_an_anchor_for_every_block():
    """ "No information is ever discarded": other editing tokens change every block's output."""
    model, _ = tiny_model()
    condition = random_condition(model.config.dit.dim)
    changed = condition._replace(editing=torch.randn_like(condition.editing))
    before = residual_stream(model, condition, routing_depth=1)
    after = residual_stream(model, changed, routing_depth=1)
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@torch.no_grad()
def test_without_grtc_every_block_reads_the_editing_tokens_alone():
    """The paper's "w/o GRTC", L_s = L, is bit for bit Kiwi-Edit's conditioning."""
    model, _ = tiny_model()
    config = model.config.dit
    condition = random_condition(config.dim)
    z_t, source = torch.randn(2, 1, config.in_channels, 2, 4, 4)
    t = torch.tensor([0.3])
    model.config = dataclasses.replace(model.config, routing_depth=config.num_blocks)
    routed = model.dit(z_t, t, model.contexts(condition), source)
    editing_alone = model.dit(z_t, t, [condition.editing] * config.num_blocks, source)
    assert torch.equal(routed, editing_alone)
