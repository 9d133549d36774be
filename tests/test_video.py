"""Claims about video.py, on clips that the tests make and read back with plain PyAV."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

import video

DATA = Path(__file__).parents[2] / "shared" / "data"
NTSC = Fraction(30000, 1001)


def grey_levels(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose number shows in their brightness, 40 + 2 a frame: (count, height, width, 3)."""
    levels = 40 + 2 * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def tone(seconds: float, channels: int = 2, rate: int = 48000) -> np.ndarray:
    """A chirp, so that any shift in time shows: int16 (1, samples * channels)."""
    time = np.arange(round(seconds * rate)) / rate
    return np.repeat((12000 * np.sin(2000 * time * (1 + time))).astype(np.int16), channels)[None]


def encode(
    path: Path,
    images: np.ndarray,
    rate: Fraction = Fraction(25),
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    audio: str | None = None,
    audio_tracks: int = 1,
    audio_start: float = 0.0,
    audio_rate: int = 48000,
    channels: int = 2,
    container: dict[str, str] | None = None,
    rotation: tuple[int, bool] | None = None,
    aspect: Fraction | None = None,
    **options: str,
) -> Path:
    """Write a source clip as any other program does: B-frames, its own time base, maybe audio."""
    time_base = time_base or 1 / rate
    pts = pts or list(range(len(images)))
    with av.open(str(path), "w", container_options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt, stream.codec_context.time_base = pix_fmt, time_base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
        tracks = [
            out.add_stream(audio, rate=audio_rate, layout=layout)
            for _ in range(audio_tracks if audio else 0)
        ]
        for image, time in zip(images, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        for number, track in enumerate(tracks):
            samples = tone(len(images) / float(rate) + number * 0.1, channels, audio_rate)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
            frame.sample_rate, frame.pts = audio_rate, round(audio_start * audio_rate)
            frame.time_base = Fraction(1, audio_rate)
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    return path


def packet_list(path: Path, kind: str) -> list[list[tuple[Fraction, bytes]]]:
    """For every audio or video stream of a file, its packets as (time in seconds, bytes)."""
    with av.open(str(path)) as container:
        streams = [s for s in container.streams if s.type == kind]
        found: dict[int, list[tuple[Fraction, bytes]]] = {s.index: [] for s in streams}
        for packet in container.demux(streams) if streams else ():
            if packet.size:
                found[packet.stream.index].append((packet.pts * packet.time_base, bytes(packet)))
    return list(found.values())


def decoded(
    path: Path, limit: int | None = None
) -> tuple[list[Fraction], list[np.ndarray], list[Fraction]]:
    """Times, RGB images and durations by PyAV's plain decoder, of all or the first frames."""
    with av.open(str(path)) as container:
        frames = list(itertools.islice(container.decode(video=0), limit))
        return (
            [frame.pts * frame.time_base for frame in frames],
            [frame.to_ndarray(format="rgb24") for frame in frames],
            [frame.duration * frame.time_base for frame in frames],
        )


def planes(path: Path) -> list[np.ndarray]:
    """The raw Y, Cb and Cr planes of the first frame."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert frame.format.name == "yuv420p"
        return [
            np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width]
            for p in frame.planes
        ]


def times(clip: video.Video) -> list[Fraction]:
    return [t * clip.time_base for t in clip.timestamps]


def sound(path: Path) -> np.ndarray:
    """The first channel as it is heard from time 0 of the file on."""
    with av.open(str(path)) as container:
        resample = av.AudioResampler("fltp", "stereo", 48000)
        frames = [f for frame in container.decode(audio=0) for f in resample.resample(frame)]
        samples = np.concatenate([f.to_ndarray()[0] for f in frames])
        start = round(frames[0].pts * frames[0].time_base * 48000)
        return np.concatenate([np.zeros(max(0, start), samples.dtype), samples[max(0, -start) :]])


def delay(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """By how many seconds (at most 2 ms) `after` is late, and how well the two then agree."""
    length = min(len(before), len(after)) - 96
    agreement = {
        lag: np.corrcoef(before[96:length], after[96 + lag : length + lag])[0, 1]
        for lag in range(-96, 97)
    }
    best = max(agreement, key=agreement.get)
    return best / 48000, agreement[best]


# --- time and sound -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, rate",
    [(1, Fraction(25)), (2, NTSC), (5, Fraction(24000, 1001)), (81, NTSC), (81, Fraction(16))],
)
def test_round_trip_keeps_frames_times_rate_size_and_audio(
    tmp_path: Path, count: int, rate: Fraction
) -> None:
    """What is read and written has the same frames, times and audio packets."""
    source = encode(tmp_path / "in.mp4", grey_levels(count), rate, audio="aac")
    clip = video.read_video(source)
    assert clip.frames.shape == (count, 48, 64, 3) and clip.frames.dtype == torch.uint8
    assert (clip.frames.float().mean((1, 2, 3)) - 40 - 2 * torch.arange(count)).abs().max() < 1.5
    assert (
        clip.timestamps == list(range(count)) and clip.time_base == 1 / rate and clip.rate == rate
    )

    out = tmp_path / "out.mp4"
    assert video.write_video(out, clip.frames, clip) == (48, 64)
    written, images, durations = decoded(out)
    assert written == decoded(source)[0] == [i / rate for i in range(count)]
    assert durations == [1 / rate] * count
    assert all(abs(image.mean() - 40 - 2 * i) < 3 for i, image in enumerate(images))
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == rate
    assert packet_list(out, "audio") == packet_list(source, "audio") != [[]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_variable_frame_rate_stays_variable(tmp_path: Path) -> None:
    """Uneven timestamps come back exactly, down to how long the last frame is shown."""
    pts = [0, 33, 70, 71, 400, 1000, 1017]
    source = encode(
        tmp_path / "in.mp4", grey_levels(7), pts=pts, time_base=Fraction(1, 1000), bf="0"
    )
    clip = video.read_video(source)
    assert times(clip) == [Fraction(t, 1000) for t in pts]
    clip.last_duration = round(Fraction(1, 4) / clip.time_base)
    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    written, _, durations = decoded(tmp_path / "out.mp4")
    assert written == times(clip)
    assert durations[-1] == Fraction(1, 4)
    assert video.read_video(tmp_path / "out.mp4").rate == clip.rate


@pytest.mark.parametrize("video_start, audio_start", [(0, 0.5), (10, 0.0), (10, 0.2), (5, 1.0)])
def test_offset_between_sound_and_picture_is_kept(
    tmp_path: Path, video_start: int, audio_start: float
) -> None:
    """A track that starts late starts as late in the result, whether copied or encoded."""
    pts = [video_start + i for i in range(10)]
    source = encode(
        tmp_path / "in.mp4", grey_levels(10), pts=pts, audio="aac", audio_start=audio_start
    )
    clip = video.read_video(source)
    assert times(clip) == [Fraction(t, 25) for t in pts]
    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    assert decoded(tmp_path / "out.mp4")[0] == times(clip)
    for (was, data), (now, copy) in zip(
        packet_list(source, "audio")[0], packet_list(tmp_path / "out.mp4", "audio")[0], strict=True
    ):
        assert data == copy and abs(was - now) < Fraction(1, 10000)

    raw = encode(
        tmp_path / "in.mkv", grey_levels(10), pts=pts, audio="pcm_s16le", audio_start=audio_start
    )
    video.write_video(tmp_path / "aac.mp4", clip.frames, video.read_video(raw))
    late, agreement = delay(sound(raw), sound(tmp_path / "aac.mp4"))
    assert abs(late) < 1e-4 and agreement > 0.98


def test_broadcast_clock_starts_at_zero(tmp_path: Path) -> None:
    """MPEG-TS starts at any time: the result starts at 0, sound and picture as before."""
    source = encode(
        tmp_path / "in.ts", grey_levels(20), rate=NTSC, audio="aac", container={"muxdelay": "0"}
    )
    clip = video.read_video(source)
    first = min(packet_list(source, "audio")[0][0][0], decoded(source)[0][0])
    assert first > 0 and times(clip) == [t - first for t in decoded(source)[0]]
    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    assert decoded(tmp_path / "out.mp4")[0] == times(clip)
    audio, copy = packet_list(source, "audio")[0], packet_list(tmp_path / "out.mp4", "audio")[0]
    assert [len(data) - 7 for _, data in audio] == [
        len(data) for _, data in copy
    ]  # 7: the ADTS header
    assert abs(copy[0][0] - (audio[0][0] - first)) < Fraction(1, 10000)


@pytest.mark.parametrize("audio", ["aac", "mp2"])
def test_joined_recordings_play_after_one_another(tmp_path: Path, audio: str) -> None:
    """Where the clock of a joined MPEG-TS jumps back, picture and sound go on at their rate."""
    part = encode(tmp_path / "part.ts", grey_levels(30), audio=audio).read_bytes()
    (tmp_path / "in.ts").write_bytes(part + part)
    clip = video.read_video(tmp_path / "in.ts")
    assert len(clip.frames) == 60 and clip.rate == 25
    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    assert decoded(tmp_path / "out.mp4")[0] == times(clip)
    assert len(sound(tmp_path / "out.mp4")) == pytest.approx(2.4 * 48000, rel=0.05)
    if audio == "aac":
        copied, stored = (
            len(packet_list(tmp_path / name, "audio")[0]) for name in ("out.mp4", "in.ts")
        )
        assert stored - 4 <= copied <= stored  # where two sounds would overlap, one is heard


def test_frames_before_time_zero_are_shown(tmp_path: Path) -> None:
    """Players skip negative times, so everything is moved to start at 0."""
    source = encode(
        tmp_path / "in.asf",
        grey_levels(3),
        pts=[-3, -2, -1],
        bf="0",
        container={"avoid_negative_ts": "disabled"},
    )
    stored = decoded(source)[0]
    clip = video.read_video(source)
    assert clip.start == stored[0] < 0 and times(clip) == [t - stored[0] for t in stored]


def test_names_with_a_colon_are_not_protocols(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorders put the time of day into names."""
    monkeypatch.chdir(tmp_path)
    video.write_video("12:30.mp4", torch.from_numpy(grey_levels(2)))
    assert len(video.read_video("12:30.mp4").frames) == 2


@pytest.mark.parametrize("rate, expected", [(44100, 44100), (18900, 48000)])
def test_audio_rates_that_aac_lacks_are_resampled(tmp_path: Path, rate: int, expected: int) -> None:
    """Re-encoded audio keeps its sample rate where AAC has it."""
    source = encode(tmp_path / "in.mkv", grey_levels(25), audio="pcm_s16le", audio_rate=rate)
    clip = video.read_video(source)
    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec_context.sample_rate == expected
    late, agreement = delay(sound(source), sound(tmp_path / "out.mp4"))
    assert abs(late) < 1e-3 and agreement > 0.98


def test_sound_is_stored_near_its_picture(tmp_path: Path) -> None:
    """A player that reads a file from start to end never waits long for either."""
    source = encode(tmp_path / "in.mkv", grey_levels(80), rate=Fraction(4), audio="aac")
    clip = video.read_video(source)
    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    with av.open(str(tmp_path / "out.mp4")) as container:
        packets = [(p.pos, p.stream.type, p.pts * p.time_base) for p in container.demux() if p.size]
    latest = {"video": Fraction(0), "audio": Fraction(0)}
    for _, kind, time in sorted(packets):
        latest[kind] = time
        assert abs(latest["video"] - latest["audio"]) < 1.5


def test_every_audio_track_is_kept(tmp_path: Path) -> None:
    """A second language is not lost."""
    source = encode(tmp_path / "in.mp4", grey_levels(10), audio="aac", audio_tracks=2)
    clip = video.read_video(source)
    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    tracks = packet_list(tmp_path / "out.mp4", "audio")
    assert len(tracks) == 2 and tracks == packet_list(source, "audio") and tracks[0] != tracks[1]


@pytest.mark.parametrize(
    "name, codec, audio, channels, out, expected",
    [
        ("in.mkv", "libvpx-vp9", "libopus", 2, "out.mp4", "opus"),
        ("in.webm", "libvpx-vp9", "libopus", 1, "out.mov", "aac"),
        ("in.mkv", "libx264", "flac", 6, "out.mp4", "flac"),
        ("in.mkv", "libx264", "flac", 6, "out.mov", "aac"),
        ("in.mov", "libx264", "pcm_s16le", 2, "out.mov", "pcm_s16le"),
        ("in.mov", "libx264", "pcm_s16le", 2, "out.mp4", "aac"),
        ("in.avi", "mpeg4", "pcm_s16le", 1, "out.mp4", "aac"),
        ("in.avi", "mpeg4", "libmp3lame", 2, "out.MP4", "mp3"),
        ("in.mpg", "mpeg2video", "mp2", 2, "out.mp4", "aac"),
        ("in.flv", "libx264", "aac", 2, "out.mp4", "aac"),
    ],
)
def test_containers_and_codecs(
    tmp_path: Path, name: str, codec: str, audio: str, channels: int, out: str, expected: str
) -> None:
    """Other formats are read; audio is copied where players expect it, else it becomes AAC."""
    source = encode(tmp_path / name, grey_levels(25), codec=codec, audio=audio, channels=channels)
    clip = video.read_video(source)
    assert len(clip.frames) == 25 and times(clip) == [t - clip.start for t in decoded(source)[0]]
    assert (clip.frames.float().mean((1, 2, 3)) - 40 - 2 * torch.arange(25)).abs().max() < 4
    video.write_video(tmp_path / out, clip.frames, clip)
    assert decoded(tmp_path / out)[0] == times(clip)
    with av.open(str(tmp_path / out)) as container:
        assert container.streams.audio[0].codec.canonical_name == expected
        assert container.streams.audio[0].codec_context.layout.nb_channels == channels
    if expected in audio:
        copied = [data for _, data in packet_list(source, "audio")[0]]
        assert copied == [data for _, data in packet_list(tmp_path / out, "audio")[0]]
    start = round(clip.start * 48000)
    late, agreement = delay(sound(source)[start:], sound(tmp_path / out))
    assert abs(late) < 1e-3 and agreement > 0.98


@pytest.mark.parametrize("limit", [1, 7, 30, 31])
def test_the_first_frames_alone_are_those_of_the_whole(tmp_path: Path, limit: int) -> None:
    """In order of display, which is not that of the file, with their times."""
    source = encode(tmp_path / "in.mp4", grey_levels(30), NTSC, audio="aac")
    whole, part = video.read_video(source), video.read_video(source, limit)
    assert whole.total == part.total == 30 and len(part.frames) == min(limit, 30)
    assert torch.equal(part.frames, whole.frames[:limit]) and times(part) == times(whole)[:limit]
    assert part.rate == whole.rate == NTSC


def test_the_sound_of_the_first_frames_alone_ends_with_them(tmp_path: Path) -> None:
    """Copied or encoded; that of a whole clip may go on behind its picture."""
    for codec, out in (("aac", "out.mp4"), ("flac", "out.mov")):
        source = encode(tmp_path / f"{codec}.mkv", grey_levels(50), audio=codec)
        part = video.read_video(source, 10)
        video.write_video(tmp_path / out, part.frames, like=part)
        assert 0.3 < sound(tmp_path / out).shape[-1] / 48_000 < 0.5


def test_raw_stream_without_timestamps(tmp_path: Path) -> None:
    """Where the file has no clock, the frames follow each other at its average rate."""
    clip = video.read_video(encode(tmp_path / "in.h264", grey_levels(9), rate=Fraction(30)))
    assert times(clip) == [Fraction(i, 30) for i in range(9)] and clip.rate == 30


def test_gif_and_palette(tmp_path: Path) -> None:
    """A palette has its own path through the colour conversion."""
    clip = video.read_video(
        encode(tmp_path / "in.gif", grey_levels(4), codec="gif", pix_fmt="gray")
    )
    assert times(clip) == [Fraction(i, 25) for i in range(4)]
    assert (clip.frames.float().mean((1, 2, 3)) - 40 - 2 * torch.arange(4)).abs().max() < 1


# --- size and shape -------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(47, 64), (48, 63), (33, 21), (2, 3)])
def test_odd_sides_lose_one_pixel(tmp_path: Path, height: int, width: int) -> None:
    """4:2:0 has no odd sides: the frame is written without its last line, as the result says."""
    image = (
        torch.arange(width, dtype=torch.uint8)
        .mul(255 // width)
        .expand(3, height, width)
        .permute(1, 2, 0)
    )
    size = video.write_video(tmp_path / "out.mp4", image[None], fps=10)
    assert size == (height // 2 * 2, width // 2 * 2)
    (again,) = video.read_video(tmp_path / "out.mp4").frames
    assert again.shape == (*size, 3)
    assert (again.int() - image[: size[0], : size[1]].int()).abs().max() <= 8


def test_odd_sides_are_read(tmp_path: Path) -> None:
    """A source with odd sides is not cut on reading."""
    images = grey_levels(3, 45, 61)
    clip = video.read_video(
        encode(tmp_path / "in.webm", images, codec="libvpx-vp9", pix_fmt="yuv444p")
    )
    assert clip.frames.shape == (3, 45, 61, 3)


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_rotation_metadata_is_applied(tmp_path: Path, degrees: int, hflip: bool) -> None:
    """Phones store frames as the sensor sees them: corners end up where a player shows them."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :32], image[:16, 32:], image[16:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    images = image[None].repeat(2, 0)
    source = encode(tmp_path / "in.mp4", images, aspect=Fraction(4, 3), rotation=(degrees, hflip))
    upright = np.rot90(image, degrees // 90)
    upright = upright[:, ::-1] if hflip else upright
    clip = video.read_video(source)
    assert clip.frames.shape == (2, *upright.shape)
    assert np.abs(clip.frames[0].numpy().astype(int) - upright)[4::8, 4::8].max() < 30
    assert clip.pixel_aspect == (Fraction(3, 4) if degrees % 180 else Fraction(4, 3))

    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    again = video.read_video(tmp_path / "out.mp4")  # upright pixels, and no rotation on top of them
    assert again.frames.shape == clip.frames.shape and again.pixel_aspect == clip.pixel_aspect
    assert (again.frames.int() - clip.frames.int()).abs()[:, 4::8, 4::8].max() < 16


def test_change_of_size_midway_is_scaled(tmp_path: Path) -> None:
    """A stream whose frames change size gives one tensor, in the size of the first frame."""
    small = encode(tmp_path / "a.h264", grey_levels(3, 48, 64)).read_bytes()
    large = encode(tmp_path / "b.h264", grey_levels(6, 96, 80)[3:]).read_bytes()
    (tmp_path / "c.h264").write_bytes(small + large)
    clip = video.read_video(tmp_path / "c.h264")
    assert clip.frames.shape == (6, 48, 64, 3)
    assert (clip.frames.float().mean((1, 2, 3)) - 40 - 2 * torch.arange(6)).abs().max() < 2


def test_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    """An attached picture is neither taken for the video nor makes a song one."""
    for name, codecs in (("song.mp3", ["png"]), ("clip.mp4", ["png", "libx264"])):
        with av.open(str(tmp_path / name), "w") as out:
            audio = out.add_stream(
                "libmp3lame" if name == "song.mp3" else "aac", rate=48000, layout="stereo"
            )
            streams = [out.add_stream(codec, rate=25, width=64, height=48) for codec in codecs]
            streams[0].pix_fmt, streams[0].disposition = "rgb24", av.stream.Disposition.attached_pic
            for stream, count in zip(streams, (1, 5), strict=False):
                for image in grey_levels(count):
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                out.mux(stream.encode(None))
            frame = av.AudioFrame.from_ndarray(tone(0.5), format="s16", layout="stereo")
            frame.sample_rate = 48000
            out.mux(audio.encode(frame) + audio.encode(None))
    assert len(video.read_video(tmp_path / "clip.mp4").frames) == 5
    with pytest.raises(ValueError, match="song.mp3: has no video, only audio"):
        video.read_video(tmp_path / "song.mp3")


# --- colour ---------------------------------------------------------------------------------------

COLOURS = np.array(
    [
        *([255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]),
        *([128, 128, 128], [200, 100, 50], [10, 200, 220], [250, 240, 20], [90, 60, 30]),
    ],
    dtype=np.uint8,
)
# The weights of red and blue in luma, of BT.709, BT.601 and BT.2020.
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


def naive_yuv(rgb: np.ndarray, matrix: int = 1, full: bool = False, bits: int = 8) -> np.ndarray:
    """Y, Cb, Cr of one colour by the textbook, in code values (unrounded) of range and depth."""
    red, blue = LUMA[matrix]
    r, g, b = rgb / 255
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))
    if full:
        return (2**bits - 1) * np.array([y, cb, cr]) + np.array(
            [0, 2 ** (bits - 1), 2 ** (bits - 1)]
        )
    return 2 ** (bits - 8) * (
        np.array([219, 224, 224]) * np.array([y, cb, cr]) + np.array([16, 128, 128])
    )


def encode_yuv(
    path: Path,
    values: np.ndarray,
    height: int,
    width: int,
    bits: int,
    matrix: int,
    full: bool,
    tags: dict[str, int] | None = None,
) -> Path:
    """A lossless clip of one frame per row of `values`, given as code values of Y, Cb, Cr.

    tags: further properties of colour for the encoder, such as `color_trc`.
    """
    pix_fmt, dtype = ("yuv420p10le", np.uint16) if bits == 10 else ("yuv420p", np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(
            "libx265" if bits == 10 else "libx264", rate=25, width=width, height=height
        )
        stream.codec_context.options = (
            {"x265-params": "lossless=1:log-level=0"} if bits == 10 else {"qp": "0"}
        )
        stream.pix_fmt = pix_fmt
        for name, tag in (tags or {}).items():
            setattr(stream.codec_context, name, tag)
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        for number, value in enumerate(values):
            frame = av.VideoFrame(width, height, pix_fmt)
            for plane, level in zip(frame.planes, value, strict=True):
                level = min(round(level), 2**bits - 1)
                plane.update(np.full(plane.buffer_size // dtype().itemsize, level, dtype).tobytes())
            frame.pts = number
            frame.colorspace, frame.color_range = (
                matrix,
                ColorRange.JPEG if full else ColorRange.MPEG,
            )
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    "tag, used, full, bits, size",
    [
        (1, 1, False, 8, (32, 48)),  # BT.709, limited range
        (1, 1, True, 8, (32, 48)),  # full range
        (5, 5, False, 8, (32, 48)),  # BT.601
        (5, 5, True, 8, (32, 48)),
        (9, 9, False, 10, (32, 48)),  # BT.2020, 10 bits
        (1, 1, True, 10, (32, 48)),
        (2, 5, False, 8, (32, 48)),  # no tag: 601 for small frames,
        (2, 1, False, 8, (720, 1280)),  # 709 for large ones
    ],
)
def test_colours_are_read_by_their_tags(
    tmp_path: Path, tag: int, used: int, full: bool, bits: int, size: tuple[int, int]
) -> None:
    """Solid colours of every matrix, range and depth come back within 2 levels."""
    colours = COLOURS if size[0] < 720 else COLOURS[:3]
    values = np.stack([naive_yuv(colour, used, full, bits) for colour in colours])
    clip = video.read_video(encode_yuv(tmp_path / "in.mkv", values, *size, bits, tag, full))
    error = np.abs(clip.frames.numpy().astype(int) - colours[:, None, None])
    assert error.max() <= 2


@pytest.mark.parametrize("tag, name", [(8, "YCgCo"), (14, "ICtCp")])
def test_a_matrix_that_cannot_be_converted_is_named(tmp_path: Path, tag: int, name: str) -> None:
    """Before the edit: the file is neither damaged nor something else than a video."""
    source = encode_yuv(tmp_path / "in.mkv", np.full((2, 3), 128), 32, 48, 8, tag, False)
    for read in (video.read_video, video.open_video):
        with pytest.raises(
            ValueError, match=f"in.mkv: FFmpeg cannot convert .* from {name} to RGB"
        ):
            read(source)


def test_colours_are_written_as_bt709(tmp_path: Path) -> None:
    """The stored planes are the textbook's BT.709 in limited range, and the file says so."""
    for number, colour in enumerate(COLOURS):
        out = tmp_path / f"{number}.mp4"
        video.write_video(out, torch.from_numpy(colour).expand(1, 32, 48, 3))
        for plane, expected in zip(planes(out), naive_yuv(colour), strict=True):
            assert np.abs(plane - expected).max() <= 2
        with av.open(str(out)) as container:
            context = container.streams.video[0].codec_context
            frame = next(container.decode(video=0))
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert (frame.colorspace, frame.color_range) == (Colorspace.ITU709, ColorRange.MPEG)


def test_colour_is_not_shifted_against_brightness(tmp_path: Path) -> None:
    """A blue ramp in x: each chroma sample is that of the left of its two pixels, as players take
    it, and it comes back in its place.
    """
    blue = 40 + 3 * np.arange(64)
    image = np.full((32, 64, 3), (120, 100, 0), np.uint8)
    image[..., 2] = blue
    out = tmp_path / "out.mp4"
    video.write_video(out, torch.from_numpy(image)[None])
    textbook = np.array([naive_yuv(np.array([120, 100, level]))[1] for level in blue])
    pixels = (planes(out)[1][:, 4:-4] - textbook[8:-8:2]) / (textbook[1] - textbook[0])
    assert abs(pixels.mean()) < 0.2
    again = video.read_video(out).frames[0].numpy().astype(float)
    pixels = (again[..., 2] - again[..., 1] - (blue - 100)) / 3
    assert abs(pixels[8:-8, 8:-8].mean()) < 0.2


def test_output_opens_everywhere(tmp_path: Path) -> None:
    """H.264 high profile, 4:2:0, 8 bits, no reordering, and the index before the data."""
    out = tmp_path / "out.mp4"
    video.write_video(out, torch.from_numpy(grey_levels(30)), fps=NTSC)
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.profile, stream.pix_fmt) == (
            "h264",
            "High",
            "yuv420p",
        )
        packets = [packet for packet in container.demux(stream) if packet.size]
    assert [packet.dts for packet in packets] == [packet.pts for packet in packets]
    data = out.read_bytes()
    assert data.index(b"ftyp") < data.index(b"moov") < data.index(b"mdat")
    assert decoded(out)[0] == [i / NTSC for i in range(30)]


# --- writing --------------------------------------------------------------------------------------


def test_blocks_give_the_same_file_as_one_tensor(tmp_path: Path) -> None:
    """A long clip can be written as it is made."""
    frames = torch.from_numpy(grey_levels(10))
    video.write_video(tmp_path / "a.mp4", frames)
    video.write_video(tmp_path / "b.mp4", iter(frames.split([3, 1, 6])))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_source_can_be_overwritten(tmp_path: Path) -> None:
    """Writing to the file that the audio comes from works: it is replaced only at the end."""
    source = encode(tmp_path / "in.mp4", grey_levels(10), audio="aac")
    audio, clip = packet_list(source, "audio"), video.read_video(source)
    video.write_video(source, clip.frames, clip)
    assert packet_list(source, "audio") == audio and len(decoded(source)[0]) == 10


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failed_write(tmp_path: Path, error: type[BaseException]) -> None:
    """An error or Ctrl-C midway leaves the folder, and an older file of that name, as they were."""
    (tmp_path / "out.mp4").write_bytes(b"older")

    def blocks():
        yield torch.from_numpy(grey_levels(60))
        raise error

    with pytest.raises(error):
        video.write_video(tmp_path / "out.mp4", blocks())
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"older"


def test_wrong_number_of_frames_is_an_error(tmp_path: Path) -> None:
    """Frames that do not match the timestamps are not written."""
    clip = video.read_video(encode(tmp_path / "in.mp4", grey_levels(5)))
    for frames in (clip.frames[:4], clip.frames[[0, 1, 2, 3, 4, 4]], clip.frames[:0]):
        with pytest.raises(ValueError):
            video.write_video(tmp_path / "out.mp4", frames, clip)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unusable output is refused beforehand in one line that names it."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "missing" / "a.mp4")
    for path, error, message in [
        (folder, IsADirectoryError, "is a folder"),
        (tmp_path / "link.mp4", FileNotFoundError, "there is no folder"),
        (tmp_path / "missing" / "a.mp4", FileNotFoundError, "there is no folder"),
        (tmp_path / "file" / "a.mp4", FileNotFoundError, "there is no folder"),
        (tmp_path / "a.avi", ValueError, "must end in .mp4 or .mov, that of a still in .png"),
        (tmp_path / "a", ValueError, "must end in .mp4 or .mov, that of a still in .png"),
    ]:
        with pytest.raises(error, match=message) as caught:
            video.check_writable(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(error):
            video.write_video(path, torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    video.check_writable(tmp_path / "a.mp4")
    # Mocked, because the superuser may write to a folder that is read-only to others.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="a.mp4: .*read-only"):
        video.check_writable(tmp_path / "a.mp4")


def test_a_name_that_is_too_long_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Python 3.14, too, whose paths hide the error: a name of 249 bytes and "_edited"."""
    for name in ("exists", "is_dir", "is_symlink"):
        hiding = getattr(os.path, name.replace("_", "").replace("symlink", "link"))
        monkeypatch.setattr(Path, name, lambda path, hiding=hiding: hiding(path))
    with pytest.raises(OSError, match="File name too long"):
        video.check_writable(tmp_path / f"{'雪' * 83}_edited.mp4")


# --- errors ---------------------------------------------------------------------------------------


def test_files_that_are_not_videos(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is refused in one line that names the file and the fault; FFmpeg prints nothing."""
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("This is not a video.\n" * 100)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20000))
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><title>Vidéo</title>", "utf-8")
    for name in ("pointer.mp4", "pointer.jpg"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    with av.open(str(tmp_path / "audio.mp4"), "w") as out:
        track = out.add_stream("aac", rate=48000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(tone(0.5), format="s16", layout="stereo")
        frame.sample_rate = 48000
        out.mux(track.encode(frame) + track.encode(None))
    for name, error, message in [
        ("missing.mp4", FileNotFoundError, "no such file"),
        ("", IsADirectoryError, "is a folder"),
        ("empty.mp4", ValueError, "is empty"),
        ("text.mp4", ValueError, "not a video file, or cut short or damaged"),
        ("noise.mp4", ValueError, "not a video file, or cut short or damaged"),
        ("page.mp4", ValueError, "page.mp4: it is a web page: download it again"),
        ("pointer.mp4", ValueError, "pointer.mp4: it is a Git LFS pointer"),
        ("pointer.jpg", ValueError, "pointer.jpg: it is a Git LFS pointer"),
        ("audio.mp4", ValueError, "has no video, only audio"),
    ]:
        with pytest.raises(error, match=message) as caught:
            video.read_video(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name, audio, container",
    [
        ("in.mp4", "aac", {}),
        ("in.mp4", "aac", {"movflags": "faststart"}),
        ("in.mp4", None, {"movflags": "faststart"}),
        ("in.mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}),
        ("in.mkv", "aac", {}),
        ("in.mkv", None, {}),
        ("in.avi", "libmp3lame", {}),
        ("in.avi", None, {}),
    ],
)
def test_truncated_files_are_refused(
    tmp_path: Path,
    name: str,
    audio: str | None,
    container: dict[str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A file cut anywhere is an error rather than a silently shorter clip; a whole one is not."""
    images = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    whole = encode(tmp_path / name, images, audio=audio, container=container)
    assert len(video.read_video(whole).frames) == 60
    data = whole.read_bytes()
    cut = tmp_path / f"cut{whole.suffix}"
    for length in (len(data) * percent // 100 for percent in (1, 20, 50, 70, 99)):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut short|damaged") as caught:
            video.read_video(cut)
        assert str(cut) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_truncated_packet_is_refused(tmp_path: Path) -> None:
    """A format that declares no length (FLV) shows a cut by a packet that is incomplete."""
    whole = encode(tmp_path / "in.flv", grey_levels(60))
    with av.open(str(whole)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
    for position, size in places[10::20]:
        half = position + 16 + size // 2  # 16: the headers of the tag and of the packet
        (tmp_path / "cut.flv").write_bytes(whole.read_bytes()[:half])
        with pytest.raises(ValueError, match="cut short"):
            video.read_video(tmp_path / "cut.flv")


@pytest.mark.parametrize("how", ["by FFmpeg", "by Pillow", "with zeros between its blocks"])
def test_a_gif_without_its_end_is_refused(tmp_path: Path, how: str) -> None:
    """Cut anywhere, or never filled. What is appended to a whole one does no harm."""
    images = np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), dtype=np.uint8)
    source = tmp_path / "in.gif"
    if how == "by FFmpeg":
        encode(source, images, codec="gif", pix_fmt="rgb8")
    else:
        first, *rest = (Image.fromarray(image) for image in images)
        first.save(source, save_all=True, append_images=rest, duration=40, comment=b"a" * 700)
    data = source.read_bytes()
    if how == "with zeros between its blocks":
        data = data[:-1] + bytes(3) + data[-1:]
    for whole in (data, data + b"text behind it", data + bytes(5000)):
        source.write_bytes(whole)
        assert len(video.read_video(source).frames) == 6
    for length in (len(data) * percent // 100 for percent in range(20, 100, 7)):
        for cut in (data[:length], data[:length] + bytes(len(data) - length)):
            source.write_bytes(cut)
            with pytest.raises(ValueError, match="in.gif: .*cut short"):
                video.read_video(source)


def test_a_wmv_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    """Its header has the size; of a broadcast the size says nothing."""
    source = flash_and_beep(tmp_path / "in.wmv", codec="wmv2", audio="wmav2", layout="stereo")
    data = source.read_bytes()
    assert len(video.read_video(source).frames) == 75
    for percent in (30, 70, 99):
        source.write_bytes(data[: len(data) * percent // 100])
        with pytest.raises(ValueError, match="in.wmv: .*cut short"):
            video.read_video(source)
    flags = data.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")) + 88
    assert data[flags] == 2  # it can be sought in
    data = data[:flags] + b"\1" + data[flags + 1 :]
    source.write_bytes(data[: len(data) * 70 // 100])
    assert 20 < len(video.read_video(source).frames) < 75


@pytest.mark.parametrize(
    "name, codec, audio",
    [
        ("in.mkv", "libx264", "aac"),
        ("in.webm", "libvpx-vp9", "libopus"),
        ("in.avi", "mpeg4", "libmp3lame"),
        ("in.flv", "libx264", "aac"),
    ],
)
def test_a_download_that_stopped_is_refused(
    tmp_path: Path, name: str, codec: str, audio: str
) -> None:
    """Some programs make a file as large as it will be, and zeros stay where nothing came."""
    source = flash_and_beep(tmp_path / name, codec=codec, audio=audio)
    data = source.read_bytes()
    for whole in (data, data + bytes(5000)):
        source.write_bytes(whole)
        assert len(video.read_video(source).frames) == 75
    for length in (len(data) * percent // 100 for percent in (40, 70)):
        source.write_bytes(data[:length] + bytes(len(data) - length))
        with pytest.raises(ValueError, match=f"{name}: .*(cut short|damaged)"):
            video.read_video(source)


def test_live_recordings_declare_no_length(tmp_path: Path) -> None:
    """A Matroska file written to a stream has no size to check against, and is read."""
    live = encode(tmp_path / "in.mkv", grey_levels(10), container={"live": "1"})
    assert len(video.read_video(live).frames) == 10
    live.write_bytes(live.read_bytes()[:-200])
    assert len(video.read_video(live).frames) < 10


@pytest.mark.parametrize("movflags", ["faststart", "default_base_moof"])
def test_long_and_appended_boxes(tmp_path: Path, movflags: str) -> None:
    """An MP4 may have 64-bit sizes, a last box without a size, and bytes behind it."""
    source = tmp_path / "in.mp4"
    data = encode(
        source, grey_levels(10), audio="aac", container={"movflags": movflags}
    ).read_bytes()
    start = data.index(b"mdat") - 4
    size = int.from_bytes(data[start : start + 4], "big")
    # An empty "free" box is in front of the data: together, the two headers are as long as one
    # with a 64-bit size.
    assert data[start - 8 : start] == b"\0\0\0\x08free"
    long = data[: start - 8] + b"\0\0\0\1mdat" + (size + 8).to_bytes(8, "big") + data[start + 8 :]
    whole = [data, long, data + b"\x7f\0\0\0junk", data + b"\0\0\0\1junk" + bytes(8)]
    if movflags == "faststart":
        whole.append(data[:start] + bytes(4) + data[start + 4 :])
    for content in whole:
        source.write_bytes(content)
        assert len(video.read_video(source).frames) == 10
    for content in (data[:-1], long[:-1]):
        source.write_bytes(content)
        with pytest.raises(ValueError, match="cut short"):
            video.read_video(source)


def test_damaged_frames_are_refused(tmp_path: Path) -> None:
    """Frames that do not decode are an error, but not before the first good one."""
    source = encode(tmp_path / "in.mp4", grey_levels(30), g="10", bf="0", sc_threshold="0")
    with av.open(str(source)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux() if packet.size]

    def damage(places: list[tuple[int, int]]) -> Path:
        data = bytearray(source.read_bytes())
        for position, size in places:
            data[position : position + size] = b"\xff" * size
        (tmp_path / "broken.mp4").write_bytes(data)
        return tmp_path / "broken.mp4"

    for broken, message in (
        (places[15:16], "broken.mp4: .*damaged"),
        (places, "broken.mp4: .*not one frame"),
    ):
        with pytest.raises(ValueError, match=message):
            video.read_video(damage(broken))
    assert times(video.read_video(damage(places[:10]))) == [Fraction(i, 25) for i in range(10, 30)]


# --- clips as people have them --------------------------------------------------------------------


def flash_and_beep(
    path: Path,
    seconds: int = 3,
    codec: str = "libx264",
    audio: str = "aac",
    rate: int = 25,
    audio_rate: int = 48000,
    layout: str = "mono",
    audio_from: float = 0.0,
    container: dict[str, str] | None = None,
    start: int = 0,
) -> Path:
    """A white flash and a beep in the middle of every second, from the same moment on.

    start: seconds on the file's clock at which it begins.
    """
    with av.open(str(path), "w", container_options=container or {}) as out:
        picture = out.add_stream(codec, rate=rate, width=64, height=48)
        picture.pix_fmt, picture.codec_context.time_base = "yuv420p", Fraction(1, rate)
        sound = out.add_stream(audio, rate=audio_rate, layout=layout)
        packets = []
        for i in range(seconds * rate):
            level = 230 if rate // 2 <= i % rate < rate // 2 + 3 else 20
            image = np.full((48, 64, 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = start * rate + i, Fraction(1, rate)
            packets += picture.encode(frame)
        packets += picture.encode(None)

        time = np.arange(round(audio_from * audio_rate), seconds * audio_rate) / audio_rate
        beeping = (time % 1 >= rate // 2 / rate) & (time % 1 < rate // 2 / rate + 0.1)
        channels = av.AudioLayout(layout).nb_channels
        if audio == "wmav2":
            sound.bit_rate = 128_000
        samples = np.repeat((12000 * np.sin(6283 * time) * beeping).astype(np.int16), channels)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout=layout)
        frame.sample_rate, frame.time_base = audio_rate, Fraction(1, audio_rate)
        frame.pts = start * audio_rate + round(audio_from * audio_rate)
        packets += sound.encode(frame) + sound.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    return path


def onsets(path: Path) -> tuple[list[float], list[float]]:
    """When flashes and beeps begin, in seconds, by PyAV's plain decoders."""
    with av.open(str(path)) as container:
        frames = [
            (frame.time, frame.to_ndarray(format="gray").mean())
            for frame in container.decode(video=0)
        ]
    flashes = [t for (_, before), (t, now) in itertools.pairwise(frames) if before < 125 <= now]
    level = np.abs(sound(path))
    loud = np.flatnonzero(level > 0.1)
    quiet_before = np.diff(loud, prepend=-48000) > 9600
    return flashes, list(loud[quiet_before] / 48000)


def edited(path: Path, out: Path) -> video.Video:
    """Read a clip and write it again."""
    clip = video.read_video(path)
    video.write_video(out, clip.frames, clip)
    return clip


def assert_in_step(path: Path, count: int, within: float = 0.03) -> None:
    """Each of `count` flashes comes with its beep."""
    flashes, beeps = onsets(path)
    assert len(flashes) == len(beeps) == count
    assert np.abs(np.subtract(flashes, beeps)).max() < within


def remux(source: Path, target: Path, change: Callable[[av.Packet, int], bool | None]) -> Path:
    """Copy a file packet by packet; `change` may alter one, or drop it by returning False."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        tracks = {s.index: new.add_stream_from_template(s) for s in old.streams}
        counts = dict.fromkeys(tracks, -1)
        for packet in old.demux():
            index = packet.stream.index
            counts[index] += 1
            if packet.size and change(packet, counts[index]) is not False:
                packet.stream = tracks[index]
                new.mux(packet)
    return target


def two_sounds_at_a_time(path: Path) -> None:
    """A packet that has the time of the one before."""
    times = {}

    def repeat(packet: av.Packet, number: int) -> None:
        times[number] = packet.pts
        if packet.stream.type == "audio" and number == 30:
            packet.pts = packet.dts = times[29]

    remux(flash_and_beep(path.with_suffix(".src.mkv")), path.with_suffix(".mkv"), repeat)


def lost_transport_packet(path: Path) -> None:
    """188 bytes of the sound are missing in a broadcast."""
    data = flash_and_beep(path.with_suffix(".ts")).read_bytes()
    packets = [data[i : i + 188] for i in range(0, len(data), 188)]
    audio = [i for i, p in enumerate(packets) if (p[1] & 31) << 8 | p[2] == 0x101]
    del packets[audio[len(audio) // 3]]
    path.with_suffix(".ts").write_bytes(b"".join(packets))


def empty_sound_track(path: Path) -> None:
    """A broadcast declares a second track and sends nothing on it."""
    source = flash_and_beep(path.with_suffix(".src.ts"))
    with av.open(str(source)) as old, av.open(str(path.with_suffix(".ts")), "w") as new:
        tracks = [new.add_stream_from_template(s) for s in old.streams]
        new.add_stream_from_template(old.streams.audio[0])
        for packet in old.demux():
            if packet.dts is not None:
                packet.stream = tracks[packet.stream.index]
                new.mux(packet)


def stereo_becomes_mono(path: Path, audio: str) -> None:
    """A broadcast whose sound changes its form."""
    name = path.with_suffix(".ts")
    both = b"".join(
        flash_and_beep(name, layout=layout, audio=audio).read_bytes()
        for layout in ("stereo", "mono")
    )
    name.write_bytes(both)


def sound_of_a_camera(path: Path, ending: str, audio: str, rate: int = 48000) -> None:
    """Sound in one of the codecs that older cameras and recorders write."""
    codec = {".avi": "mpeg4", ".wmv": "wmv2", ".ts": "libx264"}[ending]
    layout = "stereo" if audio == "wmav2" else "mono"
    name = path.with_suffix(ending)
    flash_and_beep(name, codec=codec, audio=audio, audio_rate=rate, layout=layout)


def late_sound_track(path: Path) -> None:
    """Sound that begins behind the part of the file that FFmpeg looks at first."""
    flash_and_beep(path.with_suffix(".ts"), 9, audio_from=7.4)


# What is wrong with the sound: how the clip is made, its seconds, the codec that is written, and
# what is said about it ("": nothing, None: not of interest).
KINDS_OF_SOUND = {
    "two packets at a time": (two_sounds_at_a_time, 3, "aac", ""),
    "an empty track": (empty_sound_track, 3, "aac", "left out"),
    "a late track": (late_sound_track, 9, "aac", None),
    "a lost packet": (lost_transport_packet, 3, "aac", None),
    "stereo, then mono AAC": (lambda p: stereo_becomes_mono(p, "aac"), 6, "aac", "encoded again"),
    "stereo, then mono MP2": (lambda p: stereo_becomes_mono(p, "mp2"), 6, "aac", ""),
    "WMA": (lambda p: sound_of_a_camera(p, ".wmv", "wmav2"), 3, "aac", ""),
    "MP3 at 11 kHz": (
        lambda p: sound_of_a_camera(p, ".avi", "libmp3lame", 11025), 3, "aac", "encoded again"
    ),
    "MP3 at 48 kHz": (lambda p: sound_of_a_camera(p, ".avi", "libmp3lame"), 3, "mp3float", ""),
    "ADPCM": (lambda p: sound_of_a_camera(p, ".avi", "adpcm_ms"), 3, "aac", ""),
    "A-law": (lambda p: sound_of_a_camera(p, ".avi", "pcm_alaw", 8000), 3, "aac", ""),
    "E-AC-3 in a broadcast": (lambda p: sound_of_a_camera(p, ".ts", "eac3"), 3, "eac3", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_SOUND)
def test_sound_never_costs_the_picture(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with the sound, the clip is written, with all that can be saved of it."""
    make, seconds, codec, note = KINDS_OF_SOUND[kind]
    make(tmp_path / "in")
    (source,) = (path for path in tmp_path.iterdir() if path.stem == "in")
    clip = edited(source, tmp_path / "out.mp4")
    assert len(clip.frames) >= 25 * seconds - 2
    with av.open(str(tmp_path / "out.mp4")) as container:
        (track,) = container.streams.audio
        assert track.codec.name == codec
    if "late" in kind:
        flashes, beeps = onsets(tmp_path / "out.mp4")
        assert len(flashes) == seconds and len(beeps) == 2
        assert np.abs(np.subtract(flashes[-2:], beeps)).max() < 0.03
    else:
        assert_in_step(tmp_path / "out.mp4", seconds)
    notes = capsys.readouterr().err
    assert note is None or (note in notes and notes.count("\n") == (note != ""))


def test_sound_that_nothing_helps_is_left_out_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random bytes for sound, in a codec that is copied and in one that is not."""
    noise = np.random.default_rng(0)

    def spoil(packet: av.Packet, number: int) -> None:
        if packet.stream.type == "audio":
            packet.update(noise.bytes(packet.size))

    for audio in ("aac", "flac"):
        good = flash_and_beep(tmp_path / "good.mkv", audio=audio)
        bad = remux(good, tmp_path / "bad.mkv", spoil)
        clip = video.read_video(bad)
        video.prepare_edit(clip, tmp_path / "out.mov")
        noted = capsys.readouterr().err
        video.write_video(tmp_path / "out.mov", clip.frames, clip)
        assert capsys.readouterr().err == ""  # it was said before, and only once
        assert len(decoded(tmp_path / "out.mov")[0]) == 75
        assert "bad.mkv" in noted and "left out" in noted and noted.count("\n") == 1
        assert packet_list(tmp_path / "out.mov", "audio") == []


@pytest.mark.parametrize("audio", ["aac", "mp2"])
def test_sound_goes_on_long_after_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, audio: str
) -> None:
    """A talk with one picture, which is shown for a second, is kept to its end."""
    monkeypatch.setattr(video, "LONGEST_GAP", 2)  # instead of an hour

    def one_picture(packet: av.Packet, number: int) -> bool:
        return packet.stream.type == "audio" or number == 0

    talk = remux(
        flash_and_beep(tmp_path / "a.mkv", 9, audio=audio), tmp_path / "in.mp4", one_picture
    )
    clip = edited(talk, tmp_path / "out.mp4")
    assert len(clip.frames) == 1
    assert len(sound(tmp_path / "out.mp4")) == pytest.approx(9 * 48000, rel=0.01)


def test_channels_in_an_order_of_their_own(tmp_path: Path) -> None:
    """PCM 7.1 whose sides come before its back: each channel comes out where it belongs."""
    names = ["FL", "FR", "FC", "LFE", "SL", "SR", "BL", "BR"]
    source = tmp_path / "in.mov"
    with av.open(str(source), "w") as out:
        picture = out.add_stream("libx264", rate=25, width=64, height=48)
        sound_track = out.add_stream("pcm_s16le", rate=48000, layout="7.1")
        for image in grey_levels(25):
            out.mux(picture.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(picture.encode(None))
        time = np.arange(48000) / 48000
        pitches = 50 + 10 * np.arange(8)  # Hz, low enough for the LFE
        samples = 12000 * np.sin(2 * np.pi * pitches * time[:, None])
        frame = av.AudioFrame.from_ndarray(samples.astype(np.int16).reshape(1, -1), "s16", "7.1")
        frame.sample_rate = 48000
        out.mux(sound_track.encode(frame))
        out.mux(sound_track.encode(None))
    data = source.read_bytes()
    place = data.index(b"chan") + 8  # behind the name, version and flags: tag, bitmap
    own_order = bytes.fromhex("00800008 00000000")  # MPEG 7.1 C: L R C LFE Ls Rs Rls Rrs
    source.write_bytes(data[:place] + own_order + data[place + 8 :])

    edited(source, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        packed = av.AudioResampler("flt", "7.1", 48000)
        frames = [f for frame in container.decode(audio=0) for f in packed.resample(frame)]
        layout = container.streams.audio[0].codec_context.layout
    written = np.concatenate([frame.to_ndarray()[0] for frame in frames]).reshape(-1, 8)
    found = np.abs(np.fft.rfft(written[4800:43200], 48000, axis=0)).argmax(0)
    order = [channel.name for channel in layout.channels]
    assert layout.name == "7.1"
    assert dict(zip(order, found.tolist(), strict=True)) == dict(
        zip(names, pitches.tolist(), strict=True)
    )


def test_languages_and_the_default_track_are_kept(tmp_path: Path) -> None:
    """German first, English as the default: players choose the same as before."""
    with av.open(str(flash_and_beep(tmp_path / "one.mkv"))) as old:
        with av.open(str(tmp_path / "in.mkv"), "w") as new:
            picture = new.add_stream_from_template(old.streams.video[0])
            tracks = [new.add_stream_from_template(old.streams.audio[0]) for _ in range(2)]
            for track, language in zip(tracks, ("deu", "eng"), strict=True):
                track.metadata["language"] = language
            tracks[1].disposition = av.stream.Disposition.default
            for packet in old.demux():
                if not packet.size:
                    continue
                copies = [picture] if packet.stream.type == "video" else tracks
                for track in copies:
                    packet.stream = track
                    new.mux(packet)
    # QuickTime has a list of languages of its own, where German is "ger".
    for name, german in (("out.mp4", "deu"), ("out.mov", "ger")):
        edited(tmp_path / "in.mkv", tmp_path / name)
        with av.open(str(tmp_path / name)) as container:
            found = [(s.language, bool(s.disposition & 1)) for s in container.streams.audio]
        assert found == [(german, False), ("eng", True)]


# --- picture and sound stay together --------------------------------------------------------------


def test_a_repeated_timestamp_costs_no_other(tmp_path: Path) -> None:
    """A variable rate with one time given twice: all other times stay, and it gets one between."""
    pts = [0, 33, 70, 70, 400, 1000, 1017]
    clip = flash_and_beep(tmp_path / "a.mkv")

    def stamp(packet: av.Packet, number: int) -> bool:
        packet.pts = packet.dts = pts[number] if number < len(pts) else 0
        return packet.stream.type == "video" and number < len(pts)

    options = dict(bf="0", g="1")
    encode(clip, grey_levels(7), **options)
    source = remux(clip, tmp_path / "in.mkv", stamp)
    found = [round(1000 * t) for t in times(video.read_video(source))]
    assert [t for t, was in zip(found, pts, strict=True) if t == was] == [
        0,
        33,
        70,
        400,
        1000,
        1017,
    ]
    assert found == sorted(set(found))


def test_wrong_times_are_mended_alone() -> None:
    """What is missing, repeated or far off gets a time between its neighbours."""
    assert video._mended([0, 1, 2, 900, 4, 5], 1) == ([0, 2, 4, 6, 8, 10], 2)
    assert video._mended([0, 10, None, None, 40], 10) == ([0, 30, 60, 90, 120], 3)
    assert video._mended([None, 10, 20, None], 10) == ([0, 10, 20, 30], 1)
    assert video._mended([None, None], 7) == ([0, 7], 1)
    assert video._mended([5, 6, 7], 1) == ([5, 6, 7], 1)
    assert video._mended([0, 1, 2, 9000, 9001], 1, gap=100) == ([0, 1, 2, 3, 4], 1)
    assert video._mended([0, 9000, 9001, 9002], 1, gap=100) == ([8999, 9000, 9001, 9002], 1)


@pytest.mark.parametrize("ending", [".flv", ".mkv", ".ts", ".mp4", ".asf"])
def test_a_clock_that_begins_at_an_hour_begins_at_zero(tmp_path: Path, ending: str) -> None:
    """A recording of a broadcast has no hour of nothing in front."""
    source = flash_and_beep(tmp_path / f"in{ending}", start=3600)
    clip = edited(source, tmp_path / "out.mp4")
    assert 3599 < clip.start < 3602 and 0 <= times(clip)[0] < 0.1
    assert_in_step(tmp_path / "out.mp4", 3)


def test_a_clock_that_jumps_by_days_goes_on(tmp_path: Path) -> None:
    """A wrong clock must not make a clip of days, which no player and no MP4 file takes."""

    def jump(packet: av.Packet, number: int) -> None:
        if packet.pts * packet.time_base >= 1:
            days = round(400_000 / packet.time_base)
            packet.pts, packet.dts = packet.pts + days, packet.dts + days

    source = flash_and_beep(tmp_path / "whole.mkv")
    clip = edited(remux(source, tmp_path / "in.mkv", jump), tmp_path / "out.mp4")
    assert len(clip.frames) == 75 and times(clip)[-1] < 3.1
    assert_in_step(tmp_path / "out.mp4", 3, within=0.06)


@pytest.mark.parametrize("rates", [(25, 50), (50, 25)])
def test_joined_recordings_of_two_rates_stay_in_step(
    tmp_path: Path, rates: tuple[int, int]
) -> None:
    """Each part keeps its rate and its sound."""
    parts = [flash_and_beep(tmp_path / f"{rate}.ts", rate=rate) for rate in rates]
    (tmp_path / "in.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = edited(tmp_path / "in.ts", tmp_path / "out.mp4")
    assert len(clip.frames) == 3 * 25 + 3 * 50
    assert float(times(clip)[-1]) == pytest.approx(6, abs=0.1)
    assert_in_step(tmp_path / "out.mp4", 6)


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_a_pause_of_one_stream_is_no_join(tmp_path: Path, kind: str) -> None:
    """A broadcast without sound, or without a new picture, for 12 s while the other runs on."""

    def pause(packet: av.Packet, number: int) -> bool:
        return packet.stream.type != kind or not 2 <= packet.pts * packet.time_base < 14

    whole = flash_and_beep(tmp_path / "whole.mkv", 17, audio="mp2")
    edited(remux(whole, tmp_path / "in.ts", pause), tmp_path / "out.mp4")
    flashes, beeps = onsets(tmp_path / "out.mp4")
    rest = [0.5, 1.5, 14.5, 15.5, 16.5]
    every = [i + 0.5 for i in range(17)]
    expected = (every, rest) if kind == "audio" else (rest, every)
    assert flashes == pytest.approx(expected[0], abs=0.05)
    assert beeps == pytest.approx(expected[1], abs=0.05)


def test_dropped_frames_of_an_avi_keep_their_time(tmp_path: Path) -> None:
    """Screen recorders leave frames out: an empty chunk, or none at all."""
    source = flash_and_beep(tmp_path / "a.avi", codec="mpeg4", audio="libmp3lame")

    def drop(packet: av.Packet, number: int) -> bool:
        return packet.stream.type == "audio" or number % 25 not in (3, 4, 5, 20, 21)

    dropped = remux(source, tmp_path / "in.avi", drop)
    clip = edited(dropped, tmp_path / "out.mp4")
    assert len(clip.frames) == 60
    assert_in_step(tmp_path / "out.mp4", 3, within=0.09)


@pytest.mark.parametrize(
    "audio, name", [("aac", "out.mp4"), ("pcm_s16le", "out.mov"), ("pcm_s16le", "out.mp4")]
)
def test_what_an_edit_list_hides_is_neither_counted_nor_heard(
    tmp_path: Path, audio: str, name: str
) -> None:
    """A clip whose first second is cut off by an edit list, as trimming without encoding does."""

    def earlier(packet: av.Packet, number: int) -> None:
        ticks = round(Fraction(6, 5) / packet.time_base)
        packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks

    whole = flash_and_beep(tmp_path / "whole.mov", 4, audio=audio)
    source = remux(whole, tmp_path / "in.mov", earlier)
    clip = edited(source, tmp_path / name)
    assert len(clip.frames) == clip.total == 70 and times(clip)[0] == 0
    assert_in_step(tmp_path / name, 3)
    stored = packet_list(tmp_path / name, "audio")[0]
    assert stored[0][0] > -0.1  # nor is it in the file


# --- colours of newer phones, and of older cameras ------------------------------------------------

SDR_COLOURS = np.array(
    [
        *([191, 191, 191], [191, 191, 0], [0, 191, 191], [0, 191, 0], [191, 0, 191], [191, 0, 0]),
        *([0, 0, 191], [128, 128, 128], [200, 150, 120], [250, 250, 250], [60, 90, 40]),
        *([16, 16, 16], [0, 0, 0]),
    ]
)


def xyz_of(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1, (1 - x - y) / y])


D65, DCI_WHITE = xyz_of(0.3127, 0.3290), xyz_of(0.314, 0.351)


def chromaticities(corners: list[tuple[float, float]], white: np.ndarray = D65) -> np.ndarray:
    """Linear RGB -> XYZ, from the chromaticities of red, green and blue."""
    xyz = np.array([xyz_of(x, y) for x, y in corners]).T
    return xyz * np.linalg.solve(xyz, white)


BT709 = chromaticities([(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)])
BT2020 = chromaticities([(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)])
P3 = [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]
# Bradford: XYZ -> the cones' responses, in which one white is scaled to the other.
CONES = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
FROM_DCI_WHITE = np.linalg.inv(CONES) @ np.diag(CONES @ D65 / (CONES @ DCI_WHITE)) @ CONES
DISPLAY_P3, DCI_P3 = chromaticities(P3), FROM_DCI_WHITE @ chromaticities(P3, DCI_WHITE)


def naive_hdr(rgb: np.ndarray, transfer: str) -> np.ndarray:
    """The BT.2020 signal in [0, 1] of one SDR colour, with SDR white at 203 cd/m² (BT.2408)."""
    light = np.linalg.inv(BT2020) @ BT709 @ ((rgb / 255) ** 2.4)  # 1 is SDR white
    light = np.maximum(light, 0)
    if transfer == "sdr":
        return light ** (1 / 2.4)
    if transfer == "pq":
        power = (light * 203 / 10000) ** (2610 / 16384)
        return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    # HLG: the inverse OOTF of a display of 1000 cd/m² with gamma 1.2, then the OETF.
    display = light * 203 / 1000
    luminance = display @ [0.2627, 0.6780, 0.0593]
    scene = display * max(luminance, 1e-9) ** (-0.2 / 1.2)
    bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


@pytest.mark.parametrize("transfer, tag", [("hlg", 18), ("pq", 16), ("sdr", 14)])
def test_hdr_and_wide_colours_become_bt709(tmp_path: Path, transfer: str, tag: int) -> None:
    """Colours within the range of SDR come back within 6 levels, whatever they were stored in."""
    signals = [naive_hdr(colour, transfer) * 255 for colour in SDR_COLOURS]
    values = np.stack([naive_yuv(signal, 9, bits=10) for signal in signals])
    tags = dict(color_trc=tag, color_primaries=9)
    source = encode_yuv(tmp_path / "in.mkv", values, 32, 48, 10, 9, False, tags)
    clip = video.read_video(source)
    error = np.abs(clip.frames.numpy().astype(int) - SDR_COLOURS[:, None, None])
    assert error.max() <= 6


@pytest.mark.parametrize("tag, primaries", [(11, DCI_P3), (12, DISPLAY_P3)])
def test_p3_becomes_bt709(tmp_path: Path, tag: int, primaries: np.ndarray) -> None:
    """Colours within BT.709 come back within 3 levels, with and without a tag of their matrix."""
    light = (SDR_COLOURS / 255) ** 2.4 @ (np.linalg.inv(primaries) @ BT709).T
    signals = 255 * np.maximum(light, 0) ** (1 / 2.4)
    for matrix, used in ((1, 1), (2, 5)):
        values = np.stack([naive_yuv(signal, used, bits=10) for signal in signals])
        tags = dict(color_trc=1, color_primaries=tag)
        source = encode_yuv(tmp_path / "in.mkv", values, 32, 48, 10, matrix, False, tags)
        clip = video.read_video(source)
        error = np.abs(clip.frames.numpy().astype(int) - SDR_COLOURS[:, None, None])
        assert error.max() <= 3


def test_highlights_keep_their_hue_and_order(tmp_path: Path) -> None:
    """Light above SDR white is compressed: never dimmer than white, and red stays red."""
    greys = np.linspace(0.6, 1, 9)[:, None] * np.full(3, 255)
    values = np.stack([naive_yuv(grey, 9, bits=10) for grey in [*greys, np.array([250, 120, 120])]])
    tags = dict(color_trc=18, color_primaries=9)
    clip = video.read_video(encode_yuv(tmp_path / "in.mkv", values, 32, 48, 10, 9, False, tags))
    levels = clip.frames[:, 5, 5].int()
    assert (levels[1:9, 0] >= levels[:8, 0]).all() and (levels[4:9] >= 250).all()
    assert levels[9, 0] >= 250 and levels[9, 1] < 200


def test_interlaced_frames_are_deinterlaced(tmp_path: Path) -> None:
    """A moving edge has no comb, and a still picture stays sharp; times and number stay."""
    images = np.full((12, 64, 96, 3), 40, np.uint8)
    for i, image in enumerate(images):
        image[::2, : 8 + 8 * i] = 220  # the two fields are taken at two moments
        image[1::2, : 12 + 8 * i] = 220
    source = encode(tmp_path / "in.mkv", images, codec="mpeg2video", qmin="1", qmax="2",
                    flags="+ildct+ilme", top="1")  # fmt: skip
    stored = decoded(source)[1][6].astype(int)
    clip = video.read_video(source)
    frame = clip.frames[6].int().numpy()
    assert len(clip.frames) == 12 and times(clip) == decoded(source)[0]

    def comb(image: np.ndarray) -> float:
        """How much lines differ from both their neighbours."""
        return np.abs(2 * image[1:-1] - image[:-2] - image[2:]).mean()

    assert comb(stored) > 5 * comb(frame)
    assert (clip.frames[6, 8:-8, :24].int() - 220).abs().max() < 12


# --- the right stream, all of it ------------------------------------------------------------------


def test_the_default_stream_is_the_video_and_not_a_preview(tmp_path: Path) -> None:
    """Marked as default before anything else, then the largest."""
    for name, default, expected in [
        ("a.mkv", 0, (240, 320)),
        ("b.mkv", 1, (48, 64)),
        ("c.avi", None, (240, 320)),
    ]:
        with av.open(str(tmp_path / name), "w") as out:
            sizes = [(320, 240), (64, 48), (128, 96)] if default == 0 else [(64, 48), (320, 240)]
            streams = [out.add_stream("mpeg4", rate=25, width=w, height=h) for w, h in sizes]
            if default is not None:
                index = 0
                streams[index].disposition = av.stream.Disposition.default
            for stream in streams:
                for image in grey_levels(3, stream.height, stream.width):
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                out.mux(stream.encode(None))
        assert video.read_video(tmp_path / name).frames.shape[1:3] == expected


def test_an_empty_packet_shows_the_frame_before_once_more(tmp_path: Path) -> None:
    """As Theora stores frames that did not change."""
    with av.open(str(encode(tmp_path / "a.mkv", grey_levels(6), codec="mpeg4"))) as old:
        with av.open(str(tmp_path / "in.nut"), "w") as new:
            track = new.add_stream_from_template(old.streams.video[0])
            for number, packet in enumerate(old.demux()):
                if packet.dts is None:
                    continue
                if number in (2, 3, 5):
                    empty = av.Packet(0)
                    empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                    packet = empty
                packet.stream = track
                new.mux(packet)
    clip = video.read_video(tmp_path / "in.nut")
    means = clip.frames.float().mean((1, 2, 3))
    assert clip.total == 6 and times(clip) == [Fraction(i, 25) for i in range(6)]
    assert (means - torch.tensor([40.0, 42, 42, 42, 48, 48])).abs().max() < 1.5


def test_an_avi_of_unknown_size_is_complete(tmp_path: Path) -> None:
    """Written to a pipe, an AVI file says FFFFFFFF where its size belongs."""
    source = encode(tmp_path / "in.avi", grey_levels(10), codec="mpeg4")
    data = source.read_bytes()
    source.write_bytes(data[:4] + b"\xff" * 4 + data[8:])
    assert len(video.read_video(source).frames) == 10


# --- nothing else is opened, nothing is lost ------------------------------------------------------


@pytest.mark.parametrize("ending", [".mp4", ".m3u8", ".txt", ".png", ".ts"])
@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n",  # live: FFmpeg would wait for more
        "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
        "file '{}'\n",
        "\x1b[31m ANSI art \x1b[0m\n" * 50,
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><Period/></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_scripts_are_no_clips(tmp_path: Path, text: str, ending: str) -> None:
    """Whatever its name, a text that leads to other files or addresses is refused."""
    encode(tmp_path / "real.ts", grey_levels(5))
    (tmp_path / f"in{ending}").write_text(text.format("real.ts"))
    with pytest.raises(ValueError, match="in.*: not a video file.*it is a text") as caught:
        video.read_video(tmp_path / f"in{ending}")
    assert "\n" not in str(caught.value)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    """Reading them may never end."""
    os.mkfifo(tmp_path / "in.mp4")
    for path in (tmp_path / "in.mp4", "/dev/zero"):
        with pytest.raises(ValueError, match="is a pipe or a device"):
            video.read_video(path)


@pytest.mark.parametrize("size", [(48, 16640), (16640, 48)])
def test_sizes_beyond_h264_are_refused_before_the_edit(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """16,384 pixels a side can be written, more are refused in one line, and nothing is left."""
    frames = torch.zeros(1, *size, 3, dtype=torch.uint8)
    like = video.read_video(encode(tmp_path / "in.mp4", grey_levels(1)))
    like.height, like.width = size
    for check in (
        lambda: video.check_size(tmp_path / "out.mp4", *size),
        lambda: video.prepare_edit(like, tmp_path / "out.mp4"),
        lambda: video.write_video(tmp_path / "out.mp4", frames),
    ):
        with pytest.raises(
            ValueError, match=rf"out.mp4: .* {size[1]}x{size[0]} .* 16384 pixels a side"
        ):
            check()
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
    largest = [min(side, 16384) for side in size]
    video.write_video(tmp_path / "out.mp4", torch.zeros(1, *largest, 3, dtype=torch.uint8))


def test_clips_larger_than_memory_are_refused_before_a_frame_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what is needed and what there is; the first frames alone may fit."""
    source = encode(tmp_path / "in.mp4", grey_levels(30))
    monkeypatch.setattr(video, "_available_memory", lambda: 10 * 48 * 64 * 3)
    assert len(video.read_video(source, 10).frames) == 10
    monkeypatch.setattr(video, "_decode", None)
    with pytest.raises(
        ValueError, match=r"in.mp4: its 30 frames of 64x48 need .* GB of memory, but only .* GB"
    ):
        video.read_video(source)


def test_available_memory_is_that_of_this_machine() -> None:
    """Between nothing and all that is installed."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < video._available_memory() <= installed


def test_files_that_were_read_leave_memory_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that has read more than its limit has all of it in use: most of it by the cache.

    Each clip of a long training would be refused there.
    """
    texts = {
        "memory.max": "64000000\n",
        "memory.current": "63990000\n",
        "memory.stat": "anon 9990000\nfile 54000000\nshmem 3000000\ninactive_file 50000000\n"
        "active_file 1000000\nworkingset_activate_file 77\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(video, "CGROUP", tmp_path)
    assert video._available_memory() == 10_000 + 51_000_000


CASES = Path(__file__).parents[2] / "shared" / "cases" / "video"


@pytest.mark.skipif(not CASES.exists(), reason="the collection of cases is absent")
@pytest.mark.parametrize(
    "name, frames, seconds",
    [
        ("00007_trunc.ts", 1, 1 / 12), ("00457_field.mkv", 6, 0.5), ("adts_lost.ts", 77, 3.18),
        ("b.wmv", 150, 6.04), ("cut.mp4", 117, 4.68), ("dupa_aac.mkv", 150, 6.02),
        ("emptypid.ts", 150, 6.02), ("hlg.mov", 5, 0.2), ("join_25_50.ts", 450, 12),
        ("lang.mkv", 150, 6.02), ("live.flv", 150, 6.02), ("lowmp3.avi", 150, 6.12),
        ("pcm71.mov", 8, 0.32), ("piped.avi", 150, 6.04), ("s_vorbis.ogv", 75, 3),
        ("two.mkv", 50, 2), ("twoedits_p.mp4", 87, 3.48), ("vfr_dup.webm", 102, 6.02),
    ],
)  # fmt: skip
def test_collected_cases(tmp_path: Path, name: str, frames: int, seconds: float) -> None:
    """Clips of public reports have all their frames and their length, and can be written."""
    clip = edited(CASES / name, tmp_path / "out.mp4")
    assert len(clip.frames) == clip.total == frames
    end = (clip.timestamps[-1] + clip.last_duration) * clip.time_base
    assert float(end) == pytest.approx(seconds, abs=0.05)
    assert decoded(tmp_path / "out.mp4")[0] == times(clip)


# --- clips larger than memory ---------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize(
    "name, options",
    [
        ("in.mp4", {"rotation": (90, True), "audio": "aac"}),
        ("in.avi", {"codec": "mpeg4"}),
        ("in.mkv", {"codec": "mpeg2video", "flags": "+ildct+ilme", "top": "1"}),
    ],
)
def test_an_opened_clip_gives_the_frames_of_a_read_one(
    tmp_path: Path, name: str, options: dict, limit: int | None
) -> None:
    """All that is known of them is the same; blocks may be asked for again and again."""
    encode(tmp_path / name, grey_levels(11), **options)
    whole = video.read_video(tmp_path / name, limit)
    opened = video.open_video(tmp_path / name, limit)
    assert opened.frames is None
    assert dataclasses.replace(whole, frames=None) == opened
    for length in (3, 4, 100):
        blocks = list(opened.blocks(length))
        assert torch.equal(torch.cat(blocks), whole.frames)
        assert [len(block) for block in blocks] == [len(b) for b in whole.blocks(length)]


def test_a_clip_larger_than_memory_is_edited_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened, passed on and written with its sound: blocks are asked for as they are needed."""
    monkeypatch.setattr(video, "_available_memory", lambda: 0)
    source = flash_and_beep(tmp_path / "in.mp4")
    with pytest.raises(ValueError, match="GB of memory"):
        video.read_video(source)
    clip = video.open_video(source)
    video.prepare_edit(clip, tmp_path / "out.mp4")
    given = []

    def inverted() -> Iterator[torch.Tensor]:
        for block in clip.blocks(8):
            given.append(len(block))
            yield 255 - block

    video.write_video(tmp_path / "out.mp4", inverted(), clip)
    assert given == [8] * 9 + [3]
    means = [image.mean() for image in decoded(tmp_path / "out.mp4")[1]]
    expected = [255 - image.mean() for image in decoded(source)[1]]
    assert np.abs(np.subtract(means, expected)).max() < 3
    assert packet_list(tmp_path / "out.mp4", "audio") == packet_list(source, "audio")


def test_an_opened_clip_with_a_damaged_frame_is_refused_at_once(tmp_path: Path) -> None:
    """Not in the middle of the edit."""
    source = encode(tmp_path / "in.mp4", grey_levels(30), g="10", bf="0", sc_threshold="0")
    with av.open(str(source)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
    data = bytearray(source.read_bytes())
    position, size = places[15]
    data[position : position + size] = b"\xff" * size
    source.write_bytes(data)
    with pytest.raises(ValueError, match="in.mp4: .*damaged"):
        video.open_video(source)


# --- real clips -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rate, with_audio",
    [
        ("bigbuckbunny_1280x720_audio.mp4", 25, True),
        ("monkey_1280x720_20fps_101f.mp4", 20, False),
        ("monkey_832x480_16fps_81f.mp4", 16, False),
    ],
)
@pytest.mark.slow
def test_real_clips(tmp_path: Path, name: str, rate: int, with_audio: bool) -> None:
    """Clips made by others keep their times, audio and picture."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    # The first half second only: 720p takes time.
    count = rate // 2
    clip = video.read_video(DATA / name, count)
    reference, images, _ = decoded(DATA / name, count)
    assert times(clip) == reference and clip.rate == rate
    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    written, again, durations = decoded(tmp_path / "out.mp4")
    assert written == reference and durations == [Fraction(1, rate)] * count
    for before, after in zip(images, again, strict=True):
        assert np.abs(before.astype(int) - after).mean() < 4
    end = Fraction(count, rate)  # the sound of the other frames is not theirs
    tracks = packet_list(DATA / name, "audio")
    audio = [[packet for packet in track if packet[0] < end] for track in tracks]
    assert packet_list(tmp_path / "out.mp4", "audio") == audio and bool(audio) == with_audio


def test_frames_survive_the_networks_numbers():
    """All 256 levels come back; black is -1, white 1; channels go in front of time."""
    frames = (
        torch.arange(256, dtype=torch.uint8).view(1, 4, 8, 8, 1).repeat(2, 1, 1, 1, 3)
    )  # (B, T, H, W, 3)
    frames[..., 1] = frames[..., 1].flip(1)
    numbers = video.to_float(frames)
    assert numbers.shape == (2, 3, 4, 8, 8) and numbers.dtype == torch.float32
    assert numbers[0, 0, 0, 0, 0] == -1 and numbers[0, 0, 3, 7, 7] == 1
    assert torch.equal(video.to_uint8(numbers), frames) and torch.equal(
        video.to_float(frames[1]), numbers[1]
    )
