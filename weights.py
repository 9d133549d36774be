"""Checkpoints in and out: Wan2.2 (original and Diffusers layout), Qwen2.5-VL, Kiwi-Edit and our own.

A checkpoint is first opened, which reads names and shapes only, then renamed to our names (those of the original Wan
and of the hub's Qwen), then filled into a model tensor by tensor. So a mistake is found before anything is read, and
memory never holds a second copy. Nothing is unpickled and nothing is fetched. `rvedit.load` puts the pieces together.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

MAX_SHARD_BYTES = 5_000_000_000

# Tensors that we know and do not use: umT5's projection, Qwen's output head (tied, but sometimes stored all the same),
# Kiwi-Edit's image and reference-image paths.
IGNORED = re.compile(
    r"dit\.text_embedding\.|encoder\.qwen\.lm_head\.|kiwi\.(image_queries|ref_queries|ref_connector\.|ref_embedder\.)"
)

NOTHING = r"(?!)"  # the regular expression that no name matches


class Stored(NamedTuple):
    """A tensor on disk: where it is, its shape, and how to read it."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


# --- Opening --------------------------------------------------------------------------------------


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of one .safetensors file, or of a .pth state dict (read without unpickling anything but tensors)."""
    if path.suffix != ".safetensors":
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:  # whose words would be PyTorch's advice to unpickle the file after all
            state = None
        if not isinstance(state, dict) or not all(
            isinstance(value, Tensor) for value in state.values()
        ):
            raise ValueError(
                f"{path} is not a plain state dict of tensors (by PyTorch 1.6 or newer), or is damaged"
            )
        return {
            key: Stored(path, tuple(value.shape), lambda value=value: value)
            for key, value in state.items()
        }
    try:
        file = safe_open(path, framework="pt")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file: {_first_line(error)}"
        ) from None
    return {
        key: Stored(path, shape, lambda key=key: file.get_tensor(key))
        for key, shape in shapes.items()
    }


def open_folder(folder: Path, stem: str) -> dict[str, Stored]:
    """The tensors of `stem`.safetensors, or of the shards that `stem`.safetensors.index.json lists, in a folder."""
    index_path, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if not index_path.is_file():
        if single.is_file():
            return open_file(single)
        pickles = [path.name for path in folder.glob("*.bin")] + [
            path.name for path in folder.glob("*.ckpt")
        ]
        hint = f" ({pickles[0]} is a pickle, which is never loaded)" if pickles else ""
        raise ValueError(f"{folder} has neither {single.name} nor {index_path.name}{hint}")
    index = read_json(index_path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{index_path} has no weight_map of names and files: download it again")
    tensors = {}
    for name in sorted(set(index.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{index_path} lists {name}, which is not there: download it again")
        tensors |= open_file(folder / name)
    wrong = [
        key
        for key in index.keys() | tensors.keys()
        if key not in tensors or index.get(key) != tensors[key].file.name
    ]
    if wrong:
        raise ValueError(
            f"{index_path} and its shards disagree on {len(wrong)} keys, such as {_few(wrong)}"
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def read_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: download it again")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{file} is not a tokenizer: {error}") from None


# --- Filling and writing --------------------------------------------------------------------------


def match(
    module: nn.Module, tensors: dict[str, Stored], source: Path | str, optional: str = NOTHING
) -> list[str]:
    """Compare a module's parameters with what is stored, by name and shape, before anything is read.

    Parameters whose name matches the regular expression `optional` may be absent: their names are returned, for the
    caller to initialise. Any other missing, unexpected or misshapen key raises ValueError, which names `source`.
    """
    parameters = dict(module.named_parameters())
    tensors = {key: tensor for key, tensor in tensors.items() if not IGNORED.match(key)}
    absent = [key for key in parameters if key not in tensors]
    fresh = [key for key in absent if re.search(optional, key)]
    problems = {
        "missing": set(absent) - set(fresh),
        "unexpected": tensors.keys() - parameters.keys(),
        "misshapen": [
            f"{key} {list(tensors[key].shape)} instead of {list(parameter.shape)}"
            for key, parameter in parameters.items()
            if key in tensors and tensors[key].shape != tuple(parameter.shape)
        ],
    }
    found = [f"{len(keys)} {kind} ({_few(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{source} does not fit the model: {'; '.join(found)}")
    return fresh


@torch.no_grad()
def fill(
    module: nn.Module,
    tensors: dict[str, Stored],
    source: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    optional: str = NOTHING,
) -> list[str]:
    """Give a module built on the meta device its weights, tensor by tensor, in the wanted device and dtype.

    A module that FSDP has sharded keeps only this rank's part of each. Arguments, result and errors as in `match`.
    """
    fresh = match(module, tensors, source, optional)
    module.to(dtype).to_empty(device=device)
    parameters = dict(module.named_parameters())
    keys = [key for key in tensors if key in parameters]  # in the order of the files
    for key in tqdm(keys, desc="loading", unit="tensor", disable=None, leave=False):
        assign(parameters[key], tensors[key].read())
    return fresh


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's part of it into a sharded one."""
    if hasattr(
        parameter, "device_mesh"
    ):  # a DTensor, whose import takes as long as half of PyTorch
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(value)


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], texts: dict[str, str]
) -> None:
    """Write our checkpoint: shards of safetensors with an index, and small text files such as config.json.

    Complete or not at all: it grows under a temporary name beside `folder` and takes the place of a former one only
    when it is whole. Only one shard is held in memory beside the tensors, which may be made one at a time.
    """
    temporary, former = (
        folder.with_name(f".{folder.name}.{word}") for word in ("partial", "former")
    )
    _clean_up(folder, temporary, former)  # after an earlier run that was killed
    temporary.mkdir(parents=True)
    try:
        shards = []
        for number, shard in enumerate(_shards(tensors), start=1):
            save_file(shard, temporary / f"{number}", metadata={"format": "pt"})
            shards.append(list(shard))
        weight_map = {}
        for number, keys in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            (temporary / f"{number}").rename(temporary / name)
            weight_map |= dict.fromkeys(keys, name)
        texts = texts | {
            "model.safetensors.index.json": json.dumps({"weight_map": weight_map}, indent=1)
        }
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for shard in temporary.glob(
            "*.safetensors"
        ):  # which the library hides from all but their owner
            shutil.copymode(temporary / "model.safetensors.index.json", shard)
        if folder.exists():
            folder.rename(former)
        temporary.rename(folder)
    finally:
        _clean_up(folder, temporary, former)


def _clean_up(folder: Path, temporary: Path, former: Path) -> None:
    if former.exists() and not folder.exists():  # writing ended between its two renames
        former.rename(folder)
    for leftover in (temporary, former):
        shutil.rmtree(leftover, ignore_errors=True)


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard, size = {}, 0
    for key, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[key], size = tensor, size + tensor.nbytes
    yield shard


def _few(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
