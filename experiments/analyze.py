"""What cross-attention does across the depth of the DiT: §5.3 and Fig. 4 of the paper.

    python analyze.py --plot                                                   # the built-in toy on moving shapes
    python analyze.py --checkpoint DIR --base kiwi-edit-5b --data FILE --plot  # a trained model, as in the paper

By block, as means over clips and over the t of the sampler's schedule, on the z_t of `train.training_step`:
- mass: the share of attention (softmax over the context) that X_e, X_v and X_ℓ get, a mean over heads and positions;
- entropy: of a token's map, the attention it gets at each of the S positions, averaged over heads and normalised to
  sum 1; divided by log S, so that 1 is even and 0 all at one position. A mean over tokens;
- cosine: of the rows of A^(l) in the editing branch (v, ℓ) and the reference branch (v*, ℓ*), a mean over positions;
- divergence: Jensen and Shannon's, in bits, from 0 to 1, of the two branches' maps of an editing token, a mean over K.
Mass and entropy are those of the editing branch, which is the one that edits. A triplet without ℓ* has ℓ in its place.
The paper's "original base model" is --base, the checkpoint that training started from. Without that option it is the
same weights with L_s = L, which shows what routing changes and not what training did.
Letters: B pairs of branches, S positions (tokens of the DiT), N context tokens, K of them X_e, n heads, D head width.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: imports start in the repository, not in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import cli
import data
import rvedit
import sample
from model import Attention, WanDiT
from shapes import EVERYTHING, TOY_EXTENT, ShapesDataset
from vae import WanVAE
from video import to_float

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
CHUNK = 256  # positions whose attention, of n heads, is formed at a time: 0.12 GB in the full model, not 8.9 GB
MEASURES = (
    "mass_editing",
    "mass_visual",
    "mass_textual",
    "entropy",
    "entropy_editing",
    "entropy_visual",
)
MEASURES += (
    "entropy_textual",
    "cosine",
    "divergence",
)  # the masses sum to 1; entropy is of all tokens together

# --- One block ------------------------------------------------------------------------------------


def attention_maps(
    attention: Attention, x: Tensor, context: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The softmax inside `Attention.forward`, averaged over heads: (B, S, N) float32, exactly 0 where masked."""
    heads = (attention.num_heads, -1)
    q = attention.norm_q(attention.q(x)).unflatten(-1, heads)  # (B, S, n, D)
    k = attention.norm_k(attention.k(context)).unflatten(-1, heads).float()  # (B, N, n, D)
    maps = k.new_empty(*x.shape[:2], context.shape[1])
    for part, out in zip(q.split(CHUNK, dim=1), maps.split(CHUNK, dim=1), strict=True):
        logits = torch.einsum("bsnd,btnd->bnst", part.float(), k) / math.sqrt(
            k.shape[-1]
        )  # (B, n, CHUNK, N)
        if mask is not None:
            logits.masked_fill_(~mask[:, None, None], -math.inf)
        out.copy_(logits.softmax(dim=-1).mean(dim=1))
    return maps


def spatial_entropy(maps: Tensor) -> Tensor:
    """(B, S, N) -> (B, N) from 0 to 1; NaN for a token that nothing attends to, such as padding: it has no map."""
    return torch.special.entr(maps / maps.sum(dim=1, keepdim=True)).sum(dim=1) / math.log(
        maps.shape[1]
    )


def jensen_shannon(maps: Tensor, others: Tensor) -> Tensor:
    """Divergence of each token's two maps, (B, S, K) each -> (B, K), from 0 for equal to 1 for disjoint ones."""
    p, q = (x / x.sum(dim=1, keepdim=True) for x in (maps, others))
    mean = ((p + q) / 2).clamp(
        min=torch.finfo(p.dtype).tiny
    )  # where both are 0, so are the terms below
    return (torch.xlogy(p, p / mean) + torch.xlogy(q, q / mean)).sum(dim=1) / (2 * math.log(2))


def measure(maps: Tensor, features: Tensor, streams: tuple[int, int]) -> Tensor:
    """`MEASURES` of a block, (9, B), from (2B, S, N) maps and (2B, S, d) features: first the editing branches.

    streams: where in the context X_v and X_ℓ begin, if it has them; NaN is the entropy of what it has not.
    """
    (edit_maps, ref_maps), (edit_features, ref_features) = maps.chunk(2), features.float().chunk(2)
    masses = [part.sum(dim=2).mean(dim=1) for part in edit_maps.tensor_split(streams, dim=2)]
    entropy = spatial_entropy(edit_maps)  # (B, N)
    entropies = [part.nanmean(dim=1) for part in (entropy, *entropy.tensor_split(streams, dim=1))]
    cosine = F.cosine_similarity(edit_features, ref_features, dim=2).mean(dim=1)
    divergence = jensen_shannon(*(x[:, :, : streams[0]] for x in (edit_maps, ref_maps))).nanmean(
        dim=1
    )
    return torch.stack((*masses, *entropies, cosine, divergence))


# --- All blocks, all clips ------------------------------------------------------------------------


def trace(dit: WanDiT, streams: tuple[int, int], *inputs: Any) -> Tensor:
    """`measure` of every block, (L, 9, B), in one pass over `inputs`: B editing branches, then their references."""
    rows = []

    def record(attention: Attention, arguments: tuple[Any, ...], features: Tensor) -> None:
        rows.append(measure(attention_maps(attention, *arguments), features, streams))

    hooks = [block.cross_attn.register_forward_hook(record) for block in dit.blocks]
    dit(*inputs)
    for hook in hooks:
        hook.remove()
    return torch.stack(rows)


@torch.no_grad()
def analyze(
    model: rvedit.RVEDiT, vae: WanVAE, clips: Dataset, args: argparse.Namespace
) -> dict[str, Any]:
    """Means over clips and t of every measure, by depth, and deviations over clips of their means over t."""
    config, factor, rows = model.config, model.config.spatial_factor, []
    if args.size and any(side % factor for side in args.size[1:]):
        raise ValueError(f"--size: height and width must be multiples of {factor} for this model")
    for index in tqdm(
        range(min(args.clips, len(clips))), desc="analyzing", unit="clip", disable=None, leave=False
    ):
        try:
            clip = clips[index]
            sides = sample.model_size(*clip["target"].shape[1:3], config.max_pixels, factor)
            size = args.size or (config.max_frames, *sides)
            videos = [data.fit_clip(clip[name], *size) for name in ("source", "target")]
        except (ValueError, OSError) as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        condition = model.encoder(
            videos, [clip["instruction"], clip["caption"] or clip["instruction"]]
        )
        contexts, K = model.contexts(condition), condition.editing.shape[1]
        latents = torch.cat(
            [vae.encode(to_float(x[None]).to(DEVICE)) for x in videos]
        )  # VAE(v), VAE(v*)
        noise = sample.initial_noise(latents[1:].shape, args.seed + index).to(DEVICE)
        traces = []
        for t in sample.timesteps(args.timesteps, shift=5.0)[:-1].to(DEVICE):
            z_t = ((1 - t) * latents[1:] + t * noise).expand_as(
                latents
            )  # the same for both branches
            traces.append(
                trace(
                    model.dit,
                    (K, K + condition.visual.shape[1]),
                    z_t,
                    t.expand(2),
                    contexts,
                    latents,
                )
            )
        rows.append(torch.stack(traces).double().mean(dim=0)[..., 0].cpu())
    if not rows:
        raise ValueError("none of the clips can be read")
    values = torch.stack(rows)  # (clips, L, 9)
    if values[..., 0].isnan().any():
        raise ValueError("attention is not a number: the weights of the checkpoint are broken")
    moments = dict(mean=values.mean(dim=0), std=values.std(dim=0, correction=0))
    curves = {name: dict(zip(MEASURES, x.T.tolist(), strict=True)) for name, x in moments.items()}
    return (
        dict(num_blocks=config.dit.num_blocks, routing_depth=config.routing_depth, clips=len(rows))
        | curves
    )


# --- Fig. 4 ---------------------------------------------------------------------------------------

TOKENS = {  # their colours, of Okabe and Ito for the colour-blind, and markers
    "all context tokens": dict(color="#000000", marker="D"),
    "editing $X_e$": dict(color="#0072B2", marker="o"),
    "visual $X_v$": dict(color="#D55E00", marker="s"),
    "textual $X_\\ell$": dict(color="#009E73", marker="^"),
}
PANELS = {  # row by row: the label of the axis, and the measures of the tokens above
    "cross-attention mass": (None, *MEASURES[:3]),
    "cosine similarity of rows of $A^{(l)}$": ("cosine",),
    "spatial entropy / $\\log S$": MEASURES[3:7],
    "JS divergence of $X_e$ maps (bits)": (None, "divergence"),
}


def plot(path: Path, results: dict[str, Any]) -> None:
    """Fig. 4 as a PNG: (a) mass and entropy, (b) cosine and divergence, by depth, with bands of one standard error."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    solid, dashed = (
        dict(linewidth=1.8, markersize=4.5),
        dict(linestyle="--", markersize=7, markerfacecolor="none"),
    )
    lines, depth = dict(model=solid, base=dashed), results["model"]["routing_depth"]
    boundary = dict(color="0.5", linestyle=":", label=f"routing boundary, $L_s = {depth}$")
    figure = Figure(figsize=(9, 5.8), dpi=200, layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (label, measures) in zip(grid.flat, PANELS.items(), strict=True):
        for name, result in results.items():
            for key, look in zip(measures, TOKENS.values(), strict=False):
                if key:
                    mean, std = (torch.tensor(result[moment][key]) for moment in ("mean", "std"))
                    blocks, error = range(1, len(mean) + 1), std / math.sqrt(result["clips"])
                    axes.plot(blocks, mean, **look, **lines[name])
                    axes.fill_between(
                        blocks,
                        mean - error,
                        mean + error,
                        color=look["color"],
                        alpha=0.12,
                        linewidth=0,
                    )
        axes.axvline(depth + 0.5, **boundary)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    grid[0, 0].locator_params(axis="x", integer=True)
    for column, title in zip(
        grid.T, ("(a) Effect of routing", "(b) Agreement of the branches"), strict=True
    ):
        column[0].set_title(title)
        column[1].set_xlabel("block $l$ of the DiT")
    legend = [Line2D([], [], linestyle="", label=label, **look) for label, look in TOKENS.items()]
    legend += [
        Line2D([], [], color="0.3", marker="o", label=name, **lines[name]) for name in results
    ]
    figure.legend(
        handles=[*legend, Line2D([], [], **boundary)],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(path, format="png")


# --- Command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(
        description="Measure cross-attention by depth: Fig. 4 of the paper.", allow_abbrev=False
    )
    whole = cli.number(int, 1)
    parser.add_argument(
        "--checkpoint", type=Path, help="a folder of ours or Kiwi-Edit's; default: the built-in toy"
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="likewise, to compare with; default: the same weights with L_s = L",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=".csv or .jsonl of triplets; default: moving shapes",
    )
    parser.add_argument(
        "--clips",
        type=whole,
        default=20,
        help="the first so many, less the unreadable (default 20)",
    )
    parser.add_argument(
        "--size",
        nargs=3,
        type=whole,
        metavar=tuple("THW"),
        help="to crop to: 4k + 1 frames, pixels",
    )
    parser.add_argument(
        "--timesteps", type=whole, default=5, help="of the sampler's schedule (default 5)"
    )
    parser.add_argument(
        "--seed", type=cli.number(int, 0), default=2026, help="of noise and shapes (default 2026)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/analysis"), help="folder (default runs/analysis)"
    )
    parser.add_argument(
        "--plot", action="store_true", help="also draw OUT/analysis.png; needs matplotlib"
    )
    args = parser.parse_args(argv)
    shapes = (args.seed, args.clips, *(args.size or TOY_EXTENT), EVERYTHING)
    try:
        if args.plot and not importlib.util.find_spec("matplotlib"):
            raise ValueError(
                "--plot needs matplotlib: pip install matplotlib, or leave it out and read analysis.json"
            )
        for folder in filter(None, (args.checkpoint, args.base)):
            rvedit.layout(folder)  # a mistake in the second shows before the work on the first
        clips = data.TripletDataset(args.data) if args.data else ShapesDataset(*shapes)
        args.out.mkdir(parents=True, exist_ok=True)
        model, vae = rvedit.load(args.checkpoint, device=DEVICE, dtype=DTYPE)
        results, partial = {"model": analyze(model, vae, clips, args)}, args.out / "partial"
        if args.base:
            del model, vae  # so that only one of the two is in memory
            model, vae = rvedit.load(args.base, device=DEVICE, dtype=DTYPE)
        else:
            model.config = dataclasses.replace(
                model.config, routing_depth=model.config.dit.num_blocks
            )
        if (
            args.base or model.config.routing_depth > results["model"]["routing_depth"]
        ):  # else it is its own base
            results["base"] = analyze(model, vae, clips, args)
        report = json.dumps({"options": vars(args)} | results, default=str)
        report = json.dumps(
            json.loads(report, parse_constant=lambda _: None), indent=1
        )  # JSON knows no NaN
        partial.write_text(report, encoding="utf-8")
        partial.replace(args.out / "analysis.json")
        if args.plot:
            plot(partial, results)
            partial.replace(args.out / "analysis.png")
    except torch.OutOfMemoryError:
        cli.fail(f"out of memory on {DEVICE}: give --size fewer frames or smaller sides")
    except (ValueError, OSError) as error:
        cli.fail(error)
    print(f"{args.out}: analysis.json" + " and analysis.png" * args.plot)


if __name__ == "__main__":
    main()
