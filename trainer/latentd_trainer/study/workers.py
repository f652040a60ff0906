"""Studies several claims at once, each in a process of its own, for torch does best here with one thread in each."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from latentd_trainer.study.section import Section, Settings
from latentd_trainer.train import InterruptedTraining

Tell = Callable[[str, str], None]
"""Told a claim's name and what is being done for it."""


@dataclass(frozen=True)
class Studied:
    """A claim's section, and what it took."""

    name: str
    section: Section
    seconds: float


def study(name: str, settings: Settings) -> Studied:
    """Study one claim, in this process."""
    module = importlib.import_module(f"latentd_trainer.study.{name}")
    torch.set_num_threads(1)  # sums come out differently with another number
    began = time.monotonic()
    section: Section = module.study(settings)
    return Studied(name, section, time.monotonic() - began)


def study_all(names: Sequence[str], settings: Settings, jobs: int, tell: Tell) -> Generator[Studied, None, None]:
    """Study claims, `jobs` at a time, and yield each when it is done; with one job in this process.

    When it is closed or fails, processes that still study are told to end, upon which trainings save first.

    Raises:
        ChildProcessError: a process ended before its claim was studied.
        Exception: what studying a claim raised, with where it did as a note.
    """
    if jobs == 1:
        for name in names:
            yield study(name, dataclasses.replace(settings, tell=partial(tell, name)))
        return
    context = multiprocessing.get_context("spawn")
    waiting = list(names)
    running: dict[Connection, tuple[str, SpawnProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(name, settings, sender), daemon=True)
                process.start()
                sender.close()  # so that the receiver sees the end of the process
                running[receiver] = name, process
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                name, process = running[ready]
                try:
                    message = ready.recv()
                except EOFError as error:
                    process.join()
                    raise ChildProcessError(f"{name}: its process ended with status {process.exitcode}") from error
                if isinstance(message, str):
                    tell(name, message)
                elif isinstance(message, Exception):
                    raise message
                else:
                    process.join()
                    del running[ready]
                    yield message
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _work(name: str, settings: Settings, sender: Connection) -> None:
    """Study a claim and send what is being done, then the outcome."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    try:
        sender.send(study(name, dataclasses.replace(settings, tell=sender.send)))
    except InterruptedTraining as stopped:
        sys.exit(stopped.exit_status)
    except Exception as error:
        error.add_note(traceback.format_exc())
        sender.send(error)
