"""The paper's Table 2 at the scale of the toy: variants of the method, trained and then compared.

They live in the small world of scenes.py, on stills. As in the paper, VAE and MLLM come trained:
they are the built-in checkpoint's. The DiT, half as wide as the toy's, and the connectors start
from random weights, and all but the VAE is trained. The same seed means the same clips, noise and
depths for all variants, so they are compared seed by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

import cli
import rvedit
import train
from experiments.scoring import DEVICE, assess
from scenes import CATEGORIES

VARIANTS = {  # as options of train.py. The others of a group are compared with its first one.
    "components": {
        "full": [],
        "w/o GRTC (L_s = L)": ["--routing-depth", "6"],
        "w/o RAAA (λ = 0)": ["--align-weight", "0"],
        "w/o both": ["--routing-depth", "6", "--align-weight", "0"],
        # The control that the paper lacks.
        "all tokens everywhere (L_s = 0)": ["--routing-depth", "0"],
    },
    "depth": {  # without alignment, beside which routing hardly matters at this scale (RESULTS.md)
        f"L_s = {depth}": ["--routing-depth", str(depth), "--align-weight", "0"]
        for depth in (3, 0, 1, 2, 4, 5, 6)
    },
    "weight": {  # the toy's λ is 0.005, the paper's 0.75
        f"λ = {weight}": ["--align-weight", str(weight)]
        for weight in (0, 0.005, 0.02, 0.05, 0.25, 0.75)
    },
}
SIZE = (1, 64, 64)  # T, H, W of all clips
SCORED_SEED = 2026
# The two-sided 95 % quantile of Student's t by the number of seeds, for confidence intervals.
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = cli.number(int, 1)
    parser.add_argument(
        "--group",
        choices=VARIANTS,
        default="components",
        help="a block of Table 2: the parts of the method, L_s at λ = 0, or λ (default components)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        choices=STUDENT_T,
        default=5,
        help="trainings of each variant (default 5)",
    )
    parser.add_argument(
        "--clips", type=whole, default=100, help="scored clips of each category (default 100)"
    )
    parser.add_argument(
        "--variant-steps", type=whole, default=1200, help="steps of each training (default 1200)"
    )
    parser.add_argument(
        "--train",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="OPTIONS",
        help="all that follows are options of train.py",
    )


def write_start(start: Path) -> None:
    """What all variants start from: a random DiT, beside the built-in checkpoint's MLLM and VAE."""
    built_in, vae = rvedit.load()
    dit = dataclasses.replace(rvedit.preset("toy").dit, dim=128, ffn_dim=384, num_heads=4)
    # All clips have one size, so nothing is scaled to a size that is known better.
    config = dataclasses.replace(built_in.config, dit=dit, min_pixels=0)
    model = rvedit.RVEDiT(config, built_in.encoder.tokenizer)
    rvedit.initialise(model)
    mllm = built_in.encoder.state_dict()
    # The connectors lead to a DiT of another width, so they stay as they were drawn.
    mllm = {name: weight for name, weight in mllm.items() if "connector" not in name}
    model.encoder.load_state_dict(mllm, strict=False)
    start.parent.mkdir(parents=True, exist_ok=True)
    rvedit.save(start, model, vae)


def train_variant(start: Path, out: Path, seed: int, steps: int, options: list[str]) -> None:
    """Train a variant in the folder `out`, or go on with it."""
    recipe = ["--checkpoint", str(start), "--out", str(out), "--world", "small"]
    recipe += ["--size", *map(str, SIZE)]
    if (out / "run.json").exists():
        recipe.append("--resume")
    # Edits to look at are not worth their time here, so they never come.
    recipe += ["--steps", str(steps), "--seed", str(seed), "--validate-every", "1000000"]
    recipe += ["--timestep-shift", "15", "--log-gradients", "100"]
    train.main([*recipe, *options])


def score_variant(out: Path, clips: int) -> dict[str, list[float]]:
    """The mean scores of each category."""
    model, vae = rvedit.load(out / "model", device=DEVICE)
    rows = assess(model, vae, SCORED_SEED, clips, SIZE, categories=CATEGORIES, world="small")
    return {category: values for category, what, values in rows if what == "edit"}


def scores_of(
    start: Path, out: Path, seed: int, steps: int, clips: int, options: list[str]
) -> dict[str, list[float]]:
    """Train and score a variant, unless its folder has its scores.

    ValueError if they are those of another training or of other clips.
    """
    made_by = [steps, clips, *options]
    file = out / "scores.json"
    if not file.exists():
        train_variant(start, out, seed, steps, options)
        scores = score_variant(out, clips)
        cli.write_text(file, json.dumps({"made_by": made_by, "scores": scores}))
    kept = json.loads(file.read_text())
    if kept.get("made_by") != made_by:
        raise ValueError(f"{file} is of other steps, clips or options; choose another --run")
    return kept["scores"]


def gradient_norms(out: Path) -> tuple[float, float]:
    """Of L_fm and of λ·L_align: medians over the second half of a run's log."""
    rows = []
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "grad_norm_flow" in row:
            rows.append((row["grad_norm_flow"], row["grad_norm_align"]))
    if not rows:
        return math.nan, math.nan
    flow, align = torch.tensor(rows[len(rows) // 2 :]).median(dim=0).values.tolist()
    return flow, align


def table_of(runs: list[dict[str, list[float]]]) -> Tensor:
    """Share that is edited, in percent, and PSNR inside the mask: (seeds, 1 + categories, 2)."""
    scores = torch.tensor([[run[category] for category in CATEGORIES] for run in runs])
    inside, edited = scores[..., 0], 100 * scores[..., 3]
    numbers = torch.stack((edited, inside), dim=-1)  # (seeds, categories, 2)
    overall = numbers.mean(dim=1, keepdim=True)
    return torch.cat((overall, numbers), dim=1)


def print_tables(runs: dict[str, list[dict[str, list[float]]]]) -> None:
    """Two tables in Markdown: each variant, and what it differs by from the first.

    Means over the seeds, with 95 % confidence intervals of the differences seed by seed.
    """
    columns = " | ".join(("overall", *CATEGORIES))
    head = f"| variant | {columns} |\n| --- |" + " ---: |" * (1 + len(CATEGORIES))
    tables = {name: table_of(scores) for name, scores in runs.items()}
    print(head)
    for name, table in tables.items():
        cells = [f"{edited:.0f} %, {inside:.1f} dB" for edited, inside in table.mean(0).tolist()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    first, *others = tables
    print(f"\nminus {first}, seed by seed\n\n{head}")
    for name in others:
        difference = tables[name] - tables[first]  # (seeds, 1 + categories, 2)
        deviation, mean = torch.std_mean(difference, dim=0)
        seeds = len(difference)
        half = STUDENT_T[seeds] * deviation / math.sqrt(seeds)
        cells = []
        for (edited, inside), (edited_half, inside_half) in zip(
            mean.tolist(), half.tolist(), strict=True
        ):
            cells.append(
                f"{edited:+.0f} ± {edited_half:.0f} %, {inside:+.2f} ± {inside_half:.2f} dB"
            )
        print(f"| {name} | " + " | ".join(cells) + " |")


def ablate(args: argparse.Namespace) -> None:
    """Train and score each variant of a group with each seed; print their tables.

    What is finished is kept in the run's folder and not done again; an unfinished training goes on.
    """
    start = args.run / "ablate" / "start"
    if not start.exists():
        write_start(start)
    runs: dict[str, list[dict[str, list[float]]]] = {}
    norms: dict[str, list[tuple[float, float]]] = {}
    for seed in range(args.seeds):
        for name, variant in VARIANTS[args.group].items():
            folder = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")  # "w/o both" has a slash
            out = start.with_name(f"{folder}-{seed}")
            options = [*variant, *args.train]
            scores = scores_of(start, out, seed, args.variant_steps, args.clips, options)
            runs.setdefault(name, []).append(scores)
            norms.setdefault(name, []).append(gradient_norms(out))
    print_tables(runs)
    print("\nNorms of the gradients of L_fm and of λ L_align, medians over the second half:")
    for name, of_seeds in norms.items():
        flow, align = torch.tensor(of_seeds).mean(0).tolist()
        print(f"{name}: {flow:.3g}, {align:.3g}")
