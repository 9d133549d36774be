"""Many questions about clips to a model behind an OpenAI-compatible server: what judges and captioner share."""

from __future__ import annotations

import io
import json
import os
import time
from base64 import b64encode
from collections.abc import Callable
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

PAUSES, TIMEOUT = (2, 4, 8, 16, 32, 0), 300  # seconds after each failed try; seconds of one


class Refused(RuntimeError):
    """No other question would be answered either."""


def image_parts(frames: torch.Tensor, number: int) -> list[dict]:
    """`number` evenly spaced frames of uint8 (T, H, W, 3), or all T if fewer, as JPEG parts of a message."""
    try:
        from PIL import Image
    except ImportError as error:
        raise Refused(f"{error}, which turns frames into JPEG: pip install pillow") from None

    parts = []
    for frame in frames[
        torch.linspace(0, len(frames) - 1, min(number, len(frames))).round().long()
    ].numpy():
        image, file = Image.fromarray(frame), io.BytesIO()
        image.thumbnail((512, 512))  # only ever shrinks
        image.save(file, "JPEG", quality=85)
        url = f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def ask(
    url: str, model: str, content: str | list, system: str = "", key: str = "OPENAI_API_KEY"
) -> str:
    """One chat turn; the environment variable `key` holds the API key. Without an answer: ValueError, or Refused."""
    messages = [{"role": "system", "content": system}] * bool(system) + [
        {"role": "user", "content": content}
    ]
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get(key, 'none')}",
    }
    body, url = (
        json.dumps({"model": model, "messages": messages}).encode(),
        f"{url.rstrip('/')}/chat/completions",
    )
    for tries, pause in enumerate(PAUSES, 1):
        try:
            with urlopen(Request(url, body, headers), timeout=TIMEOUT) as reply:
                return "" + (json.load(reply)["choices"][0]["message"]["content"] or "")
        except (
            OSError,
            HTTPException,
            ValueError,
            LookupError,
            TypeError,
        ) as error:  # cut off, or no text
            code = getattr(error, "code", 500)  # of HTTP
            failure = f"{url}: {error!r} {error.read(300) if hasattr(error, 'read') else ''}"
            if code in (401, 403, 404) or (type(error) is URLError and tries == 3):
                raise Refused(
                    f"{failure}; check the server, its address, the model's name and {key}"
                ) from None
            if code < 500 and code not in (408, 429):
                break
        time.sleep(pause)
    raise ValueError(failure)


def results(path: Path) -> dict[str, dict]:
    """What `run` has written so far, by key; a last line that a kill cut off does not count, others must be whole."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        return {row.pop("key"): row for row in map(json.loads, lines)}
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} has a line that is damaged, remove it: {error}") from None


def run(
    path: Path, jobs: dict[str, object], work: Callable[[object], dict], workers: int = 8
) -> dict[str, str]:
    """`work`, in threads, on the jobs whose keys `path` lacks; append {"key": key, **result} to it as JSON lines.

    Returns, by key, why jobs failed (ValueError, OSError): the next run tries them again. Other exceptions end the run.
    """

    def attempt(key: str) -> None:
        try:
            line = json.dumps({"key": key, **work(jobs[key])}) + "\n"
        except (ValueError, OSError, HTTPException) as error:
            failed[key] = str(error)
        else:
            file.write(line.encode())  # at once and unbuffered: lines of several threads do not mix

    todo, failed = sorted(jobs.keys() - results(path).keys()), {}
    with (
        open(path, "ab", buffering=0) as file,
        ThreadPool(workers) as pool,
    ):  # daemons: Ctrl-C does not wait for them
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        for _ in tqdm(pool.imap_unordered(attempt, todo), total=len(todo), disable=None):
            pass
    return failed
