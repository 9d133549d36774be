"""Reading and writing video with PyAV: whatever FFmpeg decodes comes in as RGB, H.264 goes out.

Stills are clips of one frame. Those that Pillow reads and writes, and animated WebP, are left to
`stills.py`; HDR is read here, and simple HEIC without pillow-heif.

An edited clip has the length, resolution, timing and audio of its source (Eq. 1 of the paper).
Beside the frames, `read_video` therefore keeps what `write_video` needs to put edited frames in
their place:

- time: each frame's own timestamp. 29.97 fps stays 30000/1001, a variable rate stays variable.
  Only timestamps that are missing or out of order are replaced.
- sound: every audio track, copied packet by packet. What players do not expect in the written
  file, or what cannot be copied, becomes AAC. A track that cannot be saved is left out, with a
  note: sound never costs the picture.
- shape: rotation metadata is applied to the frames and not written. Pixel aspect is kept.
- colour: read by the stream's own tags, written as BT.709 in limited range. HDR (HLG, PQ), BT.2020
  and DCI or Display P3 become BT.709 with standard dynamic range. A still keeps its numbers and its
  ICC profile.

Frames are uint8 (T, H, W, 3) RGB: T frames, H height, W width. Interlaced frames are deinterlaced.
Transparent pixels are shown on white. Subtitles, chapters and metadata are dropped.
"""

from __future__ import annotations

import bisect
import contextlib
import heapq
import io
import itertools
import math
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av import AudioFrame, Packet, VideoFrame
from av.codec.context import CodecContext
from av.container import InputContainer, OutputContainer
from av.filter import Graph
from av.stream import Disposition, Stream
from av.video import reformatter as sws
from torch import Tensor

import cli
import stills

# Only these containers are read, by the names of FFmpeg's demuxers. Playlists (HLS, DASH), concat
# scripts and image sequences are not among them: they open other files or addresses and may never
# end. Nor are text formats, such as ANSI art. The last row is sound: it gets its own error.
CONTAINERS = (
    "mov matroska avi mpegts mpeg mpegvideo flv asf ogg gif apng mxf nut rm dv wtv ivf obu "
    "h264 hevc vvc m4v mjpeg vc1 yuv4mpegpipe dhav png_pipe "
    "mp3 wav flac aac"
).split()

PICTURE_BRANDS = (b"avif", b"heic", b"heix", b"mif1")  # of AVIF and HEIC that is not animated

# Audio codecs that players expect in a file with this ending. They are copied, others become AAC.
COPIED_AUDIO = {
    ".mp4": "aac mp3 ac3 eac3 alac flac opus".split(),
    ".mov": "aac mp3 ac3 eac3 alac pcm_s16le pcm_s16be pcm_s24le pcm_s24be".split(),
}

# QuickTime files (.mov) know some languages by their other ISO 639-2 code.
QUICKTIME_LANGUAGES = dict(
    deu="ger", nld="dut", ell="gre", isl="ice", zho="chi", sqi="alb", hye="arm", kat="geo",
    mya="bur", msa="may", bod="tib", cym="wel", eus="baq", mkd="mac", fre="fra", rum="ron",
    cze="ces", slo="slk",
)  # fmt: skip

# The largest side in pixels: of H.264 as x264 writes it, and of stills.
MAX_SIDE = {".mp4": 16_384, ".mov": 16_384, ".webp": 16_383}
MAX_SIDE |= {".png": 65_500, ".jpg": 65_500, ".jpeg": 65_500}

# Titles and other tags need not be valid UTF-8. PyAV 18 has to be told, 19 takes them anyhow.
ANY_TAGS = {"metadata_errors": "replace"} if av.__version__.startswith("18.") else {}

# MPEG-TS and its like are made to be joined and left at any moment: their clock starts anywhere,
# and they declare no length.
BROADCAST = av.format.Flags.ts_discont.value

# Seconds: a longer time between two frames is a fault of the clock.
LONGEST_GAP = 3600

# swscale's defaults trade accuracy for speed: with them colours are off by 3 levels instead of 1,
# and chroma is not interpolated.
FULL_CHROMA = sws.Interpolation.FULL_CHR_H_INT | sws.Interpolation.FULL_CHR_H_INP
SCALING = sws.Interpolation.BICUBIC | sws.Interpolation.ACCURATE_RND | FULL_CHROMA
# The same for FFmpeg's filter, and what is written. H.264 that does not say where its chroma is has
# it at the left of each pair of pixels, and only the filter can put it there.
TO_H264 = (
    "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    ":out_color_matrix=bt709:out_range=limited:out_chroma_loc=left"
)


@dataclass
class SoundTrack:
    """One audio track, ready to be copied.

    It is a whole file in memory. What was written once can be written again, so that nothing
    about the sound can fail when an edit is written.
    """

    file: bytes  # an .mp4 or .mov file that holds this track alone
    language: str | None  # ISO 639-2
    disposition: Disposition  # whether players choose this track by default, and the like


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
        with _explained(self.path), _open(self.path) as container:
            images = Reader(container, self.path, len(self.timestamps)).images()
            while block := list(itertools.islice(images, length)):
                yield torch.from_numpy(np.stack(block))


# --- Opening a file -------------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    """Raise OSError or ValueError, in one line, for what cannot be a clip whatever it holds."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not a video file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():  # reading it might never end
        raise ValueError(f"{path}: is a pipe or a device; save the clip as a file first")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")


def _open(path: Path) -> InputContainer:
    # The lists keep FFmpeg from opening anything else, whatever the file says.
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    # By its name, FFmpeg would take a PNG with a "%" in it for a series of files.
    format_ = "png_pipe" if _is_png(path) else None
    # "file:" keeps a name such as "a:b.mp4" from being taken for a protocol.
    return av.open(f"file:{path}", format=format_, options=options, **ANY_TAGS)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _is_png(path: Path) -> bool:
    """Whether a file is a PNG picture that does not move."""
    head = _head(path)
    return head.startswith(b"\x89PNG\r\n\x1a\n") and b"acTL" not in head


def _is_picture(path: Path) -> bool:
    """Whether a file holds a picture and not a clip."""
    shape = stills.shape_of(path)
    if shape:
        return shape[0] == 1
    return _is_png(path) or _head(path)[8:12] in PICTURE_BRANDS


def default_ending(path: Path) -> str:
    """The ending of an edit: that of a still, .png for other pictures, and .mp4 for clips."""
    with contextlib.suppress(OSError, ValueError):  # which reading the file will explain
        if path.is_file() and _is_picture(path):
            ending = path.suffix.lower()
            return ending if ending in stills.WRITTEN else ".png"
    return ".mp4"


def _why_unreadable(path: Path, error: av.FFmpegError) -> str:
    """The one line for a file that FFmpeg fails to open or to decode."""
    head = _head(path)
    reason = error.strerror
    if isinstance(error, av.ArgumentError):  # it is not in the list of containers
        reason = "its format is not read"
    if b"\0" not in head and not any(byte > 127 for byte in head):
        reason = "it is a text; playlists and scripts are not followed"
    return f"{path}: not a video file, or cut short or damaged ({reason})"


def _video_stream(container: InputContainer, path: Path) -> Stream:
    """Choose the video: not a cover picture, marked as default if one is, and then the largest.

    An animated AVIF also holds its first frame as a picture of the same size.
    """
    not_the_video = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & not_the_video]
    if not streams:
        only_audio = ", only audio" if container.streams.audio else ""
        raise ValueError(f"{path}: has no video{only_audio}")
    decodable = [s for s in streams if s.codec_context is not None]
    if not decodable:
        raise ValueError(f"{path}: FFmpeg cannot decode its video; convert it first")
    chosen = max(decodable, key=lambda s: (_is_default(s), _area(s), s.frames))
    # One tile alone is a picture that has to be cropped.
    tiles = any(s.disposition & Disposition.dependent for s in streams)
    if tiles and not _is_default(chosen):
        raise ValueError(
            f"{path}: is a picture in tiles; for HEIC, `pip install pillow-heif`; otherwise "
            "convert it to PNG or JPEG first"
        )
    return chosen


def _is_default(stream: Stream) -> bool:
    return bool(stream.disposition & Disposition.default)


def _area(stream: Stream) -> int:
    return stream.codec_context.width * stream.codec_context.height


def _demux(container: InputContainer) -> Iterator[Packet]:
    """Yield all packets, on a clock that goes on where recordings were joined.

    At a join the clock of every stream jumps. The first stream that jumps goes on without a gap.
    The others are moved by the same offset, so that sound and picture stay together. A stream that
    jumps to where another one is already has only paused.
    """
    kind = container.format
    # A broadcast that is 10 s ahead was joined. In other files such a gap may be meant.
    ahead = 10 if kind.flags & BROADCAST else LONGEST_GAP
    # An MP4 file has no clock that could jump back, but an edit list.
    back = math.inf if kind.name.startswith("mov") else 0.5
    offsets = [Fraction(0)]  # seconds, one for each recording so far
    offset = {}  # the one in use, by stream
    end = {}  # of the last packet, in seconds, by stream
    heard = {}  # how far the sound of the recording before went, by stream
    for packet in _all_packets(container):
        stream = packet.stream
        if stream.type not in ("video", "audio") or packet.is_discard:
            yield packet
            continue
        moved = offset.setdefault(stream.index, offsets[-1])
        if packet.dts is not None:
            time = packet.dts * packet.time_base
            expected = end.get(stream.index, time + moved)
            jump = time + moved - expected
            others = (e for index, e in end.items() if index != stream.index)
            paused = jump > 0 and any(abs(e - expected) > abs(e - time - moved) for e in others)
            if not (-back <= jump <= ahead or paused):
                known = [o for o in offsets if o != moved and abs(time + o - expected) < 1]
                moved = known[-1] if known else expected - time
                offset[stream.index] = moved
                offsets.append(moved)
                heard[stream.index] = expected
            length = (packet.duration or 0) * packet.time_base
            overlap = heard.get(stream.index, -math.inf) - (time + moved)
            if stream.type == "audio" and overlap > length / 2:
                continue  # two sounds at a time
            end[stream.index] = time + moved + length
        if moved:
            ticks = round(moved / packet.time_base)
            packet.dts = None if packet.dts is None else packet.dts + ticks
            packet.pts = None if packet.pts is None else packet.pts + ticks
        yield packet


def _all_packets(container: InputContainer) -> Iterator[Packet]:
    # Where a stream shows up midway, PyAV raises an IndexError behind the last packet.
    with contextlib.suppress(IndexError):
        yield from container.demux()


def _is_shown(packet: Packet) -> bool:
    """Whether a packet holds a picture or sound that is played.

    An edit list hides packets that are only needed for decoding. The packets that PyAV makes up
    to flush a decoder have neither content nor time; empty ones with a time repeat a frame.
    """
    return not packet.is_discard and (packet.size > 0 or packet.pts is not None)


# --- Is the file complete? ------------------------------------------------------------------------
# FFmpeg plays a file that was cut short up to the cut, without an error. But most formats declare
# their size. Each function below returns where the file should end, in bytes, or 0 if unknown.


def _end_of_riff(path: Path) -> int:
    """An AVI file is one chunk: "RIFF", then the size of the rest."""
    with path.open("rb") as file:
        header = file.read(8)
    size = int.from_bytes(header[4:], "little")
    return 0 if size == 0xFFFFFFFF else 8 + size  # all ones: written to a pipe


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


def _end_of_gif(path: Path) -> int:
    """A GIF file is a row of blocks with contents in small pieces, and ends with one byte."""
    data = path.read_bytes()

    def byte(place: int) -> int:
        return int.from_bytes(data[place : place + 1], "big")

    def colours(place: int) -> int:
        """The length of the table of colours that the flags at this place announce."""
        return 3 * 2 ** (byte(place) % 8 + 1) if byte(place) & 0x80 else 0

    position = 13 + colours(10)
    while position < len(data):
        kind = byte(position)
        if kind == 0x3B:
            return position
        if kind == 0:  # some writers leave these in between
            position += 1
            continue
        if kind == 0x21:  # an extension
            position += 2
        elif kind == 0x2C:  # a frame
            position += 11 + colours(position + 9)
        else:
            return 0
        while byte(position):
            position += 1 + byte(position)
        position += 1
    return sys.maxsize


def _end_of_asf(path: Path) -> int:
    """An ASF (WMV) file declares its size in its header's File Properties."""
    with path.open("rb") as file:
        head = file.read(65_536)
    place = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if place < 0 or int.from_bytes(head[place + 88 : place + 89], "big") & 1:  # a broadcast
        return 0
    return int.from_bytes(head[place + 40 : place + 48], "little")


# By the first names of FFmpeg's demuxers.
DECLARED_ENDS = {
    "avi": _end_of_riff,
    "matroska": _end_of_matroska,
    "mov": _end_of_mp4,
    "gif": _end_of_gif,
    "asf": _end_of_asf,
}


def _ends_in_zeros(path: Path) -> bool:
    """Whether the file was made as large as it should become, and then not filled."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return not any(file.read())


@dataclass
class Contents:
    """What the packets of a file tell before anything is decoded."""

    packets: int = 0  # of the video, that are shown: about as many as there are frames
    start: Fraction | None = None  # seconds, when the first picture or sound is played


def _scan(path: Path) -> Contents:
    """Read the file once. Raises ValueError if its end is missing."""
    contents = Contents()
    end = Fraction(0)  # seconds, of the last picture or sound
    with _open(path) as container:
        video = _video_stream(container, path)
        kind = container.format
        declared_end = DECLARED_ENDS.get(kind.name.split(",")[0])
        partial = declared_end is not None and declared_end(path) > path.stat().st_size
        for packet in _demux(container):
            if packet.is_corrupt and not kind.flags & BROADCAST:
                partial = True
            if not _is_shown(packet):
                continue
            time = packet.dts if packet.pts is None else packet.pts
            if packet.stream.index == video.index:
                contents.packets += 1
            elif packet.stream.type != "audio":
                continue
            if time is not None:
                seconds = time * packet.time_base
                end = max(end, seconds + (packet.duration or 0) * packet.time_base)
                if contents.start is None or seconds < contents.start:
                    contents.start = seconds
        # A duration alone proves nothing: many are wrong, and FFmpeg guesses those that are absent.
        missing = (container.duration or 0) / av.time_base - end
        if missing > 0.5 and not kind.flags & BROADCAST and _ends_in_zeros(path):
            partial = True
    if partial:
        raise ValueError(f"{path}: the file is cut short, its last part is missing; copy it again")
    return contents


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
    for packet in _demux(container):
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
    for result in _pull(graph):
        yield waiting.pop(0)._replace(frame=result)


def _deinterlacer(frame: VideoFrame) -> Graph:
    """bwdif, one frame out for each frame in, that touches frames marked as interlaced only."""
    return _graph(frame, ("bwdif", "mode=send_frame:deint=interlaced"))


def _graph(frame: VideoFrame, *filters: tuple[str, str]) -> Graph:
    """A row of filters, given by name and options, for frames like `frame`."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25)
    )
    nodes = [graph.add(name, options) for name, options in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    return graph


def _pull(graph: Graph) -> Iterator[VideoFrame | AudioFrame]:
    with contextlib.suppress(BlockingIOError, EOFError):  # it wants more input; it is empty
        while True:
            yield graph.pull()


# --- Colour and shape -----------------------------------------------------------------------------
# HDR and wide colour are converted as a display would show them: to light, from their primaries
# to those of BT.709, and back to a signal by BT.1886. White of SDR is at 203 cd/m²
# (ITU-R BT.2408), so that colours within the range of SDR come out as if they had been SDR.

GAMMA = 2.4  # BT.1886
SDR_WHITE = 203.0  # cd/m²
KNEE = 0.9  # of SDR white: light above it is compressed, so that highlights keep some detail
# The 10 bits of Y, Cb and Cr cannot tell a channel of less than about this share of the brightest
# one from none, and BT.1886 would make up to 16 levels of that error.
FLOOR = 0.0085
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
# From linear RGB of wider primaries to that of BT.709. The white of DCI P3 (SMPTE 431), which alone
# is not D65, is adapted to it by Bradford's method.
TO_709 = {
    sws.ColorPrimaries.BT2020: np.array(
        [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
        np.float32,
    ),
    sws.ColorPrimaries.SMPTE431: np.array(
        [[1.1575, -0.1550, -0.0026], [-0.0415, 1.0456, -0.0041], [-0.0181, -0.0786, 1.0966]],
        np.float32,
    ),
    sws.ColorPrimaries.SMPTE432: np.array(
        [[1.2249, -0.2249, 0], [-0.0421, 1.0421, 0], [-0.0196, -0.0786, 1.0983]], np.float32
    ),
}


def _light_of_pq(signal: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084: [0, 1] -> light on the display, where SDR white is 1."""
    m1, m2 = 1305 / 8192, 2523 / 32
    c1, c2, c3 = 107 / 128, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return 10_000 / SDR_WHITE * light


def _light_of_hlg(signal: np.ndarray) -> np.ndarray:
    """ARIB STD-B67 (ITU-R BT.2100): [0, 1] -> light of the scene in [0, 1]."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def _light_table(transfer: int, white: int) -> np.ndarray:
    """Light for each of the 65,536 levels of a signal, of which `white` is 1."""
    signal = np.minimum(np.arange(65_536) / white, 1)
    if transfer == sws.ColorTrc.SMPTE2084:
        return _light_of_pq(signal).astype(np.float32)
    if transfer == sws.ColorTrc.ARIB_STD_B67:
        return _light_of_hlg(signal).astype(np.float32)
    return (signal**GAMMA).astype(np.float32)


def _to_bt709(image: np.ndarray, primaries: int, transfer: int, white: int) -> np.ndarray:
    """Any primaries and transfer function, uint16 (H, W, 3) -> BT.709, uint8 (H, W, 3)."""
    table = _light_table(transfer, white)
    roots = np.arange(16_384) / 16_383  # of light: in these steps the dark ones are fine enough
    signals = np.rint(255 * roots ** (2 / GAMMA)).astype(np.uint8)
    result = np.empty(image.shape, np.uint8)
    for top in range(0, len(image), 64):  # in strips, to save memory
        light = table[image[top : top + 64]]  # (64, W, 3)
        if transfer == sws.ColorTrc.ARIB_STD_B67:
            # The OOTF of a display of 1000 cd/m²: from light of the scene to light on the display.
            light *= 1000 / SDR_WHITE * (light @ LUMA_2020)[..., None] ** 0.2
        light = np.maximum(light @ TO_709[primaries].T, 0)
        # Both ends are compressed relative to the brightest channel, which keeps the hue.
        red, green, blue = light[..., :1], light[..., 1:2], light[..., 2:]
        peak = np.maximum(np.maximum(red, green), blue)  # much faster than light.max(-1)
        light *= np.square(np.minimum(light / (FLOOR * peak + 1e-9), 1))
        bright = np.maximum(peak, KNEE)
        compressed = 1 - (1 - KNEE) * np.exp((KNEE - bright) / (1 - KNEE))
        light *= np.where(peak > KNEE, compressed / bright, 1)
        result[top : top + 64] = signals[(16_383 * np.sqrt(light) + 0.5).astype(np.uint16)]
    return result


def _on_white(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 4) with alpha -> uint8 (H, W, 3)."""
    colour = image[..., :3].astype(np.uint16)
    alpha = image[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _wide_primaries(frame: VideoFrame) -> sws.ColorPrimaries | None:
    """The primaries of a frame if they are wider than BT.709's. HDR has BT.2020's if not P3's."""
    if frame.color_primaries in TO_709:
        return sws.ColorPrimaries(frame.color_primaries)
    hdr = frame.color_trc in (sws.ColorTrc.SMPTE2084, sws.ColorTrc.ARIB_STD_B67)
    return sws.ColorPrimaries.BT2020 if hdr else None


# Matrices that FFmpeg cannot convert, by their tag in ITU-T H.273.
NOT_CONVERTED = {
    8: "YCgCo",
    11: "YDzDx",
    14: "ICtCp",
    15: "IPT-PQ-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}


def _matrix(frame: VideoFrame) -> sws.Colorspace | None:
    """The YCbCr matrix of a frame whose tag swscale cannot use. None: swscale reads the tag."""
    # No tag at all; BT.2020 with constant luminance, which is nearly the same as without; and
    # "derived from the primaries".
    unmarked, constant_luminance, derived = (0, 2, 3), 10, (12, 13)
    if frame.format.is_rgb or frame.colorspace not in (*unmarked, constant_luminance, *derived):
        return None
    is_2020 = _wide_primaries(frame) == sws.ColorPrimaries.BT2020
    if frame.colorspace == constant_luminance or is_2020:
        return sws.Colorspace.BT2020
    if frame.width >= 1280 or frame.height > 576:
        return sws.Colorspace.ITU709
    return sws.Colorspace.ITU601


def _rgb(frame: VideoFrame, size: tuple[int, int], scaler: sws.VideoReformatter) -> np.ndarray:
    """One frame as it is stored -> uint8 (H, W, 3), BT.709."""
    wide = _wide_primaries(frame)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    transparent = has_alpha or frame.format.name == "pal8"  # the palette may have it
    layout = "rgb48" if wide else "rgba" if transparent else "rgb24"
    image = scaler.reformat(
        frame,
        size[1],
        size[0],
        layout,
        src_colorspace=_matrix(frame),
        dst_color_range=sws.ColorRange.JPEG,
        interpolation=SCALING,
    ).to_ndarray()
    if wide:
        # swscale's 16 bits: from YCbCr, white comes out as 255 · 256.
        white = 65_535 if frame.format.is_rgb else 65_280
        return _to_bt709(image, wide, frame.color_trc, white)
    return _on_white(image) if transparent else image


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
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        available = min(available, limit - used)
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


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors into one line that names the file."""
    try:
        yield
    except av.FFmpegError as error:
        raise ValueError(_why_unreadable(path, error)) from error


class Reader:
    """One pass over the frames of an open file, of which it keeps the times."""

    def __init__(self, container: InputContainer, path: Path, limit: int | None) -> None:
        self.container = container
        self.path = path
        self.stream = _video_stream(container, path)
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
                self._check_matrix(frame)
                self.height, self.width = frame.height, frame.width  # as stored
                self.swap, self.down, self.right = _orientation(frame)
                if not _wide_primaries(frame):  # those are converted
                    self.profile = _side_data(frame, "ICC_PROFILE")
            self.pts.append(item.pts)
            self.dts.append(item.dts)
            self.last_duration = frame.duration
            yield item
        if not self.pts:
            raise ValueError(f"{self.path}: damaged, not one frame can be decoded")

    def _check_matrix(self, frame: VideoFrame) -> None:
        name = NOT_CONVERTED.get(frame.colorspace)
        if name and not frame.format.is_rgb:
            raise ValueError(
                f"{self.path}: FFmpeg cannot convert its colours from {name} to RGB; convert it to "
                "BT.709 first"
            )

    def images(self) -> Iterator[np.ndarray]:
        """Decode at most `limit` frames to upright uint8 (H, W, 3)."""
        scaler = sws.VideoReformatter()
        for item in _deinterlace(self.frames()):
            # A stream that changes its size midway is scaled to that of its first frame.
            stored = _rgb(item.frame, (self.height, self.width), scaler)
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
    _check_file(path)
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
    with _explained(path):
        contents = _scan(path)
        with _open(path) as container:
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
    with _explained(path):
        contents = _scan(path)
        with _open(path) as container:
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


# --- Sound ----------------------------------------------------------------------------------------


def _sound_packets(clip: Video, container: InputContainer, index: int) -> Iterator[Packet]:
    """Yield the packets of one track, and at the end the empty one that flushes its decoder.

    Sound far behind both the picture and the sound before it is a fault of the clock. It would
    become hours of silence.
    """
    end = (clip.timestamps[-1] + clip.last_duration) * clip.time_base + clip.start
    for packet in _demux(container):
        time = (packet.dts or 0) * packet.time_base
        if packet.stream.index == index and time < end + LONGEST_GAP:
            end = max(end, time + (packet.duration or 0) * packet.time_base)
            yield packet


def _name_channels(context: CodecContext) -> list[str]:
    """The channels of a track in an order of their own, and [] if they are in FFmpeg's order.

    PyAV 18.1 frees the list of such channels with every layout that it hands out, and ends the
    process when it is freed twice. So the layout is asked for once, and then replaced in the
    decoder by a standard one of as many channels.
    """
    layout = context.layout
    if "(" not in layout.name:  # a standard layout, such as "5.1"
        return []
    names = [channel.name for channel in layout.channels]
    standard = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
    context.layout = standard.get(len(names), f"{len(names)} channels")
    return names


def _copy_track(clip: Video, index: int, out: OutputContainer) -> int:
    """Copy one audio track into `out`. Returns the number of damaged packets that were left out.

    Raises ValueError or an error of FFmpeg's if the track cannot be copied.
    """
    dropped = 0
    last = form = None
    with _open(clip.path) as source:
        stream = source.streams[index]
        _name_channels(stream.codec_context)
        track = out.add_stream_from_template(stream)
        # The unit of time in the written file, so that times which differ stay different.
        tick = Fraction(1, stream.codec_context.sample_rate)
        for packet in _sound_packets(clip, source, index):
            if packet.size == 0:
                continue
            length = round((packet.duration or 0) * packet.time_base / tick)
            time = packet.pts if packet.dts is None else packet.dts
            if time is not None:
                time = round((time * packet.time_base - clip.start) / tick)
            else:
                time = 0 if last is None else last + length
            # What an edit list hides stays out, but for the moment before time 0 from which the
            # decoder starts.
            if packet.is_discard and not -0.1 < time * tick < 0:
                continue
            if last is not None and time <= last:
                time = last + 1
            try:
                # Decoded only to see whether it can be, and whether its form stays the same: a
                # broadcast may go from stereo to mono.
                for frame in _decoded(packet):
                    form = form or _form(frame)
                    if _form(frame) != form:
                        raise ValueError("its number of channels or its rate changes midway")
                packet.stream = track
                packet.time_base = tick
                packet.pts = packet.dts = time  # audio is not reordered
                packet.duration = length
                out.mux(packet)
                last = time
            except av.InvalidDataError:
                dropped += 1
    if last is None:
        raise ValueError("all of it is damaged")
    return dropped


def _decoded(packet: Packet) -> list[AudioFrame]:
    """The frames of a packet; none if it uses what FFmpeg cannot decode yet, as newer AAC does."""
    try:
        return packet.decode()
    except av.PatchWelcomeError:
        return []


def _form(frame: AudioFrame) -> tuple[int, str, str]:
    """What a filter for sound must know of its input."""
    return frame.sample_rate, frame.format.name, frame.layout.name


def _resampler(frame: AudioFrame, names: list[str], track: Stream) -> Graph:
    """A filter from frames like `frame` to those that the encoder of `track` takes."""
    graph = Graph()
    steps = [
        graph.add(
            "abuffer",
            sample_rate=str(frame.sample_rate),
            sample_fmt=frame.format.name,
            channel_layout=frame.layout.name,
            time_base=f"1/{frame.sample_rate}",
        )
    ]
    standard = [channel.name for channel in frame.layout.channels]
    if sorted(names) == sorted(standard):
        order = "|".join(str(names.index(name)) for name in standard)
        steps.append(graph.add("channelmap", f"map={order}:channel_layout={frame.layout.name}"))
    # Silence takes the place of what is missing, so that the rest stays with its picture.
    steps.append(graph.add("aresample", "async=1"))
    context = track.codec_context
    form = f"sample_fmts={context.format.name}:sample_rates={context.sample_rate}"
    steps.append(graph.add("aformat", f"{form}:channel_layouts={context.layout.name}"))
    steps.append(graph.add("abuffersink"))
    graph.link_nodes(*steps).configure()
    return graph


def _encode_track(clip: Video, index: int, out: OutputContainer) -> int:
    """Encode one audio track as AAC into `out`. Returns the number of damaged packets.

    Raises ValueError or an error of FFmpeg's if nothing of it can be decoded.
    """
    dropped = 0
    track = graph = graph_form = None
    expected = 0  # the time of the next frame, if it does not say
    with _open(clip.path) as source:
        stream = source.streams[index]
        names = _name_channels(stream.codec_context)
        for packet in _sound_packets(clip, source, index):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                dropped += 1
                continue
            for frame in frames:
                rate = frame.sample_rate
                form = _form(frame)
                if track is None:
                    track = _add_aac(out, frame)
                if graph is None or form != graph_form:
                    # A broadcast may change from stereo to mono, say.
                    if graph:
                        graph.push(None)
                        _encode(track, graph, out)
                    graph = _resampler(frame, names, track)
                    graph_form = form
                if frame.pts is None:
                    frame.pts = expected
                else:
                    frame.pts = round((frame.pts * frame.time_base - clip.start) * rate)
                frame.time_base = Fraction(1, rate)
                expected = frame.pts + frame.samples
                graph.push(frame)
                _encode(track, graph, out)
    if track is None:
        raise ValueError("none of it can be decoded")
    graph.push(None)
    _encode(track, graph, out)
    out.mux(track.encode(None))
    return dropped


def _encode(track: Stream, graph: Graph, out: OutputContainer) -> None:
    """Encode what has come out of the filter."""
    for frame in _pull(graph):
        out.mux(track.encode(frame))


def _add_aac(out: OutputContainer, frame: AudioFrame) -> Stream:
    """Add an AAC track for sound like `frame`."""
    rates = av.Codec("aac", "w").audio_rates
    rate = frame.sample_rate if frame.sample_rate in rates else 48_000
    layout = {1: "mono", 6: "5.1", 8: "7.1"}.get(frame.layout.nb_channels, "stereo")
    track = out.add_stream("aac", rate, layout=layout)
    track.codec_context.bit_rate = 96_000 * track.codec_context.layout.nb_channels
    return track


def _write_track(
    way: Callable[[Video, int, OutputContainer], int], clip: Video, stream: Stream, ending: str
) -> tuple[SoundTrack, int]:
    """Write one track to memory, by `_copy_track` or `_encode_track`.

    Returns it, and the number of damaged packets that were left out.
    """
    buffer = io.BytesIO()
    # So fine a timescale holds the start of the track to the sample.
    options = {"movie_timescale": str(stream.codec_context.sample_rate or 48_000)}
    with av.open(buffer, "w", format=ending[1:], container_options=options) as out:
        dropped = way(clip, stream.index, out)
    with av.open(io.BytesIO(buffer.getvalue())) as written:
        if not any(packet.size for packet in written.demux(audio=0)):
            raise ValueError("nothing of it could be written")
    language = stream.language
    if ending == ".mov":
        language = QUICKTIME_LANGUAGES.get(language, language)
    return SoundTrack(buffer.getvalue(), language, stream.disposition), dropped


def _prepare_track(clip: Video, stream: Stream, ending: str) -> SoundTrack | None:
    """Copy a track, or encode it, or give it up; what is lost is said on stderr."""

    def note(text: str) -> None:
        cli.say(f"note: {clip.path}: sound (stream {stream.index}) {text}")

    if stream.codec_context is None:
        note("was left out: FFmpeg does not know its codec")
        return None
    ways = [_encode_track]
    if stream.codec.canonical_name in COPIED_AUDIO[ending]:
        ways = [_copy_track, _encode_track]
    for way in ways:
        try:
            track, dropped = _write_track(way, clip, stream, ending)
        except Exception as error:  # whatever it is, it must not cost the picture
            reason = getattr(error, "strerror", None) or error
            continue
        if way is not ways[0]:
            note("was encoded again as AAC, because it cannot be copied as it is")
        if dropped:
            note(f"is damaged: {dropped} of its packets were left out")
        return track
    note(f"was left out: {reason}")
    return None


def prepare_sound(clip: Video, path: str | Path) -> list[SoundTrack]:
    """Make the sound of `clip` ready to be written to `path`, and keep it in `clip`.

    To be called before long work: whatever is wrong with the sound becomes a note on stderr now,
    and nothing about it can fail later.
    """
    ending = Path(path).suffix.lower()
    if ending not in clip.sound:
        with _open(clip.path) as source:
            tracks = [_prepare_track(clip, s, ending) for s in source.streams.audio]
        clip.sound[ending] = [track for track in tracks if track]
    return clip.sound[ending]


# --- Writing --------------------------------------------------------------------------------------


def check_writable(path: str | Path) -> None:
    """Raise OSError or ValueError, in one line, if `path` cannot be written.

    To be called before long work.
    """
    path = Path(path)
    if path.is_dir():
        example = path / "edited.mp4"
        raise IsADirectoryError(f"{path}: is a folder; name a file in it, such as {example}")
    if path.suffix.lower() not in (*COPIED_AUDIO, *stills.WRITTEN):
        endings = f"{' or '.join(COPIED_AUDIO)}, that of a still in {', '.join(stills.WRITTEN)}"
        raise ValueError(f"{path}: the name of a video to write must end in {endings}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; create it first")
    folder_allows = os.access(path.parent, os.W_OK | os.X_OK)
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
        graph = graph or _graph(frame, ("scale", TO_H264), ("format", "yuv420p"))
        graph.push(frame)
        frame = graph.pull()
        frame.pts = timestamp
        frame.duration = duration
        frame.time_base = context.time_base
        yield from track.encode(frame)
    yield from track.encode(None)


def _add_sound(out: OutputContainer, track: SoundTrack) -> Iterator[Packet]:
    """Add one track of prepared sound to `out`. Returns its packets."""
    source = av.open(io.BytesIO(track.file))
    copy = out.add_stream_from_template(source.streams.audio[0])
    copy.disposition = track.disposition
    if track.language:
        copy.metadata["language"] = track.language
    return _copied_packets(source, copy)


def _copied_packets(source: InputContainer, copy: Stream) -> Iterator[Packet]:
    with source:
        for packet in source.demux():
            if packet.size:
                packet.stream = copy
                yield packet


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
        tracks = [_video_packets(track, timed), *(_add_sound(out, one) for one in sound)]
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
