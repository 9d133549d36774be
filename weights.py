"""Checkpoint files: how they are opened, how a model is filled from them, and how ours are written.

Opening a checkpoint reads only the names and shapes of its tensors. `convert.py` gives the tensors
of public releases our names: those of the original Wan and of the hub's Qwen. Then a model gets its
weights tensor by tensor. So mistakes are found before any weights are read, and memory holds no
second copy. Nothing is unpickled, and nothing is fetched from the network. `rvedit.load` and
`rvedit.save` put the pieces together.
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

import cli

MAX_SHARD_BYTES = 5_000_000_000


class Stored(NamedTuple):
    """A tensor on disk: where it is, its shape, and how to read it."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Opened(NamedTuple):
    """A checkpoint of any layout, opened and brought to our names."""

    fields: dict[str, Any]  # of an RVEDiTConfig
    tokenizer: Tokenizer
    tensors: dict[str, Stored]  # the model's, and the VAE's under "vae."
    may_lack: str | None = None  # parameters that it may lack, as a regular expression


# --- Opening --------------------------------------------------------------------------------------


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors file, or of a PyTorch state dict."""
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_state_dict(path)


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, framework="pt")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        message = _first_line(error)
        raise ValueError(f"{path} is damaged or not a safetensors file: {message}") from None
    return {
        key: Stored(path, shape, lambda key=key: file.get_tensor(key))
        for key, shape in shapes.items()
    }


def _open_state_dict(path: Path) -> dict[str, Stored]:
    """A .pth file. weights_only makes PyTorch unpickle tensors and nothing else."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # its message would be the advice to unpickle the file after all
        state = None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(
            f"{path} is not a plain state dict of tensors (by PyTorch 1.6 or newer), or is damaged"
        )
    return {
        key: Stored(path, tuple(value.shape), lambda value=value: value)
        for key, value in state.items()
    }


def open_folder(folder: Path, stem: str) -> dict[str, Stored]:
    """The tensors of `stem`.safetensors in a folder, or of the shards that its index lists."""
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _open_shards(index)
    if single.is_file():
        return open_file(single)
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".ckpt"))
    hint = f" ({pickles[0]} is a pickle, which is never loaded)" if pickles else ""
    raise ValueError(f"{folder} has neither {single.name} nor {index.name}{hint}")


def _open_shards(index: Path) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of names and files: download it again")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise ValueError(f"{index} lists {name}, which is not there: download it again")
        tensors |= open_file(shard)
    found = {key: tensor.file.name for key, tensor in tensors.items()}
    keys = found.keys() | weight_map.keys()
    wrong = [key for key in keys if found.get(key) != weight_map.get(key)]
    if wrong:
        raise ValueError(
            f"{index} and its shards disagree on {len(wrong)} keys, such as {_few(wrong)}"
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


# --- Filling a model ------------------------------------------------------------------------------


def split(tensors: dict[str, Stored], prefix: str) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """The tensors whose names lack a prefix, and those that have it, which is taken off."""
    without = {key: x for key, x in tensors.items() if not key.startswith(prefix)}
    with_it = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
    return without, with_it


def match(
    module: nn.Module,
    tensors: dict[str, Stored],
    source: Path | str,
    may_lack: str | None = None,
) -> list[str]:
    """Compare a module's parameters with the stored tensors, by name and shape, before any is read.

    Returns the names of parameters that are not stored, which the caller has to initialise. Only
    those may be absent whose names match the regular expression `may_lack`. Any other missing,
    unexpected or misshapen key raises ValueError, which names `source`.
    """
    parameters = dict(module.named_parameters())
    absent = [key for key in parameters if key not in tensors]
    fresh = [key for key in absent if may_lack is not None and re.search(may_lack, key)]
    misshapen = [
        f"{key} {list(tensors[key].shape)} instead of {list(parameter.shape)}"
        for key, parameter in parameters.items()
        if key in tensors and tensors[key].shape != tuple(parameter.shape)
    ]
    problems = {
        "missing": set(absent) - set(fresh),
        "unexpected": tensors.keys() - parameters.keys(),
        "misshapen": misshapen,
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
    may_lack: str | None = None,
) -> list[str]:
    """Give a module on the meta device its weights, tensor by tensor, in a dtype on a device.

    If FSDP has sharded the module, each rank keeps only its part of every tensor. The other
    arguments, the result and the errors are those of `match`.
    """
    fresh = match(module, tensors, source, may_lack)
    module.to(dtype).to_empty(device=device)
    parameters = dict(module.named_parameters())
    for key in tqdm(tensors, desc="loading", unit="tensor", disable=None, leave=False):
        assign(parameters[key], tensors[key].read())
    return fresh


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's part of it into a sharded one."""
    if hasattr(parameter, "device_mesh"):  # a DTensor, whose class takes a second to import
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device, parameter.dtype)
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    parameter.copy_(value)


# --- Writing our checkpoint -----------------------------------------------------------------------


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], texts: dict[str, str]
) -> None:
    """Write shards of safetensors with an index, and text files such as config.json.

    Complete or not at all: a former checkpoint stays in its place until the new one is whole. Only
    one shard is held in memory, so the tensors may be made one at a time.
    """
    _remove_leftovers(folder)
    with cli.replacing(folder) as partial:
        partial.mkdir(parents=True)
        weight_map = _write_shards(partial, tensors)
        texts = texts | {
            "model.safetensors.index.json": json.dumps({"weight_map": weight_map}, indent=1)
        }
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for shard in partial.glob("*.safetensors"):
            # The library makes its files readable for their owner only.
            shutil.copymode(partial / "model.safetensors.index.json", shard)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a run that was killed has written of its checkpoint: gigabytes, perhaps."""
    partial = re.compile(rf"\.partial-\d+-{re.escape(folder.name)}")
    for path in folder.parent.glob(".partial-*"):
        if partial.fullmatch(path.name):
            shutil.rmtree(path)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Write the tensors under file names that count the shards; returns the file of each key."""
    keys_of_shards = []
    for number, shard in enumerate(_shards(tensors), start=1):
        try:
            save_file(shard, folder / f"{number}", metadata={"format": "pt"})
        except SafetensorError as error:  # of the operating system, such as a full disk
            raise OSError(_first_line(error)) from None
        keys_of_shards.append(list(shard))
    weight_map = {}
    for number, keys in enumerate(keys_of_shards, start=1):
        name = f"model-{number:05d}-of-{len(keys_of_shards):05d}.safetensors"
        (folder / f"{number}").rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    return weight_map


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors on the CPU, of at most MAX_SHARD_BYTES each or of a single tensor."""
    shard = {}
    size = 0
    for key, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard = {}
            size = 0
        shard[key] = tensor
        size += tensor.nbytes
    yield shard


def _few(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
