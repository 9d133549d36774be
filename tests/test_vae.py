"""The Wan2.2 VAE: against diffusers on the same random weights, and as a stream over time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import peers
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import convert
import parallel
from vae import RMSNorm, VAEConfig, WanVAE, computes_in_half

FULL = VAEConfig(160, 256, 48, (1, 2, 4, 4), 2, (False, True, True))  # Wan2.2-TI2V-5B
TOY = VAEConfig(8, 8, 4, (1, 2, 2), 1, (True, True), (0.3, -0.1, 0.2, 0.0), (0.5, 2.0, 1.0, 0.7))
DEEP = replace(FULL, dim=16, dec_dim=16, z_dim=8)
CONFIGS = {
    "full stages": replace(FULL, dim=4, dec_dim=6, z_dim=3, latents_std=(0.5, 0.8, 2.0)),
    "toy": TOY,
    "no patches": replace(TOY, dim=6, dec_dim=10, patch_size=1),
    "time before space": replace(
        TOY, dim_mult=(1, 2, 4, 4), temporal_downsample=(True, True, False)
    ),
}


def make_pair(config: VAEConfig, seed: int = 0) -> tuple[WanVAE, AutoencoderKLWan]:
    """Ours and diffusers' model with the same weights, none at a special value such as 0 or 1."""
    torch.manual_seed(seed)
    ours = WanVAE(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
            elif name.endswith("proj.weight"):  # which starts at zero
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return ours, peers.wan_vae(ours)


def random_video(config: VAEConfig, batch: int, frames: int, h: int, w: int) -> Tensor:
    shape = (batch, 3, frames, h * config.spatial_factor, w * config.spatial_factor)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_latents(config: VAEConfig, batch: int, t: int, h: int, w: int, seed: int = 2) -> Tensor:
    return torch.randn(
        (batch, config.z_dim, t, h, w), generator=torch.Generator().manual_seed(seed)
    )


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 3), (3, 5, 3, 2), (1, 9, 1, 4), (2, 13, 2, 2)], ids=str
)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers_in_float32(name: str, shape: tuple[int, int, int, int]) -> None:
    """Encoding and decoding equal diffusers' to 1e-5, for all layouts of stages and all shapes."""
    config = CONFIGS[name]
    ours, theirs = make_pair(config)
    batch, frames, h, w = shape
    video = random_video(config, batch, frames, h, w)
    assert error(ours.encode(video), peers.encode(theirs, config, video)) < 1e-5
    latents = random_latents(config, batch, 1 + (frames - 1) // 4, h, w)
    decoded = ours.decode(latents)
    assert decoded.dtype == torch.float32 and decoded.shape == video.shape
    assert error(decoded, peers.decode(theirs, config, latents)) < 1e-5


@torch.no_grad()
def test_decoded_frames_are_clamped() -> None:
    """Values beyond [-1, 1] are cut, as diffusers does."""
    ours, theirs = make_pair(TOY)
    ours.decoder.head[2].weight.mul_(20)  # theirs too: they are the same tensors
    latents = random_latents(TOY, 1, 2, 2, 2)
    decoded = ours.decode(latents)
    assert 0.1 < (decoded.abs() == 1).float().mean() < 0.9
    assert (
        error(decoded, peers.decode(theirs, TOY, latents)) < 1e-4
    )  # 20 times the error before the clamp


@pytest.mark.parametrize("config", [TOY, DEEP], ids=["toy", "full stages"])
@torch.no_grad()
def test_bfloat16_stays_near_float32(config: VAEConfig) -> None:
    """A bfloat16 model takes and returns float32 and is within 2e-2 of diffusers in float32.

    In the root mean square: the worst value is 1e-2 to 4e-2 off, as with diffusers in bfloat16.
    """
    ours, theirs = make_pair(config)
    ours.bfloat16()
    video, latents = random_video(config, 1, 9, 2, 3), random_latents(config, 1, 3, 2, 3)
    encoded, expected_latents = ours.encode(video), peers.encode(theirs, config, video)
    decoded, expected_video = ours.decode(latents), peers.decode(theirs, config, latents)
    assert encoded.dtype == decoded.dtype == torch.float32
    assert (encoded - expected_latents).norm() < 2e-2 * expected_latents.norm()
    assert (decoded - expected_video).norm() < 2e-2 * expected_video.norm()


@torch.no_grad()
def test_a_float16_encoder_is_8_times_nearer_than_a_bfloat16_one() -> None:
    """It is off by at most 2e-3 of the latents' spread. Either gives its result in float32."""
    vae, _ = make_pair(DEEP)
    video = random_video(DEEP, 1, 9, 2, 2)
    exact = vae.encode(video)
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        vae.encoder_dtype = dtype
        latents = vae.encode(video)
        assert latents.dtype == torch.float32
        errors[dtype] = (latents - exact).std() / exact.std()
    assert 1e-5 < errors[torch.float16] < 2e-3
    assert errors[torch.bfloat16] > 5 * errors[torch.float16]


@torch.no_grad()
def test_an_overflow_in_float16_is_encoded_again_in_float32() -> None:
    """From frame 5 on, in the third latent, values exceed 65504. Those before stay float16's."""
    vae, _ = make_pair(TOY)
    video = random_video(TOY, 1, 13, 2, 2)
    video[:, :, 5:] *= 3e5
    exact = vae.encode(video)
    vae.encoder_dtype = torch.float16
    latents = vae.encode(video)
    assert error(latents, exact) < 3e-3
    assert not torch.equal(latents[:, :, :2], exact[:, :, :2])


def gradients(
    config: VAEConfig, parameters: dict[str, Tensor], encode: Callable, decode: Callable
) -> dict[str, Tensor]:
    """Gradients of a loss of both directions, for the parameters and both inputs."""
    video = random_video(config, 2, 9, 1, 2).requires_grad_()
    latents = random_latents(config, 2, 3, 1, 2).requires_grad_()
    (encode(video).square().mean() + decode(latents).square().mean()).backward()
    leaves = parameters | {"video": video, "latents": latents}
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_those_of_diffusers(name: str) -> None:
    """Gradients of parameters and inputs, through cache and in-place steps, equal diffusers'."""
    config = CONFIGS[name]
    ours, theirs = make_pair(config)
    our_gradients = gradients(config, dict(ours.named_parameters()), ours.encode, ours.decode)
    their_parameters = {
        convert.wan_vae_key(key, config.num_res_blocks): parameter
        for key, parameter in theirs.named_parameters()
    }
    their_gradients = gradients(
        config,
        their_parameters,
        partial(peers.encode, theirs, config),
        partial(peers.decode, theirs, config),
    )
    assert our_gradients.keys() == their_gradients.keys()
    for key, expected in their_gradients.items():
        # 1e-7, because the keys' biases, to which the softmax is blind, get only rounding errors.
        difference = (our_gradients[key] - expected).abs().max()
        assert difference < 1e-4 * expected.abs().max() + 1e-7, key


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_chunk_size_does_not_change_the_result(name: str) -> None:
    """1, 2 or all latent frames at a time agree to 1e-5, and so do uneven blocks of a caller."""
    config = CONFIGS[name]
    ours, _ = make_pair(config)
    video, latents = random_video(config, 1, 21, 1, 2), random_latents(config, 1, 6, 1, 2)
    encoded, decoded = ours.encode(video), ours.decode(latents)
    for chunk in (2, 6):
        assert error(ours.encode(video, chunk), encoded) < 1e-5
        assert error(ours.decode(latents, chunk), decoded) < 1e-5
    blocks = (block for block in video.split([1, 8, 4, 8], dim=2))
    assert error(torch.cat(list(ours.encode_chunks(blocks)), dim=2), encoded) < 1e-5


@torch.no_grad()
def test_blocks_of_frames_have_the_promised_lengths() -> None:
    """decode_chunks yields 1 frame, then 4 for each latent frame of a chunk."""
    ours, _ = make_pair(TOY)
    latents = random_latents(TOY, 1, 4, 1, 1)
    assert [block.shape[2] for block in ours.decode_chunks(latents)] == [1, 4, 4, 4]
    assert [block.shape[2] for block in ours.decode_chunks(latents, chunk=2)] == [1, 8, 4]


@torch.no_grad()
def test_streams_do_not_disturb_each_other() -> None:
    """Two decodings that take turns on one model, after an abandoned one, give the usual frames."""
    ours, _ = make_pair(TOY)
    latents = random_latents(TOY, 1, 3, 1, 2), random_latents(TOY, 1, 3, 2, 1, seed=7)
    next(ours.decode_chunks(latents[0]))
    turns = zip(ours.decode_chunks(latents[0]), ours.decode_chunks(latents[1]), strict=True)
    for z, blocks in zip(latents, zip(*turns, strict=True), strict=True):
        assert torch.equal(torch.cat(blocks, dim=2), ours.decode(z))


@torch.no_grad()
def test_batch_member_equals_its_single_result() -> None:
    """A clip's latents and frames do not depend on the batch it is in."""
    ours, _ = make_pair(TOY)
    video, latents = random_video(TOY, 3, 9, 2, 1), random_latents(TOY, 3, 3, 2, 1)
    assert error(ours.encode(video)[1:2], ours.encode(video[1:2])) < 1e-5
    assert error(ours.decode(latents)[1:2], ours.decode(latents[1:2])) < 1e-5


@torch.no_grad()
def test_time_is_causal_in_both_directions() -> None:
    """A changed frame changes its own latent frame and none before it; and the other way round."""
    ours, _ = make_pair(TOY)
    video, latents = random_video(TOY, 1, 13, 1, 2), random_latents(TOY, 1, 4, 1, 2)
    encoded, decoded = ours.encode(video), ours.decode(latents)
    for t, (first_frame, last_frame) in enumerate([(0, 0), (1, 4), (5, 8), (9, 12)]):
        for frame in (first_frame, last_frame):
            changed = video.clone()
            changed[:, :, frame] *= -1
            result = ours.encode(changed)
            assert torch.equal(result[:, :, :t], encoded[:, :, :t])
            assert not torch.equal(result[:, :, t], encoded[:, :, t])
        changed = latents.clone()
        changed[:, :, t] *= -1
        result = ours.decode(changed)
        assert torch.equal(result[:, :, :first_frame], decoded[:, :, :first_frame])
        assert not torch.equal(result[:, :, first_frame], decoded[:, :, first_frame])


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the block hold at a time, after each operation.

    Exact and repeatable, unlike the resident size; scratch memory of an operation is not seen.
    """

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.existing:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize("chunk", [1, 2])
@torch.no_grad()
def test_memory_does_not_grow_with_the_length(chunk: int) -> None:
    """Streaming 33 frames takes within 10 % of the memory of 17, besides input and output."""
    ours, _ = make_pair(TOY)

    def encode_peak(frames: int) -> int:
        with PeakMemory(*ours.parameters()) as memory:
            lengths = [1] + [4 * chunk] * ((frames - 1) // (4 * chunk))
            for _ in ours.encode_chunks(random_video(TOY, 1, length, 2, 2) for length in lengths):
                pass
        return memory.peak

    def decode_peak(frames: int, keep: bool = False) -> int:
        latents = random_latents(TOY, 1, 1 + (frames - 1) // 4, 2, 2)
        kept = []
        with PeakMemory(*ours.parameters(), latents) as memory:
            for block in ours.decode_chunks(latents, chunk):
                kept.extend([block] if keep else [])
        return memory.peak

    assert encode_peak(33) <= 1.1 * encode_peak(17)
    assert decode_peak(33) <= 1.1 * decode_peak(17)
    assert decode_peak(33, keep=True) > 1.1 * decode_peak(17, keep=True)  # the measure is not blind


def test_full_size_model_has_the_official_parameters() -> None:
    """Names, shapes and number of the parameters are those of Wan2.2_VAE.pth."""
    manifest = json.loads(
        (Path(__file__).parent / "manifests" / "wan2.2_vae_original.json").read_text()
    )
    with torch.device("meta"):
        model = WanVAE(FULL)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == {
        key: entry["shape"] for key, entry in manifest.items()
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == 704_688_668
    assert (FULL.spatial_factor, FULL.temporal_factor) == (16, 4)
    # Without weights it can be run to count its operations.
    assert model.encode(torch.zeros(1, 3, 5, 32, 32, device="meta")).shape == (1, 48, 2, 2, 2)


def test_training_lowers_the_reconstruction_error() -> None:
    """A few steps of Adam through encode and decode fit one clip."""
    torch.manual_seed(0)
    model = WanVAE(TOY)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    video = random_video(TOY, 1, 5, 1, 1).mean(dim=(3, 4), keepdim=True).expand(-1, -1, -1, 8, 8)
    losses = []
    for _ in range(30):
        loss = (model.decode(model.encode(video)) - video).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_misfitting_videos_are_refused() -> None:
    """Wrong lengths, sides and channels give one line that says what is wanted."""
    model = WanVAE(TOY)
    with pytest.raises(ValueError, match=r"6 frames, not 4k \+ 1"):
        model.encode(torch.zeros(1, 3, 6, 8, 8))
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(torch.zeros(1, 3, 5, 8, 12))
    with pytest.raises(ValueError, match="3 x"):
        model.encode(torch.zeros(1, 4, 1, 8, 8))
    with pytest.raises(ValueError, match="first must have 1"):
        list(model.encode_chunks([torch.zeros(1, 3, 4, 8, 8)]))
    with pytest.raises(ValueError, match="a block has 3 frames"):
        list(model.encode_chunks([torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 3, 3, 8, 8)]))
    with pytest.raises(ValueError, match="one entry fewer"):
        replace(TOY, temporal_downsample=(True,))


@pytest.mark.parametrize(
    ("device", "cudnn", "half"),
    (
        ("cpu", None, False),
        ("cuda", 90701, True),
        ("cuda", 91002, False),  # PyTorch 2.9's
        ("cuda", 91501, True),
    ),
)
def test_the_encoder_computes_in_half_precision_where_cudnn_can(monkeypatch, device, cudnn, half):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    assert computes_in_half(torch.device(device)) is half


# --- Compiled norms -------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_norms_give_the_same_latents_and_videos():
    """By the code that is generated for CPUs, over several sizes, numbers of frames and chunks."""
    ours, _ = make_pair(CONFIGS["full stages"])
    ours.requires_grad_(False)
    clips = [random_video(ours.config, 1, *size) for size in ((9, 2, 3), (1, 2, 2), (13, 4, 1))]
    expected = [ours.encode(clip) for clip in clips]
    expected_videos = [ours.decode(latents, chunk=2) for latents in expected]
    parallel.compile_norms(ours)
    for clip, latents, decoded in zip(clips, expected, expected_videos, strict=True):
        assert error(ours.encode(clip), latents) < 1e-5
        assert error(ours.decode(latents, chunk=2), decoded) < 1e-5


def test_norms_are_compiled_once_for_all_sizes(monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    vae = WanVAE(CONFIGS["full stages"]).requires_grad_(False)
    parallel.compile_norms(vae.encoder)
    numbers = []
    for frames, h, w in ((9, 2, 3), (13, 4, 2), (5, 3, 3)):
        vae.encode(random_video(vae.config, 1, frames, h, w))
        numbers.append(len(compiled))
    widths = {module.gamma.shape for module in vae.encoder.modules() if isinstance(module, RMSNorm)}
    assert len(widths) <= numbers[0] <= 3 * len(widths)
    assert numbers == numbers[:1] * 3
