"""Claims about video.py, on clips that the tests encode with PyAV and read back without our reader."""

from __future__ import annotations

import dataclasses
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

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
    """Write a source clip in the way of any other program: B-frames, its own time base, optional audio."""
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


def decoded(path: Path) -> tuple[list[Fraction], list[np.ndarray], list[Fraction]]:
    """Times, RGB images and durations by PyAV's plain decoder."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
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
    """By how many seconds `after` comes later than `before` (at most 2 ms), and how well they then agree."""
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
    """A clip that is read and written has the same frames at the same times and the same audio packets."""
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
    """A track that starts late starts as late in the result, for copied and for re-encoded audio."""
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
    """MPEG-TS starts at any time: the result starts at 0, with sound and picture as far apart as before."""
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
        assert len(packet_list(tmp_path / "out.mp4", "audio")[0]) == len(
            packet_list(tmp_path / "in.ts", "audio")[0]
        )


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
    """Other formats are read; audio is copied where players expect it, else AAC, and sounds the same."""
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
    """In order of display, which is not that of the file; with their times, and the length of the whole."""
    source = encode(tmp_path / "in.mp4", grey_levels(30), NTSC, audio="aac")
    whole, part = video.read_video(source), video.read_video(source, limit)
    assert whole.total == part.total == 30 and len(part.frames) == min(limit, 30)
    assert torch.equal(part.frames, whole.frames[:limit]) and times(part) == times(whole)[:limit]
    assert part.rate == whole.rate == NTSC


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
    """4:2:0 has no odd sides: the result says what was written, and it is the frame without its last line."""
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
    """Phones store frames as the sensor sees them: the four corners end up where a player shows them."""
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
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128], [200, 100, 50],
     [10, 200, 220], [250, 240, 20], [90, 60, 30]], dtype=np.uint8)  # fmt: skip
# The weights of red and blue in luma, of BT.709, BT.601 and BT.2020.
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


def naive_yuv(rgb: np.ndarray, matrix: int = 1, full: bool = False, bits: int = 8) -> np.ndarray:
    """Y, Cb, Cr of one colour by the textbook, in code values of the given range and depth (unrounded)."""
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
    path: Path, values: np.ndarray, height: int, width: int, bits: int, matrix: int, full: bool
) -> Path:
    """A lossless clip of one frame per row of `values`, given as code values of Y, Cb, Cr."""
    pix_fmt, dtype = ("yuv420p10le", np.uint16) if bits == 10 else ("yuv420p", np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(
            "libx265" if bits == 10 else "libx264", rate=25, width=width, height=height
        )
        stream.codec_context.options = (
            {"x265-params": "lossless=1:log-level=0"} if bits == 10 else {"qp": "0"}
        )
        stream.pix_fmt = pix_fmt
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
    """Solid colours of every matrix, range and depth are within 2 levels of the RGB they were made from."""
    colours = COLOURS if size[0] < 720 else COLOURS[:3]
    values = np.stack([naive_yuv(colour, used, full, bits) for colour in colours])
    clip = video.read_video(encode_yuv(tmp_path / "in.mkv", values, *size, bits, tag, full))
    error = np.abs(clip.frames.numpy().astype(int) - colours[:, None, None])
    assert error.max() <= 2


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
    """Writing to the file that the audio comes from works, because it is replaced only at the end."""
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
    for path, error, message in [
        (folder, IsADirectoryError, "is a folder"),
        (tmp_path / "missing" / "a.mp4", FileNotFoundError, "there is no folder"),
        (tmp_path / "file" / "a.mp4", FileNotFoundError, "there is no folder"),
        (tmp_path / "a.avi", ValueError, "must end in .mp4 or .mov"),
        (tmp_path / "a", ValueError, "must end in .mp4 or .mov"),
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


# --- errors ---------------------------------------------------------------------------------------


def test_files_that_are_not_videos(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is refused in one line that names the file and says what is wrong; FFmpeg prints nothing."""
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("This is not a video.\n" * 100)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20000))
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
    """A file cut anywhere is an error rather than a silently shorter clip, and a whole one is not."""
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
    """A format that declares no length (FLV) shows a cut by a packet of which only a part is there."""
    whole = encode(tmp_path / "in.flv", grey_levels(60))
    with av.open(str(whole)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
    for position, size in places[10::20]:
        half = position + 16 + size // 2  # 16: the headers of the tag and of the packet
        (tmp_path / "cut.flv").write_bytes(whole.read_bytes()[:half])
        with pytest.raises(ValueError, match="cut short"):
            video.read_video(tmp_path / "cut.flv")


def test_live_recordings_declare_no_length(tmp_path: Path) -> None:
    """A Matroska file written to a stream has no size to check against, and is read."""
    live = encode(tmp_path / "in.mkv", grey_levels(10), container={"live": "1"})
    assert len(video.read_video(live).frames) == 10
    live.write_bytes(live.read_bytes()[:-200])
    assert len(video.read_video(live).frames) < 10


@pytest.mark.parametrize("movflags", ["faststart", "default_base_moof"])
def test_long_and_appended_boxes(tmp_path: Path, movflags: str) -> None:
    """An MP4 may have 64-bit sizes, a last box that goes to the end of the file, and bytes behind it."""
    source = tmp_path / "in.mp4"
    data = encode(
        source, grey_levels(10), audio="aac", container={"movflags": movflags}
    ).read_bytes()
    start = data.index(b"mdat") - 4
    size = int.from_bytes(data[start : start + 4], "big")
    # An empty "free" box is in front of the data: the two headers have the length of one with a 64-bit size.
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
    """Frames that do not decode are an error, but not before the first good one (a stream joined midway)."""
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


# --- real clips -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rate, with_audio",
    [
        ("bigbuckbunny_1280x720_audio.mp4", 25, True),
        ("monkey_1280x720_20fps_101f.mp4", 20, False),
        ("monkey_832x480_16fps_81f.mp4", 16, False),
    ],
)
def test_real_clips(tmp_path: Path, name: str, rate: int, with_audio: bool) -> None:
    """Clips made by others keep their times, audio and picture."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    clip = video.read_video(DATA / name)
    reference, images, _ = decoded(DATA / name)
    assert times(clip) == reference and clip.rate == rate

    # The first second only: encoding takes time.
    start = dataclasses.replace(clip, timestamps=clip.timestamps[:rate])
    video.write_video(tmp_path / "out.mp4", clip.frames[:rate], start)
    written, again, durations = decoded(tmp_path / "out.mp4")
    assert written == reference[:rate] and durations == [Fraction(1, rate)] * rate
    for before, after in zip(images, again, strict=False):
        assert np.abs(before.astype(int) - after).mean() < 4
    audio = packet_list(DATA / name, "audio")
    assert packet_list(tmp_path / "out.mp4", "audio") == audio and bool(audio) == with_audio


def test_frames_survive_the_networks_numbers():
    """All 256 levels come back; black is -1, white 1; channels go in front of time, for a clip and for a batch."""
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
