"""One model, and one thread that runs it: requests that come in together are answered in one batch.

An `Engine` answers requests together that may share a batch: those of the same sampling, stop texts, StepFlow and
segmentation. An answer is given out when it is done, and the next request takes its place. Where other work waits in
the queue, no more requests join a batch, so that its turn comes. Models of the same name and options share one engine,
so that a baseline and StepFlow in one evaluation don't load the weights twice.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, NamedTuple, TypeAlias, TypeVar

import anyio
from transformer_lens.model_bridge import TransformerBridge

from stepsal.generation.decoding import Decoding
from stepsal.generation.loop import Ended, Prompt, write_each
from stepsal.intervention import StepFlowConfig, stepflow
from stepsal.trace import Segmentation

PATIENCE = 0.05  # seconds without a new request until a batch begins
LONGEST = 1024  # requests that share a StepFlow and its log

T = TypeVar("T")


class Reply(NamedTuple):
    """The answer to a request.

    Attributes:
        tokens: the new tokens, with the one that ended the answer.
        ended: what ended the answer.
        log: `FlowLog.summary` of this answer, or None without StepFlow.
        n_together: largest number of answers that it was written together with, itself included.
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
        mine, theirs = (
            (request.decoding.but(max_new_tokens=1), request.stepflow, request.segmentation, request.batch_size)
            for request in (self, other)
        )
        return mine == theirs


class _Job(NamedTuple):
    """Work with the model other than answers."""

    work: Callable[[TransformerBridge], Any]
    result: Future[Any]


_Item: TypeAlias = "Request | _Job | None"
"""What stands in the queue; None ends the thread."""


class Engine:
    """A model with a thread of its own, which alone runs it.

    Args:
        model: from `stepsal.load`; nothing else may run it while the engine is open.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self._queue: Queue[_Item] = Queue()
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
        waiting: deque[_Item] = deque()
        while (item := waiting.popleft() if waiting else self._queue.get()) is not None:
            if isinstance(item, _Job):
                self._do(item)
            else:
                batch = _Batch(item, waiting, self._queue)
                batch.collect()
                self._answer(batch)

    def _do(self, job: _Job) -> None:
        if not job.result.set_running_or_notify_cancel():
            return
        try:
            job.result.set_result(job.work(self.model))
        except BaseException as error:  # it is that of whoever asked, and the thread must go on
            job.result.set_exception(error)

    def _answer(self, batch: _Batch) -> None:
        """Answer requests together; after an error one by one, so that only the request at fault gets it."""
        try:
            self._write(batch)
        except BaseException as error:  # it is that of whoever asked, and the thread must go on
            if len(batch.requests) == 1:
                batch.requests[0].reply.set_exception(error)
                return
            for request in batch.requests:
                if not request.reply.done():
                    self._answer(_Batch(request, deque(), Queue()))

    def _write(self, batch: _Batch) -> None:
        """Write the answers of a batch, and give each out when it is done."""
        first, requests = batch.first, batch.requests
        flow = nullcontext() if first.stepflow is None else stepflow(
            self.model, first.stepflow, segmentation=first.segmentation
        )  # fmt: skip
        with flow as log:
            for answer in write_each(
                self.model, batch.take, first.batch_size, decoding=first.decoding, segmentation=first.segmentation,
                still_asked=lambda number: not requests[number].cancelled.is_set(),
            ):  # fmt: skip
                summary = None if log is None else log.of(answer.number).summary()
                requests[answer.number].reply.set_result(Reply(answer.tokens, answer.ended, summary, answer.n_together))


class _Batch:
    """The requests that are answered together, the later of which are taken from the queue while others are written.

    Args:
        first: the request that comes first, whose answer nobody has begun or withdrawn; others may share its batch.
        waiting: items that were taken from the queue for a later turn; those that can't share the batch go there.
        queue: the queue.

    Attributes:
        first: the same.
        requests: the requests so far, in the order in which their answers begin.
    """

    def __init__(self, first: Request, waiting: deque[_Item], queue: Queue[_Item]) -> None:
        self.first, self.requests = first, [first]
        self._waiting, self._queue = waiting, queue
        self._n_taken = 0

    def collect(self) -> None:
        """Wait for requests that come together with the first, up to a full batch."""
        self.requests = [] if not self.first.reply.set_running_or_notify_cancel() else [self.first]
        for item in [self._waiting.popleft() for _ in range(len(self._waiting))]:
            self._admit(item)
        while len(self.requests) < self.first.batch_size and not any(map(_is_no_request, self._waiting)):
            try:
                self._admit(self._queue.get(timeout=PATIENCE))
            except Empty:
                return

    def take(self, n: int) -> list[Prompt]:
        """Return the next prompts; none where other work waits for its turn, or a log of StepFlow has grown long.

        Args:
            n: largest number of prompts.
        """
        while len(self.requests) - self._n_taken < n and not self._waiting and len(self.requests) < LONGEST:
            try:
                self._admit(self._queue.get_nowait())
            except Empty:
                break
        new = self.requests[self._n_taken : self._n_taken + n]
        self._n_taken += len(new)
        return [Prompt(request.prompt_ids, request.seed, request.decoding.max_new_tokens) for request in new]

    def _admit(self, item: _Item) -> None:
        """Let an item share the batch if it can, and put it with those that wait otherwise."""
        if not isinstance(item, Request) or not self.first.may_share_a_batch(item):
            self._waiting.append(item)
        elif item.reply.set_running_or_notify_cancel():
            self.requests.append(item)


def _is_no_request(item: _Item) -> bool:
    return not isinstance(item, Request)


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
