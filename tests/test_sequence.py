"""One clip on several ranks, by gloo: the same tokens, rows, frames and gradients as on one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import make_clip, randomise, relative_error, tiny_model

import sample
import sequence
import video
from model import DiTConfig, WanDiT


def on_ranks(ranks, function, folder, *arguments):
    """Run function(*arguments) on so many ranks, and return what each of them returned."""
    process = (function, ranks, folder, arguments)
    mp.start_processes(one_rank, process, nprocs=ranks, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def one_rank(rank, function, ranks, folder, arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.save(function(*arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()


def make_dit():
    config = DiTConfig(
        dim=48,
        ffn_dim=64,
        num_heads=4,
        num_blocks=3,
        in_channels=4,
        out_channels=4,
        patch_size=(1, 2, 2),
        freq_dim=16,
    )
    return randomise(WanDiT(config))


def dit_inputs(height):
    generator = torch.Generator().manual_seed(1)
    z, source = torch.randn(2, 2, 4, 3, height, 10, generator=generator)
    context = torch.randn(2, 7, 48, generator=generator)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    return z, torch.tensor([0.3, 0.8]), [(context, mask)] * 3, source


def velocity_and_gradients(height, parallel):
    dit = make_dit()
    if parallel:
        sequence.TokenParallel(dit, dist.group.WORLD)
    velocity = dit(*dit_inputs(height))
    velocity.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in dit.named_parameters()}
    if parallel:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()  # each rank's loss is that of the whole clip
    return velocity.detach(), gradients


@pytest.mark.parametrize("ranks, height", [(2, 6), (4, 6), (4, 10)])  # 45 and 75 tokens
def test_a_dit_whose_tokens_are_shared_out_computes_the_same(ranks, height, tmp_path):
    expected, expected_gradients = velocity_and_gradients(height, parallel=False)
    for velocity, gradients in on_ranks(ranks, velocity_and_gradients, tmp_path, height, True):
        assert relative_error(velocity, expected) < 1e-5
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[name]) < 1e-5, name


def encode_and_decode(parallel):
    _, vae = tiny_model()
    factor = vae.config.spatial_factor
    if parallel:
        sequence.RowParallel(vae, latent_height=5)
    frames = video.to_float(make_clip(9, 5 * factor, 3 * factor)).unsqueeze(0)
    with torch.no_grad():
        latents = vae.encode(frames)
        return latents, vae.decode(latents)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_vae_whose_rows_are_shared_out_computes_the_same(ranks, tmp_path):
    """Five rows of latents, so that the ranks hold different numbers of them."""
    expected = encode_and_decode(parallel=False)
    for actual in on_ranks(ranks, encode_and_decode, tmp_path, True):
        for x, y in zip(actual, expected, strict=True):
            assert relative_error(x, y) < 1e-5


def edited_frames(parallel, max_frames):
    """An edit of 33 frames: one window of 81 frames, or two of 17."""
    model, vae = tiny_model(max_frames=max_frames)
    frames = make_clip(33, 64, 48)
    shape = tuple(frames.shape[:3])
    spread = None
    if parallel:
        _, windows = sample.clip_windows(len(frames), model.config)
        spread = sequence.Spread(model, vae, len(windows), 64 // vae.config.spatial_factor)
    blocks = sample.edit_frames(
        model,
        vae,
        lambda: iter(frames),
        shape,
        "add snow",
        steps=2,
        shift=5.0,
        seed=0,
        device=None,
        keep_source=False,
        spread=spread,
    )
    return torch.cat(list(blocks))


@pytest.mark.parametrize("ranks, max_frames", [(2, 81), (2, 17), (4, 17)])
def test_an_edit_on_several_ranks_has_the_same_frames(ranks, max_frames, tmp_path):
    """Two ranks share a window's tokens or take a window each; four do both."""
    expected = edited_frames(False, max_frames).int()
    for frames in on_ranks(ranks, edited_frames, tmp_path, True, max_frames):
        assert (frames.int() - expected).abs().max() <= 1


@pytest.mark.parametrize(
    "ranks, num_windows, groups",
    [(8, 1, 1), (8, 3, 2), (8, 8, 8), (6, 2, 2), (5, 5, 5), (48, 2, 2)],
)
def test_windows_are_shared_out_first(ranks, num_windows, groups):
    """For the full model's 24 heads."""
    assert sequence.number_of_groups(ranks, num_windows, num_heads=24) == groups


def test_ranks_that_cannot_share_the_heads_are_refused():
    with pytest.raises(ValueError, match="5 processes cannot share 24 attention heads"):
        sequence.number_of_groups(5, 4, num_heads=24)
