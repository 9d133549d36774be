"""Ask a model behind an OpenAI-compatible server about many clips: what judges and captioner share.

Needs Pillow, which turns frames into JPEG.
"""

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
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

import cli

PAUSES = (2, 4, 8, 16, 32, 0)  # seconds of waiting after each failed try
TIMEOUT = 300  # seconds of one try
LONGEST_SIDE, QUALITY = 512, 85  # of the frames that are sent, in pixels and of JPEG (App. D.3)


class Refused(cli.Stop):
    """The server will not answer other questions either."""


# --- One question ---------------------------------------------------------------------------------


def image_parts(frames: torch.Tensor, number: int) -> list[dict]:
    """Turn `number` evenly spaced frames, or all if there are fewer, into JPEG parts of a message.

    frames: uint8 (T, H, W, 3).
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise Refused(f"{error}, which turns frames into JPEG: pip install pillow") from None

    number = min(number, len(frames))
    index = torch.linspace(0, len(frames) - 1, number).round().long()
    parts = []
    for frame in frames[index].numpy():
        image = Image.fromarray(frame)
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # shrinks only, and keeps the aspect
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        url = f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def ask(
    url: str, model: str, content: str | list, system: str = "", key: str = "OPENAI_API_KEY"
) -> str:
    """Ask one question, in one turn of a chat, and return the text of the answer.

    url: of the server, such as http://localhost:8000/v1. content: the question, a text or a list of
    parts. system: the system prompt, if there is one. key: the environment variable with the key.
    Raises ValueError if there is no answer to this question, Refused if there is none to any.
    """
    messages = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    body = json.dumps({"model": model, "messages": messages}).encode()
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get(key, 'none')}",
    }
    url = f"{url.rstrip('/')}/chat/completions"
    for tries, pause in enumerate(PAUSES, 1):
        try:
            with urlopen(Request(url, body, headers), timeout=TIMEOUT) as reply:
                answer = json.load(reply)["choices"][0]["message"]["content"]
            return "" + (answer or "")  # a TypeError if it is no text
        except HTTPError as error:
            failure = f"{url}: {error!r} {error.read(300)!r}"
            refused = error.code in (401, 403, 404)
            hopeless = error.code < 500 and error.code not in (408, 429)
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            # The server cannot be reached, its reply is cut off, or it is no answer.
            failure = f"{url}: {error!r}"
            refused = type(error) is URLError and tries == 3
            hopeless = False
        if refused:
            raise Refused(
                f"{failure}; check the server, its address, the model's name and {key}"
            ) from None
        if hopeless:
            break
        time.sleep(pause)
    raise ValueError(failure)


# --- Many questions -------------------------------------------------------------------------------


def results(path: Path) -> dict[str, dict]:
    """Read what `run` has written so far, by key.

    A last line that a kill cut off does not count; ValueError if another line is damaged.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = {}
    try:
        for line in lines:
            row = json.loads(line)
            rows[row.pop("key")] = row
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} has a line that is damaged, remove it: {error}") from None
    return rows


def run(
    path: Path, jobs: dict[str, object], work: Callable[[object], dict], workers: int = 8
) -> dict[str, str]:
    """Do `work`, in threads, on the jobs whose keys `path` lacks.

    Each result is appended to `path` at once, as the line {"key": key, **result} of JSON. Returns,
    by key, why jobs failed (ValueError, OSError): the next run tries them again. Any other
    exception ends the run.
    """
    failed: dict[str, str] = {}

    def attempt(key: str) -> None:
        try:
            result = work(jobs[key])
        except (ValueError, OSError) as error:
            failed[key] = str(error)
            return
        # One unbuffered write for each line: lines of several threads do not mix.
        file.write((json.dumps({"key": key, **result}) + "\n").encode())

    todo = sorted(jobs.keys() - results(path).keys())
    # The pool's threads are daemons: Ctrl-C does not wait for their answers.
    with open(path, "ab", buffering=0) as file, ThreadPool(workers) as pool:
        file.truncate(path.read_bytes().rfind(b"\n") + 1)  # removes a line that a kill cut off
        for _ in tqdm(pool.imap_unordered(attempt, todo), total=len(todo), disable=None):
            pass
    return failed
