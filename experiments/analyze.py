"""What cross-attention does across the depth of the DiT: §5.3 and Fig. 4 of the paper.

    python -m experiments.analyze --plot                     # the built-in toy on moving shapes
    python -m experiments.analyze --checkpoint DIR --base kiwi-edit-5b --data FILE --plot

Let m_ij, for position i of S and context token j of N, be the attention that i pays to j: the
softmax over the context, averaged over the heads. Column j is the map of token j. Measured are, in
every block, on the z_t of `train.training_step`:

- mass (Fig. 4a): Σ_j m_ij over the tokens of X_e, of X_v or of X_ℓ, a mean over the positions;
- entropy (Fig. 4a): -Σ_i p_i log p_i / log S, where p_i = m_ij / Σ_i m_ij is the map of token j as
  a distribution over positions, a mean over tokens; 1 is an even map, 0 is all at one position;
- cosine (Fig. 4b): of the rows of A^(l) in the editing branch (v, ℓ) and in the reference branch
  (v*, ℓ*), a mean over positions;
- divergence (Fig. 4b): the Jensen-Shannon divergence, in bits from 0 to 1, of an editing token's
  maps p and q in the two branches, a mean over the K tokens. Native tokens have no counterpart in
  the other branch, which reads another clip and another text.

All are means over clips, and over several t of the sampler's schedule. Mass and entropy are those
of the editing branch, which is the one that edits. A triplet without ℓ* has ℓ in its place.

The paper compares with "the original base model". Here that is --base, the checkpoint that training
started from. Without this option it is the same weights with L_s = L, which shows what routing
changes and not what training did.

Shape letters: B pairs of branches, S positions (tokens of the DiT), N context tokens, K of them
X_e, n heads, D width of a head, d width of the DiT, L blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli

if __name__ == "__main__":
    cli.begin()

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import data
import rvedit
import sample
import video
from model import Attention, WanDiT
from rvedit import RVEDiT, RVEDiTConfig
from scenes import WORLDS
from shapes import TOY_EXTENT, ShapesDataset, categories_of
from vae import WanVAE

if torch.cuda.is_available():
    DEVICE, DTYPE = "cuda", torch.bfloat16
else:
    DEVICE, DTYPE = "cpu", torch.float32

# Positions whose attention, of all n heads, is in memory at a time. In the full model the attention
# of all positions would take 8.9 GB, that of 256 takes 0.12 GB.
CHUNK = 256

LIMITS = ("max_frames", "max_pixels", "min_pixels")  # that decide the size of a clip

# The order of what `measure` returns. The three masses sum to 1. "entropy" is of all tokens.
MEASURES = (
    "mass_editing",
    "mass_visual",
    "mass_textual",
    "entropy",
    "entropy_editing",
    "entropy_visual",
    "entropy_textual",
    "cosine",
    "divergence",
)

# --- One block ------------------------------------------------------------------------------------


def attention_maps(
    attention: Attention, x: Tensor, context: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The softmax inside `Attention.forward`, averaged over heads: m_ij, (B, S, N) float32.

    It is exactly 0 where the mask is False.
    """
    heads = (attention.num_heads, -1)
    q = attention.norm_q(attention.q(x)).unflatten(-1, heads)  # (B, S, n, D)
    k = attention.norm_k(attention.k(context)).unflatten(-1, heads)  # (B, N, n, D)
    k = k.float()
    scale = 1 / math.sqrt(k.shape[-1])

    maps = k.new_empty(x.shape[0], x.shape[1], context.shape[1])  # (B, S, N)
    for start in range(0, x.shape[1], CHUNK):
        rows = slice(start, start + CHUNK)
        logits = torch.einsum("bsnd,btnd->bnst", q[:, rows].float(), k) * scale  # (B, n, CHUNK, N)
        if mask is not None:
            logits.masked_fill_(~mask[:, None, None], -math.inf)
        maps[:, rows] = logits.softmax(dim=-1).mean(dim=1)
    return maps


def attention_mass(maps: Tensor, streams: tuple[int, int]) -> list[Tensor]:
    """Fig. 4a: the shares of attention that X_e, X_v and X_ℓ get, (B, S, N) -> (B,) each."""
    masses = []
    for part in maps.tensor_split(streams, dim=2):
        masses.append(part.sum(dim=2).mean(dim=1))
    return masses


def as_distribution(maps: Tensor) -> Tensor:
    """p_i = m_ij / Σ_i m_ij: each token's map (B, S, N) as a distribution over the S positions."""
    return maps / maps.sum(dim=1, keepdim=True)


def spatial_entropy(maps: Tensor) -> Tensor:
    """Fig. 4a: -Σ_i p_i log p_i / log S of each token's map, (B, S, N) -> (B, N), from 0 to 1.

    NaN for a token that nothing attends to, such as padding: it has no map.
    """
    p = as_distribution(maps)
    entropy = torch.special.entr(p).sum(dim=1)  # entr(p) = -p log p, 0 where p is 0
    return entropy / math.log(maps.shape[1])


def jensen_shannon(maps: Tensor, others: Tensor) -> Tensor:
    """Fig. 4b: (KL(p ‖ m) + KL(q ‖ m)) / 2 with m = (p + q) / 2, of each token's two maps, in bits.

    (B, S, K) twice -> (B, K), from 0 for equal maps to 1 for maps that do not overlap.
    """
    p, q = as_distribution(maps), as_distribution(others)
    m = (p + q) / 2
    m = m.clamp(min=torch.finfo(m.dtype).tiny)  # where p and q are both 0, so are their terms
    kl_p = torch.xlogy(p, p / m).sum(dim=1)
    kl_q = torch.xlogy(q, q / m).sum(dim=1)
    return (kl_p + kl_q) / 2 / math.log(2)


def measure(maps: Tensor, features: Tensor, streams: tuple[int, int]) -> Tensor:
    """`MEASURES` of one block, (9, B).

    maps (2B, S, N) and features (2B, S, d): first of the editing branches, then of the reference
    branches. streams: where in the context X_v and X_ℓ begin. The entropy of a stream that the
    block does not read is NaN.
    """
    edit_maps, ref_maps = maps.chunk(2)
    edit_features, ref_features = features.float().chunk(2)

    # Fig. 4a, of the editing branch.
    masses = attention_mass(edit_maps, streams)
    entropy = spatial_entropy(edit_maps)  # (B, N)
    entropies = [entropy.nanmean(dim=1)]
    for part in entropy.tensor_split(streams, dim=1):
        entropies.append(part.nanmean(dim=1))

    # Fig. 4b, between the two branches.
    cosine = F.cosine_similarity(edit_features, ref_features, dim=2).mean(dim=1)
    K = streams[0]
    divergence = jensen_shannon(edit_maps[:, :, :K], ref_maps[:, :, :K])  # (B, K)
    return torch.stack((*masses, *entropies, cosine, divergence.nanmean(dim=1)))


# --- All blocks, all clips ------------------------------------------------------------------------


def trace(dit: WanDiT, streams: tuple[int, int], *inputs: Any) -> Tensor:
    """`measure` of every block, (L, 9, B), in one pass of the DiT.

    inputs: the arguments of `WanDiT.forward` for B editing branches, then their B references.
    """
    blocks = []

    def record(attention: Attention, arguments: tuple[Any, ...], features: Tensor) -> None:
        maps = attention_maps(attention, *arguments)
        blocks.append(measure(maps, features, streams))

    hooks = [block.cross_attn.register_forward_hook(record) for block in dit.blocks]
    dit(*inputs)
    for hook in hooks:
        hook.remove()
    return torch.stack(blocks)


def read_triplet(
    clips: Dataset, index: int, config: RVEDiTConfig, args: argparse.Namespace
) -> data.Triplet:
    """(v, ℓ, v*, ℓ*), cropped as for training to --size, or to the size that sampling would choose.

    Raises ValueError or OSError if a clip cannot be read.
    """
    clip = clips[index]
    size = args.size
    if size is None:
        height, width = clip["target"].shape[1:3]
        sides = sample.size_for(config, height, width)
        size = (config.max_frames, *sides)
    return data.Triplet(
        source=data.fit_clip(clip["source"], *size),
        instruction=clip["instruction"],
        target=data.fit_clip(clip["target"], *size),
        caption=clip["caption"] or clip["instruction"],
    )


def trace_triplet(
    model: RVEDiT, vae: WanVAE, triplet: data.Triplet, seed: int, num_timesteps: int
) -> Tensor:
    """The measures of one triplet, a mean over t: (L, 9)."""
    # Both branches go through the networks as one batch: the editing branch is first.
    clips = [triplet.source, triplet.target]
    condition = model.encoder(clips, [triplet.instruction, triplet.caption])
    contexts = model.contexts(condition)
    source_latents = vae.encode(video.to_float(triplet.source[None]).to(DEVICE))
    target_latents = vae.encode(video.to_float(triplet.target[None]).to(DEVICE))
    latents = torch.cat([source_latents, target_latents])  # (2, C, T', H', W')
    K, N_v = condition.editing.shape[1], condition.visual.shape[1]

    noise = sample.initial_noise(target_latents.shape, seed).to(DEVICE)
    traces = []
    for t in sample.timesteps(num_timesteps, shift=cli.SHIFT)[:-1].to(DEVICE):
        z_t = (1 - t) * target_latents + t * noise
        z_t = z_t.expand_as(latents)  # the same for both branches
        traces.append(trace(model.dit, (K, K + N_v), z_t, t.expand(2), contexts, latents))
    mean = torch.stack(traces).double().mean(dim=0)  # (L, 9, 1)
    return mean[..., 0].cpu()


@torch.no_grad()
def analyze(model: RVEDiT, vae: WanVAE, clips: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """Every measure by depth: its mean over clips and t, and its deviation over clips.

    Clips that cannot be read are skipped; ValueError if none is left.
    """
    config = model.config
    factor = config.spatial_factor
    if args.size and any(side % factor for side in args.size[1:]):
        raise ValueError(f"--size: height and width must be multiples of {factor} for this model")
    rows = []
    indices = range(min(args.clips, len(clips)))
    for index in tqdm(indices, desc="analyzing", unit="clip", disable=None, leave=False):
        try:
            triplet = read_triplet(clips, index, config, args)
        except (ValueError, OSError) as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        rows.append(trace_triplet(model, vae, triplet, args.seed + index, args.timesteps))
    if not rows:
        raise ValueError("none of the clips can be read")
    values = torch.stack(rows)  # (clips, L, 9)
    if values[..., 0].isnan().any():
        raise ValueError("attention is not a number: the weights of the checkpoint are broken")
    return {
        "num_blocks": config.dit.num_blocks,
        "routing_depth": config.routing_depth,
        "clips": len(rows),
        "mean": curves(values.mean(dim=0)),
        "std": curves(values.std(dim=0, correction=0)),
    }


def curves(values: Tensor) -> dict[str, list[float]]:
    """(L, 9) -> for each of MEASURES its L values."""
    return dict(zip(MEASURES, values.T.tolist(), strict=True))


# --- Fig. 4 ---------------------------------------------------------------------------------------

# The kinds of tokens, with the colours of Okabe and Ito, which the colour-blind can tell apart.
TOKENS = {
    "all context tokens": {"color": "#000000", "marker": "D"},
    "editing $X_e$": {"color": "#0072B2", "marker": "o"},
    "visual $X_v$": {"color": "#D55E00", "marker": "s"},
    "textual $X_\\ell$": {"color": "#009E73", "marker": "^"},
}

# Row by row: the label of an axis, and the measure to draw for each kind of tokens, if any.
PANELS = {
    "cross-attention mass": (None, "mass_editing", "mass_visual", "mass_textual"),
    "cosine similarity of rows of $A^{(l)}$": ("cosine", None, None, None),
    "spatial entropy / $\\log S$": (
        "entropy",
        "entropy_editing",
        "entropy_visual",
        "entropy_textual",
    ),
    "JS divergence of $X_e$ maps (bits)": (None, "divergence", None, None),
}

LINES = {
    "model": {"linewidth": 1.8, "markersize": 4.5},
    "base": {"linestyle": "--", "markersize": 7, "markerfacecolor": "none"},
}


def draw_curve(axes: Any, result: dict[str, Any], key: str, look: Any, line: Any) -> None:
    """One measure by depth, in a band of one standard error."""
    mean = torch.tensor(result["mean"][key])
    error = torch.tensor(result["std"][key]) / math.sqrt(result["clips"])
    blocks = range(1, len(mean) + 1)
    axes.plot(blocks, mean, **look, **line)
    band = {"color": look["color"], "alpha": 0.12, "linewidth": 0}
    axes.fill_between(blocks, mean - error, mean + error, **band)


def plot(path: Path, results: dict[str, Any]) -> None:
    """Fig. 4 as a PNG: (a) mass above entropy, (b) cosine above divergence."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    depth = results["model"]["routing_depth"]
    boundary = {"color": "0.5", "linestyle": ":", "label": f"routing boundary, $L_s = {depth}$"}
    figure = Figure(figsize=(9, 5.8), dpi=200, layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (label, measures) in zip(grid.flat, PANELS.items(), strict=True):
        for name, result in results.items():
            for key, look in zip(measures, TOKENS.values(), strict=True):
                if key is not None:
                    draw_curve(axes, result, key, look, LINES[name])
        axes.axvline(depth + 0.5, **boundary)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    grid[0, 0].locator_params(axis="x", integer=True)
    grid[0, 0].set_title("(a) Effect of routing")
    grid[0, 1].set_title("(b) Agreement of the branches")
    grid[1, 0].set_xlabel("block $l$ of the DiT")
    grid[1, 1].set_xlabel("block $l$ of the DiT")

    legend = []
    for label, look in TOKENS.items():
        legend.append(Line2D([], [], linestyle="", label=label, **look))
    for name in results:
        legend.append(Line2D([], [], color="0.3", marker="o", label=name, **LINES[name]))
    legend.append(Line2D([], [], **boundary))
    figure.legend(handles=legend, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, format="png")


# --- Command line ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m experiments.analyze",
        description="Measure cross-attention by depth: Fig. 4 of the paper.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    whole = cli.number(int, 1)
    add(
        "--checkpoint",
        type=Path,
        help="a folder of ours or Kiwi-Edit's; default: the built-in toy",
    )
    add(
        "--base",
        type=Path,
        help="a checkpoint to compare with; default: the same weights with L_s = L",
    )
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help="a table of triplets; default: moving shapes",
    )
    add("--world", choices=WORLDS, help="of the moving shapes, without --data (default all)")
    add("--clips", type=whole, default=20, help="how many, from the first on (default 20)")
    add(
        "--size",
        nargs=3,
        type=whole,
        metavar=("T", "H", "W"),
        help="crop clips to 4k + 1 frames, height and width; default: as sampling would",
    )
    add("--timesteps", type=whole, default=5, help="of the sampler's schedule (default 5)")
    add("--seed", type=cli.number(int, 0), default=2026, help="of noise and shapes (default 2026)")
    add("--out", type=Path, default=Path("runs/analysis"), help="folder (default runs/analysis)")
    add("--plot", action="store_true", help="also draw OUT/analysis.png; needs matplotlib")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for mistakes that can be seen before the work begins."""
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError(
            "--plot needs matplotlib: pip install matplotlib, or leave it out and read "
            "analysis.json"
        )
    if args.data and args.world:
        raise ValueError("--world is about moving shapes, and --data has other clips: choose one")
    for folder in (args.checkpoint, args.base):
        if folder is not None:
            rvedit.layout(folder)


def without_nan(value: Any) -> Any:
    """The value with None, JSON's null, in the place of every NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The analysis of the model, and of its base if that is another."""
    if args.data:
        clips = data.TripletDataset(args.data)
    else:
        size = args.size or TOY_EXTENT
        world = args.world or "all"
        clips = ShapesDataset(args.seed, args.clips, *size, categories_of(world), world=world)
    args.out.mkdir(parents=True, exist_ok=True)

    model, vae = rvedit.load(args.checkpoint, device=DEVICE, dtype=DTYPE)
    if args.data:
        clips.max_frames = args.size[0] if args.size else model.config.max_frames
        with contextlib.suppress(ValueError, OSError):  # said when the clip's turn comes
            frames = (clip["source"][0] for clip in clips)  # read only if they are asked for
            sample.note_foreign_clip(args.checkpoint, model, vae, frames)
    results = {"model": analyze(model, vae, clips, args)}
    L = model.config.dit.num_blocks
    if args.base:
        # Training for larger clips raises these limits: the base is measured at the same size.
        limits = {name: getattr(model.config, name) for name in LIMITS}
        del model, vae  # so that only one of the two is in memory
        model, vae = rvedit.load(args.base, device=DEVICE, dtype=DTYPE)
        model.config = dataclasses.replace(model.config, **limits)
    elif model.config.routing_depth < L:
        model.config = dataclasses.replace(model.config, routing_depth=L)
    else:  # it is its own base
        return results
    results["base"] = analyze(model, vae, clips, args)
    return results


@cli.guarded
@cli.memory_advice("give --size fewer frames or smaller sides")
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check(args)
    results = run(args)
    report = {"options": vars(args)} | without_nan(results)
    cli.write_text(args.out / "analysis.json", json.dumps(report, indent=1, default=str))
    written = "analysis.json"
    if args.plot:
        with cli.replacing(args.out / "analysis.png") as temporary:
            plot(temporary, results)
        written += " and analysis.png"
    print(f"{args.out}: {written}")


if __name__ == "__main__":
    main()
