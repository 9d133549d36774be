"""Algorithm 1 against a naive implementation, and the run around it: ranks, resuming, mishaps."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import make_clip, relative_error, tiny_config, tiny_model, tiny_tokenizer
from safetensors.torch import load_file

import cli
import data
import losses
import parallel
import rvedit
import sample
import train
import video
import weights
from experiments import datasets
from run import finished, saved_options
from vae import WanVAE

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


# --- Runs of the command line, on a model of a few thousand parameters ----------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the subprocesses, so that sums have the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A checkpoint to start from, every parameter random."""
    folder = tmp_path_factory.mktemp("start") / "model"
    rvedit.save(folder, *tiny_model())
    return folder


def options(start, out, *more):
    fixed = [
        "--preset",
        "toy",
        "--checkpoint",
        start,
        "--out",
        out,
        "--size",
        5,
        64,
        64,
        "--workers",
        0,
        "--validate-every",
        1000,
    ]
    return [str(option) for option in (*fixed, "--save-every", 5, "--keep", 5, *more)]


def torchrun(ranks, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
    ]
    command += [str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def exported(folder):
    return load_file(folder / "model-00001-of-00001.safetensors")


def trained(out):
    """The weights of a run, apart from the VAE's."""
    return {
        name: value
        for name, value in exported(out / "model").items()
        if not name.startswith("vae.")
    }


def distance(a, b):
    """Relative, in the norm over all weights."""
    difference = sum((a[name] - b[name]).double().square().sum() for name in a)
    return math.sqrt(difference / sum(value.double().square().sum() for value in b.values()))


def losses_differ_by(a, b):
    assert [line["step"] for line in a] == [line["step"] for line in b]
    return max(
        abs(x[name] / y[name] - 1)
        for x, y in zip(a, b, strict=True)
        for name in ("loss", "flow", "align")
    )


def fork_at(former, step, out):
    """A run that stands where another one stood at a step."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(former / name, out / name)
    shutil.copy(former / "log.jsonl", out)
    shutil.copy(former / "run.json", out)
    return out


@pytest.fixture(scope="session")
def alone(start, tmp_path_factory):
    """Ten steps of four clips in one process."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("alone")
    train.main(options(start, out, "--steps", 10, "--batch", 4, "--validate-every", 10))
    return out


@pytest.fixture(scope="session")
def pair(start, tmp_path_factory):
    """The same in two."""
    out = tmp_path_factory.mktemp("pair")
    torchrun(2, *options(start, out, "--steps", 10, "--batch", 2, "--validate-every", 10))
    return out


# --- Algorithm 1 ----------------------------------------------------------------------------------


def make_batch(model, vae, lengths=(6, 19), align=True, t=None, seed=0):
    """A minibatch whose instructions and captions differ in length, so every stream is padded."""
    clips = [
        torch.stack([make_clip(5, 64, 64, seed + 10 * i + n) for n in range(len(lengths))])
        for i in (1, 2)
    ]
    generator = torch.Generator().manual_seed(seed)
    texts = [
        ["make it snow on the hill"[:n] for n in lengths],
        ["a hill " + "in snow" * (9 - n // 3) for n in lengths],
    ]
    inputs = [model.encoder.prepare(list(x), words) for x, words in zip(clips, texts, strict=True)]
    latents = (
        len(lengths),
        vae.config.z_dim,
        2,
        64 // vae.config.spatial_factor,
        64 // vae.config.spatial_factor,
    )
    t = torch.rand(len(lengths), generator=generator) if t is None else t
    noise = torch.randn(latents, generator=generator)
    return data.Batch(*clips, t, noise, inputs[0], inputs[1] if align else None, 0), texts


def naive_algorithm_1(model, vae, batch, texts, depth):
    """Each sample on its own, without padding; features from a hook, Eq. 5 by cross-entropies."""
    total = 0
    for i in range(len(batch.t)):
        features = []
        attention = model.dit.blocks[depth - 1].cross_attn
        hook = attention.register_forward_hook(lambda _, __, out, to=features: to.append(out))
        source, target = (
            vae.encode(x[i : i + 1].permute(0, 4, 1, 2, 3) / 127.5 - 1) for x in batch[:2]
        )
        t, noise = batch.t[i : i + 1], batch.noise[i : i + 1]
        z_t = t * noise + (1 - t) * target
        for clip, text, beside in (
            (batch.source[i], texts[0][i], source),
            (batch.target[i], texts[1][i], target),
        ):
            condition = model.encoder([clip], [text])
            x_e, x_v, x_l = condition[:3]
            contexts = []
            for block in range(1, model.config.dit.num_blocks + 1):
                contexts.append(
                    x_e if block <= model.config.routing_depth else torch.cat((x_e, x_v, x_l), 1)
                )
            velocity = model.dit(z_t, t, contexts, beside)
            if beside is source:
                total = total + ((velocity - (noise - target)) ** 2).mean()
        hook.remove()
        edit, ref = (
            F.normalize(features[0][0], dim=-1),
            F.normalize(features[1][0].detach(), dim=-1),
        )
        logits = edit @ ref.T / model.config.temperature
        same = torch.arange(len(logits))
        both = F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)
        total = total + model.config.align_weight * both / 2
    return total / len(batch.t)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("depth", (1, 2, 3))
def test_step_gradients_equal_a_naive_algorithm_1(depth):
    """A padded batch, at every depth: block 1 reads editing tokens only, 2 and 3 all of them."""
    model, vae = tiny_model()
    batch, texts = make_batch(model, vae)
    total, flow, align = train.training_step(model, vae, batch, depth)
    expected_loss = naive_algorithm_1(model, vae, batch, texts, depth)
    assert total.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert total.item() == pytest.approx(flow.mean().item() + 0.75 * align.item(), rel=1e-6)
    actual, expected = gradients(model, total), gradients(model, expected_loss)
    assert actual.keys() == expected.keys() == dict(model.named_parameters()).keys()
    largest = max(g.abs().max() for g in expected.values())
    for (
        name,
        gradient,
    ) in expected.items():  # some, such as of key biases, are nearly zero by construction
        error = (actual[name] - gradient).abs().max() / (gradient.abs().max() + 1e-3 * largest)
        assert error < 1e-4, (name, error)


def test_without_alignment_the_gradients_are_those_of_flow_matching(monkeypatch):
    """λ = 0: bit for bit, and the reference branch never runs."""
    model, vae = tiny_model(align_weight=0.0)
    batch, _ = make_batch(model, vae, align=False)
    calls, encode = [], model.encoder.encode
    monkeypatch.setattr(model.dit, "features", None)
    monkeypatch.setattr(model.encoder, "encode", lambda inputs: calls.append(1) or encode(inputs))
    total, _, align = train.training_step(model, vae, batch, depth=2)
    actual = gradients(model, total)
    assert len(calls) == 1 and align == 0

    source, target = (vae.encode(x.permute(0, 4, 1, 2, 3) / 127.5 - 1) for x in batch[:2])
    t = batch.t.view(-1, 1, 1, 1, 1)
    velocity = model.dit(
        (1 - t) * target + t * batch.noise,
        batch.t,
        model.contexts(encode(batch.edit_inputs)),
        source,
    )
    plain = torch.stack(
        [
            F.mse_loss(v, noise - x)
            for v, noise, x in zip(velocity, batch.noise, target, strict=True)
        ]
    )
    expected = gradients(model, plain.mean())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_reference_branch_gets_no_gradient():
    """The alignment term's gradient is that of the editing branch with fixed reference features."""
    model, vae = tiny_model()
    batch, _ = make_batch(model, vae)
    total, flow, _ = train.training_step(model, vae, batch, depth=3)
    assert total.requires_grad and not flow.requires_grad
    with torch.no_grad():
        assert train.training_step(model, vae, batch, depth=3)[0] == total


@pytest.mark.slow
def test_training_overfits_one_batch():
    """Both terms fall when the same clips, noise and timesteps come again and again."""
    model, vae = tiny_model()
    batch, _ = make_batch(model, vae, t=torch.tensor([0.9, 0.6]))
    latents = itertools.cycle([vae.encode(x.permute(0, 4, 1, 2, 3) / 127.5 - 1) for x in batch[:2]])
    vae = SimpleNamespace(encode=lambda _: next(latents))  # always the same, so only once
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    terms = []
    for step in range(120):  # by then the flow term is down to 1 to 2 % with each of four seeds
        total, flow, align = train.training_step(model, vae, batch, depth=1 + step % 3)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        terms.append((flow.mean().item(), align.item()))
    first, last = (torch.tensor(part).mean(0) for part in (terms[:3], terms[-3:]))
    assert last[0] < 0.05 * first[0] and last[1] < 0.5 * first[1], (first, last)


# --- What is random -------------------------------------------------------------------------------


def test_noise_and_timestep_follow_from_seed_step_and_sample():
    t, noise = data.draw(0, 7, 3, (2, 4), shift=1.0)
    again = data.draw(0, 7, 3, (2, 4), shift=1.0)
    assert torch.equal(t, again[0]) and torch.equal(noise, again[1])
    for other in ((1, 7, 3), (0, 8, 3), (0, 7, 4)):
        assert not torch.equal(noise, data.draw(*other, (2, 4), shift=1.0)[1])
    shifted = data.draw(0, 7, 3, (2, 4), shift=3.0)[0]
    assert shifted == pytest.approx(3 * t.item() / (1 + 2 * t.item())) and 0 <= t <= 1


class Rows(torch.utils.data.Dataset):
    """Five triplets, each known by its first pixel."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        clip = torch.full((5, 64, 64, 3), index, dtype=torch.uint8)
        return dict(source=clip, target=clip + 100, instruction=f"edit {index}", caption="")


@pytest.mark.parametrize(
    "ranks, batch, accumulate", ((1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2))
)
def test_samples_do_not_depend_on_how_the_work_is_divided(ranks, batch, accumulate):
    """A step has the same clips, t and ε; an epoch shows each row once; a run resumes in place."""
    model, vae = tiny_model()

    def steps(ranks, batch, accumulate, first_step=0):
        options = dict(
            sizes=[(5, 64, 64)],
            batch=batch,
            accumulate=accumulate,
            seed=1,
            timestep_shift=1.0,
            ranks=ranks,
            first_step=first_step,
            first_sample=4 * first_step,
            broken_file=Path("/nowhere"),
        )
        for step in range(first_step, 5):
            parts = []
            for micro in range(accumulate):
                for rank in range(ranks):
                    batches = data.Batches(
                        Rows(), model.encoder, model.config, rank=rank, **options
                    )
                    parts.append(batches[step, micro])
            yield tuple(torch.cat(x) for x in zip(*(part[:4] for part in parts), strict=True))

    expected, actual = list(steps(1, 4, 1)), list(steps(ranks, batch, accumulate))
    assert all(
        torch.equal(x, y)
        for a, b in zip(actual, expected, strict=True)
        for x, y in zip(a, b, strict=True)
    )
    rows = torch.cat([source[:, 0, 0, 0, 0] for source, *_ in actual]).tolist()
    assert (
        all(sorted(rows[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))
        and rows[:5] != rows[5:10]
    )
    resumed = list(steps(ranks, batch, accumulate, first_step=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, expected[2:], strict=True))


# --- What trains ----------------------------------------------------------------------------------


def test_all_that_should_train_gets_gradients_and_nothing_else_changes(tmp_path, monkeypatch):
    """From a start with zero-initialised parts, each trainable tensor gets a gradient some time."""
    config = dataclasses.replace(tiny_config(), routing_depth=1)
    model, vae = rvedit.RVEDiT(config, tiny_tokenizer()), WanVAE(config.vae)
    rvedit.initialise(model)
    rvedit.initialise(vae)
    rvedit.save(tmp_path / "start", model, vae)
    seen, update = set(), train.Run.update

    def record(run, lr):
        seen.update(
            name for name, p in run.weights.items() if p.grad is not None and p.grad.abs().max() > 0
        )
        update(run, lr)

    monkeypatch.setattr(train.Run, "update", record)
    train.main(options(tmp_path / "start", tmp_path / "run", "--steps", 6, "--batch", 2))
    before, after = exported(tmp_path / "start"), exported(tmp_path / "run/model")
    assert before.keys() == after.keys()
    parts = "dit.", "encoder.queries", "_connector.", ".lora_"
    trainable = {name for name in before if any(part in name for part in parts)}
    assert seen == trainable
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The queries of stills get no gradient from clips; weight decay may change them.
    assert changed - {"encoder.image_queries"} == trainable


def test_a_frozen_lora_and_a_model_without_lora(tmp_path, start):
    """--freeze-lora leaves queries, connectors and DiT; a model without LoRA trains whole."""
    for lora_rank, freeze, expected in (
        (2, True, {"dit", "queries", "connector"}),
        (0, False, None),
    ):
        model, vae = tiny_model(lora_rank=lora_rank)
        rvedit.save(tmp_path / f"{lora_rank}", model, vae)
        args = train.parse_arguments(
            options(tmp_path / f"{lora_rank}", tmp_path, *["--freeze-lora"] * freeze)
        )
        model, vae = train.load_model(args, None, torch.device("cpu"))
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        if expected is None:
            assert names == dict(model.named_parameters()).keys()
            assert "trains whole" in train.parameter_table(model, vae)
        else:
            assert all(any(part in name for part in expected) for name in names)
            assert not any("lora" in name or "visual." in name for name in names)
            rows = {
                line.split()[0]: line.split()[1:]
                for line in train.parameter_table(model, vae).splitlines()[1:]
            }
            assert rows["lora"][0] == "0" and int(rows["dit"][0].replace(",", "")) > 0
            count = sum(p.numel() for network in (model, vae) for p in network.parameters())
            assert sum(int(n.replace(",", "")) for n in rows["all"]) == count


def test_native_connectors_train_only_if_some_block_reads_native_tokens():
    for routing_depth, expected in ((1, True), (3, False)):  # of 3 blocks
        model, _ = tiny_model(routing_depth=routing_depth)
        train.choose_trained(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for stream in ("visual", "textual"):
            assert (f"encoder.{stream}_connector.0.weight" in trained) == expected
        assert "encoder.editing_connector.0.weight" in trained


def test_lora_starts_as_the_base_model():
    """B is zero in a new LoRA, so the first forward pass is bit for bit that of the base model."""
    base, _ = tiny_model(lora_rank=0)
    model = rvedit.RVEDiT(tiny_config(), tiny_tokenizer())
    rvedit.initialise(model)
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert lora and all((p == 0).all() == ("lora_B" in name) for name, p in lora.items())
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert set(missing) == lora.keys() and not unexpected
    clip = make_clip(5, 64, 64)
    with torch.no_grad():
        pairs = zip(
            model.encoder([clip], ["make it red"])[:3],
            base.encoder([clip], ["make it red"])[:3],
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_averaged_weights_are_a_running_mean_and_leave_the_others_alone(tmp_path, process_group):
    model, vae = tiny_model()
    run = train.make_run(
        model,
        vae,
        torch.device("cpu"),
        SimpleNamespace(out=tmp_path, muon=0.0, average=0.15, lr=1e-2, sequence_parallel=1, keep=2),
    )
    name, weight = next(iter(run.weights.items()))
    mean = weight.detach().clone()
    for step in range(4):
        for p in run.weights.values():
            p.grad = torch.randn_like(p)
        run.update(1e-2)
        decay = min(0.15, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight.detach()
        run.step += 1
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with run.averaged():
        assert relative_error(weight.detach(), mean) < 1e-6 and not torch.equal(weight, own[name])
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    assert relative_error(run.average[name], mean) < 1e-6


# --- Ranks and resuming ---------------------------------------------------------------------------


def test_two_ranks_train_as_one(alone, pair):
    """The same global batch gives the same losses and weights after ten steps, but for rounding."""
    assert len(log(alone)) == 10 and losses_differ_by(log(pair), log(alone)) < 1e-5
    assert distance(trained(pair), trained(alone)) < 1e-4


def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(alone, tmp_path):
    """From the checkpoint at step 5, with no option but --resume, in as many processes."""
    out = fork_at(alone, 5, tmp_path / "run")
    train.main(["--out", str(out), "--resume"])
    assert [{**line, **timing()} for line in log(out)] == [
        {**line, **timing()} for line in log(alone)
    ]
    actual, expected = trained(out), trained(alone)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def timing():
    return dict(samples_per_s=0, tokens_per_s=0, peak_gb=0)


def test_a_run_of_two_ranks_resumes_on_one(alone, pair, tmp_path):
    out = fork_at(pair, 5, tmp_path / "run")
    train.main(["--out", str(out), "--resume", "--batch", "4"])
    assert losses_differ_by(log(out), log(alone)) < 1e-5
    assert distance(trained(out), trained(alone)) < 1e-4


def test_a_run_leaves_a_model_that_edits_clips_to_look_at_and_a_log(alone, pair):
    for out in (alone, pair):
        model, _ = rvedit.load(out / "model")
        assert model.config.num_editing_tokens == 5
        clips = sorted((out / "validation").glob("*.mp4"))
        assert [clip.name for clip in clips] == [f"step-00000010-{i}.mp4" for i in range(4)]
        assert video.read_video(clips[0]).frames.shape == (5, 64, 3 * 64, 3)
        for line in log(out):
            assert line["loss"] == pytest.approx(line["flow"] + 0.75 * line["align"])
            assert line["peak_gb"] > 0 and line["tokens_per_s"] == pytest.approx(
                8 * line["samples_per_s"]
            )
            bins = [x for x in line["flow_by_t"] if x is not None]
            assert len(line["flow_by_t"]) == 5 and min(bins) <= line["flow"] <= max(bins)


def test_another_batch_keeps_the_samples_of_a_step_or_is_refused(alone, tmp_path, capsys):
    """A step of four samples becomes two passes of two; three do not divide it."""
    out = fork_at(alone, 5, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(out), "--resume", "--batch", "3"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "has 4 samples in an optimiser step" in error
    train.main(["--out", str(out), "--resume", "--batch", "2", "--accumulate", "4"])
    assert "keeps its 4 clips, by --accumulate 2" in capsys.readouterr().err
    assert losses_differ_by(log(out), log(alone)) < 1e-5
    assert distance(trained(out), trained(alone)) < 1e-4


@pytest.mark.parametrize("change", [("--freeze-lora",), ("--routing-depth", "3")])
def test_weights_that_would_not_train_any_more_do_not_fall_back(alone, tmp_path, capsys, change):
    """LoRA, or the connectors of native tokens, which would start again where the run began."""
    out = fork_at(alone, 5, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(out), "--resume", *change])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "holds other weights than these options train" in error


def test_logging_gradients_changes_nothing(start, alone, tmp_path):
    """The run is bit for bit the same, and the lines of every fifth step have both norms."""
    more = ("--steps", 10, "--batch", 4, "--log-gradients", 5)
    train.main(options(start, tmp_path, *more))
    actual, expected = trained(tmp_path), trained(alone)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    logged = [line["step"] for line in log(tmp_path) if "grad_norm_flow" in line]
    assert logged == [5, 10]


def test_the_tokens_of_all_clips_of_a_step_are_counted(tmp_path, process_group):
    """Minibatches need not have the same: clips of a table keep their length and size."""
    model, vae = tiny_model()
    args = train.parse_arguments(["--preset", "toy", "--out", str(tmp_path), "--accumulate", "2"])
    run = train.make_run(model, vae, torch.device("cpu"), args)
    minibatches = [make_batch(model, vae, lengths)[0] for lengths in ((6, 19), (6,))]
    report = train.compute_gradients(run, minibatches, args)
    assert report["tokens"] == 3 * 2 * 2**2  # clips, frames of latents, and their sides


def test_a_run_goes_on_from_the_checkpoint_that_rank_0_sees(
    alone, tmp_path, monkeypatch, process_group
):
    """On a network file system another node may not see the last one yet."""
    newest = finished(alone)[-1]
    out = fork_at(alone, 5, tmp_path / "run")

    def seen_by_rank_0(value):  # its list of checkpoints
        return [newest] if isinstance(value, list) else value

    monkeypatch.setattr(parallel, "from_first_rank", seen_by_rank_0)
    args = train.parse_arguments(["--out", str(out), "--resume"])
    device = torch.device("cpu")
    run = train.make_run(*train.load_model(args, None, device), device, args)
    assert run.step == 10


def test_a_run_is_resumed_if_rank_0_sees_it(alone, start, tmp_path, monkeypatch):
    """On a network file system another node may not see yet that it has begun."""
    out = fork_at(alone, 5, tmp_path / "run")
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "run.json" and exists(path))
    monkeypatch.setattr(train, "check_out", lambda args: None)  # which only rank 0 does
    monkeypatch.setattr(parallel, "from_first_rank", lambda x: True if x is False else x)
    train.main(options(start, out, "--steps", 6, "--batch", 2, "--resume"))
    assert json.loads((out / "run.json").read_text())["options"]["accumulate"] == 2


def test_logged_gradients_are_those_of_the_two_losses(tmp_path, process_group):
    """Their norms against autograd on each loss alone."""
    model, vae = tiny_model()
    batch, _ = make_batch(model, vae)
    args = train.parse_arguments(["--preset", "toy", "--out", str(tmp_path)])
    run = train.make_run(model, vae, torch.device("cpu"), args)
    depth = train.compute_gradients(run, [batch], args)["depth"]
    kept = {name: p.grad.clone() for name, p in run.weights.items()}
    norms = train.norms_by_loss(run, [batch], args)
    assert all(torch.equal(p.grad, kept[name]) for name, p in run.weights.items())

    source, target = (vae.encode(video.to_float(x)) for x in batch[:2])
    t = batch.t.view(-1, 1, 1, 1, 1)
    z_t = (1 - t) * target + t * batch.noise
    contexts = model.contexts(model.encoder.encode(batch.edit_inputs))
    ref_contexts = model.contexts(model.encoder.encode(batch.ref_inputs))
    velocity, features = model.dit(z_t, batch.t, contexts, source, capture=depth)
    ref_features = model.dit.features(z_t, batch.t, ref_contexts, target, depth).detach()
    flow = F.mse_loss(velocity, batch.noise - target)
    align = model.config.align_weight * losses.alignment_loss(features, ref_features, 0.07)
    for loss, name in ((flow, "grad_norm_flow"), (align, "grad_norm_align")):
        parts = gradients_of(loss, run.weights.values())
        expected = math.sqrt(sum(part.double().square().sum() for part in parts))
        assert norms[name] == pytest.approx(expected, rel=1e-4)


def gradients_of(loss, weights):
    parts = torch.autograd.grad(loss, list(weights), retain_graph=True, allow_unused=True)
    return [part for part in parts if part is not None]


@pytest.mark.slow
def test_four_ranks_train_as_one_and_any_number_goes_on(alone, pair, start, tmp_path):
    torchrun(4, *options(start, tmp_path / "four", "--steps", 10, "--batch", 1))
    assert losses_differ_by(log(tmp_path / "four"), log(alone)) < 1e-5
    assert distance(trained(tmp_path / "four"), trained(alone)) < 1e-4
    for former, ranks in (
        (alone, 2),
        (alone, 4),
        (pair, 2),
        (tmp_path / "four", 2),
        (tmp_path / "four", 4),
    ):
        out = fork_at(former, 5, tmp_path / f"{former.name}-{ranks}")
        torchrun(ranks, "--out", str(out), "--resume", "--batch", str(4 // ranks))
        assert losses_differ_by(log(out), log(alone)) < 1e-5
        assert distance(trained(out), trained(alone)) < 1e-4
        if (former, ranks) in ((pair, 2), (tmp_path / "four", 4)):
            actual, expected = trained(out), trained(former)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("on_node", [2, 6])
def test_ranks_that_share_clips_are_of_one_node(on_node, monkeypatch, process_group):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_node))
    with pytest.raises(ValueError, match=f"--sequence-parallel 4 .* node, which is {on_node}"):
        parallel.neighbours(4, torch.device("cpu"))


@pytest.mark.slow
def test_ranks_that_share_clips_train_as_one_and_any_number_goes_on(start, alone, tmp_path):
    """Two ranks with four clips; then each clip on one rank, or on two of four."""
    out = tmp_path / "shared"
    more = ("--steps", 10, "--batch", 4, "--validate-every", 10, "--sequence-parallel", 2)
    torchrun(2, *options(start, out, *more))
    assert losses_differ_by(log(out), log(alone)) < 1e-5
    assert distance(trained(out), trained(alone)) < 1e-4
    clips = sorted((out / "validation").glob("*.mp4"))
    assert [clip.name for clip in clips] == [f"step-00000010-{i}.mp4" for i in range(4)]
    frames = [video.read_video(run / "validation" / clips[3].name).frames for run in (out, alone)]
    # Where the edits differ by a level, H.264 may code a block otherwise.
    off = (frames[0].int() - frames[1].int()).abs().float()
    assert off.mean() < 0.1 and (off > 2).float().mean() < 0.01

    one = fork_at(out, 5, tmp_path / "one")
    train.main(["--out", str(one), "--resume", "--sequence-parallel", "1"])
    four = fork_at(alone, 5, tmp_path / "four")
    torchrun(4, "--out", str(four), "--resume", "--sequence-parallel", "2", "--batch", "1")
    assert json.loads((four / "run.json").read_text())["options"]["accumulate"] == 2
    for resumed in (one, four):
        assert losses_differ_by(log(resumed), log(alone)) < 1e-5
        assert distance(trained(resumed), trained(alone)) < 1e-4
    train.main(["--out", str(four), "--export"])


def two_nodes(start, outs):
    """Two torchruns of two ranks each on this machine, with a folder for each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for number, out in enumerate(outs):
        place = ["--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "2"]
        place += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *place, str(ROOT / "train.py")]
        command += options(start, out, "--steps", 10, "--batch", 1)
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        nodes.append(subprocess.Popen(command, env=ENVIRONMENT, **pipes))
    printed = [node.communicate()[1] for node in nodes]
    return [node.returncode for node in nodes], printed


@pytest.mark.slow
def test_two_nodes_train_as_one_process(start, alone, tmp_path):
    """Sharded inside a node, replicated across the nodes (HSDP); one process goes on alone."""
    codes, printed = two_nodes(start, [tmp_path / "run"] * 2)
    assert codes == [0, 0], printed[0][-3000:]
    assert losses_differ_by(log(tmp_path / "run"), log(alone)) < 1e-5
    assert distance(trained(tmp_path / "run"), trained(alone)) < 1e-4
    out = fork_at(tmp_path / "run", 5, tmp_path / "on")
    train.main(["--out", str(out), "--resume"])
    assert json.loads((out / "run.json").read_text())["options"]["accumulate"] == 4
    assert losses_differ_by(log(out), log(alone)) < 1e-5


@pytest.mark.slow
def test_nodes_that_do_not_share_a_folder_are_refused(start, tmp_path):
    codes, printed = two_nodes(start, [tmp_path / "a", tmp_path / "b"])
    assert 0 not in codes
    assert "does not see the files of rank 0" in printed[0] and "error: " not in printed[1]
    assert not [*tmp_path.glob("*/checkpoints"), *tmp_path.glob("*/.token*")]


# --- Signals, mishaps, mistakes -------------------------------------------------------------------


def during(monkeypatch, step, action):
    """Run `action` in a step (from 1) of a run in this process; it may replace the result."""
    training_step, calls = train.training_step, []

    def step_with_action(*arguments):
        calls.append(1)
        result = training_step(*arguments)
        return result if len(calls) < step else action(result)

    monkeypatch.setattr(train, "training_step", step_with_action)


@pytest.mark.parametrize("kind", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
def test_a_signal_ends_the_run_with_a_checkpoint(start, tmp_path, monkeypatch, kind):
    """Exit code 0, at the end of the step, also if the signal goes to all processes of the job."""
    if kind == signal.SIGHUP:
        signal.signal(kind, signal.SIG_DFL)  # also where these tests run under nohup
    handler = signal.getsignal(kind)

    def send(result):
        workers = [str(worker.pid) for worker in multiprocessing.active_children()]
        # Sent by another process: of a signal from its parent, a worker dies in silence.
        subprocess.run(["kill", f"-{kind.value}", *workers, str(os.getpid())], check=True)
        time.sleep(0.5)  # for a worker to die, if it is to
        return result

    during(monkeypatch, 2, send)
    with pytest.raises(SystemExit) as stop:
        train.main(options(start, tmp_path, "--steps", 9, "--batch", 1, "--workers", 1))
    assert stop.value.code == 0
    assert [folder.name for folder in finished(tmp_path)] == ["step-00000002"]
    assert not (tmp_path / "model").exists() and signal.getsignal(kind) is handler


def test_sigusr1_saves_and_goes_on(start, tmp_path, monkeypatch):
    """SLURM sends it before the time limit of a job."""

    def send(result):
        if len(log(tmp_path)) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)  # for the thread that reads it
        return result

    during(monkeypatch, 2, send)
    train.main(options(start, tmp_path, "--steps", 3, "--batch", 1))
    names = [folder.name for folder in finished(tmp_path)]
    assert names == ["step-00000002", "step-00000003"]
    assert len(log(tmp_path)) == 3


def test_under_nohup_a_run_outlives_its_terminal(start, tmp_path, monkeypatch):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    during(monkeypatch, 1, lambda result: os.kill(os.getpid(), signal.SIGHUP) or result)
    try:
        train.main(options(start, tmp_path, "--steps", 2, "--batch", 1))
    finally:
        signal.signal(signal.SIGHUP, former)
    assert len(log(tmp_path)) == 2


def test_a_log_that_cannot_be_written_does_not_end_the_run(start, tmp_path, monkeypatch):
    """A batch system keeps it in a file, whose disk may be full."""
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        train.main(options(start, tmp_path, "--steps", 2, "--batch", 1))
    assert len(log(tmp_path)) == 2 and (tmp_path / "model").exists()


def test_sigusr1_during_the_imports_is_ignored():
    """SLURM may send it at any time."""
    program = "import cli, os, signal; cli.begin(); os.kill(os.getpid(), signal.SIGUSR1)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


HANGS = """
import parallel
import torch.distributed as dist
parallel.Signals.SECONDS_APART = 0.5
with parallel.Signals():
    print("ready", flush=True)
    dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=True)
"""


def test_a_second_signal_ends_a_run_that_hangs():
    """Here in a library that waits for a rank that never comes, where no Python handler runs."""
    command = [sys.executable, "-c", HANGS]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.5)  # until it hangs
    process.terminate()
    process.terminate()  # torchrun and srun may send the first one twice
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_worker_does_not_outlive_an_error(start, tmp_path):
    """Workers ignore the signal by which Python ends them, so it would wait for them for ever."""
    arguments = options(start, tmp_path, "--workers", 1)
    program = f"import train; train.Run.update = None; train.main({arguments})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=120
    )
    assert done.returncode == 1 and b"'NoneType' object is not callable" in done.stderr
    assert done.stderr.count(b"Traceback") == 1


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    start, tmp_path, monkeypatch, capsys
):
    """Played by the operating system's limit on the length of a file; then the run goes on."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = options(start, tmp_path, "--steps", 3, "--batch", 1, "--save-every", 1)

    def fill(result):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, former[1]))
        return result

    with monkeypatch.context() as patch:
        during(patch, 2, fill)
        try:
            with pytest.raises(SystemExit) as stop:
                train.main(arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
    error = capsys.readouterr().err.splitlines()[-1]
    folders = tmp_path / "checkpoints"
    assert stop.value.code == 2
    assert error.startswith(f"error: {folders / 'step-00000002'} cannot be written: File too large")
    assert "it needs 0.00" in error and f"{folders / 'step-00000001'} is whole: make room" in error
    assert [folder.name for folder in folders.iterdir()] == ["step-00000001"]
    train.main([*arguments, "--resume"])
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3]


def test_a_disk_without_room_for_the_checkpoints_is_noticed_at_the_start(
    start, tmp_path, monkeypatch, capsys
):
    usage = SimpleNamespace(free=1_000_000)  # a checkpoint has half as many bytes, and six are kept
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    train.main(options(start, tmp_path, "--batch", 1, "--steps", 1))
    assert f"note: {tmp_path} has 0.001 GB left, and its checkpoints will take 0.00" in (
        capsys.readouterr().err
    )


def test_a_full_disk_at_the_export_loses_nothing(start, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        with cli.replacing(tmp_path / "model"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rvedit, "save", fail)
        with pytest.raises(SystemExit) as stop:
            train.main(options(start, tmp_path, "--steps", 1, "--batch", 1))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith(f"error: {tmp_path / 'model'} cannot be written: No space left")
    train.main(["--out", str(tmp_path), "--export"])
    assert rvedit.load(tmp_path / "model")


class RunsCommand:
    """Unpickling it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("option", ("--resume", "--export"))
def test_a_checkpoint_runs_no_code_and_one_without_checksums_is_refused(
    alone, tmp_path, capsys, option
):
    """The former format kept its index in `.metadata`, a pickle, which runs what it says."""
    out = fork_at(alone, 10, tmp_path / "run")
    folder = out / "checkpoints/step-00000010"
    (folder / ".metadata").write_bytes(pickle.dumps(RunsCommand(tmp_path / "hacked")))
    train.main(["--out", str(out), option])
    (folder / "checksums.json").unlink()
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(out), option])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith(f"error: {folder}/checksums.json cannot be read as JSON: ")
    assert not (tmp_path / "hacked").exists()


def test_a_flipped_bit_in_a_checkpoint_is_noticed(alone, tmp_path, capsys):
    """In any of its files, at its end, where the numbers are."""
    out = fork_at(alone, 10, tmp_path / "run")
    shards = sorted((out / "checkpoints/step-00000010").glob("*.safetensors"))
    assert len(shards) == 6  # progress, weights, three for AdamW, average
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            train.main(["--out", str(out), "--resume"])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and f"{shard} is damaged or missing" in error
        content[-1] ^= 1
        shard.write_bytes(content)


def test_folders_of_the_user_beside_the_checkpoints_are_left_alone(alone, tmp_path):
    out = fork_at(alone, 5, tmp_path / "run")
    for name in ("step-00000005-good", "step-99999999.bak"):
        shutil.copytree(out / "checkpoints/step-00000005", out / "checkpoints" / name)
    train.main(["--out", str(out), "--resume", "--steps", "6", "--keep", "1"])
    names = sorted(folder.name for folder in (out / "checkpoints").iterdir())
    assert names == ["step-00000005-good", "step-00000006", "step-99999999.bak"]


@pytest.mark.parametrize(
    ("files", "option", "message"),
    [
        ("model log.jsonl run.json", "--steps=9", "model would be replaced"),
        ("model log.jsonl run.json", "--resume", "model would be replaced"),
        ("model", "--steps=9", "model would be replaced"),
        ("log.jsonl run.json", "--steps=9", "holds a run: add --resume"),
        ("log.jsonl run.json", "--resume", "has 10 steps, and their checkpoints are gone"),
        ("log.jsonl run.json", "--resume --save-every=99", "their checkpoints are gone"),
        ("model log.jsonl run.json", "--export", "holds no training checkpoint"),
    ],
)
def test_a_run_whose_checkpoints_are_gone_is_left_alone(
    alone, start, tmp_path, capsys, files, option, message
):
    """Its model is not replaced, and its log is not cut."""
    out = tmp_path / "run"
    lost = {"model", "log.jsonl", "run.json", "checkpoints"} - {*files.split()}
    shutil.copytree(alone, out, ignore=shutil.ignore_patterns(*lost))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as stop:
        train.main(options(start, out, *option.split()))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error
    assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.parametrize(
    ("steps", "more"),  # of 5 to the first checkpoint, which may have failed
    [(3, []), (5, []), (3, ["--save-every", "1"])],
)
def test_a_run_that_ended_before_its_first_checkpoint_begins_again(
    alone, tmp_path, capsys, steps, more
):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(alone / "run.json", out)
    lines = (alone / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:steps]))
    train.main(["--out", str(out), "--resume", "--steps", "2", *more])
    assert "ended before its first checkpoint, and begins again" in capsys.readouterr().err
    assert losses_differ_by(log(out), log(alone)[:2]) == 0


def test_the_folder_of_a_checkpoint_is_made_before_all_ranks_write_to_it(
    start, tmp_path, monkeypatch
):
    """On shared file systems `mkdir` by many ranks at once fails on some, even if it may exist."""
    write, found = parallel.write_shards, []
    monkeypatch.setattr(
        parallel,
        "write_shards",
        lambda folder, state: found.append(folder.is_dir()) or write(folder, state),
    )
    train.main(options(start, tmp_path, "--steps", 1, "--batch", 1))
    assert found == [True]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(alone, tmp_path, capsys):
    out = fork_at(alone, 5, tmp_path / "run")
    folder = out / "checkpoints/step-00000005"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    train.main(["--out", str(out), "--resume", "--steps", "7", "--keep", "1"])
    assert f"note: {folder} stays, it cannot be deleted: " in capsys.readouterr().err
    assert [checkpoint.name[-2:] for checkpoint in finished(out)] == ["05", "07"]


def test_two_runs_cannot_share_a_folder(start, tmp_path, capsys):
    """The lock belongs to the process, so that a kill frees it."""
    program = f"import fcntl; f = open('{tmp_path}/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    program += "print('locked', flush=True); input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", program], **pipes)
    assert other.stdout.readline() == b"locked\n"
    arguments = options(start, tmp_path, "--steps", 1, "--batch", 1)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    other.kill()
    other.wait()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and f"another run writes to {tmp_path}" in error
    # A file server may keep the lock of a machine that has crashed; a new file has none.
    assert error.endswith(f"delete {tmp_path / '.lock'}")
    train.main(arguments)


def test_a_table_without_weights_is_refused(capsys):
    """Its default is the full-size preset, which would otherwise train the small built-in model."""
    with pytest.raises(SystemExit) as stop:
        train.parse_arguments(["--data", "triplets.csv"])
    assert stop.value.code == 2
    assert "needs weights to start from: --checkpoint DIR" in capsys.readouterr().err
    assert train.parse_arguments(["--data", "triplets.csv", "--preset", "toy"]).preset == "toy"


def test_options_survive_run_json(tmp_path):
    """Sizes, flags that are off, paths and numbers: parsed again, they are what they were."""
    words = "--size 5 64 64 --size 9 32 64 --no-compile --freeze-lora --lr 1e-4 --data a.csv"
    words += " --data b.csv c.csv"
    args = train.parse_arguments(
        [*words.split(), "--root", "clips", "--steps", "7", "--preset", "toy", "--checkpoint", "w"]
    )
    options = saved_options(args)
    run = dict(options=options, samples_per_step=1, tables=None)
    (tmp_path / "run.json").write_text(json.dumps(run, default=str))
    again = train.parse_arguments(["--out", str(tmp_path), "--resume"])
    assert saved_options(again) == options
    assert not again.compile and again.size == [[5, 64, 64], [9, 32, 64]]


def test_resume_begins_a_run_where_there_is_none(start, tmp_path, capsys):
    """So a cluster may start a job again by the same command."""
    out = tmp_path / "run"
    arguments = options(start, out, "--batch", 1, "--save-every", 1, "--resume")
    train.main([*arguments, "--steps", "1"])
    assert f"note: {out} holds no run to resume" in capsys.readouterr().err
    train.main([*arguments, "--steps", "2"])
    assert "holds no run" not in capsys.readouterr().err
    assert [line["step"] for line in log(out)] == [1, 2]


def test_a_damaged_run_json_is_found_before_the_run_begins(alone, tmp_path, capsys):
    out = fork_at(alone, 10, tmp_path / "run")
    run = json.loads((out / "run.json").read_text())
    damaged = {
        "half": json.dumps(run)[:50],
        "a list": "[]",
        "no options": json.dumps({**run, "options": None}),
        "no samples": json.dumps({**run, "samples_per_step": "many"}),
        "bad batch": json.dumps({**run, "options": {**run["options"], "batch": "-1"}}),
        "bad size": json.dumps({**run, "options": {**run["options"], "size": 5}}),
        "bad tables": json.dumps({**run, "tables": 3}),
        "unknown": json.dumps({**run, "options": {**run["options"], "wings": 2}}),
        "earlier": json.dumps(run["options"]),
    }
    for text in damaged.values():
        (out / "run.json").write_text(text)
        with pytest.raises(SystemExit) as stop:
            train.main(["--out", str(out), "--resume"])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and error.startswith(f"error: {out / 'run.json'} "), error


def test_an_option_that_was_refused_is_not_taken_up_again(alone, tmp_path, capsys):
    out = fork_at(alone, 10, tmp_path / "run")
    before = (out / "run.json").read_text()
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(out), "--resume", "--size", "5", "64", "60"])
    assert stop.value.code == 2 and "--size 5 64 60: take 4k + 1" in capsys.readouterr().err
    assert (out / "run.json").read_text() == before


def test_a_table_that_has_changed_is_noticed_at_resume(start, tmp_path, capsys):
    file = write_triplets(tmp_path / "data", good=2, bad=0)
    train.main(options(start, tmp_path / "run", "--data", file, "--steps", 1))
    file.write_text(file.read_text().replace("edit number 1", "edit number 2"))
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path / "run"), "--resume", "--steps", "2"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and f"{file} changed since the run began" in error
    shutil.rmtree(tmp_path / "data")
    train.main(["--out", str(tmp_path / "run"), "--export"])  # needs no clips


def test_a_table_that_is_not_there_is_found_before_the_networks_are_read(
    start, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(SystemExit) as stop:
        train.main(options(start, tmp_path / "run", "--data", tmp_path / "none.csv"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "none.csv: no such file" in error


def test_a_run_is_resumed_from_another_folder(start, tmp_path, monkeypatch):
    """With --out, --data and --checkpoint relative to where it began."""
    write_triplets(tmp_path / "data", good=2, bad=0)
    (tmp_path / "model").symlink_to(start)
    monkeypatch.chdir(tmp_path)
    relative = ("--root", "data", "--data", "data/triplets.csv", "--batch", 1, "--steps", 1)
    train.main(options("model", "run", *relative))
    monkeypatch.chdir(tmp_path / "data")
    train.main(["--out", "../run", "--resume", "--steps", "2"])
    assert len(log(tmp_path / "run")) == 2


@pytest.mark.parametrize("name", cli.NUM_TASKS)
def test_tasks_without_torchrun_are_refused(start, tmp_path, monkeypatch, capsys, name):
    """Of Slurm those of a step: a batch script for eight of them is one process."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    train.main(options(start, tmp_path / "run", "--steps", 1, "--batch", 1))
    monkeypatch.setenv(name, "8")
    for main in (train.main, sample.edit, datasets.main):
        with pytest.raises(SystemExit) as stop:
            main([])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: 8 tasks were started")


def test_a_shared_memory_that_is_too_small_is_noticed(start, tmp_path, monkeypatch, capsys):
    """64 MB, as in Docker, for minibatches of 440 MB and their images for the MLLM.

    Before the weights are read.
    """
    monkeypatch.setattr(weights, "fill", None)
    usage = SimpleNamespace(free=64_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    big = ("--size", 81, 704, 1280, "--workers", 2)
    with pytest.raises(SystemExit) as stop:
        train.main(options(start, tmp_path, *big, "--batch", 1, "--steps", 1))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "/dev/shm has 0.064 GB left" in error


def test_workers_that_could_not_make_sockets_are_refused(tmp_path):
    """They would hang for ever: the path of a socket has at most 107 characters."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    program = "import run, types; run.check_workers(None, types.SimpleNamespace(workers=1))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=ENVIRONMENT | {"TMPDIR": str(long)},
        capture_output=True,
        text=True,
    )
    refused = "set TMPDIR to a folder that can be written to and has a short path" in done.stderr
    # Newer versions of Python take /tmp then: so the next check is reached, which wants options.
    assert refused or "has no attribute 'size'" in done.stderr


def poison(result):
    total, flow, align = result
    return total * math.nan, flow * math.nan, align


def test_a_step_that_is_not_finite_changes_nothing(start, tmp_path, monkeypatch, capsys):
    """It is skipped and logged; ten in a row end the run in one line, and its checkpoints stay."""
    during(monkeypatch, 4, poison)
    with pytest.raises(SystemExit) as stop:
        train.main(
            options(start, tmp_path, "--steps", 50, "--batch", 1, "--save-every", 1, "--keep", 2)
        )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.endswith("was not finite in 10 steps in a row")
    lines = log(tmp_path)
    assert [line["skipped"] for line in lines] == [False] * 3 + [True] * 10
    assert lines[3]["loss"] is None and lines[2]["loss"] > 0
    assert [folder.name[-2:] for folder in finished(tmp_path)] == ["11", "12"]

    monkeypatch.undo()
    train.main(options(start, tmp_path, "--resume", "--steps", 14))
    lines = log(tmp_path)
    assert len(lines) == 14 and not lines[13]["skipped"] and math.isfinite(lines[13]["loss"])


def test_one_gradient_that_is_not_finite_costs_one_step(start, tmp_path, monkeypatch):
    """A finite loss with an infinite gradient is skipped too, and the run ends well."""
    factors = itertools.chain([math.inf], itertools.repeat(1))
    during(monkeypatch, 2, lambda result: (result[0] * next(factors), *result[1:]))
    train.main(options(start, tmp_path, "--steps", 4, "--batch", 1))
    assert [line["skipped"] for line in log(tmp_path)] == [False, True, False, False]
    assert all(torch.isfinite(value).all() for value in trained(tmp_path).values())


def write_triplets(folder, good, bad):
    """A CSV of triplets, the last of them of files that are no videos."""
    folder.mkdir()
    for i in range(good + bad):
        for name, seed in (("source", i), ("target", 50 + i)):
            path = folder / f"{name}-{i}.mp4"
            if i < good:
                video.write_video(path, make_clip(9, 80, 96, seed))
            else:
                path.write_bytes(b"no video")
    rows = [f"source-{i}.mp4,target-{i}.mp4,edit number {i},seen" for i in range(good + bad)]
    header = "src_video,tgt_video,prompt,caption"
    (folder / "triplets.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "triplets.csv"


def test_a_broken_clip_is_replaced_and_listed(start, tmp_path, capsys):
    """With the paper's recipe: one epoch by default, recomputed activations, a worker process."""
    file = write_triplets(tmp_path / "data", good=3, bad=1)
    recipe = ("--preset", "wan2.2-ti2v-5b", "--batch", 2, "--workers", 1)
    train.main(options(start, tmp_path / "run", "--data", file, *recipe))
    lines = log(tmp_path / "run")
    assert len(lines) == 2 and sum(line["broken"] for line in lines) == 1
    listed = (tmp_path / "run/broken.txt").read_text()
    assert "note: 1 of 5 clips were broken" in capsys.readouterr().err
    assert listed.startswith("triplet 4: ") and "source-3.mp4" in listed and listed.count("\n") == 1
    assert lines[0]["lr"] == lines[1]["lr"] == 1e-5


@pytest.mark.parametrize("workers", (0, 1))
def test_data_without_one_good_clip_ends_the_run_in_one_line(start, tmp_path, capfd, workers):
    """Also if a worker process finds it: its own traceback is not printed."""
    file = write_triplets(tmp_path / "data", good=0, bad=2)
    with pytest.raises(SystemExit) as stop:
        train.main(options(start, tmp_path / "run", "--data", file, "--workers", workers))
    printed = capfd.readouterr().err
    error = printed.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("error: 20 triplets") and error.endswith("broken.txt")
    assert "Traceback" not in printed


@pytest.mark.parametrize("workers", (0, 1))
def test_clips_that_vanish_cost_no_step(start, tmp_path, monkeypatch, capsys, workers):
    """Nor do they where edits are made to look at. With the clips back, the run goes on."""
    file = write_triplets(tmp_path / "data", good=2, bad=0)
    more = ("--batch", 1, "--steps", 9, "--workers", workers)
    for name, options_of in (("train", ()), ("validate", ("--validate-every", 2))):
        out = tmp_path / name
        with monkeypatch.context() as patch:

            def move(result):
                (tmp_path / "data").rename(tmp_path / "moved")
                patch.undo()
                return result

            during(patch, 2, move)
            with pytest.raises(SystemExit) as stop:
                train.main(options(start, out, "--data", file, *more, *options_of))
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: 20 triplets")
        assert len(log(out)) >= 2 and finished(out)[-1].name == f"step-{len(log(out)):08d}"
        (tmp_path / "moved").rename(tmp_path / "data")
        train.main(["--out", str(out), "--resume", "--steps", str(len(log(out)) + 1)])


FAILS_ON_RANK_1 = """
import sys, cli, data, train

def read(batches, position, step, read=data.Batches.read):
    if cli.RANK == 1 and step == 3:
        raise ValueError("gone")
    return read(batches, position, step)

data.Batches.read = read
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_clips_that_one_rank_cannot_read_end_all_with_a_checkpoint(start, tmp_path):
    """The other one does not wait for it in a collective."""
    (tmp_path / "program.py").write_text(FAILS_ON_RANK_1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", tmp_path / "program.py"]
    command += options(start, tmp_path / "run", "--batch", 1)
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    pipes = dict(capture_output=True, text=True)
    done = subprocess.run(command, env=environment, timeout=300, **pipes)
    assert done.returncode == 1 and done.stderr.count("error: gone") == 1, done.stderr[-3000:]
    assert [folder.name for folder in finished(tmp_path / "run")] == ["step-00000003"]


@pytest.mark.slow
def test_latents_that_were_encoded_before_train_alike(start, tmp_path):
    """`datasets encode` and --latents DIR give the same losses bit for bit."""
    file = write_triplets(tmp_path / "data", good=2, bad=0)
    latents = ("--checkpoint", start, "--size", 5, 64, 64, "--out", tmp_path / "latents")
    datasets.main([str(option) for option in ("encode", file, *latents)])
    common = ("--data", file, "--batch", 1, "--steps", 2)
    train.main(options(start, tmp_path / "a", *common))
    train.main(options(start, tmp_path / "b", *common, "--latents", tmp_path / "latents"))
    losses_of = [[line["loss"] for line in log(tmp_path / name)] for name in "ab"]
    assert losses_of[0] == losses_of[1]


KILLS_A_WORKER = """
import multiprocessing, sys, train

training_step = train.training_step

def kill_first(*arguments):
    for worker in multiprocessing.active_children():
        worker.kill()
    return training_step(*arguments)

train.training_step = kill_first
train.main(sys.argv[1:])
"""


def test_a_worker_that_is_killed_ends_the_run_in_one_line(start, tmp_path):
    """As the kernel does it when memory runs out."""
    arguments = options(start, tmp_path, "--steps", 9, "--batch", 1, "--workers", 1)
    command = [sys.executable, "-c", KILLS_A_WORKER, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: a process that reads clips was killed")


def test_a_table_without_captions_is_refused_unless_instructions_may_stand_in(
    start, tmp_path, monkeypatch, capsys
):
    file = write_triplets(tmp_path / "data", good=1, bad=0)
    file.write_text(file.read_text().replace(",seen", ","))
    more = ("--steps", 1, "--batch", 1, "--accumulate", 2)
    arguments = options(start, tmp_path / "run", "--data", file, *more)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(weights, "fill", None)  # it is found before the weights are read
        train.main(arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "no triplet has a caption" in error
    train.main([*arguments, "--caption-fallback"])
    said = capsys.readouterr().out
    assert "captions: 0% of the 1 triplets have one\n1 steps to go, each of 2 clips\n" in said
    assert len(log(tmp_path / "run")) == 1


def test_more_broken_clips_than_allowed_end_the_run(start, tmp_path, capsys, monkeypatch):
    """Two steps of 20 replace 20: of 60 that were read too many by default, but less than half."""
    file = write_triplets(tmp_path / "data", good=1, bad=1)
    common = ("--data", file, "--batch", 20, "--steps", 2)

    def no_step(model, vae, batch, depth):
        loss = sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
        return loss, torch.zeros(20), loss.detach()

    monkeypatch.setattr(train, "training_step", no_step)  # what counts here is what is read
    train.main(options(start, tmp_path / "half", *common, "--max-bad", 0.5))
    assert [line["broken"] for line in log(tmp_path / "half")] == [10] * 2
    with pytest.raises(SystemExit) as stop:
        train.main(options(start, tmp_path / "few", *common, "--steps", 3))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        stop.value.code == 2
        and error.startswith("error: 20 of 60 clips are broken")
        and "--max-bad" in error
    )
    assert finished(tmp_path / "few")[-1].name == "step-00000002"
    assert len(log(tmp_path / "few")) == 2  # not after 10 of 30: fewer than 20 may be bad luck


def test_mistakes_get_one_line_and_exit_code_2(start, alone, tmp_path, capsys):
    other = tmp_path / "other"
    rvedit.save(other, *tiny_model(num_editing_tokens=4))
    fork_at(alone, 10, tmp_path / "run")
    rvedit.save(tmp_path / "linked", *tiny_model())
    (tmp_path / "link").mkdir()
    (tmp_path / "link/model").symlink_to(tmp_path / "linked")
    (tmp_path / "foreign/model").mkdir(parents=True)
    (tmp_path / "foreign/model/weights.bin").write_text("somebody's")
    cases = {
        "add --resume": options(start, alone),
        "needs --data": ["--preset", "wan2.2-ti2v-5b", "--wan", str(tmp_path)],
        "leave one of them out": ["--world", "small", "--data", "a.csv"],
        "holds other weights": options(other, tmp_path / "run", "--resume"),
        "holds no run": options(start, tmp_path / "empty", "--export"),
        "holds no run to resume": ["--out", str(tmp_path / "empty"), "--resume"],
        "link/model would be replaced": options(start, tmp_path / "link"),
        "neither a checkpoint of ours": options(start, tmp_path / "foreign"),
        "does not exist": options(tmp_path / "nowhere", tmp_path / "empty"),
        "whole number of at least 1": ["--batch", "0"],
        "'1e-9' is not a number from 0.0001": ["--temperature", "1e-9"],  # nor may config.json
        "must divide the number of processes of a node, which is 1": options(
            start, tmp_path / "empty", "--sequence-parallel", "2"
        ),
        "between 0 and the 3 blocks": options(start, tmp_path / "empty", "--routing-depth", "4"),
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: ") and message in error, error


def test_export_writes_the_model_again(alone, tmp_path):
    out = fork_at(alone, 10, tmp_path / "run")
    train.main(["--out", str(out), "--export"])
    assert (out / "run.json").read_text() == (alone / "run.json").read_text()
    actual, expected = trained(out), trained(alone)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def spawn(*arguments, **environment):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, env=ENVIRONMENT | environment, **quiet)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_run_that_resumes(start, tmp_path):
    """SIGKILL ten times, with a checkpoint at every step; then the run ends as if uninterrupted."""
    arguments = options(
        start, tmp_path / "run", "--steps", 400, "--batch", 1, "--save-every", 1, "--keep", 2
    )
    random.seed(0)
    reached = 0
    for number in range(10):
        process = spawn(*arguments, *["--resume"] * (number > 0))
        deadline = time.time() + 120
        while (
            process.poll() is None and time.time() < deadline
        ):  # past the start, into steps and checkpoints
            folders = finished(tmp_path / "run")
            if folders and int(folders[-1].name[-8:]) > reached:
                break
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.0))
        assert process.poll() is None
        process.kill()
        process.wait()
        reached = int(finished(tmp_path / "run")[-1].name[-8:])
        assert len(log(tmp_path / "run")) >= reached
    steps = reached + 3
    train.main([*arguments, "--resume", "--steps", str(steps)])
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, steps + 1))
    assert rvedit.load(tmp_path / "run/model")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_with_exit_code_0(start, tmp_path):
    arguments = options(start, tmp_path, "--steps", 500, "--batch", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2"
        )
    ranks = [spawn(*arguments, RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]
    while not (tmp_path / "log.jsonl").exists() or len(log(tmp_path)) < 3:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.1)
    ranks[1].terminate()
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    assert int(finished(tmp_path)[-1].name[-8:]) == len(log(tmp_path))


@pytest.mark.slow
def test_compiled_blocks_train_alike(start, alone, tmp_path):
    train.main(options(start, tmp_path, "--steps", 10, "--batch", 4, "--compile"))
    assert losses_differ_by(log(tmp_path), log(alone)) < 1e-4


def test_blocks_compute_in_bfloat16_and_weights_stay_float32(start, alone, tmp_path, monkeypatch):
    """--dtype: what GPUs do by default. --resume goes on with it."""
    dtypes_seen = []

    class Spy(train.Run):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            linear = self.model.dit.blocks[0].ffn[0]
            linear.register_forward_hook(lambda _, __, out: dtypes_seen.append(out.dtype))

    monkeypatch.setattr(train, "Run", Spy)
    train.main(options(start, tmp_path, "--steps", 10, "--batch", 4, "--dtype", "bfloat16"))
    assert set(dtypes_seen) == {torch.bfloat16}
    assert 1e-6 < losses_differ_by(log(tmp_path), log(alone)) < 1e-2

    state = finished(tmp_path)[-1].glob("*.safetensors")
    dtypes = {tensor.dtype for file in state for tensor in load_file(file).values()}
    assert dtypes <= {torch.float32, torch.int64}
    assert train.parse_arguments(["--out", str(tmp_path), "--resume"]).dtype == "bfloat16"


@pytest.mark.slow
def test_the_toy_preset_trains_from_random_weights(tmp_path):
    """Without a checkpoint: the preset's settings, the built-in VAE, and an editor drawn anew."""
    arguments = [
        "--steps",
        "2",
        "--batch",
        "2",
        "--size",
        "5",
        "32",
        "32",
        "--workers",
        "0",
        "--out",
    ]
    train.main([*arguments, str(tmp_path / "run")])
    (model, vae), (built_in, built_in_vae) = rvedit.load(tmp_path / "run/model"), rvedit.load()
    assert model.config == dataclasses.replace(rvedit.preset("toy"), vae=built_in.config.vae)
    assert len(log(tmp_path / "run")) == 2
    assert all(
        torch.equal(p, built_in_vae.get_parameter(name)) for name, p in vae.named_parameters()
    )
    fresh, _ = rvedit.scratch(seed=0)
    assert (fresh.dit.head.head.weight == 0).all() and (model.dit.head.head.weight != 0).any()
