"""The toy's last stage does what shapes.py, the MLLM and Algorithm 1 do, only all at once."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers import randomise, relative_error

import rvedit
import shapes
import train
from experiments import toy_gpu
from shapes import Scene, Shape

EXTENT = (9, 64, 64)


@pytest.fixture(scope="module")
def toy():
    """The built-in model, with random weights of an eighth of its width, and its VAE."""
    model, vae = rvedit.load()
    dit = dataclasses.replace(model.config.dit, dim=32, ffn_dim=48, num_heads=1, num_blocks=3)
    config = dataclasses.replace(model.config, dit=dit, routing_depth=1, align_weight=0.1)
    small = randomise(rvedit.RVEDiT(config, model.encoder.tokenizer)).eval()
    small.encoder.qwen.load_state_dict(model.encoder.qwen.state_dict())
    return small, vae


def draw(model, number=0, batch=6, align_from=0, extent=EXTENT):
    return toy_gpu.Draws(model.encoder, extent, batch, 0, align_from)[number]


@pytest.mark.parametrize("extent", [(5, 64, 64), (3, 48, 80)])
def test_painted_scenes_are_rendered_ones(extent):
    """Every form, colour, pattern, tone and style: but for a level in a few pixels, where float32 rounds otherwise."""
    rng, scenes = np.random.default_rng(0), []
    tones, colors, styles = (
        itertools.cycle(x) for x in (shapes.BACKGROUNDS, shapes.COLORS, (None, *shapes.STYLES))
    )
    for pattern, form in itertools.product(shapes.PATTERNS, shapes.FORMS):
        motions = rng.permutation([*shapes.MOTIONS])[:3]
        looks = [
            (next(colors), size, motion) for size, motion in zip(shapes.SIZES, motions, strict=True)
        ]
        placed = tuple(Shape(form, *look, *rng.uniform(0.2, 0.8, 2).tolist()) for look in looks)
        scenes.append(
            Scene(
                pattern,
                next(tones),
                *rng.uniform((0, 0.3), (3.14, 0.5)).tolist(),
                placed,
                next(styles),
            )
        )
    painted = toy_gpu.paint(toy_gpu.pack_all(scenes, extent), extent).movedim(1, -1)
    rendered = torch.stack(
        [torch.from_numpy(shapes.render(scene, extent)) for scene in scenes]
    ).float()
    off = (painted - rendered).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-4


def test_batches_are_a_function_of_seed_and_number(toy):
    model, _ = toy
    first, again, other = draw(model, 3), draw(model, 3), draw(model, 4)
    assert all(torch.equal(a, b) for a, b in zip(first.scenes, again.scenes, strict=True))
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)
    assert (
        draw(model, 3, align_from=4).ref_ids is None
        and draw(model, 4, align_from=4).ref_ids is not None
    )


def test_the_reader_is_the_encoder(toy):
    """Of instructions of different lengths; textual tokens are padded on the other side."""
    model, _ = toy
    batch = draw(model, batch=5)
    rows, decode = zip(batch.ids, batch.words, strict=True), model.encoder.tokenizer.decode
    texts = [
        decode(row[-18 - n : -18].tolist()) for row, n in rows
    ]  # before the 16 queries and two more tokens
    assert len(set(batch.words.tolist())) > 2
    clips = toy_gpu.paint(batch.scenes, EXTENT)[:5]
    with torch.no_grad():
        read = toy_gpu.Reader(model.encoder, EXTENT, "cpu")((clips, batch.ids, batch.words))
        expected = model.encoder(list(clips.movedim(1, -1).to(torch.uint8)), texts)
    for name in ("editing", "visual"):
        assert relative_error(getattr(read, name), getattr(expected, name)) < 1e-5
    for i in range(5):
        mine, theirs = (c.textual[i][c.textual_mask[i]] for c in (read, expected))
        assert relative_error(mine, theirs) < 1e-5


def test_clips_that_the_mllm_would_resize_are_refused(toy, tmp_path):
    """And nothing is written that a later call would go on with."""
    rvedit.save(tmp_path / "start", *toy)
    with pytest.raises(ValueError, match="would be resized for the MLLM"):
        toy_gpu.train_editor(tmp_path / "start", tmp_path / "out", size=(9, 32, 32))
    assert not (tmp_path / "out").exists()


def test_twice_the_width_is_the_same_function(toy):
    """Of the whole model; and the two copies of a channel get different gradients, so that they part."""
    small, vae = toy
    wide = toy_gpu.widen(small)
    assert wide.config.dit == dataclasses.replace(small.config.dit, dim=64, ffn_dim=96, num_heads=2)
    z, source = torch.randn(2, 2, 24, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    clips, t = (
        [torch.full((9, 64, 64, 3), n, dtype=torch.uint8) for n in (50, 200)],
        torch.tensor([0.3, 0.9]),
    )
    outputs = []
    for model in (small, wide):
        model.requires_grad_(True)
        outputs.append(
            model.dit(
                z, t, model.contexts(model.encoder(clips, ["remove it", "add a star"])), source
            )
        )
    assert relative_error(outputs[1], outputs[0]) < 1e-5
    outputs[1].square().mean().backward()
    for name in ("self_attn.q", "cross_attn.v", "ffn.0"):
        first, second = wide.get_parameter(f"dit.blocks.1.{name}.weight").grad.chunk(2)
        assert relative_error(first, second) > 0.1, name
    wide.zero_grad()


def test_a_minibatch_trains_as_its_rendered_clips_do(toy, tmp_path, monkeypatch):
    """The losses and gradients of Algorithm 1 on what `shapes` and the data loader of train.py make of the scenes."""
    small, vae = toy
    rvedit.save(tmp_path / "start", small, vae)
    monkeypatch.setattr(toy_gpu, "ALIGN_FROM", 0)
    editor = toy_gpu.Editor(tmp_path / "start", tmp_path, steps=2, batch=3, extent=EXTENT)
    batch = editor.minibatch(editor.draws[1])
    model, tokenizer = editor.model, small.encoder.tokenizer
    clips = [[clip.to(torch.uint8) for clip in clips] for clips in (batch.source, batch.target)]
    pairs = []
    for (_, ids, words), some in zip((batch.edit_inputs, batch.ref_inputs), clips, strict=True):
        texts = [
            tokenizer.decode(row[-18 - n : -18].tolist()) for row, n in zip(ids, words, strict=True)
        ]
        pairs.append(model.encoder.prepare(some, texts))
    rendered = batch._replace(edit_inputs=pairs[0], ref_inputs=pairs[1])
    results = []
    for encode, one in (
        (model.encoder.encode, batch),
        (type(model.encoder).encode.__get__(model.encoder), rendered),
    ):
        model.encoder.encode = encode
        model.zero_grad()
        total, flow, align = train.training_step(model, editor.vae, one, depth=2)
        total.backward()
        gradients = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        results.append((flow, align[None], gradients))
    (flow, align, mine), (expected_flow, expected_align, theirs) = results
    assert (
        relative_error(flow, expected_flow) < 1e-5 and relative_error(align, expected_align) < 1e-5
    )
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-7, name


def test_a_run_that_was_stopped_ends_as_one_that_was_not(toy, tmp_path, monkeypatch):
    """Stopped before the third of four steps, the last of which is aligned: the same weights, bit for bit."""
    rvedit.save(tmp_path / "start", *toy)
    monkeypatch.setattr(toy_gpu, "SAVE_SECONDS", 0)
    monkeypatch.setattr(toy_gpu, "ALIGN_FROM", 0.75)
    options = dict(steps=4, batch=2, size=EXTENT, workers=0)
    toy_gpu.train_editor(tmp_path / "start", tmp_path / "a", **options)

    class Stops(toy_gpu.Draws):
        def __getitem__(self, number):
            if number == 2:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_gpu, "Draws", Stops)
        toy_gpu.train_editor(tmp_path / "start", tmp_path / "b", **options)
    assert not (tmp_path / "b" / "model").exists()
    toy_gpu.train_editor(tmp_path / "start", tmp_path / "b", **options)
    whole, resumed = (rvedit.load(tmp_path / name / "model")[0] for name in "ab")
    start = toy_gpu.widen(rvedit.load(tmp_path / "start")[0]).state_dict()
    assert whole.config.align_weight == resumed.config.align_weight == 0.1
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value) and not torch.equal(
            start[name], value
        ), name
