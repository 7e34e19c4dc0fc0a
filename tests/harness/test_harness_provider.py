"""stepsal models in Inspect: whole evaluations with local tasks, on the embedded reasoner and SmolLM2."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from inspect_ai import Task, eval, eval_retry
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import ChatMessageUser, ContentReasoning, GenerateConfig, Model, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from inspect_runs import PROBLEMS, chains, run, said, samples_of
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import Segmentation, StepFlowConfig, StepSaliency
from stepsal.harness import capture_step_saliency
from stepsal.harness.engine import Reply

TASK_FILE = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from stepsal.tasks import chain

@task
def chains(n: int = 4, length: int = 3):
    problems = [chain.sample(930_000 + i, length=length) for i in range(n)]
    return Task([Sample(p.question, target=f"= {p.reference}.", id=i) for i, p in enumerate(problems)],
                solver=generate(), scorer=includes())
"""


@pytest.mark.slow
class TestAnswers:
    def test_of_other_questions_than_chains_come_with_one_warning(self) -> None:
        model = get_model("stepsal/mini", config=GenerateConfig(max_tokens=2), memoize=False)

        async def twice() -> None:
            for _ in range(2):
                await model.generate("What is 3 plus 4?")

        with pytest.warns(UserWarning, match=r"'What is 3 plus 4\?.* is no such question") as record:
            anyio.run(twice)
        assert sum("no such question" in str(warning.message) for warning in record) == 1

    @pytest.mark.parametrize(
        ("flow", "options"),
        [
            (None, {"temperature": 0.0}),
            (
                StepFlowConfig(tau_max=0.3, alpha=0.2, oeb_layers=(0, 1, 2)),
                {"temperature": 0.9, "top_p": 0.9, "seed": 5},
            ),
        ],
    )
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
        samples = samples_of(run(chains(), tmp_path, stop_seqs=["is", "swer"]))  # the first is in the thinking, too
        in_thinking = samples_of(run(chains(), tmp_path, args={"stop_in_thinking": True}, stop_seqs=["so "]))
        for sample, stopped, problem in zip(samples, in_thinking, PROBLEMS, strict=True):
            whole = stepsal.generate(mini, problem.question)
            assert said(sample) == (whole.thinking, "The an")
            assert said(stopped) == (whole.thinking.partition("so ")[0].strip(), "")
            assert sample.output.stop_reason == stopped.output.stop_reason == "stop"

    def test_a_prompt_that_is_too_long_ends_the_sample(self, tmp_path: Path) -> None:
        task = Task([Sample("Why? " * 2000, target="x")], solver=generate(), scorer=includes())
        (sample,) = samples_of(run(task, tmp_path))
        assert sample.output.stop_reason == "model_length"
        assert "leaves no room" in sample.output.error

    def test_options_that_have_no_effect_are_refused(self, tmp_path: Path) -> None:
        log = run(chains(), tmp_path, logprobs=True)
        assert log.status == "error"
        assert "logprobs" in log.error.message

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
            "--model stepsal/mini -M tau_max=0.3 --max-tokens 100 --temperature 0.9 --seed 4 --epochs 4 "
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
        assert 0 < len(done) < 16
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            (log,) = eval_retry(str(path), log_dir=str(tmp_path / "retried"), display="none")
            whole = run_file(tmp_path)
        resumed = {(s.id, s.epoch): said(s) for s in samples_of(log)}
        assert len(resumed) == 16
        assert done.items() <= resumed.items()
        assert resumed == whole  # as if it had never been interrupted

    def test_inspects_cache_tells_settings_apart(self, tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
            strong = {"tau_max": 0.9, "alpha": 3.0, "oeb_layers": "all", "smi_layers": "all"}
            runs = [samples_of(run(chains(), tmp_path, args=args, cache=True)) for args in ({}, strong, {}, strong)]
        plain, edited, plain_again, edited_again = ([said(s) for s in samples] for samples in runs)
        assert plain == plain_again != edited == edited_again
        assert all("batch" in s.output.metadata for s in runs[1])

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


SWITCHED = (  # the template of the embedded reasoner, with switches
    "<|endoftext|>{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    "{% if reasoning_effort is defined %} Effort: {{ reasoning_effort }}.{% endif %}<|assistant|><think>"
    "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
)


class TestSwitches:
    """Switches of the chat template, by model arguments and by generation options."""

    @pytest.fixture(autouse=True)
    def switched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plain = get_model("stepsal/mini", batch_size=7)  # keeps the engine alive, whose tokenizer all share
        monkeypatch.setattr(self.plain.api.model.tokenizer, "chat_template", SWITCHED)

    def prompt_of(self, model: Model, **options: Any) -> str:
        output = anyio.run(
            partial(model.generate, PROBLEMS[0].question, config=GenerateConfig(max_tokens=2, **options))
        )
        kept = model.api._kept[output.message.id]
        assert model.api.trace(output).chat == kept.chat
        return model.api.model.tokenizer.decode(kept.tokens[: kept.n_prompt])

    def test_of_the_model(self) -> None:
        for args in ({"chat.enable_thinking": False}, {"chat": {"enable_thinking": False}}):
            model = get_model("stepsal/mini", memoize=False, **args)
            assert self.prompt_of(model).endswith("<|assistant|><think></think>")
            assert model.api.base_url != self.plain.api.base_url  # by which Inspect's cache tells answers apart
            output = anyio.run(partial(model.generate, "What?", config=GenerateConfig(max_tokens=3)))
            assert not any(isinstance(part, ContentReasoning) for part in output.message.content_list)
        assert self.prompt_of(self.plain).endswith("<|assistant|><think>")

    def test_the_effort_of_reasoning(self) -> None:
        model = get_model("stepsal/mini", memoize=False, **{"chat.reasoning_effort": "low"})
        assert " Effort: low.<|assistant|>" in self.prompt_of(model)
        assert " Effort: high.<|assistant|>" in self.prompt_of(model, reasoning_effort="high")
        assert " Effort: high.<|assistant|>" in self.prompt_of(self.plain, reasoning_effort="high")

    def test_an_effort_that_would_have_no_effect_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.plain.api.model.tokenizer, "chat_template", "{{ messages[0].content }}<|assistant|>")
        with pytest.raises(ValueError, match="reasoning_effort='high' would have no effect on mini"):
            self.prompt_of(self.plain, reasoning_effort="high")

    @pytest.mark.parametrize("option", [{"verbosity": "low"}, {"reasoning_tokens": 50}, {"effort": "low"}])
    def test_options_of_other_providers_are_refused(self, option: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"don't support {next(iter(option))}"):
            self.prompt_of(self.plain, **option)


class TestSections:
    """Messages have the sections of the model's own segmentation."""

    @pytest.mark.parametrize(
        ("args", "text", "thinking", "words"),
        [
            ({}, "One.</think>Two.", "One.", "Two."),
            ({}, "One.</think>Two.<think>Three.</think>Four.", "One.\nThree.", "Two.\nFour."),
            ({"format": "plain"}, "One.\n\nTwo.", "", "One.\n\nTwo."),
            ({"format": "magistral"}, "[THINK]One.[/THINK]Two.", "One.", "Two."),
            ({"format": "Final answer:"}, "One. Final answer: Two.", "One.", "Two."),
            ({"format": "####"}, "One. #### Two.", "One.", "Two."),
        ],
    )
    def test_of_an_answer(self, args: dict[str, str], text: str, thinking: str, words: str) -> None:
        api = get_model("stepsal/mini", **args).api
        tokens = api.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = "Why?<think>" if text.startswith("One.</think>") else "Why?"
        message, _ = api._message(prompt, Reply(tokens, "limit", None, 1), [], with_calls=False)
        assert message.text == words
        assert "".join(part.reasoning for part in message.content_list if part.type == "reasoning") == thinking


def run_file(folder: Path) -> dict[tuple[Any, int], tuple[str, str]]:
    (log,) = eval(
        "task.py", model="stepsal/mini", model_args={"tau_max": 0.3}, max_tokens=100, temperature=0.9,
        seed=4, epochs=4, log_dir=str(folder / "whole"), display="none",
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
