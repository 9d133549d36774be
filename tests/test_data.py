"""The public sets become one file of triplets, evenly over their categories; files are read or refused loudly."""

from __future__ import annotations

import base64
import gc
import io
import json
import multiprocessing
import os
import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import make_clip
from torch.utils.data import DataLoader

import video
from data import TripletDataset, fit_clip
from experiments import chat, datasets

# --- Triplets in files ----------------------------------------------------------------------------


def write_clip(path: Path, frames: int, level: int, rate: int = 8) -> None:
    """A lossless clip of one colour whose brightness grows by 2 a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
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
    "rows.jsonl": json.dumps(
        dict(src_video="videos/a.mkv", tgt_video="videos/b.mkv", prompt="go", caption=None)
    )
    + "\n\n",
}


@pytest.mark.parametrize("name", FILES)
def test_triplets_are_read_by_header(clips: Path, name: str):
    """Any column order, either delimiter, a byte-order mark, quotes and JSON lines give the same frames and words."""
    (clips / name).write_text(FILES[name], encoding="utf-8", newline="")
    dataset = TripletDataset(clips / name)
    assert len(dataset) == 1
    item = dataset[0]
    assert item["source"].dtype == torch.uint8 and item["source"].shape == item["target"].shape == (
        5,
        16,
        32,
        3,
    )
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
    ("content", "prompt"),
    [
        ("src_video,tgt_video,prompt\na.mp4,b.mp4,go, then stop,now\n", "go, then stop,now"),
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
        ('src_video,tgt_video,prompt\na.mp4,b.mp4,"go", she says\n', '"go", she says'),
    ],
)
def test_a_prompt_whose_commas_lack_quotes_is_put_together(
    tmp_path: Path, capsys, content: str, prompt: str
):
    """Wherever the prompt stands, with a note of how many there were; rows around it stay as they are."""
    (tmp_path / "t.csv").write_text(content + content.splitlines()[1].replace("go", "Go") + "\n")
    dataset = TripletDataset(tmp_path / "t.csv", root="/clips")
    assert [dataset.row(i)["prompt"] for i in range(2)] == [prompt, prompt.replace("go", "Go")]
    assert {(dataset.row(i)["src_video"], dataset.row(i)["tgt_video"]) for i in range(2)} == {
        ("/clips/a.mp4", "/clips/b.mp4")
    }
    assert f"{tmp_path}/t.csv: 2 prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no rows"),
        ("a.csv", b"src_video,tgt_video,prompt\n", "no rows"),
        ("a.jsonl", b"\n", "no rows"),
        ("a.txt", b"src_video,tgt_video,prompt\na,b,c\n", r"\.csv or \.jsonl"),
        (
            "a.csv",
            b"src_video,video,prompt\na,b,c\n",
            "line 2: no tgt_video in columns src_video, video, prompt",
        ),
        ("a.csv", b"src_video,tgt_video,prompt\na,b,c\na,,c\n", "line 3: no tgt_video"),
        (
            "a.csv",
            b"src_video,tgt_video,prompt\na,b,c\na,x.mp4,b.mp4,go\n",
            "line 3.*double quotes",
        ),  # a path's comma
        (
            "a.csv",
            b"src_video,tgt_video,prompt,caption\na.mp4,b.mp4,c,d\na.mp4,b.mp4,c,d,e\n",
            "line 3.*double quotes",
        ),
        (
            "a.csv",
            b'src_video,tgt_video,prompt\na.mp4,"b.mp4",go, then stop\n',
            "line 2.*double quotes",
        ),
        (
            "a.csv",
            b'src_video,tgt_video,prompt\na.mp4,b.mp4,"go\nleft", x, y\n',
            "line 3.*double quotes",
        ),
        (
            "a.csv",
            b'src_video,tgt_video,prompt\na.mp4,b.mp4,"go\nleft", x, y, z, w, v\n',
            "line 3.*double quotes",
        ),
        (
            "a.csv",
            b'src_video,tgt_video,prompt\na.mp4,b.mp4,"go" and stop\n',
            "line 1 or the next: ',' expected",
        ),
        ("a.csv", b"src_video,tgt_video,prompt\na,b\n", "line 2.*double quotes"),
        (
            "a.csv",
            b'src_video,tgt_video,prompt\na,b,"c\na,b,c\n',
            "line 1 or the next: unexpected end",
        ),
        ("a.csv", b"src_video,tgt_video,prompt\na,b,\xff\n", "line 1 or the next: 'utf-8'"),
        (
            "a.jsonl",
            b'{"src_video": "a", "tgt_video": "b", "prompt": "c"}\n{"src_video": \n',
            "line 1 or the next: Expecting value",
        ),
        ("a.jsonl", b'["a", "b", "c"]\n', "line 1: no src_video"),
        ("a.jsonl", b'{"src_video": "a", "tgt_video": "b", "prompt": 3}\n', "line 1: no prompt"),
        ("a.jsonl", b"17\n", "line 1: no src_video"),
    ],
)
def test_bad_tables_are_refused_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, message: str
):
    """Every defect stops with one line that names file, row and what is wrong; nothing is cut short silently."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        TripletDataset(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


# --- The public sets as they lie on disk ----------------------------------------------------------


def touch(root: Path, *paths: str) -> None:
    """Empty files: the sample only looks whether a clip is there."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def draw(out: Path, *options: object) -> list[tuple[str, ...]]:
    """The rows that `data.py sample` writes, as (source, target, prompt, category, dataset)."""
    datasets.main(["sample", "--out", str(out), *map(str, options)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(
        list(row) == ["src_video", "tgt_video", "prompt", "category", "dataset"] for row in rows
    )
    return [tuple(row.values()) for row in rows]


@pytest.mark.parametrize(
    ("header", "bom", "tables", "prefix", "clips", "options"),
    [
        ("original_video;video;prompt", "", "", "", "", ["."]),
        ("video,prompt,original_video", "\ufeff", "csv_files", "", "videos", ["."]),
        ("prompt;video;original_video;score", "\ufeff", "csv_files", "", "videos_folders", ["."]),
        ("original_video,video,prompt", "", "", "OpenVE-3M/", "videos", ["."]),
        ("original_video;video;prompt", "", "", "set/", "", ["."]),  # the folder's own name
        (
            "original_video;video;prompt",
            "",
            "",
            "",
            "{}",
            ["."],
        ),  # archives unpacked in folders of their names
        ("original_video;video;prompt", "", "tables", "", "clips", ["tables", "clips"]),
    ],
)
def test_openve_is_read_in_every_layout(
    tmp_path: Path, header: str, bom: str, tables: str, prefix: str, clips: str, options: list[str]
):
    """Either delimiter, a byte-order mark, tables beside or above the clips, both path prefixes, a doubled folder."""
    root = tmp_path / "set"
    for table, category in (("local_change", "local_change"), ("local_add_filtered", "local_add")):
        row = dict(
            original_video=f"{prefix}{category}/s.mp4", video=f"{prefix}{category}/t.mp4", score="7"
        )
        row["prompt"] = 'Do this, "then" that; stop' if "," in header else "Do this, then that"
        delimiter = ";" if ";" in header else ","
        fields = [
            '"' + row[name].replace('"', '""') + '"' if name == "prompt" else row[name]
            for name in header.split(delimiter)
        ]
        (root / tables).mkdir(parents=True, exist_ok=True)
        (root / tables / f"{table}.csv").write_text(
            f"{bom}{header}\n{delimiter.join(fields)}\n", encoding="utf-8"
        )
        touch(root / clips.format(category), f"{category}/s.mp4", f"{category}/t.mp4")
    (root / tables / "background_change.csv").write_text("not of our categories\n")
    found = draw(tmp_path / "out.jsonl", "--openve", *(root / option for option in options))
    expected = []
    for folder, category in (("local_change", "Local Change"), ("local_add", "Local Add")):
        sides = (str(root / clips.format(folder) / folder / name) for name in ("s.mp4", "t.mp4"))
        expected.append((*sides, row["prompt"], category, "OpenVE-3M"))
    assert found == expected


def test_reco_is_read_with_its_gaps(tmp_path: Path, capsys):
    """Four tasks; entries without a path are left out and counted; one source may have several targets."""
    root, expected = tmp_path / "reco", []
    kinds = dict(
        replace="Local Change", remove="Local Remove", add="Local Add", style="Global Style"
    )
    for task, category in kinds.items():
        names = ["x-a_Van_Gogh_style.mp4", "x-a_mosaic.mp4"] if task == "style" else ["x.mp4"]
        entries = [dict(src_video=f"{task}/src_videos/x.mp4", tar_video=f"{task}/tar_videos/{name}", instruction="no",
                        instruction_final_refine=f"\n {task} {name} ") for name in names]  # fmt: skip
        gaps = [entries[0] | dict(tar_video=None), {"src_video": "y.mp4"}] if task == "add" else []
        touch(root, *(entry[key] for entry in entries for key in ("src_video", "tar_video")))
        (root / task / f"{task}_data_configs.json").write_text(json.dumps(gaps + entries))
        expected += [(f"{root}/{e['src_video']}", f"{root}/{e['tar_video']}", e["instruction_final_refine"].strip(),
                      category, "ReCo-Data") for e in entries]  # fmt: skip
    found = draw(tmp_path / "out.jsonl", "--reco", root)
    assert sorted(found) == sorted(expected) and len(found) == 5
    output = capsys.readouterr()
    assert (
        "note: 2 entries are left out, the first is" in output.err
        and "add_data_configs.json, line 1" in output.err
    )
    rows = [line.split() for line in output.out.splitlines()]
    assert rows[-2:] == [
        ["all", "40000", "5", "0", "5"],
        [f"{tmp_path}/out.jsonl:", "5", "triplets"],
    ]
    # Shards unpacked in the folder that they contain.
    for task in kinds:
        (root / task / "tar_videos").rename(root / task / "moved")
        (root / task / "tar_videos").mkdir()
        (root / task / "moved").rename(root / task / "tar_videos/tar_videos")
    assert [
        row[1].replace("tar_videos/tar_videos", "tar_videos")
        for row in draw(tmp_path / "out.jsonl", "--reco", root)
    ] == [row[1] for row in found]


DITTO = {  # edited path, instruction -> category
    ("local/0281/a_1.mp4", "Remove the dog."): "Local Remove",
    ("local/0281/b_1.mp4", "please get rid of the dog"): "Local Remove",
    ("local/0281/c_1.mp4", "Add a red hat to the dog."): "Local Add",
    ("local/0282/d_1.mp4", '"Place a cup on the table"'): "Local Add",
    ("local/0282/e_1.mp4", "Replace the dog with a cat."): "Local Change",
    ("local/0282/f_1.mp4", "Address the crowd in red"): "Local Change",  # not the verb "add"
    ("local/0282/g_1.mp4", "Make the dog blue, then remove its collar."): "Local Change",
    ("global_style1/0000/h_2.mp4", "Make it a painting."): "Global Style",
    ("global_style2/0000/i_2.mp4", "Remove all colours."): "Global Style",
    ("global_freeform3/0001/j_3.mp4", "Add fog everywhere."): None,
    ("source/0001/k.mp4", "Make it real."): None,  # sim2real
}


@pytest.mark.parametrize("layout", ["plain", "doubled", "prefix", "csv"])
def test_ditto_takes_the_category_from_the_target(tmp_path: Path, layout: str):
    """Whatever the lists are called; a row that two of them have counts once; doubled folders; CSVs without lists."""
    root, rows, expected = tmp_path / "Ditto-1M", [], []
    for (path, instruction), category in DITTO.items():
        source = f"source/{path.split('/')[1]}/{path[-7]}.mp4"
        sides = [f"{p.split('/')[0]}/{p}" if layout == "doubled" else p for p in (source, path)]
        touch(root / "videos", *sides)
        stored = [f"{'Ditto-1M/videos/' if layout == 'prefix' else ''}{p}" for p in (source, path)]
        rows.append((*stored, instruction))
        expected += (
            [(*(f"{root}/videos/{side}" for side in sides), instruction, category, "Ditto-1M")]
            if category
            else []
        )
    if layout == "csv":
        (root / "csvs_for_DiffSynth").mkdir()
        lines = [
            "video,vace_video,prompt",
            *(f'{t},{s},"{p.replace(chr(34), chr(34) * 2)}"' for s, t, p in rows),
        ]
        (root / "csvs_for_DiffSynth/anything.csv").write_text("\n".join(lines))
    else:
        (root / "training_metadata").mkdir()
        keys = ("source_path", "edited_path", "instruction")
        entries = [dict(zip(keys, row, strict=True)) for row in rows]
        (root / "training_metadata/global.json").write_text(json.dumps(entries[5:]))
        (root / "training_metadata/sim2real.json").write_text(json.dumps(entries[:8]))
    assert sorted(draw(tmp_path / "out.jsonl", "--ditto", root)) == sorted(expected)


# --- The stratified sample ------------------------------------------------------------------------


def write_openve(root: Path, table: str, rows: list[int]) -> None:
    lines = [f"{table}/s{i}.mp4;{table}/t{i}.mp4;edit {i}" for i in rows]
    root.mkdir(exist_ok=True)
    (root / f"{table}.csv").write_text("\n".join(["original_video;video;prompt", *lines]))


def test_sample_takes_as_many_of_each_and_says_so(tmp_path: Path, capsys):
    """A clip that is missing costs nothing while there are others; the table has the numbers, counted by hand."""
    root = tmp_path / "set"
    write_openve(root, "local_change", [*range(30)] * 2)  # every row twice
    write_openve(root, "local_remove", [*range(8)])
    write_openve(root, "local_add", [*range(5)])
    touch(root, *(f"local_change/{side}{i}.mp4" for i in range(30) for side in "st"))
    touch(root, *(f"local_remove/{side}{i}.mp4" for i in range(8) for side in "st"))
    for i in (1, 4, 6):
        (root / f"local_remove/t{i}.mp4").unlink()
    found = draw(tmp_path / "out.jsonl", "--openve", root, "--count", 10)
    assert (
        Counter(row[3] for row in found) == {"Local Change": 10, "Local Remove": 5}
        and len(set(found)) == 15
    )
    assert {row[2] for row in found if row[3] == "Local Remove"} == {
        f"edit {i}" for i in (0, 2, 3, 5, 7)
    }
    table = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert table == [
        ["data set", "category", "asked", "available", "not found", "taken"],
        ["OpenVE-3M", "Local Change", "10", "30", "0", "10"],
        ["OpenVE-3M", "Local Remove", "10", "8", "3", "5"],
        ["OpenVE-3M", "Local Add", "10", "5", "5", "0"],
        ["OpenVE-3M", "Global Style", "10", "0", "0", "0"],
        ["all", "40", "43", "8", "15"],
        [f"{tmp_path}/out.jsonl: 15 triplets"],
    ]


def test_sample_depends_on_the_seed_alone(tmp_path: Path):
    """Not on the order of rows and files, nor on where the set lies; a smaller sample is part of a larger one."""
    order = list(range(40))
    write_openve(tmp_path / "a", "local_change", order)
    random.Random(0).shuffle(order)
    write_openve(tmp_path / "b", "local_change", order[:15])
    (tmp_path / "b/local_change.csv").rename(tmp_path / "b/local_change_2.csv")
    write_openve(tmp_path / "b", "local_change", order[12:])
    for name in "ab":
        touch(tmp_path / name, *(f"local_change/{side}{i}.mp4" for i in range(40) for side in "st"))

    def prompts(folder: str, *options: object) -> list[str]:
        return [
            row[2] for row in draw(tmp_path / "out.jsonl", "--openve", tmp_path / folder, *options)
        ]

    first = prompts("a", "--count", 12)
    assert prompts("b", "--count", 12) == first and prompts("a", "--count", 5) == first[:5]
    assert set(prompts("a", "--count", 12, "--seed", 1)) != set(first)
    assert sorted(prompts("a")) == sorted(f"edit {i}" for i in range(40))


def test_sample_is_uniform(tmp_path: Path):
    """Over 300 seeds each of 10 rows is among the 3 taken about 90 times, and each as often the first of them."""
    write_openve(tmp_path, "local_change", [*range(10)])
    touch(tmp_path, *(f"local_change/{side}{i}.mp4" for i in range(10) for side in "st"))
    taken = [
        [
            json.loads(line)["prompt"]
            for line in datasets.stratified_sample({"OpenVE-3M": [tmp_path]}, 3, seed)
        ]
        for seed in range(300)
    ]
    for counts, expected in ((Counter(sum(taken, [])), 90), (Counter(row[0] for row in taken), 30)):
        chi_squared = sum((counts[f"edit {i}"] - expected) ** 2 / expected for i in range(10))
        assert len(counts) == 10 and chi_squared < 27.9, (
            counts
        )  # 1 in 1000, for 9 degrees of freedom


def test_sample_trains_as_it_is(tmp_path: Path):
    """From clips on disk to items; the one whose clip is corrupt is in the sample and says so when it is read."""
    (tmp_path / "local_add").mkdir()
    for i in range(3):
        write_clip(tmp_path / f"local_add/s{i}.mkv", 5, 10 * i)
        write_clip(tmp_path / f"local_add/t{i}.mkv", 5, 10 * i + 100)
    (tmp_path / "local_add/t1.mkv").write_bytes((tmp_path / "local_add/t1.mkv").read_bytes()[:700])
    rows = [
        f"local_add/s{i}.mkv,local_add/t{i}.mkv,add {i}, please" for i in range(3)
    ]  # commas lack their quotes
    (tmp_path / "local_add.csv").write_text("\n".join(["original_video,video,prompt", *rows]))
    draw(tmp_path / "out.jsonl", "--openve", tmp_path)
    dataset, good = TripletDataset(tmp_path / "out.jsonl"), []
    for i in range(3):
        if "t1.mkv" in dataset.row(i)["tgt_video"]:
            with pytest.raises(ValueError, match=r"t1\.mkv"):
                dataset[i]
        else:
            item = dataset[i]
            number = int(item["instruction"].split()[1].strip(","))
            assert (
                item["category"] == "Local Add" and item["instruction"] == f"add {number}, please"
            )
            assert (
                abs(int(item["source"][0, 0, 0, 0]) - 10 * number) <= 1 and len(item["target"]) == 5
            )
            good.append(number)
    assert sorted(good) == [0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sample", "--out", "x.jsonl"], "name a set"),
        (["sample", "--openve", "{}", "--out", "x.csv"], "x.csv: name a .jsonl file"),
        (["sample", "--openve", "{}", "--out", "nowhere/x.jsonl"], "in a folder that exists"),
        (["sample", "--reco", "{}", "--out", "{}/x.jsonl"], "0 triplets of ReCo-Data"),
        (
            ["sample", "--openve", "{}", "--out", "{}/x.jsonl"],
            "1 triplets of OpenVE-3M, none with its clips",
        ),
        (
            ["sample", "--ditto", "{}", "--out", "{}/x.jsonl"],
            "no source_path in columns edited_path, from, instruction",
        ),
        (["check", "{}/none.csv"], "none.csv"),
        (["check", "{}/local_add.csv"], "no src_video in columns original_video, video, prompt"),
        (["check", "{}/local_add.csv", "--clips", "0"], "--clips: '0' is not a whole number"),
        (["other"], "other"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    tmp_path: Path, capsys, options: list[str], message: str
):
    write_openve(tmp_path, "local_add", [1])
    (tmp_path / "training_metadata").mkdir()
    entry = {"edited_path": "local/0/a_1.mp4", "from": "source/0/a.mp4", "instruction": "add"}
    (tmp_path / "training_metadata/local.json").write_text(json.dumps([entry]))
    with pytest.raises(SystemExit) as stop:
        datasets.main([option.format(tmp_path) for option in options])
    error = capsys.readouterr().err.strip()
    assert (
        stop.value.code == 2
        and error.startswith("error: ")
        and message in error
        and "\n" not in error
    )
    assert not list(tmp_path.glob("x.*"))


# --- Clips in step --------------------------------------------------------------------------------


def pair(
    folder: Path, source: tuple[int, int], target: tuple[int, int], **options: int
) -> TripletDataset:
    """A data set of one triplet; its clips have (frames, frames a second)."""
    for name, (frames, rate) in (("a", source), ("b", target)):
        write_clip(folder / f"{name}.mkv", frames, 10, rate)
    (folder / "t.csv").write_text("src_video,tgt_video,prompt\na.mkv,b.mkv,go\n")
    return TripletDataset(folder / "t.csv", **options)


@pytest.mark.parametrize(
    ("source", "target", "limit", "length"),
    [
        ((20, 8), (20, 8), 9, 9),
        ((20, 8), (17, 8), None, 17),
        ((9, 8), (12, 8), 20, 9),
        ((6, 30), (6, 30), 5, 5),
        ((1, 8), (1, 8), 1, 1),
    ],
)
def test_both_clips_are_cut_to_the_same_first_frames(
    tmp_path: Path, monkeypatch, source, target, limit, length
):
    """And no more of them than needed are decoded."""
    decoded, decode = [], video._decode
    monkeypatch.setattr(
        video, "_decode", lambda *a: (decoded.append(frame) or frame for frame in decode(*a))
    )
    item = pair(tmp_path, source, target, max_frames=limit)[0]
    for side in ("source", "target"):
        assert (
            item[side][:, 0, 0, 0].int() - torch.arange(10, 10 + 2 * length, 2)
        ).abs().max() <= 1
    assert len(item["source"]) == len(item["target"]) == length
    assert len(decoded) == min(source[0], limit or 99) + min(target[0], limit or 99)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            (20, 8),
            (16, 8),
            r"b\.mkv: its 16 frames at 8 fps are not in step with the 20 frames at 8 fps of .*a\.mkv",
        ),
        ((9, 30), (9, 25), r"9 frames at 25 fps are not in step with the 9 frames at 30 fps"),
        ((40, 8), (20, 8), "20 frames at 8 fps are not in step"),  # seen though only 9 are decoded
        ((4, 8), (6, 8), r"b\.mkv: too short, it or its source has only 4 frames"),
    ],
)
def test_clips_that_are_not_in_step_or_too_short_are_errors(
    tmp_path: Path, source, target, message: str
):
    with pytest.raises(ValueError, match=message) as error:
        pair(tmp_path, source, target, max_frames=9)[0]
    assert "\n" not in str(error.value)


def test_check_reports_what_training_would_meet(clips: Path, capsys):
    """Sizes as cut, the bad ones with their reason, their share, and how many captions there are."""
    write_clip(clips / "videos/long.mkv", 20, 10)
    rows = ["a,b,,", "b,a,seen,Local Add", "a,none,,Local Add", "long,a,,", "long,long,,"]
    lines = ["videos/{}.mkv,videos/{}.mkv,{},{},go".format(*row.split(",")) for row in rows]
    (clips / "t.csv").write_text("\n".join(["src_video,tgt_video,caption,category,prompt", *lines]))
    datasets.main(["check", str(clips / "t.csv"), "--frames", "9"])
    output = capsys.readouterr().out.splitlines()
    assert output[-1] == "5 triplets, 4 of them without a caption; 5 decoded, 40.0% of them bad"
    found = sorted(" ".join(line.split()) for line in output[:-1])
    assert (
        found[0] == "1 9 frames of 32x16" and found[3] == "2 5 frames of 32x16" and len(found) == 4
    )
    assert found[1] == f"1 bad: triplet 3: {clips}/videos/none.mkv: no such file"
    assert found[2].startswith(
        f"1 bad: triplet 4: {clips}/videos/a.mkv: its 7 frames at 8 fps are not in step"
    )
    datasets.main(["check", str(clips / "t.csv"), "--clips", "2", "--workers", "1"])
    assert "; 2 decoded" in capsys.readouterr().out


# --- Memory ---------------------------------------------------------------------------------------


def own_memory(pid: int | str) -> int:
    """Bytes that a process shares with no other."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kb) for kb in re.findall(r"^Private_\w+: +(\d+)", text, re.M))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_workers_do_not_copy_the_table(tmp_path: Path):
    """A forked process that reads all of 10,000 rows comes to own a tenth of what it owns after reading dicts."""
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_pass_over_2000_rows_keeps_memory_flat(tmp_path: Path):
    """With 2 workers, from H.264 clips: what they and the main process hold, in the first and the last 200 rows."""
    for i in range(4):
        video.write_video(tmp_path / f"{i}.mp4", make_clip(9, 64, 64, i))
    rows = [f"{i % 4}.mp4,{i // 4 % 4}.mp4,edit {i} {'x' * 200}" for i in range(2000)]
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


# --- Captions -------------------------------------------------------------------------------------


class Captioner(ThreadingHTTPServer):
    """A loopback server that describes a clip by the brightness of its frames, unless `misbehave(level, times asked)`.

    That returns an HTTP status, or the answer's text, or None.
    """

    def __init__(self, misbehave=lambda level, times: None, seconds: float = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.misbehave, self.seconds, self.asked, self.requests = misbehave, seconds, Counter(), []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        from PIL import Image

        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][-1]["content"]
        images = [
            part["image_url"]["url"].split(",")[1] for part in parts if part["type"] == "image_url"
        ]
        levels = [
            round(np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))).mean())
            for image in images
        ]
        self.server.asked[levels[0]] += 1
        self.server.requests.append((self.path, body, levels))
        time.sleep(self.server.seconds)
        answer = self.server.misbehave(levels[0], self.server.asked[levels[0]])
        if isinstance(answer, int):
            return self.send_error(answer)
        text = f" From {levels[0]} to {levels[-1]}. " if answer is None else answer
        content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def write_targets(folder: Path, number: int) -> Path:
    """A JSONL file of triplets with targets of brightness 10, 20, ... in the first frame."""
    write_clip(folder / "source.mkv", 9, 10)
    for i in range(number):
        write_clip(folder / f"t{i}.mkv", 9, 10 * i + 10)
    rows = [dict(src_video="source.mkv", tgt_video=f"t{i}.mkv", prompt=f"edit {i}", caption="old", category="Local Add",
                 dataset="ReCo-Data") for i in range(number)]  # fmt: skip
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "t.jsonl"


def test_captions_of_all_targets_are_replaced(tmp_path: Path, monkeypatch):
    """Through errors of the server: the same rows in the same order, with the answers to their targets' frames."""
    monkeypatch.setattr(chat, "PAUSES", (0,) * 6)
    (tmp_path / "sub").mkdir()
    file, out = write_targets(tmp_path, 12), tmp_path / "sub/out.jsonl"
    server = Captioner(
        lambda level, times: {10: 500, 20: 429, 30: 503}.get(level) if times < 3 else None
    )
    datasets.main(
        [
            "caption",
            str(file),
            "--out",
            str(out),
            "--url",
            server.url,
            "--frames",
            "5",
            "--model",
            "some/model",
        ]
    )
    before, after = TripletDataset(file), TripletDataset(out)
    for i in range(12):
        level = 10 * i + 10
        assert after.row(i) == before.row(i) | {
            "caption": f"From {level} to {level + 8}."
        }  # the first 5 frames
    assert server.asked == {10 * i + 10: 3 if i < 3 else 1 for i in range(12)}
    path, body, levels = server.requests[-1]
    assert path == "/v1/chat/completions" and body["model"] == "some/model" and len(levels) == 5
    assert (
        np.abs(np.diff(levels) - 2).max() <= 1
        and "one paragraph" in body["messages"][-1]["content"][-1]["text"]
    )


def test_what_gets_no_caption_is_asked_for_again_and_alone(tmp_path: Path, monkeypatch, capsys):
    """An unreadable clip and an empty answer fail; nothing is written while more than 1 in 100 lacks a caption."""
    monkeypatch.setattr(chat, "PAUSES", (0,) * 6)
    file, out = write_targets(tmp_path, 5), tmp_path / "out.jsonl"
    whole = (tmp_path / "t3.mkv").read_bytes()
    (tmp_path / "t3.mkv").write_bytes(b"no video")
    server = Captioner(lambda level, times: " " if level == 20 and times == 1 else None)
    with pytest.raises(SystemExit) as stop:
        datasets.main(["caption", str(file), "--out", str(out), "--url", server.url])
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and "error: 2 of 5 clips have no caption" in error and not out.exists()
    )
    assert f"{tmp_path}/t3.mkv: " in error and "t1.mkv: the answer is empty" in error
    (tmp_path / "t3.mkv").write_bytes(whole)
    datasets.main(["caption", str(file), "--out", str(out), "--url", server.url])
    dataset = TripletDataset(out)
    assert [dataset.row(i)["caption"] for i in range(5)] == [
        f"From {10 * i + 10} to {10 * i + 26}." for i in range(5)
    ]
    assert server.asked == {10: 1, 20: 2, 30: 1, 40: 1, 50: 1}


def test_a_row_in_a_hundred_may_stay_without(tmp_path: Path, monkeypatch, capsys):
    """It is left out, with a note."""
    file, out = write_targets(tmp_path, 1), tmp_path / "out.jsonl"
    row = json.loads(file.read_text())
    rows = [row | {"prompt": f"edit {i}"} for i in range(99)] + [row | {"tgt_video": "missing.mkv"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    server = Captioner()
    datasets.main(["caption", str(file), "--out", str(out), "--url", server.url])
    assert len(TripletDataset(out)) == 99 and server.asked == {10: 1}
    assert f"note: no caption for {tmp_path}/missing.mkv" in capsys.readouterr().err


def test_after_a_kill_no_finished_clip_is_asked_for_again(tmp_path: Path):
    """SIGKILL midway, by a server that notes who was asked for; the second run asks for the rest alone."""
    file, out, server = write_targets(tmp_path, 16), tmp_path / "out.jsonl", Captioner(seconds=0.2)
    options = ["caption", str(file), "--out", str(out), "--url", server.url, "--workers", "2"]
    answers = tmp_path / "out.jsonl.answers"
    process = multiprocessing.get_context("fork").Process(target=datasets.main, args=(options,))
    process.start()
    while not answers.exists() or answers.read_bytes().count(b"\n") < 4:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    finished = {
        10 * int(number) + 10 for number in re.findall(r"t(\d+)\.mkv.*\n", answers.read_text())
    }
    assert 4 <= len(finished) < 16 and not out.exists()
    answers.write_text(
        answers.read_text() + '{"key": "cut o'
    )  # as if the kill had come within a write
    first = Counter(server.asked)
    server.seconds = 0
    datasets.main(options)
    second = server.asked - first
    assert second == {level: 1 for level in range(10, 170, 10) if level not in finished}
    dataset = TripletDataset(out)
    assert [dataset.row(i)["caption"] for i in range(16)] == [
        f"From {10 * i + 10} to {10 * i + 26}." for i in range(16)
    ]


# --- fit_clip -------------------------------------------------------------------------------------


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
    """Agrees with filtering by explicit matrices and cutting out the centre; 4k+1 frames from the first on."""
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
