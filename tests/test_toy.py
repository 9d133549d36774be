"""How the built-in model is made, and how it is scored."""

import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import av
import pytest
import torch
from helpers import make_clip, relative_error, tiny_model
from tokenizers import Tokenizer

import cli
import data
import rvedit
import sample
import video
from experiments import ablation, scoring, toy
from scenes import CATEGORIES, EVERYTHING, NOT_THERE
from shapes import ShapesDataset


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_str(toy.train_tokenizer().to_str())


# --- The tokenizer --------------------------------------------------------------------------------


def test_the_tokenizer_fits_the_preset(tokenizer):
    qwen = rvedit.preset("toy").qwen
    assert tokenizer.token_to_id("<|video_pad|>") == qwen.video_token_id
    assert tokenizer.token_to_id("<|object_ref_start|>") == qwen.query_token_id
    assert tokenizer.get_vocab_size() <= qwen.vocab_size


@pytest.mark.parametrize(
    "text", ["Remove the circle.", "add  snow ☃ to 日本\n\t🙂", "<|im_end|>", "\x00\x7f\u200b"]
)
def test_the_tokenizer_encodes_any_text(tokenizer, text):
    """Bytes are its alphabet, so that every text comes back as it was."""
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(("words", "most"), [("plain", 1.15), ("people", 1.4)])
def test_words_of_the_instructions_are_tokens(tokenizer, words, most):
    """Of clips that it was not trained on: hardly more tokens than words and signs."""
    shapes = ShapesDataset(11, 60, 5, 32, 32, EVERYTHING, coarse=True, words=words)
    num_words = num_tokens = 0
    for index in range(60):
        text = shapes.sample(index).instruction
        num_words += len(text.replace(",", " ,").replace(".", " .").split())
        num_tokens += len(tokenizer.encode(text).ids)
    assert num_tokens <= most * num_words


# --- The recipe -----------------------------------------------------------------------------------


def test_reconstruction_without_noise_is_encoding_and_decoding():
    _, vae = tiny_model()
    video = torch.rand(2, 3, 9, 16, 32) * 2 - 1
    with torch.no_grad():
        decoded = toy.reconstruct(vae, video, torch.zeros(2))
        assert relative_error(decoded.clamp(-1, 1), vae.decode(vae.encode(video))) < 1e-5


def test_the_decoder_alone_leaves_the_latents_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "CROPS", ((2, 5, 32, 16), (1, 5, 32, 32)))
    whole = toy.train_vae(tmp_path / "vae.pt", (2, 1)).state_dict()
    start = toy.untrained_vae().state_dict()
    (tmp_path / "vae.pt").unlink()
    longer = toy.train_vae(tmp_path / "vae.pt", (2, 2)).state_dict()
    for name, value in whole.items():
        of_encoder = name.startswith(("encoder", "conv1"))
        of_attention = ".middle.1." in name
        assert torch.equal(start[name], value) == of_attention, name
        assert torch.equal(longer[name], value) == (of_encoder or of_attention), name


def test_the_editor_meets_stills_and_clips_of_many_sizes():
    """All are of 4k + 1 frames and of sides that the model takes, from 64 to 192."""
    factor = rvedit.preset("toy").spatial_factor
    shapes = set()
    for T, H, W in toy.EDITOR_SIZES:
        assert (T - 1) % 4 == 0 and H % factor == W % factor == 0
        assert min(H, W) >= 64 and max(H, W) <= 192
        shapes.add("square" if H == W else "portrait" if H > W else "landscape")
    assert {T for T, _, _ in toy.EDITOR_SIZES} == {1, 5, 9, 17}
    assert shapes == {"square", "portrait", "landscape"}


@pytest.fixture
def tiny_recipe(monkeypatch):
    """The recipe with a small editor, on small clips, of which few make a minibatch."""
    shipped = rvedit.preset("toy")
    dit = replace(shipped.dit, dim=64, ffn_dim=96, num_heads=2, num_blocks=2)
    small = replace(shipped, dit=dit, routing_depth=1)
    monkeypatch.setattr(rvedit, "preset", lambda _: small)
    monkeypatch.setattr(toy, "CROPS", ((1, 5, 32, 16), (1, 1, 32, 32)))
    monkeypatch.setattr(toy, "EDITOR_SIZES", ((5, 32, 48), (1, 32, 32)))
    monkeypatch.setattr(toy, "SAVE_SECONDS", 0)
    options = "--vae-steps 12 8 --steps 20 --train --batch 2 "
    options += "--accumulate 1 --workers 0"
    return options.split()


def stop_at(monkeypatch, dataset, step, error):
    """Let a data set of minibatches stop once, at a step."""
    kept = dataset.__getitem__
    stopped = []

    def getitem(self, key):
        if not stopped and key == step:
            stopped.append(step)
            error()
        return kept(self, key)

    monkeypatch.setattr(dataset, "__getitem__", getitem)


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_one_command_makes_the_model_and_goes_on_where_it_was_stopped(
    tmp_path, monkeypatch, tiny_recipe
):
    """Stopped in both of its trainings and begun again, it ends bit for bit the same."""
    toy.main(["--run", str(tmp_path / "whole"), *tiny_recipe])
    for dataset, step, error in (
        (toy.Crops, 15, interrupt),
        (data.Batches, (11, 0), terminate),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, dataset, step, error)
            toy.main(["--run", str(tmp_path / "parts"), *tiny_recipe])
    toy.main(["--run", str(tmp_path / "parts"), *tiny_recipe])
    files = sorted(file.name for file in (tmp_path / "whole" / "model").iterdir())
    for name in files:
        whole, parts = (tmp_path / run / "model" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name

    # Done is done: nothing is trained or written again.
    for part in ("train_vae", "write_start", "export"):
        monkeypatch.setattr(toy, part, None)
    monkeypatch.setattr(toy.train, "main", None)
    toy.main(["--run", str(tmp_path / "whole"), *tiny_recipe])

    model, vae = rvedit.load(tmp_path / "whole" / "model")
    expected = rvedit.preset("toy")
    assert model.config.dit == expected.dit
    assert model.config.routing_depth == expected.routing_depth
    assert model.config.align_weight == expected.align_weight > 0
    assert model.config.max_frames == 5 and model.config.max_pixels == 32 * 48
    assert model.config.min_pixels == 32 * 32


# --- Scores ---------------------------------------------------------------------------------------


def synthetic_clip():
    source = torch.full((3, 4, 4, 3), 100, dtype=torch.uint8)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    target = torch.where(mask[..., None], 200, source).to(torch.uint8)
    return dict(source=source, target=target, mask=mask)


def test_scores_of_the_bounds():
    """The target is perfect; the source is right outside only, and is no edit."""
    clip = synthetic_clip()
    perfect = scoring.Score(math.inf, math.inf, 0, True)
    assert scoring.score(clip["target"], clip, clip["target"]) == perfect
    inside = 10 * math.log10(255**2 / 100**2)
    assert scoring.score(clip["source"], clip, clip["target"]) == pytest.approx(
        (inside, math.inf, 0, False)
    )


@pytest.mark.parametrize(
    ("done", "edited"), [(0.6, False), (0.66, False), (0.67, True), (1.0, True)]
)
def test_an_edit_counts_from_two_thirds_of_the_way(done, edited):
    """A quarter of the squared error is half of the error: (1 - x) <= x / 2."""
    clip = synthetic_clip()
    output = torch.where(clip["mask"][..., None], 100 + round(100 * done), clip["source"]).to(
        torch.uint8
    )
    assert scoring.score(output, clip, clip["target"]).edited is edited


@pytest.mark.parametrize(
    ("levels", "ceiling_levels", "edited"),
    [(9, 0, True), (11, 0, False), (11, 8, True), (20, 8, False)],
)
def test_an_edit_counts_only_if_the_rest_stays(levels, ceiling_levels, edited):
    """28 dB are 10.15 levels; where the VAE itself is off, 3 dB more than it."""
    clip = synthetic_clip()

    def off(by):
        return torch.where(clip["mask"][..., None], clip["target"], clip["target"] + by)

    result = scoring.score(off(levels), clip, off(ceiling_levels))
    assert result.edited is edited and result.outside == pytest.approx(
        20 * math.log10(255 / levels)
    )


def test_temporal_error_is_of_the_changes():
    """An offset that stays costs nothing; a flicker in one of 3 frames counts in 2 steps."""
    clip = synthetic_clip()
    steady, flicker = clip["target"] + 10, clip["target"].clone()
    flicker[1] += 10
    assert scoring.score(steady, clip, clip["target"]).temporal == 0
    assert scoring.score(flicker, clip, clip["target"]).temporal == pytest.approx(10)


def test_a_mask_of_everything_has_no_outside():
    clip = synthetic_clip() | dict(mask=torch.ones(3, 4, 4, dtype=torch.bool))
    result = scoring.score(clip["target"], clip, clip["source"])
    assert math.isnan(result.outside) and result.edited


def test_a_request_that_changes_nothing_is_met_by_the_source():
    """Its mask is empty: only what stays is scored."""
    clip = synthetic_clip()
    clip |= dict(target=clip["source"], mask=torch.zeros(3, 4, 4, dtype=torch.bool))
    result = scoring.score(clip["source"], clip, clip["source"])
    assert math.isnan(result.inside) and result.edited
    assert not scoring.score(clip["source"] + 60, clip, clip["source"]).edited


def test_evaluation_prints_every_category_in_every_wording(capsys):
    model, vae = tiny_model(sampling_steps=1)
    scoring.evaluate(model, vae, 0, 1, (1, 32, 64), "held-out")
    table = capsys.readouterr().out
    for name in (*EVERYTHING, NOT_THERE):
        assert table.count(name) == 3
    assert table.count("target through the VAE") == 6
    assert "nan" not in table  # stills have no temporal error


# --- Requests in a person's words -----------------------------------------------------------------


def test_requests_are_read_by_line(tmp_path):
    file = tmp_path / "requests.txt"
    file.write_text("# of the sample clip\n\nremove the ball\n  b/w \n", "utf-8-sig")
    assert scoring.read_requests(file) == ["remove the ball", "b/w"]
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="requests.txt holds no requests"):
        scoring.read_requests(file)


def test_our_own_list_has_sixty_different_requests():
    requests = scoring.read_requests(rvedit.TOY.parents[1] / "experiments" / "requests.txt")
    assert len(set(requests)) == len(requests) >= 60


def test_the_contact_sheet_shows_the_clip_and_its_edits(tmp_path, monkeypatch, capsys):
    """The sheet has a tile for each, in order; the last line counts what did something."""
    clip = make_clip(5, 32, 48)
    edits = iter([clip, 255 - clip])
    monkeypatch.setattr(scoring.sample, "edit_video", lambda *_: next(edits))
    monkeypatch.setattr(scoring.video, "read_video", lambda _: SimpleNamespace(frames=clip))
    requests = tmp_path / "requests.txt"
    requests.write_text("nothing\ninvert it\n")
    scoring.try_requests(None, None, requests, tmp_path / "clip.mp4", tmp_path / "sheet.png", 2)
    assert "1 of 2 requests change the clip" in capsys.readouterr().out
    with av.open(str(tmp_path / "sheet.png")) as file:
        (frame,) = file.decode(video=0)
    sheet = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    assert sheet.shape == (72, 104, 3)
    assert torch.equal(sheet[2:34, 2:50], clip[2])
    assert torch.equal(sheet[2:34, 54:102], clip[2])
    assert torch.equal(sheet[38:70, 2:50], 255 - clip[2])


# --- Command line ---------------------------------------------------------------------------------


def test_several_processes_are_refused_before_they_write_over_each_other(monkeypatch, capsys):
    monkeypatch.setattr(cli, "RANKS", 2)
    with pytest.raises(SystemExit, match="2"):
        toy.main([])
    assert "toy is one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ablate", "--run", "x"], "unrecognized arguments: --run x"),
        (["evaluate", "--natural", "x"], "--natural FILE and --video CLIP go together"),
        (["evaluate", "--natural", "nowhere.txt", "--video", "x"], "nowhere.txt"),
        (["evaluate", "--lr", "1"], "unrecognized arguments: --lr 1"),
        (["evaluate", "--size", "8", "64", "64"], "--size 8 64 64: take 4k + 1 frames with sides"),
        (["evaluate", "--size", "9", "60", "64"], "--size 9 60 64: take 4k + 1 frames with sides"),
        (["ablate", "--seeds", "1"], "invalid choice: 1"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        toy.main(options)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# --- Slow -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    (
        "category",
        "share",
        "inside",
        "possible",
    ),  # the last: of the targets themselves, through the VAE
    [
        ("Local Change", 0.92, 19.9, 0.98),
        ("Local Remove", 0.96, 26.5, 1),
        ("Local Add", 0.98, 23.0, 1),
        ("Global Style", 0.98, 32.7, 1),
        ("Composition", 0.88, 23.7, 1),
    ],
)
def test_the_built_in_checkpoint_edits(category, share, inside, possible):
    """The README's table, with a margin."""
    (_, _, edit), (_, _, source), (_, _, ceiling) = scoring.assess(
        *rvedit.load(), seed=2026, number=50, extent=(9, 128, 128), categories=(category,)
    )
    assert edit[3] >= share and edit[0] > inside
    assert source[3] == 0 and ceiling[3] >= possible


def test_student_t_covers_95_percent():
    """The density of Student's t for n - 1 degrees of freedom, integrated."""
    for seeds, quantile in ablation.STUDENT_T.items():
        degrees = seeds - 1
        t = torch.linspace(-quantile, quantile, 200_001, dtype=torch.float64)
        density = (1 + t.square() / degrees) ** (-(degrees + 1) / 2)
        log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
        scale = math.exp(log_scale) / math.sqrt(degrees * math.pi)
        assert scale * torch.trapezoid(density, t).item() == pytest.approx(0.95, abs=1e-4)


def test_variants_are_compared_seed_by_seed(capsys):
    """What the seeds have in common is no uncertainty of a difference."""

    def run(edited, inside):
        return {category: [inside, 30.0, 1.0, edited] for category in CATEGORIES}

    full = [run(0.2, 10.0), run(0.5, 20.0), run(0.8, 30.0)]
    other = [run(0.3, 10.5), run(0.6, 20.5), run(1.0, 30.8)]
    ablation.print_tables({"full": full, "other": other})
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| full | 50 %, 20.0 dB |")
    # Differences of 10, 10 and 20 %: mean 13.3, standard deviation 5.77, times 4.303 / sqrt(3).
    assert lines[-1].startswith("| other | +13 ± 14 %, +0.60 ± 0.43 dB |")


def test_variants_start_from_the_trained_mllm_and_a_random_dit(tmp_path):
    built_in, built_in_vae = rvedit.load()
    ablation.write_start(tmp_path / "start")
    model, vae = rvedit.load(tmp_path / "start")
    weights = model.state_dict()
    for name, trained in built_in.encoder.state_dict().items():
        same = torch.equal(weights[f"encoder.{name}"], trained)
        assert same == ("connector" not in name), name
    for name, trained in built_in_vae.state_dict().items():
        assert torch.equal(vae.state_dict()[name], trained)
    assert not weights["dit.head.head.weight"].any()  # a new DiT predicts no motion


@pytest.mark.slow
def test_the_ablation_trains_every_variant_once(tmp_path, monkeypatch, capsys):
    """Its tables come from the runs' scores and logs; a second call trains nothing."""
    variants = {"full": [], "w/o GRTC (L_s = L)": ["--routing-depth", "6"]}
    monkeypatch.setitem(ablation.VARIANTS, "components", variants)
    monkeypatch.setattr(ablation, "SIZE", (5, 32, 32))
    ablate = ["--run", str(tmp_path), "ablate", "--seeds", "2", "--variant-steps", "1"]
    options = ["--train", "--batch", "1", "--workers", "0", "--log-gradients", "1"]
    command = [*ablate, "--clips", "1", *options]
    toy.main(command)
    tables = capsys.readouterr().out.splitlines()[-14:]
    runs = tmp_path / "ablate"
    folders = sorted(folder.name for folder in runs.iterdir() if (folder / "model").exists())
    assert folders == ["full-0", "full-1", "w-o-GRTC-L-s-L-0", "w-o-GRTC-L-s-L-1"]
    depths = [rvedit.load(runs / name / "model")[0].config.routing_depth for name in folders]
    assert depths == [3, 3, 6, 6]
    scores = [json.loads((runs / name / "scores.json").read_text()) for name in folders[:2]]
    inside = sum(score["scores"]["Local Add"][0] for score in scores) / 2
    assert tables[2].split("|")[5].strip().endswith(f", {inside:.1f} dB")
    flow, align = tables[-2].removeprefix("full: ").split(", ")
    assert float(flow) > 0 and float(align) > 0
    monkeypatch.setattr(toy.train, "main", None)
    toy.main(command)
    assert capsys.readouterr().out.splitlines() == tables

    # Scores of other clips are no scores of these.
    with pytest.raises(SystemExit, match="2"):
        toy.main([*ablate, "--clips", "2", *options])
    assert "scores.json is of other steps, clips or options" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked, plain",
    [
        ("get rid of the star", "remove the orange star"),
        ("no red circle", "remove the red circle"),
        ("turn the ring purple", "make the green ring purple"),
        ("could you color the donut red please", "make the green ring red"),
        ("paint the ball yellow", "make the red circle yellow"),
        ("b/w", "turn the video into a black and white film"),
    ],
)
def test_people_s_words_do_what_plain_words_do(asked, plain):
    model, vae = rvedit.load()
    source = video.read_video(rvedit.TOY.parent / "shapes.mp4").frames
    edits = [sample.edit_video(model, vae, source, text) for text in (asked, plain)]
    assert scoring.changed_share(source, edits[0]) > 0.05
    assert scoring.changed_share(*edits) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 96])
def test_the_built_in_checkpoint_adds_to_smaller_clips(side):
    """It was trained on 128 x 128 only; at these sizes it added nothing."""
    (_, _, edit), *_ = scoring.assess(
        *rvedit.load(), seed=2026, number=12, extent=(9, side, side), categories=("Local Add",)
    )
    assert edit[3] >= 0.75
