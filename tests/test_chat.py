"""Questions to a model on a server: what is sent, what is tried again, runs that resume."""

import base64
import contextlib
import io
import json
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from experiments import chat

CUT = object()  # a body that ends in the middle


@contextlib.contextmanager
def loopback(reply):
    """A server on this machine: its address, and (path, headers, body) of each request.

    reply(body) -> the text of an answer, a status of HTTP, the bytes of a reply, or CUT.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers, body))
            answer = reply(body)
            text = answer if isinstance(answer, str) else "an answer that does not arrive"
            data = json.dumps(
                {"choices": [{"message": {"role": "assistant", "content": text}}]}
            ).encode()
            if isinstance(answer, int):
                data = b'{"error": "reason of the server"}'
            self.send_response(answer if isinstance(answer, int) else 200)
            data = answer if isinstance(answer, bytes) else data
            self.send_header("Content-Length", len(data))
            self.end_headers()
            self.wfile.write(data[:20] if answer is CUT else data)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args):  # a client that did not wait
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(chat, "PAUSES", (0,) * 6)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


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
        assert chat.ask(url + "/", "a/model", parts, "be strict", "MY_KEY") == "Überraschung"
        assert chat.ask(url, "a/model", "why?") == "yes"
    (path, headers, body), (_, _, second) = asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    messages = [{"role": "system", "content": "be strict"}, {"role": "user", "content": parts}]
    assert body == {"model": "a/model", "messages": messages}
    assert second["messages"] == [{"role": "user", "content": "why?"}]


def test_a_busy_server_is_asked_again():
    with loopback(in_turn(429, 500, CUT, 503, b"no JSON", "at last")) as (url, asked):
        assert chat.ask(url, "m", "?") == "at last"
    assert len(asked) == 6


BODIES = [
    b"",
    b"\xff",
    b"[]",
    b"{}",
    b'{"choices": []}',
    b'{"choices": null}',
    b'{"choices": [{"text": "yes"}]}',
]
NO_TEXTS = [
    b'{"choices": [{"message": {"content": %s}}]}' % content
    for content in (b"7", b'["yes"]', b'{"a": 1}')
]


@pytest.mark.parametrize("answer", [CUT, 429, 500, *BODIES, *NO_TEXTS])
def test_what_stays_unanswered_is_given_up(answer):
    with (
        loopback(lambda body: answer) as (url, asked),
        pytest.raises(ValueError, match="127.0.0.1.*/v1"),
    ):
        chat.ask(url, "m", "?")
    assert len(asked) == len(chat.PAUSES)


@pytest.mark.parametrize(
    "status, kind",
    [(400, ValueError), (401, chat.Refused), (403, chat.Refused), (404, chat.Refused)],
)
def test_what_would_not_help_is_not_tried(status, kind):
    with (
        loopback(lambda body: status) as (url, asked),
        pytest.raises(kind, match=f"{status}.*reason of the server"),
    ):
        chat.ask(url, "m", "?")
    assert len(asked) == 1


def test_a_null_content_is_an_empty_answer():
    with loopback(lambda body: b'{"choices": [{"message": {"content": null}}]}') as (url, _):
        assert chat.ask(url, "m", "?") == ""


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(("127.0.0.1", 0))
        with pytest.raises(
            chat.Refused, match=f"127.0.0.1:{free.getsockname()[1]}/.*refused.*check the server"
        ):
            chat.ask(f"http://127.0.0.1:{free.getsockname()[1]}/v1", "m", "?")


def test_a_slow_server_is_asked_again(monkeypatch):
    monkeypatch.setattr(chat, "TIMEOUT", 0.5)
    end, first = threading.Event(), threading.Event()

    def reply(body):
        if not first.is_set():
            first.set()
            end.wait()
        return "awake"

    with loopback(reply) as (url, asked):
        assert chat.ask(url, "m", "?") == "awake"
        assert len(asked) >= 2
        end.set()


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

    failed = chat.run(path, {f"k{i}": i for i in range(6)}, work, 2)
    assert failed == {"k3": "no 3", "k4": "no file"} and sorted(calls) == list(range(6))
    expected = {f"k{i}": {"twice": 2 * i, "text": "ß\u2028\n"} for i in (0, 1, 2, 5)}
    assert chat.results(path) == expected
    calls.clear()
    assert chat.run(path, {f"k{i}": i for i in (1, 3, 7)}, work) == {"k3": "no 3"}
    assert sorted(calls) == [3, 7] and chat.results(path) == expected | {
        "k7": {"twice": 14, "text": "ß\u2028\n"}
    }


@pytest.mark.parametrize("torn", [b'{"key": "c", "a', b'{"key": "c", "answer": 3}', b"\xc3"])
def test_a_line_that_was_cut_off_is_done_again(torn, tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = b'{"key": "a", "answer": 1}\n{"key": "b", "answer": 2}\n'
    path.write_bytes(whole + torn)
    assert chat.results(path) == {"a": {"answer": 1}, "b": {"answer": 2}}
    assert chat.run(path, {"a": 0, "b": 0, "c": 0}, lambda job: {"answer": "new"}) == {}
    assert path.read_bytes() == whole + b'{"key": "c", "answer": "new"}\n'


@pytest.mark.parametrize(
    "damaged", [b"\xff\xfe", b'{"key": "a", "answ', b'{"answer": 1}', b"[1]", b"7"]
)
def test_a_damaged_line_before_the_last_is_an_error_that_names_the_file(damaged, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(damaged + b'\n{"key": "b", "answer": 2}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl has a line that is damaged"):
        chat.results(path)


def test_jobs_are_worked_on_at_the_same_time(tmp_path):
    together = threading.Barrier(4)  # which lets nobody pass before four are there

    def work(job):
        together.wait(timeout=60)
        return {}

    assert chat.run(tmp_path / "answers.jsonl", dict.fromkeys("abcdefgh"), work, 4) == {}


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
        chat.run(tmp_path / "answers.jsonl", {f"{i:04}": i for i in range(5000)}, work, 1)
    assert len(calls) < 5000
    assert [row["key"] for row in lines(tmp_path / "answers.jsonl")][:3] == ["0000", "0001", "0002"]


def test_ctrl_c_ends_the_run_and_keeps_what_is_finished(tmp_path):
    """While one worker waits for an answer that does not come."""
    end, path = threading.Event(), tmp_path / "answers.jsonl"

    def work(job):
        if job == 1:
            end.wait()
        if job == 9:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            end.wait()
        return {}

    former = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        chat.run(path, {str(i): i for i in range(10)}, work, 2)
    signal.signal(signal.SIGINT, former)
    end.set()
    assert [row["key"] for row in lines(path)] == ["0", "2", "3", "4", "5", "6", "7", "8"]
