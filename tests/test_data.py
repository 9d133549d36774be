"""Tables of triplets are read row by row, clips keep their shape, and no bad triplet ends a run."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_clip, randomise, tiny_model, write_clip
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

import data
import rvedit
import sample
import video
from data import TripletDataset, fit_clip
from experiments import datasets
from shapes import ShapesDataset
from vae import WanVAE

ROOT = Path(__file__).parent.parent

# --- Tables ---------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with videos/a.mkv (7 frames) and videos/b.mkv (5 frames)."""
    (tmp_path / "videos").mkdir()
    write_clip(tmp_path / "videos/a.mkv", 7, 10)
    write_clip(tmp_path / "videos/b.mkv", 5, 100)
    return tmp_path


HEADER = "src_video,tgt_video,prompt\n"
ROW = dict(src_video="videos/a.mkv", tgt_video="videos/b.mkv", prompt="go")
FILES = {
    "plain.csv": f"{HEADER}videos/a.mkv,videos/b.mkv,go\n",
    "order.csv": "prompt, category,tgt_video,caption,src_video\r\n"
    "go,Local Add,videos/b.mkv,seen,videos/a.mkv\r\n",
    "bom.csv": '\ufeff"src_video";tgt_video;prompt;extra\nvideos/a.mkv;videos/b.mkv;go;1,2,3\n\n',
    "quoted.csv": f'{HEADER}videos/a.mkv,videos/b.mkv,"go, ""then""\nstop"\n',
    "tabs.csv": "src_video\ttgt_video\tprompt\nvideos/a.mkv\tvideos/b.mkv\tgo\n",
    "sep.csv": "sep=;\nsrc_video;tgt_video;prompt\nvideos/a.mkv;videos/b.mkv;go\n",
    "blank.csv": "src_video,tgt_video,prompt,,\n,,,,\nvideos/a.mkv,videos/b.mkv,go,,\n",
    "rows.jsonl": json.dumps(ROW | {"caption": None}) + "\n\n",
    "UPPER.JSONL": json.dumps(ROW),
    "list.json": json.dumps([ROW]),
    "windows.csv": f"{HEADER}videos\\a.mkv,videos\\b.mkv,go\r\n",
}


@pytest.mark.parametrize("name", FILES)
def test_triplets_are_read_by_header(clips: Path, name: str):
    """Columns in any order, either delimiter, a byte-order mark, quotes and JSON lines are read."""
    (clips / name).write_text(FILES[name], encoding="utf-8", newline="")
    dataset = TripletDataset(clips / name)
    assert len(dataset) == 1 and not dataset.bad
    item = dataset[0]
    assert item["source"].dtype == torch.uint8
    assert item["source"].shape == item["target"].shape == (5, 16, 32, 3)
    for key, level in (("source", 10), ("target", 100)):  # cut to the shorter one, in step
        expected = torch.arange(level, level + 10, 2)
        assert (item[key][:, 0, 0, 0].int() - expected).abs().max() <= 1
    expected = ("seen", "Local Add") if name == "order.csv" else ("", "")
    assert (item["caption"], item["category"]) == expected and "mask" not in item
    assert item["instruction"] == ('go, "then"\nstop' if name == "quoted.csv" else "go")
    assert item["target_path"] == str(clips / "videos/b.mkv")


def test_paths_are_relative_to_the_root_or_absolute(clips: Path):
    """`root` takes the place of the file's folder; absolute paths stay."""
    (clips / "lists").mkdir()
    table = clips / "lists/t.csv"
    table.write_text(f"{HEADER}{clips}/videos/a.mkv,b.mkv,go\n")
    assert len(TripletDataset(table, root=clips / "videos")[0]["target"]) == 5
    with pytest.raises(OSError, match=r"b\.mkv"):
        TripletDataset(table)[0]


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (f"{HEADER}a.mp4,b.mp4,go, then stop,now\n", "go, then stop,now"),
        ("prompt,src_video,tgt_video\ngo, then stop,now,a.mp4,b.mp4\n", "go, then stop,now"),
        (
            "tgt_video, prompt, category, src_video\nb.mp4, go, then stop, now, Local Add, a.mp4\n",
            "go, then stop, now",
        ),
        ("src_video;tgt_video;prompt\na.mp4;b.mp4;go, then; stop\n", "go, then; stop"),
        (
            'prompt,src_video,tgt_video\nsay "go", 1,000 times,a.mp4,b.mp4\n',
            'say "go", 1,000 times',
        ),
        (f'{HEADER}a.mp4,b.mp4,"go", she says\n', '"go", she says'),
        (f"{HEADER}a.mp4,b.mp4,go, please,,\n", "go, please"),
        ("prompt,src_video,tgt_video,category\ngo, please,a.mp4,b.mp4,\n", "go, please"),
        ("prompt,src_video,tgt_video,,\ngo, please,a.mp4,b.mp4,,\n", "go, please"),
    ],
)
def test_a_prompt_whose_commas_lack_quotes_is_put_together(
    tmp_path: Path, capsys, content: str, prompt: str
):
    """Wherever the prompt stands, with a note of how many there were."""
    (tmp_path / "t.csv").write_text(content + content.splitlines()[1].replace("go", "Go") + "\n")
    dataset = TripletDataset(tmp_path / "t.csv", root="/clips")
    rows = [dataset.row(0), dataset.row(1)]
    assert [row["prompt"] for row in rows] == [prompt, prompt.replace("go", "Go")]
    for row in rows:
        assert (row["src_video"], row["tgt_video"]) == ("/clips/a.mp4", "/clips/b.mp4")
    assert f"{tmp_path}/t.csv: 2 prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}a.mp4,b.mp4,go,,\na.mp4,b.mp4,stop,\n",
        "src_video,tgt_video,caption,prompt\na.mp4,b.mp4,,go,,\na.mp4,b.mp4,,stop,,,\n",
        "src_video,tgt_video,prompt,caption,,\na.mp4,b.mp4,go,,,\na.mp4,b.mp4,stop,,\n",
    ],
)
def test_empty_cells_behind_the_last_column_are_left_out(tmp_path: Path, capsys, content: str):
    """Spreadsheets write them for cells that were used once."""
    (tmp_path / "t.csv").write_text(content)
    dataset = TripletDataset(tmp_path / "t.csv")
    assert [dataset.row(i)["prompt"] for i in range(len(dataset))] == ["go", "stop"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no rows"),
        ("a.csv", b"sep=;", "no rows"),
        ("a.csv", b"src_video,tgt_video,prompt,prompt\na,b,go,stop\n", "has two columns prompt"),
        ("a.csv", HEADER.encode(), "no rows"),
        ("a.jsonl", b"\n", "no rows"),
        ("a.txt", f"{HEADER}a,b,c\n".encode(), r"a table is a \.csv, \.tsv, \.jsonl or \.json"),
        (
            "a.csv",
            b"src_video,video,prompt\na,b,c\n",
            "line 2: no tgt_video in columns src_video, ",
        ),
        (
            "a.csv",
            b"\x00\xff\xfe\x80" * 50 + b"\n" + b"\x89PNG" * 9,
            "line 2: 1 fields for|line 2: no",
        ),
        ("a.csv", f"{HEADER}a,b,c\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), "it is UTF-16"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.json", b"<!DOCTYPE html>\n<html>", "it is a web page: download it again"),
        ("a.jsonl", b"17\n[1]\n", "line 1: it is not an object with named columns: 17"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
):
    """One line names the file and what is wrong with its first row."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        TripletDataset(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert str(error.value).isprintable()


def json_row(**changes: object) -> bytes:
    return json.dumps(ROW | changes).encode()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (json_row(caption=3), "its caption is not a text: "),
        (json_row(caption="   "), "its caption is blank"),
        (json_row(caption=0), "its caption is not a text: 0"),
        (json_row(caption=["seen"]), "its caption is not a text: "),
        (json_row(caption=True), "its caption is not a text: "),
        (json_row(category=7), "its category is not a text: "),
        (json_row(prompt=3), "its prompt is not a text: "),
        (json_row(prompt=0), "its prompt is not a text: "),
        (json_row(caption="x" * 10_001), "its caption has 10001 characters"),
        (json_row(prompt=" \n"), "its prompt is blank"),
        (json_row(prompt=""), "no prompt in columns src_video, tgt_video, prompt"),
        (json_row(src_video=None), "no src_video in columns"),
        (json_row(tgt_video={}), "its tgt_video is not a text: "),
        (json_row(prompt="a\ud800b"), "its prompt is not valid UTF-8"),
        (json_row(caption="\udfff"), "its caption is not valid UTF-8"),
        (json_row(src_video="\udcff.mp4"), "its src_video is not valid UTF-8"),
        (
            b'{"src_video": "a", "tgt_video": "b", "prompt": "\xff"}',
            "its prompt is not valid UTF-8",
        ),
        (b'["a", "b", "c"]', "it is not an object"),
        (b"17", "it is not an object"),
        (b"null", "it is not an object"),
        (b'{"src_video": ', "not JSON: Expecting value"),
        (b'{"caption": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"caption": ' + b"[" * 200_000 + b"}", "the JSON is nested too deeply"),
    ],
)
def test_a_bad_json_row_costs_its_triplet_and_no_other(tmp_path: Path, row: bytes, problem: str):
    """The rows around it stay what they are; it raises one printable line with file and line."""
    table = tmp_path / "t.jsonl"
    table.write_bytes(b"\n".join([json_row(prompt="1"), row, b"", json_row(prompt="3")]))
    dataset = TripletDataset(table)
    assert len(dataset) == 3 and list(dataset.bad) == [1]
    assert dataset.row(0)["prompt"] == "1" and dataset.row(2)["prompt"] == "3"
    for read in (dataset.row, dataset.__getitem__):
        with pytest.raises(ValueError, match=re.escape(f"{table}, line 2: {problem}")) as error:
            read(1)
        assert str(error.value).isprintable() and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("header", "row", "problem"),
    [
        (HEADER, "a,b,", "no prompt in columns"),
        (HEADER, "a,b", "2 fields for 3 columns$"),
        (HEADER, "./a.mp4,b/../a.mp4,go", "its tgt_video is its src_video"),
        # Whose is the empty field at the end?
        (f"{HEADER[:-1]},category\n", "a.mp4,b.mp4,go,Local Add,", "5 fields for 4 columns"),
        (f"{HEADER[:-1]},caption\n", "a.mp4,b.mp4,go, then stop,", "5 fields for 4 columns"),
        (HEADER, "a,x.mp4,b.mp4,go", '4 fields for 3 columns.*"double quotes"'),  # a path's comma
        ("src_video,tgt_video,prompt,caption\n", "a.mp4,b.mp4,c,d,e", "5 fields for 4 columns"),
        (HEADER, 'a.mp4,"b.mp4",go, then stop', "4 fields for 3 columns"),
        (HEADER, 'a.mp4,b.mp4,"go" and stop', "',' expected"),
        (HEADER, 'a.mp4,b.mp4,"go', "unexpected end of data"),
        (HEADER, "a.mp4,b.mp4,\udcff", "its prompt is not valid UTF-8"),
    ],
)
def test_a_bad_csv_row_costs_its_triplet_and_no_other(
    tmp_path: Path, header: str, row: str, problem: str
):
    """A quote that is never closed does not swallow the rows behind it."""
    good = ",".join(["a.mp4", "b.mp4", *["go"] * (header.count(",") - 1)])
    table = tmp_path / "t.csv"
    text = f"{header}{good}\n{row}\n{good}\n"
    table.write_text(text, encoding="utf-8", errors="surrogateescape")
    dataset = TripletDataset(table)
    assert len(dataset) == 3 and dataset.row(0) == dataset.row(2)
    with pytest.raises(ValueError, match=f"{table}, line 3: .*{problem}"):
        dataset.row(1)


@pytest.mark.parametrize("nothing", ["NA", "NaN", "nan", "None", "NULL", "<NA>"])
def test_what_tools_write_for_a_missing_text_is_none(tmp_path: Path, nothing: str):
    """R, pandas and databases: it is no caption to train on, and no instruction."""
    table = tmp_path / "t.csv"
    rows = f"a.mp4,b.mp4,go,{nothing}\r\na.mp4,c.mp4,{nothing},seen\r\n"
    table.write_text(f"{HEADER[:-1]},caption\r\n{rows}", newline="")
    dataset = TripletDataset(table)
    assert dataset.row(0)["caption"] == "" and dataset.captions == 0
    assert list(dataset.bad) == [1] and "no prompt in columns" in dataset.bad[1]


def test_pandas_nan_in_json_is_no_text(tmp_path: Path):
    rows = [json_row(caption=math.nan), json_row(prompt=math.nan)]
    for name, content in (("t.jsonl", b"\n".join(rows)), ("t.json", b"[%b, %b]" % (*rows,))):
        (tmp_path / name).write_bytes(content)
        dataset = TripletDataset(tmp_path / name)
        assert dataset.row(0)["caption"] == "" and "no prompt" in dataset.bad[1]


def test_a_json_file_may_hold_an_object_in_each_line(tmp_path: Path):
    """Whatever a text holds that some take for the end of a line."""
    prompts = ["go\n{", "stop\u2028\x85}", "turn"]
    lines = [json.dumps(ROW | {"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    table = tmp_path / "t.json"
    table.write_text("\r\n".join([*lines, "{}", ""]), encoding="utf-8", newline="")
    dataset = TripletDataset(table)
    assert [dataset.row(i)["prompt"] for i in range(3)] == prompts
    assert list(dataset.bad) == [3] and dataset.bad[3].startswith(f"{table}, line 4: no src_video")


@pytest.mark.parametrize("name", ["a\0.mp4", "x" * 256, "x/" * 2048])
def test_a_path_that_cannot_be_opened_is_a_broken_triplet(tmp_path: Path, name: str):
    """`Batches` replaces it, as one that is not there."""
    table = tmp_path / "t.jsonl"
    table.write_bytes(json_row(src_video=name))
    with pytest.raises((ValueError, OSError)):
        TripletDataset(table)[0]


@pytest.mark.parametrize("quoted", ('"go\nleft", x, y', '"go\nleft", x, y, z, w, v'))
def test_a_prompt_of_two_lines_is_not_put_together_wrongly(tmp_path: Path, quoted: str):
    table = tmp_path / "t.csv"
    table.write_text(f"{HEADER}a.mp4,b.mp4,{quoted}\na.mp4,b.mp4,go\n")
    dataset = TripletDataset(table)
    assert list(dataset.bad) == [0] and dataset.row(1)["prompt"] == "go"


def test_a_table_that_may_have_no_bad_row_names_the_first(tmp_path: Path):
    """`triplets` is what reads the benchmark, where a row that is lost would change the scores."""
    table = tmp_path / "t.csv"
    table.write_text("kind,clip,prompt\nadd,a.mp4,go\nadd,,stop\n")
    rows = data.triplets(table, "kind", "clip", "prompt")
    assert next(rows)["clip"] == "a.mp4"
    with pytest.raises(ValueError, match="t.csv, line 3: no clip in columns kind, clip, prompt"):
        next(rows)
    table.write_text("kind,clip,prompt\n")
    with pytest.raises(ValueError, match="t.csv: no rows"):
        list(data.triplets(table, "kind", "clip", "prompt"))


def test_captions_are_counted_and_a_table_without_any_is_refused(tmp_path: Path):
    """Over all tables of a run; bad rows count as none; synthetic clips have captions."""
    bad = json_row(caption=3)
    some = tmp_path / "some.jsonl"
    some.write_bytes(b"\n".join([json_row(caption="seen"), json_row(), bad, json_row(caption="")]))
    none = tmp_path / "none.jsonl"
    none.write_bytes(json_row())
    both = ConcatDataset([TripletDataset(some), TripletDataset(none)])
    assert data.caption_share(TripletDataset(some)) == pytest.approx(1 / 3)
    assert data.caption_share(both) == pytest.approx(1 / 4)
    assert data.caption_share(ShapesDataset(0, 10, 5, 32, 32)) == 1.0
    data.require_captions(TripletDataset(some))
    data.require_captions(ShapesDataset(0, 10, 5, 32, 32))
    with pytest.raises(ValueError, match=r"none\.jsonl: no triplet has a caption.*--caption-fall"):
        data.require_captions(both)


def test_a_fingerprint_tells_whether_tables_changed(tmp_path: Path):
    table = tmp_path / "t.csv"
    table.write_text(f"{HEADER}a,b,go\na,b,stop\n")
    former = data.fingerprint([table])
    assert former == hashlib.sha256(table.read_bytes()).hexdigest()
    table.write_text(f"{HEADER}a,b,go\na,b,stay\n")
    assert data.fingerprint([table]) != former


# --- Clips in step --------------------------------------------------------------------------------


def pair(
    folder: Path, source: tuple[int, int], target: tuple[int, int], **options: int
) -> TripletDataset:
    """A data set of one triplet; its clips have (frames, frames a second)."""
    write_clip(folder / "a.mkv", source[0], 10, source[1])
    write_clip(folder / "b.mkv", target[0], 10, target[1])
    (folder / "t.csv").write_text(f"{HEADER}a.mkv,b.mkv,go\n")
    return TripletDataset(folder / "t.csv", **options)


@pytest.mark.parametrize(
    ("source", "target", "limit", "length"),
    [
        ((20, 8), (20, 8), 9, 9),
        ((20, 8), (17, 8), None, 17),
        ((9, 8), (12, 8), 20, 9),
        ((6, 30), (6, 30), 5, 5),
        ((1, 8), (1, 8), 1, 1),
        ((9, 8), (9, 8), 1, 1),  # the first frame of a clip
        ((1, 8), (1, 8), 81, 1),  # a still
        ((1, 8), (1, 25), None, 1),
        ((9, 30), (9, 16), None, 9),  # edited frame by frame, and written at the model's rate
    ],
)
def test_both_clips_are_cut_to_the_same_first_frames(tmp_path: Path, source, target, limit, length):
    item = pair(tmp_path, source, target, max_frames=limit)[0]
    for side in ("source", "target"):
        assert len(item[side]) == length
        expected = torch.arange(10, 10 + 2 * length, 2)
        assert (item[side][:, 0, 0, 0].int() - expected).abs().max() <= 1


@pytest.mark.parametrize("name", ("edit.png", "edit.jpg", "edit.webp"))
def test_a_still_may_be_an_image_file(tmp_path: Path, name: str):
    pixels = make_clip(2, 40, 64)
    Image.fromarray(pixels[0].numpy()).save(tmp_path / "source.png")
    Image.fromarray(pixels[1].numpy()).save(tmp_path / name, quality=95)
    (tmp_path / "t.csv").write_text(f"{HEADER}source.png,{name},go\n")
    item = TripletDataset(tmp_path / "t.csv", max_frames=81)[0]
    assert torch.equal(item["source"], pixels[:1])
    assert item["target"].shape == (1, 40, 64, 3)
    assert (item["target"].float() - pixels[1:].float()).abs().mean() < 4


def test_no_more_frames_than_needed_are_decoded(tmp_path: Path, monkeypatch):
    decoded, decode = [], video._decode

    def count(*args):
        for frame in decode(*args):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video, "_decode", count)
    pair(tmp_path, (20, 8), (17, 8), max_frames=9)[0]
    assert len(decoded) == 9 + 9


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ((20, 8), (16, 8), "16 frames at 8 fps are not in step with the 20 frames at 8 fps of .*a"),
        ((12, 30), (10, 25), "10 frames at 25 fps are not in step with the 12 frames at 30 fps"),
        ((40, 8), (20, 8), "20 frames at 8 fps are not in step"),  # seen though only 9 are decoded
        ((4, 8), (6, 8), "too short, it or its source has only 4 frames"),
        ((1, 8), (4, 8), "too short, it or its source has only 1 frames"),  # a still and a clip
    ],
)
def test_clips_that_are_not_in_step_or_too_short_are_errors(
    tmp_path: Path, source, target, message: str
):
    with pytest.raises(ValueError, match=rf"b\.mkv: .*{message}") as error:
        pair(tmp_path, source, target, max_frames=9)[0]
    assert "\n" not in str(error.value)


# --- Memory ---------------------------------------------------------------------------------------


def own_memory(pid: int | str) -> int:
    """Bytes that a process shares with no other."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kb) for kb in re.findall(r"^Private_\w+: +(\d+)", text, re.M))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_workers_do_not_copy_the_table(tmp_path: Path):
    """A process that reads 10,000 rows comes to own a tenth of what it owns after reading dicts."""
    row = dict(src_video="a.mp4", tgt_video="b.mp4", category="Local Add")
    lines = [json.dumps(row | {"prompt": f"add number {i} {'x' * 300}"}) for i in range(10_000)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    dataset = TripletDataset(tmp_path / "t.jsonl")
    dicts = [dataset.row(i) for i in range(len(dataset))]
    grown = []
    for read in (dataset.row, dicts.__getitem__):
        here, there = os.pipe()
        if not (child := os.fork()):
            gc.disable()  # which would write to all that the test process holds
            before = own_memory("self")
            length = sum(len(read(i)["prompt"]) for i in range(10_000))
            os.write(there, json.dumps([own_memory("self") - before, length]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        growth, length = json.loads(os.read(here, 1000))
        assert length == sum(len(one["prompt"]) for one in dicts)
        grown.append(growth)
    assert grown[0] < grown[1] / 10, grown


def test_a_table_is_read_in_little_more_memory_than_it_keeps(tmp_path: Path):
    row = json_row(prompt="x" * 900, caption="y" * 900)
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([row] * 5000))
    tracemalloc.start()
    try:
        dataset = TripletDataset(tmp_path / "t.jsonl")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(dataset) == 5000 and dataset.row(4999) == dataset.row(0)
    assert peak < 1.5 * 5000 * len(json.dumps(dataset.row(0)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_pass_over_2000_rows_keeps_memory_flat(tmp_path: Path):
    """With 2 workers, from H.264 clips: what all processes hold, in the first and last 200 rows."""
    for i in range(4):
        video.write_video(tmp_path / f"{i}.mp4", make_clip(9, 64, 64, i))
    pairs = itertools.cycle(itertools.permutations(range(4), 2))
    rows = []
    for i in range(2000):
        source, target = next(pairs)
        rows.append(f"{source}.mp4,{target}.mp4,edit {i} {'x' * 200}")
    (tmp_path / "t.csv").write_text("\n".join(["src_video,tgt_video,prompt", *rows]))

    class Fitted(TripletDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            item = super().__getitem__(index)
            return tuple(fit_clip(item[side], 9, 48, 48) for side in ("source", "target"))

    loader = iter(
        DataLoader(Fitted(tmp_path / "t.csv", max_frames=9), batch_size=None, num_workers=2)
    )
    processes, pages = ["self", *(worker.pid for worker in loader._workers)], []
    for i, (source, target) in enumerate(loader):
        assert source.shape == target.shape == (9, 48, 48, 3)
        if i < 1900:  # later a worker may be done and gone
            pages.append(
                sum(
                    int(Path(f"/proc/{process}/statm").read_text().split()[1])
                    for process in processes
                )
            )
    first, last = (sum(part) / 200 for part in (pages[:200], pages[-200:]))
    assert i == 1999 and last < 1.05 * first, (first, last)


# --- Sizes ----------------------------------------------------------------------------------------


def bicubic(length: int, scaled: int) -> np.ndarray:
    """The matrix (scaled, length) of the antialiased bicubic filter, a = -1/2, by definition."""
    step = max(1.0, length / scaled)
    center = (np.arange(scaled)[:, None] + 0.5) * length / scaled
    x = np.abs(np.arange(length)[None] + 0.5 - center) / step
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("frames", "size", "height", "width"),
    [
        (7, (40, 60), 16, 16),
        (9, (60, 40), 16, 32),
        (5, (24, 20), 48, 40),
        (4, (33, 47), 20, 30),
        (2, (16, 16), 16, 16),
    ],
)
def test_fit_clip_scales_and_crops_the_centre(
    frames: int, size: tuple[int, int], height: int, width: int
):
    """Agrees with filtering by explicit matrices and cutting out the centre; gives 4k+1 frames."""
    clip = (
        make_clip(frames, *size) // 2 + 60
    )  # nothing so bright or dark that it is clipped between the two passes
    fitted = fit_clip(clip, 9, height, width)
    assert (
        fitted.shape == ({7: 5, 9: 9, 5: 5, 4: 1, 2: 1}[frames], height, width, 3)
        and fitted.dtype == torch.uint8
    )

    scale = max(height / size[0], width / size[1])
    H, W = max(height, round(size[0] * scale)), max(width, round(size[1] * scale))
    wide = np.einsum(
        "yh,thwc,xw->tyxc", bicubic(size[0], H), clip[: len(fitted)].numpy(), bicubic(size[1], W)
    )
    top, left = (H - height) // 2, (W - width) // 2
    naive = wide[:, top : top + height, left : left + width].clip(0, 255)
    assert np.abs(fitted.numpy() - naive).max() < 1.502  # each pass rounds to whole levels
    assert len(fit_clip(clip.repeat(3, 1, 1, 1), 9, height, width)) == min(
        9, (3 * frames - 1) // 4 * 4 + 1
    )


FULL_SIZE = (81, 704, 1280)


def edited(frames: int, height: int, width: int) -> dict:
    """A triplet whose edit is the upper fifth of the picture."""
    source = make_clip(1, height, width).repeat(frames, 1, 1, 1)
    target = source.clone()
    target[:, : height // 5] = 255 - target[:, : height // 5]
    return dict(source=source, target=target, target_path="edited.mp4")


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1280, 720, (1280, 704)),  # portrait
        (720, 1280, (704, 1280)),
        (720, 720, (704, 704)),  # square
        (480, 832, (480, 832)),  # small clips are not enlarged
        (832, 480, (832, 480)),
        (1920, 1080, (1280, 704)),  # large ones are scaled down
    ],
)
def test_a_clip_is_trained_on_at_its_aspect_with_all_of_its_edit(height, width, expected):
    """The size is the one that sampling takes, and a fifth of the picture is still edited."""
    item = edited(6, height, width)
    source, target = data.fit_pair(item, FULL_SIZE, factor=32, keep_aspect=True)
    assert source.shape == target.shape == (5, *expected, 3)
    assert expected == sample.model_size(height, width, 704 * 1280, 32)
    changed = (source != target).any(-1).float().mean()
    assert abs(changed - 1 / 5) < 0.02


def test_training_sizes_are_those_of_sampling_unless_they_enlarge_or_crop():
    """For 2,000 sizes: multiples, within the limit, never enlarged, at most a factor cut off."""
    generator = torch.Generator().manual_seed(0)
    same = 0
    for _ in range(2000):
        height, width = torch.randint(400, 1600, (2,), generator=generator).tolist()
        size = data.training_size(height, width, 704 * 1280, 32)
        scale = max(size[0] / height, size[1] / width)
        assert size[0] % 32 == size[1] % 32 == 0
        assert size[0] * size[1] <= 704 * 1280
        assert scale <= 1
        assert height * scale - size[0] < 33 and width * scale - size[1] < 33
        same += size == sample.model_size(height, width, 704 * 1280, 32)
    assert same > 1200


def test_a_target_of_another_size_is_fitted_to_its_source():
    item = edited(5, 64, 96)
    item["target"] = video.resize(item["target"], 130, 200)  # 2.6 % wider
    source, target = data.fit_pair(item, (5, 64, 96), factor=16, keep_aspect=True)
    assert source.shape == target.shape == (5, 64, 96, 3)


@pytest.mark.parametrize("keep_aspect", (True, False))
@pytest.mark.parametrize("sides", ((96, 64), (64, 64), (64, 100)))
def test_a_target_of_another_aspect_is_refused(keep_aspect, sides):
    """It would be cropped, and lie no longer where its source does."""
    item = edited(5, 64, 96)
    item["target"] = video.resize(item["target"], *sides)
    message = f"edited.mp4: it is {sides[1]}x{sides[0]}, its source 96x64, which is another aspect"
    with pytest.raises(ValueError, match=message):
        data.fit_pair(item, (5, 64, 64), factor=16, keep_aspect=keep_aspect)


def test_without_its_aspect_a_clip_is_cropped_to_the_given_size():
    source, target = data.fit_pair(edited(9, 64, 96), (5, 64, 48), factor=16, keep_aspect=False)
    assert source.shape == target.shape == (5, 64, 48, 3)


@pytest.mark.parametrize(
    ("item", "size", "keep_aspect", "message"),
    [
        (edited(5, 15, 64), (5, 64, 64), True, "is 64x15, the model needs 16 pixels a side"),
        (edited(5, 15, 64), (5, 64, 64), False, "is 64x15, the model needs 16 pixels a side"),
        (edited(5, 16, 1600), (5, 64, 64), True, "1600x16 is too small or too narrow"),
        (edited(5, 16, 3216), (5, 512, 512), True, "one side is more than 200 times the other"),
        (edited(5, 64, 64), (9, 64, 64), False, "gives 5 frames, but with --batch above 1"),
        (edited(1, 64, 64), (5, 64, 64), False, "gives 1 frames, but with --batch above 1"),
        (edited(5, 400, 64), (5, 64, 64), False, "the same as its source"),  # the edit is cut off
    ],
)
def test_a_triplet_that_teaches_nothing_is_broken(item, size, keep_aspect, message):
    with pytest.raises(ValueError, match=f"edited.mp4: .*{message}"):
        data.fit_pair(item, size, factor=16, keep_aspect=keep_aspect)


# --- Minibatches ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_model()[0]


def write_table(folder: Path, *shapes: tuple[int, int, int], **changes: object) -> Path:
    """A table with a clip of frames, height and width for each row, with captions."""
    rows = []
    for i, (frames, height, width) in enumerate(shapes):
        for side, level in (("a", 10), ("b", 100)):
            write_clip(folder / f"{side}{i}.mkv", frames, level + i, size=(height, width))
        row = dict(src_video=f"a{i}.mkv", tgt_video=f"b{i}.mkv", prompt=f"edit {i}", caption="seen")
        rows.append(json.dumps(row | changes))
    (folder / "t.jsonl").write_text("\n".join(rows))
    return folder / "t.jsonl"


def batches(model, triplets, folder: Path, **changes: object) -> data.Batches:
    options = dict(
        sizes=[(9, 64, 64)],
        batch=1,
        accumulate=1,
        seed=0,
        timestep_shift=1.0,
        broken_file=folder / "broken.txt",
    )
    return data.Batches(triplets, model.encoder, model.config, **options | changes)


def test_stills_portrait_and_landscape_clips_train_in_one_epoch(model, tmp_path: Path):
    """Each at its own size, with noise of the shape of its latents."""
    shapes = [(9, 96, 32), (1, 64, 64), (6, 32, 96), (1, 32, 128)]
    table = TripletDataset(write_table(tmp_path, *shapes), max_frames=9)
    made = [batches(model, table, tmp_path)[step, 0] for step in range(4)]
    assert sum(batch.broken for batch in made) == 0
    found = sorted(tuple(batch.source.shape[1:4]) for batch in made)
    assert found == [(1, 32, 128), (1, 64, 64), (5, 32, 96), (9, 96, 32)]
    for batch in made:
        T, H, W = batch.target.shape[1:4]
        assert batch.noise.shape == (1, 8, (T - 1) // 4 + 1, H // 16, W // 16)


def test_stills_and_clips_share_a_size_of_one_frame(model, tmp_path: Path):
    """With a minibatch above 1, T = 1 takes a still, and the first frame of a clip."""
    table = TripletDataset(write_table(tmp_path, (9, 64, 64), (1, 64, 96)), max_frames=1)
    batch = batches(model, table, tmp_path, batch=2, sizes=[(1, 64, 64)])[0, 0]
    assert batch.source.shape == (2, 1, 64, 64, 3) and batch.broken == 0
    levels = sorted(batch.source[:, 0, 0, 0, 0].tolist())
    assert [round(level, -1) for level in levels] == [10, 10]


def test_a_still_is_broken_in_a_step_of_clips(model, tmp_path: Path):
    table = TripletDataset(write_table(tmp_path, (9, 64, 64), (1, 64, 64)), max_frames=9)
    batch = batches(model, table, tmp_path, batch=2)[0, 0]
    assert batch.broken == 1
    assert (
        "b1.mkv: it gives 1 frames, but with --batch above 1"
        in (tmp_path / "broken.txt").read_text()
    )


def test_every_step_takes_one_of_the_sizes_on_all_ranks(model, tmp_path: Path):
    """Synthetic clips are painted at it, clips of a table are cropped to it."""
    sizes = [(5, 64, 64), (9, 32, 96), (5, 96, 32)]
    shapes = ShapesDataset(0, 100, 9, 64, 64)
    table = TripletDataset(write_table(tmp_path, (9, 96, 96)), max_frames=9)
    ranks = []
    for rank in (0, 1):
        options = dict(sizes=sizes, accumulate=2, rank=rank, ranks=2)
        ranks.append(batches(model, shapes, tmp_path, **options))
        ranks.append(batches(model, table, tmp_path, batch=2, **options))
    drawn = [ranks[0].size(step) for step in range(20)]
    assert set(drawn) == set(sizes)
    for one in ranks:
        assert [one.size(step) for step in range(20)] == drawn
        for step in range(3):
            source, _ = one.read(0, step)
            assert tuple(source.source.shape[:3]) == drawn[step]


def test_latents_that_were_encoded_before_are_those_of_the_clips(tmp_path: Path):
    """Bit for bit, at each triplet's own size; none is written twice; other sizes are refused."""
    model, vae = tiny_model()
    rvedit.save(tmp_path / "start", model, vae)
    file = write_table(tmp_path, (9, 96, 32), (1, 64, 64), (6, 32, 96))
    folder = tmp_path / "latents"
    options = ["encode", file, "--checkpoint", tmp_path / "start", "--size", 9, 64, 64]
    datasets.main([str(option) for option in [*options, "--out", folder]])
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(written) == 3
    datasets.main([str(option) for option in [*options, "--out", folder]])
    assert {path: path.stat().st_mtime_ns for path in written} == written

    table = TripletDataset(file, max_frames=9)
    latents = data.Latents(folder, vae)
    for step in range(3):
        plain = batches(model, table, tmp_path)[step, 0]
        ready = batches(model, table, tmp_path, latents=latents)[step, 0]
        assert torch.equal(ready.source, data.latents_of(vae, plain.source))
        assert torch.equal(ready.target, data.latents_of(vae, plain.target))
        assert torch.equal(data.latents_of(vae, ready.target), ready.target)
        assert torch.equal(ready.noise, plain.noise)
        assert torch.equal(ready.edit_inputs[1], plain.edit_inputs[1])

    with pytest.raises(ValueError, match="20 triplets, one after the other, are broken"):
        batches(model, table, tmp_path, latents=latents, sizes=[(5, 64, 64)])[0, 0]
    assert "lacks its latents at this --size" in (tmp_path / "broken.txt").read_text()
    with pytest.raises(ValueError, match="--latents works with --data and a --batch of 1"):
        batches(model, table, tmp_path, latents=latents, batch=2)
    with pytest.raises(ValueError, match="nowhere is not a folder of latents"):
        data.Latents(tmp_path / "nowhere", vae)
    with pytest.raises(ValueError, match="holds latents of another VAE"):
        data.Latents(folder, randomise(WanVAE(model.config.vae), seed=1))


def test_latents_are_found_however_the_paths_are_spelt(tmp_path: Path):
    vae = tiny_model()[1]
    latents = data.Latents(tmp_path / "latents", vae, create=True)
    table = write_table(tmp_path, (1, 64, 64))
    (tmp_path / "sub").mkdir()
    names = []
    for file in (table, tmp_path / "sub/../t.jsonl"):
        row = TripletDataset(file).row(0)
        names.append((row["src_video"], row["tgt_video"]))
    assert names[0] != names[1]
    size = (9, 64, 64)
    assert latents.file(*names[0], size) == latents.file(*names[1], size)


@pytest.mark.parametrize("size", ((8, 64, 64), (9, 60, 64), (9, 64, 72)))
def test_a_size_that_does_not_fit_the_model_is_refused(model, size):
    data.check_size(model.config, (9, 64, 64))
    with pytest.raises(ValueError, match=f"--size {size[0]} {size[1]} {size[2]}: take 4k \\+ 1"):
        data.check_size(model.config, size)


def test_an_instruction_stands_in_for_a_caption_where_one_is_read(model, tmp_path: Path):
    table = TripletDataset(write_table(tmp_path, (9, 64, 64), caption=""))
    triplet, _ = batches(model, table, tmp_path).next_good(0, step=0)
    assert triplet.caption == "edit 0"
    plain = dataclasses.replace(model.config, align_weight=0.0)
    options = dict(sizes=[(9, 64, 64)], batch=1, accumulate=1, seed=0, timestep_shift=1.0)
    batch = data.Batches(table, model.encoder, plain, broken_file=tmp_path / "b", **options)[0, 0]
    assert batch.ref_inputs is None


@pytest.mark.parametrize(
    "changes",
    [dict(caption=3), dict(prompt="x" * 5000), dict(caption="x" * 5000), dict(tgt_video="x.mkv")],
)
def test_a_bad_row_is_replaced_and_listed(model, tmp_path: Path, changes: dict):
    """In training and in validation: the next triplet that is not broken takes its place."""
    file = write_table(tmp_path, (9, 64, 64), (9, 64, 64))
    good, bad = file.read_text().splitlines()
    file.write_text("\n".join([good, json.dumps(json.loads(bad) | changes)]))
    made = batches(model, TripletDataset(file), tmp_path)
    assert sum(made[step, 0].broken for step in range(2)) == 1
    triplet, broken = made.next_good(1, step=0)
    assert triplet.instruction == "edit 0" and broken == 1
    lines = (tmp_path / "broken.txt").read_text().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("triplet 2: ") and len(line) < 700 for line in lines)


def test_data_without_a_good_triplet_ends_in_one_line(model, tmp_path: Path):
    file = write_table(tmp_path, (9, 64, 64))
    (tmp_path / "b0.mkv").write_bytes(b"no video")
    with pytest.raises(ValueError, match="20 triplets, one after the other, are broken: see .*txt"):
        batches(model, TripletDataset(file), tmp_path)[0, 0]


@pytest.mark.parametrize("shape", ((9, 32, 32), (1, 128, 128)))
def test_the_room_for_text_is_what_the_encoder_takes(model, shape):
    """Beside the largest clip and still, a text as long as allowed fits, a longer one does not."""
    frames, height, width = shape
    config, encoder = model.config, model.encoder
    room = data.max_text_tokens(config, encoder.tokenizer, height * width)
    clip = make_clip(frames, height, width)
    encoder.prepare([clip], ["x" * room])
    with pytest.raises(ValueError, match="tokens"):
        encoder.prepare([clip], ["x" * (room + 16)])


def test_a_size_that_leaves_no_room_for_text_is_refused_at_once(model, tmp_path: Path):
    triplets = TripletDataset(write_table(tmp_path, (9, 64, 64)))
    with pytest.raises(ValueError, match="^--size: .* no room for text .* take a smaller --size$"):
        batches(model, triplets, tmp_path, sizes=[(9, 1600, 1600)])


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mixed_table_trains_alike_on_one_and_two_ranks(tmp_path: Path):
    """50 steps on stills, portrait and landscape clips, with a bad row: losses agree to 1e-5."""
    shapes = [(9, 96, 64), (1, 64, 64), (9, 64, 96), (1, 96, 64), (13, 64, 64), (9, 180, 320)]
    table = write_table(tmp_path, *shapes)
    table.write_text(table.read_text() + "\n" + json.dumps({"prompt": "no clips"}))
    rvedit.save(tmp_path / "start", *tiny_model())
    losses = []
    for ranks in (1, 2):
        out = tmp_path / f"run{ranks}"
        options = ["--checkpoint", tmp_path / "start", "--data", table, "--out", out]
        options += ["--size", 9, 64, 64, "--batch", 1, "--accumulate", 2 // ranks, "--steps", 50]
        options += ["--max-bad", 1, "--workers", 1, "--validate-every", 50]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks]
        command += [ROOT / "train.py", *options]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        log = (out / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert len(losses[0]) == 50
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
