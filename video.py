"""Reading and writing video with PyAV: whatever FFmpeg decodes comes in as RGB, H.264 goes out.

Stills are clips of one frame. Those that Pillow reads and writes, and animated WebP, are left to
`stills.py`; HDR is read here, and simple HEIC without pillow-heif.

An edited clip has the length, resolution, timing and audio of its source (Eq. 1 of the paper).
Beside the frames, `read_video` therefore keeps what `write_video` needs to put edited frames in
their place:

- time: each frame's own timestamp. 29.97 fps stays 30000/1001, a variable rate stays variable.
  Only timestamps that are missing or out of order are replaced.
- sound: every audio track, copied or encoded again (`sound.py`). Sound never costs the picture.
- shape: rotation metadata is applied to the frames and not written. Pixel aspect is kept.
- colour: read by the stream's own tags, written as BT.709 in limited range. HDR (HLG, PQ), BT.2020
  and DCI or Display P3 become BT.709 with standard dynamic range (`colour.py`). A still keeps its
  numbers and its ICC profile.

Frames are uint8 (T, H, W, 3) RGB: T frames, H height, W width. Interlaced frames are deinterlaced.
Transparent pixels are shown on white. Subtitles, chapters and metadata are dropped.
"""

from __future__ import annotations

import bisect
import contextlib
import heapq
import itertools
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av import Packet, VideoFrame
from av.container import InputContainer, OutputContainer
from av.filter import Graph
from av.stream import Stream
from av.video import reformatter as sws
from torch import Tensor

import cli
import stills
from colour import check_matrix, to_rgb, wide_primaries
from containers import (
    BROADCAST,
    LONGEST_GAP,
    Contents,
    check_file,
    demux,
    explained,
    filter_graph,
    head_of,
    is_png,
    open_container,
    pull,
    scan,
    video_stream,
)
from sound import COPIED_AUDIO, Picture, SoundTrack, add_track, prepare_tracks

PICTURE_BRANDS = (b"avif", b"heic", b"heix", b"mif1")  # of AVIF and HEIC that is not animated

# The largest side in pixels: of H.264 as x264 writes it, and of stills.
MAX_SIDE = {".mp4": 16_384, ".mov": 16_384, ".webp": 16_383}
MAX_SIDE |= {".png": 65_500, ".jpg": 65_500, ".jpeg": 65_500}

CGROUP = Path("/sys/fs/cgroup")  # what Linux says of the container that this may run in


@dataclass
class Video:
    """A clip, and what it takes to write it, or an edit of it, back."""

    frames: Tensor | None  # uint8 (T, H, W, 3), RGB, upright. None: `blocks` decodes them
    height: int  # H
    width: int  # W
    timestamps: list[int]  # T presentation times, strictly increasing, in units of `time_base`
    last_duration: int  # how long the last frame is shown, in units of `time_base`
    time_base: Fraction  # seconds. As coarse as is exact: a constant rate counts 0, 1, 2, ...
    start: Fraction  # seconds on the file's own clock that are time 0 here
    pixel_aspect: Fraction  # width : height of one pixel
    path: Path  # the file it came from, where the audio still is
    total: int  # number of frames in the file: more than T if only its first were read
    profile: bytes = b""  # the ICC profile of a still
    sound: dict[str, list[SoundTrack]] = field(default_factory=dict)  # by ending: `prepare_sound`

    @property
    def rate(self) -> Fraction:
        """Frames per second, on average."""
        ticks = self.timestamps[-1] + self.last_duration - self.timestamps[0]
        return len(self.timestamps) / (ticks * self.time_base)

    def blocks(self, length: int) -> Iterator[Tensor]:
        """Yield the frames in order, as uint8 (at most `length`, H, W, 3). Any number of times."""
        if self.frames is not None:
            yield from self.frames.split(length)
            return
        with explained(self.path), open_container(self.path) as container:
            images = Reader(container, self.path, len(self.timestamps)).images()
            while block := list(itertools.islice(images, length)):
                yield torch.from_numpy(np.stack(block))


# --- Decoding -------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A decoded frame and when it is shown, in units of its stream's time base."""

    frame: VideoFrame
    pts: int | None  # as the file says
    dts: int | None  # from the order of its packets, for files whose pts are wrong


def _decode(container: InputContainer, stream: Stream) -> Iterator[Shown]:
    """Yield frames in display order.

    Before the first frame packets may fail, as in a recording that was joined midway; not after.
    """
    stream.thread_type = "AUTO"
    last = None  # the frame before
    repeats = []  # times of empty packets, which show the frame before once more
    for packet in demux(container):
        if packet.stream.index != stream.index:
            continue
        if packet.size == 0 and packet.pts is not None:
            repeats.append(packet.pts)
            continue
        try:
            for frame in packet.decode():
                while last and repeats and frame.pts is not None and repeats[0] < frame.pts:
                    time = repeats.pop(0)
                    yield Shown(last.frame, time, time)
                last = Shown(frame, frame.pts, frame.dts)
                yield last
        except av.FFmpegError:
            if last is None:
                continue
            raise
    is_theora = stream.codec_context.name == "theora"
    if last and is_theora and container.duration:
        repeats += _unwritten_repeats(container, stream, repeats[-1] if repeats else last.pts)
    for time in repeats:
        if last:
            yield Shown(last.frame, time, time)


def _unwritten_repeats(container: InputContainer, stream: Stream, last: int) -> range:
    """Times of the frames that Theora's encoder leaves away at the end, when nothing changes.

    They last as long as the file does, but a second at most: sound may be longer than the picture.
    """
    step = round(1 / ((stream.average_rate or 25) * stream.time_base))
    end = Fraction((container.start_time or 0) + container.duration, av.time_base)
    second = round(1 / stream.time_base)
    return range(last + step, min(math.floor(end / stream.time_base), last + second), step)


def _deinterlace(shown: Iterable[Shown]) -> Iterator[Shown]:
    """Rebuild full frames from interlaced ones. Other clips pass unchanged."""
    graph = graph_form = None
    waiting = []  # frames in the filter, which looks one frame ahead
    for item in shown:
        frame = item.frame
        form = (frame.width, frame.height, frame.format.name)
        if graph and form != graph_form:
            yield from _filtered(graph, waiting, None)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph = _deinterlacer(frame)
            graph_form = form
        if graph is None:
            yield item
        else:
            waiting.append(item)
            yield from _filtered(graph, waiting, frame)
    if graph:
        yield from _filtered(graph, waiting, None)


def _filtered(graph: Graph, waiting: list[Shown], frame: VideoFrame | None) -> Iterator[Shown]:
    """Push one frame, or the end, into the filter. Yield what comes out, with its old times."""
    graph.push(frame)
    for result in pull(graph):
        yield waiting.pop(0)._replace(frame=result)


def _deinterlacer(frame: VideoFrame) -> Graph:
    """bwdif, one frame out for each frame in, that touches frames marked as interlaced only."""
    return filter_graph(frame, ("bwdif", "mode=send_frame:deint=interlaced"))


def _side_data(frame: VideoFrame, name: str) -> bytes:
    try:
        return bytes(frame.side_data.get(name) or b"")
    except ValueError:  # PyAV 18.1 does not know the EXIF that FFmpeg finds in Motion JPEG
        return b""


def _orientation(frame: VideoFrame) -> tuple[bool, int, int]:
    """How to turn a frame upright: swap its axes?, then the steps (-1: flip) along H and W."""
    matrix = _side_data(frame, "DISPLAYMATRIX")
    if not matrix:
        return False, 1, 1
    # Nine int32. The first two rows, (a b .) and (c d .), take (x, y) to (a·x + c·y, b·x + d·y).
    a, b, _, c, d = struct.unpack_from("=5i", matrix)
    swap = abs(b) > abs(a)  # displayed x comes from stored y
    x, y = (c, b) if swap else (a, d)
    return swap, -1 if y < 0 else 1, -1 if x < 0 else 1


# --- Time -----------------------------------------------------------------------------------------


def _faults(times: list[int | None]) -> int:
    """Number of times that are missing or not later than all before."""
    count = 0
    latest = -math.inf
    for time in times:
        if time is None or time <= latest:
            count += 1
        else:
            latest = time
    return count


def _good_times(times: list[int | None]) -> list[int]:
    """Indices of the most times that increase strictly: one wrong time costs no other."""
    tails = []  # the smallest time that ends an increasing row of 1, 2, ... times
    ends = []  # its index
    before = {}  # the index before it in that row
    for i, time in enumerate(times):
        if time is None:
            continue
        length = bisect.bisect_left(tails, time)
        before[i] = ends[length - 1] if length else None
        tails[length : length + 1] = [time]
        ends[length : length + 1] = [i]
    good = []
    i = ends[-1] if ends else None
    while i is not None:
        good.append(i)
        i = before[i]
    return good[::-1]


def _longest_run(times: list[int | None], good: list[int], gap: float) -> list[int]:
    """The longest part of the indices `good` without a jump of more than `gap`."""
    runs = [[]]
    for i in good:
        if runs[-1] and times[i] - times[runs[-1][-1]] > gap:
            runs.append([])
        runs[-1].append(i)
    return max(runs, key=len)


def _mended(times: list[int | None], step: int, gap: float = math.inf) -> tuple[list[int], int]:
    """Replace times that are missing, out of order or more than `gap` ahead; keep all others.

    step: the usual duration of a frame. Times between two good ones are spread evenly.
    Returns strictly increasing times and the factor by which their unit became finer, so that new
    times fit between old ones.
    """
    good = _longest_run(times, _good_times(times), gap)
    if not good:  # a raw stream, or an AVI file
        return [i * step for i in range(len(times))], 1
    gaps = [b - a for a, b in itertools.pairwise(good)]
    finer = max(gaps, default=1)
    result = [0] * len(times)
    for i in range(len(times)):
        after = bisect.bisect_left(good, i)
        if after == 0:  # up to the first good time
            result[i] = finer * (times[good[0]] - (good[0] - i) * step)
        elif after == len(good):  # behind the last
            result[i] = finer * (times[good[-1]] + (i - good[-1]) * step)
        else:
            left, right = good[after - 1], good[after]
            here = finer * (times[right] - times[left]) * (i - left) // (right - left)
            result[i] = finer * times[left] + here
    return result, finer


@dataclass
class Clock:
    """When frames are shown: the fields of time of a `Video`."""

    timestamps: list[int]
    last_duration: int
    time_base: Fraction
    start: Fraction


def _clock(
    pts: list[int | None], dts: list[int | None], stream: Stream, last: int, first: Fraction
) -> Clock:
    """Mend the decoder's times and count them in the coarsest exact unit.

    last: the duration of the last frame, 0 if unknown.
    first: when the first picture or sound of the file is played, in seconds.
    """
    base = stream.time_base
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    longest = LONGEST_GAP / base
    if not 0 < last <= longest:
        last = max(1, round(1 / (rate * base)))
    times = pts if _faults(pts) <= _faults(dts) else dts
    times, finer = _mended(times, last, longest)
    if base.denominator * finer >= 2**31:  # MP4 counts no finer
        times, finer = [i * last for i in range(len(times))], 1
    base, last = base / finer, last * finer

    # A clock that was running before the recording began starts at 0 here. Up to a second may be
    # meant: a track that starts late, or the delay of an encoder. Players show nothing before 0.
    broadcast = bool(stream.container.format.flags & BROADCAST)
    runs = first > (0 if broadcast else 1)
    shift = round(first / base) if runs else min(0, times[0])
    if times[0] - shift > longest * finer:
        shift = times[0]

    # 512, 1024, ... in units of 1/12800 s are 1, 2, ... in 1/25 s.
    unit = math.gcd(last, *(time - shift for time in times))
    timestamps = [(time - shift) // unit for time in times]
    return Clock(timestamps, last // unit, base * unit, shift * base)


# --- Reading --------------------------------------------------------------------------------------


def _available_memory() -> int:
    """Bytes of memory that this process can still get, on Linux; elsewhere all there is."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
        available = 1024 * int(meminfo.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container may have a limit of its own
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        # Files that were read count as used, but make room where memory is asked for.
        statistics = (CGROUP / "memory.stat").read_text()
        cached = re.findall(r"^(?:in)?active_file (\d+)$", statistics, re.MULTILINE)
        available = min(available, limit - used + sum(map(int, cached)))
    return available


def _check_memory(path: Path, count: int, height: int, width: int) -> None:
    """Raise ValueError if `count` frames do not fit into memory."""
    needed = count * height * width * 3
    available = _available_memory()
    if needed > available:
        raise ValueError(
            f"{path}: its {count} frames of {width}x{height} need {needed / 1e9:.1f} GB of memory, "
            f"but only {available / 1e9:.1f} GB are free; cut it into shorter clips"
        )


class Reader:
    """One pass over the frames of an open file, of which it keeps the times."""

    def __init__(self, container: InputContainer, path: Path, limit: int | None) -> None:
        self.container = container
        self.path = path
        self.stream = video_stream(container, path)
        self.limit = limit
        self.profile = b""
        self.pts: list[int | None] = []
        self.dts: list[int | None] = []

    def frames(self) -> Iterator[Shown]:
        """Decode at most `limit` frames."""
        shown = itertools.islice(_decode(self.container, self.stream), self.limit)
        for item in shown:
            frame = item.frame
            if not self.pts:  # all frames are shown as the first one is
                check_matrix(frame, self.path)
                self.height, self.width = frame.height, frame.width  # as stored
                self.swap, self.down, self.right = _orientation(frame)
                if not wide_primaries(frame):  # those are converted
                    self.profile = _side_data(frame, "ICC_PROFILE")
            self.pts.append(item.pts)
            self.dts.append(item.dts)
            self.last_duration = frame.duration
            yield item
        if not self.pts:
            raise ValueError(f"{self.path}: damaged, not one frame can be decoded")

    def images(self) -> Iterator[np.ndarray]:
        """Decode at most `limit` frames to upright uint8 (H, W, 3)."""
        scaler = sws.VideoReformatter()
        for item in _deinterlace(self.frames()):
            # A stream that changes its size midway is scaled to that of its first frame.
            stored = to_rgb(item.frame, (self.height, self.width), scaler)
            upright = stored.swapaxes(0, 1) if self.swap else stored
            yield upright[:: self.down, :: self.right]

    def describe(self, contents: Contents) -> Video:
        """The clip without its frames, once all of them were passed."""
        first = contents.start or Fraction(0)
        clock = _clock(self.pts, self.dts, self.stream, self.last_duration, first)
        aspect = self.stream.sample_aspect_ratio or Fraction(1)
        count = len(self.pts)
        complete = self.limit is None or count < self.limit
        return Video(
            frames=None,
            height=self.width if self.swap else self.height,
            width=self.height if self.swap else self.width,
            **vars(clock),
            pixel_aspect=1 / aspect if self.swap else aspect,
            path=self.path,
            total=count if complete else max(contents.packets, count),
            profile=self.profile,
        )


def _read_pictures(path: Path, max_frames: int | None) -> Video | None:
    """Read a still or an animated WebP; None if that is not for Pillow to do."""
    check_file(path)
    shape = stills.shape_of(path)
    if shape is None:
        return None
    total, height, width = shape
    count = min(total, max_frames or total)
    _check_memory(path, count, height, width)
    frames, durations, profile = stills.read(path, count)
    starts = list(itertools.accumulate(durations, initial=0))[:-1]  # in ms
    unit = math.gcd(*durations)
    return Video(
        frames=torch.from_numpy(frames),
        height=frames.shape[1],
        width=frames.shape[2],
        timestamps=[start // unit for start in starts],
        last_duration=durations[-1] // unit,
        time_base=Fraction(unit, 1000),
        start=Fraction(0),
        pixel_aspect=Fraction(1),
        path=path,
        total=total,
        profile=profile,
        sound={ending: [] for ending in COPIED_AUDIO},
    )


def open_video(path: str | Path, max_frames: int | None = None) -> Video:
    """Read all about a clip but its frames, which `Video.blocks` then decodes as often as needed.

    For clips that do not fit into memory. All frames are decoded once, so that their number and
    times are exact and damage is found. Stills and animated WebP come with their frames. Arguments
    and errors are those of `read_video`.
    """
    path = Path(path)
    if pictures := _read_pictures(path, max_frames):
        return pictures
    with explained(path):
        contents = scan(path)
        with open_container(path) as container:
            reader = Reader(container, path, max_frames)
            for _ in reader.frames():
                pass
            return reader.describe(contents)


def read_video(path: str | Path, max_frames: int | None = None) -> Video:
    """Read a clip of any container and codec that FFmpeg decodes, or only its first frames.

    A still is a clip of one frame, upright as its EXIF says.

    Raises OSError or ValueError, in one line that names the file, if no video or not all of it is
    there, or if its frames do not fit into memory.
    """
    path = Path(path)
    if pictures := _read_pictures(path, max_frames):
        return pictures
    with explained(path):
        contents = scan(path)
        with open_container(path) as container:
            reader = Reader(container, path, max_frames)
            context = reader.stream.codec_context
            capacity = max(1, min(contents.packets, reader.limit or contents.packets))
            _check_memory(path, capacity, context.height, context.width)
            frames = None
            for i, image in enumerate(reader.images()):
                if frames is None:
                    # Once, at full length: stacking a list of frames would take the memory twice.
                    frames = torch.empty((capacity, *image.shape), dtype=torch.uint8)
                elif i == len(frames):  # a codec that puts several frames into a packet
                    frames = torch.cat([frames, torch.empty_like(frames)])
                frames.numpy()[i] = image
            clip = reader.describe(contents)
    clip.frames = frames[: len(clip.timestamps)]
    return clip


# --- Writing --------------------------------------------------------------------------------------


def _is_picture(path: Path) -> bool:
    """Whether a file holds a picture and not a clip."""
    shape = stills.shape_of(path)
    if shape:
        return shape[0] == 1
    return is_png(path) or head_of(path)[8:12] in PICTURE_BRANDS


def default_ending(path: Path) -> str:
    """The ending of an edit: that of a still, .png for other pictures, and .mp4 for clips."""
    with contextlib.suppress(OSError, ValueError):  # which reading the file will explain
        if path.is_file() and _is_picture(path):
            ending = path.suffix.lower()
            return ending if ending in stills.WRITTEN else ".png"
    return ".mp4"


def check_writable(path: str | Path) -> None:
    """Raise OSError or ValueError, in one line, if `path` cannot be written.

    To be called before long work.
    """
    path = Path(path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.stat()  # which says that a name is too long; `exists` of Python 3.14 only says no
    if path.is_dir():
        example = path / "edited.mp4"
        raise IsADirectoryError(f"{path}: is a folder; name a file in it, such as {example}")
    if path.suffix.lower() not in (*COPIED_AUDIO, *stills.WRITTEN):
        endings = f"{' or '.join(COPIED_AUDIO)}, that of a still in {', '.join(stills.WRITTEN)}"
        raise ValueError(f"{path}: the name of a video to write must end in {endings}")
    # A link stays, and what it leads to is written.
    folder = (Path(os.path.realpath(path)) if path.is_symlink() else path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder}; create it first")
    folder_allows = os.access(folder, os.W_OK | os.X_OK)
    file_allows = os.access(path, os.W_OK) or not path.exists()
    if not (folder_allows and file_allows):
        raise PermissionError(f"{path}: it or its folder is read-only; choose another place")


def check_size(path: str | Path, height: int, width: int) -> None:
    """Raise ValueError, in one line, if frames of this size cannot be written to `path`."""
    ending = Path(path).suffix.lower()
    limit = MAX_SIDE[ending]
    if max(height, width) > limit:
        format_ = ending[1:].upper() if ending in stills.WRITTEN else "H.264"
        raise ValueError(
            f"{path}: frames of {width}x{height} cannot be written, {format_} allows {limit} "
            f"pixels a side; scale the clip down first"
        )
    if min(height, width) < 2 and ending not in stills.WRITTEN:
        raise ValueError(f"{path}: a video needs two pixels a side, not {width}x{height}")


def prepare_sound(clip: Video, path: str | Path) -> list[SoundTrack]:
    """Make the sound of `clip` ready to be written to `path`, and keep it in `clip`.

    To be called before long work: whatever is wrong with the sound becomes a note on stderr now,
    and nothing about it can fail later.
    """
    ending = Path(path).suffix.lower()
    if ending not in clip.sound:
        end = (clip.timestamps[-1] + clip.last_duration) * clip.time_base + clip.start
        goes_on = clip.total > len(clip.timestamps)
        picture = Picture(clip.path, clip.start, end, goes_on)
        clip.sound[ending] = prepare_tracks(picture, ending)
    return clip.sound[ending]


def prepare_edit(clip: Video, path: str | Path) -> None:
    """Find out, before the edit of `clip` begins, whether it can be written to `path`.

    Raises OSError or ValueError, in one line, if it cannot. Faults of the sound are only noted.
    """
    check_writable(path)
    check_size(path, clip.height, clip.width)
    if Path(path).suffix.lower() not in stills.WRITTEN:
        prepare_sound(clip, path)
    elif len(clip.timestamps) > 1:
        raise ValueError(_not_one_frame(path))


def _not_one_frame(path: str | Path) -> str:
    return f"{path}: can hold one picture and not a clip; name a file that ends in .mp4 or .mov"


# For FFmpeg's filter from RGB to what is written, as exact as `colour.SCALING`. H.264 that does not
# say where its chroma is has it at the left of each pair of pixels, and only the filter can put it
# there.
TO_H264 = (
    "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    ":out_color_matrix=bt709:out_range=limited:out_chroma_loc=left"
)


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
    # Threads that share a frame would keep the caller waiting, and cost quality on many cores.
    context.thread_type = "FRAME"
    context.flags |= av.codec.context.Flags.frame_duration  # or the last frame gets the average
    context.colorspace = sws.Colorspace.ITU709
    context.color_range = sws.ColorRange.MPEG
    context.color_primaries = sws.ColorPrimaries.BT709
    context.color_trc = sws.ColorTrc.BT709
    return track


def _video_packets(track: Stream, timed: Iterable[tuple[Tensor, int, int]]) -> Iterator[Packet]:
    """Encode triples of (H, W, 3) image, timestamp and duration, one after another."""
    context = track.codec_context
    graph = None
    for image, timestamp, duration in timed:
        image = image[: context.height, : context.width].contiguous().cpu()
        frame = VideoFrame.from_ndarray(image.numpy(), "rgb24")
        graph = graph or filter_graph(frame, ("scale", TO_H264), ("format", "yuv420p"))
        graph.push(frame)
        frame = graph.pull()
        frame.pts = timestamp
        frame.duration = duration
        frame.time_base = context.time_base
        yield from track.encode(frame)
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
    """Write a clip as H.264 to an .mp4 or .mov file, or a still; complete or not at all.

    frames: uint8 (T, H, W, 3), or an iterable of such blocks, for clips that are too long to be
    held twice.
    like: the clip of T frames whose timing, pixel aspect and audio this one gets. Without it the
    clip runs at `fps` and is silent.
    A `path` that ends in .png, .webp or .jpg takes one frame, without loss but for JPEG.
    Returns (height, width) as written: H.264 in 4:2:0 has no odd sides, so an odd one loses its
    last row or column. Raises OSError or ValueError if the file cannot be written.
    """
    check_writable(path)
    path = Path(path)
    images = _images(frames)
    first = next(images, None)
    if first is None:
        raise ValueError(f"{path}: nothing to write, a video needs at least one frame")
    check_size(path, *first.shape[:2])
    if path.suffix.lower() in stills.WRITTEN:
        if next(images, None) is not None:
            raise ValueError(_not_one_frame(path))
        with cli.replacing(path) as temporary:
            stills.write(temporary, first.cpu().numpy(), like.profile if like else b"")
        return first.shape[0], first.shape[1]
    images = itertools.chain([first], images)
    height, width = first.shape[0] // 2 * 2, first.shape[1] // 2 * 2
    sound = prepare_sound(like, path) if like else []
    if like:
        ends = [*like.timestamps[1:], like.timestamps[-1] + like.last_duration]
        durations = [end - begin for begin, end in zip(like.timestamps, ends, strict=True)]
        timed = zip(images, like.timestamps, durations, strict=True)
    else:
        timed = ((image, i, 1) for i, image in enumerate(images))
    time_base = like.time_base if like else 1 / Fraction(fps)
    rate = like.rate if like else 1 / time_base

    # The index goes to the front, so that browsers play at once. The timescale of the whole file
    # must hold the clip's start exactly.
    timescale = time_base.denominator * (1 + 10**6 // time_base.denominator)
    options = {"movflags": "faststart", "movie_timescale": str(timescale)}
    with (
        cli.replacing(path) as temporary,
        av.open(f"file:{temporary}", "w", container_options=options) as out,
    ):
        track = _add_video(out, height, width, time_base, rate)
        if like:
            track.codec_context.sample_aspect_ratio = like.pixel_aspect
        tracks = [_video_packets(track, timed), *(add_track(out, one) for one in sound)]
        # In order of time, so that the sound is stored near its picture.
        for packet in heapq.merge(*tracks, key=lambda packet: packet.dts * packet.time_base):
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
