"""The plan of a run's memory against a run: what it shards, what autograd saves, and what it allocates at its peak."""

import collections
import itertools
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import tiny_config, tiny_model, tiny_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import rvedit
import sample
import train
from experiments import bench, plan

ROOT = Path(__file__).parent.parent


def options(**changes):
    defaults = dict(
        size=(5, 64, 64), batch=1, accumulate=1, seed=0, timestep_shift=1.0, average=0.0, muon=0.0
    )
    defaults |= dict(freeze_lora=False, recompute=False, compile=False, out=Path("/nowhere"))
    return SimpleNamespace(**defaults | changes)


@pytest.fixture
def eight_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


def local(tensors):
    return sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors)


@pytest.mark.parametrize("lora_rank", (0, 2))
def test_what_stays_is_to_the_byte_what_rank_0_of_8_holds(eight_ranks, lora_rank):
    """Whole, and with a LoRA, where the language tower is frozen but sharded, the vision tower frozen and whole."""
    args, config = options(average=0.5), tiny_config(lora_rank=lora_rank)
    model, vae = tiny_model(lora_rank=lora_rank)
    train.prepare(model, args, eight_ranks)
    run = train.Run(model, vae, torch.device("cpu"), args)
    batch = plan.a_batch(model, vae, args, "cpu")
    train.training_step(model, vae, batch, depth=3)[0].backward()
    planned = plan.plan(config, args, 8, torch.float32, tiny_tokenizer())
    vision = [p for p in model.encoder.qwen.visual.parameters() if not p.requires_grad]
    assert planned.state == {
        "parameters, sharded, float32": local(model.parameters()) - local(vision),
        "AdamW's moments, sharded, float32": local(
            run.optimizer.state[p][name]
            for p in run.weights.values()
            for name in ("exp_avg", "exp_avg_sq")
        ),
        "average of the weights": local(run.average.values()),
        "frozen vision tower": local(vision),
        "frozen VAE, float32": local(vae.parameters()),
        "clips": local(batch[:4]),
    }
    gradients = local(p.grad for p in run.weights.values() if p.grad is not None)
    assert planned.peaks["update"] == gradients + local(run.weights.values())
    assert (lora_rank == 0) == (planned.state["frozen vision tower"] == 0)


def test_what_is_kept_is_what_autograd_saves():
    """Unique storages of all saved tensors, parameters left out, to 1 %."""
    args, config = options(), tiny_config()
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
        train.training_step(model, vae, plan.a_batch(model, vae, args, "cpu"), depth=3)
    planned = plan.plan(config, args, 1, torch.float32, tiny_tokenizer())
    assert planned.held["InfoNCE"] == pytest.approx(sum(saved.values()), rel=0.01)


@pytest.mark.parametrize("recompute", (False, True))
def test_the_peak_is_what_the_allocator_gives_out(recompute):
    """Seen by the profiler over forward and backward, to 1 %; without the VAE, whose convolutions take work space."""
    args, config = options(recompute=recompute), tiny_config()
    model, vae = tiny_model()
    train.prepare(model, args, None)
    batch = plan.a_batch(model, vae, args, "cpu")
    batch = batch._replace(source=batch.source[:, :1], target=batch.target[:, :1])
    vae, encode = (
        SimpleNamespace(encode=lambda _: torch.zeros_like(batch.noise)),
        model.encoder.encode,
    )
    # Copied, as to a GPU.
    model.encoder.encode = lambda inputs: encode((*(x.clone() for x in inputs[:2]), *inputs[2:]))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        train.training_step(model, vae, batch, depth=3)[0].backward()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    planned = plan.plan(config, args, 1, torch.float32, tiny_tokenizer())
    expected = max(
        peak for part, peak in planned.peaks.items() if part != "start" and "VAE" not in part
    )
    assert max(itertools.accumulate(changes)) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@torch.no_grad()
def test_every_stage_of_the_offloaded_full_size_edit_fits_in_24_gb():
    """Of 81 x 704 x 1280: weights of the one network that is there, and what its pass makes, with 8 GB to spare."""
    model, vae = bench.random_networks(
        rvedit.preset("wan2.2-ti2v-5b"), torch.device("meta"), torch.bfloat16
    )
    clip = torch.zeros(81, 704, 1280, 3, dtype=torch.uint8)
    inputs, blocks = (
        model.encoder.prepare([clip], ["make it snow"]),
        sample.to_blocks(clip[:9], 9, 4),
    )
    z, t = torch.zeros(1, 48, 21, 44, 80, device="meta"), torch.zeros(1, device="meta")
    contexts = [torch.zeros(1, 2822, 3072, device="meta")] * 30
    stages = {
        "understand": ((model.encoder,), lambda: model.contexts(model.encoder.encode(inputs))),
        "encode": (
            (vae.encoder, vae.conv1),
            lambda: collections.deque(vae.encode_chunks(blocks), maxlen=0),
        ),
        "denoise": ((model.dit,), lambda: model.dit(z, t, contexts, z)),
        "decode": (
            (vae.decoder, vae.conv2),
            lambda: collections.deque(vae.decode_chunks(z[:, :, :3]), maxlen=0),
        ),
    }
    for stage, (modules, run) in stages.items():
        with (
            mock.patch.object(F, "scaled_dot_product_attention", plan.fused_attention),
            plan.Alive("meta") as alive,
        ):
            run()
        held = sum(p.nbytes for module in modules for p in module.parameters())
        assert 1e9 < held + max(alive.peaks.values()) < 16e9, stage
