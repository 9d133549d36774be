"""Ask a model behind an OpenAI-compatible server about many clips: what judges and captioner share.

Needs Pillow, which turns frames into JPEG.
"""

from __future__ import annotations

import contextlib
import email.utils
import fcntl
import io
import json
import os
import re
import socket
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse, HTTPSConnection
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    Request,
    build_opener,
    getproxies,
    proxy_bypass,
)

import torch
from tqdm import tqdm

import cli
from mllm import evenly_spaced

# Seconds of waiting after each failed try. After the last one there is nothing to wait for.
PAUSES = (2, 4, 8, 16, 32, 0)
LONGEST_PAUSE = 60  # seconds, whatever a server's Retry-After says
TIMEOUT = 300  # seconds of one try, from the first byte sent to the last byte read
LONGEST_REPLY = 2**23  # bytes: far more than an answer, and less than would fill the memory
LONGEST_SIDE, QUALITY = 512, 85  # of the frames that are sent, in pixels and of JPEG (App. D.3)
# What servers say of an account that will not get an answer to any question.
HOPELESS = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
HOPELESS += ("invalid_api_key", "invalid api key", "incorrect api key", "api key not valid")
MODERATED = ("moderation", "flagged", "content policy", "content_policy")  # and of one question
WHOLE = (None, "stop", "eos", "eos_token", "stop_sequence", "end_turn")  # reasons of whole answers
_answered: set[tuple[str, str, str]] = set()  # addresses, models and keys that have had an answer


class Refused(cli.Stop):
    """The server will not answer other questions either."""


class Answer(str):
    """The text of an answer, which also knows why the server ended it (None: it did not say)."""

    finish_reason: str | None = None

    @property
    def is_cut_off(self) -> bool:
        """Whether the server ended it before the model did: "8" may be the start of "80"."""
        # Words for a whole answer are few and known; for others, each server has its own.
        reason = self.finish_reason
        return (reason.lower() if isinstance(reason, str) else reason) not in WHOLE


# --- The exchange with the server -----------------------------------------------------------------


class _Watchdog:
    """Closes the connection when the time is up.

    The timeout of a socket starts again with each operation: a server that sends a byte now and
    then, or "100 Continue" for ever, would never meet it.
    """

    def __init__(self, seconds: float) -> None:
        self.sockets: list[socket.socket] = []
        self.expired = False
        self.timer = threading.Timer(seconds, self.close)
        self.timer.daemon = True

    def watch(self, connection: socket.socket) -> None:
        self.sockets.append(connection.dup())  # stays valid when TLS takes the first one over
        if self.expired:  # while this connection was being made
            self.close()

    def close(self) -> None:
        self.expired = True
        for connection in self.sockets:
            # shutdown, unlike close, also ends a read that waits in another thread.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> _Watchdog:
        self.timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()
        self.timer.join()  # so that it closes nothing below, where the number may be another file's
        for connection in self.sockets:
            connection.close()


class _Connection(HTTPConnection):
    watchdog: _Watchdog

    def connect(self) -> None:
        super().connect()
        self.watchdog.watch(self.sock)


class _TLSConnection(HTTPSConnection, _Connection):
    """HTTPSConnection.connect calls that of _Connection, and then starts TLS."""


def _watched(
    kind: type[_Connection], watchdog: _Watchdog, *args: Any, **kwargs: Any
) -> _Connection:
    connection = kind(*args, **kwargs)
    connection.watchdog = watchdog
    return connection


class _HTTPHandler(HTTPHandler):
    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(partial(_watched, _Connection, request.watchdog), request)


class _HTTPSHandler(HTTPSHandler):
    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(partial(_watched, _TLSConnection, request.watchdog), request)


class _NoRedirects(HTTPRedirectHandler):
    """The key would follow a redirect to another host. 301 and the like become HTTPErrors."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _exchange(request: Request) -> tuple[int, HTTPMessage, bytes]:
    """Send a request; returns status, headers and body of the reply, whatever its status is.

    Raises OSError or HTTPException if there is no whole reply, or none within TIMEOUT.
    """
    # Proxies of the environment stay in use: build_opener adds its other handlers by itself.
    opener = build_opener(_HTTPHandler, _HTTPSHandler, _NoRedirects)
    with _Watchdog(TIMEOUT) as request.watchdog:
        try:
            try:
                reply = opener.open(request, timeout=TIMEOUT)
            except HTTPError as error:
                reply = error  # which is a reply, too
            with reply:
                body = reply.read(LONGEST_REPLY + 1)
        except Exception as error:
            # Whichever of the two clocks rings first: the watchdog's, or the socket's own.
            if request.watchdog.expired or isinstance(error, TimeoutError):
                raise TimeoutError(f"no whole answer within {TIMEOUT} s") from None
            raise
        if request.watchdog.expired:  # or it looks like the regular end of a reply
            raise TimeoutError(f"no whole answer within {TIMEOUT} s")
    if body.startswith(b"\x1f\x8b"):  # gzip, which some proxies send unasked
        try:
            body = zlib.decompressobj(wbits=31).decompress(body, LONGEST_REPLY + 1)
        except zlib.error as error:
            raise OSError(f"the reply is damaged: {error}") from None
    if len(body) > LONGEST_REPLY:
        raise OSError(f"the reply is longer than {LONGEST_REPLY} bytes")
    return reply.status, reply.headers, body


# --- What a reply says ----------------------------------------------------------------------------


def _parse(body: bytes) -> Any:
    body = re.sub(rb"\A(?:\s*:[^\n]*\n)+", b"", body)  # ": OPENROUTER PROCESSING" while one waits
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _text(content: object) -> str:
    """The text of a message's content: nothing, a text, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        # Parts of other types, such as thoughts, are no part of the answer.
        parts = [part for part in parts if part.get("type", "text") in ("text", "output_text")]
        return "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise TypeError("its content is no text")
    return content


def _error(body: bytes) -> object:
    """What the server says about a failure, or None if it says nothing in the usual form."""
    try:
        reply = _parse(body)
        reply = reply[0] if isinstance(reply, list) else reply  # some servers send a list
        return None if reply.get("choices") else reply["error"]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _said(body: bytes) -> str:
    """The words of the server in a reply that is no answer."""
    error = _error(body)
    return json.dumps(error, ensure_ascii=False) if error else body.decode("utf-8", "replace")


def _answer(body: bytes) -> Answer:
    """The answer in a reply; ValueError if it holds none."""
    try:
        choices = _parse(body)["choices"]
        if choices == []:  # a model that thought until its tokens were used up
            choices = [{"message": {}, "finish_reason": "length"}]
        choice = choices[0]
        if choice.get("error"):
            raise ValueError("an error came in the middle")
        answer = Answer(_text(choice["message"].get("content")))
        answer.finish_reason = choice.get("finish_reason")
        return answer
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the reply is no answer ({error!r}): {_said(body)}") from None


def _retry_after(headers: HTTPMessage) -> float:
    """The seconds that the server asks us to wait, at most LONGEST_PAUSE; 0 if it does not ask."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0
    return min(seconds, LONGEST_PAUSE) if seconds > 0 else 0


# --- Address and key ------------------------------------------------------------------------------


def _check_url(url: str) -> None:
    """Refuse what is no address, and what may hold a secret. It is not repeated in messages."""
    problem = "--url is not the address of a server, such as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is no number
        raise Refused(problem) from None
    if "@" in url:
        raise Refused(
            "--url holds a user name or password: put the key into an environment variable"
        )
    if not valid or not re.fullmatch("[!-~]+", url):
        raise Refused(problem)
    if parts.fragment or not re.fullmatch(r"(?:api-version=[\w.-]+)?", parts.query):
        raise Refused("--url has text behind ? or #: put a key into an environment variable")


def _endpoint(url: str) -> str:
    """The address of a server's chats, which may have been given as that of the server."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return parts._replace(path=f"{path}/chat/completions").geturl()


def _by_proxy(url: str) -> str:
    """The environment's proxy on the way to a server, to name in messages; "" if there is none."""
    parts = urlsplit(url)
    if parts.scheme not in getproxies() or proxy_bypass(parts.netloc):
        return ""
    return f" by the proxy in {parts.scheme}_proxy (no_proxy={parts.hostname} goes without)"


def _read_key(name: str) -> str:
    """The API key in the environment variable `name`; "none" if the default one is not set."""
    if name not in os.environ and name != "OPENAI_API_KEY":
        # `name` may be the key itself, given by mistake: it is not repeated.
        raise Refused("--key is not the name of an environment variable that is set")
    key = os.environ.get(name) or "none"
    if not re.fullmatch("[!-~]+", key):
        raise Refused(
            f"the API key in {name} holds a space, a line end or a letter that is not ASCII"
        )
    return key


def _hide(text: str, key: str) -> str:
    """The text without the key, however it is escaped. Words such as "EMPTY" are no secrets."""
    if len(key) < 6:
        return text
    # A server may quote the key in JSON, in Python's way, or as part of an address.
    for form in {key, json.dumps(key)[1:-1], repr(key)[1:-1], quote(key, safe="")}:
        text = re.sub(re.escape(form), "[key]", text, flags=re.IGNORECASE)
    return text


def _one_line(text: str) -> str:
    """The start of a text in one line that a terminal can show."""
    line = " ".join(text.split())[:400]
    return "".join(c for c in line if c.isprintable())


# --- One question ---------------------------------------------------------------------------------


def image_parts(frames: torch.Tensor, number: int) -> list[dict]:
    """Turn `number` evenly spaced frames, or all if there are fewer, into JPEG parts of a message.

    frames: uint8 (T, H, W, 3).
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise Refused(f"{error}, which turns frames into JPEG: pip install pillow") from None

    parts = []
    for frame in frames[evenly_spaced(len(frames), number)].numpy():
        image = Image.fromarray(frame)
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # shrinks only, and keeps the aspect
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        url = f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


class _Again(Exception):
    """There is no answer yet; another try may help, after some seconds."""

    def __init__(self, message: str, seconds: float = 0) -> None:
        super().__init__(message)
        self.seconds = seconds


def _ask_once(request: Request, has_answered: bool) -> Answer:
    """One try: raises _Again, ValueError if another does not help, Refused if none ever does.

    has_answered: whether the server gave an answer to another question before.
    """
    try:
        status, headers, body = _exchange(request)
    except (OSError, HTTPException) as error:  # unreachable, too slow, too long or cut off
        reason = error.reason if isinstance(error, URLError) else error
        raise _Again(str(reason) or repr(reason)) from error
    error = _error(body)
    said = f"{status}: {_said(body)}"
    if status == 200 and error:  # the true status may be inside
        code = str(error.get("code")) if isinstance(error, dict) else ""
        status = int(code) if re.fullmatch("[45][0-9][0-9]", code) else status
    # From here on by kind of status: whose fault it is decides whether asking again can help.
    if 300 <= status < 400:
        place = headers.get("Location", "nowhere")
        raise Refused(f"{status}: a redirect to {place} is refused, the key would go there")
    if status == 403 and (has_answered or any(words in said.lower() for words in MODERATED)):
        raise ValueError(said)  # this question alone is refused
    if status in (401, 402, 403, 404) or error and any(words in said.lower() for words in HOPELESS):
        raise Refused(said)
    if status == 200 and error and not has_answered:
        raise Refused(f"{said}; most addresses end in /v1")
    if status >= 500 or status in (408, 429):
        raise _Again(said, _retry_after(headers))
    if status != 200:
        raise ValueError(said)
    try:
        return _answer(body)
    except ValueError as error:  # status 200 and no answer: an overloaded server, perhaps
        raise _Again(str(error)) from None


def ask(
    url: str, model: str, content: str | list, system: str = "", key: str = "OPENAI_API_KEY"
) -> Answer:
    """Ask one question, in one turn of a chat, and return the text of the answer.

    url: of the server, such as http://localhost:8000/v1. content: the question, a text or a list of
    parts. system: the system prompt, if there is one. key: the environment variable with the key,
    which is in no message and no answer.
    Raises ValueError if there is no answer to this question, Refused if there is none to any.
    """
    _check_url(url)
    secret = _read_key(key)
    url = _endpoint(url)
    messages = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    body = json.dumps({"model": model, "messages": messages}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {secret}"}

    def told(error: Exception) -> str:
        return _one_line(_hide(f"{url}{_by_proxy(url)}: {error}", secret))

    def refusal(error: Exception) -> Refused:
        hint = f"check the server, its address, the model's name and {key}"
        return Refused(f"{told(error)}; {hint}")

    asked = (url, model, secret)
    for tries, pause in enumerate(PAUSES, 1):
        try:
            answer = _ask_once(Request(url, body, headers), asked in _answered)
            _answered.add(asked)
            hidden = Answer(_hide(answer, secret))
            hidden.finish_reason = answer.finish_reason
            return hidden
        except _Again as again:
            if tries == 3 and isinstance(again.__cause__, URLError):
                raise refusal(again) from None  # the server is not there
            failure = told(again)
            if tries < len(PAUSES):
                time.sleep(max(pause, again.seconds))
        except ValueError as error:
            raise ValueError(told(error)) from None
        except Refused as error:
            raise refusal(error) from None
    raise ValueError(failure)


# --- Many questions -------------------------------------------------------------------------------


def results(path: Path) -> dict[str, dict]:
    """Read what `run` has written so far, by key.

    A last line that a kill cut off does not count; ValueError if another line is damaged.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = _parse(line)
            rows[row.pop("key")] = row
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path} has a line that is damaged, remove line {number}: {error}"
            ) from None
    return rows


def _forget(path: Path, keys: Collection[str]) -> None:
    """Remove the results of these keys."""
    rows = results(path)
    lines = [json.dumps({"key": key, **row}) for key, row in rows.items() if key not in keys]
    if len(lines) < len(rows):
        cli.write_text(path, "".join(f"{line}\n" for line in lines))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing a file: what one of them replaces, another would lose."""
    # A file beside it is locked, which stays: the file itself may be replaced meanwhile.
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise cli.Stop(f"{path}: another process writes it; wait for its end") from None
        yield


def run(
    path: Path,
    jobs: dict[str, object],
    work: Callable[[object], dict],
    workers: int = 8,
    again: Collection[str] = (),
) -> dict[str, str]:
    """Do `work`, in threads, on the jobs whose keys `path` lacks, or which are in `again`.

    Each result is appended to `path` at once, as the line {"key": key, **result} of JSON. Returns,
    by key, why jobs failed (ValueError, OSError): the next run tries them again. Any other
    exception ends the run.
    """
    failed: dict[str, str] = {}
    writing = threading.Lock()

    def attempt(key: str) -> None:
        try:
            result = work(jobs[key])
        except (ValueError, OSError) as error:
            failed[key] = str(error)
            return
        line = (json.dumps({"key": key, **result}) + "\n").encode()
        with writing:  # one line at a time
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(line)
            except OSError as error:
                raise cli.Stop(f"{path} cannot be written: {error.strerror}") from None
            if written < len(line):  # a disk that is full takes the beginning
                file.truncate(end)
                raise cli.Stop(f"{path} cannot be written: no space is left")

    with _alone(path):
        _forget(path, again)
        todo = sorted(jobs.keys() - results(path).keys())  # sorted, so that runs are alike
        # The pool's threads are daemons: Ctrl-C does not wait for their answers.
        with open(path, "ab", buffering=0) as file, ThreadPool(workers) as pool:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)  # removes a line that a kill cut off
            for _ in tqdm(pool.imap_unordered(attempt, todo), total=len(todo), disable=None):
                pass
    return failed
