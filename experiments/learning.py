"""A training loop that can be stopped and goes on, for the toy's VAE, which train.py only uses.

A run that was stopped and begun again ends with the same weights: each minibatch, its noise and its
learning rate are functions of the step.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import cli

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A GPU waits for its clips unless many processes draw them; on a CPU they would only take turns.
WORKERS = min(16, os.cpu_count() or 1) if DEVICE == "cuda" else 0
REPORT_EVERY = 50  # steps
SAVE_SECONDS = 120


def cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """A learning rate that rises linearly for `warmup` steps and falls by a cosine to 0."""
    rising = min(1.0, (step + 1) / warmup)
    return peak * rising * (1 + math.cos(math.pi * step / steps)) / 2


def learn(
    name: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Dataset,
    steps: int,
    rate: Callable[[int], float],
    loss: Callable[[Any, int], tuple[Tensor, dict[str, float]]],
    state: Path,
) -> None:
    """Train a module, from what the file `state` holds if it exists.

    batches: minibatches by step. rate: the learning rate of a step. loss: of a minibatch and a
    step, the loss to descend and numbers to report, whose means are printed every 50 steps.
    On a GPU it computes in bfloat16 by autocast.
    """
    trained = optimizer.param_groups[0]["params"]
    step = 0
    if state.exists():
        stored = torch.load(state, map_location="cpu", weights_only=True)
        step = stored["step"]
        module.load_state_dict(stored["weights"])
        for weight, moments in zip(trained, stored["moments"], strict=True):
            for key, value in moments.items():
                # AdamW counts its steps on the CPU.
                kept = value if key == "step" else value.to(weight.device)
                optimizer.state[weight][key] = kept

    loader = DataLoader(batches, None, sampler=range(step, steps), num_workers=WORKERS)
    reports: list[dict[str, float]] = []
    started = saved = time.monotonic()
    first = step
    for batch in loader:
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = rate(step)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            value, report = loss(batch, step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1

        reports.append(report)
        if step % REPORT_EVERY == 0 or step == steps:
            seconds = (time.monotonic() - started) / (step - first)
            print(
                f"{name} step {step}/{steps}, {seconds:.2f} s each: {_means(reports)}", flush=True
            )
            reports = []
        if time.monotonic() - saved > SAVE_SECONDS or step == steps:
            stored = {
                "step": step,
                "weights": module.state_dict(),
                "moments": [optimizer.state[weight] for weight in trained],
            }
            with cli.replacing(state) as temporary:
                torch.save(stored, temporary)
            saved = time.monotonic()


def _means(reports: list[dict[str, float]]) -> str:
    parts = []
    for key in reports[0]:
        mean = sum(report[key] for report in reports) / len(reports)
        parts.append(f"{key} {mean:.3f}")
    return ", ".join(parts)
