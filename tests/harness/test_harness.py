"""stepsal models in Inspect: whole evaluations with local tasks, on the embedded reasoner and SmolLM2."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from inspect_ai import Task, eval, eval_retry
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver, use_tools
from inspect_ai.tool import Tool, ToolCall, ToolInfo, tool
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import Decoding, Segmentation, StepFlowConfig, StepSaliency
from stepsal.harness import capture_step_saliency
from stepsal.harness.chat import tool_calls
from stepsal.harness.engine import Request
from stepsal.harness.provider import StepsalAPI
from stepsal.tasks import chain
from stepsal.trace import Format

PROBLEMS = [chain.sample(910_000 + i, length=length) for i, length in enumerate((1, 2, 3, 2, 3))]
TASK_FILE = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from stepsal.tasks import chain

@task
def chains(n: int = 4, length: int = 3):
    problems = [chain.sample(910_000 + i, length=length) for i in range(n)]
    return Task([Sample(p.question, target=f"= {p.reference}.", id=i) for i, p in enumerate(problems)],
                solver=generate(), scorer=includes())
"""


def chains(*solvers: Solver) -> Task:
    samples = [Sample(p.question, target=f"= {p.reference}.", id=i) for i, p in enumerate(PROBLEMS)]
    return Task(samples, solver=list(solvers) or generate(), scorer=includes(), name="chains")


def run(
    task: Task, folder: Path, model: str = "stepsal/mini", args: dict[str, Any] | None = None, **options: Any
) -> EvalLog:
    options = {"max_tokens": 120, "display": "none", "log_dir": str(folder)} | options
    (log,) = eval(task, model=model, model_args=args or {}, **options)
    return log


def samples_of(log: EvalLog) -> list[EvalSample]:
    assert log.status == "success", log.error
    assert log.samples
    return sorted(log.samples, key=lambda sample: (sample.id, sample.epoch))


def said(sample: EvalSample) -> tuple[str, str]:
    """Reasoning and text."""
    content = sample.output.message.content
    if isinstance(content, str):
        return "", content
    reasoning = "".join(c.reasoning for c in content if isinstance(c, ContentReasoning))
    return reasoning, "".join(c.text for c in content if isinstance(c, ContentText))


@pytest.mark.slow
class TestAnswers:
    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}])
    @pytest.mark.parametrize("flow", [None, StepFlowConfig(tau_max=0.3, alpha=0.2, oeb_layers=(0, 1, 2))])
    def test_are_those_of_generate(
        self, mini: TransformerBridge, tmp_path: Path, flow: StepFlowConfig | None, options: dict[str, Any]
    ) -> None:
        args = {} if flow is None else {"tau_max": 0.3, "alpha": 0.2, "oeb_layers": [0, 1, 2]}
        samples = samples_of(run(chains(), tmp_path, args=args, **options))
        decoding = {name: value for name, value in options.items() if name != "seed"}
        seeds = set()
        for problem, sample in zip(PROBLEMS, samples, strict=True):
            about = sample.output.metadata
            seeds.add(about["seed"])
            trace = stepsal.generate(
                mini, problem.question, stepflow=flow, seed=about["seed"], max_new_tokens=120, **decoding
            )
            assert said(sample) == (trace.thinking, trace.summary or "")
            assert sample.output.usage.output_tokens == len(trace) - trace.n_prompt
            assert sample.output.stop_reason == ("max_tokens" if trace.truncated else "stop")
            assert 1 <= about["batch"] <= len(PROBLEMS)
            if flow is not None:
                with stepsal.stepflow(mini, flow) as log:
                    stepsal.generate(mini, problem.question, seed=about["seed"], max_new_tokens=120, **decoding)
                (answer,) = sample.metadata["stepflow"]
                assert answer["fired"] == log.summary()["fired"]
                assert answer["without_question"] == 0
                assert answer["config"] == json.loads(json.dumps(flow.to_dict()))
            else:
                assert "stepflow" not in sample.metadata
        assert len(seeds) == len(PROBLEMS)

    def test_do_not_depend_on_the_batch(self, tmp_path: Path) -> None:
        options = {"temperature": 2.0, "seed": 1, "epochs": 2}
        together = samples_of(run(chains(), tmp_path, **options))
        alone = samples_of(run(chains(), tmp_path, max_connections=1, **options))
        assert max(s.output.metadata["batch"] for s in together) > 1  # of ten that are asked for at once
        assert {s.output.metadata["batch"] for s in alone} == {1}
        assert [said(s) for s in together] == [said(s) for s in alone]
        assert any(said(a) != said(b) for a, b in zip(together[::2], together[1::2], strict=True))  # epochs differ

    def test_of_smollm2_have_no_reasoning(self, smollm2: TransformerBridge, tmp_path: Path) -> None:
        question = "What is 2 + 3?"
        task = Task([Sample(question, target="5", id=0)], solver=generate(), scorer=includes())
        (sample,) = samples_of(run(task, tmp_path, "stepsal/smollm2", max_tokens=30))
        trace = stepsal.generate(smollm2, question, max_new_tokens=30)
        assert said(sample) == ("", trace.response.removesuffix("<|im_end|>").strip())

    def test_stop_before_a_stop_sequence(self, mini: TransformerBridge, tmp_path: Path) -> None:
        for sample, problem in zip(samples_of(run(chains(), tmp_path, stop_seqs=["so "])), PROBLEMS, strict=True):
            whole = stepsal.generate(mini, problem.question).thinking
            assert said(sample) == (whole.partition("so ")[0].strip(), "")
            assert sample.output.stop_reason == "stop"

    def test_a_prompt_that_is_too_long_ends_the_sample(self, tmp_path: Path) -> None:
        task = Task([Sample("Why? " * 2000, target="x")], solver=generate(), scorer=includes())
        (sample,) = samples_of(run(task, tmp_path))
        assert sample.output.stop_reason == "model_length"
        assert "leaves no room" in sample.output.error

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"tau": 0.1}, r"unknown model arguments \['tau'\]"),
            ({"tau_max": 3}, "tau_max=3"),
            ({"stepflow": "on"}, "'on'"),
            ({"stepflow": 0}, "stepflow=0 must be true or false"),
            ({"preset": "nowhere.json"}, "nowhere.json"),
            ({"dtype": "bf16"}, "dtype='bf16' is unknown"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"oeb_layers": [99]}, "no layer 99"),
            ({"oeb_layers": "top"}, "oeb_layers='top' names no layers"),
            ({"oeb_layers": None}, "oeb_layers=None names no layers"),
            ({"format": "thinking"}, "format='thinking' is unknown"),
            ({"min_chars": "few"}, "min_chars='few'"),
            ({"preset": "ours"}, "no preset 'ours'"),
        ],
    )
    def test_bad_arguments_are_refused_at_once(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            get_model("stepsal/mini", **args)

    def test_options_that_have_no_effect_are_refused(self, tmp_path: Path) -> None:
        log = run(chains(), tmp_path, logprobs=True)
        assert log.status == "error"
        assert "logprobs" in log.error.message

    @pytest.mark.parametrize(
        ("arguments", "settings"),
        [
            ({}, None),
            ({"stepflow": True}, {}),
            ({"alpha": 0.1, "stepflow": False}, None),
            ({"smi_layers": "none"}, {"smi_layers": ()}),
            ({"oeb_layers": "()"}, {"oeb_layers": ()}),
            ({"oeb_layers": "0,1", "smi_layers": "middle"}, {"oeb_layers": (0, 1), "smi_layers": "middle"}),
            ({"oeb_layers": ["0", "1"], "tau_max": "1e-1"}, {"oeb_layers": (0, 1), "tau_max": 0.1}),
            ({"smi_layers": ["0.25", "0.5"], "window": "4"}, {"smi_layers": (0.25, 0.5), "window": 4}),
            ({"oeb_layers": 3, "window": "none"}, {"oeb_layers": (3,)}),
            ({"preset": "authors-code", "alpha": 0.2}, {"window": 4, "bridge": "prompt", "alpha": 0.2}),
        ],
        ids=str,
    )
    def test_settings_of_stepflow(self, arguments: dict[str, Any], settings: dict[str, Any] | None) -> None:
        expected = None if settings is None else StepFlowConfig(**settings)
        assert get_model("stepsal/mini", **arguments).api.stepflow == expected

    def test_settings_of_stepflow_from_a_file(self, tmp_path: Path) -> None:
        config = StepFlowConfig(tau_max=0.4, smi_layers=())
        path = str(config.save(tmp_path / "preset.json"))
        assert get_model("stepsal/mini", preset=path).api.stepflow == config
        assert get_model("stepsal/mini", preset=path, alpha=0.2).api.stepflow == config.but(alpha=0.2)

    def test_a_preset_brings_its_segmentation(self, tmp_path: Path) -> None:
        paragraphs = stepsal.Segmentation("think", split="paragraph")
        about = {"segmentation": paragraphs.to_dict()}
        path = str(stepsal.StepFlowConfig().save(tmp_path / "preset.json", calibration=about))
        assert get_model("stepsal/mini", preset=path).api.segmentation == paragraphs
        assert get_model("stepsal/mini", preset=path, split="line").api.segmentation.split == "line"

    def test_steps_are_found_as_asked_for_in_stepflow_and_in_traces(
        self, mini: TransformerBridge, tmp_path: Path
    ) -> None:
        flow, segmentation = StepFlowConfig(tau_max=0.4, alpha=0.5), Segmentation(split="line", min_chars=3)
        args = {"tau_max": 0.4, "alpha": 0.5, "split": "line", "min_chars": "3"}
        task = chains(generate(), capture_step_saliency(str(tmp_path / "maps"), layers="deep"))
        for problem, sample in zip(PROBLEMS, samples_of(run(task, tmp_path, args=args)), strict=True):
            trace = stepsal.generate(
                mini, problem.question, stepflow=flow, segmentation=segmentation, max_new_tokens=120
            )
            assert said(sample) == (trace.thinking, trace.summary or "")
            summary = sample.store["step_saliency"]
            assert summary["segmentation"] == {"format": "think", "split": "line", "min_chars": 3}
            assert StepSaliency.load(summary["path"]).step_texts == tuple(map(trace.step_text, range(len(trace.steps))))
            assert summary["layers"] == [6, 7]


@pytest.mark.slow
class TestRuns:
    def test_an_interrupted_evaluation_is_resumed(self, tmp_path: Path) -> None:
        (tmp_path / "task.py").write_text(TASK_FILE)
        options = (
            "--model stepsal/mini -M tau_max=0.3 --max-tokens 100 --temperature 0.9 --seed 4 --epochs 5 "
            "--max-connections 1 --log-buffer 1 --display none --log-format json"
        )
        command = [str(Path(sys.executable).with_name("inspect")), "eval", "task.py", *options.split()]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(1200):  # until some samples are there, but not all
            logs = list((tmp_path / "logs").glob("*.json"))
            if (logs and logs[0].read_text().count('"total_time"') >= 3) or process.poll() is not None:
                break
            time.sleep(0.05)
        assert process.poll() is None, process.stdout.read()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        (path,) = (tmp_path / "logs").glob("*.json")
        interrupted = read_eval_log(str(path))
        assert interrupted.status == "cancelled"
        done = {(s.id, s.epoch): said(s) for s in interrupted.samples if s.error is None and s.scores}
        assert 0 < len(done) < 20
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            (log,) = eval_retry(str(path), log_dir=str(tmp_path / "retried"), display="none")
            whole = run_file(tmp_path)
        resumed = {(s.id, s.epoch): said(s) for s in samples_of(log)}
        assert len(resumed) == 20
        assert done.items() <= resumed.items()
        assert resumed == whole  # as if it had never been interrupted

    def test_models_of_one_name_share_their_weights(self) -> None:
        plain, edited = get_model("stepsal/mini"), get_model("stepsal/mini", tau_max=0.2)
        assert plain.api.engine is edited.api.engine
        assert plain.api.stepflow != edited.api.stepflow
        assert get_model("stepsal/mini", batch_size=2).api.max_connections() == 2

    def test_inspects_cache_tells_settings_apart(self, tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
            strong = {"tau_max": 0.9, "alpha": 3.0, "oeb_layers": "all", "smi_layers": "all"}
            runs = [samples_of(run(chains(), tmp_path, args=args, cache=True)) for args in ({}, strong, {}, strong)]
        plain, edited, plain_again, edited_again = ([said(s) for s in samples] for samples in runs)
        assert plain == plain_again != edited == edited_again
        assert all("batch" in s.output.metadata for s in runs[1])

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

    @pytest.mark.parametrize(
        ("options", "named"),
        [({"top_p": 0.0}, "top_p=0.0"), ({"temperature": -1.0}, "ture=-1.0"), ({"max_tokens": 0}, "max_new_tokens=0")],
    )
    def test_numbers_out_of_range(self, options: dict[str, Any], named: str) -> None:
        api = get_model("stepsal/mini").api
        with pytest.raises(ValueError, match=named):
            anyio.run(api.generate, [ChatMessageUser(content="Hi")], [], "auto", GenerateConfig(**options))

    def test_a_call_that_failed_is_repeated_with_its_seed(self) -> None:
        api, chat = get_model("stepsal/mini").api, [ChatMessageUser(content=PROBLEMS[1].question)]
        config = GenerateConfig(max_tokens=400, temperature=50.0, seed=8)

        async def cut_off() -> None:
            with anyio.move_on_after(0.2):
                await api.generate(chat, [], "auto", config)

        async def twice() -> list[int]:
            short = config.merge(GenerateConfig(max_tokens=1))
            return [(await api.generate(chat, [], "auto", short)).metadata["seed"] for _ in range(2)]

        before = len(api._counts)
        anyio.run(cut_off)
        assert len(api._counts) == before + 1
        first, second = anyio.run(twice)
        assert first != second  # equal calls of a sample differ
        assert list(api._counts.values())[-1] == 2  # and the one that was cut off does not count


def run_file(folder: Path) -> dict[tuple[Any, int], tuple[str, str]]:
    (log,) = eval(
        "task.py", model="stepsal/mini", model_args={"tau_max": 0.3}, max_tokens=100, temperature=0.9,
        seed=4, epochs=5, log_dir=str(folder / "whole"), display="none",
    )  # fmt: skip
    return {(s.id, s.epoch): said(s) for s in samples_of(log)}


@pytest.mark.slow
def test_step_maps_are_kept_beside_the_scores(mini: TransformerBridge, tmp_path: Path) -> None:
    task = chains(generate(), capture_step_saliency(str(tmp_path / "maps"), layers=[0, 7]))
    flow = StepFlowConfig(tau_max=0.3)
    for problem, sample in zip(PROBLEMS, samples_of(run(task, tmp_path, args={"tau_max": 0.3})), strict=True):
        kept = sample.store["step_saliency"]
        trace = stepsal.generate(mini, problem.question, stepflow=flow, max_new_tokens=120)
        expected = stepsal.step_saliency(mini, trace, stepflow=flow, layers=[0, 7])
        saved = StepSaliency.load(kept["path"])
        assert saved.step_texts == expected.step_texts
        assert (saved.values - expected.values).abs().max() <= 1e-4 * expected.values.max()
        assert kept["layers"] == [0, 7]
        assert kept["tokens"] == len(trace)
        assert kept["stepflow"]["tau_max"] == 0.3


@pytest.mark.slow
def test_a_sample_without_a_map_does_not_end_the_evaluation(tmp_path: Path) -> None:
    task = Task(
        [Sample("Why? " * 2000, target="x", id=0), Sample(PROBLEMS[0].question, target="x", id=1)],
        solver=[generate(), capture_step_saliency(str(tmp_path / "maps"))], scorer=includes(),
    )  # fmt: skip
    long, short = samples_of(run(task, tmp_path))
    assert "leaves no room" in long.store["step_saliency"]["error"]
    assert Path(short.store["step_saliency"]["path"]).exists()
    (alone,) = samples_of(run(Task([Sample("Hi")], solver=capture_step_saliency(str(tmp_path))), tmp_path))
    assert "are not there" in alone.store["step_saliency"]["error"]


def test_maps_need_a_stepsal_model(tmp_path: Path) -> None:
    log = run(chains(capture_step_saliency(str(tmp_path))), tmp_path, "mockllm/model")
    assert "capture_step_saliency needs a stepsal/... model" in log.error.message


# ---------------------------------------------------------------------------------------------------- chats


@tool
def add() -> Tool:
    async def execute(x: int, y: int) -> int:
        """Add two numbers.

        Args:
            x: The first.
            y: The second.
        """
        return x + y

    return execute


CALL = '<tool_call>{"name": "add", "arguments": {"x": 2, "y": 3}}</tool_call>'


@pytest.mark.slow
def test_a_tool_is_called(tmp_path: Path) -> None:
    """SmolLM2 is too small to choose a tool, but it repeats a call that it is told to make."""
    task = Task(
        [Sample(f"Repeat this line and nothing else:\n{CALL}", target="5")],
        solver=[use_tools(add()), generate(tool_calls="single")], scorer=includes(),
    )  # fmt: skip
    (sample,) = samples_of(run(task, tmp_path, "stepsal/smollm2", max_tokens=60))
    calls = [m for m in sample.messages if isinstance(m, ChatMessageAssistant) and m.tool_calls]
    assert calls[0].tool_calls[0].function == "add"
    assert calls[0].tool_calls[0].arguments == {"x": 2, "y": 3}
    (answer,) = (m for m in sample.messages if isinstance(m, ChatMessageTool))
    assert answer.text == "5"


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        (r"The answer is \boxed{\frac{1}{2}}.", r"The answer is \boxed{\frac{1}{2}}.", []),
        ('```json\n{"name": "x", "arguments": {}}\n```', '```json\n{"name": "x", "arguments": {}}\n```', []),
        (f"So: {CALL}", "So:", [("add", {"x": 2, "y": 3})]),
        ('<tool_call>{"name": "list_files"}</tool_call>', "", [("list_files", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": {\\"b\\": 1}}"}</tool_call>', "", [("f", {"a": {"b": 1}})]),
        (f"{CALL}\n{CALL}", "", [("add", {"x": 2, "y": 3})] * 2),
    ],
)
def test_what_is_a_tool_call(text: str, rest: str, calls: list[tuple[str, dict]]) -> None:
    words, parsed = tool_calls(text)
    assert words == rest
    assert [(call.function, call.arguments, call.parse_error) for call in parsed] == [(*call, None) for call in calls]


def test_a_call_that_cannot_be_read_is_told_to_the_model() -> None:
    for text in ("<tool_call>{</tool_call>", "<tool_call>[1]</tool_call>", '<tool_call>{"arguments": {}}</tool_call>'):
        (call,) = tool_calls(text)[1]
        assert "is no call" in call.parse_error


R1 = (  # what R1-Distill's template does with earlier answers
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<A>{{ m.content.split('</think>')[-1] }}<E>{% endif %}{% endfor %}<A><think>\n"
)
STRICT = (  # as Gemma's: no system prompt, user and assistant take turns
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<model>"
)


class TestRendering:
    @pytest.fixture(scope="class")
    def api(self) -> StepsalAPI:
        return get_model("stepsal/mini").api

    def test_the_prompt_is_that_of_generate(self, api: StepsalAPI, mini: TransformerBridge) -> None:
        question = PROBLEMS[0].question
        assert (
            api.render([ChatMessageUser(content=question)], [])
            == stepsal.trace.render_prompt(mini.tokenizer, question).text
        )

    def test_reasoning_of_earlier_answers(self, api: StepsalAPI) -> None:
        answer = ChatMessageAssistant(content=[ContentReasoning(reasoning="A needs B."), ContentText(text="A = 1.")])
        chat = [ChatMessageUser(content="What is A?"), answer, ChatMessageUser(content="And B?")]
        assert api.render(chat, []) == (
            "<|endoftext|><|user|>What is A?<|assistant|><think>A needs B.</think>A = 1.<|endoftext|>"
            "<|user|>And B?<|assistant|><think>"
        )

    def test_inspect_leaves_reasoning_out_when_told_to(self, tmp_path: Path) -> None:
        @solver
        def twice() -> Solver:
            async def solve(state: TaskState, generate: Generate) -> TaskState:
                state = await generate(state)
                state.messages.append(ChatMessageUser(content=PROBLEMS[0].question))
                return await generate(state)

            return solve

        lengths = {}
        for history in ("none", "all"):
            samples = samples_of(run(chains(twice()), tmp_path, reasoning_history=history, limit=1))
            lengths[history] = samples[0].output.usage.input_tokens
        assert lengths["all"] > lengths["none"] + 5

    def test_system_messages_are_joined(self) -> None:
        api = get_model("stepsal/smollm2").api
        chat = [
            ChatMessageSystem(content="Be kind."),
            ChatMessageUser(content="Hi"),
            ChatMessageSystem(content="Be brief."),
        ]
        text = api.render(chat, [])
        assert text.count("<|im_start|>system") == 1
        assert "Be kind.\n\nBe brief." in text

    def test_tool_calls_and_results(self) -> None:
        api = get_model("stepsal/smollm2").api
        call = ToolCall(id="1", function="add", arguments={"x": 2, "y": 3})
        chat = [ChatMessageUser(content="2 + 3?"), ChatMessageAssistant(content="", tool_calls=[call]),
                ChatMessageTool(content="5", tool_call_id="1", function="add")]  # fmt: skip
        text = api.render(chat, [])
        assert CALL in text
        assert "<|im_start|>user\n<tool_response>5</tool_response><|im_end|>" in text

    def test_pictures_are_refused(self, api: StepsalAPI) -> None:
        picture = ContentImage(image="data:image/png;base64,AAAA")
        with pytest.raises(ValueError, match="read text only, but a message of the user has image"):
            api.render([ChatMessageUser(content=[picture])], [])

    def test_tokens_are_counted_by_the_model(self, api: StepsalAPI, mini: TransformerBridge) -> None:
        text = "Anna needs Hugo."
        assert anyio.run(api.count_text_tokens, text) == len(mini.tokenizer(text)["input_ids"])

    @pytest.fixture
    def with_template(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], StepsalAPI]:
        api = get_model("stepsal/mini").api

        def changed(template: str) -> StepsalAPI:
            monkeypatch.setattr(api.model.tokenizer, "chat_template", template)
            return api

        return changed

    def test_a_template_that_takes_out_reasoning(self, with_template: Callable[[str], StepsalAPI]) -> None:
        answer = ChatMessageAssistant(content=[ContentReasoning(reasoning="Because."), ContentText(text="1")])
        chat = [ChatMessageUser(content="Hi"), ChatMessageAssistant(content="Hello"), ChatMessageUser(content="A?"),
                answer, ChatMessageUser(content="B?")]  # fmt: skip
        text = with_template(R1).render(chat, [])
        assert text.endswith("<U>Hi<A>Hello<E><U>A?<A><think>Because.</think>1<E><U>B?<A><think>")

    def test_a_template_without_system_prompt_and_tools(self, with_template: Callable[[str], StepsalAPI]) -> None:
        call = ToolCall(id="1", function="add", arguments={"x": 2, "y": 3})
        chat = [ChatMessageSystem(content="Be kind."), ChatMessageUser(content="2 + 3?"),
                ChatMessageAssistant(content="", tool_calls=[call]),
                ChatMessageTool(content="5", tool_call_id="1", function="add")]  # fmt: skip
        text = with_template(STRICT).render(chat, [ToolInfo(name="add", description="Add.")])
        assert text.startswith("<user>Be kind.") or text.startswith("<user>You may call functions")
        assert f"<assistant>\n{CALL}<user><tool_response>5</tool_response><model>" in text
        assert with_template(STRICT).render([ChatMessageSystem(content="Hi")], []) == "<user>Hi<model>"

    def test_chats_that_cannot_be_answered(self, with_template: Callable[[str], StepsalAPI]) -> None:
        api = get_model("stepsal/mini").api
        with pytest.raises(ValueError, match="the last message is the assistant's"):
            api.render([ChatMessageUser(content="A?"), ChatMessageAssistant(content="The answer is")], [])
        with pytest.raises(ValueError, match="tools are not supported for Harmony"):
            with_template("<|channel|>").render([ChatMessageUser(content="A?")], [ToolInfo(name="f", description="")])
        api = with_template("{{ raise_exception('take turns') }}")
        with pytest.raises(ValueError, match="refuses this chat: take turns"):
            api.render([ChatMessageUser(content="A?")], [])


def test_the_solver_can_be_named_on_the_command_line() -> None:
    from inspect_ai._util.registry import registry_create

    assert registry_create("solver", "stepsal/capture_step_saliency", folder="maps")


def test_the_harness_is_there_without_inspect() -> None:
    """In a fresh session, and without the package; only using it says what is missing."""
    code = """
import sys
sys.modules["inspect_ai"] = None
import stepsal
assert "hub" in dir(stepsal.harness)
try:
    stepsal.harness.hub
except ImportError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "stepsal.harness.hub needs Inspect: pip install 'stepsal[inspect]'\n"


def test_internals_of_inspect_that_have_moved_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai.log._samples", None)
    monkeypatch.delitem(sys.modules, "stepsal.harness.inspect_private")
    with pytest.raises(ImportError, match=r"not where they were .* tested with (\S+); .*inspect-ai==\1"):
        importlib.import_module("stepsal.harness.inspect_private")
