"""The benchmark: its FLOPs against PyTorch's counter, Algorithm 1 to the letter against ours, and the command."""

import json
import math

import pytest
import torch
from helpers import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import data
import rvedit
import train
from experiments import bench
from qwen import merge_lora
from vae import WanVAE

CONFIGS = {
    "tiny": (tiny_config(), (5, 64, 96)),
    "toy": (rvedit.preset("toy"), (9, 32, 48)),
    "shrunk": (bench.shrink(rvedit.preset("wan2.2-ti2v-5b"), 4), (5, 64, 96)),
    "full": (rvedit.preset("wan2.2-ti2v-5b"), (5, 480, 832)),
}
SOME = [
    pytest.param(name, marks=() if name in ("tiny", "toy") else pytest.mark.slow)
    for name in CONFIGS
]


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def networks_and_batch(name, frames=None):
    """On the meta device, which has shapes only: even the full size is counted in seconds."""
    config, size = CONFIGS[name]
    size = (frames or size[0], *size[1:])
    model, vae = bench.random_networks(config, torch.device("meta"), torch.float32)
    clip = torch.zeros(1, *size, 3, dtype=torch.uint8)
    inputs = model.encoder.prepare([clip[0]], ["make it snow"])
    sides = (side // config.vae.spatial_factor for side in size[1:])
    noise = torch.zeros(
        1, config.vae.z_dim, (size[0] - 1) // config.vae.temporal_factor + 1, *sides, device="meta"
    )
    batch = data.Batch(
        *(clip.to("meta"),) * 2, torch.zeros(1, device="meta"), noise, inputs, inputs, 0
    )
    return model, vae, batch, bench.flops(config, size, inputs, steps=3)


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_flops_are_those_that_pytorch_counts(name):
    """Each part's closed formula, to the last operation."""
    model, vae, batch, flops = networks_and_batch(name)
    z, t, inputs = batch.noise, batch.t, batch.edit_inputs
    condition = model.encoder.encode(inputs)
    contexts, editing = model.contexts(condition), [condition.editing] * model.config.dit.num_blocks
    assert counted(lambda: model.encoder.encode(inputs)) == flops["mllm"]
    assert counted(lambda: model.dit(z, t, contexts, z)) == flops["dit"]
    assert counted(lambda: model.dit(z, t, editing)) == flops["dit as Wan's"]
    assert counted(lambda: vae.decode(z)) == flops["decode"]
    assert counted(lambda: vae.encode(batch.source.movedim(-1, 1).float())) == flops["encode"]
    assert flops["edit"] == flops["encode"] + flops["mllm"] + 3 * flops["dit"] + flops["decode"]
    merge_lora(model.encoder.qwen)
    texts = (*(x.to("meta") for x in inputs[:2]), inputs[2], model.encoder.queries)
    assert counted(lambda: model.encoder.qwen(*texts)) == flops["mllm as Qwen's"]


@pytest.mark.parametrize("name", SOME)
def test_flops_of_a_step_are_those_that_pytorch_counts(name):
    """Ours makes its logits twice, which is not counted as work; the first layers' inputs get no gradient."""
    model, vae, batch, flops = networks_and_batch(name, frames=1)
    config, vision, depth = (
        model.config,
        model.config.qwen.vision,
        (model.config.dit.num_blocks + 1) // 2,
    )
    tokens = batch.noise[0, 0].numel() // math.prod(config.dit.patch_size)
    patch = math.prod(config.dit.patch_size) * config.dit.in_channels
    missing = 2 * config.dit.dim * (2 * tokens * patch + config.dit.freq_dim)
    if not config.lora_rank:  # the vision tower trains too
        missing += 2 * len(batch.edit_inputs[1]) * 3 * 2 * vision.patch_size**2 * vision.hidden_size
    again = 2 * tokens**2 * config.dit.dim
    step = counted(lambda: train.training_step(model, vae, batch, depth)[0].backward())
    assert step == flops["step"] - missing + again
    assert (
        counted(lambda: bench.literal_step(model, vae, batch, depth).backward())
        == flops["literal step"] - missing
    )


@pytest.mark.parametrize("depth", (1, 3))
def test_the_literal_step_equals_ours(depth):
    """Its loss and all gradients, to 1e-5 of the largest in a parameter."""
    model, vae = tiny_model()
    clips = torch.randint(
        0, 256, (2, 1, 5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    edit, ref = (
        model.encoder.prepare([clip[0]], [text])
        for clip, text in zip(clips, ("snow", "a hill"), strict=True)
    )
    noise = torch.randn(1, 8, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = data.Batch(*clips, torch.tensor([0.4]), noise, edit, ref, 0)
    results = []
    for loss in (
        train.training_step(model, vae, batch, depth)[0],
        bench.literal_step(model, vae, batch, depth),
    ):
        model.zero_grad()
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (ours, actual), (literal, expected) = results
    assert ours == pytest.approx(literal, rel=1e-5)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for (
        name,
        gradient,
    ) in expected.items():  # some, such as of key biases, are nearly zero by construction
        assert (actual[name] - gradient).abs().max() < 1e-5 * (
            gradient.abs().max() + 1e-3 * largest
        ), name


def numbers(value):
    """All numbers in what JSON holds."""
    if isinstance(value, dict | list):
        return [
            x
            for part in (value.values() if isinstance(value, dict) else value)
            for x in numbers(part)
        ]
    return [value] if isinstance(value, float | int) else []


def run(tmp_path, *options):
    bench.main(
        [
            "--device",
            "cpu",
            "--rounds",
            "2",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "b.json"),
            *options,
        ]
    )
    return json.loads((tmp_path / "b.json").read_text())


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    """All parts of the toy preset at a tiny size; nothing is left over."""
    report = run(tmp_path, "--size", "5", "32", "32")
    parts = [row["part"] for row in report["rows"]]
    assert parts == list(bench.PARTS) and [path.name for path in tmp_path.iterdir()] == ["b.json"]
    assert all(math.isfinite(x) and x > 0 for x in numbers(report))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(parts) and {line.count("|") for line in table} == {12}


def test_sizes_and_parts_can_be_chosen(tmp_path):
    """FLOPs grow with the clip; FLOPs and sizes of the rows belong together."""
    report = run(tmp_path, "--parts", "dit", "--size", "5", "32", "32", "--size", "9", "32", "64")
    small, large = report["rows"]
    assert (small["size"], large["size"]) == ([5, 32, 32], [9, 32, 64])
    assert 2 < large["flops"] / small["flops"] < 4 and len(small["seconds"]["ours"]) == 2


def test_a_rank_of_eight_is_measured_beside_its_plan(tmp_path, capsys, monkeypatch):
    """Its parameters and Adam's moments are those of an eighth, and two optimiser steps change them."""
    runs, update = [], train.Run.update

    def record(run, lr):
        weight = next(iter(run.weights.values()))
        before = weight.to_local().clone()
        update(run, lr)
        runs.append((run, (weight.to_local() - before).abs().max()))

    monkeypatch.setitem(train.RECIPES["toy"], "batch", 1)
    monkeypatch.setattr(train.Run, "update", record)
    report = run(tmp_path, "--parts", "rank", "--size", "5", "32", "32")
    (row,), whole = (
        report["rows"],
        sum(p.numel() for p in rvedit.RVEDiT(rvedit.preset("toy")).parameters()),
    )
    held = sum(p.to_local().numel() for p in runs[0][0].weights.values())
    assert (
        whole / 8 <= held < 1.03 * whole / 8
        and len(runs) >= 2
        and all(change > 0 for _, change in runs)
    )
    assert (
        row["plan"] > 4 * 4 * held
        and row["flops"] > 0
        and "| the plan |" in capsys.readouterr().out
    )
    assert not torch.distributed.is_initialized()


def test_an_offloaded_edit_is_measured(tmp_path, monkeypatch):
    """The networks rest on the CPU, and the edit is told where to compute."""
    seen, edit_video = [], bench.edit_video
    monkeypatch.setattr(
        bench, "edit_video", lambda *x, **options: seen.append(options) or edit_video(*x, **options)
    )
    report = run(tmp_path, "--parts", "edit", "--memory-limit", "4", "--size", "5", "32", "32")
    assert [row["part"] for row in report["rows"]] == ["edit"] and seen[0] == {
        "device": torch.device("cpu")
    }


def test_loading_is_measured_beside_a_plain_read(tmp_path, capsys):
    (row,) = run(tmp_path, "--parts", "load")["rows"]
    networks = rvedit.RVEDiT(rvedit.preset("toy")), WanVAE(rvedit.preset("toy").vae)
    assert row["size"] == pytest.approx(
        4 * sum(p.numel() for net in networks for p in net.parameters()), rel=0.01
    )
    assert {len(seconds) for seconds in row["seconds"].values()} == {2}
    assert "GB/s" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == [
        "b.json"
    ]


@pytest.mark.parametrize(
    "options", (("--parts", "rank", "dit"), ("--parts", "load", "rank"), ("--memory-limit", "24"))
)
def test_parts_that_go_alone_say_so(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *options)
    assert stop.value.code == 2 and "alone" in capsys.readouterr().err


@pytest.mark.slow
def test_peers_compute_the_same(tmp_path):
    """Beside diffusers, transformers and the literal step, on the same weights, results agree."""
    report = run(tmp_path, "--peer", "--size", "5", "64", "64")
    differences = {
        (row["part"], *row["seconds"]): row["difference"]
        for row in report["rows"]
        if "difference" in row
    }
    assert set(differences) == {
        ("step", "ours", "literal"),
        ("info_nce", "ours", "literal"),
        ("encode", "ours", "diffusers"),
        ("decode", "ours", "diffusers"),
        ("dit as Wan's", "ours", "diffusers"),
        ("mllm as Qwen's", "ours", "transformers"),
    }
    assert max(differences.values()) < 1e-5


@pytest.mark.parametrize("size", (("6", "32", "32"), ("5", "32", "36")))
def test_an_impossible_size_is_one_line(size, tmp_path, capsys):
    """Exit code 2, what is wrong and what to do, and no file."""
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--parts", "dit", "--size", *size)
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert (
        capsys.readouterr().err
        == f"error: --size {' '.join(size)}: take 4k + 1 frames with sides in multiples of 8\n"
    )
