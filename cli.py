"""What the command lines share, and the options of sample.py: without PyTorch, whose import takes seconds."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line and exit code 2, as for every other mistake, instead of the whole usage."""
        fail(message.removeprefix("argument "))


def fail(message: object) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A parser for numbers of `kind` in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole' if kind is int else 'a'} number {bounds}"
            )
        return value

    return parse


def device_of(text: str) -> Any:
    """A torch.device that is there."""
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # an unknown name; a GPU that is not there
        raise argparse.ArgumentTypeError(
            f"this machine and this PyTorch have no {text!r}; leave it out"
        ) from None
    return device


def edit_parser() -> Parser:
    parser = Parser(description="Edit a video by an instruction.", allow_abbrev=False)
    clip = parser.add_argument_group("the edit")
    clip.add_argument(
        "--video",
        type=Path,
        required=True,
        help="the clip to edit, of any format that FFmpeg reads",
    )
    clip.add_argument("--prompt", required=True, help='what to change, such as "make it snow"')
    clip.add_argument(
        "--out", type=Path, help=".mp4 or .mov; default: NAME_edited.mp4 in this folder"
    )
    clip.add_argument(
        "--compare",
        action="store_true",
        help="also write source and edit side by side, OUT_compare",
    )
    net = parser.add_argument_group("the model")
    net.add_argument(
        "--checkpoint", type=Path, help="a folder of ours or Kiwi-Edit's; default: the built-in toy"
    )
    net.add_argument(
        "--wan", type=Path, help="Wan2.2-TI2V-5B, needed by a training state of Kiwi-Edit's"
    )
    net.add_argument("--qwen", type=Path, help="Qwen2.5-VL-3B-Instruct, likewise")
    net.add_argument(
        "--routing-depth", type=number(int, 0), help="L_s of Eq. 3; default: the checkpoint's"
    )
    run = parser.add_argument_group("sampling")
    run.add_argument(
        "--steps",
        type=number(int, 1),
        help="of Euler's method; default: the checkpoint's, 50 for most",
    )
    run.add_argument(
        "--shift",
        type=number(float, 0.01),
        default=5.0,
        help="of the schedule, towards noise (default 5)",
    )
    run.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the noise (default 0)"
    )
    run.add_argument(
        "--max-pixels",
        type=number(int, 1),
        help="of a frame in the model; default: the checkpoint's",
    )
    run.add_argument("--device", type=device_of, help="default: a GPU if there is one")
    run.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )
    run.add_argument(
        "--offload", action="store_true", help="keep only the network in use on the GPU"
    )
    return parser
