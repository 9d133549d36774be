"""Ask a model behind an OpenAI-compatible server about many clips: what judges and captioner share.

Needs httpx2, which speaks to servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from tqdm import tqdm

import cli
from data import one_line
from mllm import evenly_spaced

# Seconds of waiting after each failed try. After the last one there is nothing to wait for.
PAUSES = (2, 4, 8, 16, 32, 0)
# Questions in a row without an answer after all tries, until the server is given up: 3 minutes of 8
# workers, which a server that starts anew may take.
IN_A_ROW = 24
LONGEST_PAUSE = 60  # seconds, whatever a server's Retry-After says
TIMEOUT = 300  # seconds of one try, from connecting to the last byte read
LONGEST_REPLY = 2**23  # bytes: far more than an answer, and less than would fill the memory
LONGEST_SIDE, QUALITY = 512, 85  # of the frames that are sent, in pixels and of JPEG (App. D.3)
# What servers say of an account that will not get an answer to any question.
HOPELESS = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "arrearage")
HOPELESS += ("invalid_api_key", "invalid api key", "incorrect api key", "api key not valid")
MODERATED = ("moderation", "flagged", "content policy", "content_policy")  # and of one question
WHOLE = ("stop", "eos", "eos_token", "stop_sequence", "end_turn")  # reasons of whole answers
# What reading a text raises that is no JSON of the expected form.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_answered: set[tuple[str, str]] = set()  # addresses and models that have answered
_unanswered: Counter[tuple[str, str]] = Counter()  # questions in a row that they did not answer


class Refused(cli.Stop):
    """The server will not answer other questions either."""


class _Again(Exception):
    """There is no answer yet, but another try may help, after some seconds."""

    def __init__(self, message: str, seconds: float = 0) -> None:
        super().__init__(message)
        self.seconds = seconds


class Answer(str):
    """The text of an answer, which also knows why the server ended it (None: it did not say)."""

    finish_reason: str | None = None

    @property
    def is_cut_off(self) -> bool:
        """Whether the server ended it before the model did: "8" may be the start of "80"."""
        # Words for a whole answer are few and known; for others, each server has its own.
        return self.finish_reason is not None and str(self.finish_reason).lower() not in WHOLE


# --- What is sent ---------------------------------------------------------------------------------


def image_parts(frames: torch.Tensor, number: int) -> list[dict]:
    """Turn `number` evenly spaced frames of a clip, uint8 (T, H, W, 3), into parts of a message."""
    parts = []
    for frame in frames[evenly_spaced(len(frames), number)].numpy():
        image = Image.fromarray(frame)
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # shrinks only, and keeps the aspect
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        url = f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _endpoint(url: str) -> str:
    """The address of a server's chats, which may have been given as that of the server."""
    import httpx2

    with contextlib.suppress(httpx2.InvalidURL):
        parts = httpx2.URL(url)
        is_server = parts.scheme in ("http", "https") and parts.host and (parts.port or 0) < 2**16
        has_secret = parts.userinfo or parts.fragment
        if is_server and not has_secret and re.fullmatch(rb"(api-version=[\w.-]+)?", parts.query):
            path = parts.path.rstrip("/").removesuffix("/chat/completions")
            return str(parts.copy_with(path=f"{path}/chat/completions"))
    # It is not repeated, as it may hold a secret.
    raise Refused("--url must be a server's address without a key, as http://localhost:8000/v1")


def _read_key(name: str) -> str:
    """The API key in the environment variable `name`; "none" if the default one is not set."""
    key = os.environ.get(name) or ("none" if name == "OPENAI_API_KEY" else "")
    if not re.fullmatch("[!-~]+", key):
        # `name` may be the key itself, given by mistake: it is not repeated.
        raise Refused("the API key's environment variable is unset, or holds a space or odd letter")
    return key


def _hide(text: str, key: str) -> str:
    """The text without the key. Words such as "EMPTY" are no secrets."""
    return re.sub(f"(?i){re.escape(key)}", "[key]", text) if len(key) > 5 else text


# --- One question ---------------------------------------------------------------------------------


async def _exchange(url: str, question: dict, key: str) -> tuple[int, Mapping[str, str], str]:
    """Send a question; returns status, headers and text of the reply, whatever its status is.

    Raises _Again if there is no whole reply, Refused if there can be none.
    """
    import httpx2

    try:
        # By default it follows no redirect, where the key would go to another server.
        headers = {"Authorization": f"Bearer {key}"}
        if "api-version=" in url:  # Azure, which takes only tokens there, and keys here
            headers["api-key"] = key
        client = httpx2.AsyncClient(timeout=None, headers=headers)
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
        raise Refused(f"the environment's proxy or SSL_CERT_FILE cannot be used: {error}") from None
    text = b""
    try:
        # Of the whole exchange: httpx2's own timeout starts again with each byte that drips in.
        async with asyncio.timeout(TIMEOUT), client:
            async with client.stream("POST", url, json=question) as reply:
                async for part in reply.aiter_bytes():
                    text += part
                    if len(text) > LONGEST_REPLY:
                        raise _Again(f"the reply is longer than {LONGEST_REPLY} bytes")
    except TimeoutError:
        raise _Again(f"no whole answer within {TIMEOUT} s") from None
    except (httpx2.HTTPError, OSError) as error:  # unreachable, cut off, or against the protocol
        raise _Again(str(error) or repr(error)) from error
    return reply.status_code, reply.headers, text.decode(errors="replace")


def _answer(choice: dict) -> Answer:
    parts = choice["message"].get("content") or []
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    # Parts of other types, such as thoughts, are no part of the answer.
    answer = Answer("".join(part["text"] for part in parts if part["type"] == "text"))
    answer.finish_reason = choice.get("finish_reason")
    return answer


def _read(status: int, headers: Mapping[str, str], text: str, has_answered: bool) -> Answer:
    """The answer in a reply: raises _Again, ValueError if another try does not help, or Refused.

    has_answered: whether the server gave an answer to another question before.
    """
    error = None
    with contextlib.suppress(*MALFORMED):
        body = json.loads(text)
        body = body[0] if isinstance(body, list) else body  # Google's errors
        error = body.get("error") or body["choices"][0].get("error")  # the latter came midway
        if status == 200 and not error:
            return _answer(body["choices"][0])
    details = error if isinstance(error, dict) else {"message": error}
    if status == 200 and re.fullmatch("[45][0-9][0-9]", str(details.get("code"))):
        status = int(details["code"])  # the true one
    said = f"{status}: {details.get('message') or text}"

    # Whose fault it is decides whether asking again, or about something else, can help.
    if 300 <= status < 400:
        place = headers.get("Location", "nowhere")
        raise Refused(f"{status}: a redirect to {place} is refused, the key would go there")
    if status in (401, 402, 404, 405, 407) or any(words in text.lower() for words in HOPELESS):
        raise Refused(said)
    is_forbidden = status == 403 or (status == 200 and error)
    if is_forbidden and not has_answered and not any(words in text.lower() for words in MODERATED):
        raise Refused(said)
    if status in (200, 408, 429) or status >= 500:  # 200: an overloaded server, perhaps
        wait = headers.get("Retry-After", "")  # seconds, or a date, which is rare
        raise _Again(said, min(int(wait), LONGEST_PAUSE) if wait.isdecimal() else 0)
    raise ValueError(said)


async def ask(
    url: str, model: str, content: str | list, system: str = "", key: str = "OPENAI_API_KEY"
) -> Answer:
    """Ask one question, in one turn of a chat, and return the text of the answer.

    url: of the server, such as http://localhost:8000/v1. content: the question, a text or a list of
    parts. system: the system prompt, if there is one. key: the environment variable with the key,
    which is in no message and no answer.
    Raises ValueError if there is no answer to this question, Refused if there is none to any.
    """
    try:
        import httpx2
    except ImportError as error:
        raise Refused(f"{error}, which asks judges and captioners: pip install httpx2") from None

    address = _endpoint(url)
    secret = _read_key(key)
    messages = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    # Some servers stream an answer in pieces unless they are asked not to.
    question = {"model": model, "messages": messages, "stream": False}
    asked = (address, model)
    for tries, pause in enumerate(PAUSES, 1):
        try:
            status, headers, text = await _exchange(address, question, secret)
            answer = _read(status, headers, _hide(text, secret), asked in _answered)
            _answered.add(asked)
            _unanswered[asked] = 0
            return answer
        except (_Again, ValueError, Refused) as error:
            failure = error
        unreachable = isinstance(failure.__cause__, (httpx2.ConnectError, httpx2.ProxyError))
        is_absent = unreachable and asked not in _answered  # one that has may start anew
        said = one_line(_hide(f"{address}: {failure}", secret))
        if tries == len(PAUSES):
            _unanswered[asked] += 1
        is_broken = (is_absent and tries == 3) or _unanswered[asked] >= IN_A_ROW
        if isinstance(failure, Refused) or is_broken:
            hint = f"check the server, its address (most end in /v1), the model, {key} and no_proxy"
            raise Refused(f"{said}; {hint}")
        if isinstance(failure, ValueError) or tries == len(PAUSES):
            raise ValueError(said)
        await asyncio.sleep(max(pause, failure.seconds))


# --- Many questions -------------------------------------------------------------------------------


def results(path: Path) -> dict[str, dict]:
    """Read what `run` has written so far, by key.

    A last line that a kill cut off does not count; ValueError if another line is damaged.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row.pop("key")] = row
        except MALFORMED as error:
            raise ValueError(f"{path}: line {number} is damaged, remove it: {error}") from None
    return rows


def _lock(path: Path) -> IO[str]:
    """Keep other processes from writing `path`, by a file beside it, as `path` is replaced."""
    file = open(path.with_name(f".{path.name}.lock"), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise cli.Stop(f"{path}: another process writes it; wait for its end") from None
    return file


def run(
    path: Path,
    jobs: dict[str, object],
    work: Callable[[object], Awaitable[dict]],
    workers: int = 8,
    again: Collection[str] = (),
) -> dict[str, str]:
    """Do `work` on the jobs whose keys `path` lacks, or which are in `again`, some at a time.

    Each result is appended to `path` at once, as the line {"key": key, **result} of JSON. Returns,
    by key, why jobs failed (ValueError, OSError): the next run tries them again. Any other
    exception ends the run.
    """
    failed: dict[str, str] = {}

    def line(key: str, result: dict) -> str:
        return json.dumps({"key": key, **result}) + "\n"

    async def worker() -> None:
        for key in keys:  # one iterator, which all workers take from
            try:
                result = await work(jobs[key])
            except (ValueError, OSError) as error:
                failed[key] = str(error)
                continue
            file.write(line(key, result))
            file.flush()

    async def all_workers() -> None:
        await asyncio.gather(*(worker() for _ in range(workers)))

    with _lock(path):
        kept = {key: row for key, row in results(path).items() if key not in again}
        # Without the others, and without a last line that a kill cut off.
        cli.write_text(path, "".join(line(key, row) for key, row in kept.items()))
        todo = sorted(jobs.keys() - kept.keys())  # sorted, so that runs are alike
        try:
            with open(path, "a") as file, tqdm(todo, disable=None) as bar:
                keys = iter(bar)
                asyncio.run(all_workers())
        except OSError as error:
            raise cli.Stop(f"{path} cannot be written: {error.strerror}") from None
    return failed
