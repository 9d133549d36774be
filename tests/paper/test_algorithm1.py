"""Appendix B, Algorithm 1: one training step, and Eq. 6, which is its line 19."""

from collections import Counter

import pytest
import torch
from helpers import make_batch, relative_error, tiny_model

import data
import losses
import train
from video import to_float


class Calls:
    """Records the arguments of the DiT's two ways in, `forward` and `features`."""

    def __init__(self, dit, monkeypatch):
        self.forward = []
        self.features = []
        self.blocks = Counter()
        forward, features = dit.forward, dit.features

        def record_forward(*args, **options):
            self.forward.append((args, options))
            return forward(*args, **options)

        def record_features(*args):
            assert not torch.is_grad_enabled()
            self.features.append(args)
            return features(*args)

        monkeypatch.setattr(dit, "forward", record_forward)
        monkeypatch.setattr(dit, "features", record_features)
        for number, block in enumerate(dit.blocks, start=1):
            block.register_forward_hook(lambda *_, number=number: self.blocks.update([number]))


@pytest.mark.parametrize("align_weight", [0.1, 0.75, 3.0])
def test_the_loss_is_eq_6(align_weight):
    """L = L_fm + λ · L_align."""
    model, vae = tiny_model(align_weight=align_weight)
    total, flow, align = train.training_step(model, vae, make_batch(model, vae), depth=2)
    assert align > 0
    assert relative_error(total.detach(), flow.mean() + align_weight * align) < 1e-6


def test_flow_matching_is_the_mean_squared_error_of_the_velocity():
    """L_fm compares û with ε - VAE(v*), element by element."""
    generator = torch.Generator().manual_seed(0)
    velocity, noise, target = torch.randn(3, 2, 4, 3, 6, 5, generator=generator).double()
    loss = losses.flow_matching_loss(velocity, noise, target)
    triples = zip(velocity.flatten(), noise.flatten(), target.flatten(), strict=True)
    expected = sum((u - (e - z)) ** 2 for u, e, z in triples) / velocity.numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert losses.flow_matching_loss(noise - target, noise, target) == 0


def test_both_branches_read_the_same_noisy_target(monkeypatch):
    """One z_t = (1 - t)·VAE(v*) + t·ε and one t; VAE(v) beside it, then VAE(v*) in its place."""
    model, vae = tiny_model()
    batch = make_batch(model, vae)
    calls = Calls(model.dit, monkeypatch)
    train.training_step(model, vae, batch, depth=2)
    [((edit_z, edit_t, _, edit_source), _)] = calls.forward
    [(ref_z, ref_t, _, ref_source, _)] = calls.features
    source, target = vae.encode(to_float(batch.source)), vae.encode(to_float(batch.target))
    t = batch.t.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(edit_z, (1 - t) * target + t * batch.noise)
    assert torch.equal(ref_z, edit_z)
    assert torch.equal(ref_t, edit_t) and torch.equal(ref_t, batch.t)
    assert torch.equal(edit_source, source)
    assert torch.equal(ref_source, target)


def test_the_editing_branch_is_conditioned_on_v_l_and_the_reference_branch_on_the_target(
    monkeypatch,
):
    """Lines 5-9: C from (v, ℓ), C* from (v*, ℓ*), both routed by Eq. 3."""
    model, vae = tiny_model()
    batch = make_batch(model, vae)
    calls = Calls(model.dit, monkeypatch)
    train.training_step(model, vae, batch, depth=2)
    [((_, _, edit_contexts, _), _)] = calls.forward
    [(_, _, ref_contexts, _, _)] = calls.features
    for inputs, contexts in ((batch.edit_inputs, edit_contexts), (batch.ref_inputs, ref_contexts)):
        expected = model.contexts(model.encoder.encode(inputs))
        for (tokens, mask), (expected_tokens, expected_mask) in zip(
            contexts, expected, strict=True
        ):
            assert torch.equal(tokens, expected_tokens)
            if expected_mask is None:  # editing tokens are never padded
                assert mask is None
            else:
                assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_reference_branch_ends_at_the_drawn_depth(depth, monkeypatch):
    """Lines 12 and 16: its later features are never read, so its pass stops there."""
    model, vae = tiny_model()
    calls = Calls(model.dit, monkeypatch)
    train.training_step(model, vae, make_batch(model, vae), depth)
    assert calls.blocks == {block: 1 + (block <= depth) for block in (1, 2, 3)}


def test_without_raaa_there_is_no_reference_branch(monkeypatch):
    """The paper's "w/o RAAA", λ = 0: the loss is L_fm alone, and one pass is all."""
    model, vae = tiny_model(align_weight=0.0)
    batch = make_batch(model, vae)._replace(ref_inputs=None)
    calls = Calls(model.dit, monkeypatch)
    total, flow, align = train.training_step(model, vae, batch, depth=2)
    assert len(calls.forward) == 1 and not calls.features
    assert torch.equal(total, flow.mean()) and align == 0


def test_depths_of_line_16_are_drawn_uniformly():
    """1 ... L, L = 3, for 3,000 steps: each depth's share is 1/3 within 5 standard deviations."""
    counts = Counter()
    for step in range(3000):
        random = data.generator(0, "depth", step)
        counts[int(torch.randint(1, 3 + 1, (), generator=random))] += 1
    assert sorted(counts) == [1, 2, 3]
    assert all(abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for count in counts.values())
