"""stepsal models in Inspect: whole evaluations with local tasks, on the embedded reasoner and SmolLM2."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
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
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver, use_tools
from inspect_ai.tool import Tool, ToolCall, tool
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import StepFlowConfig, StepSaliency
from stepsal.harness import capture_step_saliency
from stepsal.harness.engine import Request, Sharing
from stepsal.harness.provider import StepsalAPI
from stepsal.tasks import chain

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
            assert about["batch"] == len(PROBLEMS)
            if flow is not None:
                with stepsal.stepflow(mini, flow) as log:
                    stepsal.generate(mini, problem.question, seed=about["seed"], max_new_tokens=120, **decoding)
                (answer,) = sample.metadata["stepflow"]["answers"]
                assert answer["fired"] == log.summary()["fired"]
                assert sample.metadata["stepflow"]["config"] == json.loads(json.dumps(flow.to_dict()))
            else:
                assert "stepflow" not in sample.metadata
        assert len(seeds) == len(PROBLEMS)

    def test_do_not_depend_on_the_batch(self, tmp_path: Path) -> None:
        options = {"temperature": 2.0, "seed": 1, "epochs": 2}
        together = samples_of(run(chains(), tmp_path, **options))
        alone = samples_of(run(chains(), tmp_path, max_connections=1, **options))
        assert max(s.output.metadata["batch"] for s in together) > 1
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
            ({"preset": "nowhere.json"}, "nowhere.json"),
        ],
    )
    def test_bad_arguments_are_refused_at_once(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            get_model("stepsal/mini", **args)

    def test_options_that_have_no_effect_are_refused(self, tmp_path: Path) -> None:
        log = run(chains(), tmp_path, logprobs=True)
        assert log.status == "error"
        assert "logprobs" in log.error.message

    def test_settings_of_stepflow(self, tmp_path: Path) -> None:
        config = StepFlowConfig(tau_max=0.4, smi_layers=None)
        path = str(config.save(tmp_path / "preset.json"))
        for args, wanted in (
            ({}, None), ({"stepflow": True}, StepFlowConfig()), ({"alpha": 0.1, "stepflow": False}, None),
            ({"preset": path}, config), ({"preset": path, "alpha": 0.2}, config.but(alpha=0.2)),
            ({"smi_layers": "none"}, StepFlowConfig(smi_layers=None)),
        ):  # fmt: skip
            assert get_model("stepsal/mini", **args).api.stepflow == wanted


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

    def test_models_of_one_name_share_their_weights(self, tmp_path: Path) -> None:
        plain, edited = get_model("stepsal/mini"), get_model("stepsal/mini", tau_max=0.2)
        assert plain.api.engine is edited.api.engine
        assert plain.api.stepflow != edited.api.stepflow

    def test_cancelled_answers_stop(self) -> None:
        api = get_model("stepsal/mini").api
        assert isinstance(api, StepsalAPI)
        ids = api.model.tokenizer(api.render([ChatMessageUser(content=PROBLEMS[0].question)], []))["input_ids"]
        sharing = Sharing(50.0, 1.0, (), None)  # so hot that it does not end by itself
        requests = [Request(ids, 400, seed, sharing) for seed in (1, 2)]
        replies = [api.engine.ask(request) for request in requests]
        requests[0].unwanted.set()
        assert len(replies[1].result(60).tokens) > 50
        assert not replies[0].done() or len(replies[0].result().tokens) < 50

    def test_an_error_is_that_of_its_batch_and_the_engine_goes_on(self) -> None:
        engine = get_model("stepsal/mini").api.engine
        bad = engine.ask(Request([10**9], 5, 0, Sharing(0.0, 1.0, (), None)))
        with pytest.raises(IndexError):
            bad.result(30)
        assert engine.ask(Request([1, 2], 2, 0, Sharing(0.0, 1.0, (), None))).result(30).tokens


def run_file(folder: Path) -> dict[tuple[Any, int], tuple[str, str]]:
    (log,) = eval(
        "task.py", model="stepsal/mini", model_args={"tau_max": 0.3}, max_tokens=100, temperature=0.9,
        seed=4, epochs=5, log_dir=str(folder / "whole"), display="none",
    )  # fmt: skip
    return {(s.id, s.epoch): said(s) for s in samples_of(log)}


def test_step_maps_are_kept_beside_the_scores(mini: TransformerBridge, tmp_path: Path) -> None:
    task = chains(generate(), capture_step_saliency(str(tmp_path / "maps"), layers=[0, 7]))
    flow = StepFlowConfig(tau_max=0.3)
    for problem, sample in zip(PROBLEMS, samples_of(run(task, tmp_path, args={"tau_max": 0.3})), strict=True):
        kept = sample.store["step_saliency"]
        trace = stepsal.generate(mini, problem.question, stepflow=flow, max_new_tokens=120)
        expected = stepsal.step_saliency(mini, trace, stepflow=flow, layers=[0, 7])
        found = StepSaliency.load(kept["path"])
        assert found.step_texts == expected.step_texts
        assert (found.values - expected.values).abs().max() <= 1e-4 * expected.values.max()
        assert kept["layers"] == [0, 7]
        assert kept["tokens"] == len(trace)
        assert kept["stepflow"]["tau_max"] == 0.3


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
        assert "<|im_start|>tool\n5<|im_end|>" in text

    def test_pictures_are_refused(self, api: StepsalAPI) -> None:
        picture = ContentImage(image="data:image/png;base64,AAAA")
        with pytest.raises(ValueError, match="read text only, but a message of the user has image"):
            api.render([ChatMessageUser(content=[picture])], [])

    def test_tokens_are_counted_by_the_model(self, api: StepsalAPI, mini: TransformerBridge) -> None:
        text = "Anna needs Hugo."
        assert anyio.run(api.count_text_tokens, text) == len(mini.tokenizer(text)["input_ids"])
