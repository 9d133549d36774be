"""Reading and writing video with PyAV: whatever FFmpeg decodes comes in as RGB, H.264 goes out.

An edited clip has the length, resolution, timing and audio of its source (Eq. 1 of the paper).
Beside the frames, `read_video` therefore keeps what `write_video` needs to put edited frames in
their place:

- time: each frame's own timestamp. 29.97 fps stays 30000/1001, a variable rate stays variable.
- sound: every audio track, copied packet by packet. Codecs that players do not expect in the
  written file become AAC.
- shape: rotation metadata is applied to the frames and not written. Pixel aspect is kept.
- colour: read by the stream's own matrix and range tags, written as BT.709 in limited range.

Frames are uint8 (T, H, W, 3) RGB: T frames, H height, W width. 10-bit and HDR sources are rounded
to 8 bits without tone mapping. Alpha, interlacing flags, subtitles, chapters and metadata are
dropped.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from av import Packet, VideoFrame
from av.container import InputContainer, OutputContainer
from av.stream import Disposition, Stream
from av.video import reformatter as sws
from torch import Tensor

import cli

# Audio codecs that players expect in a file with this ending. They are copied, others become AAC.
COPIED_AUDIO = {
    ".mp4": "aac mp3 ac3 eac3 alac flac opus".split(),
    ".mov": "aac mp3 ac3 eac3 alac pcm_s16le pcm_s16be pcm_s24le pcm_s24be".split(),
}

# MPEG-TS and its like are made to be joined and left at any moment: their clock starts anywhere,
# and they declare no length.
BROADCAST = av.format.Flags.ts_discont.value

# swscale's defaults trade accuracy for speed: with them colours are off by 3 levels instead of 1,
# and chroma is not interpolated.
FULL_CHROMA = sws.Interpolation.FULL_CHR_H_INT | sws.Interpolation.FULL_CHR_H_INP
SCALING = sws.Interpolation.BICUBIC | sws.Interpolation.ACCURATE_RND | FULL_CHROMA


@dataclass
class Video:
    """A clip in memory, and what it takes to write it, or an edit of it, back."""

    frames: Tensor  # uint8 (T, H, W, 3), RGB, upright, in display order
    timestamps: list[int]  # T presentation times, strictly increasing, in units of `time_base`
    last_duration: int  # how long the last frame is shown, in units of `time_base`
    time_base: Fraction  # seconds. As coarse as is exact: a constant rate counts 0, 1, 2, ...
    start: Fraction  # seconds on the file's own clock that are time 0 here
    pixel_aspect: Fraction  # width : height of one pixel
    path: Path  # the file it came from, where the audio still is
    total: int  # number of frames in the file: more than T if only its first were read

    @property
    def rate(self) -> Fraction:
        """Frames per second, on average."""
        ticks = self.timestamps[-1] + self.last_duration - self.timestamps[0]
        return len(self.timestamps) / (ticks * self.time_base)


# --- Opening a file -------------------------------------------------------------------------------


def _open(path: Path) -> InputContainer:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not a video file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    # "file:" keeps a name such as "a:b.mp4" from being taken for a protocol. Tags of a file need
    # not be valid UTF-8.
    return av.open(f"file:{path}", metadata_errors="replace")


def _video_stream(container: InputContainer, path: Path) -> Stream:
    """Find the first video stream that is not a cover picture."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        only_audio = ", only audio" if container.streams.audio else ""
        raise ValueError(f"{path}: has no video{only_audio}")
    if streams[0].codec_context is None:
        raise ValueError(f"{path}: FFmpeg cannot decode its video; convert it first")
    return streams[0]


def _demux(container: InputContainer, *streams: Stream) -> Iterator[Packet]:
    # Where a stream shows up midway, PyAV raises an IndexError behind the last packet.
    with contextlib.suppress(IndexError):
        yield from container.demux(*streams)


# --- Is the file complete? ------------------------------------------------------------------------
# FFmpeg plays a file that was cut short up to the cut, without an error. But most formats declare
# their size. Each function below returns where the file should end, in bytes, or 0 if unknown.


def _end_of_avi(path: Path) -> int:
    """An AVI file is one chunk: "RIFF", then the size of the rest."""
    with path.open("rb") as file:
        header = file.read(8)
    return 8 + int.from_bytes(header[4:], "little")


def _end_of_matroska(path: Path) -> int:
    """A Matroska file is a header and a Segment, which declares its size."""
    with path.open("rb") as file:
        head = file.read(4096)
    start = head.find(b"\x18\x53\x80\x67") + 4  # the Segment's id
    if start < 4:
        return 0
    # The size has n bytes: n - 1 zero bits, a one bit, and 7n bits that hold the number.
    n = 9 - head[start].bit_length()
    size = int.from_bytes(head[start : start + n], "big") - (1 << 7 * n)
    unknown = (1 << 7 * n) - 1  # all ones: a live recording
    return 0 if size >= unknown else start + n + size


def _end_of_mp4(path: Path) -> int:
    """An MP4 or MOV file is a row of boxes: a size and a name; or 1, a name and a 64-bit size."""
    end = position = 0
    with path.open("rb") as file:
        while len(header := file.read(16)) >= 8:
            name = header[4:8]
            is_long = header[:4] == b"\0\0\0\1"
            size = int.from_bytes(header[8:] if is_long else header[:4], "big")
            if not 8 <= size < 1 << 60:  # 0 means: the rest of the file. Others are not a box.
                break
            position += size
            if name in (b"moov", b"mdat", b"moof"):  # behind these, anything may be appended
                end = position
            file.seek(position)
    return end


def _declared_end(path: Path, kind: str) -> int:
    if kind == "avi":
        return _end_of_avi(path)
    if kind.startswith("matroska"):
        return _end_of_matroska(path)
    if kind.startswith("mov"):
        return _end_of_mp4(path)
    return 0


def _count_packets(path: Path) -> int:
    """Count the video packets, a bound on the frames.

    Raises ValueError if the end of the file is missing.
    """
    with _open(path) as container:
        video = _video_stream(container, path)
        kind = container.format
        count = 0
        partial = _declared_end(path, kind.name) > path.stat().st_size
        for packet in _demux(container):
            if packet.stream.index == video.index and packet.size > 0:
                count += 1
            if packet.is_corrupt and not kind.flags & BROADCAST:
                partial = True
    if partial:
        raise ValueError(f"{path}: the file is cut short, its last part is missing; copy it again")
    return count


# --- Decoding -------------------------------------------------------------------------------------


def _decode(container: InputContainer, stream: Stream) -> Iterator[VideoFrame]:
    """Yield frames in display order.

    Before the first frame packets may fail, as in a recording that was joined midway; not after.
    """
    stream.thread_type = "AUTO"
    started = False
    for packet in _demux(container, stream):
        try:
            for frame in packet.decode():
                started = True
                yield frame
        except av.FFmpegError:
            if started:
                raise


def _orientation(frame: VideoFrame) -> tuple[bool, int, int]:
    """How to turn an image upright: swap its axes?, then the steps (-1: flip) along H and W."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 1, 1
    # Nine int32. The first two rows, (a b .) and (c d .), take (x, y) to (a·x + c·y, b·x + d·y).
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    swap = abs(b) > abs(a)  # displayed x comes from stored y
    x, y = (c, b) if swap else (a, d)
    return swap, -1 if y < 0 else 1, -1 if x < 0 else 1


def _matrix(frame: VideoFrame) -> sws.Colorspace | None:
    """The YCbCr matrix of a frame that has no meaningful tag. None: swscale reads the tag."""
    if frame.format.is_rgb or frame.colorspace not in (0, 2, 3):
        return None
    if frame.width >= 1280 or frame.height > 576:
        return sws.Colorspace.ITU709
    return sws.Colorspace.ITU601


def _clock(container: InputContainer, stream: Stream, times: list[int | None], last: int) -> dict:
    """Video's fields of time, from the decoder's timestamps and the last frame's duration."""
    base = stream.time_base
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    shift = min(0, times[0] or 0)  # players show nothing before time 0
    if container.format.flags & BROADCAST and container.start_time is not None:
        shift = round(Fraction(container.start_time, av.time_base) / base)
    last = last or max(1, round(1 / (rate * base)))
    if None in times or any(b <= a for a, b in itertools.pairwise(times)):
        # Raw streams and some AVI files have no usable timestamps, only a constant duration.
        times = [shift + i * last for i in range(len(times))]

    # The coarsest exact unit: 512, 1024, ... in units of 1/12800 s are 1, 2, ... in 1/25 s.
    unit = math.gcd(last, *(time - shift for time in times))
    return dict(
        timestamps=[(time - shift) // unit for time in times],
        last_duration=last // unit,
        time_base=base * unit,
        start=shift * base,
    )


def _read_frames(path: Path, packets: int, limit: int | None) -> Video:
    frames = None
    times = []
    with _open(path) as container:
        stream = _video_stream(container, path)
        reformatter = sws.VideoReformatter()
        for frame in itertools.islice(_decode(container, stream), limit):
            if frames is None:
                height, width = frame.height, frame.width
                swap, down, right = _orientation(frame)
                shape = (width, height, 3) if swap else (height, width, 3)
                # Once, at full length: stacking a list of frames would take the memory twice.
                frames = torch.empty((min(packets, limit or packets), *shape), dtype=torch.uint8)
            elif len(times) == len(frames):  # a codec that puts several frames into a packet
                frames = torch.cat([frames, torch.empty_like(frames)])

            # A stream that changes its size midway is scaled to that of its first frame.
            image = reformatter.reformat(
                frame,
                width,
                height,
                "rgb24",
                src_colorspace=_matrix(frame),
                dst_color_range=sws.ColorRange.JPEG,
                interpolation=SCALING,
            )
            stored = image.to_ndarray()
            upright = stored.swapaxes(0, 1) if swap else stored
            frames.numpy()[len(times)] = upright[::down, ::right]
            times.append(frame.pts)
        if frames is None:
            raise ValueError(f"{path}: damaged, not one frame can be decoded")
        aspect = stream.sample_aspect_ratio or Fraction(1)
        clock = _clock(container, stream, times, frame.duration)
    return Video(
        frames[: len(times)],
        **clock,
        pixel_aspect=1 / aspect if swap else aspect,
        path=path,
        total=max(packets, len(times)),
    )


def read_video(path: str | Path, max_frames: int | None = None) -> Video:
    """Read a clip of any container and codec that FFmpeg decodes, or only its first frames.

    Raises OSError or ValueError, in one line that names the file, if no video or not all of it is
    there.
    """
    path = Path(path)
    try:
        return _read_frames(path, _count_packets(path), max_frames)
    except av.FFmpegError as error:
        message = f"{path}: not a video file, or cut short or damaged ({error.strerror})"
        raise ValueError(message) from error


# --- Writing --------------------------------------------------------------------------------------


def check_writable(path: str | Path) -> None:
    """Raise OSError or ValueError, in one line, if `path` cannot be written.

    To be called before long work.
    """
    path = Path(path)
    if path.is_dir():
        example = path / "edited.mp4"
        raise IsADirectoryError(f"{path}: is a folder; name a file in it, such as {example}")
    if path.suffix.lower() not in COPIED_AUDIO:
        endings = " or ".join(COPIED_AUDIO)
        raise ValueError(f"{path}: the name of a video to write must end in {endings}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; create it first")
    folder_allows = os.access(path.parent, os.W_OK | os.X_OK)
    file_allows = os.access(path, os.W_OK) or not path.exists()
    if not (folder_allows and file_allows):
        raise PermissionError(f"{path}: it or its folder is read-only; choose another place")


def _add_video(
    out: OutputContainer, height: int, width: int, time_base: Fraction, rate: Fraction
) -> Stream:
    """Add an H.264 track of the kind that every player and browser shows."""
    # Without B-frames, decoding order is display order. So each frame has its own duration in the
    # file, which keeps a variable rate down to the last frame, and time 0 needs no edit list.
    options = {"crf": "18", "profile": "high", "bf": "0"}
    # The rate is a hint to the rate control. The limit fits it into 32 bits and leaves 30000/1001
    # as it is.
    hint = rate.limit_denominator(100_000)
    track = out.add_stream("libx264", hint, options, width=width, height=height)
    context = track.codec_context
    context.pix_fmt = "yuv420p"
    context.time_base = time_base
    context.flags |= av.codec.context.Flags.frame_duration  # or the last frame gets the average
    context.colorspace = sws.Colorspace.ITU709
    context.color_range = sws.ColorRange.MPEG
    context.color_primaries = sws.ColorPrimaries.BT709
    context.color_trc = sws.ColorTrc.BT709
    return track


def _video_packets(track: Stream, timed: Iterable[tuple[Tensor, int, int]]) -> Iterator[Packet]:
    """Encode triples of (H, W, 3) image, timestamp and duration, one after another."""
    context = track.codec_context
    reformatter = sws.VideoReformatter()
    for image, timestamp, duration in timed:
        image = image[: context.height, : context.width].contiguous().cpu()
        # The encoder only passes the colour tags on. The conversion needs to be told them.
        frame = reformatter.reformat(
            VideoFrame.from_ndarray(image.numpy(), "rgb24"),
            format="yuv420p",
            interpolation=SCALING,
            dst_colorspace=sws.Colorspace.ITU709,
            dst_color_range=sws.ColorRange.MPEG,
        )
        frame.pts = timestamp
        frame.duration = duration
        frame.time_base = context.time_base
        yield from track.encode(frame)
    yield from track.encode(None)


def _add_audio(
    out: OutputContainer, source: InputContainer, copied: Iterable[str]
) -> dict[int, Stream]:
    """Add a track for each audio stream of `source`: a copy of codecs in `copied`, else AAC.

    Returns the tracks by the index of their stream.
    """
    tracks = {}
    aac_rates = av.Codec("aac", "w").audio_rates
    for stream in source.streams.audio:
        context = stream.codec_context
        if context is None:  # a codec that FFmpeg does not know can be neither copied nor decoded
            continue
        if stream.codec.canonical_name in copied:
            track = out.add_stream_from_template(stream)
        else:
            rate = context.sample_rate if context.sample_rate in aac_rates else 48_000
            layout = {1: "mono", 6: "5.1", 8: "7.1"}.get(context.layout.nb_channels, "stereo")
            track = out.add_stream("aac", rate, layout=layout)
            track.codec_context.bit_rate = 96_000 * track.codec_context.layout.nb_channels
        tracks[stream.index] = track
    return tracks


def _audio_packets(
    source: InputContainer, tracks: dict[int, Stream], start: Fraction
) -> Iterator[Packet]:
    """Yield packets for `tracks` from the streams of `source`, whose time `start` becomes 0."""
    last = dict.fromkeys(tracks, -math.inf)
    for packet in _demux(source):
        index = packet.stream.index
        if index not in tracks:
            continue
        track = tracks[index]
        timed = packet.dts is not None
        if timed:
            time = packet.dts - round(start / packet.time_base)
            if time < last[index]:  # joined recordings: the clock of the first goes on
                time = last[index] + packet.duration
            packet.pts = packet.dts = last[index] = time  # audio is not reordered
        if track.codec_context.is_encoder:
            with contextlib.suppress(av.InvalidDataError):  # a damaged packet becomes silence
                for frame in packet.decode():
                    yield from track.encode(frame)
        elif timed:
            packet.stream = track
            yield packet
    for track in tracks.values():
        if track.codec_context.is_encoder:
            yield from track.encode(None)


def _images(frames: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the (H, W, 3) images of one (T, H, W, 3) tensor, or of an iterable of such blocks."""
    blocks = [frames] if isinstance(frames, Tensor) else frames
    for block in blocks:
        yield from block


def write_video(
    path: str | Path,
    frames: Tensor | Iterable[Tensor],
    like: Video | None = None,
    fps: Fraction | int = 24,
) -> tuple[int, int]:
    """Write a clip as H.264 to an .mp4 or .mov file, complete or not at all.

    frames: uint8 (T, H, W, 3), or an iterable of such blocks, for clips that are too long to be
    held twice.
    like: the clip of T frames whose timing, pixel aspect and audio this one gets. Without it the
    clip runs at `fps` and is silent.
    Returns (height, width) as written: 4:2:0 has no odd sides, so an odd one loses its last row or
    column. Raises OSError or ValueError if the file cannot be written.
    """
    check_writable(path)
    path = Path(path)
    images = _images(frames)
    first = next(images, None)
    if first is None or min(first.shape[:2]) < 2:
        raise ValueError(f"{path}: nothing to write, a video needs one frame and two pixels a side")
    images = itertools.chain([first], images)
    height, width = first.shape[0] // 2 * 2, first.shape[1] // 2 * 2
    time_base = like.time_base if like else 1 / Fraction(fps)
    rate = like.rate if like else 1 / time_base

    # The index goes to the front, so that browsers play at once. The timescale of the whole file
    # must hold the clip's start exactly.
    timescale = time_base.denominator * (1 + 10**6 // time_base.denominator)
    options = {"movflags": "faststart", "movie_timescale": str(timescale)}
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(cli.replacing(path))
        out = stack.enter_context(av.open(f"file:{temporary}", "w", container_options=options))
        track = _add_video(out, height, width, time_base, rate)
        if like is None:
            timed = ((image, i, 1) for i, image in enumerate(images))
            audio = iter(())
        else:
            track.codec_context.sample_aspect_ratio = like.pixel_aspect
            ends = [*like.timestamps[1:], like.timestamps[-1] + like.last_duration]
            durations = [end - begin for begin, end in zip(like.timestamps, ends, strict=True)]
            timed = zip(images, like.timestamps, durations, strict=True)
            source = stack.enter_context(_open(like.path))
            tracks = _add_audio(out, source, COPIED_AUDIO[path.suffix.lower()])
            audio = _audio_packets(source, tracks, like.start)
        # In order of time, so that the sound is stored near its picture.
        packets = heapq.merge(
            _video_packets(track, timed), audio, key=lambda packet: packet.dts * packet.time_base
        )
        for packet in packets:
            out.mux(packet)
    return height, width


# --- Frames as numbers ----------------------------------------------------------------------------


def to_float(frames: Tensor) -> Tensor:
    """uint8 (..., T, H, W, 3) -> what the networks take: float32 (..., 3, T, H, W) in [-1, 1]."""
    return frames.movedim(-1, -4).float() / 127.5 - 1


def to_uint8(video: Tensor) -> Tensor:
    """The inverse of `to_float`, rounded to whole levels, on the CPU."""
    return ((video + 1) * 127.5).round().to(torch.uint8).movedim(-4, -1).cpu()


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (T, H, W, 3) to (T, height, width, 3) by antialiased bicubic, as Pillow does."""
    if frames.shape[1:3] == (height, width):
        return frames
    resized = torch.empty(len(frames), height, width, 3, dtype=torch.uint8)
    # One frame at a time: PyTorch would copy the whole clip.
    for frame, target in zip(frames, resized, strict=True):
        image = frame.permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W)
        small = F.interpolate(image, (height, width), mode="bicubic", antialias=True)
        target.copy_(small[0].permute(1, 2, 0))
    return resized
