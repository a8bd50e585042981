"""The process of an engine on CPUs: ``python -m llkd_ray.teacher.vllm.child_main FD``; see ``backends``.

It schedules and computes in one thread. It receives through the connection FD: the teacher's settings, once,
and then ``(number, token_ids, request)``, or ``(number, None, None)`` to cancel a request. It sends: None
once the engine has started, or the reason why it has not; then lists of ``(number, response)``, where the
response to a rejected request is the reason as a string.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.vllm.requests import (
    EngineRequest,
    EngineResponse,
    engine_arguments,
    engine_prompt,
    refusals,
    response_from,
    sampling_params,
)

Request = tuple[int, list[int] | None, EngineRequest | None]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal; the actor ends this process
    connection = Connection(int(sys.argv[1]))
    import vllm  # noqa: F401  # before the settings arrive: it takes seconds

    try:
        teacher = connection.recv()
    except EOFError:
        return
    inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    try:
        engine = _start(teacher)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise
    connection.send(None)
    _serve(engine, inbox, connection)


def _receive(connection: Connection, inbox: queue.SimpleQueue[Request]) -> None:
    """Read the connection continuously, so that the sender never waits for an engine step."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):  # the actor is gone
            os._exit(0)


def _start(teacher: TeacherConfig) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    # The same class as on GPUs, so that teacher.engine accepts the same settings everywhere.
    arguments = AsyncEngineArgs(**engine_arguments(teacher))
    # The default usage context has a server's smaller batch sizes, for low latency.
    return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)


def _serve(engine: Any, inbox: queue.SimpleQueue[Request], connection: Connection) -> None:
    requests: dict[int, EngineRequest] = {}
    while True:
        responses: list[tuple[int, EngineResponse | str]] = []
        for number, token_ids, request in _arrived(inbox, wait=not engine.has_unfinished_requests()):
            if token_ids is None or request is None:
                if requests.pop(number, None):
                    engine.abort_request([str(number)])
                continue
            try:
                engine.add_request(str(number), engine_prompt(token_ids), sampling_params(request))
                requests[number] = request
            except refusals() as refusal:
                responses.append((number, str(refusal)))
        for output in engine.step() if engine.has_unfinished_requests() else ():
            if output.finished and (request := requests.pop(int(output.request_id), None)):
                responses.append((int(output.request_id), response_from(request, output)))
        if responses:
            connection.send(responses)


def _arrived(inbox: queue.SimpleQueue[Request], wait: bool) -> Iterator[Request]:
    """All requests received so far; ``wait`` for one if there is none."""
    try:
        yield inbox.get(block=wait)
        while True:
            yield inbox.get_nowait()
    except queue.Empty:
        return


if __name__ == "__main__":
    main()
