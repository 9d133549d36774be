"""Appendix B, Algorithm 2: inference needs (v, ℓ) only."""

import pytest
import torch
from helpers import make_clip, tiny_model

import sample


@torch.no_grad()
def test_the_reference_branch_is_removed_at_inference(monkeypatch):
    """An edit in N steps is one pass of the MLLM and N passes of the DiT, and captures nothing."""
    model, vae = tiny_model()
    passes = []
    mllm_passes = []

    def no_reference(*_):
        pytest.fail("the reference branch ran")

    monkeypatch.setattr(model.dit, "features", no_reference)
    model.dit.register_forward_hook(
        lambda _, __, kwargs, output: passes.append((kwargs, output)), with_kwargs=True
    )
    model.encoder.qwen.register_forward_hook(lambda *_: mllm_passes.append(1))
    sample.edit_video(model, vae, make_clip(5, 64, 64), "make it snow", steps=3)
    assert len(mllm_passes) == 1
    assert len(passes) == 3
    for kwargs, output in passes:
        assert kwargs.get("capture") is None
        assert isinstance(output, torch.Tensor)  # the velocity alone


@torch.no_grad()
def test_inference_routes_the_condition_as_training_does(monkeypatch):
    """Lines 2-3: the contexts of every step are Eq. 3 of (v, ℓ)."""
    model, vae = tiny_model()
    clip = make_clip(5, 64, 64)
    expected = model.contexts(model.encoder([clip], ["make it snow"]))
    seen = []
    model.dit.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    sample.edit_video(model, vae, clip, "make it snow", steps=2)
    assert len(seen) == 2
    for contexts in seen:
        for (tokens, _), (expected_tokens, _) in zip(contexts, expected, strict=True):
            assert torch.equal(tokens, expected_tokens)


def test_sampling_walks_from_noise_to_the_clean_latents():
    """Lines 5-7: with the exact velocity ε - z_0 of a straight path, it ends at z_0."""
    noise, clean = torch.randn(2, 1, 4, 2, 3, 3)
    times = []

    def velocity(z, t):
        times.append(t.item())
        return noise - clean

    end = sample.denoise(velocity, noise, steps=7, shift=5.0)
    torch.testing.assert_close(end, clean, rtol=0, atol=1e-5)
    assert times[0] == 1 and times == sorted(times, reverse=True) and len(times) == 7
