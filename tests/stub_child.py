"""Stands in for ``llkd_ray.teacher.vllm.child_main``, without vLLM; told what to do by its settings.

The first token id is the text's number. It is the reply's number of cached tokens; below zero it is refused,
and from 10,000 on it gets no reply.
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from llkd_ray.teacher.vllm.requests import EngineResponse


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    try:
        orders = connection.recv().engine
    except EOFError:
        return
    os.write(2, orders.get("write", "").encode())
    if "die" in orders:
        os._exit(orders["die"])
    connection.send(orders.get("refuse"))
    told = tuple(os.environ[name] for name in orders.get("tell", ()))
    kept_back: set[int] = set()
    while True:
        try:
            number, token_ids, _ = connection.recv()
        except EOFError:
            return
        if token_ids is None:
            told = (f"taken out: {len(kept_back & {number})}",)
        elif token_ids[0] < 0:
            connection.send([(number, "less than nothing")])
        elif token_ids[0] >= 10_000:
            kept_back.add(number)
        else:
            connection.send([(number, EngineResponse(token_ids[0], probs=(1.0, 2.0), answers=told))])


if __name__ == "__main__":
    main()
