"""A real HTTP server on 127.0.0.1 that stands in for a model server, and says what a test wants it to.

What it answers is a function of the request; the builders below make the replies that servers give.
"""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    connection: int
    """The client's port: the same as long as a connection is kept."""

    @property
    def text(self) -> str:
        """All that a chat request says."""
        return "\n".join(message["content"] for message in self.body["messages"])


@dataclass(frozen=True)
class Response:
    content: Any = b""
    """Bytes as they are; anything else as JSON."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    hang_up: bool = False
    """Close the connection without a word."""
    promise_bytes: int = 0
    """How many more bytes the Content-Length promises than come."""


Answer = Callable[[Request], Response]


class StubServer:
    """``with StubServer(answer) as server``: serves at ``server.base_url`` and keeps ``server.requests``."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> StubServer:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                stub._serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        request = Request(handler.path, dict(handler.headers), body, handler.client_address[1])
        with self._lock:
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            reply = self.answer(request)
        self._stop.wait(reply.wait_s)
        with self._lock:
            self._now -= 1
        if reply.hang_up:
            handler.close_connection = True
            return
        content = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
        try:
            handler.send_response(reply.status)
            for name, value in reply.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content) + reply.promise_bytes))
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:  # the client has gone
            handler.close_connection = True
        handler.close_connection |= reply.promise_bytes > 0


def in_turn(first: Iterable[Response], then: Answer) -> Answer:
    """The given replies, whatever is asked, and then what ``then`` says."""
    waiting = list(first)
    return lambda request: waiting.pop(0) if waiting else then(request)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- what servers say


def usage(prompt_tokens: int, answer_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
    details = None if cached_tokens is None else {"cached_tokens": cached_tokens}
    total = {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens}
    return total | {"total_tokens": prompt_tokens + answer_tokens, "prompt_tokens_details": details}


def said(answers: Sequence[str | None], **further: Any) -> Response:
    """Answers of the chat endpoint."""
    return Response({"choices": [{"message": {"content": answer}} for answer in answers]} | further)


def likeliest(probs: Mapping[str, float], **further: Any) -> Response:
    """A reply of the chat endpoint with top_logprobs."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in probs.items()]
    content = [{**top[0], "top_logprobs": top}]
    choice = {"message": {"content": top[0]["token"]}, "logprobs": {"content": content}}
    return Response({"choices": [choice]} | further)


def scored(probs: Mapping[int, float], **further: Any) -> Response:
    """A reply of vLLM's completions endpoint to logprob_token_ids."""
    said = {f"token_id:{token}": math.log(p) for token, p in probs.items()}
    return Response({"choices": [{"text": "x", "logprobs": {"top_logprobs": [said]}}]} | further)


def next_token_probs(token_ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """float[vocabulary]: what a stub model expects next; different for each sequence, always the same."""
    logits = np.random.default_rng(list(token_ids)).normal(0.0, 2.0, vocabulary)
    probs = np.exp(logits - logits.max())
    return probs / probs.sum()


def vllm_like(vocabulary: int) -> Answer:
    """A server with ``logprob_token_ids``, over :func:`next_token_probs`."""

    def answer(request: Request) -> Response:
        prompt, tokens = request.body["prompt"], request.body["logprob_token_ids"]
        if len(tokens) > 128 or request.body["logprobs"] is None or request.path != "/v1/completions":
            return Response({"error": {"message": "logprob_token_ids: too many, or no logprobs"}}, status=400)
        probs = next_token_probs(prompt, vocabulary)
        likeliest = int(probs.argmax())  # the token that is sampled is always there
        return scored({t: probs[t] for t in [likeliest, *tokens]}, usage=usage(len(prompt), 1))

    return answer
