"""The benchmark and its plan of memory.

FLOPs are held against closed formulas, Algorithm 1 to the letter against ours, and the plan against
what a step really shards, saves and allocates.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_config, tiny_model, tiny_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import rvedit
import sample
import train
from experiments import bench, plan, workloads
from vae import WanVAE

# --- FLOPs ----------------------------------------------------------------------------------------


def flops(config, size, *names):
    return workloads.flops(config, size, names, steps=3, peer=True)


# By closed formulas over the configuration, which this project used before it counted.
KNOWN_FLOPS = [
    pytest.param(
        tiny_config(),
        (5, 64, 96),
        {"dit": 703_488, "encode": 66_066_432, "decode": 109_989_888, "mllm": 3_661_824},
        id="tiny",
    ),
    pytest.param(
        rvedit.preset("toy"),
        (9, 32, 48),
        {"dit": 802_693_120, "encode": 95_723_520, "decode": 646_216_704, "mllm": 377_036_800},
        id="toy",
    ),
    pytest.param(
        rvedit.preset("wan2.2-ti2v-5b"),
        (5, 480, 832),
        {
            "dit": 8_344_749_096_960,
            "encode": 6_236_782_755_840,
            "decode": 33_185_769_676_800,
            "mllm": 13_194_561_060_864,
        },
        marks=pytest.mark.slow,
        id="full",
    ),
]


@pytest.mark.parametrize(("config", "size", "expected"), KNOWN_FLOPS)
def test_flops_are_those_of_closed_formulas(config, size, expected):
    counted = flops(config, size, *expected, "edit")
    once = expected["encode"] + expected["mllm"] + expected["decode"]
    assert counted == expected | {"edit": once + 3 * expected["dit"]}


def test_flops_of_the_dit_are_those_of_its_products():
    """Counted by hand for S tokens of width d that read N context tokens in every block."""
    config = rvedit.preset("toy")
    config = dataclasses.replace(config, routing_depth=config.dit.num_blocks)
    S = 3 * 4 * 6  # latents of 9 frames of 32 x 48
    N, d, ffn, L = 16, 256, 768, 6
    patch_embeddings = 2 * (2 * S * 24 * d)  # of z_t and of the source
    time_embedding = 2 * d * (config.dit.freq_dim + d + 6 * d)
    self_attention = 2 * S * 4 * d * d + 2 * (2 * S * S * d)
    cross_attention = 2 * S * 2 * d * d + 2 * N * 2 * d * d + 2 * (2 * S * N * d)
    feed_forward = 2 * (2 * S * d * ffn)
    blocks = L * (self_attention + cross_attention + feed_forward)
    head = 2 * S * d * 24
    expected = patch_embeddings + time_embedding + blocks + head
    assert flops(config, (9, 32, 48), "dit")["dit"] == expected


@pytest.mark.slow
def test_flops_of_a_step_are_those_of_its_parts():
    """A backward pass is two forward passes, less the products whose input takes no gradient."""
    config = tiny_config(lora_rank=0)  # so that everything trains
    size = (5, 64, 96)
    model, vae = workloads.meta_networks(config)
    counted = flops(config, size, "dit", "step", "info_nce", "encode", "mllm")
    with torch.no_grad():
        batch = plan.random_batch(model, vae, size, 1, "meta")
        edit = workloads.counted(lambda: model.encoder.encode(batch.edit_inputs))
        ref = workloads.counted(lambda: model.encoder.encode(batch.ref_inputs))
        contexts = model.contexts(model.encoder.encode(batch.ref_inputs))
        arguments = (batch.noise, batch.t, contexts, batch.noise)
        middle = workloads.counted(lambda: model.dit.features(*arguments, 2))
        last = workloads.counted(lambda: model.dit(*arguments))

    S = batch.noise[0, 0].numel() // math.prod(config.dit.patch_size)
    patch = config.dit.in_channels * math.prod(config.dit.patch_size)
    vision_patch = len(batch.edit_inputs[1]) * batch.edit_inputs[1].shape[1]
    first_layers = 2 * config.dit.dim * (2 * S * patch + config.dit.freq_dim)
    first_layers += 2 * vision_patch * config.qwen.vision.hidden_size
    assert counted["mllm"] == edit
    assert counted["info_nce"] == 2 * (2 * S * S * config.dit.dim)
    forward = 2 * counted["encode"] + edit + ref + counted["dit"] + middle
    backward = 2 * (edit + counted["dit"]) - first_layers
    assert counted["step"] == forward + backward + counted["info_nce"]
    assert counted["literal step"] - counted["step"] == last - middle


@pytest.mark.parametrize("depth", (1, 3))
def test_the_literal_step_equals_ours(depth):
    """Its loss and all gradients, to 1e-5 of the largest in a parameter."""
    model, vae = tiny_model()
    torch.manual_seed(0)
    batch = plan.random_batch(model, vae, (5, 64, 64), 1, "cpu")

    def loss_and_gradients(loss):
        model.zero_grad()
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters()}

    ours, actual = loss_and_gradients(train.training_step(model, vae, batch, depth)[0])
    literal, expected = loss_and_gradients(workloads.literal_step(model, vae, batch, depth))
    assert ours == pytest.approx(literal, rel=1e-5)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        # Some gradients, such as those of key biases, are nearly zero by construction.
        scale = gradient.abs().max() + 1e-3 * largest
        assert (actual[name] - gradient).abs().max() < 1e-5 * scale, name


# --- The command ----------------------------------------------------------------------------------


def run(tmp_path, *options):
    out = tmp_path / "b.json"
    shared = ["--device", "cpu", "--rounds", "2", "--steps", "2", "--out", str(out)]
    bench.main([*shared, *options])
    return json.loads(out.read_text())


def numbers(value):
    """All numbers in what JSON holds."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for part in value for x in numbers(part)]
    return [value] if isinstance(value, float | int) else []


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    """All parts of a shrunken toy at a tiny size; nothing is left over."""
    report = run(tmp_path, "--shrink", "4", "--size", "5", "32", "32")
    parts = [row["part"] for row in report["rows"]]
    assert parts == [*workloads.PARTS, "edit in 2 steps"]
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    assert all(math.isfinite(x) and x > 0 for x in numbers(report))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(parts)
    assert {line.count("|") for line in table} == {12}


def test_sizes_and_parts_can_be_chosen(tmp_path):
    """FLOPs grow with the clip; FLOPs and sizes of the rows belong together."""
    report = run(tmp_path, "--parts", "dit", "--size", "5", "32", "32", "--size", "9", "32", "64")
    small, large = report["rows"]
    assert (small["size"], large["size"]) == ([5, 32, 32], [9, 32, 64])
    assert 2 < large["flops"] / small["flops"] < 4
    assert len(small["seconds"]["ours"]) == 2


@pytest.mark.slow
def test_a_rank_of_eight_is_measured_beside_its_plan(tmp_path, capsys, monkeypatch):
    """Its parameters and Adam's moments are those of an eighth, and optimiser steps change them."""
    runs = []
    update = train.Run.update

    def record(run, lr):
        weight = next(iter(run.weights.values()))
        before = weight.to_local().clone()
        update(run, lr)
        change = (weight.to_local() - before).abs().max()
        runs.append((run, change))

    monkeypatch.setitem(train.RECIPES["toy"], "batch", 1)
    monkeypatch.setattr(train.Run, "update", record)
    options = ["--shrink", "4", "--parts", "rank", "--size", "1", "32", "32"]
    (row,) = run(tmp_path, *options)["rows"]
    model = rvedit.RVEDiT(workloads.shrink(rvedit.preset("toy"), 4))
    whole = sum(p.numel() for p in model.parameters())
    held = sum(p.to_local().numel() for p in runs[0][0].weights.values())
    assert whole / 8 <= held < 1.1 * whole / 8  # shards of small parameters are rounded up
    assert len(runs) >= 2 and all(change > 0 for _, change in runs)
    assert row["plan"] > 4 * 4 * held and row["flops"] > 0
    assert "| the plan |" in capsys.readouterr().out
    assert not torch.distributed.is_initialized()


def test_an_offloaded_edit_is_measured(tmp_path, monkeypatch):
    """The networks rest on the CPU, and the edit is told where to compute."""
    seen = []

    def record(*inputs, **options):
        seen.append(options)
        return sample.edit_video(*inputs, **options)

    monkeypatch.setattr(workloads, "edit_video", record)
    report = run(tmp_path, "--parts", "edit", "--memory-limit", "4", "--size", "5", "32", "32")
    assert [row["part"] for row in report["rows"]] == ["edit in 2 steps and 4 GB"]
    assert seen[0] == {"device": torch.device("cpu")}


def test_loading_is_measured_beside_a_plain_read(tmp_path, capsys):
    """Of a shrunken model, too, whose vision tower has fewer blocks than the index of its last."""
    (row,) = run(tmp_path, "--parts", "load", "--shrink", "4")["rows"]
    config = workloads.shrink(rvedit.preset("toy"), 4)
    networks = rvedit.RVEDiT(config), WanVAE(config.vae)
    parameters = sum(p.numel() for net in networks for p in net.parameters())
    assert float(row["size"].removesuffix(" GB")) == pytest.approx(4e-9 * parameters, rel=0.05)
    assert {len(seconds) for seconds in row["seconds"].values()} == {2}
    assert "| plain read |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize("by", (1, 2, 4))
def test_a_shrunken_vision_tower_keeps_its_share_of_blocks_without_windows(by):
    vision = workloads.shrink(rvedit.preset("wan2.2-ti2v-5b"), by).qwen.vision
    assert all(block < vision.depth for block in vision.fullatt_block_indexes)
    assert len(vision.fullatt_block_indexes) / vision.depth == 4 / 32


@pytest.mark.parametrize("size", (("6", "32", "32"), ("5", "32", "36")))
def test_an_impossible_size_is_one_line(size, tmp_path, capsys):
    """Exit code 2, what is wrong and what to do, and no file."""
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--parts", "dit", "--size", *size)
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    expected = f"--size {' '.join(size)}: take 4k + 1 frames with sides in multiples of 8"
    assert capsys.readouterr().err == f"error: {expected}\n"


@pytest.mark.parametrize("options", bench.ALL)
def test_what_all_measures_are_options_of_the_command(options):
    args = bench.parse_arguments(["--preset", "wan2.2-ti2v-5b", *options.split()])
    assert args.parts and (args.size == bench.GROWTH) == ("--growth" in options)


def test_all_is_measured_in_order_and_what_fails_leaves_the_rest(tmp_path, monkeypatch):
    """Its row says why it stopped, and the next one has its turn."""

    def fails(*_):
        raise TypeError("unexpected\nkeyword")  # nobody foresaw it

    lines = {"--parts dit": 60, "--parts load": 60, "--parts mllm --size 1 32 32": 60}
    monkeypatch.setattr(bench, "ALL", lines)
    monkeypatch.setattr(workloads, "loading", fails)
    report = run(tmp_path, "--all", "--size", "5", "32", "32")
    first, second, *others = report["rows"]
    assert (first["part"], first["size"]) == ("dit", [5, 32, 32])
    assert second == {"part": "--parts load", "stopped": "unexpected"}
    # A size of a line comes to those of the command.
    assert [row["size"] for row in others] == [[5, 32, 32], [1, 32, 32]]
    assert "--all" in report["about"]


def test_a_run_of_all_that_takes_too_long_leaves_the_rest(tmp_path, monkeypatch):
    """Even within a library that goes on after errors of any kind."""

    def takes_long(*_):
        with contextlib.suppress(Exception):
            time.sleep(60)
        pytest.fail("it went on")

    monkeypatch.setattr(bench, "ALL", {"--parts load": 0.01, "--parts dit": 60})
    monkeypatch.setattr(workloads, "loading", takes_long)
    first, second = run(tmp_path, "--all")["rows"]
    assert first == {"part": "--parts load", "stopped": "its time is up"}
    assert second["part"] == "dit"


def test_a_run_of_all_may_take_twice_its_time_but_not_that_of_all(tmp_path, monkeypatch):
    limits = []

    @contextlib.contextmanager
    def time_limit(seconds):
        limits.append(seconds)
        yield

    monkeypatch.setattr(bench, "ALL", {"--parts dit": 20, "--parts mllm": 60})
    monkeypatch.setattr(bench, "ALL_SECONDS", 100)
    monkeypatch.setattr(bench, "time_limit", time_limit)
    run(tmp_path, "--all", "--size", "1", "32", "32")
    assert limits[0] == 40 and limits[1] < 100


@pytest.mark.slow
def test_peers_compute_the_same(tmp_path, monkeypatch):
    """Beside diffusers, transformers and the literal step, on the same weights, results agree."""
    monkeypatch.setitem(sys.modules, "tests", ModuleType("tests"))  # somebody else's
    monkeypatch.delitem(sys.modules, "peers", raising=False)
    report = run(tmp_path, "--peer", "--size", "5", "64", "64")
    differences = {}
    for row in report["rows"]:
        if "difference" in row:
            differences[(row["part"], *row["seconds"])] = row["difference"]
    assert set(differences) == {
        ("step", "ours", "literal"),
        ("info_nce", "ours", "literal"),
        ("encode in float32", "ours", "diffusers"),
        ("decode", "ours", "diffusers"),
        ("dit as Wan's", "ours", "diffusers"),
        ("mllm as Qwen's", "ours", "transformers"),
    }
    assert max(differences.values()) < 1e-5


# --- The plan of a run's memory -------------------------------------------------------------------


def options(**changes):
    defaults = {
        "size": [(5, 64, 64)],
        "batch": 1,
        "average": 0.0,
        "freeze_lora": False,
        "recompute": False,
        "compile": False,
        "dtype": "float32",
        "muon": 0.0,
        "lr": 1e-3,
        "out": Path("/nowhere"),
        "latents": None,
        "sequence_parallel": 1,
        "keep": 2,
        "routing_depth": None,
        "align_weight": None,
        "temperature": None,
    }
    return SimpleNamespace(**defaults | changes)


def tiny_batch(model, vae):
    return plan.random_batch(model, vae, (5, 64, 64), 1, "cpu")


@pytest.fixture
def eight_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


def local_bytes(tensors):
    shards = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(shard.nbytes for shard in shards)


@pytest.mark.parametrize("lora_rank", (0, 2))
def test_what_stays_is_to_the_byte_what_rank_0_of_8_holds(eight_ranks, lora_rank):
    """With a LoRA the language tower is frozen but sharded, the vision tower frozen and whole."""
    args = options(average=0.5)
    model, vae = tiny_model(lora_rank=lora_rank)
    train.prepare(model, args, eight_ranks)
    run = train.make_run(model, vae, torch.device("cpu"), args)
    batch = tiny_batch(model, vae)
    train.training_step(model, vae, batch, depth=3)[0].backward()
    planned = plan.plan(tiny_config(lora_rank=lora_rank), args, 8, tiny_tokenizer())

    vision = [p for p in model.encoder.qwen.visual.parameters() if not p.requires_grad]
    moments = []
    for p in run.weights.values():
        moments += [run.optimizer.state[p]["exp_avg"], run.optimizer.state[p]["exp_avg_sq"]]
    assert planned.state == {
        "parameters, sharded, float32": local_bytes(model.parameters()) - local_bytes(vision),
        "AdamW's moments, sharded, float32": local_bytes(moments),
        "average of the weights": local_bytes(run.average.values()),
        "frozen vision tower": local_bytes(vision),
        "frozen VAE, float32": local_bytes(vae.parameters()),
        "clips": local_bytes((batch.source, batch.target, batch.t, batch.noise)),
    }
    gradients = local_bytes(p.grad for p in run.weights.values() if p.grad is not None)
    assert planned.peaks["update"] == gradients + local_bytes(run.weights.values())
    assert (lora_rank == 0) == (planned.state["frozen vision tower"] == 0)


def test_what_is_kept_is_what_autograd_saves():
    """Unique storages of all saved tensors, parameters left out, to 1 %."""
    args = options()
    model, vae = tiny_model()
    train.prepare(model, args, None)
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *vae.parameters())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train.training_step(model, vae, tiny_batch(model, vae), depth=3)
    planned = plan.plan(tiny_config(), args, 1, tiny_tokenizer())
    assert planned.held["InfoNCE"] == pytest.approx(sum(saved.values()), rel=0.01)


@pytest.mark.parametrize("recompute", (False, True))
def test_the_peak_is_what_the_allocator_gives_out(recompute):
    """Seen by the profiler over forward and backward, to 1 %.

    Without the VAE, whose convolutions take work space.
    """
    args = options(recompute=recompute)
    model, vae = tiny_model()
    train.prepare(model, args, None)
    batch = tiny_batch(model, vae)
    batch = batch._replace(source=batch.source[:, :1], target=batch.target[:, :1])
    no_vae = SimpleNamespace(encode=lambda clip: torch.zeros_like(batch.noise))
    encode = model.encoder.encode

    def encode_copies(inputs):  # as if they were moved to a GPU
        input_ids, patches, *rest = inputs
        return encode((input_ids.clone(), patches.clone(), *rest))

    model.encoder.encode = encode_copies
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        train.training_step(model, no_vae, batch, depth=3)[0].backward()
    events = profile.profiler.kineto_results.events()
    events = sorted(
        (event for event in events if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    allocated = max(itertools.accumulate(event.nbytes() for event in events))

    planned = plan.plan(tiny_config(), args, 1, tiny_tokenizer())
    others = [peak for part, peak in planned.peaks.items() if "VAE" not in part and part != "start"]
    assert allocated == pytest.approx(max(others), rel=0.01)


@pytest.mark.slow
@torch.no_grad()
def test_every_stage_of_the_offloaded_full_size_edit_fits_in_24_gb():
    """At 81 x 704 x 1280, with 8 GB to spare: the weights of the one network on the GPU, and what
    its pass makes.
    """
    config = rvedit.preset("wan2.2-ti2v-5b")
    model, vae = workloads.random_networks(config, torch.device("meta"), torch.bfloat16)
    clip = torch.zeros(81, 704, 1280, 3, dtype=torch.uint8)
    z = torch.zeros(1, 48, 21, 44, 80, device="meta")
    t = torch.zeros(1, device="meta")
    contexts = [torch.zeros(1, 2822, 3072, device="meta")] * 30

    def understand():
        sample.understand(model, iter([clip]), "make it snow")

    def encode():
        sample.encode(vae, sample.latent_blocks(iter(clip[:9]), 3, 4), 3)

    def denoise():
        model.dit(z, t, contexts, z)

    def decode():
        collections.deque(vae.decode_chunks(z[:, :, :3]), maxlen=0)  # one after the other

    stages = {
        understand: [model.encoder],
        encode: [vae.encoder, vae.conv1],
        denoise: [model.dit],
        decode: [vae.decoder, vae.conv2],
    }
    for stage, modules in stages.items():
        with plan.fused_attention(), plan.Alive("meta") as alive:
            stage()
        weights = sum(p.nbytes for module in modules for p in module.parameters())
        assert 1e9 < weights + max(alive.peaks.values()) < 16e9, stage


def test_a_plan_with_latents_has_no_vae_at_work(capsys):
    command = ["--plan", "4", "--size", "1", "32", "32", "--batch", "1"]
    plan.main(command)
    assert "VAE, source" in capsys.readouterr().out
    plan.main([*command, "--latents", "latents"])
    assert "VAE, source" not in capsys.readouterr().out


def test_a_plan_for_no_number_of_gpus_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--preset", "toy"])
    assert capsys.readouterr().err == "error: --plan RANKS is missing: for how many GPUs?\n"


def test_the_plan_is_printed_as_a_table(capsys):
    """It takes the options of train.py, and ends with the total."""
    plan.main(["--plan", "4", "--size", "1", "32", "32", "--batch", "1"])
    table = capsys.readouterr().out
    state, step = table.split("in a step, beside those")
    gigabytes = [float(line.split()[-2]) for line in state.splitlines() if line]
    total = float(step.split()[-2])
    assert "AdamW's moments" in state and "backward" in step
    assert sum(gigabytes) < total < 0.2


def test_ranks_that_share_clips_keep_a_share_of_the_activations(capsys):
    """By the plan, each of 2 ranks keeps half of what a block of the DiT does on one."""
    kept = []
    for ranks in ("1", "2"):
        plan.main(["--plan", "4", "--size", "9", "64", "64", "--sequence-parallel", ranks])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "of 6 blocks" in line]
        kept.append(float(line.split()[-2]))
    dist.destroy_process_group()
    assert kept[1] / kept[0] == pytest.approx(1 / 2, rel=0.1)
