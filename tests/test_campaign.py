"""Mutated clips, as a downloader, a phone or an attacker makes them: an edit, or one clear line."""

import contextlib
import io
import multiprocessing
import random
import resource
import signal
from fractions import Fraction

import pytest
from helpers import make_clip, tiny_model
from PIL import Image
from test_video import encode

import rvedit
import sample

MUTANTS = 300
SECONDS = 20  # for one clip
BYTES = 2_000_000_000  # resident, of the process that edits all of them


def originals(folder):
    """Small clips in the containers and codecs that people have."""
    images = make_clip(12, 48, 64).numpy()
    sound = dict(audio="aac", container={"movflags": "faststart"})
    yield encode(folder / "a.mp4", images, **sound)
    yield encode(folder / "b.mp4", images, container={"movflags": "frag_keyframe+empty_moov"})
    yield encode(folder / "c.mkv", images, audio="aac")
    yield encode(folder / "d.webm", images, codec="libvpx-vp9", audio="libopus")
    yield encode(folder / "e.ts", images, audio="mp2")
    yield encode(folder / "f.avi", images, codec="mpeg4", audio="mp3", audio_rate=44100)
    yield encode(folder / "g.mov", images, codec="mjpeg", pix_fmt="yuvj420p", audio="pcm_s16le")
    yield encode(folder / "h.gif", images, codec="gif", pix_fmt="rgb8", rate=Fraction(10))
    yield encode(folder / "i.flv", images, codec="flv1", audio="aac")
    for name in ("j.png", "k.jpg", "l.webp"):
        Image.fromarray(images[0]).save(folder / name)
        yield folder / name


def mutate(data, rng):
    """Flip, cut, double, blank or exchange bytes: one kind of damage, in one to eight places."""
    data = bytearray(data)
    kind = rng.choice(["flip", "cut", "double", "blank", "number", "truncate", "append"])
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data))
        length = rng.choice([1, 4, 64, 1000])
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "blank":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == "number":
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
        elif kind == "append":
            data += rng.randbytes(length)
        else:
            data = data[: max(1, at)]
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


def edit(clip, checkpoint, out):
    """Exit code and what the command printed on stderr."""
    command = ["--video", clip, "--out", out, "--prompt", "x", "--checkpoint", checkpoint]
    with (
        contextlib.redirect_stderr(io.StringIO()) as err,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            sample.main([*map(str, command), "--steps", "1", "--device", "cpu"])
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, err.getvalue()


def edit_all(clips, checkpoint, out, results):
    """In a process of its own, so that a crash is seen: one result for each clip, in order."""
    for clip in clips:
        signal.alarm(SECONDS)  # kills this process
        results.send((clip.name, *edit(clip, checkpoint, out), out.exists()))
        signal.alarm(0)
        out.unlink(missing_ok=True)
    results.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@pytest.mark.slow
def test_three_hundred_mutated_clips_are_edited_or_refused_in_one_line(tmp_path):
    checkpoint = tmp_path / "tiny"
    rvedit.save(checkpoint, *tiny_model())
    rng = random.Random(31)
    sources = list(originals(tmp_path))
    clips = []
    for number in range(MUTANTS):
        source = rng.choice(sources)
        clip = tmp_path / f"{number:03}{source.suffix}"
        clip.write_bytes(mutate(source.read_bytes(), rng))
        clips.append(clip)

    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    arguments = (clips, checkpoint, tmp_path / "out.mp4", sender)
    process = context.Process(target=edit_all, args=arguments)
    process.start()
    sender.close()
    codes = []
    for clip in clips:
        try:
            name, code, err, written = receiver.recv()
        except EOFError:
            process.join()
            pytest.fail(f"{clip.name} ended the process with {process.exitcode}")
        assert code in (0, 2), (name, code, err)
        assert written == (code == 0), (name, err)
        if code == 2:
            assert err.startswith("error: ") and err.count("\n") == 1 and name in err, (name, err)
        codes.append(code)
    assert receiver.recv() < BYTES
    process.join()
    assert 50 < codes.count(0) < 280  # the damage is neither harmless nor hopeless
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
