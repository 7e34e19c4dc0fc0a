"""The engine behind stepsal models in Inspect: batches, cancelled calls, errors, and weights that are shared."""

from __future__ import annotations

import threading
import time

import anyio
import pytest
from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model

from stepsal import Decoding, Segmentation, StepFlowConfig
from stepsal.harness.engine import Request
from stepsal.trace import Format


@pytest.mark.slow
class TestEngine:
    def test_models_of_one_name_share_their_weights(self) -> None:
        plain, edited = get_model("stepsal/mini"), get_model("stepsal/mini", tau_max=0.2)
        assert plain.api.engine is edited.api.engine
        assert plain.api.stepflow != edited.api.stepflow
        assert get_model("stepsal/mini", batch_size=2).api.max_connections() == 2

    def test_cancelled_answers_stop(self) -> None:
        engine, ids = get_model("stepsal/mini").api.engine, [1, 2, 3]
        decoding = Decoding(max_new_tokens=400, temperature=50.0)  # so hot that it does not end by itself
        passes = []
        handle = engine.model.original_model.register_forward_hook(lambda *_: passes.append(len(passes)))
        try:
            whole = engine.ask(Request(ids, decoding, 3)).result(60)  # the same answer, written to its end
            passes.clear()
            request = Request(ids, decoding, 3)
            reply = engine.ask(request)
            while len(passes) < 5:
                time.sleep(0.001)
            request.cancel()
            n = len(reply.result(60).tokens)
        finally:
            handle.remove()
        assert len(whole.tokens) > 200
        assert 5 <= n < len(whole.tokens) - 100
        assert len(passes) == n

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_call_that_is_cancelled_costs_no_token_more(self, backend: str) -> None:
        pytest.importorskip(backend)
        api, passes = get_model("stepsal/mini").api, []
        handle = api.model.original_model.register_forward_hook(lambda *_: passes.append(len(passes)))
        config = GenerateConfig(max_tokens=1000, temperature=50.0, seed=3)

        async def call() -> None:
            await api.generate([ChatMessageUser(content="Why?")], [], "auto", config)

        async def cancelled_after(n_passes: int) -> int:
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                while len(passes) < n_passes:
                    await anyio.sleep(0.001)
                group.cancel_scope.cancel()
            return len(passes)

        try:
            before = anyio.run(cancelled_after, 5, backend=backend)
            api.engine.run(lambda model: None).result(30)  # the engine is idle again
        finally:
            handle.remove()
        assert 5 <= before <= len(passes) <= before + 3

    def test_a_request_that_is_cancelled_before_its_turn_is_dropped(self) -> None:
        engine, hold = get_model("stepsal/mini").api.engine, threading.Event()
        busy = engine.run(lambda model: hold.wait(30))
        request = Request([1, 2, 3], Decoding(), 0)
        reply = engine.ask(request)
        request.cancel()
        hold.set()
        assert busy.result(30)
        assert reply.cancelled()
        assert len(engine.ask(Request([1, 2, 3], Decoding(max_new_tokens=2), 0)).result(30).tokens) == 2

    def test_many_calls_wait_at_once(self) -> None:
        """More than a program's shared threads, which Inspect needs for its files."""
        api, n = get_model("stepsal/mini").api, 60
        config, hold = GenerateConfig(max_tokens=1), threading.Event()
        busy = api.engine.run(lambda model: hold.wait(30))
        replies: list[str] = []

        async def call(i: int) -> None:
            replies.append((await api.generate([ChatMessageUser(content=f"{i}?")], [], "auto", config)).completion)

        async def all_of_them() -> None:
            async with anyio.create_task_group() as group:
                for i in range(n):
                    group.start_soon(call, i)
                await anyio.sleep(0.5)
                with anyio.fail_after(10):
                    assert await anyio.to_thread.run_sync(lambda: "a file is written") == "a file is written"
                hold.set()

        anyio.run(all_of_them)
        assert busy.result(30)
        assert len(replies) == n

    def test_an_error_is_that_of_its_request_and_the_engine_goes_on(self) -> None:
        engine, decoding = get_model("stepsal/mini").api.engine, Decoding(max_new_tokens=3)
        replies = [engine.ask(Request(ids, decoding, 0)) for ids in ([1, 2], [10**9], [3, 4, 5])]
        with pytest.raises(IndexError):
            replies[1].result(30)
        assert all(len(replies[i].result(30).tokens) == 3 for i in (0, 2))

    def test_an_answer_is_given_out_when_it_is_done_and_the_next_takes_its_place(self) -> None:
        engine, hold = get_model("stepsal/mini").api.engine, threading.Event()
        hot = Decoding(temperature=60.0, max_new_tokens=1)  # so hot that no answer ends by itself
        requests = [Request([1, 2, 3], hot.but(max_new_tokens=n), n, batch_size=2) for n in (120, 3, 4, 5)]
        finished: list[int] = []
        busy = engine.run(lambda model: hold.wait(30))
        replies = [engine.ask(request) for request in requests]
        for number, reply in enumerate(replies):
            reply.add_done_callback(lambda _, number=number: finished.append(number))
        hold.set()
        assert busy.result(30)
        assert [len(reply.result(60).tokens) for reply in replies] == [120, 3, 4, 5]
        assert finished == [1, 2, 3, 0]
        assert [reply.result().n_together for reply in replies] == [2] * 4

    def test_other_work_gets_its_turn(self) -> None:
        engine, hold = get_model("stepsal/mini").api.engine, threading.Event()
        hot, order = Decoding(temperature=60.0, max_new_tokens=20), list[str]()
        busy = engine.run(lambda model: hold.wait(30))
        first = [engine.ask(Request([1, 2, 3], hot, n, batch_size=2)) for n in range(2)]
        job = engine.run(lambda model: order.append("work"))
        later = [engine.ask(Request([1, 2, 3], hot, n, batch_size=2)) for n in range(2)]
        for name, replies in (("first", first), ("later", later)):
            for reply in replies:
                reply.add_done_callback(lambda _, name=name: order.append(name))
        hold.set()
        for future in (busy, job, *first, *later):
            future.result(60)
        assert order == ["first", "first", "work", "later", "later"]

    def test_settings_without_a_hash(self) -> None:
        marked, engine = Segmentation(Format.with_marker("Answer:")), get_model("stepsal/mini").api.engine
        requests = [
            Request([1, 2, 3], Decoding(max_new_tokens=2), 0, config, segmentation)
            for config, segmentation in ((StepFlowConfig(), marked), (None, Segmentation()), (StepFlowConfig(), marked))
        ]
        with pytest.warns(UserWarning, match="found no question"):
            replies = [reply.result(30) for reply in [engine.ask(request) for request in requests]]
        assert [reply.log is None for reply in replies] == [False, True, False]
        assert [reply.n_together for reply in replies] == [2, 1, 2]
        assert replies[0].log["without_question"] == 1

    def test_a_closed_model_says_so(self) -> None:
        model = get_model("stepsal/mini", memoize=False, revision="closing")
        model.api.close()
        with pytest.raises(RuntimeError, match="is closed: call get_model again"):
            anyio.run(model.api.generate, [ChatMessageUser(content="Hi")], [], "auto", GenerateConfig(max_tokens=2))
