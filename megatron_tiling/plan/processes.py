"""Runs in processes of their own, forked off this one: as many at a time as there are processors."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

ERROR_LINES = 12


def in_processes[T](jobs: Sequence[Callable[[], T]]) -> list[T | str]:
    """What each job returns, in their order; where one ends otherwise, the end of what it printed, or how it ended."""
    fork = multiprocessing.get_context("fork")
    results: dict[int, T | str] = {}
    running: dict[Any, tuple[int, Any, Any]] = {}
    waiting = list(enumerate(jobs))[::-1]
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            index, job = waiting.pop()
            ours, theirs = fork.Pipe()
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed below
            process = fork.Process(target=_run, args=(job, theirs, output.fileno()))
            process.start()
            theirs.close()
            running[ours] = index, process, output
        for ready in wait(list(running)):
            index, process, output = running.pop(ready)
            with output, cast(Connection, ready) as connection:
                try:
                    results[index] = connection.recv()
                    process.join()
                except EOFError:
                    process.join()
                    output.seek(0)
                    printed = "".join(output.readlines()[-ERROR_LINES:])
                    results[index] = printed or f"a plan's process ended with exit code {process.exitcode}"
    return [results[index] for index in range(len(jobs))]


def _run(job: Callable[[], Any], connection: Connection, output: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output, stream.fileno())
    connection.send(job())
