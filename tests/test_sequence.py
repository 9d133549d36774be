"""One clip on several ranks, by gloo: the same tokens, rows, frames and gradients as on one.

And a share of the FLOPs, by messages that go nowhere.
"""

import dataclasses
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import make_clip, randomise, relative_error, tiny_config, tiny_model
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import parallel
import rvedit
import sample
import sequence
import train
import video
from model import DiTConfig, WanDiT
from qwen import Qwen2_5_VL

# Ranks are forked from a server that has imported all this, and not from here: where PyTorch knows
# GPUs, a process that has once computed gradients has no forks that could.
multiprocessing.set_forkserver_preload(["torch._dynamo.testing", "train"])


def on_ranks(ranks, function, folder, *arguments):
    """Run function(*arguments) on so many ranks, and return what each of them returned."""
    process = (function, ranks, folder, arguments)
    mp.start_processes(one_rank, process, nprocs=ranks, start_method="forkserver")
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


def velocity_and_gradients(height, shared):
    dit = make_dit()
    if shared:
        sequence.TokenParallel(dit, dist.group.WORLD)
    velocity = dit(*dit_inputs(height))
    velocity.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in dit.named_parameters()}
    if shared:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()  # each rank's loss is that of the whole clip
    return velocity.detach(), gradients


@pytest.mark.parametrize("ranks, height", [(2, 6), (4, 6), (4, 10)])  # 45 and 75 tokens
def test_a_dit_whose_tokens_are_shared_out_computes_the_same(ranks, height, tmp_path):
    expected, expected_gradients = velocity_and_gradients(height, shared=False)
    for velocity, gradients in on_ranks(ranks, velocity_and_gradients, tmp_path, height, True):
        assert relative_error(velocity, expected) < 1e-5
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[name]) < 1e-5, name


def streams_and_gradients(lengths, heads, shared):
    """X_e, X_v and X_ℓ of clips of these lengths, with the gradients of all weights of the MLLM."""
    qwen = dataclasses.replace(
        tiny_config().qwen,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        mrope_section=(1,) * 3 if heads == 4 else (2,) * 3,
    )
    model, _ = tiny_model(lora_rank=0, qwen=qwen)  # without LoRA, so that everything trains
    if shared:
        sequence.MLLMParallel(model.encoder.qwen, dist.group.WORLD)
    clips = [make_clip(length, 32, 40, seed=length) for length in lengths]
    words = ["remove it", "make it snow on the hill"][: len(clips)]
    condition = model.encoder(clips, words)
    streams = [condition.editing, condition.visual, condition.textual]
    sum(stream.square().sum() for stream in streams).backward()
    gradients = {}
    for name, parameter in model.encoder.named_parameters():
        if parameter.grad is None:
            continue  # the queries of stills
        if shared:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()  # each rank's loss is that of the whole clip
        gradients[name] = parameter.grad
    return [stream.detach() for stream in streams], gradients


@pytest.mark.parametrize(
    "ranks, lengths, heads",
    [
        (2, (9, 5), 4),  # words and clips differ in length: there is padding
        (4, (9, 9), 4),
        (4, (9,), 4),  # a clip of two pairs of frames, which four ranks all see
        (3, (9, 9), 4),  # three ranks share four pairs of frames, but not four heads
        (2, (9,), 2),
    ],
)
def test_an_mllm_that_is_shared_out_computes_the_same(ranks, lengths, heads, tmp_path):
    expected, expected_gradients = streams_and_gradients(lengths, heads, shared=False)
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    arguments = (lengths, heads, True)
    for streams, gradients in on_ranks(ranks, streams_and_gradients, tmp_path, *arguments):
        for stream, expected_stream in zip(streams, expected, strict=True):
            assert relative_error(stream, expected_stream) < 1e-5
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            # Those of key biases are nearly zero by construction.
            scale = gradient.abs().max() + 1e-3 * largest
            assert (gradients[name] - gradient).abs().max() < 1e-5 * scale, name


def test_each_rank_has_its_part_of_the_frames():
    grids = ((3, 4, 6), (1, 2, 2), (4, 8, 8))
    assert sequence.part_of(grids, 0, 8) == grids
    assert sequence.part_of(grids, 0, 2) == ((2, 4, 6),)
    assert sequence.part_of(grids, 2, 6) == ((1, 4, 6), (1, 2, 2), (2, 8, 8))
    assert sequence.part_of(grids, 6, 8) == ((2, 8, 8),)


def encode_and_decode(shared):
    _, vae = tiny_model()
    factor = vae.config.spatial_factor
    if shared:
        sequence.RowParallel(vae, dist.group.WORLD)
    results = []
    for latent_height in (5, 3):
        frames = video.to_float(make_clip(9, latent_height * factor, 3 * factor)).unsqueeze(0)
        with torch.no_grad():
            latents = vae.encode(frames)
            results += [latents, vae.decode(latents)]
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_vae_whose_rows_are_shared_out_computes_the_same(ranks, tmp_path):
    """Five rows of latents, so that the ranks hold different numbers of them; then three, which are
    too few for four ranks.
    """
    expected = encode_and_decode(shared=False)
    for actual in on_ranks(ranks, encode_and_decode, tmp_path, True):
        for x, y in zip(actual, expected, strict=True):
            assert relative_error(x, y) < 1e-5


@torch.no_grad()
def encode_with_overflow(shared):
    """VAE(v) with products in float16, and its values before they are normalised."""
    _, vae = tiny_model()
    vae.encoder_dtype = torch.float16
    for parameter in vae.conv1.parameters():
        parameter *= 48_000
    factor = vae.config.spatial_factor
    if shared:
        sequence.RowParallel(vae, dist.group.WORLD)
    frames = video.to_float(make_clip(9, 5 * factor, 3 * factor)).unsqueeze(0)
    latents = vae.encode(frames)
    mean, std = vae.latent_statistics(latents.device)
    return latents, latents * std + mean


def test_ranks_agree_that_float16_has_overflowed(tmp_path):
    """In the last latent frame it does so in the first rank's three rows alone. Otherwise one rank
    would wait for rows that the other does not send.
    """
    expected, values = encode_with_overflow(shared=False)
    exceeds = (values.abs() > 65504).amax((0, 1, 4))  # by frame and row
    assert exceeds[:, :3].any(1).tolist() == [False, False, True] and not exceeds[:, 3:].any()
    for latents, _ in on_ranks(2, encode_with_overflow, tmp_path, True):
        assert relative_error(latents, expected) < 3e-3


def edited_frames(shared, max_frames):
    """An edit of 33 frames: one window of 81 frames, or two of 17."""
    model, vae = tiny_model(max_frames=max_frames)
    frames = make_clip(33, 64, 48)
    spread = None
    if shared:
        _, windows = sample.clip_windows(len(frames), model.config)
        spread = sequence.Spread(model, vae, len(windows))
    inference = sample.Inference(model, vae, spread=spread)
    clip = sample.Clip(lambda: iter(frames), frames.shape[:3])
    latents, _ = inference.edit_latents(clip, "add snow", steps=2, shift=5.0, seed=0)
    blocks = inference.decode_edit(clip, latents)
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


# --- Training -------------------------------------------------------------------------------------


class Triplets(torch.utils.data.Dataset):
    """Five edits in clips of 27 tokens, of which one cannot be read."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == 0:
            raise ValueError("a broken clip")
        source, target = make_clip(9, 96, 96, index), make_clip(9, 96, 96, 10 + index)
        words = dict(instruction="make it snow"[: 2 * index], caption="a hill in the snow")
        return dict(source=source, target=target, **words)


def step_and_gradients(ranks_per_clip, folder, clips=4):
    """What is logged about a training step on so many clips, and all gradients, whole."""
    clips_per_group = clips * ranks_per_clip // dist.get_world_size()
    words = f"--preset toy --size 9 96 96 --sequence-parallel {ranks_per_clip} --out {folder}"
    args = train.parse_arguments([*words.split(), "--batch", str(clips_per_group)])
    args.recompute = True  # as at full size
    device = torch.device("cpu")
    group = parallel.neighbours(ranks_per_clip, device)
    model, vae = tiny_model(lora_rank=0)  # so that everything trains
    train.prepare(model, args, parallel.make_mesh(device, torch.float32), group)
    if group is not None:
        sequence.RowParallel(vae, group)
    run = train.make_run(model, vae, device, args)
    batches = train.make_batches(Triplets(), run, args)
    report = train.compute_gradients(run, [batches[0, 0]], args)
    gradients = {}
    for name, p in run.weights.items():
        gradients[name] = p.grad if dist.get_world_size() == 1 else p.grad.full_tensor()
    return report, gradients


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_clips_find_the_gradients_of_one(ranks, tmp_path):
    """Two ranks are one group, four are two groups, sharded by FSDP; λ > 0, and blocks 2 and 3 read
    native tokens. Every weight of the DiT, the MLLM, queries and connectors.
    """
    (tmp_path / "one").mkdir()
    ((expected, expected_gradients),) = on_ranks(
        1, step_and_gradients, tmp_path / "one", 1, tmp_path
    )
    assert expected["broken"] == 1 and expected["align"] > 0
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for report, gradients in on_ranks(ranks, step_and_gradients, tmp_path, 2, tmp_path):
        assert report["broken"] == 1 and report["tokens"] == 4 * 27
        by_t, expected_by_t = ([x or 0 for x in r["flow_by_t"]] for r in (report, expected))
        assert by_t == pytest.approx(expected_by_t, rel=1e-5)
        for name in ("loss", "flow", "align"):
            assert report[name] == pytest.approx(expected[name], rel=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            # Some gradients, such as those of key biases, are nearly zero by construction.
            scale = gradient.abs().max() + 1e-3 * largest
            assert (gradients[name] - gradient).abs().max() < 1e-5 * scale, name


def step_of_a_rank_that_reads_badly(folder):
    """How a step ends in which rank 1 cannot read a clip, and the next one is smaller."""
    if dist.get_rank() == 1:
        good = Triplets.__getitem__
        indices = iter([0, 1])  # the first of which is broken

        def read(self, index):
            item = good(self, next(indices))
            return item | dict(source=item["source"][:, :64], target=item["target"][:, :64])

        Triplets.__getitem__ = read
    try:
        step_and_gradients(2, folder, clips=1)
    except (ValueError, SystemExit) as error:
        return str(error)


def test_ranks_that_share_a_clip_must_read_the_same(tmp_path):
    """It is found before they compute: messages of different lengths end gloo's process at once."""
    error, code = on_ranks(2, step_of_a_rank_that_reads_badly, tmp_path, tmp_path)
    assert "by some of the ranks that share it" in error and "broken.txt" in error
    assert code == "2"  # of the rank that leaves the message to rank 0


@pytest.fixture
def pretended_ranks():
    """Starts a group of so many ranks, of which only this one exists."""

    def start(ranks, rank=0):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        return dist.group.WORLD

    yield start
    dist.destroy_process_group()


def dit_flops(group):
    """Forward pass of an edit, and a whole pass of training, at the paper's size in two blocks."""
    config = dataclasses.replace(rvedit.preset("wan2.2-ti2v-5b").dit, num_blocks=2)
    with torch.device("meta"):
        dit = WanDiT(config)
        z, source = torch.zeros(2, 1, 48, 21, 44, 80)
        inputs = (z, torch.zeros(1), [torch.zeros(1, 2822, config.dim)] * 2, source)
    if group is not None:
        sequence.TokenParallel(dit, group)
    with FlopCounterMode(display=False) as edit, torch.no_grad():
        dit(*inputs)
    with FlopCounterMode(display=False) as training:
        velocity, features = dit(*inputs, capture=1)
        (velocity.sum() + features.sum()).backward()
    return edit.get_total_flops(), training.get_total_flops()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_computes_its_share_of_the_flops(ranks, pretended_ranks):
    """To 10 %: each rank computes the keys and values of all 2,822 context tokens."""
    whole = dit_flops(None)
    shared = dit_flops(pretended_ranks(ranks))
    for flops, all_flops in zip(shared, whole, strict=True):
        assert flops / all_flops == pytest.approx(1 / ranks, rel=0.1)


def mllm_flops(group):
    """Forward and backward pass at the paper's size in two layers of each tower."""
    config = rvedit.preset("wan2.2-ti2v-5b").qwen
    vision = dataclasses.replace(config.vision, depth=2, fullatt_block_indexes=(1,))
    config = dataclasses.replace(config, vision=vision, num_hidden_layers=2)
    grid = torch.tensor([[8, 26, 48]])  # 16 frames of 364 x 672
    num_visual, num_queries, num_words = 8 * 13 * 24, 512, 64
    ids = torch.zeros(1, num_visual + num_queries + num_words, dtype=torch.long)
    with torch.device("meta"):
        qwen = Qwen2_5_VL(config)
        patches = torch.zeros(4 * num_visual, 3 * 2 * 14**2)
        queries = torch.zeros(num_queries, config.hidden_size)
    if group is not None:
        sequence.MLLMParallel(qwen, group)
    with FlopCounterMode(display=False) as counter:
        qwen(ids.to("meta"), patches, grid, queries).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_rank_computes_its_share_of_the_mllm(ranks, pretended_ranks):
    whole = mllm_flops(None)
    shared = mllm_flops(pretended_ranks(ranks))
    assert shared / whole == pytest.approx(1 / ranks, rel=0.01)


def test_heads_that_ranks_cannot_share_are_refused(pretended_ranks):
    with pytest.raises(ValueError, match="3 processes cannot share 4 attention heads"):
        sequence.TokenParallel(make_dit(), pretended_ranks(3))


def test_clips_of_many_sizes_take_few_compiled_variants(pretended_ranks):
    """The first size, other sizes, and one more for tokens that do not divide by two."""
    counter = CompileCounter()
    dit = make_dit()
    for block in dit.blocks:
        block.forward = torch.compile(block.forward, backend=counter)
    sequence.TokenParallel(dit, pretended_ranks(2))
    for height in range(6, 26, 2):
        dit(*dit_inputs(height))
    assert 1 < counter.frame_count <= 3


def test_ranks_that_share_clips_are_neighbours(pretended_ranks, monkeypatch):
    pretended_ranks(12, rank=6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(parallel, "fail_together", lambda problem: None)  # which asks all ranks
    group = parallel.neighbours(4, torch.device("cpu"))
    assert dist.get_process_group_ranks(group) == [4, 5, 6, 7]
