"""The public sets become one table of triplets, evenly over categories: checked and captioned."""

from __future__ import annotations

import base64
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

import numpy as np
import pytest
from helpers import write_clip

import rvedit
from data import TripletDataset
from experiments import chat, datasets

# --- The public sets as they lie on disk ----------------------------------------------------------


def touch(root: Path, *paths: str) -> None:
    """Files of one byte: the sample only looks whether a clip is there."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def touch_pairs(root: Path, folder: str, numbers: range) -> None:
    touch(root, *(f"{folder}/s{i}.mp4" for i in numbers))
    touch(root, *(f"{folder}/t{i}.mp4" for i in numbers))


def write_openve(root: Path, table: str, rows: list[int], folder: str | None = None) -> None:
    """A table of OpenVE-3M: TABLE.csv, of clips in `folder`, by default the table's name."""
    folder = folder or Path(table).name
    lines = [f"{folder}/s{i}.mp4;{folder}/t{i}.mp4;edit {i}" for i in rows]
    path = root / f"{table}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["original_video;video;prompt", *lines]))


def draw(out: Path, *options: object) -> list[tuple[str, ...]]:
    """The rows that `sample` writes, as (source, target, prompt, category, dataset)."""
    datasets.main(["sample", "--out", str(out), *map(str, options)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert list(row) == ["src_video", "tgt_video", "prompt", "category", "dataset"]
    return [tuple(row.values()) for row in rows]


@pytest.mark.parametrize(
    ("header", "bom", "tables", "prefix", "clips", "options"),
    [
        ("original_video;video;prompt", "", "", "", "", ["."]),
        ("video,prompt,original_video", "\ufeff", "csv_files", "", "videos", ["."]),
        ("prompt;video;original_video;score", "\ufeff", "csv_files", "", "videos_folders", ["."]),
        ("original_video,video,prompt", "", "", "OpenVE-3M/", "videos", ["."]),
        ("original_video;video;prompt", "", "", "set/", "", ["."]),  # the folder's own name
        # Archives that were unpacked in folders of their names.
        ("original_video;video;prompt", "", "", "", "{}", ["."]),
        ("original_video;video;prompt", "", "tables", "", "clips", ["tables", "clips"]),
    ],
)
def test_openve_is_read_in_every_layout(
    tmp_path: Path, header: str, bom: str, tables: str, prefix: str, clips: str, options: list[str]
):
    """Delimiters, byte-order marks, tables beside or above the clips, prefixes, doubled folders."""
    root = tmp_path / "set"
    delimiter = ";" if ";" in header else ","
    prompt = 'Do this, "then" that; stop' if delimiter == "," else "Do this, then that"
    quoted = '"' + prompt.replace('"', '""') + '"'
    (root / tables).mkdir(parents=True, exist_ok=True)
    expected = []
    for table, folder, category in (
        ("local_change", "local_change", "Local Change"),
        ("local_add_filtered", "local_add", "Local Add"),
    ):
        row = dict(
            original_video=f"{prefix}{folder}/s.mp4",
            video=f"{prefix}{folder}/t.mp4",
            prompt=quoted,
            score="7",
        )
        line = delimiter.join(row[name] for name in header.split(delimiter))
        text = f"{bom}{header}\n{line}\n"
        (root / tables / f"{table}.csv").write_text(text, encoding="utf-8")
        place = root / clips.format(folder)
        touch(place, f"{folder}/s.mp4", f"{folder}/t.mp4")
        sides = str(place / folder / "s.mp4"), str(place / folder / "t.mp4")
        expected.append((*sides, prompt, category, "OpenVE-3M"))
    found = draw(tmp_path / "out.jsonl", "--openve", *(root / option for option in options))
    assert found == expected


OPENVE_NAMES = {
    "Local_Add.csv": "Local Add",
    "local_change_part1.csv": "Local Change",
    "openve_local_remove.csv": "Local Remove",
    "GLOBAL-STYLE.CSV": "Global Style",
    "styleGlobal.csv": "Global Style",
    "localadd.csv": "Local Add",
    "remove (local) 2.csv": "Local Remove",
    "csv_files/local_change.csv": "Local Change",
    "local_add/metadata.csv": "Local Add",
    "all.csv": "Local Remove",  # told by the folder of the clips
    "local_add_or_local_change.csv": "Local Remove",  # likewise
}


@pytest.mark.parametrize("name", OPENVE_NAMES)
def test_tables_may_be_spelt_otherwise(tmp_path: Path, name: str):
    """The words of a category in any order and case, with others around them."""
    root = tmp_path / "set"
    write_openve(root, "table", [0], folder="local_remove")
    (root / name).parent.mkdir(exist_ok=True)
    (root / "table.csv").rename(root / name)
    touch_pairs(root, "local_remove", range(1))
    found = draw(tmp_path / "out.jsonl", "--openve", root)
    assert [row[3] for row in found] == [OPENVE_NAMES[name]]


def test_foreign_files_hide_no_table_and_are_named(tmp_path: Path, capsys):
    """Tables in the root and in a folder of it are all read; what is left out is one line each."""
    root = tmp_path / "set"
    write_openve(root, "local_add", [0, 1])
    write_openve(root, "csv_files/local_add", [0, 1, 2])  # a row that two tables have counts once
    write_openve(root, "csv_files/local_change", [0])
    write_openve(root, "background_change", [0, 1, 2])
    (root / "archives.csv").write_text("file,size\nx.tar,3\n")
    (root / "stats.json").write_text('{"total": 3}')
    (root / "deep.json").write_text("[" * 100_000)
    (root / "cut.json").write_text('[{"original_video": ')
    (root / "image.csv").write_bytes(bytes(range(256)) * 9)
    (root / ".cache").mkdir()
    (root / ".cache/local_add.json").write_text("{}")
    for folder in ("local_add", "local_change"):
        touch_pairs(root, folder, range(3))
    found = draw(tmp_path / "out.jsonl", "--openve", root)
    assert Counter(row[3] for row in found) == {"Local Add": 3, "Local Change": 1}
    lines = capsys.readouterr().err.splitlines()
    notes = [line for line in lines if line.startswith("note: ")]
    assert len(notes) == 6
    for name, reason in (
        ("archives.csv", "no columns original_video, video, prompt"),
        ("stats.json", "does not hold a list"),
        ("deep.json", "nested too deeply"),
        ("cut.json", "not JSON, or damaged"),
        ("image.csv", "no columns"),
    ):
        assert any(f"skipped {root}/{name}: " in line and reason in line for line in notes)
    other = f"{root}/background_change.csv: 3 rows are left out, they are of none of our categories"
    assert any(other in line for line in notes)


def test_reco_is_read_with_its_gaps(tmp_path: Path, capsys):
    """Four tasks; entries without a path are left out and counted; a source with two targets."""
    root = tmp_path / "reco"
    categories = dict(
        replace="Local Change", remove="Local Remove", add="Local Add", style="Global Style"
    )
    expected = []
    for task, category in categories.items():
        names = ["x-a_Van_Gogh_style.mp4", "x-a_mosaic.mp4"] if task == "style" else ["x.mp4"]
        entries = []
        for name in names:
            source, target = f"{task}/src_videos/x.mp4", f"{task}/tar_videos/{name}"
            text = f"{task} {name}"
            entries.append(
                dict(
                    src_video=source,
                    tar_video=target,
                    instruction="no",
                    instruction_final_refine=f"\n {text} ",
                )
            )
            touch(root, source, target)
            expected.append((f"{root}/{source}", f"{root}/{target}", text, category, "ReCo-Data"))
        gaps = [entries[0] | dict(tar_video=None), {"src_video": "y.mp4"}] if task == "add" else []
        (root / task / f"{task}_data_configs.json").write_text(json.dumps(gaps + entries))
    found = draw(tmp_path / "out.jsonl", "--reco", root)
    assert sorted(found) == sorted(expected) and len(found) == 5
    output = capsys.readouterr()
    assert "add_data_configs.json: 2 bad rows are left out, the first is entry 1: " in output.err
    rows = [line.split() for line in output.out.splitlines()]
    assert rows[-2] == ["all", "40000", "5", "0", "5"]
    assert rows[-1] == [f"{tmp_path}/out.jsonl:", "5", "triplets"]

    # Shards unpacked in the folder that they contain.
    for task in categories:
        (root / task / "tar_videos").rename(root / task / "moved")
        (root / task / "tar_videos").mkdir()
        (root / task / "moved").rename(root / task / "tar_videos/tar_videos")
    doubled = draw(tmp_path / "out.jsonl", "--reco", root)
    targets = [row[1].replace("tar_videos/tar_videos", "tar_videos") for row in doubled]
    assert targets == [row[1] for row in found]


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


@pytest.mark.parametrize("layout", ["lists", "doubled", "prefix", "csv", "both"])
def test_ditto_takes_the_category_from_the_target(tmp_path: Path, layout: str):
    """Whatever its tables are called; a row of two lists, or of a list and a CSV, counts once."""
    root = tmp_path / "Ditto-1M"
    rows, expected = [], []
    for (target, instruction), category in DITTO.items():
        source = f"source/{target.split('/')[1]}/{target[-7]}.mp4"
        places, stored = [], []
        for path in (source, target):
            place = f"{path.split('/')[0]}/{path}" if layout == "doubled" else path
            touch(root / "videos", place)
            places.append(f"{root}/videos/{place}")
            stored.append(f"Ditto-1M/videos/{path}" if layout == "prefix" else path)
        rows.append((*stored, instruction))
        if category:
            expected.append((*places, instruction, category, "Ditto-1M"))
    if layout in ("csv", "both"):
        (root / "csvs_for_DiffSynth").mkdir()
        lines = ["video,vace_video,prompt"]
        for source, target, prompt in rows:
            lines.append(f'{target},{source},"{prompt.replace(chr(34), chr(34) * 2)}"')
        (root / "csvs_for_DiffSynth/anything.csv").write_text("\n".join(lines))
    if layout != "csv":
        (root / "training_metadata").mkdir()
        keys = ("source_path", "edited_path", "instruction")
        entries = [dict(zip(keys, row, strict=True)) for row in rows]
        (root / "training_metadata/global.json").write_text(json.dumps(entries[5:]))
        (root / "training_metadata/sim2real.json").write_text(json.dumps(entries[:8]))
    assert sorted(draw(tmp_path / "out.jsonl", "--ditto", root)) == sorted(expected)


def test_no_folder_is_listed_twice(tmp_path: Path, monkeypatch):
    """2,000 rows, of which half lack their clips, in a few folders: as many listings as folders."""
    root = tmp_path / "set"
    write_openve(root, "local_add", [*range(2000)])
    touch_pairs(root / "videos_folders", "local_add", range(1000))
    listed, scandir = Counter(), os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: listed.update([str(place)]) or scandir(place))
    assert len(draw(tmp_path / "out.jsonl", "--openve", root)) == 1000
    places = {place: times for place, times in listed.items() if "local_add" in place}
    assert f"{root}/videos_folders/local_add" in places
    assert set(places.values()) == {1} and len(places) <= 9


@pytest.mark.parametrize(
    ("table", "content"),
    [
        ("local_add.tsv", "original_video\tvideo\tprompt\na/s0.mp4\ta/t0.mp4\tgo, on\n"),
        (
            "tables/csv/local_add.jsonl",
            '{"original_video": "a/s0.mp4", "video": "a/t0.mp4", "prompt": "go, on"}\n',
        ),
        (
            "local_add.csv",
            'original_video,video,prompt\n./OpenVE-3M/a/s0.mp4,./a/t0.mp4,"go, on"\n',
        ),
    ],
)
def test_tables_of_every_kind_are_found_two_folders_deep(tmp_path: Path, table: str, content: str):
    root = tmp_path / "set"
    (root / table).parent.mkdir(parents=True)
    (root / table).write_text(content)
    touch_pairs(root, "a", range(1))
    assert [row[2] for row in draw(tmp_path / "out.jsonl", "--openve", root)] == ["go, on"]


def test_clips_beside_their_table_are_found(tmp_path: Path):
    root = tmp_path / "set"
    root.mkdir()
    (root / "local_add.csv").write_text("original_video,video,prompt\ns0.mp4,t0.mp4,go\n")
    touch(root, "s0.mp4", "t0.mp4")
    assert len(draw(tmp_path / "out.jsonl", "--openve", root)) == 1


def test_names_without_a_clip_are_not_available(tmp_path: Path, capsys):
    """An empty file, one that git-lfs has not fetched, and a source that is its own target."""
    root = tmp_path / "set"
    rows = "\n".join(f"a/s{i}.mp4,a/t{i}.mp4,edit {i}" for i in range(3))
    own = "a/s0.mp4,./a/s0.mp4,nothing"
    table = root / "local_add.csv"
    touch_pairs(root, "a", range(3))
    table.write_text(f"original_video,video,prompt\n{rows}\n{own}\n")
    (root / "a/t1.mp4").write_bytes(b"")
    (root / "a/s2.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert [row[2] for row in draw(tmp_path / "out.jsonl", "--openve", root)] == ["edit 0"]
    printed = capsys.readouterr()
    assert "OpenVE-3M  Local Add         10000          3          2         1" in printed.out
    assert "1 bad rows are left out, the first is line 5: its video is its original_video" in (
        printed.err
    )


# --- The stratified sample ------------------------------------------------------------------------


def test_sample_takes_as_many_of_each_and_says_so(tmp_path: Path, capsys):
    """A missing clip costs nothing while there are others; the numbers are counted by hand."""
    root = tmp_path / "set"
    write_openve(root, "local_change", [*range(30)] * 2)  # every row twice
    write_openve(root, "local_remove", [*range(8)])
    write_openve(root, "local_add", [*range(5)])
    touch_pairs(root, "local_change", range(30))
    touch_pairs(root, "local_remove", range(8))
    for i in (1, 4, 6):
        (root / f"local_remove/t{i}.mp4").unlink()
    found = draw(tmp_path / "out.jsonl", "--openve", root, "--count", 10)
    assert Counter(row[3] for row in found) == {"Local Change": 10, "Local Remove": 5}
    assert len(set(found)) == 15
    removed = {row[2] for row in found if row[3] == "Local Remove"}
    assert removed == {f"edit {i}" for i in (0, 2, 3, 5, 7)}
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
    """Not on the order of rows and files, nor on the place; a small one is part of a larger one."""
    order = list(range(40))
    write_openve(tmp_path / "a", "local_change", order)
    random.Random(0).shuffle(order)
    write_openve(tmp_path / "b", "local_change_2", order[:15], folder="local_change")
    write_openve(tmp_path / "b", "local_change", order[12:])
    for name in "ab":
        touch_pairs(tmp_path / name, "local_change", range(40))

    def prompts(folder: str, *options: object) -> list[str]:
        rows = draw(tmp_path / "out.jsonl", "--openve", tmp_path / folder, *options)
        return [row[2] for row in rows]

    first = prompts("a", "--count", 12)
    assert prompts("b", "--count", 12) == first and prompts("a", "--count", 5) == first[:5]
    assert set(prompts("a", "--count", 12, "--seed", 1)) != set(first)
    assert sorted(prompts("a")) == sorted(f"edit {i}" for i in range(40))


def test_sample_is_uniform(tmp_path: Path):
    """Over 300 seeds each of 10 rows is among the 3 taken about 90 times, and first about 30."""
    write_openve(tmp_path, "local_change", [*range(10)])
    touch_pairs(tmp_path, "local_change", range(10))
    taken, first = Counter(), Counter()
    for seed in range(300):
        lines = datasets.stratified_sample({"OpenVE-3M": [tmp_path]}, 3, seed)
        prompts = [json.loads(line)["prompt"] for line in lines]
        taken.update(prompts)
        first.update(prompts[:1])
    for counts, expected in ((taken, 90), (first, 30)):
        chi_squared = sum((counts[f"edit {i}"] - expected) ** 2 / expected for i in range(10))
        # Exceeded by 1 in 1000, with 9 degrees of freedom.
        assert len(counts) == 10 and chi_squared < 27.9, counts


def test_a_pair_of_two_sets_counts_once(tmp_path: Path, capsys):
    """However its folders are reached: ReCo-Data's clips here are OpenVE-3M's, by a link."""
    openve, reco = tmp_path / "openve", tmp_path / "reco"
    write_openve(openve, "local_add", [0, 1, 2])
    touch_pairs(openve, "local_add", range(3))
    (reco / "add").mkdir(parents=True)
    (reco / "add/src_videos").symlink_to(openve / "local_add")
    entries = []
    for i in (1, 2):
        source, target = f"add/src_videos/s{i}.mp4", f"add/src_videos/t{i}.mp4"
        text = "told otherwise"
        entries.append(dict(src_video=source, tar_video=target, instruction_final_refine=text))
    (reco / "add/add_data_configs.json").write_text(json.dumps(entries))
    found = draw(tmp_path / "out.jsonl", "--openve", openve, "--reco", reco)
    assert [row[4] for row in found] == ["OpenVE-3M"] * 3
    assert "ReCo-Data  Local Add         10000          0          0         0" in (
        capsys.readouterr().out
    )


def test_clips_of_the_benchmark_are_left_out(tmp_path: Path, capsys):
    """By the stem of a name; or by instruction and size of the source, where it was renamed."""
    root, bench = tmp_path / "set", tmp_path / "OpenVE-Bench"
    write_openve(root, "local_add", [*range(6)])
    touch_pairs(root, "local_add", range(6))
    for i in range(6):
        (root / f"local_add/s{i}.mp4").write_bytes(b"x" * (100 + i))
    (bench / "videos").mkdir(parents=True)
    rows = [
        "local_add,nothing like it,OpenVE-Bench/videos/s3.mov",  # the name of a source
        "local_add,Edit  1,videos/0007_local_add_edit.mp4",  # instruction and size of row 1
        "local_add,edit 2,videos/0008_local_add_edit.mp4",  # the instruction, but another clip
        "local_add,another,videos/0009_local_add_edit.mp4",  # another instruction for row 4's clip
        "local_add,edit 5,videos/not_there.mp4",
    ]
    text = "\n".join(["edited_type,prompt,original_video", *rows])
    (bench / "benchmark_videos.csv").write_text(text, encoding="utf-8-sig")
    for name, size in (("0007", 101), ("0008", 999), ("0009", 104)):
        (bench / f"videos/{name}_local_add_edit.mp4").write_bytes(b"x" * size)
    found = draw(tmp_path / "out.jsonl", "--openve", root, "--bench", bench)
    assert sorted(row[2] for row in found) == ["edit 0", "edit 2", "edit 4", "edit 5"]
    assert "2 triplets are clips of OpenVE-Bench" in capsys.readouterr().err


def test_sample_trains_as_it_is(tmp_path: Path):
    """From clips on disk to items; a corrupt clip is in the sample, and says so when it is read."""
    (tmp_path / "local_add").mkdir()
    for i in range(3):
        write_clip(tmp_path / f"local_add/s{i}.mkv", 5, 10 * i)
        write_clip(tmp_path / f"local_add/t{i}.mkv", 5, 10 * i + 100)
    corrupt = tmp_path / "local_add/t1.mkv"
    corrupt.write_bytes(corrupt.read_bytes()[:700])
    # The commas of the prompts lack their quotes.
    rows = [f"local_add/s{i}.mkv,local_add/t{i}.mkv,add {i}, please" for i in range(3)]
    (tmp_path / "local_add.csv").write_text("\n".join(["original_video,video,prompt", *rows]))
    draw(tmp_path / "out.jsonl", "--openve", tmp_path)
    dataset = TripletDataset(tmp_path / "out.jsonl")
    good = []
    for i in range(3):
        if dataset.row(i)["tgt_video"] == str(corrupt):
            with pytest.raises(ValueError, match=r"t1\.mkv"):
                dataset[i]
            continue
        item = dataset[i]
        number = int(item["instruction"].split()[1].strip(","))
        assert item["category"] == "Local Add" and item["instruction"] == f"add {number}, please"
        assert abs(int(item["source"][0, 0, 0, 0]) - 10 * number) <= 1 and len(item["target"]) == 5
        good.append(number)
    assert sorted(good) == [0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sample", "--out", "x.jsonl"], "name a data set"),
        (["sample", "--openve", "{}", "--out", "x.csv"], "x.csv: name a .jsonl file"),
        (["sample", "--openve", "{}", "--out", "nowhere/x.jsonl"], "in a folder that exists"),
        (["sample", "--openve", "{}/no", "--out", "{}/x.jsonl"], "/no: there is no such folder"),
        (["sample", "--reco", "{}", "--out", "{}/x.jsonl"], "0 triplets of ReCo-Data"),
        (["sample", "--reco", "{}/other", "--out", "{}/x.jsonl"], "no table of ReCo-Data"),
        (
            ["sample", "--openve", "{}", "--out", "{}/x.jsonl"],
            "1 triplets of OpenVE-3M, none with its clips",
        ),
        (["sample", "--ditto", "{}", "--out", "{}/x.jsonl"], "holds local_add.csv, other/"),
        (
            ["sample", "--openve", "{}", "--bench", "{}", "--out", "{}/x.jsonl"],
            "benchmark_videos.csv",
        ),
        (["check", "{}/none.csv"], "none.csv"),
        (["check", "{}/local_add.csv"], "no src_video in columns original_video, video, prompt"),
        (["check", "{}/local_add.csv", "--clips", "0"], "--clips: '0' is not a whole number"),
        (["encode", "{}/local_add.csv", "--out", "{}/x.latents"], "name the model"),
        (["other"], "other"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    tmp_path: Path, capsys, options: list[str], message: str
):
    """Notes on what was skipped may come before it."""
    write_openve(tmp_path, "local_add", [1])
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit) as stop:
        datasets.main([option.format(tmp_path) for option in options])
    *notes, error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and error.startswith("error: ") and message in error
    assert all(line.startswith("note: ") for line in notes if "rows" not in line)
    assert not list(tmp_path.glob("x.*"))


# --- Checking -------------------------------------------------------------------------------------


def test_check_reports_what_training_would_meet(tmp_path: Path, capsys):
    """Sizes as trained on; bad rows and clips with their reason; how many captions there are."""
    write_clip(tmp_path / "a.mkv", 7, 10, size=(40, 64))
    write_clip(tmp_path / "b.mkv", 5, 100, size=(40, 64))
    write_clip(tmp_path / "long.mkv", 20, 10, size=(40, 64))
    write_clip(tmp_path / "still.mkv", 1, 10, size=(64, 40))
    write_clip(tmp_path / "other.mkv", 1, 90, size=(64, 40))
    write_clip(tmp_path / "small.mkv", 5, 90, size=(16, 40))
    pairs = ["a b", "b a", "a none", "long a", "a a", "still other", "small b", "a b"]
    rows = []
    for i, names in enumerate(pairs):
        source, target = names.split()
        rows.append(dict(src_video=f"{source}.mkv", tgt_video=f"{target}.mkv", prompt=f"edit {i}"))
    rows[1]["caption"] = "seen"
    rows[7]["caption"] = 3
    (tmp_path / "lists").mkdir()
    table = tmp_path / "lists/t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    datasets.main(["check", str(table), "--root", str(tmp_path), "--frames", "9"])
    output = capsys.readouterr().out.splitlines()
    assert output[-1] == (
        "8 triplets: 2 bad rows, 5 without a caption; 6 decoded, 50.0% of them bad"
    )
    assert output[0] == f"bad: triplet 5: {table}, line 5: its tgt_video is its src_video"
    assert output[1] == f"bad: triplet 8: {table}, line 8: its caption is not a text: 3"
    assert output[2].split() == "clips what training would read".split()
    found = sorted(" ".join(line.split()) for line in output[3:-1])
    for line, expected in zip(
        found,
        [
            "1 1 frame of 32x64",
            f"1 bad: triplet 3: {tmp_path}/none.mkv: no such file",
            f"1 bad: triplet 4: {tmp_path}/a.mkv: its 7 frames at 8 fps are not in step",
            f"1 bad: triplet 7: {tmp_path}/b.mkv: it or its source is 40x16",
            "2 5 frames of 64x32",
        ],
        strict=True,
    ):
        assert line.startswith(expected)
    options = ["--root", str(tmp_path), "--clips", "2", "--workers", "1"]
    datasets.main(["check", str(table), *options])
    assert "; 2 decoded" in capsys.readouterr().out
    missing = tmp_path / "missing.csv"
    with pytest.raises(SystemExit):
        datasets.main(["check", str(missing)])
    assert capsys.readouterr().err == f"error: {missing}: no such file or directory\n"


# --- Captions -------------------------------------------------------------------------------------


class Captioner(ThreadingHTTPServer):
    """A loopback server that describes a clip by the brightness of its frames.

    Unless `misbehave(level, times asked)` returns an HTTP status, the text of the answer, or that
    and why it ends.
    """

    def __init__(self, misbehave=lambda level, times: None, seconds: float = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.misbehave = misbehave
        self.seconds = seconds  # that an answer takes
        self.asked: Counter[int] = Counter()
        self.requests: list[tuple] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client that was killed no longer listens: nothing to report."""


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        from PIL import Image

        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][-1]["content"]
        levels = []
        for part in parts:
            if part["type"] == "image_url":
                image = base64.b64decode(part["image_url"]["url"].split(",")[1])
                levels.append(round(np.asarray(Image.open(io.BytesIO(image))).mean()))
        self.server.asked[levels[0]] += 1
        self.server.requests.append((self.path, body, levels))
        time.sleep(self.server.seconds)
        answer = self.server.misbehave(levels[0], self.server.asked[levels[0]])
        if isinstance(answer, int):
            return self.send_error(answer)
        text = f" From {levels[0]} to {levels[-1]}. " if answer is None else answer
        text, reason = text if isinstance(text, tuple) else (text, "stop")
        choice = {"message": {"content": text}, "finish_reason": reason}
        content = json.dumps({"choices": [choice]}).encode()
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
    common = dict(src_video="source.mkv", caption="old", category="Local Add", dataset="ReCo-Data")
    rows = [common | dict(tgt_video=f"t{i}.mkv", prompt=f"edit {i}") for i in range(number)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "t.jsonl"


def test_captions_of_all_targets_are_replaced(tmp_path: Path, monkeypatch):
    """Through errors of the server, and from the frames of each target; rows keep their order."""
    monkeypatch.setattr(chat, "PAUSES", (0,) * 6)
    (tmp_path / "sub").mkdir()
    file, out = write_targets(tmp_path, 12), tmp_path / "sub/out.jsonl"
    failures = {10: 500, 20: 429, 30: 503}
    server = Captioner(lambda level, times: failures.get(level) if times < 3 else None)
    options = ["--out", str(out), "--url", server.url, "--frames", "5", "--model", "some/model"]
    datasets.main(["caption", str(file), *options])
    before, after = TripletDataset(file), TripletDataset(out)
    for i in range(12):
        level = 10 * i + 10
        answer = f"From {level} to {level + 8}."  # of the first 5 frames
        assert after.row(i) == before.row(i) | {"caption": answer}
    assert server.asked == {10 * i + 10: 3 if i < 3 else 1 for i in range(12)}
    path, body, levels = server.requests[-1]
    assert path == "/v1/chat/completions" and body["model"] == "some/model" and len(levels) == 5
    assert np.abs(np.diff(levels) - 2).max() <= 1
    assert "one paragraph" in body["messages"][-1]["content"][-1]["text"]


def test_what_gets_no_caption_is_asked_for_again_and_alone(tmp_path: Path, monkeypatch, capsys):
    """A damaged clip and an empty answer fail; nothing is written while more than 1 in 100 do."""
    monkeypatch.setattr(chat, "PAUSES", (0,) * 6)
    file, out = write_targets(tmp_path, 5), tmp_path / "out.jsonl"
    whole = (tmp_path / "t3.mkv").read_bytes()
    (tmp_path / "t3.mkv").write_bytes(b"no video")
    server = Captioner(lambda level, times: " " if level == 20 and times == 1 else None)
    with pytest.raises(SystemExit) as stop:
        datasets.main(["caption", str(file), "--out", str(out), "--url", server.url])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "error: 2 of 5 clips have no caption" in error
    assert not out.exists()
    assert f"{tmp_path}/t3.mkv: " in error and "t1.mkv: the answer is empty" in error
    (tmp_path / "t3.mkv").write_bytes(whole)
    datasets.main(["caption", str(file), "--out", str(out), "--url", server.url])
    dataset = TripletDataset(out)
    for i in range(5):
        assert dataset.row(i)["caption"] == f"From {10 * i + 10} to {10 * i + 26}."
    assert server.asked == {10: 1, 20: 2, 30: 1, 40: 1, 50: 1}


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("<think>They want one. Let me look.</think>\n\nA grey field.", "A grey field."),
        ("Got it, a description.</think>\n\nA grey field.", "A grey field."),
        ("A sign says: I'm sorry.", "A sign says: I'm sorry."),
        ("I watch.", "I watch."),
    ],
)
def test_a_caption_is_the_answerwithout_thoughts(tmp_path: Path, answer: str, caption: str):
    file, out = write_targets(tmp_path, 1), tmp_path / "out.jsonl"
    server = Captioner(lambda level, times: answer)
    datasets.main(["caption", str(file), "--out", str(out), "--url", server.url])
    assert TripletDataset(out).row(0)["caption"] == caption


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (("A man in a red coat walks along the", "length"), "the answer was cut off (length)"),
        ("<think>They want a description, so", "the answer is empty"),
        ("</think>\n", "the answer is empty"),
        ("very " * 3000, "its caption has 15000 characters, more than 10000"),
        ("I'm sorry, but I can't assist with that request.", "the model refused: I'm sorry, but"),
        ("Sorry, no.", "the model refused: Sorry, no."),
        ("I cannot see any frames.", "the model refused: I cannot see"),
        ("I’m unable to describe it.", "the model refused: I’m unable"),
        ("As an AI, I have no eyes.", "the model refused: As an AI"),
    ],
)
def test_what_is_no_caption_fails_its_clip(tmp_path: Path, capsys, answer, problem: str):
    """It would be trained on as ℓ*."""
    file, out = write_targets(tmp_path, 1), tmp_path / "out.jsonl"
    server = Captioner(lambda level, times: answer)
    with pytest.raises(SystemExit) as stop:
        datasets.main(["caption", str(file), "--out", str(out), "--url", server.url])
    assert stop.value.code == 2 and not out.exists()
    assert f"note: no caption for {tmp_path}/t0.mkv: {problem}" in capsys.readouterr().err


def test_a_caption_is_kept_for_the_same_clip_frames_and_model_only(tmp_path: Path):
    file, out = write_targets(tmp_path, 1), tmp_path / "out.jsonl"
    server = Captioner()
    options = ["caption", str(file), "--out", str(out), "--url", server.url]
    for more, asked in ([], 1), ([], 1), (["--model", "other"], 2), (["--frames", "5"], 3), ([], 3):
        datasets.main([*options, *more])
        assert len(server.requests) == asked
    write_clip(tmp_path / "t0.mkv", 9, 70)
    datasets.main(options)
    assert TripletDataset(out).row(0)["caption"] == "From 70 to 86."


def test_a_row_in_a_hundred_may_stay_without(tmp_path: Path, monkeypatch, capsys):
    """It is left out, with a note; so is a row that makes no sense."""
    file, out = write_targets(tmp_path, 1), tmp_path / "out.jsonl"
    row = json.loads(file.read_text())
    rows = [row | {"prompt": f"edit {i}"} for i in range(99)] + [row | {"tgt_video": "missing.mkv"}]
    file.write_text("\n".join(map(json.dumps, [*rows, row | {"prompt": 7}])))
    server = Captioner()
    datasets.main(["caption", str(file), "--out", str(out), "--url", server.url])
    assert len(TripletDataset(out)) == 99 and server.asked == {10: 1}
    error = capsys.readouterr().err
    assert f"note: no caption for {tmp_path}/missing.mkv" in error
    assert "line 101: its prompt is not a text: 7" in error


def test_after_a_kill_no_finished_clip_is_asked_for_again(tmp_path: Path):
    """SIGKILL midway; by the notes of the server, the second run asks for the rest only."""
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
    numbers = re.findall(r"t(\d+)\.mkv.*\n", answers.read_text())
    finished = {10 * int(number) + 10 for number in numbers}
    assert 4 <= len(finished) < 16 and not out.exists()
    # As if the kill had come within a write.
    answers.write_text(answers.read_text() + '{"key": "cut o')
    first = Counter(server.asked)
    server.seconds = 0
    datasets.main(options)
    second = server.asked - first
    assert second == {level: 1 for level in range(10, 170, 10) if level not in finished}
    dataset = TripletDataset(out)
    for i in range(16):
        assert dataset.row(i)["caption"] == f"From {10 * i + 10} to {10 * i + 26}."


# --- Latents --------------------------------------------------------------------------------------


def encode(folder: Path, *size: int) -> None:
    table = folder / "t.jsonl"
    table.write_text(json.dumps(dict(src_video="a.mp4", tgt_video="b.mp4", prompt="go")))
    options = ["--checkpoint", rvedit.TOY, "--out", folder / "latents", "--size", *size]
    datasets.main(["encode", str(table), *map(str, options)])


@pytest.mark.parametrize("size", [(8, 64, 64), (9, 60, 64)])
def test_a_size_that_training_would_refuse_is_not_encoded(tmp_path: Path, capsys, size):
    """All that was encoded would be of no use, such as at the paper's 720 lines."""
    with pytest.raises(SystemExit, match="2"):
        encode(tmp_path, *size)
    assert capsys.readouterr().err.startswith(f"error: --size {' '.join(map(str, size))}: take 4k")
    assert not (tmp_path / "latents").exists()


def test_a_gpu_without_room_for_encoding_is_one_line(tmp_path: Path, capsys, monkeypatch):
    """Such as one that still runs the server which wrote the captions."""

    def run_out(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 5.00 GiB.\nMore advice.")

    monkeypatch.setattr(datasets, "latents_of", run_out)
    write_clip(tmp_path / "a.mp4", 9, 10, size=(64, 64))
    write_clip(tmp_path / "b.mp4", 9, 200, size=(64, 64))
    with pytest.raises(SystemExit, match="2"):
        encode(tmp_path, 9, 64, 64)
    assert "error: out of memory: take a smaller --size" in capsys.readouterr().err
