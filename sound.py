"""The sound of a clip, which its edit keeps: every track, copied packet by packet or as AAC.

A track is copied if players expect its codec in the written file, and encoded again as AAC if they
do not or if it cannot be copied. One that cannot be saved either way is left out, with a note on
stderr: sound never costs the picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
from av import AudioFrame, Packet
from av.codec.context import CodecContext
from av.container import InputContainer, OutputContainer
from av.filter import Graph
from av.stream import Disposition, Stream

import cli
from containers import LONGEST_GAP, demux, open_container, pull

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


@dataclass
class SoundTrack:
    """One audio track, ready to be copied.

    It is a whole file in memory. What was written once can be written again, so that nothing
    about the sound can fail when an edit is written.
    """

    file: bytes  # an .mp4 or .mov file that holds this track alone
    language: str | None  # ISO 639-2
    disposition: Disposition  # whether players choose this track by default, and the like


class Picture(NamedTuple):
    """What the sound goes with."""

    path: Path  # the file of both
    start: Fraction  # seconds on the file's clock that are time 0 of the edit
    end: Fraction  # seconds on the file's clock, when the last frame is no longer shown
    goes_on: bool  # whether the file has more frames: then the sound ends here, too


def prepare_tracks(picture: Picture, ending: str) -> list[SoundTrack]:
    """All audio tracks of a file, made ready for a file with this ending, ".mp4" or ".mov".

    Nothing about the sound raises an error: what is lost of it is said on stderr.
    """
    with open_container(picture.path) as source:
        tracks = [_prepare_track(picture, stream, ending) for stream in source.streams.audio]
    return [track for track in tracks if track]


def _prepare_track(picture: Picture, stream: Stream, ending: str) -> SoundTrack | None:
    """Copy a track, or encode it, or give it up; what is lost is said on stderr."""

    def note(text: str) -> None:
        cli.say(f"note: {picture.path}: sound (stream {stream.index}) {text}")

    if stream.codec_context is None:
        note("was left out: FFmpeg does not know its codec")
        return None
    ways = [_encode_track]
    if stream.codec.canonical_name in COPIED_AUDIO[ending]:
        ways = [_copy_track, _encode_track]
    for way in ways:
        try:
            track, dropped = _write_track(way, picture, stream, ending)
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


def _write_track(
    way: Callable[[Picture, int, OutputContainer], int],
    picture: Picture,
    stream: Stream,
    ending: str,
) -> tuple[SoundTrack, int]:
    """Write one track to memory, in the way of `_copy_track` or `_encode_track`.

    Returns it, and the number of damaged packets that were left out.
    """
    buffer = io.BytesIO()
    # So fine a timescale holds the start of the track to the sample.
    options = {"movie_timescale": str(stream.codec_context.sample_rate or 48_000)}
    with av.open(buffer, "w", format=ending[1:], container_options=options) as out:
        dropped = way(picture, stream.index, out)
    with av.open(io.BytesIO(buffer.getvalue())) as written:
        if not any(packet.size for packet in written.demux(audio=0)):
            raise ValueError("nothing of it could be written")
    language = stream.language
    if ending == ".mov":
        language = QUICKTIME_LANGUAGES.get(language, language)
    return SoundTrack(buffer.getvalue(), language, stream.disposition), dropped


def add_track(out: OutputContainer, track: SoundTrack) -> Iterator[Packet]:
    """Add a prepared track to `out`. Returns its packets, which are still to be written."""
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


# --- Copying and encoding -------------------------------------------------------------------------


def _sound_packets(picture: Picture, container: InputContainer, index: int) -> Iterator[Packet]:
    """Yield the packets of one track, and at the end the empty one that flushes its decoder.

    The sound of frames that were not read is left out.
    Sound far behind both the picture and the sound before it is a fault of the clock. It would
    become hours of silence.
    """
    end = picture.end
    for packet in demux(container):
        time = (packet.dts or 0) * packet.time_base
        last = picture.end if picture.goes_on else end + LONGEST_GAP
        if packet.stream.index == index and time < last:
            end = max(end, time + (packet.duration or 0) * packet.time_base)
            yield packet


def _copy_track(picture: Picture, index: int, out: OutputContainer) -> int:
    """Copy one audio track into `out`. Returns the number of damaged packets that were left out.

    Raises ValueError or an error of FFmpeg's if the track cannot be copied.
    """
    dropped = 0
    last = form = None
    with open_container(picture.path) as source:
        stream = source.streams[index]
        _name_channels(stream.codec_context)
        track = out.add_stream_from_template(stream)
        # The unit of time in the written file, so that times which differ stay different.
        tick = Fraction(1, stream.codec_context.sample_rate)
        for packet in _sound_packets(picture, source, index):
            if packet.size == 0:
                continue
            length = round((packet.duration or 0) * packet.time_base / tick)
            time = packet.pts if packet.dts is None else packet.dts
            if time is not None:
                time = round((time * packet.time_base - picture.start) / tick)
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


def _encode_track(picture: Picture, index: int, out: OutputContainer) -> int:
    """Encode one audio track as AAC into `out`. Returns the number of damaged packets.

    Raises ValueError or an error of FFmpeg's if nothing of it can be decoded.
    """
    dropped = 0
    track = graph = graph_form = None
    expected = 0  # the time of the next frame, if it does not say
    with open_container(picture.path) as source:
        stream = source.streams[index]
        names = _name_channels(stream.codec_context)
        for packet in _sound_packets(picture, source, index):
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
                    frame.pts = round((frame.pts * frame.time_base - picture.start) * rate)
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
    for frame in pull(graph):
        out.mux(track.encode(frame))


def _add_aac(out: OutputContainer, frame: AudioFrame) -> Stream:
    """Add an AAC track for sound like `frame`."""
    rates = av.Codec("aac", "w").audio_rates
    rate = frame.sample_rate if frame.sample_rate in rates else 48_000
    layout = {1: "mono", 6: "5.1", 8: "7.1"}.get(frame.layout.nb_channels, "stereo")
    track = out.add_stream("aac", rate, layout=layout)
    track.codec_context.bit_rate = 96_000 * track.codec_context.layout.nb_channels
    return track


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


def _form(frame: AudioFrame) -> tuple[int, str, str]:
    """What a filter for sound must know of its input."""
    return frame.sample_rate, frame.format.name, frame.layout.name


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
