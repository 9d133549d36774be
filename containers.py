"""Video files as FFmpeg gives them: which are opened, their packets in time, and its filters.

`video.py` reads pictures from here, and `sound.py` sound. No file is believed: one that was cut
short is refused although FFmpeg plays it up to the cut, and packets come on one clock although
recordings were joined.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av import AudioFrame, Packet, VideoFrame
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition, Stream

from weights import what_it_is

# Only these containers are read, by the names of FFmpeg's demuxers. Playlists (HLS, DASH), concat
# scripts and image sequences are not among them: they open other files or addresses and may never
# end. Nor are text formats, such as ANSI art. The last row is sound: it gets its own error.
CONTAINERS = (
    "mov matroska avi mpegts mpeg mpegvideo flv asf ogg gif apng mxf nut rm dv wtv ivf obu "
    "h264 hevc vvc m4v mjpeg vc1 yuv4mpegpipe dhav png_pipe "
    "mp3 wav flac aac"
).split()

# Titles and other tags need not be valid UTF-8. PyAV 18 has to be told, 19 takes them anyhow.
ANY_TAGS = {"metadata_errors": "replace"} if av.__version__.startswith("18.") else {}

# MPEG-TS and its like are made to be joined and left at any moment: their clock starts anywhere,
# and they declare no length.
BROADCAST = av.format.Flags.ts_discont.value

# Seconds: a longer time between two frames is a fault of the clock.
LONGEST_GAP = 3600

# --- Opening a file -------------------------------------------------------------------------------


def check_file(path: Path) -> None:
    """Raise OSError or ValueError, in one line, for what cannot be a clip whatever it holds."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not a video file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():  # reading it might never end
        raise ValueError(f"{path}: is a pipe or a device; save the clip as a file first")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")


def open_container(path: Path) -> InputContainer:
    """Open a file for demuxing. Raises an error of FFmpeg's if it is in none of CONTAINERS."""
    # The lists keep FFmpeg from opening anything else, whatever the file says.
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    # By its name, FFmpeg would take a PNG with a "%" in it for a series of files.
    format_ = "png_pipe" if is_png(path) else None
    # "file:" keeps a name such as "a:b.mp4" from being taken for a protocol.
    return av.open(f"file:{path}", format=format_, options=options, **ANY_TAGS)


def head_of(path: Path) -> bytes:
    """The first 512 bytes of a file, by which its kind is known."""
    with path.open("rb") as file:
        return file.read(512)


def is_png(path: Path) -> bool:
    """Whether a file is a PNG picture that does not move."""
    head = head_of(path)
    return head.startswith(b"\x89PNG\r\n\x1a\n") and b"acTL" not in head


def _why_unreadable(path: Path, error: av.FFmpegError) -> str:
    """The one line for a file that FFmpeg fails to open or to decode."""
    if instead := what_it_is(path):
        return f"{path}: {instead}"
    head = head_of(path)
    reason = error.strerror
    if isinstance(error, av.ArgumentError):  # it is not in the list of containers
        reason = "its format is not read"
    if b"\0" not in head and not any(byte > 127 for byte in head):
        reason = "it is a text; playlists and scripts are not followed"
    return f"{path}: not a video file, or cut short or damaged ({reason})"


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors into one line that names the file."""
    try:
        yield
    except av.FFmpegError as error:
        raise ValueError(_why_unreadable(path, error)) from error


def video_stream(container: InputContainer, path: Path) -> Stream:
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


def demux(container: InputContainer) -> Iterator[Packet]:
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


def is_shown(packet: Packet) -> bool:
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


def scan(path: Path) -> Contents:
    """Read the file once. Raises ValueError if its end is missing."""
    contents = Contents()
    end = Fraction(0)  # seconds, of the last picture or sound
    with open_container(path) as container:
        video = video_stream(container, path)
        kind = container.format
        declared_end = DECLARED_ENDS.get(kind.name.split(",")[0])
        partial = declared_end is not None and declared_end(path) > path.stat().st_size
        for packet in demux(container):
            if packet.is_corrupt and not kind.flags & BROADCAST:
                partial = True
            if not is_shown(packet):
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


# --- Filters --------------------------------------------------------------------------------------


def filter_graph(frame: VideoFrame, *filters: tuple[str, str]) -> Graph:
    """A row of filters, given by name and options, for frames like `frame`."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25)
    )
    nodes = [graph.add(name, options) for name, options in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    return graph


def pull(graph: Graph) -> Iterator[VideoFrame | AudioFrame]:
    """Yield what has come out of a filter so far."""
    with contextlib.suppress(BlockingIOError, EOFError):  # it wants more input; it is empty
        while True:
            yield graph.pull()
