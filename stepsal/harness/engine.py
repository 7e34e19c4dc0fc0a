"""One model, one thread that runs it: requests that come in together are answered in one batch.

An `Engine` collects requests until none has come for a moment or the batch is full, answers those together that may
share a batch (the same sampling, stops and StepFlow), and goes on. A batch's answers are given out when the last of
them is done. Models of the same name and options share one engine, so that a baseline and StepFlow in one evaluation
don't load the weights twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, NamedTuple

from transformer_lens.model_bridge import TransformerBridge

from stepsal.generation.answers import Ended, write
from stepsal.intervention import StepFlowConfig, stepflow

PATIENCE = 0.05  # seconds without a new request until a batch begins


class Sharing(NamedTuple):
    """What requests of one batch have in common."""

    temperature: float
    top_p: float
    stop: tuple[str, ...]
    stepflow: StepFlowConfig | None


class Reply(NamedTuple):
    """New tokens, what ended them, and StepFlow's log of this answer (`FlowLog.summary`); of how many in the batch."""

    tokens: list[int]
    ended: Ended
    log: dict[str, Any] | None
    batch: int


@dataclass(eq=False)
class Request:
    """A prompt to go on with. Once `unwanted` is set it is dropped, also in the middle of its answer."""

    prompt: list[int]
    max_new_tokens: int
    seed: int
    sharing: Sharing
    most_together: int = 16
    unwanted: threading.Event = field(default_factory=threading.Event)
    reply: Future[Reply] = field(default_factory=Future)


class _Job(NamedTuple):
    """Other work with the model."""

    work: Callable[[TransformerBridge], Any]
    done: Future[Any]


class Engine:
    """A model and the thread that runs it.

    Args:
        model: from `stepsal.load`; nobody else may run it in the meantime.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self._waiting: Queue[Request | _Job | None] = Queue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"stepsal {model.cfg.model_name}", daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> Future[Reply]:
        """Answer a request, in its turn.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._put(request)
        return request.reply

    def run(self, work: Callable[[TransformerBridge], Any]) -> Future[Any]:
        """Do something else with the model, in its turn, unless the future is cancelled before.

        Raises:
            RuntimeError: the engine is closed.
        """
        job = _Job(work, Future())
        self._put(job)
        return job.done

    def close(self) -> None:
        """End the thread, after what is waiting."""
        self._closed = True
        self._waiting.put(None)

    def _put(self, what: Request | _Job) -> None:
        if self._closed or not self._thread.is_alive():
            raise RuntimeError(f"the model {self.model.cfg.model_name!r} is closed: call get_model again")
        self._waiting.put(what)

    def _work(self) -> None:
        ahead: list[Request | _Job | None] = []  # taken from the queue while collecting
        while (came := ahead.pop() if ahead else self._waiting.get()) is not None:
            if isinstance(came, _Job):
                self._do(came)
                continue
            requests = [came]
            while len(requests) < min(request.most_together for request in requests) and not ahead:
                try:
                    came = self._waiting.get(timeout=PATIENCE)
                except Empty:
                    break
                (requests if isinstance(came, Request) else ahead).append(came)  # type: ignore[arg-type]
            groups: list[list[Request]] = []  # by equality: settings need not have a hash
            for request in requests:
                group = next((g for g in groups if g[0].sharing == request.sharing), None)
                groups.append([request]) if group is None else group.append(request)
            for group in groups:
                self._answer([request for request in group if not request.unwanted.is_set()])

    def _do(self, job: _Job) -> None:
        if not job.done.set_running_or_notify_cancel():
            return
        try:
            job.done.set_result(job.work(self.model))
        except BaseException as error:
            job.done.set_exception(error)

    def _answer(self, requests: Sequence[Request]) -> None:
        """Answer requests that share a batch; after an error one by one, so that it is that of the guilty alone."""
        if not requests:
            return
        config = requests[0].sharing.stepflow
        try:
            with stepflow(self.model, config) if config is not None else nullcontext() as log:
                written = write(
                    self.model, [r.prompt for r in requests], seeds=[r.seed for r in requests],
                    max_new_tokens=[r.max_new_tokens for r in requests], temperature=requests[0].sharing.temperature,
                    top_p=requests[0].sharing.top_p, stop=requests[0].sharing.stop,
                    wanted=lambda row: not requests[row].unwanted.is_set(),
                )  # fmt: skip
            for i, (request, (tokens, ended)) in enumerate(zip(requests, written, strict=True)):
                summary = None if log is None else log.of(i).summary()
                request.reply.set_result(Reply(tokens, ended, summary, len(requests)))
        except BaseException as error:  # the thread must go on
            if len(requests) == 1:
                requests[0].reply.set_exception(error)
                return
            for request in requests:
                self._answer([request])


_engines: dict[tuple[Any, ...], tuple[Engine, int]] = {}  # with the number of those who use it
_lock = threading.Lock()


def shared_engine(key: tuple[Any, ...], load: Callable[[], TransformerBridge]) -> Engine:
    """The engine of a key, made if there is none; to be given back by `release`."""
    with _lock:
        engine, users = _engines.get(key, (None, 0))
        engine = engine or Engine(load())
        _engines[key] = engine, users + 1
        return engine


def release(key: tuple[Any, ...]) -> None:
    """One user less; the engine of nobody is closed, and its model forgotten."""
    with _lock:
        engine, users = _engines.pop(key)
        if users > 1:
            _engines[key] = engine, users - 1
        else:
            engine.close()
