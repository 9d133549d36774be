"""Questions to a model on a server: what is sent, what is tried again, runs that resume."""

import asyncio
import base64
import contextlib
import functools
import gzip
import io
import json
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

import cli
from experiments import chat

CUT = object()  # a body that ends in the middle


def reply_of(content, **choice):
    """A reply whose message has this content."""
    return json.dumps({"choices": [{"message": {"content": content}, **choice}]}).encode()


@contextlib.contextmanager
def loopback(reply, context=None):
    """A server on this machine: its address, and (path, headers, body) of each request.

    context: of its TLS, if it has one.

    reply(body) -> the text of an answer, a status of HTTP, the bytes of a reply, CUT, or
    (status, headers) and perhaps the bytes of the body.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers, body))
            answer = reply(body)
            status, headers, data = 200, {}, reply_of("an answer that does not arrive")
            if isinstance(answer, str):
                data = reply_of(answer)
            elif isinstance(answer, bytes):
                data = answer
            elif isinstance(answer, int):
                status, data = answer, b'{"error": "reason of the server"}'
            elif isinstance(answer, tuple):
                status, headers, data = (*answer, b"{}")[:3]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", len(data))
            self.end_headers()
            self.wfile.write(data[:20] if answer is CUT else data)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args):  # a client that did not wait
            pass

    server = Server(("127.0.0.1", 0), Handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http{'s' if context else ''}://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(chat, "PAUSES", (0,) * 6)
    monkeypatch.setattr(chat, "_answered", set())
    monkeypatch.setattr(chat, "_unanswered", Counter())
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def record_pauses(monkeypatch):
    """A list that the seconds of all further pauses come into, none of which is waited for."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(chat.asyncio, "sleep", sleep)
    return slept


def ask(*args, **options):
    return asyncio.run(chat.ask(*args, **options))


def run(path, jobs, work, *args, **options):
    """chat.run with work that blocks."""
    return chat.run(path, jobs, functools.partial(asyncio.to_thread, work), *args, **options)


def in_turn(*answers):
    answers = iter(answers)
    return lambda body: next(answers)


# --- Frames ---------------------------------------------------------------------------------------


def opened(part):
    head, data = part["image_url"]["url"].split(",")
    assert part["type"] == "image_url" and head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize(
    "length, number, shown",
    [
        (81, 5, [0, 20, 40, 60, 80]),
        (9, 5, [0, 2, 4, 6, 8]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 5, [0, 1, 2]),
        (7, 1, [0]),
    ],
)
def test_frames_are_evenly_spaced_from_the_first_to_the_last(length, number, shown):
    """Frame i is of the one gray 3 i, which JPEG keeps."""
    frames = (3 * torch.arange(length, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(-1, 32, 48, 3)
    parts = chat.image_parts(frames, number)
    assert [opened(part).getpixel((5, 5)) for part in parts] == [(3 * i,) * 3 for i in shown]


@pytest.mark.parametrize(
    "size, sent",
    [
        ((720, 1280), (288, 512)),
        ((1280, 720), (512, 288)),
        ((96, 64), (96, 64)),
        ((512, 512), (512, 512)),
    ],
)
def test_frames_are_jpeg_of_quality_85_whose_longer_side_is_at_most_512(size, sent):
    image = opened(chat.image_parts(torch.zeros(1, *size, 3, dtype=torch.uint8), 5)[0])
    reference, other = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (16, 16)).save(reference, "JPEG", quality=85)
    Image.new("RGB", (16, 16)).save(other, "JPEG", quality=86)
    assert image.format == "JPEG" and image.size == sent[::-1]
    assert (
        image.quantization == Image.open(reference).quantization != Image.open(other).quantization
    )


# --- One question ---------------------------------------------------------------------------------


def test_what_a_server_is_asked(monkeypatch):
    parts = [{"type": "text", "text": "wie?"}]
    monkeypatch.setenv("MY_KEY", "secret")
    with loopback(in_turn("Überraschung", "yes")) as (url, asked):
        assert ask(url + "/", "a/model", parts, "be strict", "MY_KEY") == "Überraschung"
        assert ask(url, "a/model", "why?") == "yes"
    (path, headers, body), (_, _, second) = asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    messages = [{"role": "system", "content": "be strict"}, {"role": "user", "content": parts}]
    # Not only left out: Unsloth's server and others stream what does not forbid it.
    assert body == {"model": "a/model", "messages": messages, "stream": False}
    assert second["messages"] == [{"role": "user", "content": "why?"}]


def test_a_busy_server_is_asked_again():
    with loopback(in_turn(429, 500, CUT, 503, b"no JSON", "at last")) as (url, asked):
        assert ask(url, "m", "?") == "at last"
    assert len(asked) == 6


def test_a_server_that_answers_nobody_is_given_up(monkeypatch):
    """As one that has no such model, says so with 500, and would be asked hundreds of times."""
    monkeypatch.setattr(chat, "PAUSES", (0, 0))
    monkeypatch.setattr(chat, "IN_A_ROW", 2)
    with loopback(in_turn(500, 429, "yes", CUT, 500, 502, 502)) as (url, asked):
        with pytest.raises(ValueError, match="429"):
            ask(url, "m", "?")
        assert ask(url, "m", "?") == "yes"
        with pytest.raises(ValueError, match="500"):
            ask(url, "m", "?")
        with pytest.raises(chat.Refused, match="502: reason of the server; check the server"):
            ask(url, "m", "?")
    assert len(asked) == 7


BODIES = [
    b"",
    b"\xff",
    b"[]",
    b"{}",
    b'{"choices": null}',
    b'{"choices": []}',
    b'{"choices": [{"text": "yes"}]}',
    b"[" * 200_000,
    b'{"choices":' * 50_000,
]
NO_TEXTS = [
    b'{"choices": [{"message": {"content": %s}}]}' % content
    for content in (b"7", b"[7]", b'{"a": 1}')
]


@pytest.mark.parametrize("answer", [CUT, 429, 500, *BODIES, *NO_TEXTS])
def test_what_stays_unanswered_is_given_up(answer):
    with (
        loopback(lambda body: answer) as (url, asked),
        pytest.raises(ValueError, match="127.0.0.1.*/v1"),
    ):
        ask(url, "m", "?")
    assert len(asked) == len(chat.PAUSES)


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, ValueError),
        *((status, chat.Refused) for status in (401, 403, 404)),
        (405, chat.Refused),  # another page of the server
        (407, chat.Refused),  # of a proxy, whose password is missing or wrong
    ],
)
def test_what_would_not_help_is_not_tried(status, kind):
    with (
        loopback(lambda body: status) as (url, asked),
        pytest.raises(kind, match=f"{status}.*reason of the server"),
    ):
        ask(url, "m", "?")
    assert len(asked) == 1


EMPTY = [
    b'{"choices": [{"message": {"content": null}}]}',
    b'{"choices": [{"message": {"role": "assistant"}, "finish_reason": "length"}]}',
]


@pytest.mark.parametrize("reply", EMPTY)
def test_an_answer_without_content_is_empty(reply):
    """As of a model whose thoughts used up its tokens. It is not asked again here."""
    with loopback(lambda body: reply) as (url, asked):
        assert ask(url, "m", "?") == ""
    assert len(asked) == 1


def packed(data):
    return 200, {"Content-Encoding": "gzip"}, gzip.compress(data)


def test_a_packed_reply_is_unpacked_up_to_a_largest_size(monkeypatch):
    """Some proxies pack all replies. A damaged one is asked for again."""
    monkeypatch.setattr(chat, "LONGEST_REPLY", 10_000)
    damaged = (200, {"Content-Encoding": "gzip"}, gzip.compress(reply_of("no"))[:12] + b"!" * 20)
    with loopback(in_turn(damaged, packed(reply_of("yes")))) as (url, _):
        assert ask(url, "m", "?") == "yes"
    with loopback(lambda body: packed(b" " * 10**6)) as (url, asked):
        with pytest.raises(ValueError, match="longer than 10000 bytes"):
            ask(url, "m", "?")
    assert len(asked) == len(chat.PAUSES)


@pytest.mark.parametrize("end", ["", "/", "/chat/completions", "/chat/completions/"])
@pytest.mark.parametrize("query", ["", "?api-version=2024-10-21"])
def test_an_address_may_be_that_of_the_chats_and_name_a_version(end, query, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with loopback(lambda body: "yes") as (url, asked):
        assert ask(url + end + query, "m", "?") == "yes"
    assert asked[0][0] == f"/v1/chat/completions{query}"
    assert asked[0][1]["api-key"] == ("none" if query else None)  # where Azure expects keys


def test_a_proxy_that_is_not_there_is_not_repeated(monkeypatch):
    """Its address may hold a password."""
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://me:pass@127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "elsewhere")
        with pytest.raises(chat.Refused, match="localhost:8000/v1.*; check .* no_proxy") as error:
            ask("http://localhost:8000/v1", "m", "?")
    assert "pass@" not in str(error.value)


def test_a_server_that_is_not_there_is_named(monkeypatch):
    """Sooner than one that is busy."""
    slept = record_pauses(monkeypatch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(chat.Refused, match=f"{place}/.*failed; check the server"):
            ask(f"http://{place}/v1", "m", "?")
    assert len(slept) == 2


def test_a_server_that_was_there_may_start_anew(monkeypatch):
    """Which takes minutes: it gets as much time as one that is busy."""
    with loopback(lambda body: "yes") as (url, _):
        assert ask(url, "m", "?") == "yes"
    slept = record_pauses(monkeypatch)
    with pytest.raises(ValueError, match="failed"):
        ask(url, "m", "?")
    assert len(slept) == len(chat.PAUSES) - 1
    monkeypatch.setattr(chat, "IN_A_ROW", 2)
    with pytest.raises(chat.Refused, match="failed; check the server"):
        ask(url, "m", "?")


def test_a_proxy_is_gone_through(monkeypatch):
    """But for the hosts in no_proxy."""
    with loopback(lambda body: "by the proxy") as (proxy, asked):
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
        assert ask("http://judge.invalid:8000/v1", "m", "?") == "by the proxy"
        assert asked[0][0] == "http://judge.invalid:8000/v1/chat/completions"
        with loopback(lambda body: "directly") as (url, _):
            assert ask(url, "m", "?") == "directly"


@pytest.mark.parametrize("variable, value", [("all_proxy", "ftp://x"), ("SSL_CERT_FILE", "/none")])
def test_an_environment_that_cannot_be_used_is_refused(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with loopback(lambda body: "yes") as (url, asked):
        with pytest.raises(chat.Refused, match="the environment's proxy or SSL_CERT_FILE"):
            ask(url, "m", "?")
    assert not asked


def test_the_library_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(chat.Refused, match=r"httpx2.*pip install httpx2$"):
        ask("http://localhost:8000/v1", "m", "?")


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate by openssl")
def test_certificates_are_those_of_the_environment(tmp_path, monkeypatch):
    """Such as a company's own. Without them the server is not trusted."""
    certificate, key = tmp_path / "server.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=here"
    command += f" -addext subjectAltName=IP:127.0.0.1 -out {certificate} -keyout {key}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with loopback(lambda body: "yes", context) as (url, asked):
        with pytest.raises(chat.Refused, match="CERTIFICATE_VERIFY_FAILED"):
            ask(url, "m", "?")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert ask(url, "m", "?") == "yes"
    assert len(asked) == 1


def test_a_slow_server_is_asked_again(monkeypatch):
    monkeypatch.setattr(chat, "TIMEOUT", 0.5)
    end, first = threading.Event(), threading.Event()

    def reply(body):
        if not first.is_set():
            first.set()
            end.wait()
        return "awake"

    with loopback(reply) as (url, asked):
        assert ask(url, "m", "?") == "awake"
        assert len(asked) >= 2
        end.set()


# --- Answers in other forms -----------------------------------------------------------------------


def test_content_in_parts_is_joined():
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    parts = [thought, {"type": "text", "text": "yes"}, {"type": "text", "text": " and no"}]
    with loopback(in_turn(reply_of(parts), reply_of([]))) as (url, _):
        assert ask(url, "m", "?") == "yes and no"
        assert ask(url, "m", "?") == ""


@pytest.mark.parametrize(
    "reason, is_cut_off",
    [
        *((reason, False) for reason in (None, "stop", "STOP", "eos", "eos_token", "end_turn")),
        *(
            (reason, True)
            for reason in ("length", "content_filter", "error", "abort", "MAX_TOKENS")
        ),
        ("insufficient_system_resource", True),
        ("content_filter: SAFETY", True),
        ("model_length", True),
        ({}, True),
    ],
)
def test_an_answer_knows_why_it_ended(reason, is_cut_off):
    with loopback(in_turn(reply_of("Score: 8", finish_reason=reason))) as (url, _):
        answer = ask(url, "m", "?")
    assert answer == "Score: 8" and answer.is_cut_off == is_cut_off
    assert answer.finish_reason == reason


def test_an_answer_that_an_error_ended_is_asked_for_again():
    """As OpenRouter says it: the text ends where it happens to end."""
    error = {"code": 502, "message": "Provider disconnected"}
    with loopback(in_turn(reply_of("Score: 8", error=error), "at last")) as (url, _):
        assert ask(url, "m", "?") == "at last"


# --- When to try again ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, seconds",
    [("7", 7), ("0", 0), ("1000000000", 60), ("-3", 0), ("Tue, 01 Dec 2026 09:30:16 GMT", 0)],
)
def test_retry_after_is_honoured_up_to_a_minute(value, seconds, monkeypatch):
    slept = record_pauses(monkeypatch)
    replies = in_turn((429, {"Retry-After": value}), "at last")
    with loopback(replies) as (url, _):
        assert ask(url, "m", "?") == "at last"
    assert slept == [seconds]


ACCOUNTS = [
    (429, {"error": {"code": "insufficient_quota", "message": "You exceeded your quota"}}),
    (429, {"error": {"type": "insufficient_quota"}}),
    (400, [{"error": {"message": "API key not valid. Please pass a valid API key."}}]),
    (400, {"error": {"code": "invalid_api_key"}}),
    (401, {"error": {"message": "Incorrect API key provided"}}),
    (200, {"error": {"message": "No auth credentials found", "code": 401}}),
    (200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
    (402, {"error": "payment required"}),
    (400, {"error": {"code": "Arrearage", "message": "Access denied, your account is overdue"}}),
]


@pytest.mark.parametrize("status, body", ACCOUNTS)
def test_an_account_without_answers_stops_at_once(status, body):
    reply = (status, {}, json.dumps(body).encode())
    with loopback(lambda _: reply) as (url, asked), pytest.raises(chat.Refused):
        ask(url, "m", "?")
    assert len(asked) == 1


def error_of(code, message="no"):
    return json.dumps({"error": {"code": code, "message": message}}).encode()


def test_an_address_without_v1_is_guessed_at():
    """LM Studio answers with status 200 there."""
    reply = b'{"error": "Unexpected endpoint or method. Returning 200 anyway"}'
    with loopback(lambda body: reply) as (url, _):
        with pytest.raises(chat.Refused, match="Returning 200 anyway.*end in /v1"):
            ask(url.removesuffix("/v1"), "m", "?")


def test_a_status_inside_the_reply_counts():
    with loopback(in_turn(error_of(502), error_of("429"), "at last", error_of(400))) as (
        url,
        asked,
    ):
        assert ask(url, "m", "?") == "at last"
        with pytest.raises(ValueError, match="400"):
            ask(url, "m", "?")
    assert len(asked) == 4


def test_an_error_without_status_is_waited_for_once_there_was_an_answer():
    with loopback(in_turn("yes", b'{"error": "busy"}', "at last")) as (url, _):
        assert ask(url, "m", "?") == "yes"
        assert ask(url, "m", "?") == "at last"


def test_a_question_that_is_forbidden_does_not_concern_the_others():
    """403 of a server that answers other questions, or that speaks of moderation."""
    flagged = (403, {}, error_of(403, "requires moderation and your input was flagged"))
    with loopback(in_turn(flagged, "yes", 403, 403)) as (url, _):
        with pytest.raises(ValueError, match="moderation"):
            ask(url, "m", "?")
        assert ask(url, "m", "?") == "yes"
        with pytest.raises(ValueError, match="403"):
            ask(url, "m", "?")
        with pytest.raises(chat.Refused, match="403"):
            ask(url, "another", "?")


def test_a_rate_limit_is_waited_for():
    """Though its message speaks of quotas and of accounts."""
    message = "Quota per minute. For more pay at https://example.org/account/billing."
    error = {"code": "rate_limit_exceeded", "message": message}
    limit = (429, {}, json.dumps({"error": error}).encode())
    with loopback(in_turn(limit, limit, "at last")) as (url, _):
        assert ask(url, "m", "?") == "at last"


# --- The key --------------------------------------------------------------------------------------

KEY = "sk-7Q.x+9/z=_end"  # with letters that have a meaning in patterns


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect(status, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with loopback(lambda body: "stolen") as (other, asked_there):
        reply = (status, {"Location": f"{other}/chat/completions?{KEY}"})
        with loopback(lambda body: reply) as (url, asked):
            with pytest.raises(chat.Refused) as error:
                ask(url, "m", "?", key="MY_KEY")
    message = str(error.value)
    assert f"{status}: a redirect to {other}" in message and KEY not in message
    assert len(asked) == 1 and not asked_there


def echoes(text):
    """Replies in which a server repeats a text, in all the ways in which it is shown."""
    quoted = json.dumps({"error": {"message": f"bad key {text}"}}).encode()
    padded = json.dumps({"error": {"message": "x" * 370 + text}}).encode()
    return {
        "an error": (400, {}, quoted),
        "a refusal": (401, {}, quoted),
        "plain text": (403, {}, f"Authorization: Bearer {text}".encode()),
        "an answer that is none": (200, {}, text.encode()),
        "a long error": (400, {}, padded),
        "another case": (400, {}, quoted.lower()),
    }


@pytest.mark.parametrize("form", echoes(""))
def test_a_server_that_repeats_the_key_does_not_get_it_printed(form, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    reply = echoes(KEY)[form]
    with loopback(lambda body: reply) as (url, _):
        with pytest.raises((ValueError, chat.Refused)) as error:
            ask(url, "m", "?", key="MY_KEY")
    shown = "".join(traceback.format_exception(error.value))
    assert "sk-7q" not in str(error.value).lower() and "sk-7q" not in shown.lower()


def test_a_model_that_repeats_the_key_does_not_get_it_written(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    reply = reply_of(f"Your key is {KEY}. {KEY}", finish_reason="length")
    with loopback(lambda body: reply) as (url, _):
        answer = ask(url, "m", "?", key="MY_KEY")
    assert answer == "Your key is [key]. [key]" and answer.is_cut_off


@pytest.mark.parametrize(
    "key", ["sk-secret\n", "sk-secret\r\nX: y", "sk-secret-☃", "sk- secret", "\t"]
)
def test_a_bad_key_is_refused_before_any_request(key, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    with loopback(lambda body: "yes") as (url, asked):
        with pytest.raises(chat.Refused, match="the API key's environment variable") as error:
            ask(url, "m", "?", key="MY_KEY")
    assert not asked and "secret" not in str(error.value)


def test_a_key_in_the_place_of_its_name_is_not_repeated():
    with loopback(lambda body: "yes") as (url, asked):
        with pytest.raises(chat.Refused, match="the API key's environment variable") as error:
            ask(url, "m", "?", key="sk-secret")
    assert not asked and "secret" not in str(error.value)


@pytest.mark.parametrize(
    "form",
    [
        "http://user:password@{}/v1",
        "http://password@{}/v1",
        "user:password@{}/v1",
        "http://{}/v1?key=password",
        "http://{}/v1#password",
        "http://{}:password/v1",
        "password://{}/v1",
        "http://{}9999999/password",
        "http://127.0.0.1:99999/password",
        "http:///password",
        "",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(form):
    with loopback(lambda body: "yes") as (url, asked):
        host = url.removeprefix("http://").removesuffix("/v1")
        with pytest.raises(chat.Refused, match="--url") as error:
            ask(form.format(host), "m", "?")
    assert not asked and "password@" not in str(error.value) and "\n" not in str(error.value)
    assert "password" not in str(error.value).replace("name or password", "")


# --- Servers without an end -----------------------------------------------------------------------


@contextlib.contextmanager
def hostile(*parts, then=b""):
    """A server that sends the parts, and then the bytes `then` again and again, for ever."""
    server = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(100_000)
            for part in parts:
                connection.sendall(part)
            while not over.wait(0.01):
                connection.sendall(then)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    finally:
        over.set()
        server.close()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = b"2\r\n{}\r\n0\r\n"
ENDLESS = {
    "silence": ([], b""),
    "100 Continue": ([], b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a line of status": ([b"HTTP/1.1 200 "], b"O"),
    "one header": ([OK, b"X: "], b"x"),
    "a dripping body": ([OK, b"Content-Length: 100000\r\n\r\n"], b" "),
    "a body without length": ([OK, b"\r\n"], b" "),
    "chunks": ([OK, CHUNKED], b"1\r\n \r\n"),
    "a chunk's length": ([OK, CHUNKED], b"0"),
    "trailers": ([OK, CHUNKED, WHOLE], b"X: y\r\n"),
    "the body of an error": ([b"HTTP/1.1 500 No\r\n\r\n"], b"x"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_one_deadline_bounds_the_whole_exchange(kind, monkeypatch):
    monkeypatch.setattr(chat, "TIMEOUT", 0.2)
    monkeypatch.setattr(chat, "PAUSES", (0, 0))
    parts, then = ENDLESS[kind]
    with (
        hostile(*parts, then=then) as url,
        pytest.raises(ValueError, match="within 0.2 s"),
    ):
        ask(url, "m", "?")


def test_a_handshake_without_an_end_is_bounded_too(monkeypatch):
    monkeypatch.setattr(chat, "TIMEOUT", 0.2)
    monkeypatch.setattr(chat, "PAUSES", (0, 0))
    # A TLS record of 16 kB that arrives byte by byte.
    with hostile(b"\x16\x03\x03\x40\x00", then=b"\x02") as url:
        with pytest.raises(ValueError, match="within 0.2 s"):
            ask(url.replace("http", "https", 1), "m", "?")


@pytest.mark.parametrize("head", [b"\r\n", b"Content-Length: 99999999999\r\n\r\n"])
def test_a_reply_has_a_largest_size(head, monkeypatch):
    monkeypatch.setattr(chat, "LONGEST_REPLY", 10_000)
    with hostile(OK, head, then=b" " * 5_000) as url:
        with pytest.raises(ValueError, match="longer than 10000 bytes"):
            ask(url, "m", "?")


# --- Many questions -------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_run_does_what_is_missing_and_lists_what_failed(tmp_path):
    path, calls = tmp_path / "answers.jsonl", []

    def work(job):
        calls.append(job)
        if job in (3, 4):
            raise ValueError(f"no {job}") if job == 3 else OSError("no file")
        return {"twice": 2 * job, "text": "ß\u2028\n"}

    failed = run(path, {f"k{i}": i for i in range(6)}, work, 2)
    assert failed == {"k3": "no 3", "k4": "no file"} and sorted(calls) == list(range(6))
    expected = {f"k{i}": {"twice": 2 * i, "text": "ß\u2028\n"} for i in (0, 1, 2, 5)}
    assert chat.results(path) == expected
    calls.clear()
    assert run(path, {f"k{i}": i for i in (1, 3, 7)}, work) == {"k3": "no 3"}
    assert sorted(calls) == [3, 7] and chat.results(path) == expected | {
        "k7": {"twice": 14, "text": "ß\u2028\n"}
    }


@pytest.mark.parametrize("torn", [b'{"key": "c", "a', b'{"key": "c", "answer": 3}', b"\xc3"])
def test_a_line_that_was_cut_off_is_done_again(torn, tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = b'{"key": "a", "answer": 1}\n{"key": "b", "answer": 2}\n'
    path.write_bytes(whole + torn)
    assert chat.results(path) == {"a": {"answer": 1}, "b": {"answer": 2}}
    assert run(path, {"a": 0, "b": 0, "c": 0}, lambda job: {"answer": "new"}) == {}
    assert path.read_bytes() == whole + b'{"key": "c", "answer": "new"}\n'


@pytest.mark.parametrize(
    "damaged", [b"\xff\xfe", b'{"key": "a", "answ', b'{"answer": 1}', b"[1]", b"7"]
)
def test_a_damaged_line_before_the_last_is_an_error_that_names_the_file(damaged, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(damaged + b'\n{"key": "b", "answer": 2}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl: line 1 is damaged"):
        chat.results(path)


def test_jobs_are_worked_on_at_the_same_time(tmp_path):
    together = threading.Barrier(4)  # which lets nobody pass before four are there

    def work(job):
        together.wait(timeout=60)
        return {}

    assert run(tmp_path / "answers.jsonl", dict.fromkeys("abcdefgh"), work, 4) == {}


def test_results_are_done_again_on_request(tmp_path):
    path = tmp_path / "answers.jsonl"
    run(path, dict.fromkeys("abc"), lambda job: {"answer": 1})

    def fails(job):
        raise ValueError("no")

    assert run(path, dict.fromkeys("abc"), fails, again={"b"}) == {"b": "no"}
    assert chat.results(path) == {"a": {"answer": 1}, "c": {"answer": 1}}
    assert run(path, dict.fromkeys("abc"), lambda job: {"answer": 2}, again={"c"}) == {}
    assert [(row["key"], row["answer"]) for row in lines(path)] == [("a", 1), ("b", 2), ("c", 2)]


def test_a_second_run_on_a_file_is_refused_while_the_first_lasts(tmp_path):
    """Or what it does again would replace the file that the first one writes."""
    path, begun, end = tmp_path / "answers.jsonl", threading.Event(), threading.Event()
    path.write_text('{"key": "old"}\n')

    def work(job):
        begun.set()
        assert end.wait(60)
        return {}

    first = threading.Thread(target=run, args=(path, dict.fromkeys("abc"), work))
    first.start()
    assert begun.wait(60)
    with pytest.raises(cli.Stop, match=r"answers\.jsonl: another process writes it"):
        run(path, {"old": 0}, lambda job: {}, again={"old"})
    end.set()
    first.join()
    assert run(path, {"old": 0}, lambda job: {"new": 1}, again={"old"}) == {}
    assert chat.results(path) == {"a": {}, "b": {}, "c": {}, "old": {"new": 1}}


@pytest.mark.parametrize("error", [chat.Refused("wrong key"), KeyError("a defect")])
def test_what_concerns_all_jobs_ends_the_run(error, tmp_path):
    calls = []

    def work(job):
        calls.append(job)
        if job == 3:
            raise error
        time.sleep(0.002)
        return {}

    with pytest.raises(type(error)):
        run(tmp_path / "answers.jsonl", {f"{i:04}": i for i in range(5000)}, work, 1)
    assert len(calls) < 5000
    assert [row["key"] for row in lines(tmp_path / "answers.jsonl")][:3] == ["0000", "0001", "0002"]


def test_no_thread_outlives_the_run(tmp_path):
    """One that reads a clip while Python exits may abort the process."""
    begun, ended = threading.Event(), threading.Event()

    def work(job):
        if job == 1:
            begun.wait(60)
            raise chat.Refused("wrong key")
        begun.set()
        time.sleep(0.1)
        ended.set()

    with pytest.raises(chat.Refused):
        run(tmp_path / "answers.jsonl", {"a": 0, "b": 1}, work, 2)
    assert ended.is_set()


def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(tmp_path):
    """Here a limit of the file's size, at which the system also takes a part of a line."""
    path = tmp_path / "answers.jsonl"
    jobs = {f"k{i}": "x" * 1000 for i in range(9)}
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, former[1]))
    try:
        with pytest.raises(cli.Stop, match="answers.jsonl cannot be written"):
            run(path, jobs, lambda job: {"text": job}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert list(chat.results(path)) == ["k0", "k1", "k2"]
    assert run(path, jobs, lambda job: {"text": job}, 1) == {}
    assert len(lines(path)) == 9


def test_ctrl_c_ends_the_run_and_keeps_what_is_finished(tmp_path):
    """While one worker waits for an answer that does not come."""
    path = tmp_path / "answers.jsonl"

    async def work(job):
        if job == 9:
            signal.raise_signal(signal.SIGINT)
        if job in (1, 9):
            await asyncio.Event().wait()
        return {}

    former = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        chat.run(path, {str(i): i for i in range(10)}, work, 2)
    signal.signal(signal.SIGINT, former)
    assert [row["key"] for row in lines(path)] == ["0", "2", "3", "4", "5", "6", "7", "8"]
