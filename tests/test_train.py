"""Algorithm 1 against a naive implementation, and the run around it: ranks, resuming, mishaps."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
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

import data
import rvedit
import train
import video
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
    names = dict(model.named_parameters()).keys() - {"encoder.image_queries"}  # of stills alone
    assert actual.keys() == expected.keys() == names
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


def test_training_overfits_one_batch():
    """Both terms fall when the same clips, noise and timesteps come again and again."""
    model, vae = tiny_model()
    batch, _ = make_batch(model, vae, t=torch.tensor([0.9, 0.6]))
    latents = itertools.cycle([vae.encode(x.permute(0, 4, 1, 2, 3) / 127.5 - 1) for x in batch[:2]])
    vae = SimpleNamespace(encode=lambda _: next(latents))  # always the same, so only once
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    terms = []
    for step in range(75):
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
    assert changed == trainable


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
    run = train.Run(
        model,
        vae,
        torch.device("cpu"),
        SimpleNamespace(out=tmp_path, muon=0.0, average=0.15, lr=1e-2),
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


# --- Signals, mishaps, mistakes -------------------------------------------------------------------


def during(monkeypatch, step, action):
    """Run `action` in a step (from 1) of a run in this process; it may replace the result."""
    training_step, calls = train.training_step, []

    def step_with_action(*arguments):
        calls.append(1)
        result = training_step(*arguments)
        return result if len(calls) < step else action(result)

    monkeypatch.setattr(train, "training_step", step_with_action)


@pytest.mark.parametrize("kind", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_ends_the_run_with_a_checkpoint(start, tmp_path, monkeypatch, kind):
    """Exit code 0, at the end of the step, also if the signal goes to all processes of the job."""
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
    assert stop.value.code == 0 and [folder.name for folder in train.finished(tmp_path)] == [
        "step-00000002"
    ]
    assert not (tmp_path / "model").exists() and signal.getsignal(kind) is handler


def test_a_worker_does_not_outlive_an_error(start, tmp_path):
    """Workers ignore the signal by which Python ends them, so it would wait for them for ever."""
    arguments = options(start, tmp_path, "--workers", 1)
    program = f"import train; train.Run.update = None; train.main({arguments})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=120
    )
    assert done.returncode == 1 and b"'NoneType' object is not callable" in done.stderr


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
    assert stop.value.code == 2 and error.startswith(
        "error: the checkpoint of this step cannot be written"
    ), error
    assert [folder.name for folder in train.finished(tmp_path)] == ["step-00000001"]
    train.main([*arguments, "--resume"])
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3]


def poison(result):
    total, flow, align = result
    return total * math.nan, flow * math.nan, align


def test_a_step_that_is_not_finite_changes_nothing(start, tmp_path, monkeypatch, capsys):
    """It is skipped and logged; ten in a row end the run with exit code 1, and checkpoints stay."""
    during(monkeypatch, 4, poison)
    with pytest.raises(SystemExit) as stop:
        train.main(
            options(start, tmp_path, "--steps", 50, "--batch", 1, "--save-every", 1, "--keep", 2)
        )
    assert "10 steps in a row" in str(stop.value.code) and "\n" not in stop.value.code
    lines = log(tmp_path)
    assert [line["skipped"] for line in lines] == [False] * 3 + [True] * 10
    assert lines[3]["loss"] is None and lines[2]["loss"] > 0
    assert [folder.name[-2:] for folder in train.finished(tmp_path)] == ["11", "12"]

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
            video.write_video(path, make_clip(9, 80, 96, seed)) if i < good else path.write_bytes(
                b"no video"
            )
    rows = [f"source-{i}.mp4,target-{i}.mp4,edit number {i},seen" for i in range(good + bad)]
    header = "src_video,tgt_video,prompt,caption"
    (folder / "triplets.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "triplets.csv"


def test_a_broken_clip_is_replaced_and_listed(start, tmp_path):
    """With the paper's recipe: one epoch by default, recomputed activations, a worker process."""
    file = write_triplets(tmp_path / "data", good=3, bad=1)
    train.main(options(start, tmp_path / "run", "--data", file, "--batch", 2, "--workers", 1))
    lines = log(tmp_path / "run")
    assert len(lines) == 2 and sum(line["broken"] for line in lines) == 1
    listed = (tmp_path / "run/broken.txt").read_text()
    assert listed.startswith("triplet 4: ") and "source-3.mp4" in listed and listed.count("\n") == 1
    assert lines[0]["lr"] == lines[1]["lr"] == 1e-5


@pytest.mark.parametrize("workers", (0, 1))
def test_data_without_one_good_clip_ends_the_run_in_one_line(start, tmp_path, capsys, workers):
    file = write_triplets(tmp_path / "data", good=0, bad=2)
    with pytest.raises(SystemExit) as stop:
        train.main(options(start, tmp_path / "run", "--data", file, "--workers", workers))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        stop.value.code == 2
        and error.startswith("error: 20 triplets")
        and error.endswith("broken.txt")
    )


def test_more_broken_clips_than_allowed_end_the_run(start, tmp_path, capsys, monkeypatch):
    """Every second one is: 20 of the first 40 are too many by default, but not more than half."""
    file = write_triplets(tmp_path / "data", good=1, bad=1)
    common = ("--data", file, "--batch", 20, "--steps", 2)

    def no_step(model, vae, batch, depth):
        loss = sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
        return loss, torch.zeros(20), loss.detach()

    monkeypatch.setattr(train, "training_step", no_step)  # what counts here is what is read
    train.main(options(start, tmp_path / "half", *common, "--max-bad", 0.5))
    assert [line["broken"] for line in log(tmp_path / "half")] == [10] * 2
    with pytest.raises(SystemExit) as stop:
        train.main(options(start, tmp_path / "few", *common))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        stop.value.code == 2
        and error.startswith("error: 20 of 40 clips are broken")
        and "--max-bad" in error
    )
    assert len(log(tmp_path / "few")) == 2  # not after 10 of 20: fewer than 20 may be bad luck


def test_mistakes_get_one_line_and_exit_code_2(start, alone, tmp_path, capsys):
    other = tmp_path / "other"
    rvedit.save(other, *tiny_model(num_editing_tokens=4))
    shutil.copytree(alone / "checkpoints", tmp_path / "run/checkpoints")
    cases = {
        "add --resume": options(start, alone),
        "needs --data": ["--preset", "wan2.2-ti2v-5b", "--wan", str(tmp_path)],
        "is of another model": options(other, tmp_path / "run", "--resume"),
        "no training checkpoint": options(start, tmp_path / "empty", "--export"),
        "does not exist": options(tmp_path / "nowhere", tmp_path / "empty"),
        "whole number at least 1": ["--batch", "0"],
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
    for _ in range(10):
        process = spawn(*arguments, "--resume")
        deadline = time.time() + 120
        while (
            process.poll() is None and time.time() < deadline
        ):  # past the start, into steps and checkpoints
            folders = train.finished(tmp_path / "run")
            if folders and int(folders[-1].name[-8:]) > reached:
                break
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.0))
        assert process.poll() is None
        process.kill()
        process.wait()
        reached = int(train.finished(tmp_path / "run")[-1].name[-8:])
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
    assert int(train.finished(tmp_path)[-1].name[-8:]) == len(log(tmp_path))


@pytest.mark.slow
def test_compiled_blocks_train_alike(start, alone, tmp_path):
    train.main(options(start, tmp_path, "--steps", 10, "--batch", 4, "--compile"))
    assert losses_differ_by(log(tmp_path), log(alone)) < 1e-4


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
