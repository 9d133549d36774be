"""Algorithm 2, the way from clip to clip, and the command line with all that can go wrong in it."""

import dataclasses
import functools
import itertools
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import make_clip, relative_error, tiny_model
from test_video import encode

import cli
import rvedit
import sample
import scenes
import video
from experiments import plan, workloads
from mllm import EditEncoder
from model import WanDiT
from shapes import ShapesDataset
from vae import WAN2_2_VAE

ROOT = Path(__file__).parents[1]
REAL_CLIPS = (
    "bigbuckbunny_1280x720_audio.mp4",
    "monkey_1280x720_20fps_101f.mp4",
    "monkey_832x480_16fps_81f.mp4",
)
NTSC = Fraction(30000, 1001)


# --- The sampler ----------------------------------------------------------------------------------


def test_the_schedule_is_the_shifted_line():
    ts = sample.timesteps(4, 5.0)
    u = [1, 0.75, 0.5, 0.25, 0]
    assert torch.allclose(ts, torch.tensor([5 * x / (1 + 4 * x) for x in u]), atol=1e-7, rtol=0)
    assert torch.equal(sample.timesteps(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_euler_equals_diffusers():
    """Given our sigmas, diffusers' scheduler takes the same steps through a nonlinear field."""
    ts, noise = sample.timesteps(7, 5.0), torch.randn(1, 4, 3, 2, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=ts[:-1].tolist())
    expected = noise
    for t in scheduler.timesteps:
        expected = scheduler.step(torch.tanh(expected) * t / 1000, t, expected, return_dict=False)[
            0
        ]
    assert (
        relative_error(sample.denoise(lambda z, t: torch.tanh(z) * t, noise, 7, 5.0), expected)
        < 1e-5
    )


def test_euler_finds_the_clean_latents():
    """With the exact velocity of a straight path, any number of steps ends at its clean end."""
    clean, noise = torch.randn(2, 1, 4, 3, 2, 2)
    for steps in (1, 3):
        assert (
            relative_error(sample.denoise(lambda z, t: noise - clean, noise, steps, 5.0), clean)
            < 1e-5
        )


def test_noise_depends_on_the_seed_alone():
    assert torch.equal(sample.initial_noise((1, 2, 3), 5), sample.initial_noise((1, 2, 3), 5))
    assert not torch.equal(sample.initial_noise((1, 2, 3), 5), sample.initial_noise((1, 2, 3), 6))


# --- Windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, size", [(1, 21), (21, 21), (22, 21), (38, 21), (251, 21), (7, 5), (6, 1), (9, 3)]
)
def test_windows_cover_the_clip_and_leave_no_seam(length, size):
    """Every frame lies in a window of the right size, and their weights sum to 1."""
    slices = sample.windows(length, size)
    assert all(s.stop - s.start == min(size, length) for s in slices)
    assert slices[0].start == 0 and slices[-1].stop == length
    assert all(
        0 < b.start - a.start and a.stop - b.start >= size // 4
        for a, b in zip(slices, slices[1:], strict=False)
    )
    total = torch.zeros(length, 1, 1)
    for window, weight in zip(slices, sample.window_weights(slices, length), strict=True):
        total[window] += weight
    assert torch.allclose(total, torch.ones(length, 1, 1), atol=1e-6, rtol=0)


def test_neighbouring_windows_cross_over_linearly():
    """From one window to the next, the weight moves in equal steps."""
    # [0, 8) and [5, 13): the last is moved back, and three frames are shared
    slices = sample.windows(13, 8)
    _, second = sample.window_weights(slices, 13)
    expected = torch.tensor([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert torch.allclose(second.flatten(), expected, atol=1e-6)


@torch.no_grad()
def test_long_clips_are_denoised_in_windows_of_their_own():
    """33 frames at windows of 17: each gets its own latents, source latents and MLLM frames."""
    model, vae = tiny_model()
    frames, calls, seen = make_clip(33, 32, 32), [], []
    velocity = model.dit.forward
    model.dit.forward = lambda z, t, contexts, source: (
        calls.append((z, source)) or velocity(z, t, contexts, source)
    )
    prepare = model.encoder.prepare
    model.encoder.prepare = lambda clips, texts: seen.extend(clips) or prepare(clips, texts)
    sample.edit_video(model, vae, frames, "add snow", steps=1)
    latents = vae.encode(frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
    for (z, source), where in zip(calls, (slice(0, 5), slice(4, 9)), strict=True):
        assert torch.equal(z, sample.initial_noise(latents.shape, 0)[:, :, where])
        assert relative_error(source, latents[:, :, where]) < 1e-5
    limit = model.config.max_mllm_frames
    for clip, (first, last) in zip(seen, ((0, 16), (13, 32)), strict=True):
        chosen = first + np.linspace(0, last - first, limit).round().astype(int)
        assert torch.equal(clip, frames[chosen])


# --- From clip to clip ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, max_pixels, factor, expected",
    [
        (720, 1280, 704 * 1280, 32, (704, 1280)),  # the paper's 720p
        (1280, 720, 704 * 1280, 32, (1280, 704)),
        (480, 832, 704 * 1280, 32, (480, 832)),  # never scaled up
        (2160, 3840, 704 * 1280, 32, (704, 1280)),
        (1, 1, 704 * 1280, 32, (32, 32)),
        (479, 833, 704 * 1280, 32, (480, 832)),
        (100, 5000, 128**2, 16, (16, 912)),
        (50, 50, 48 * 48, 32, (32, 64)),  # 64 x 64 is nearest and does not fit: one side gives way
    ],
)
def test_the_model_works_at_the_nearest_size_that_fits(height, width, max_pixels, factor, expected):
    assert sample.model_size(height, width, max_pixels, factor) == expected


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (64, 64, (128, 128)),
        (54, 96, (96, 168)),
        (96, 168, (96, 168)),
        (128, 128, (128, 128)),
        (720, 1280, (96, 168)),
        (1, 1, (128, 128)),
    ],
)
def test_small_frames_are_scaled_up_for_a_model_that_knows_larger_ones(height, width, expected):
    assert sample.model_size(height, width, 128**2, 8, min_pixels=128**2) == expected
    # The upper limit counts where both are given and contradict each other.
    assert sample.model_size(64, 64, 64**2, 8, min_pixels=128**2) == (64, 64)


@torch.no_grad()
def test_edit_video_is_algorithm_2():
    """The whole path again, line by line, on a clip that needs no resizing and no window."""
    model, vae = tiny_model()
    frames, text = make_clip(7, 32, 64), "remove the square"
    padded = torch.cat((frames, frames[-1:].expand(2, -1, -1, -1)))  # to 4k + 1
    contexts = model.contexts(model.encoder([padded], [text]))
    source = vae.encode(padded.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
    z, ts = torch.randn(source.shape, generator=torch.Generator().manual_seed(3)), [1, 1.5 / 2, 0.0]
    for t, following in zip(ts, ts[1:], strict=False):
        z = z - (t - following) * model.dit(z, torch.tensor([t]), contexts, source)
    expected = ((vae.decode(z)[0].permute(1, 2, 3, 0) + 1) * 127.5).round()[:7]
    edited = sample.edit_video(model, vae, frames, text, steps=2, shift=3.0, seed=3)
    assert edited.dtype == torch.uint8 and edited.shape == frames.shape
    assert (
        edited.float() - expected
    ).abs().max() <= 1  # one level where rounding falls the other way
    assert edited.float().std() > 5  # a random VAE's picture, not a constant


def test_the_encoder_is_given_prepared_frames(monkeypatch):
    """FSDP2 moves what `encoder(...)` gets to the GPU, but frames are prepared on the CPU."""
    monkeypatch.setattr(EditEncoder, "forward", pytest.fail)
    sample.edit_video(*tiny_model(), make_clip(5, 32, 32), "add snow", steps=1)


def test_the_same_seed_gives_the_same_frames_offloaded_or_not():
    model, vae = tiny_model()
    frames = make_clip(5, 40, 30)
    first = sample.edit_video(model, vae, frames, "add snow", steps=2, seed=1)
    assert torch.equal(first, sample.edit_video(model, vae, frames, "add snow", steps=2, seed=1))
    offloaded = sample.edit_video(
        model, vae, frames, "add snow", steps=2, seed=1, device=torch.device("cpu")
    )
    assert torch.equal(first, offloaded)
    assert not torch.equal(
        first, sample.edit_video(model, vae, frames, "add snow", steps=2, seed=2)
    )


def test_without_a_number_of_steps_it_is_the_models(tmp_path, monkeypatch, capsys):
    model, vae = tiny_model(sampling_steps=3)
    frames = make_clip(5, 32, 32)
    edit = sample.edit_video(model, vae, frames, "add snow")
    assert torch.equal(edit, sample.edit_video(model, vae, frames, "add snow", steps=3))
    assert not torch.equal(edit, sample.edit_video(model, vae, frames, "add snow", steps=2))
    rvedit.save(tmp_path / "tiny", model, vae)

    def say_steps(self, clip, instruction, steps, *_):
        raise ValueError(f"steps: {steps}")

    monkeypatch.setattr(sample.Inference, "edit_latents", say_steps)
    clip = str(ROOT / "assets" / "shapes.mp4")
    words = ["--video", clip, "--prompt", "x", "--out", str(tmp_path / "out.mp4")]
    for given, steps in (([], 3), (["--steps", "2"], 2)):
        with pytest.raises(SystemExit):
            sample.main([*words, "--checkpoint", str(tmp_path / "tiny"), *given])
        assert f"steps: {steps}\n" in capsys.readouterr().err
    assert rvedit.preset("wan2.2-ti2v-5b").sampling_steps == 50


@torch.no_grad()
def test_offloading_keeps_only_the_network_in_use_on_the_device():
    """Each network is moved there before it runs, alone, and back afterwards."""
    model, vae = tiny_model()
    networks = {"encoder": model.encoder, "dit": model.dit}
    networks |= {
        f"vae.{name}": getattr(vae, name) for name in ("encoder", "conv1", "conv2", "decoder")
    }
    present, seen = set(), {}
    for name, module in networks.items():
        module.to = lambda device, name=name: present.add(name)
        module.cpu = lambda name=name: present.discard(name)
        part = module.qwen if name == "encoder" else module  # whose `forward` is not what runs
        part.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: set(present)})
        )
    sample.edit_video(
        model, vae, make_clip(5, 32, 32), "add snow", steps=1, device=torch.device("cpu")
    )
    encode, decode = {"vae.encoder", "vae.conv1"}, {"vae.decoder", "vae.conv2"}
    expected = (
        {"encoder": {"encoder"}, "dit": {"dit"}}
        | dict.fromkeys(encode, encode)
        | dict.fromkeys(decode, decode)
    )
    assert seen == expected and not present


# --- The command line -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    rvedit.save(folder, *tiny_model())
    return folder


def contents(path):
    """What a player sees, by PyAV alone: times in seconds, (width, height), rate, audio packets."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [
            (frame.pts * frame.time_base, (frame.width, frame.height))
            for frame in container.decode(stream)
        ]
        rate, codec, pixels = (
            stream.average_rate,
            stream.codec_context.name,
            stream.codec_context.pix_fmt,
        )
    with av.open(str(path)) as container:
        audio = (
            [bytes(p) for p in container.demux(container.streams.audio) if p.size]
            if container.streams.audio
            else []
        )
    assert (codec, pixels) == ("h264", "yuv420p")
    return [time for time, _ in frames], {size for _, size in frames}, rate, audio


def source_times(path):
    with av.open(str(path)) as container:
        return [
            frame.pts * frame.time_base for frame in container.decode(container.streams.video[0])
        ]


def run(checkpoint, clip, out, *options):
    command = [
        "--video",
        clip,
        "--out",
        out,
        "--prompt",
        "add snow",
        "--checkpoint",
        checkpoint,
        "--steps",
        "2",
    ]
    sample.main([*map(str, command), "--device", "cpu", *options])
    return contents(out)


def images(frames, height=48, width=64):
    return make_clip(frames, height, width).numpy()


CLIPS = {  # what it is: (how to encode it, the width and height expected)
    "1 frame": (dict(images=images(1)), (64, 48)),
    "2 frames": (dict(images=images(2)), (64, 48)),
    "5 frames": (dict(images=images(5)), (64, 48)),
    "81 frames, 29.97 fps, audio": (dict(images=images(81), rate=NTSC, audio="aac"), (64, 48)),
    "82 frames": (dict(images=images(82)), (64, 48)),
    "200 frames": (dict(images=images(200)), (64, 48)),
    "portrait": (dict(images=images(5, 90, 50)), (50, 90)),
    "odd sides": (dict(images=images(5, 45, 61), pix_fmt="yuv444p"), (60, 44)),
    "larger than max_pixels": (dict(images=images(5, 120, 200), audio="aac"), (200, 120)),
    "variable rate": (
        dict(images=images(6), pts=[0, 40, 90, 300, 310, 700], time_base=Fraction(1, 1000)),
        (64, 48),
    ),
    "rotated by 90 degrees": (dict(images=images(5), rotation=(90, False)), (48, 64)),
}


@pytest.mark.parametrize("how, size", CLIPS.values(), ids=CLIPS)
def test_the_edit_has_the_sources_length_timing_size_and_sound(how, size, checkpoint, tmp_path):
    clip = encode(tmp_path / "in.mp4", **how)
    times, sizes, rate, audio = run(checkpoint, clip, tmp_path / "out.mp4")
    assert times == source_times(clip)
    assert sizes == {size}
    if how.get("rate"):
        assert rate == how["rate"]
    with av.open(str(clip)) as container:
        packets = (
            [bytes(p) for p in container.demux(container.streams.audio) if p.size]
            if container.streams.audio
            else []
        )
    assert audio == packets and bool(audio) == ("audio" in how)


@pytest.mark.parametrize("name", REAL_CLIPS)
@pytest.mark.slow
def test_real_clips(name, checkpoint, tmp_path):
    clip = ROOT.parent / "shared" / "data" / name
    if not clip.is_file():
        pytest.skip(f"{clip.name} is not in ../shared/data")
    times, sizes, rate, audio = run(checkpoint, clip, tmp_path / "out.mp4")
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert sizes == {(stream.width, stream.height)} and rate == stream.average_rate
        assert bool(audio) == bool(container.streams.audio)
    assert times == source_times(clip)


@pytest.mark.slow
def test_a_thousand_frames(checkpoint, tmp_path):
    clip = encode(tmp_path / "in.mp4", images=images(1000))
    times, *_ = run(checkpoint, clip, tmp_path / "out.mp4")
    assert times == source_times(clip) and len(times) == 1000


def test_compare_puts_source_and_edit_side_by_side(checkpoint, tmp_path):
    """The left half is the source, the right half the edit, up to H.264's losses."""
    clip = encode(tmp_path / "in.mp4", images=images(5))
    run(checkpoint, clip, tmp_path / "out.mp4", "--compare")
    left, right, both = (sample.video.read_video(tmp_path / name).frames.float() for name in NAMES)
    assert both.shape == (5, 48, 128, 3)
    assert (both[:, :, :64] - left).abs().mean() < 4 and (both[:, :, 64:] - right).abs().mean() < 4


NAMES = ("in.mp4", "out.mp4", "out_compare.mp4")


def test_a_comparison_does_not_replace_the_source(checkpoint, tmp_path, capsys):
    """A source of the very name that --compare writes stays as it is, also behind a link."""
    clip = encode(tmp_path / "in_compare.mp4", images=images(2))
    (tmp_path / "link.mp4").symlink_to(clip)
    content = clip.read_bytes()
    options = ["--prompt", "add snow", "--checkpoint", checkpoint, "--out", tmp_path / "in.mp4"]
    for source in (clip, tmp_path / "link.mp4"):
        error = expect_error(capsys, "--video", source, *options, "--compare")
        assert f"--compare would write {clip}, the source itself" in error
    assert clip.read_bytes() == content and not (tmp_path / "in.mp4").exists()


def test_options_reach_the_model(checkpoint, tmp_path):
    """Each option that changes the frames does change them, and repeating one does not."""
    clip = encode(tmp_path / "in.mp4", images=images(5))

    def frames(*options):
        run(checkpoint, clip, tmp_path / "out.mp4", *options)
        return sample.video.read_video(tmp_path / "out.mp4").frames

    plain = frames()
    assert torch.equal(plain, frames())
    for options in (
        ("--seed", "1"),
        ("--shift", "1"),
        ("--steps", "3"),
        ("--max-pixels", "1024"),
        ("--max-frames", "1"),
        ("--routing-depth", "0"),
        ("--dtype", "bfloat16"),
        ("--decode-dtype", "bfloat16"),
    ):
        assert not torch.equal(plain, frames(*options)), options
    assert torch.equal(plain, frames("--offload"))


def test_an_edit_that_was_stopped_goes_on_from_its_last_step(
    checkpoint, tmp_path, monkeypatch, capsys
):
    """Interrupted at its third step of four, it takes the last two and gives the same file."""
    clip = encode(tmp_path / "in.mp4", images=images(5))
    monkeypatch.setattr(sample.Unfinished, "SAVE_SECONDS", 0)
    run(checkpoint, clip, tmp_path / "whole.mp4", "--steps", "4")
    calls, announced = [], []
    forward = WanDiT.forward
    monkeypatch.setattr(sample, "announce", lambda args, plan, steps: announced.append(steps))

    def interrupted(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(WanDiT, "forward", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, clip, tmp_path / "out.mp4", "--steps", "4")
    assert stop.value.code == 130
    assert capsys.readouterr().err == "note: with --resume this edit goes on after step 2\n"
    run(checkpoint, clip, tmp_path / "out.mp4", "--steps", "4", "--resume")
    assert len(calls) == 5 and announced == [4, 2]
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in.mp4", "out.mp4", "whole.mp4"}  # nothing is left over


def test_only_the_same_edit_is_resumed(checkpoint, tmp_path, monkeypatch, capsys):
    """Which is found before the clip is read, which may take as long as some steps."""
    understand = sample.understand
    monkeypatch.setattr(sample, "understand", None)
    clip = encode(tmp_path / "in.mp4", images=images(2))
    out = tmp_path / "out.mp4"
    command = ["--video", clip, "--prompt", "add snow", "--checkpoint", checkpoint, "--out", out]
    assert "there is no unfinished edit" in expect_error(capsys, *command, "--resume")
    args = sample.parse_arguments([*map(str, command), "--steps", "2"])
    monkeypatch.setattr(sample.Unfinished, "SAVE_SECONDS", 0)
    model, vae = sample.load_model(args)
    sample.Unfinished(args, model, vae).save(torch.zeros(1, 8, 2, 4, 4), 1)
    command += ["--resume", "--steps", "2"]
    error = expect_error(capsys, *command, "--seed", "7")
    assert "is of another edit, which differs in seed" in error

    with torch.no_grad():  # trained further
        model.dit.head.modulation += 1
    rvedit.save(tmp_path / "trained", model, vae)
    error = expect_error(capsys, *command, "--checkpoint", tmp_path / "trained")
    assert "is of another edit, which differs in weights" in error

    # Decoding is what takes the most memory: it may be done in another precision.
    monkeypatch.setattr(sample, "understand", understand)
    sample.main([*map(str, command), "--decode-dtype", "bfloat16"])
    assert out.exists()


def test_steps_that_cannot_be_saved_end_the_edit_in_one_line(
    checkpoint, tmp_path, monkeypatch, capsys
):
    """Here by a limit of the file's size; the disk may be full."""
    clip = encode(tmp_path / "in.mp4", images=images(2))
    monkeypatch.setattr(sample.Unfinished, "SAVE_SECONDS", 0)
    command = ["--video", clip, "--prompt", "add snow", "--checkpoint", checkpoint, "--steps", "2"]
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, former[1]))
    try:
        error = expect_error(capsys, *command, "--out", tmp_path / "out.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert "out.mp4.unfinished.safetensors cannot be written: File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def damaged(tmp_path, how):
    """Paths of things that are not a video."""
    path = tmp_path / f"{how}.mp4"
    if how == "folder":
        path.mkdir()
    elif how == "empty":
        path.touch()
    elif how == "text":
        path.write_text("not a video")
    elif how in ("truncated", "audio"):
        encode(path, images=images(60), audio="aac", container={"movflags": "+faststart"})
        if how == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        else:
            whole, path = path, tmp_path / "audio.m4a"
            with av.open(str(whole)) as source, av.open(str(path), "w", format="mp4") as out:
                stream = out.add_stream_from_template(source.streams.audio[0])
                for packet in source.demux(audio=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        out.mux(packet)
    return path


def expect_error(capsys, *options):
    """Run the command line, expect exit code 2 and one line on stderr, and return that line."""
    with pytest.raises(SystemExit) as exit:
        sample.main([str(option) for option in options])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "missing.mp4: no such file"),
        ("folder", "folder.mp4: is a folder"),
        ("empty", "empty.mp4: the file is empty"),
        ("text", "text.mp4: not a video"),
        ("truncated", "truncated.mp4: the file is cut short"),
        ("audio", "audio.m4a: has no video, only audio"),
    ],
)
def test_bad_videos_are_named(how, message, checkpoint, tmp_path, capsys):
    clip, out = damaged(tmp_path, how), tmp_path / "out.mp4"
    options = ["--video", clip, "--prompt", "add snow", "--checkpoint", checkpoint, "--out", out]
    assert message in expect_error(capsys, *options)
    assert not out.exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", " "], "--prompt: it is empty; say what to change"),
        (["--prompt", "snow \udce9"], "--prompt: it is not valid UTF-8"),
        (["--max-frames", "0"], "--max-frames: '0' is not a whole number of at least 1"),
        (["--prompt", "x" * 900], "the instruction makes 1091 tokens, the model takes 600"),
        (["--out", "nowhere/out.mp4"], "nowhere"),
        (["--out", "."], "is a folder"),
        (["--out", "out.avi"], "must end in .mp4 or .mov"),
        (["--out", "in.mp4"], "--out would write in.mp4, the source itself"),
        (["--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
        (["--checkpoint", "."], "is neither a checkpoint of ours nor Kiwi-Edit's release"),
        (["--wan", "."], "leave out --wan and --qwen"),
        (["--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
        (["--steps", "many"], "--steps: 'many' is not a whole number of at least 1"),
        (["--shift", "-1"], "--shift: '-1' is not a number of at least 0.01"),
        (["--shift", "nan"], "--shift: 'nan' is not a number of at least 0.01"),
        (["--seed", "-3"], "--seed: '-3' is not a whole number from 0 to"),
        (["--max-pixels", "0"], "--max-pixels: '0' is not a whole number of at least 1"),
        (["--routing-depth", "4"], "--routing-depth 4: the model has only 3 blocks"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
        (["--device", "warp"], "--device: this machine and this PyTorch have no 'warp'"),
        (["--frames", "9"], "unrecognized arguments: --frames 9"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_options_are_named(options, message, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "in.mp4", images=images(2))
    defaults = {"--video": "in.mp4", "--prompt": "add snow", "--checkpoint": checkpoint}
    defaults |= dict(zip(options[::2], options[1::2], strict=True))
    assert message in expect_error(capsys, *(word for pair in defaults.items() for word in pair))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


def test_the_folder_of_a_training_leads_to_its_checkpoint(checkpoint, tmp_path, capsys):
    clip = encode(tmp_path / "in.mp4", images=images(2))
    run_folder = tmp_path / "run"
    shutil.copytree(checkpoint, run_folder / "model")
    options = ["--video", clip, "--prompt", "add snow", "--checkpoint", run_folder]
    error = expect_error(capsys, *options, "--out", tmp_path / "out.mp4")
    assert f"the folder of a training: its checkpoint is {run_folder / 'model'}" in error


def test_a_read_only_output_folder_is_named_before_any_work(
    checkpoint, tmp_path, capsys, monkeypatch
):
    encode(tmp_path / "in.mp4", images=images(2))
    monkeypatch.setattr(
        os, "access", lambda path, mode, **_: not mode & os.W_OK
    )  # root may write anywhere
    out = tmp_path / "out.mp4"
    error = expect_error(
        capsys,
        "--video",
        tmp_path / "in.mp4",
        "--prompt",
        "x",
        "--checkpoint",
        checkpoint,
        "--out",
        out,
    )
    assert str(tmp_path) in error and not out.exists()


@pytest.mark.parametrize("stage", ("load_model", "decode"))
@pytest.mark.parametrize("where", ("gpu", "cublas", "cpu"))
def test_too_little_memory_is_one_line(stage, where, checkpoint, tmp_path, capsys, monkeypatch):
    """Already while the model is loaded, and on a CPU, where it is a plain RuntimeError.

    So it is where a library of CUDA finds no memory for itself, beside weights that just fitted.
    """

    def exhaust(*_):
        if where == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if where == "cublas":
            reason = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            raise RuntimeError(reason)
        torch.empty(2**60)

    monkeypatch.setattr(sample, stage, exhaust)
    clip, out = encode(tmp_path / "in.mp4", images=images(2)), tmp_path / "out.mp4"
    words = ["--video", clip, "--prompt", "x", "--checkpoint", checkpoint, "--out", out]
    assert "out of memory: add --offload on a GPU" in expect_error(capsys, *words)
    assert not out.exists()


def test_a_rank_without_a_gpu_is_told_so(monkeypatch):
    """As train.py does; PyTorch's word for it is "invalid device ordinal"."""
    monkeypatch.setattr(cli, "LOCAL_RANK", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = SimpleNamespace(device=torch.device("cuda", 2), checkpoint=None, wan=None, qwen=None)
    with pytest.raises(ValueError, match="no GPU for its rank 2: give a smaller --nproc_per_node"):
        sample.load_model(args)


def test_other_errors_of_pytorch_keep_their_traceback(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_model", lambda _: torch.zeros(2) + torch.zeros(3))
    clip = encode(tmp_path / "in.mp4", images=images(2))
    with pytest.raises(RuntimeError, match="must match the size"):
        run(checkpoint, clip, tmp_path / "out.mp4")


@pytest.mark.parametrize(
    "words",
    [["--video", "in.mp4"], ["--video", "in.mp4", "--prompt", "remove", "the", "circle"]],
    ids=("no prompt", "quotes lost"),
)
def test_missing_and_unknown_words_lead_to_the_help(words, capsys):
    assert "-h lists the options; a text with spaces needs quotes" in expect_error(capsys, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_absent_gpu_is_named(tmp_path, capsys):
    assert "--device: this machine and this PyTorch have no 'cuda'" in expect_error(
        capsys, "--video", "in.mp4", "--prompt", "x", "--device", "cuda"
    )


@pytest.mark.parametrize(
    "options, code, words", ((["--help"], 0, "--prompt"), (["--video", "x.mp4"], 2, "--prompt"))
)
def test_help_and_mistakes_do_not_wait_for_pytorch(tmp_path, options, code, words):
    """They come where PyTorch cannot even be imported."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('PyTorch was imported')")
    command = [sys.executable, ROOT / "sample.py", *options]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == code and words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_wan_and_qwen_alone_cannot_edit(tmp_path, capsys):
    encode(tmp_path / "in.mp4", images=images(2))
    options = [
        "--video",
        tmp_path / "in.mp4",
        "--prompt",
        "x",
        "--wan",
        tmp_path,
        "--qwen",
        tmp_path,
    ]
    assert "cannot edit yet" in expect_error(capsys, *options, "--out", tmp_path / "out.mp4")


def test_the_command_runs_as_the_readme_says(checkpoint, tmp_path):
    """As a process: exit code 0 and one line on stdout; exit code 2 and one line on stderr."""
    encode(tmp_path / "in.mp4", images=images(5))
    command = [
        sys.executable,
        ROOT / "sample.py",
        "--checkpoint",
        checkpoint,
        "--prompt",
        "add snow",
        "--steps",
        "2",
    ]
    good = subprocess.run(
        [*command, "--video", "in.mp4"], cwd=tmp_path, capture_output=True, text=True
    )
    assert good.returncode == 0 and good.stderr == "", good.stderr
    assert (
        good.stdout.startswith("in_edited.mp4: 5 frames of 64x48 in ")
        and good.stdout.count("\n") == 1
    )
    assert (tmp_path / "in_edited.mp4").is_file()
    bad = subprocess.run(
        [*command, "--video", "out.mp4"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "error: out.mp4: no such file\n")


@pytest.mark.parametrize(
    "where, unbuffered", [("> /dev/full", ""), ("> /dev/full", "1"), ("2>&-", "")]
)
def test_an_edit_is_done_though_nobody_can_be_told(where, unbuffered, checkpoint, tmp_path):
    """Exit code 0 and not a word, where stdout is full or stderr is closed."""
    encode(tmp_path / "in.mp4", images=images(5))
    command = f'"$0" "$1" --checkpoint "$2" --video in.mp4 --prompt snow --steps 1 {where}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, ROOT / "sample.py", checkpoint],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(video.read_video(tmp_path / "in_edited.mp4").frames) == 5


def test_the_built_in_checkpoint_edits_the_sample_clip(tmp_path, monkeypatch):
    """The README's first command needs nothing but the repository."""
    monkeypatch.chdir(tmp_path)
    clip = ROOT / "assets" / "shapes.mp4"
    sample.main(
        [
            "--video",
            str(clip),
            "--prompt",
            "remove the red circle",
            "--steps",
            "2",
            "--device",
            "cpu",
        ]
    )
    times, sizes, rate, _ = contents(tmp_path / "shapes_edited.mp4")
    assert times == source_times(clip) and sizes == {(128, 128)} and rate == 8


def test_only_the_first_process_writes_and_speaks_of_the_sound(tmp_path, monkeypatch):
    """Under torchrun a note about damaged sound would come once for each process."""
    clip = ROOT / "assets" / "shapes.mp4"
    options = ["--video", str(clip), "--prompt", "remove the red circle", "--device", "cpu"]
    out = tmp_path / "out.mp4"
    prepared = []
    monkeypatch.setattr(sample.video, "prepare_edit", lambda clip, path: prepared.append(path))
    for rank in (1, 0):
        monkeypatch.setattr(sample, "RANK", rank)
        sample.main([*options, "--out", str(out)])
        assert out.exists() == (rank == 0)
        assert prepared == [out] * (1 - rank)


def test_untrained_native_connectors_are_not_used(tmp_path, capsys):
    """With L_s = L, as Kiwi-Edit's, blocks never saw native tokens: a smaller L_s is refused."""
    encode(tmp_path / "in.mp4", images=images(2))
    checkpoint = tmp_path / "all editing tokens"
    rvedit.save(checkpoint, *tiny_model(routing_depth=3))
    options = ["--video", tmp_path / "in.mp4", "--prompt", "x", "--checkpoint", checkpoint]
    options += ["--out", tmp_path / "out.mp4"]
    assert "never shown visual and textual tokens" in expect_error(
        capsys, *options, "--routing-depth", "2"
    )
    sample.main([*map(str, options), "--routing-depth", "3", "--steps", "1"])
    assert np.isfinite(len(contents(tmp_path / "out.mp4")[0]))


# --- What was not edited --------------------------------------------------------------------------


def test_the_mask_is_one_around_edited_latents_and_zero_far_from_them():
    """Against the definition, cell by cell: one latent wider, then a mean over neighbours."""
    source = torch.randn(1, 4, 5, 8, 9, generator=torch.Generator().manual_seed(0))
    latents = source.clone()
    latents[:, :, 2, 3, 4] += 2.0
    latents += 0.05  # what an editor leaves unchanged is not exact
    mask = sample.change_mask(latents, source)
    assert mask.shape == (5, 1, 8, 9)
    near = torch.zeros(5, 8, 9)
    near[1:4, 2:5, 3:6] = 1
    for t, h, w in itertools.product(range(5), range(8), range(9)):
        total = 0.0
        for i, j, k in itertools.product((-1, 0, 1), repeat=3):
            # A cell outside counts as the nearest one inside.
            total += near[min(max(t + i, 0), 4), min(max(h + j, 0), 7), min(max(w + k, 0), 8)]
        assert mask[t, 0, h, w] == pytest.approx(total.item() / 27, abs=1e-6)


def test_kept_pixels_are_the_sources_and_edited_ones_the_edits():
    """At full resolution: mask 0 gives the source exactly, 1 the edit, and one half their mean."""
    source = [make_clip(1, 40, 60, seed=1), make_clip(4, 40, 60, seed=2)]
    edited = [255 - block for block in source]
    edited[1] = edited[1][:3]  # the last block of a clip may be shorter
    mask = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 5, 6).contiguous()
    edit_before = edited[1].float().clone()
    first, second = sample.restore_source(iter(edited), iter(source), mask)
    assert torch.equal(first, source[0])
    for i, weight in enumerate((0.25, 0.5, 0.75)):
        expected = source[1][i].float() * (1 - weight) + edit_before[i] * weight
        assert (second[i].float() - expected).abs().max() <= 0.5


@pytest.fixture(scope="module")
def built_in():
    return rvedit.load()


@pytest.mark.parametrize("side", (128, 384))
def test_keep_source_is_nearer_to_the_target_outside_and_as_near_inside(built_in, side):
    """The built-in model removes an object from a clip of its size, and from a larger one."""
    clip = ShapesDataset(2026, 8, 5, side, side, ["Local Remove"])[0]
    target, mask = clip["target"].float(), clip["mask"]
    errors = {}
    for keep in (False, True):
        edit = sample.edit_video(
            *built_in, clip["source"], clip["instruction"], keep_source=keep
        ).float()
        error = (edit - target).square()
        errors[keep] = error[mask].mean(), error[~mask].mean()
    assert errors[True][1] < 0.6 * errors[False][1]
    assert errors[True][0] < 1.1 * errors[False][0]


def test_a_global_style_is_hardly_changed_by_keep_source(built_in):
    clip = ShapesDataset(2026, 8, 5, 128, 128, ["Global Style"])[0]
    edits = [
        sample.edit_video(*built_in, clip["source"], clip["instruction"], keep_source=keep).float()
        for keep in (False, True)
    ]
    target = clip["target"].float()
    plain, kept = ((edit - target).square().mean() for edit in edits)
    assert kept < 1.05 * plain


# --- Names that fill what file systems allow ------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["い" * 80 + "_edited.mp4", "a" * 251 + ".mp4", "é" * 125 + ".png"]
)
def test_a_file_of_a_long_name_is_replaced_and_leaves_nothing_beside_it(name, tmp_path):
    for text in ("one", "two"):
        cli.write_text(tmp_path / name, text)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "two")]
    unfinished = cli.beside(tmp_path / name, "", ".unfinished.safetensors")
    unfinished.touch()
    assert unfinished.suffix == ".safetensors"


@pytest.mark.parametrize("ending", (".mp4", ".png"))
def test_a_link_to_a_file_without_ending_is_written_through(ending, tmp_path):
    link = tmp_path / f"out{ending}"
    link.symlink_to("blob")
    video.write_video(link, make_clip(1, 32, 32))
    assert link.is_symlink() and len(video.read_video(tmp_path / "blob").frames) == 1
    assert len([*tmp_path.iterdir()]) == 2


# --- Signals --------------------------------------------------------------------------------------

WRITER = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[2] == "nohup" else signal.SIG_DFL)
import cli
cli.begin()
with cli.replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(0.5 if sys.argv[2] == "nohup" else 60)
"""


@pytest.mark.parametrize(
    ("number", "how", "code", "left"),
    [
        (signal.SIGTERM, "", 128 + signal.SIGTERM, []),
        (signal.SIGHUP, "", 128 + signal.SIGHUP, []),
        (signal.SIGHUP, "nohup", 0, ["out.mp4"]),
    ],
)
def test_a_signal_leaves_no_half_written_file(number, how, code, left, tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out.mp4"), how]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    assert [file.name for file in tmp_path.iterdir()] == left


# --- From Python ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(frames=torch.zeros(0, 32, 32, 3, dtype=torch.uint8)), "frames must be uint8"),
        (dict(frames=torch.rand(5, 32, 32, 3)), "not float32 (5, 32, 32, 3)"),
        (dict(frames=torch.zeros(5, 3, 32, 32, dtype=torch.uint8)), "not uint8 (5, 3, 32, 32)"),
        (dict(frames=torch.zeros(5, 32, 32, 4, dtype=torch.uint8)), "not uint8 (5, 32, 32, 4)"),
        (dict(frames=torch.zeros(5, 32, 32, 3, dtype=torch.uint8).numpy()), "not ndarray"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=-1), "steps is -1"),
        (dict(shift=0.0), "shift is 0.0"),
        (dict(shift=math.nan), "shift is nan"),
        (dict(shift=math.inf), "shift is inf"),
        (dict(instruction="make it \ud83d"), "halves of UTF-16"),
    ],
)
def test_what_makes_no_edit_is_an_error(change, words):
    arguments = dict(frames=make_clip(5, 32, 32), instruction="add snow", steps=1) | change
    with pytest.raises(ValueError, match=re.escape(words)):
        sample.edit_video(*tiny_model(), **arguments)


def test_after_an_error_an_offloaded_network_rests_on_the_cpu_again():
    """`device` may be a string, as for `rvedit.load`."""
    model, vae = tiny_model()
    moves = []
    model.encoder.to = lambda device: moves.append(device)
    model.encoder.cpu = lambda: moves.append("cpu")
    with pytest.raises(ValueError, match="the instruction is empty"):
        sample.edit_video(model, vae, make_clip(5, 32, 32), " ", device="cpu")
    assert moves == [torch.device("cpu"), "cpu"]


def test_the_noise_of_a_seed_is_the_same_whatever_the_default_dtype():
    expected = sample.initial_noise((1, 4, 2, 3, 3), seed=7)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(sample.initial_noise((1, 4, 2, 3, 3), seed=7), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# --- What an edit will take -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 128, 128), (17, 96, 160)])
def test_the_forecast_has_the_flops_of_the_dit(size):
    """Those that PyTorch counts, to 2 %; a clip of two windows has twice as many."""
    config = workloads.fit_config(rvedit.preset("toy"), size)
    networks = workloads.meta_networks(config)
    counted = workloads.flops(config, size, ("dit",))["dit"]
    forecast = sample.forecast(*networks, size, offload=False)
    assert forecast.windows == 1 and forecast.step == pytest.approx(counted, rel=0.02)
    longer = sample.forecast(*networks, (size[0] + 8, *size[1:]), offload=False)
    assert (longer.windows, longer.step) == (2, 2 * forecast.step)


def test_the_forecast_has_the_memory_of_decoding():
    """Most of an offloaded edit's: the decoder, and the tensors alive in it on the meta device."""
    size = (5, 480, 832)
    config = dataclasses.replace(rvedit.preset("toy"), vae=WAN2_2_VAE, max_pixels=480 * 832)
    model, vae = workloads.meta_networks(config)
    latents = torch.empty(1, 48, 2, 480 // 16, 832 // 16, device="meta")
    alive = plan.Alive("meta")
    with torch.no_grad(), plan.fused_attention(), alive:
        for _ in vae.decode_chunks(latents):
            pass
    weights = sum(p.nbytes for p in vae.decoder.parameters())
    memory = sample.forecast(model, vae, size, offload=True).memory
    assert memory == pytest.approx(weights + alive.peaks["start"], rel=0.05)


def test_only_a_long_edit_is_announced(built_in, capsys, monkeypatch):
    """In one line, with its windows, steps, minutes and memory."""
    monkeypatch.setattr(sample, "matmul_rate", lambda *_: 1e10)
    args = SimpleNamespace(offload=False, device=torch.device("cpu"), dtype="float32")
    for frames in (9, 600):
        plan = sample.forecast(*built_in, (frames, 360, 640), offload=False)
        sample.announce(args, plan, 2)
    step = plan.step
    expected = f"2 steps of {step / 1e12:.3g} TFLOP, at least {2 * step / 1e10 / 60:.0f} min"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error and "38 windows" in error


# --- Compiling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "asked", "work", "compiled"),
    [
        ("cuda", None, 2e16, True),
        ("cuda", None, 1e15, False),  # it would wait longer for the compiler than it gains
        ("cpu", None, 2e16, False),
        ("cuda", False, 2e16, False),
        ("cpu", True, 1e9, True),
    ],
)
def test_long_edits_on_gpus_are_compiled(device, asked, work, compiled):
    args = SimpleNamespace(device=torch.device(device), compile=asked)
    plan = sample.Forecast(windows=1, step=work / 50, memory=0)
    assert sample.pays_to_compile(args, plan, 50) is compiled


def test_a_compiled_edit_has_the_same_frames(tmp_path, monkeypatch):
    """With a backend that takes the networks apart as any does, and generates no code."""
    calls = []
    compile = torch.compile

    def compile_without_code(function, **options):
        calls.append(function)
        return compile(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_without_code)
    clip = ROOT / "assets" / "shapes.mp4"
    edits = {}
    for option in ("--no-compile", "--compile"):
        out = tmp_path / f"{option}.mp4"
        words = ["--prompt", "remove the red circle", "--out", str(out), option]
        sample.main(["--video", str(clip), *words])
        edits[option] = video.read_video(out).frames.int()
        assert bool(calls) is (option == "--compile")
    assert (edits["--compile"] - edits["--no-compile"]).abs().max() <= 1


# --- The built-in model and clips that are not of its world ---------------------------------------


def test_the_built_in_model_says_that_real_footage_is_not_its_world(built_in, capsys):
    own = ShapesDataset(1, 4, 5, 128, 128)
    for index in range(4):
        sample.note_foreign_clip(None, *built_in, iter(own[index]["source"]))
    assert capsys.readouterr().err == ""
    noise = torch.randint(0, 256, (128, 128, 3), generator=torch.Generator().manual_seed(0))
    large = own[0]["source"][0].repeat(4, 4, 1)
    for foreign in (noise.to(torch.uint8), large):
        sample.note_foreign_clip(None, *built_in, iter([foreign]))
        error = capsys.readouterr().err
        assert "knows only moving shapes" in error and error.count("\n") == 1


def test_where_nothing_can_be_compiled_one_line_says_what_to_do(
    checkpoint, tmp_path, capsys, monkeypatch
):
    """PyTorch needs a C compiler, which many containers lack."""

    def fails(graph, inputs):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fails))
    clip, out = encode(tmp_path / "in.mp4", images=images(2)), tmp_path / "out.mp4"
    words = ["--video", clip, "--prompt", "x", "--checkpoint", checkpoint, "--out", out]
    error = expect_error(capsys, *words, "--compile")
    assert "compiling failed, --no-compile goes without: " in error and "no compiler" in error


def test_an_edit_that_changes_nothing_is_said(tmp_path, capsys):
    """The clip shows no blue square; it shows a red circle."""
    words = ["--video", str(ROOT / "assets" / "shapes.mp4"), "--out", str(tmp_path / "out.mp4")]
    notes = {}
    for prompt in ("remove the blue square", "remove the red circle"):
        sample.main([*words, "--prompt", prompt, "--device", "cpu"])
        notes[prompt] = capsys.readouterr().err
    assert notes["remove the blue square"].startswith("note: nothing was changed")
    assert notes["remove the red circle"] == ""


def test_help_lists_the_words_of_the_built_in_model():
    text = cli.edit_parser().format_help()
    words = [*scenes.COLORS, *scenes.FORMS, *scenes.SIZES]
    assert [word for word in words if word not in text] == []


def test_other_checkpoints_say_nothing_about_footage(checkpoint, capsys):
    sample.note_foreign_clip(checkpoint, *tiny_model(), iter(make_clip(1, 300, 300)))
    assert capsys.readouterr().err == ""


def test_a_terminal_that_lacks_a_letter_gets_it_spelt_out():
    program = "import cli; cli.begin(); cli.say_last('λ = 0')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u03bb = 0\n", "")
