"""A campaign: the toy checkpoint with 300 random damages. Each edits a clip, or is one line."""

import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from helpers import make_clip

import rvedit
import sample
from video import write_video

WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
CPU_SECONDS = 20
PEAK_BYTES = 2 * 10**9

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]


# --- Damages --------------------------------------------------------------------------------------


def flip_bytes(content, rng, start=0, stop=None):
    """One to eight bytes at random places become other bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(start, stop or len(content))] = rng.randrange(256)
    return bytes(content)


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def repeat_a_part(content, rng):
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.randint(1, 4096))
    return content[:stop] + content[start:]


def flip_header(content, rng):
    """In the length or in the JSON that a safetensors file begins with."""
    return flip_bytes(content, rng, stop=8 + int.from_bytes(content[:8], "little"))


def places(tree, path=()):
    """Every key and index of a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def another_value(value, rng):
    """Of another type, of an absurd size, or near the true one."""
    values = [None, "7", "", [], [1], {}, True, -1, 0, 1.5, 10**9, 10**30, float("nan"), 1e300]
    if type(value) in (int, float):
        values += [value + 1, value - 1, 2 * value, -value, float(value), value / 2]
    return rng.choice(values)


def change_json(content, rng):
    """One value is another one, or is gone, or has a new neighbour."""
    tree = json.loads(content)
    *parents, key = rng.choice(list(places(tree)))
    inner = tree
    for parent in parents:
        inner = inner[parent]
    kind = rng.choice(["value", "value", "value", "gone", "neighbour"])
    if kind == "gone":
        del inner[key]
    elif kind == "neighbour" and isinstance(inner, dict):
        inner[f"{key}_"] = inner[key]
    else:
        inner[key] = another_value(inner[key], rng)
    return json.dumps(tree).encode()


DAMAGES = [
    ("config.json", change_json),
    ("config.json", change_json),
    ("config.json", flip_bytes),
    ("config.json", cut),
    ("tokenizer.json", change_json),
    ("tokenizer.json", flip_bytes),
    ("tokenizer.json", cut),
    (INDEX, change_json),
    (INDEX, flip_bytes),
    (INDEX, cut),
    (WEIGHTS, flip_header),
    (WEIGHTS, flip_header),
    (WEIGHTS, flip_bytes),
    (WEIGHTS, cut),
    (WEIGHTS, repeat_a_part),
]


# --- The campaign ---------------------------------------------------------------------------------


def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def too_long(*_):
    pytest.fail(f"took more than {CPU_SECONDS} s of CPU")


@pytest.fixture
def time_limit():
    former = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, former)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, make_clip(5, 32, 32))
    return path


@pytest.mark.parametrize("seed", range(300))
def test_a_damaged_checkpoint_edits_or_is_one_line(seed, clip, tmp_path, capsys, time_limit):
    """Exit code 2 with the checkpoint's folder in the line, and nothing written."""
    rng = random.Random(seed)
    name, damage = DAMAGES[seed % len(DAMAGES)]
    folder = tmp_path / "toy"
    shutil.copytree(rvedit.TOY, folder, copy_function=os.link)
    content = (folder / name).read_bytes()
    (folder / name).unlink()  # a hard link: the original must not change
    (folder / name).write_bytes(damage(content, rng))

    before = peak_bytes()
    out = tmp_path / "out.mp4"
    command = ["--video", clip, "--prompt", "remove the red circle", "--out", out, "--steps", 1]
    command += ["--checkpoint", folder, "--device", "cpu"]
    try:
        sample.main([str(word) for word in command])
    except SystemExit as end:
        err = capsys.readouterr().err
        assert end.code == 2
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert str(folder) in err, err
        assert not out.exists()
    else:
        assert out.exists()
    assert peak_bytes() < before + PEAK_BYTES
