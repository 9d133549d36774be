"""Files of triplets are read or refused loudly, and clips are brought to a size."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import make_clip

from data import TripletDataset, fit_clip

# --- Triplets in files -----------------------------------------------------------------------------------------------


def write_clip(path: Path, frames: int, level: int) -> None:
    """A lossless clip of one colour whose brightness grows by 2 a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "bgr0"
        for t in range(frames):
            image = np.full((16, 32, 3), level + 2 * t, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with videos/a.mkv (7 frames) and videos/b.mkv (5 frames)."""
    (tmp_path / "videos").mkdir()
    write_clip(tmp_path / "videos/a.mkv", 7, 10)
    write_clip(tmp_path / "videos/b.mkv", 5, 100)
    return tmp_path


FILES = {
    "plain.csv": "src_video,tgt_video,prompt\nvideos/a.mkv,videos/b.mkv,go\n",
    "order.csv": "prompt, category,tgt_video,caption,src_video\r\ngo,Local Add,videos/b.mkv,seen,videos/a.mkv\r\n",
    "bom.csv": '\ufeff"src_video";tgt_video;prompt;extra\nvideos/a.mkv;videos/b.mkv;go;1,2,3\n\n',
    "quoted.csv": 'src_video,tgt_video,prompt\nvideos/a.mkv,videos/b.mkv,"go, ""then""\nstop"\n',
    "rows.jsonl": json.dumps(dict(src_video="videos/a.mkv", tgt_video="videos/b.mkv", prompt="go", caption=None))
    + "\n\n",
}


@pytest.mark.parametrize("name", FILES)
def test_triplets_are_read_by_header(clips: Path, name: str):
    """Any column order, either delimiter, a byte-order mark, quotes and JSON lines give the same frames and words."""
    (clips / name).write_text(FILES[name], encoding="utf-8", newline="")
    dataset = TripletDataset(clips / name)
    assert len(dataset) == 1
    item = dataset[0]
    assert item["source"].dtype == torch.uint8 and item["source"].shape == item["target"].shape == (5, 16, 32, 3)
    for key, level in (("source", 10), ("target", 100)):  # cut to the shorter one, in step
        assert (item[key][:, 0, 0, 0].int() - torch.arange(level, level + 10, 2)).abs().max() <= 1
    expected = ("seen", "Local Add") if name == "order.csv" else ("", "")
    assert (item["caption"], item["category"]) == expected and "mask" not in item
    assert item["instruction"] == ('go, "then"\nstop' if name == "quoted.csv" else "go")


def test_paths_are_relative_to_the_root_or_absolute(clips: Path):
    """`root` takes the place of the file's folder; absolute paths stay."""
    (clips / "lists").mkdir()
    table = clips / "lists/t.csv"
    table.write_text(f"src_video,tgt_video,prompt\n{clips}/videos/a.mkv,b.mkv,go\n")
    assert len(TripletDataset(table, root=clips / "videos")[0]["target"]) == 5
    with pytest.raises(OSError, match=r"b\.mkv"):
        TripletDataset(table)[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no rows"),
        ("a.csv", b"src_video,tgt_video,prompt\n", "no rows"),
        ("a.jsonl", b"\n", "no rows"),
        ("a.txt", b"src_video,tgt_video,prompt\na,b,c\n", r"\.csv or \.jsonl"),
        ("a.csv", b"src_video,video,prompt\na,b,c\n", "line 2: no tgt_video in columns src_video, video, prompt"),
        ("a.csv", b"src_video,tgt_video,prompt\na,b,c\na,,c\n", "line 3: no tgt_video"),
        ("a.csv", b"src_video,tgt_video,prompt\na,b,c\na,b,go, then stop\n", "line 3.*double quotes"),
        ("a.csv", b"src_video,tgt_video,prompt\na,b\n", "line 2.*double quotes"),
        ("a.csv", b'src_video,tgt_video,prompt\na,b,"c\na,b,c\n', "line 1 or the next: unexpected end"),
        ("a.csv", b"src_video,tgt_video,prompt\na,b,\xff\n", "line 1 or the next: 'utf-8'"),
        (
            "a.jsonl",
            b'{"src_video": "a", "tgt_video": "b", "prompt": "c"}\n{"src_video": \n',
            "line 2.*Expecting value",
        ),
        ("a.jsonl", b'["a", "b", "c"]\n', "line 1: no src_video"),
        ("a.jsonl", b'{"src_video": "a", "tgt_video": "b", "prompt": 3}\n', "line 1: no prompt"),
        ("a.jsonl", b"17\n", "line 1: no src_video"),
    ],
)
def test_bad_tables_are_refused_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str):
    """Every defect stops with one line that names file, row and what is wrong; nothing is cut short silently."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        TripletDataset(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


# --- fit_clip --------------------------------------------------------------------------------------------------------


def bicubic(length: int, scaled: int) -> np.ndarray:
    """Resampling matrix (scaled, length) of the antialiased bicubic filter with a = -1/2, by its definition."""
    step = max(1.0, length / scaled)
    center = (np.arange(scaled)[:, None] + 0.5) * length / scaled
    x = np.abs(np.arange(length)[None] + 0.5 - center) / step
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("frames", "size", "height", "width"),
    [(7, (40, 60), 16, 16), (9, (60, 40), 16, 32), (5, (24, 20), 48, 40), (4, (33, 47), 20, 30), (2, (16, 16), 16, 16)],
)
def test_fit_clip_scales_and_crops_the_centre(frames: int, size: tuple[int, int], height: int, width: int):
    """Agrees with filtering by explicit matrices and cutting out the centre; 4k+1 frames from the first on."""
    clip = make_clip(frames, *size) // 2 + 60  # nothing so bright or dark that it is clipped between the two passes
    fitted = fit_clip(clip, 9, height, width)
    assert fitted.shape == ({7: 5, 9: 9, 5: 5, 4: 1, 2: 1}[frames], height, width, 3) and fitted.dtype == torch.uint8

    scale = max(height / size[0], width / size[1])
    H, W = max(height, round(size[0] * scale)), max(width, round(size[1] * scale))
    wide = np.einsum("yh,thwc,xw->tyxc", bicubic(size[0], H), clip[: len(fitted)].numpy(), bicubic(size[1], W))
    top, left = (H - height) // 2, (W - width) // 2
    naive = wide[:, top : top + height, left : left + width].clip(0, 255)
    assert np.abs(fitted.numpy() - naive).max() < 1.502  # each pass rounds to whole levels
    assert len(fit_clip(clip.repeat(3, 1, 1, 1), 9, height, width)) == min(9, (3 * frames - 1) // 4 * 4 + 1)
