"""One model, and one thread that runs it: requests that come in together are answered in one batch.

An `Engine` collects requests until none has come for a moment or the batch is full, answers those together that may
share a batch (the same sampling, stop texts, StepFlow and segmentation), and goes on. A batch's answers are given out
when the last of them is done. Models of the same name and options share one engine, so that a baseline and StepFlow in
one evaluation don't load the weights twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, NamedTuple, TypeVar

import anyio
from transformer_lens.model_bridge import TransformerBridge

from stepsal.generation.decoding import Decoding
from stepsal.generation.loop import Ended, write
from stepsal.intervention import StepFlowConfig, stepflow
from stepsal.trace import Segmentation

PATIENCE = 0.05  # seconds without a new request until a batch begins

T = TypeVar("T")


class Reply(NamedTuple):
    """The answer to a request.

    Attributes:
        tokens: the new tokens, with the one that ended the answer.
        ended: what ended the answer.
        log: `FlowLog.summary` of this answer, or None without StepFlow.
        n_together: number of answers that were written in the batch.
    """

    tokens: list[int]
    ended: Ended
    log: dict[str, Any] | None
    n_together: int


@dataclass(eq=False)
class Request:
    """A prompt to be answered.

    Attributes:
        prompt_ids: the tokens of the rendered prompt.
        decoding: settings of decoding.
        seed: seed of the sampling.
        stepflow: settings of StepFlow; None leaves the model as it is.
        segmentation: how StepFlow finds sections and steps.
        batch_size: largest batch that this request may be answered in.
        reply: future of the answer.
        cancelled: set by `cancel`.
    """

    prompt_ids: list[int]
    decoding: Decoding
    seed: int
    stepflow: StepFlowConfig | None = None
    segmentation: Segmentation = field(default_factory=Segmentation)
    batch_size: int = 16
    reply: Future[Reply] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Withdraw the request: it is dropped before its turn, and ended in the middle of its answer."""
        self.cancelled.set()
        self.reply.cancel()  # without effect once the answer has begun

    def may_share_a_batch(self, other: Request) -> bool:
        """Tell whether two requests differ in nothing but prompt, seed and limit."""
        return (self.decoding.but(max_new_tokens=1), self.stepflow, self.segmentation) == (
            other.decoding.but(max_new_tokens=1), other.stepflow, other.segmentation,
        )  # fmt: skip


class _Job(NamedTuple):
    """Work with the model other than answers."""

    work: Callable[[TransformerBridge], Any]
    result: Future[Any]


class Engine:
    """A model with a thread of its own, which alone runs it.

    Args:
        model: from `stepsal.load`; nothing else may run it while the engine is open.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self._queue: Queue[Request | _Job | None] = Queue()  # None ends the thread
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"stepsal {model.cfg.model_name}", daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> Future[Reply]:
        """Answer a request in its turn, and return its reply as a future.

        Args:
            request: the request.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._put(request)
        return request.reply

    def run(self, work: Callable[[TransformerBridge], T]) -> Future[T]:
        """Do other work with the model in its turn, and return its result as a future; cancel that to drop the work.

        Args:
            work: function of the model, called in the engine's thread.

        Raises:
            RuntimeError: the engine is closed.
        """
        job = _Job(work, Future())
        self._put(job)
        return job.result

    def close(self) -> None:
        """End the thread once all in the queue is done."""
        self._closed = True
        self._queue.put(None)

    def _put(self, item: Request | _Job) -> None:
        if self._closed or not self._thread.is_alive():
            raise RuntimeError(f"the model {self.model.cfg.model_name!r} is closed: call get_model again")
        self._queue.put(item)

    def _work(self) -> None:
        """Take one item after the other from the queue; the thread's main loop."""
        pending: list[Request | _Job | None] = []  # the item that ended the collecting of requests, if one did
        while (item := pending.pop() if pending else self._queue.get()) is not None:
            if isinstance(item, _Job):
                self._do(item)
                continue
            requests, pending = self._collect(item)
            for batch in _batches(requests):
                self._answer([request for request in batch if request.reply.set_running_or_notify_cancel()])

    def _collect(self, first: Request) -> tuple[list[Request], list[Request | _Job | None]]:
        """Return the requests that came together, and the other item, if any, that came after them."""
        requests = [first]
        while len(requests) < min(request.batch_size for request in requests):
            try:
                item = self._queue.get(timeout=PATIENCE)
            except Empty:
                break
            if not isinstance(item, Request):
                return requests, [item]
            requests.append(item)
        return requests, []

    def _do(self, job: _Job) -> None:
        if not job.result.set_running_or_notify_cancel():
            return
        try:
            job.result.set_result(job.work(self.model))
        except BaseException as error:  # it is that of whoever asked, and the thread must go on
            job.result.set_exception(error)

    def _answer(self, requests: Sequence[Request]) -> None:
        """Answer requests of one batch; after an error one by one, so that only the request at fault gets it."""
        if not requests:
            return
        try:
            replies = self._replies(requests)
        except BaseException as error:  # it is that of whoever asked, and the thread must go on
            if len(requests) == 1:
                requests[0].reply.set_exception(error)
                return
            for request in requests:
                self._answer([request])
            return
        for request, reply in zip(requests, replies, strict=True):
            request.reply.set_result(reply)

    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        first = requests[0]
        flow = nullcontext() if first.stepflow is None else stepflow(
            self.model, first.stepflow, segmentation=first.segmentation
        )  # fmt: skip
        with flow as log:
            answers = write(
                self.model, [request.prompt_ids for request in requests],
                max_new_tokens=[request.decoding.max_new_tokens for request in requests],
                decoding=first.decoding, segmentation=first.segmentation, seeds=[request.seed for request in requests],
                still_asked=lambda row: not requests[row].cancelled.is_set(),
            )  # fmt: skip
        logs = [None if log is None else log.of(row).summary() for row in range(len(requests))]
        return [
            Reply(tokens, ended, summary, len(requests)) for (tokens, ended), summary in zip(answers, logs, strict=True)
        ]


def _batches(requests: Sequence[Request]) -> list[list[Request]]:
    """Group requests that may share a batch, by equality: settings need not have a hash."""
    batches: list[list[Request]] = []
    for request in requests:
        batch = next((batch for batch in batches if batch[0].may_share_a_batch(request)), None)
        if batch is None:
            batches.append([request])
        else:
            batch.append(request)
    return batches


async def result_of(future: Future[T]) -> T:
    """Wait for the result of another thread, in asyncio or trio, without holding up the event loop.

    Each wait has a thread of its own: those that a program shares are few, and Inspect writes its files by them. The
    thread ends with the wait, also where that is cancelled before there is a result.

    Args:
        future: what `Engine.ask` or `Engine.run` returned.
    """
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    try:
        await anyio.to_thread.run_sync(done.wait, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
    finally:
        done.set()  # lets the thread of a cancelled wait go
    return future.result()


_engines: dict[tuple[Any, ...], tuple[Engine, int]] = {}  # with the number of those who use it
_lock = threading.Lock()


def shared_engine(key: tuple[Any, ...], load: Callable[[], TransformerBridge]) -> Engine:
    """Return the engine of a key, and make it if there is none; `release` gives it back.

    Args:
        key: identity of an engine: the model's name and how it is loaded.
        load: function that loads the model of a new engine.
    """
    with _lock:
        engine, n_users = _engines.get(key, (None, 0))
        engine = engine or Engine(load())
        _engines[key] = engine, n_users + 1
        return engine


def release(key: tuple[Any, ...]) -> None:
    """Give an engine back; once nobody uses it, it is closed and its model forgotten.

    Args:
        key: as in `shared_engine`.
    """
    with _lock:
        engine, n_users = _engines.pop(key)
        if n_users > 1:
            _engines[key] = engine, n_users - 1
        else:
            engine.close()
