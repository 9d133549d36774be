"""How the small checkpoint is made and judged."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from helpers import make_clip, relative_error, tiny_model
from tokenizers import Tokenizer

import rvedit
import sample
from experiments import toy
from shapes import ShapesDataset


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_str(toy.train_tokenizer().to_str())


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


def test_words_of_the_instructions_are_tokens(tokenizer):
    """Clips that it was not trained on: hardly more tokens than words and signs."""
    shapes = ShapesDataset(11, 20, 5, 32, 32, toy.EVERYTHING)
    for clip in map(shapes.__getitem__, range(20)):
        for text in (clip["instruction"], clip["caption"]):
            words = text.replace(",", " ,").replace(".", " .").split()
            assert len(tokenizer.encode(text).ids) <= len(words) + 2, tokenizer.encode(text).tokens


def test_reconstruction_without_noise_is_encoding_and_decoding():
    _, vae = tiny_model()
    video = torch.rand(2, 3, 9, 16, 32) * 2 - 1
    with torch.no_grad():
        decoded, _ = toy.reconstruct(vae, video, torch.zeros(2))
        assert relative_error(decoded.clamp(-1, 1), vae.decode(vae.encode(video))) < 1e-5


def test_an_interrupted_vae_training_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """Stopped before step 4 of 3 + 3 and begun again: the same weights, bit for bit. The last 3 leave the encoder."""
    monkeypatch.setattr(toy, "CLIPS", ((2, 5, 32, 16), (1, 5, 32, 32)))
    monkeypatch.setattr(toy, "SAVE_SECONDS", 0)
    for name in "abc":
        (tmp_path / name).mkdir()
    whole = toy.train_vae(tmp_path / "a", (3, 3))
    shorter = toy.train_vae(tmp_path / "c", (3, 1)).state_dict()

    class Stops(toy.Crops):
        def __getitem__(self, step):
            if step == 4:
                raise KeyboardInterrupt
            return super().__getitem__(step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy, "Crops", Stops)
        toy.train_vae(tmp_path / "b", (3, 3))
    resumed = toy.train_vae(tmp_path / "b", (3, 3)).state_dict()
    start = toy.untrained_vae().state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed[name], value), name
        attention = ".middle.1." in name
        assert torch.equal(start[name], value) == attention, name
        assert torch.equal(shorter[name], value) == (
            attention or name.startswith(("encoder", "conv1"))
        ), name


def test_clips_are_edited_together_as_alone():
    """Three clips with instructions of different lengths give the frames of `edit_video`, up to a rounding."""
    model, vae = tiny_model(sampling_steps=3)
    clips = torch.stack([make_clip(5, 32, 64, seed) for seed in range(3)])
    texts = ["remove it", "make the small red circle in the corner green", "add snow"]
    together = toy.edit_clips(model, vae, clips, texts)
    for clip, text, edit in zip(clips, texts, together, strict=True):
        alone = sample.edit_video(model, vae, clip, text)
        assert (edit.int() - alone.int()).abs().max() <= 1
    assert (
        together[0].int() - together[1].int()
    ).abs().max() > 20  # the comparison is not of gray with gray


def synthetic_clip():
    source = torch.full((3, 4, 4, 3), 100, dtype=torch.uint8)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    target = torch.where(mask[..., None], 200, source).to(torch.uint8)
    return dict(source=source, target=target, mask=mask)


def test_scores_of_the_bounds():
    """The target is perfect; the source is right outside only, and is no edit."""
    clip = synthetic_clip()
    assert toy.score(clip["target"], clip, clip["target"]) == toy.Score(math.inf, math.inf, 0, True)
    inside = 10 * math.log10(255**2 / 100**2)
    assert toy.score(clip["source"], clip, clip["target"]) == pytest.approx(
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
    assert toy.score(output, clip, clip["target"]).edited is edited


@pytest.mark.parametrize(
    ("levels", "ceiling_levels", "edited"),
    [(9, 0, True), (11, 0, False), (11, 8, True), (20, 8, False)],
)
def test_an_edit_counts_only_if_the_rest_stays(levels, ceiling_levels, edited):
    """28 dB are 10.15 levels; where the VAE itself is off, 3 dB more than it."""
    clip = synthetic_clip()

    def off(by):
        return torch.where(clip["mask"][..., None], clip["target"], clip["target"] + by)

    result = toy.score(off(levels), clip, off(ceiling_levels))
    assert result.edited is edited and result.outside == pytest.approx(
        20 * math.log10(255 / levels)
    )


def test_temporal_error_is_of_the_changes():
    """An offset that stays costs nothing; a flicker of 10 levels in one of 3 frames is 10 levels in each of 2 steps."""
    clip = synthetic_clip()
    steady, flicker = clip["target"] + 10, clip["target"].clone()
    flicker[1] += 10
    assert toy.score(steady, clip, clip["target"]).temporal == 0
    assert toy.score(flicker, clip, clip["target"]).temporal == pytest.approx(10)


def test_a_mask_of_everything_has_no_outside():
    clip = synthetic_clip() | dict(mask=torch.ones(3, 4, 4, dtype=torch.bool))
    result = toy.score(clip["target"], clip, clip["source"])
    assert math.isnan(result.outside) and result.edited


def test_several_processes_are_refused_before_they_write_over_each_other(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        toy.main(["clips"])
    assert "toy.py is one process" in capsys.readouterr().err


@pytest.mark.slow
def test_one_command_makes_a_checkpoint_that_is_small_and_loads(tmp_path, monkeypatch, capsys):
    """All steps with hardly any training; a second call goes on from the first, with nothing left to do."""
    monkeypatch.setattr(rvedit, "TOY", tmp_path / "assets")
    monkeypatch.setattr(toy, "CLIPS", ((1, 5, 32, 16),))
    run = ["--run", str(tmp_path / "run")]
    options = ["--steps", "1", "--batch", "2", "--size", "9", "32", "32", "--workers", "0"]
    toy.main([*run, "--vae-steps", "1", "1", "vae"])
    for stage in (
        "clips",
        "large_clips",
        "large_stills",
        "small_editor",
        "narrow_editor",
        "editor",
        "ablate",
    ):
        with pytest.raises(SystemExit, match="2"):
            toy.main([*run, stage])
        assert "does not exist yet: an earlier stage makes it" in capsys.readouterr().err
    toy.main([*run, "stills", *options])
    toy.main([*run, "clips", *options])
    base, start = (rvedit.load(tmp_path / "run" / name)[0] for name in ("clips/model", "base"))
    assert (base.config.routing_depth, base.config.align_weight) == (6, 0)
    assert start.config == dataclasses.replace(
        rvedit.preset("toy"), vae=start.config.vae, dit=base.config.dit
    )
    trained = base.encoder.editing_connector.state_dict()
    assert all(
        torch.equal(trained[name], p)
        for name, p in start.encoder.visual_connector.state_dict().items()
    )
    for stage in ("large_clips", "large_stills", "small_editor", "narrow_editor"):
        toy.main([*run, stage, *options])
    stills, narrow = (
        rvedit.load(tmp_path / "run" / name / "model")[0]
        for name in ("large_stills", "narrow_editor")
    )
    assert stills.config == dataclasses.replace(narrow.config, align_weight=0)
    assert narrow.config == start.config
    toy.main(
        [
            *run,
            "editor",
            "--steps",
            "1",
            "--batch",
            "2",
            "--size",
            "5",
            "64",
            "64",
            "--workers",
            "1",
        ]
    )
    toy.main(run)
    assert rvedit.load()[0].config == dataclasses.replace(
        rvedit.preset("toy"), vae=start.config.vae
    )
    size = sum(file.stat().st_size for file in (tmp_path / "assets").iterdir())
    assert size < 18e6
    stored = {file.name: file.read_bytes() for file in (tmp_path / "assets").iterdir()}
    toy.main(run)
    assert stored == {file.name: file.read_bytes() for file in (tmp_path / "assets").iterdir()}
    capsys.readouterr()
    toy.main(["evaluate", "--clips", "1", "--size", "32"])
    table = capsys.readouterr().out
    assert [
        table.count(name) for name in ("Local Add", "source unchanged", "target through the VAE")
    ] == [3, 5, 5]


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
def test_the_built_in_checkpoint_edits(monkeypatch, category, share, inside, possible):
    """The README's table, with a margin."""
    monkeypatch.setattr(toy, "EVERYTHING", (category,))
    (_, _, edit), (_, _, source), (_, _, ceiling) = toy.assess(
        *rvedit.load(), seed=2026, number=50, frames=9, size=128
    )
    assert edit[3] >= share and edit[0] > inside
    assert source[3] == 0 and ceiling[3] >= possible


@pytest.mark.slow
def test_the_ablation_trains_every_variant_once(tmp_path, monkeypatch, capsys):
    """Its table has the mean and the spread of what the runs' folders hold; a second call trains nothing."""
    variants = {"full": [], "w/o GRTC (L_s = L)": ["--routing-depth", "6"]}
    monkeypatch.setitem(toy.VARIANTS, "components", variants)
    shutil.copytree(rvedit.TOY, tmp_path / "base")
    run = ["--run", str(tmp_path), "ablate", "--seeds", "2", "--clips", "1"]
    toy.main([*run, "--steps", "1", "--batch", "1", "--size", "5", "32", "32", "--workers", "0"])
    table = capsys.readouterr().out.splitlines()[-4:]
    folders = sorted(folder.name for folder in (tmp_path / "ablate").iterdir())
    assert folders == ["full-0", "full-1", "w-o-L-s-L-0", "w-o-L-s-L-1"]
    depths = [
        rvedit.load(tmp_path / "ablate" / name / "model")[0].config.routing_depth
        for name in folders
    ]
    assert depths == [3, 3, 6, 6]
    scores = [
        json.loads((tmp_path / "ablate" / name / "scores.json").read_text()) for name in folders[:2]
    ]
    inside = [score["Local Add"][0] for score in scores]
    mean, half = sum(inside) / 2, abs(inside[0] - inside[1]) / 2
    assert table[2].split("|")[5].strip().endswith(f", {mean:.1f} ± {half:.1f} dB")
    monkeypatch.setattr(toy.train, "main", None)
    toy.main(run)
    assert capsys.readouterr().out.splitlines() == table
