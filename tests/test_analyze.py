"""What §5.3 measures, against naive implementations, closed forms and numbers made by hand."""

import argparse
import dataclasses
import json
import math
import sys

import av
import numpy as np
import pytest
import torch
from helpers import make_clip, relative_error, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import rvedit
import sample
import video
from experiments import analyze
from model import Attention, DiTConfig

TEXTS = (
    "remove it",
    "make the small red circle in the corner green",
    "a blue square.",
    "a small circle on gray",
)


@pytest.fixture(scope="module")
def model_and_vae():
    """Whose attention is far from even, so that there is something to measure."""
    model, vae = tiny_model()
    with torch.no_grad():
        for block in model.dit.blocks:
            block.cross_attn.norm_q.weight *= 4
    return model, vae


def make_pairs(model, vae, pairs):
    """The arguments of `analyze.trace` for pairs (seed of the clips, instruction, caption)."""
    sources = [make_clip(9, 32, 64, seed) for seed, _, _ in pairs]
    targets = [make_clip(9, 32, 64, seed + 100) for seed, _, _ in pairs]
    instructions = [instruction for _, instruction, _ in pairs]
    captions = [caption for _, _, caption in pairs]
    condition = model.encoder(sources + targets, instructions + captions)
    latents = [vae.encode(video.to_float(clip[None])) for clip in sources + targets]
    noise = [sample.initial_noise(latents[0].shape, seed) for seed, _, _ in pairs]
    t = torch.tensor([0.3 + 0.1 * seed for seed, _, _ in pairs])
    K, N_v = condition.editing.shape[1], condition.visual.shape[1]
    contexts = model.contexts(condition)
    return (K, K + N_v), torch.cat(noise * 2), t.repeat(2), contexts, torch.cat(latents)


def naive_project(attention, name, tokens):
    """Queries or keys of all heads, (n, tokens, D), in float64 from the weights."""
    linear, norm = getattr(attention, name), getattr(attention, f"norm_{name}")
    y = tokens.double().numpy() @ linear.weight.double().numpy().T + linear.bias.double().numpy()
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + norm.eps) * norm.weight.double().numpy()
    return y.reshape(len(tokens), attention.num_heads, -1).transpose(1, 0, 2)


def naive_attention(attention, x, context):
    """One branch without padding, in float64: all of softmax(q k^T / sqrt(D)), (n, S, N)."""
    q, k = naive_project(attention, "q", x), naive_project(attention, "k", context)
    weights = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
    return weights / weights.sum(-1, keepdims=True)


def naive_distribution(maps, token):
    """One token's map, averaged over the heads of (n, S, N), as a distribution."""
    p = maps[:, :, token].mean(0)
    return p / p.sum()


def naive_entropy(p):
    return -sum(x * math.log(x) for x in p) / math.log(len(p))


def naive_divergence(p, q):
    total = 0
    for a, b in zip(p, q, strict=True):
        total += a * math.log2(2 * a / (a + b)) + b * math.log2(2 * b / (a + b))
    return total / 2


def naive_measures(edit, ref, edit_features, ref_features, K, N_v):
    """Of one block and one pair, token by token, from (n, S, N) attention and (S, d) features."""
    measures = {}
    entropies = np.array([naive_entropy(naive_distribution(edit, j)) for j in range(edit.shape[2])])
    measures["entropy"] = entropies.mean()
    spans = {"editing": slice(0, K), "visual": slice(K, K + N_v), "textual": slice(K + N_v, None)}
    for name, span in spans.items():
        measures[f"mass_{name}"] = edit[:, :, span].sum(-1).mean()
        reads_it = len(entropies[span]) > 0
        measures[f"entropy_{name}"] = entropies[span].mean() if reads_it else math.nan
    lengths = np.linalg.norm(edit_features, axis=1) * np.linalg.norm(ref_features, axis=1)
    measures["cosine"] = ((edit_features * ref_features).sum(1) / lengths).mean()
    divergences = []
    for token in range(K):
        p, q = naive_distribution(edit, token), naive_distribution(ref, token)
        divergences.append(naive_divergence(p, q))
    measures["divergence"] = np.mean(divergences)
    return measures


@torch.no_grad()
def naive_trace(model, vae, seed, edit, caption):
    """`MEASURES` of every block, (L, 9): each branch alone, so without padding or masks."""
    _, z_t, t, _, latents = make_pairs(model, vae, [(seed, edit, caption)])
    clips = (make_clip(9, 32, 64, seed), make_clip(9, 32, 64, seed + 100))
    calls = []  # of the cross-attention of every block: module, inputs, output

    def record(*call):
        calls.append(call)

    hooks = [block.cross_attn.register_forward_hook(record) for block in model.dit.blocks]
    for i, (clip, text) in enumerate(zip(clips, (edit, caption), strict=True)):
        condition = model.encoder([clip], [text])
        model.dit(z_t[i : i + 1], t[i : i + 1], model.contexts(condition), latents[i : i + 1])
    for hook in hooks:
        hook.remove()

    K, N_v = condition.editing.shape[1], condition.visual.shape[1]
    L = len(model.dit.blocks)
    rows = []
    for edit_call, ref_call in zip(calls[:L], calls[L:], strict=True):
        maps, features = [], []
        for attention, (x, context, mask, *_), output in (edit_call, ref_call):
            assert mask is None
            maps.append(naive_attention(attention, x[0], context[0]))
            features.append(output[0].double().numpy())
        measures = naive_measures(*maps, *features, K, N_v)
        rows.append([measures[name] for name in analyze.MEASURES])
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected):
    """Number by number to 1e-5 relative (of at least 1e-3); NaN where NaN is expected."""
    assert torch.equal(actual.isnan(), expected.isnan())
    error = (actual.double() - expected).abs() / expected.abs().clamp(min=1e-3)
    assert error.nan_to_num().max() < 1e-5, error


# --- Against whole matrices -----------------------------------------------------------------------


@torch.no_grad()
def test_a_masked_batch_equals_whole_matrices_of_each_branch_alone(model_and_vae):
    """Two pairs whose four texts differ in length, every number to 1e-5 relative."""
    pairs = [(0, TEXTS[0], TEXTS[2]), (1, TEXTS[1], TEXTS[3])]
    inputs = make_pairs(*model_and_vae, pairs)
    together = analyze.trace(model_and_vae[0].dit, *inputs)
    assert together.shape == (3, 9, 2)
    mask = inputs[3][2][1]
    assert len(set(mask.sum(1).tolist())) > 2 and not mask.all()
    for i, pair in enumerate(pairs):
        expected = naive_trace(*model_and_vae, *pair)
        assert_close(together[..., i], expected)
        alone = analyze.trace(model_and_vae[0].dit, *make_pairs(*model_and_vae, [pair]))
        assert_close(alone[..., 0], expected)
        # There is something to measure: uneven maps, and branches that differ.
        named = dict(zip(analyze.MEASURES, expected.T, strict=True))
        assert named["entropy"].max() < 0.99
        assert named["divergence"].min() > 0.003
        assert named["cosine"].max() < 0.999
    assert not any(block.cross_attn._forward_hooks for block in model_and_vae[0].dit.blocks)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 10**6])
def test_the_size_of_the_chunks_changes_nothing(model_and_vae, chunk, monkeypatch):
    inputs = make_pairs(*model_and_vae, [(0, TEXTS[0], TEXTS[3])])
    expected = analyze.trace(model_and_vae[0].dit, *inputs)
    monkeypatch.setattr(analyze, "CHUNK", chunk)
    assert_close(analyze.trace(model_and_vae[0].dit, *inputs), expected.double())


def make_attention(heads=4, dim=8, seed=0):
    torch.manual_seed(seed)
    return Attention(DiTConfig(dim, 8, heads, 1, 1, 1, (1, 1, 1))).requires_grad_(False)


def test_no_tensor_is_as_large_as_the_attention_of_all_heads(monkeypatch):
    """n S N elements never exist at once; the largest tensor are the maps themselves, S N."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.elements = max(Largest.elements, out.numel())
            return out

    monkeypatch.setattr(analyze, "CHUNK", 16)
    x, context = torch.randn(1, 640, 8), torch.randn(1, 50, 8)
    with Largest():
        maps = analyze.attention_maps(make_attention(), x, context)
    assert Largest.elements == maps.numel() == 640 * 50


def test_bfloat16_attention_is_formed_in_float32():
    """From the same rounded q and k, the softmax has float32's accuracy."""
    attention = make_attention().bfloat16()
    x, context = torch.randn(1, 20, 8).bfloat16(), torch.randn(1, 10, 8).bfloat16()
    maps = analyze.attention_maps(attention, x, context)
    q = attention.norm_q(attention.q(x)).double().unflatten(-1, (4, 2))
    k = attention.norm_k(attention.k(context)).double().unflatten(-1, (4, 2))
    exact = (torch.einsum("bsnd,btnd->bnst", q, k) / math.sqrt(2)).softmax(-1).mean(1)
    assert maps.dtype == torch.float32 and relative_error(maps, exact) < 1e-6


# --- Closed forms ---------------------------------------------------------------------------------


def test_entropy_of_even_pointed_and_missing_maps():
    maps = torch.zeros(1, 7, 4)
    maps[0, :, 0] = 0.2  # even
    maps[0, 3, 1] = 0.9  # all at one position
    maps[0, :2, 2] = 0.1  # even over 2 of 7
    entropy = analyze.spatial_entropy(maps)[0]
    assert entropy[:3].tolist() == pytest.approx([1, 0, math.log(2) / math.log(7)], abs=1e-6)
    assert entropy[3].isnan()  # nothing attends to the last


def test_divergence_of_equal_disjoint_and_other_maps():
    p = torch.tensor([[0.3, 0.0, 0.1, 0.0], [0.2, 0.5, 0.0, 0.3], [0.1, 0.0, 0.0, 0.3]])[None]
    q = torch.tensor([[0.6, 0.7, 0.2, 0.1], [0.4, 0.0, 0.2, 0.1], [0.2, 0.0, 0.0, 0.0]])[None]
    # (1, 0) and (1/2, 1/2): H(3/4, 1/4) - (0 + 1) / 2
    mixed = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    # (0, 1/2, 1/2) and (1/2, 1/2, 0): H(1/4, 1/2, 1/4) - (1 + 1) / 2 = 3/2 - 1
    thirds = 0.5
    expected = [0, 1, mixed, thirds]
    assert analyze.jensen_shannon(p, q)[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert analyze.jensen_shannon(q, p)[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(analyze.jensen_shannon(p, p), torch.zeros(1, 4))


@torch.no_grad()
def test_equal_branches_agree_in_all(model_and_vae):
    dit = model_and_vae[0].dit
    streams, z_t, t, contexts, latents = make_pairs(*model_and_vae, [(0, TEXTS[0], TEXTS[3])])
    twice = []
    for context, mask in contexts:
        context = context[:1].repeat(2, 1, 1)
        twice.append((context, None if mask is None else mask[:1].repeat(2, 1)))
    measures = analyze.trace(dit, streams, z_t, t, twice, latents[:1].repeat(2, 1, 1, 1, 1))[..., 0]
    named = dict(zip(analyze.MEASURES, measures.T, strict=True))
    assert named["cosine"].tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert named["divergence"].abs().max() < 1e-6


@torch.no_grad()
def test_queries_of_nothing_attend_evenly():
    """Then masses are shares of the tokens, and maps are even and the same in both branches."""
    model, vae = tiny_model()
    for block in model.dit.blocks:
        block.cross_attn.q.weight.zero_()
        block.cross_attn.q.bias.zero_()
    inputs = make_pairs(model, vae, [(0, TEXTS[1], TEXTS[0])])
    (K, visual_end), deep_context = inputs[0], inputs[3][1]
    mask = deep_context[1][0]  # (N,)
    masses, entropies = slice(0, 3), slice(3, 7)
    measures = analyze.trace(model.dit, *inputs)[..., 0]
    assert measures[0, masses].tolist() == [1, 0, 0]  # L_s = 1
    assert measures[0, 3:5].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert measures[0, 5:7].isnan().all()
    numbers = [mask[:K].sum(), mask[K:visual_end].sum(), mask[visual_end:].sum()]
    shares = [(number / mask.sum()).item() for number in numbers]
    for row in measures[1:]:
        assert row[masses].tolist() == pytest.approx(shares, abs=1e-6)
        assert row[entropies].tolist() == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert measures[:, 8].abs().max() < 1e-6


# --- Over clips and t -----------------------------------------------------------------------------


def arguments(**changes):
    defaults = dict(clips=2, size=None, timesteps=3, seed=7)
    return type("Arguments", (), defaults | changes)


def a_triplet(**changes):
    triplet = {
        "source": make_clip(9, 40, 70),
        "target": make_clip(9, 32, 64, 1),
        "instruction": TEXTS[0],
        "caption": "",
    }
    return triplet | changes


def test_what_the_branches_are_given(monkeypatch):
    """z_t from VAE(v*) at the sampler's t, each clip's noise, and VAE(v) and VAE(v*) beside it."""
    model, vae = tiny_model()
    calls, texts = [], []
    model.encoder.register_forward_pre_hook(lambda _, inputs: texts.append(inputs[1]))

    def fake(dit, streams, z_t, t, contexts, latents):
        calls.append((z_t, t, latents))
        return torch.full((3, 9, 1), float(len(calls)))

    monkeypatch.setattr(analyze, "trace", fake)
    clips = [a_triplet(), a_triplet(caption=TEXTS[1])]
    result = analyze.analyze(model, vae, clips, arguments())
    assert texts == [[TEXTS[0], TEXTS[0]], [TEXTS[0], TEXTS[1]]]
    target = vae.encode(video.to_float(clips[0]["target"][None]))
    levels = [1, 5 * (2 / 3) / (1 + 4 * 2 / 3), 5 / 3 / (1 + 4 / 3)]  # of 3 steps, shifted by 5
    for i, (z_t, t, latents) in enumerate(calls):
        level = levels[i % 3]
        noise = sample.initial_noise(target.shape, 7 + i // 3)
        assert t.tolist() == pytest.approx([level, level])
        assert relative_error(z_t, ((1 - level) * target + level * noise).expand_as(z_t)) < 1e-5
        assert torch.equal(latents[1:], target) and not torch.equal(latents[:1], target)
    assert result["clips"] == 2 and result["num_blocks"] == 3 and result["routing_depth"] == 1
    for name in analyze.MEASURES:  # the traces are 1, 2, 3 and 4, 5, 6: means over t are 2 and 5
        assert result["mean"][name] == [3.5] * 3 and result["std"][name] == [1.5] * 3


def test_small_clips_are_measured_at_the_size_at_which_they_are_edited():
    """The built-in model's frames are scaled up to what it knows, here as in sampling."""
    config = dataclasses.replace(rvedit.preset("toy"), min_pixels=128**2)
    clip = torch.zeros(5, 64, 64, 3, dtype=torch.uint8)
    clips = [{"source": clip, "target": clip, "instruction": "remove it", "caption": ""}]
    args = argparse.Namespace(size=None)
    triplet = analyze.read_triplet(clips, 0, config, args)
    assert triplet.source.shape == triplet.target.shape == (5, 128, 128, 3)


# --- Command line ---------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    """The built-in checkpoint on two clips of shapes: JSON and a picture."""
    options = ["--clips", "2", "--timesteps", "2", "--size", "5", "64", "64", "--plot"]
    analyze.main([*options, "--out", str(tmp_path)])
    assert "analysis.png" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["analysis.json", "analysis.png"]
    report = json.loads((tmp_path / "analysis.json").read_text(), parse_constant=pytest.fail)
    model, base = report["model"], report["base"]
    assert (model["routing_depth"], base["routing_depth"]) == (3, 6)
    assert model["clips"] == base["clips"] == 2
    for result in (model, base):
        assert set(result["mean"]) == set(result["std"]) == set(analyze.MEASURES)
        for block in range(6):
            mean = {name: values[block] for name, values in result["mean"].items()}
            masses = [mean["mass_editing"], mean["mass_visual"], mean["mass_textual"]]
            assert sum(masses) == pytest.approx(1, abs=1e-5)
            if block < result["routing_depth"]:
                assert masses[0] == pytest.approx(1, abs=1e-6)
                assert mean["entropy_visual"] is None
            else:
                assert min(masses) > 0
                assert mean["entropy_visual"] is not None
            assert 0 < mean["entropy"] < 1
            assert 0 < mean["divergence"] < 1
            assert -1 < mean["cosine"] < 1
    for name in analyze.MEASURES:  # blocks that read the same see the same
        assert model["mean"][name][:3] == base["mean"][name][:3]

    with av.open(str(tmp_path / "analysis.png")) as file:
        image = next(file.decode(video=0)).to_ndarray(format="rgb24")
    height, width, _ = image.shape
    ink = (image < 200).any(-1)
    assert 600 < height < width < 3000
    assert 0.02 < ink.mean() < 0.5
    top, bottom = np.array_split(ink, 2)
    for quarter in (*np.array_split(top, 2, axis=1), *np.array_split(bottom, 2, axis=1)):
        assert quarter.mean() > 0.01


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of ours, with L_s = 1 and with L_s = L = 3, and a table of one triplet."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for depth in (1, 3):
        rvedit.save(folder / f"depth-{depth}", *tiny_model(routing_depth=depth))
    for name, size in (("source", (40, 70)), ("target", (32, 64))):
        video.write_video(folder / f"{name}.mp4", make_clip(5, *size))
    row = dict(src_video="source.mp4", tgt_video="target.mp4", prompt="remove it")
    (folder / "triplets.jsonl").write_text(json.dumps(row))
    return folder


def read_report(folder):
    return json.loads((folder / "analysis.json").read_text())


def test_the_small_world_has_its_own_shapes(tmp_path, monkeypatch):
    """Where the variants of the ablation live."""
    instructions = []

    def analyzed(model, vae, clips, args):
        instructions.extend(clip["instruction"] for clip in clips)
        return {}

    monkeypatch.setattr(analyze, "analyze", analyzed)
    small = ["--world", "small", "--size", "1", "64", "64", "--clips", "12"]
    analyze.main([*small, "--out", str(tmp_path)])
    words = set(" ".join(instructions).split())
    assert {"circle", "cross"} & words and not {"heart", "square", "ring"} & words
    assert not any(" and make " in text or " and remove " in text for text in instructions)


def test_base_checkpoint_and_triplets(checkpoints, tmp_path):
    """The base is --base, or else the same weights with L_s = L; such a model has no other base."""
    table = str(checkpoints / "triplets.jsonl")  # fewer rows than --clips
    shared = ["--data", table, "--timesteps", "1", "--out", str(tmp_path)]
    shallow, deep = (str(checkpoints / f"depth-{depth}") for depth in (1, 3))
    analyze.main([*shared, "--checkpoint", shallow, "--base", deep])
    given = read_report(tmp_path)
    analyze.main([*shared, "--checkpoint", shallow])
    default = read_report(tmp_path)
    assert given["model"]["clips"] == 1
    assert given["base"] == default["base"]  # whose weights are the same
    assert given["base"] != given["model"]

    narrow = tmp_path / "narrow"
    rvedit.save(narrow, *tiny_model(routing_depth=3, max_frames=1, max_pixels=32 * 32))
    analyze.main([*shared, "--checkpoint", shallow, "--base", str(narrow)])
    assert read_report(tmp_path)["base"] == given["base"]  # measured at the model's size

    analyze.main([*shared, "--checkpoint", deep])
    alone = read_report(tmp_path)
    assert alone["model"] == given["base"] and "base" not in alone
    assert not (tmp_path / "analysis.png").exists()


def test_no_more_of_a_clip_is_read_than_is_measured(checkpoints, tmp_path, monkeypatch):
    """As in training: a table of long clips, of which it takes 81 frames, would fill the memory."""
    monkeypatch.setattr(video, "_available_memory", lambda: 5 * 40 * 70 * 3)
    long, size = tmp_path / "long.mp4", ["--size", "5", "32", "32"]
    video.write_video(long, make_clip(30, 40, 70))
    row = dict(src_video=str(long), tgt_video=str(long.with_name("target.mp4")), prompt="remove it")
    video.write_video(row["tgt_video"], make_clip(30, 40, 70, 1))
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    shared = ["--checkpoint", str(checkpoints / "depth-3"), "--timesteps", "1", *size]
    analyze.main([*shared, "--data", str(tmp_path / "long.jsonl"), "--out", str(tmp_path)])
    assert read_report(tmp_path)["model"]["clips"] == 1


def test_clips_that_cannot_be_read_are_skipped_and_said(checkpoints, tmp_path, capsys):
    row = json.loads((checkpoints / "triplets.jsonl").read_text())

    def table(name, *rows):
        path = checkpoints / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(path)

    mixed = table("mixed.jsonl", row | {"src_video": "gone.mp4"}, row)
    none = table("none.jsonl", row | {"tgt_video": "gone.mp4"})
    shared = ["--checkpoint", str(checkpoints / "depth-3"), "--timesteps", "1"]
    analyze.main([*shared, "--data", mixed, "--out", str(tmp_path / "mixed")])
    assert read_report(tmp_path / "mixed")["model"]["clips"] == 1
    assert capsys.readouterr().err.count("skipped: ") == 1

    with pytest.raises(SystemExit) as stop:
        analyze.main([*shared, "--data", none, "--out", str(tmp_path / "none")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "gone.mp4" in error
    assert "error: none of the clips can be read" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
        (["--base", "nowhere"], "checkpoint nowhere does not exist"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--data", "nowhere.csv", "--world", "small"], "--world is about moving shapes"),
        (["--clips", "0"], "--clips: '0' is not a whole number of at least 1"),
        (["--size", "5", "64", "70"], "--size: height and width must be multiples of 8"),
        (["--timesteps", "many"], "--timesteps: 'many' is not a whole number"),
        (["--out", __file__], "test_analyze.py"),
    ],
)
def test_mistakes_get_one_line(options, words, tmp_path, capsys, monkeypatch):
    """And before any work, but for what only the model knows."""
    if "--size" not in options:
        monkeypatch.setattr(analyze, "analyze", pytest.fail)
    with pytest.raises(SystemExit) as stop:
        analyze.main(["--out", str(tmp_path), "--clips", "1", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    """Plots that were asked for are refused before the work; numbers need nothing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        analyze.main(["--plot", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "pip install matplotlib" in error and error.count("\n") == 1
    options = ["--clips", "1", "--timesteps", "1", "--size", "5", "32", "32"]
    analyze.main([*options, "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["analysis.json"]


def test_broken_weights_are_an_error():
    model, vae = tiny_model()
    with torch.no_grad():
        model.dit.blocks[1].cross_attn.q.weight[0, 0] = math.nan
    clips = [a_triplet(source=make_clip(5, 32, 64), target=make_clip(5, 32, 64, 1))]
    with pytest.raises(ValueError, match="not a number"):
        analyze.analyze(model, vae, clips, arguments(clips=1, timesteps=1))
