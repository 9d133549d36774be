"""Recomputation gives the same gradients and repeats nothing expensive; gloo on one thread."""

import collections
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_model
from test_train import make_batch
from torch.utils._python_dispatch import TorchDispatchMode

import parallel
import train
from parallel import shard

ROOT = Path(__file__).parents[1]
CROWD = """
import torch
import torch.distributed as dist
import parallel

dist.init_process_group("gloo_on_one_thread", store=dist.HashStore(), rank=0, world_size=1)
x, parts = torch.ones(1), torch.zeros(64, 1).unbind()
for _ in range(1000):
    works = [dist.group.WORLD.allgather_into_tensor_coalesced([part], [x]) for part in parts]
    assert all(work.wait() for work in works)
assert sum(parts) == len(parts)
dist.destroy_process_group()
"""


class Operations(TorchDispatchMode):
    """Counts attention passes, and matrix products by whether they are wider than their input."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if "scaled_dot_product" in name:
            self.counts["attention backward" if "backward" in name else "attention"] += 1
        if name == "addmm":  # products with a bias, and so no gradients
            self.counts["wide" if args[2].shape[1] > args[2].shape[0] else "narrow"] += 1
        return operation(*args, **kwargs or {})


def build(recompute, compile=False):
    model, vae = tiny_model()
    shard(model, None, recompute, compile)
    return model, vae, make_batch(model, vae)[0]


def step(recompute):
    """Gradients of a training step, and what its forward and its backward pass ran."""
    model, vae, batch = build(recompute)
    with Operations() as forward:
        total, *_ = train.training_step(model, vae, batch, depth=2)
    with Operations() as backward:
        total.backward()
    return {name: p.grad for name, p in model.named_parameters()}, forward.counts, backward.counts


def test_kept_results_are_not_computed_again_and_gradients_are_the_same_bits():
    """Backward runs again what widens, and no attention."""
    (expected, *plain), (actual, *selective) = step(recompute=False), step(recompute=True)
    assert actual.keys() == expected.keys() and all(
        torch.equal(actual[name], expected[name]) for name in expected
    )
    assert plain[0] == selective[0] and plain[0]["narrow"] > plain[0]["wide"] > 0
    assert not plain[1]["attention"] and not plain[1]["wide"] and not plain[1]["narrow"]
    assert selective[1]["attention backward"] == plain[1]["attention backward"] > 0
    assert not selective[1]["attention"] and not selective[1]["narrow"]
    # A DiT block has one wide product (feed-forward), a vision block three (q-k-v, gate and up).
    assert selective[1]["wide"] == 3 + 2 * 3


@pytest.mark.slow
def test_compiled_blocks_keep_the_same(monkeypatch):
    """Seen by the profiler, because compiled code does not run under the counter above."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    expected, *_ = step(recompute=False)
    model, vae, batch = build(recompute=True, compile=True)
    total, *_ = train.training_step(model, vae, batch, depth=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        total.backward()
    seen = collections.Counter(
        event.name for event in profile.events() if "scaled_dot_product" in event.name
    )
    assert seen and all("backward" in name for name in seen), seen
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "0 1 0"),
        (dict(WORLD_SIZE="4", LOCAL_RANK="1"), "0 1 0"),  # a batch script's own
        (dict(RANK="", WORLD_SIZE="", LOCAL_RANK=""), "0 1 0"),
        (dict(RANK="2", WORLD_SIZE="4", LOCAL_RANK="1"), "2 4 1"),
    ],
)
def test_only_torchrun_says_how_many_processes_there_are(environment, expected):
    program = "import cli; print(cli.RANK, cli.RANKS, cli.LOCAL_RANK)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(
    ("on_nodes", "shape"),  # for each rank, how many ranks its node has
    [([2, 2, 2, 2], (2, 2)), ([4, 4, 4, 4, 2, 2], (6,)), ([1, 1, 1], (3,)), ([4, 4, 4, 4], (4,))],
)
def test_nodes_get_a_row_each_if_they_have_equally_many_ranks(monkeypatch, on_nodes, shape):
    monkeypatch.setattr(dist, "get_world_size", lambda: len(on_nodes))
    monkeypatch.setattr(
        dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), on_nodes)
    )
    monkeypatch.setattr(parallel, "init_device_mesh", lambda device, shape, **names: shape)
    for on_node in {*on_nodes}:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_node))
        assert parallel.make_mesh(torch.device("cpu"), torch.float32) == shape


@pytest.mark.slow
def test_many_collectives_at_once_leave_the_heap_whole():
    """In a process of its own: PyTorch 2.13 mostly aborts with "gloo" instead."""
    subprocess.run([sys.executable, "-c", CROWD], cwd=ROOT, check=True)


def test_compiling_takes_no_option_that_older_versions_of_pytorch_lack(monkeypatch):
    """Those of 2.9, the oldest that is supported."""

    def compile(
        model, *, fullgraph=False, dynamic=None, backend="", mode=None, options=None, disable=False
    ):
        return model

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    model, vae = tiny_model()
    parallel.compile_blocks(model.dit.blocks)
    parallel.compile_norms(vae)
    assert torch._dynamo.config.recompile_limit == 64
