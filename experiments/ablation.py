"""The paper's Table 2 at the scale of the toy: variants trained from one start, then scored.

All variants start from RUN/start of the recipe, so they share VAE, tokenizer and MLLM, and a DiT
that has learned nothing yet. The same seed means the same clips, noise and depths for all.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch

import cli
import rvedit
import train
from experiments.learning import DEVICE
from experiments.scoring import assess
from run import read_run
from scenes import EVERYTHING

VARIANTS = {  # of Table 2, as options of train.py; the preset has 6 blocks
    "components": {
        "full": [],
        "w/o GRTC (L_s = L)": ["--routing-depth", "6"],
        "w/o RAAA (λ = 0)": ["--align-weight", "0"],
        "w/o both": ["--routing-depth", "6", "--align-weight", "0"],
        # The control that the paper lacks.
        "all tokens everywhere (L_s = 0)": ["--routing-depth", "0"],
    },
    "depth": {f"L_s = {depth}": ["--routing-depth", str(depth)] for depth in range(7)},
    "weight": {
        f"λ = {weight}": ["--align-weight", str(weight)]
        for weight in (0, 0.005, 0.02, 0.05, 0.25, 0.75)
    },
}
SCORED_SEED = 2026


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = cli.number(int, 1)
    parser.add_argument(
        "--group",
        choices=VARIANTS,
        default="components",
        help="a block of Table 2 (default components)",
    )
    parser.add_argument(
        "--seeds", type=whole, default=3, help="trainings of each variant (default 3)"
    )
    parser.add_argument(
        "--clips", type=whole, default=25, help="scored clips of each category (default 25)"
    )
    parser.add_argument(
        "--variant-steps", type=whole, default=2000, help="steps of each training (default 2000)"
    )
    parser.add_argument(
        "--train",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="OPTIONS",
        help="all that follows are options of train.py",
    )


def train_variant(
    run: Path, name: str, variant: list[str], seed: int, steps: int, options: list[str]
) -> Path:
    """Train a variant, or go on with it; return its folder."""
    folder = re.sub(r"[^a-zL0-9.]+", "-", name).strip("-")  # "w/o GRTC (L_s = L)" has a slash
    out = run / "ablate" / f"{folder}-{seed}"
    if not (out / "scores.json").exists():
        recipe = ["--checkpoint", str(run / "start"), "--out", str(out)]
        if (out / "run.json").exists():
            recipe.append("--resume")
        # Edits to look at are not worth their time here, so they never come.
        recipe += ["--steps", str(steps), "--seed", str(seed), "--validate-every", "1000000"]
        train.main([*recipe, *variant, *options])
    return out


def score_variant(out: Path, clips: int) -> dict[str, list[float]]:
    """The mean scores of each category, which the variant's folder keeps."""
    kept = out / "scores.json"
    if not kept.exists():
        model, vae = rvedit.load(out / "model", device=DEVICE)
        frames, height, width = read_run(out, train.RECIPES)["options"]["size"][0]
        scores = {}
        for category, what, values in assess(model, vae, SCORED_SEED, clips, frames, height, width):
            if what == "edit":
                scores[category] = values
        cli.write_text(kept, json.dumps(scores))
    return json.loads(kept.read_text())


def print_table(table: dict[str, list[dict[str, list[float]]]]) -> None:
    """Markdown of the edited share and the PSNR inside the mask, mean ± standard deviation."""
    print("| variant | overall | " + " | ".join(EVERYTHING) + " |")
    print("| --- |" + " ---: |" * (1 + len(EVERYTHING)))
    for name, runs in table.items():
        scores = torch.tensor([[run[category] for category in EVERYTHING] for run in runs])
        overall = scores.mean(1, keepdim=True)
        columns = torch.cat((overall, scores), dim=1)  # (seeds, 1 + categories, numbers of a Score)
        spread, mean = torch.std_mean(columns, dim=0, correction=0)
        cells = []
        for means, deviations in zip(mean.tolist(), spread.tolist(), strict=True):
            inside, _, _, edited = means
            inside_std, _, _, edited_std = deviations
            share = f"{100 * edited:.0f} ± {100 * edited_std:.0f} %"
            cells.append(f"{share}, {inside:.1f} ± {inside_std:.1f} dB")
        print(f"| {name} | " + " | ".join(cells) + " |")


def ablate(args: argparse.Namespace) -> None:
    """Train and score each variant of a group with each seed; print their table.

    What is finished is kept in the run's folder and not done again; an unfinished training goes on.
    """
    if not (args.run / "start").exists():
        raise ValueError(f"{args.run / 'start'} does not exist yet: run `toy` first")
    table: dict[str, list[dict[str, list[float]]]] = {}
    for seed in range(args.seeds):
        for name, variant in VARIANTS[args.group].items():
            out = train_variant(args.run, name, variant, seed, args.variant_steps, args.train)
            table.setdefault(name, []).append(score_variant(out, args.clips))
    print_table(table)
