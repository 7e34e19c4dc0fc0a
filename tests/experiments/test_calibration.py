"""Calibration: a planted optimum is found, where there is none it says so, and reports are on problems held out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from tiny_models import tiny_chat
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import Decoding, StepFlowConfig, calibrate
from stepsal.experiments.calibrate import halving, plan
from stepsal.experiments.calibration import BASELINE, CHOSEN, Calibration
from stepsal.experiments.proposals import ALPHAS, TAUS, bands, describe, possible, profile_evidence, propose
from stepsal.generation.answers import Answered
from stepsal.harness.arguments import read_stepflow
from stepsal.stats.paired import paired_difference
from stepsal.storage import digest
from stepsal.tasks import Problem, Task
from stepsal.tasks.answers import Verdict
from stepsal.tasks.chain import ChainTask
from stepsal.trace import Trace

CHAIN = ChainTask(length=2, distractors=2)
GREEDY: dict = {"decoding": Decoding(max_new_tokens=50), "batch_size": 64, "progress": False}
PLANTED = StepFlowConfig(oeb_layers=(1, 2), smi_layers=(), tau_max=0.5)  # another answer to two of three questions
SETTINGS = (
    StepFlowConfig(oeb_layers=(6, 7), smi_layers=(), tau_max=0.5),
    StepFlowConfig(oeb_layers=(0, 1), smi_layers=(), tau_max=0.5),
    StepFlowConfig(),
    PLANTED,
    StepFlowConfig(oeb_layers=(), alpha=1.0),
    StepFlowConfig(oeb_layers=(1, 2), smi_layers=(), tau_max=0.3),
)
STRONG = tuple(  # which change many answers
    StepFlowConfig(oeb_layers=layers, smi_layers=(), tau_max=tau)
    for layers in ((0, 1), (1, 2), (0, 1, 2, 3))
    for tau in (0.3, 0.5)
)


@dataclass(frozen=True)
class Judged:
    """A problem of the chain task whose answers are judged in another way, by what `right` says."""

    problem: Problem
    right: str

    @property
    def question(self) -> str:
        return self.problem.question

    @property
    def reference(self) -> str:
        return self.problem.reference


class SaysTheSame(Judged):
    """Right is what the model itself says under the planted setting."""

    def grade(self, trace: Trace) -> Verdict:
        return Verdict(trace.response == self.right, trace.response, "", None)


class Coin(Judged):
    """Right by the toss of a coin, the same one for the same text."""

    def grade(self, trace: Trace) -> Verdict:
        return Verdict(int(digest(f"{self.right} {trace.response}".encode()), 16) % 2 == 0, trace.response, "", None)


@dataclass
class JudgedTask:
    """The chain task, judged by what the model answers under `stepflow`; if that is None, by coins."""

    model: TransformerBridge
    stepflow: StepFlowConfig | None
    answers: dict[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{CHAIN.name}, {self.stepflow}"

    def sample(self, seed: int) -> Judged:
        problem = CHAIN.sample(seed)
        if self.stepflow is None:
            return Coin(problem, str(seed))
        if seed not in self.answers:
            seeds = range(seed, seed + 64)  # a stream reads one after the other
            traces = stepsal.generate_batch(
                self.model, [CHAIN.sample(s).question for s in seeds], stepflow=self.stepflow, max_new_tokens=50
            )
            self.answers |= {s: trace.response for s, trace in zip(seeds, traces, strict=True)}
        return SaysTheSame(problem, self.answers[seed])


@pytest.fixture(scope="module")
def planted(mini: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder = tmp_path_factory.mktemp("planted")
    return calibrate(mini, JudgedTask(mini, PLANTED), 240, folder=folder, settings=SETTINGS, **GREEDY)


@pytest.mark.slow
@pytest.mark.xdist_group("calibration")  # they share what takes long
class TestCalibrate:
    def test_a_planted_optimum_is_found(self, planted: Calibration) -> None:
        assert planted.chosen == PLANTED
        assert planted.beats_baseline
        assert planted.stepflow == PLANTED
        assert planted.held_out.verdicts(CHOSEN).all()
        assert not planted.held_out.verdicts(BASELINE).all()
        assert "the chosen setting beats the baseline" in str(planted)
        table = planted.search
        assert table["setting"][0] == describe(PLANTED)
        assert table["rounds"].tolist() == [3, 3, 2, 1, 1, 1]
        assert table["n_problems"].is_monotonic_decreasing

    def test_where_nothing_helps_it_says_so(self, mini: TransformerBridge, tmp_path: Path) -> None:
        null = calibrate(mini, JudgedTask(mini, None), 240, folder=tmp_path / "null", settings=STRONG, **GREEDY)
        assert null.search["difference"][0] > 0  # the best of six seemed to help
        assert null.difference.fixed > 0
        assert null.difference.broken > 0
        assert not null.beats_baseline
        assert "no setting beats the baseline" in str(null)
        assert "winner's curse" in str(null)
        preset = StepFlowConfig.load(null.save_preset(tmp_path / "null.json"))
        assert preset == null.stepflow.but(made_for="mini")
        assert preset.resolve(mini.cfg.n_layers) == ((), ())
        assert read_stepflow({"preset": str(tmp_path / "null.json")}) == preset  # what -M preset= does
        question = CHAIN.sample(0).question
        plain, under = (stepsal.generate(mini, question, stepflow=s, max_new_tokens=50) for s in (None, preset))
        assert under.response == plain.response

    def test_the_profile_proposes(self, mini: TransformerBridge, tmp_path: Path) -> None:
        decoding = Decoding(temperature=1.5, max_new_tokens=50)
        options: dict = {"decoding": decoding, "progress": False, "settings": 4, "seed": 3}
        first = calibrate(mini, CHAIN, 120, folder=tmp_path, base=StepFlowConfig(window=4), **options)
        profile = stepsal.experiments.Population.load(tmp_path / "profile")
        assert len(profile) == 15
        pd.testing.assert_frame_equal(first.evidence, profile_evidence(profile.metrics, 8))
        assert first.settings == propose(first.evidence, 4, base=StepFlowConfig(window=4), seed=3)
        assert "profile, oeb: lock_in of" in str(first)
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
        kept = [path for path in files if "request-" not in path.parent.name]  # each round of the search asks anew
        before = [(path, path.read_bytes()) for path in kept]
        again = calibrate(mini, CHAIN, 120, folder=tmp_path, base=StepFlowConfig(window=4), **options)
        assert str(again) == str(first)
        assert all(path.read_bytes() == data for path, data in before)
        more = calibrate(mini, CHAIN, 160, folder=tmp_path, base=StepFlowConfig(window=4), **options)
        assert more.settings == first.settings  # though there are more traces to go by
        assert (first.looks, more.looks) == (1, 2)
        assert "this is look 2 at these problems, so that p must be 0.025 or less" in str(more)
        loaded = Calibration.load(tmp_path)
        assert str(loaded) == str(more)
        pd.testing.assert_frame_equal(loaded.evidence, more.evidence)
        fewer = calibrate(mini, CHAIN, 120, folder=tmp_path, base=StepFlowConfig(window=4), **options)
        pd.testing.assert_frame_equal(fewer.evidence, first.evidence)
        pd.testing.assert_frame_equal(fewer.search, first.search)

    def test_few_questions_again_and_again_are_no_proof(self, planted: Calibration) -> None:
        """Three questions, fifty draws of each, a little better in all of them."""
        before = np.zeros((150, 1), dtype=bool)
        after = (np.arange(150) % 10 == 0)[:, None]
        few = paired_difference(before, after, groups=np.arange(150) // 50)
        assert few.low > 0
        calibration = replace(planted)
        calibration.__dict__["difference"] = few
        assert not calibration.beats_baseline
        calibration.__dict__["difference"] = paired_difference(before, after)
        assert calibration.beats_baseline

    def test_an_interrupted_one_goes_on(
        self, mini: TransformerBridge, planted: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import stepsal.experiments.evaluate as evaluation

        answer_each, calls = evaluation.answer_each, []

        def cut_off(*args: object, **options: object) -> Iterator[Answered]:
            calls.append(1)
            for i, answered in enumerate(answer_each(*args, **options)):
                if len(calls) == 4 and i == 1:  # in the middle of a turn
                    raise KeyboardInterrupt
                yield answered

        monkeypatch.setattr(evaluation, "answer_each", cut_off)
        task = JudgedTask(mini, PLANTED)
        with pytest.raises(KeyboardInterrupt):
            calibrate(mini, task, 240, folder=tmp_path, settings=SETTINGS, **GREEDY)
        with pytest.raises(ValueError, match="does not say what it was asked for: make the same call"):
            Calibration.load(tmp_path)
        resumed = calibrate(mini, task, 240, folder=tmp_path, settings=SETTINGS, **GREEDY)
        assert str(resumed) == str(planted)
        pd.testing.assert_frame_equal(resumed.search, planted.search)

    def test_save_and_load(self, planted: Calibration, tmp_path: Path) -> None:
        copy = Calibration.load(planted.save(tmp_path / "copy"))
        assert str(copy) == str(planted)
        assert (copy.settings, copy.chosen, copy.looks) == (planted.settings, planted.chosen, 1)
        assert [run.variants for run in copy.rounds] == [run.variants for run in planted.rounds]
        pd.testing.assert_frame_equal(copy.search, planted.search)
        pd.testing.assert_frame_equal(copy.held_out.answers, planted.held_out.answers)

    def test_looks_are_parts(self, planted: Calibration) -> None:
        (part,) = (planted.folder / "parts").glob("look-*")
        look = ["OEB 1-2 at 0.5", planted.held_out.n_problems]
        assert part.name == f"look-{digest(json.dumps(look).encode())}"
        assert list(json.loads((part / "look.json").read_text()).values()) == look

    def test_the_preset_says_where_it_comes_from(self, planted: Calibration, tmp_path: Path) -> None:
        path = planted.save_preset(tmp_path / "preset.json")
        assert StepFlowConfig.load(path) == PLANTED.but(made_for="mini")
        assert read_stepflow({"preset": str(path)}) == PLANTED.but(made_for="mini")
        about = json.loads(path.read_text())["calibration"]
        assert about["beats_baseline"] is True
        assert about["model_name"] == "mini"
        assert about["n_settings"] == 6
        assert about["held_out"]["n_problems"] == len(planted.held_out.verdicts(CHOSEN))
        assert about["held_out"]["difference"] == planted.difference.difference
        assert about["decoding"]["max_new_tokens"] == 50

    def test_no_question_is_in_two_parts(self, planted: Calibration) -> None:
        searched, held_out = (set(run.answers["question"]) for run in (planted.rounds[-1], planted.held_out))
        assert searched
        assert held_out
        assert not searched & held_out


class TestRefusals:
    @pytest.mark.parametrize(
        ("n_answers", "options", "message"),
        [
            (100, {"settings": 16}, r"n_answers=100 leaves 0 problems .* at least 744, or fewer settings"),
            (100, {"settings": 1}, "must be two or more"),
            (100, {"settings": [StepFlowConfig(), StepFlowConfig()]}, "must be two or more that differ"),
            (1000, {"settings": [StepFlowConfig(), StepFlowConfig(oeb_layers=(0, 1), smi_layers=(-2, -1))]}, "differ"),
            (1000, {"settings": [StepFlowConfig(), StepFlowConfig((), ())]}, "differ in what they edit"),
            (1000, {"settings": SETTINGS, "base": StepFlowConfig(window=4)}, "base goes with settings that are drawn"),
            (1000, {"settings": [StepFlowConfig(), StepFlowConfig(oeb_layers=(8,))]}, "there is no layer 8"),
            (10**6, {"settings": 4000}, "more than the 3720 that there are"),
        ],
    )
    def test_what_makes_no_sense(
        self, mini: TransformerBridge, tmp_path: Path, n_answers: int, options: dict, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            calibrate(mini, CHAIN, n_answers, folder=tmp_path / "none", **options)
        assert not (tmp_path / "none").exists()

    def test_a_task_that_is_too_small_for_so_many_greedy_answers(self, mini: TransformerBridge, tmp_path: Path) -> None:
        lines = [json.dumps({"question": f"{i} + 1 = ?", "answer": i + 1}) for i in range(40)]
        (tmp_path / "sums.jsonl").write_text("\n".join(lines))
        task = stepsal.tasks.jsonl.JsonlTask(tmp_path / "sums.jsonl", grader="number")
        with pytest.raises(ValueError, match=r"leaves 1 problems of .* for the first round of 16 settings: use fewer"):
            calibrate(mini, task, 2400, folder=tmp_path / "none", decoding=Decoding())
        assert not (tmp_path / "none").exists()

    def test_a_model_without_a_chat_template(self, tmp_path: Path) -> None:
        model = tiny_chat("Llama")
        model.tokenizer.chat_template = None
        with pytest.raises(ValueError, match="chat template"):
            calibrate(model, CHAIN, 1000, folder=tmp_path / "none")
        assert not (tmp_path / "none").exists()


class TestParts:
    @pytest.mark.parametrize("n", [None, 30])
    def test_they_share_no_question(self, n: int | None, tmp_path: Path) -> None:
        task: Task = CHAIN
        if n is not None:
            lines = [
                json.dumps({"question": f"{i % 25} + 1 = ?", "answer": i % 25 + 1}) for i in range(n)
            ]  # 5 are twice
            (tmp_path / "sums.jsonl").write_text("\n".join(lines))
            task = stepsal.tasks.jsonl.JsonlTask(tmp_path / "sums.jsonl", grader="number")
        shares = [(0.0, 0.2), (0.2, 0.6), (0.6, 1.0)]
        parts = [stepsal.tasks.parts.Part(task, *share, seed=1) for share in shares]
        asked = [{part.sample(i).question for i in range(part.n_problems or 40)} for part in parts]
        assert not asked[0] & asked[1]
        assert not asked[1] & asked[2]
        assert not asked[0] & asked[2]
        assert len({part.name for part in parts}) == 3
        if n is not None:
            assert list(map(len, asked)) == [5, 10, 10]
            assert sum(part.n_problems or 0 for part in parts) == 30
            assert parts[0].sample(parts[0].n_problems or 0) == parts[0].sample(0)  # they come again
        other = stepsal.tasks.parts.Part(task, 0.0, 0.2, seed=2)
        assert {other.sample(i).question for i in range(other.n_problems or 40)} != asked[0]

    def test_a_part_without_problems(self, tmp_path: Path) -> None:
        (tmp_path / "one.jsonl").write_text(json.dumps({"question": "1 + 1 = ?", "answer": 2}))
        task = stepsal.tasks.jsonl.JsonlTask(tmp_path / "one.jsonl", grader="number")
        with pytest.raises(ValueError, match=r"has 1 questions: none between the shares 0 and 0\.125"):
            stepsal.tasks.parts.Part(task, 0.0, 0.125)

        class Endless:
            name = "endless"

            def sample(self, seed: int) -> Problem:
                return task.sample(0)

        parts = [stepsal.tasks.parts.Part(Endless(), low, low + 0.5) for low in (0.0, 0.5)]
        with pytest.raises(ValueError, match="none of 1000 problems of endless"):
            [part.sample(0) for part in parts]


class TestHalving:
    @given(st.integers(2, 200), st.integers(0, 5000))
    def test_it_keeps_to_the_number_of_answers(self, n_settings: int, n_answers: int) -> None:
        rounds = halving(n_settings, n_answers)
        assert rounds[0].n_settings == n_settings
        assert rounds[-1].n_settings == 2
        new = np.diff([0, *(r.n_problems for r in rounds)])
        spent = sum((r.n_settings + 1) * n for r, n in zip(rounds, new, strict=True))
        assert spent <= n_answers
        assert n_answers - spent < sum(r.n_settings + 2 for r in rounds)
        assert (np.diff(new) >= 0).all()

    @given(st.integers(2, 40), st.integers(0, 5000), st.booleans())
    def test_all_answers_are_spent(self, n_settings: int, n_answers: int, profile: bool) -> None:
        n_profile, rounds, n_held_out = plan(n_answers, n_settings, profile, {})
        new = np.diff([0, *(r.n_problems for r in rounds)])
        spent = n_profile + sum((r.n_settings + 1) * n for r, n in zip(rounds, new, strict=True)) + 2 * n_held_out
        assert n_answers - 1 - sum(r.n_settings + 2 for r in rounds) < spent <= n_answers
        assert (n_profile > 0) == (profile and n_answers >= 8)

    @given(st.integers(2, 40), st.integers(0, 20_000), st.integers(0, 100))
    def test_no_problem_comes_again_where_none_may(self, n_settings: int, n_answers: int, n: int) -> None:
        most = {"profile": n // 3, "search": n, "held_out": n}
        n_profile, rounds, n_held_out = plan(n_answers, n_settings, True, most)
        assert n_profile <= n // 3
        assert rounds[-1].n_problems <= n
        assert n_held_out <= n
        if n_answers > 10_000 and n > 10:  # nearly all problems are used
            assert n_held_out == n
            assert rounds[-1].n_problems >= 0.8 * n


class TestProposals:
    @given(st.integers(1, 80))
    def test_bands(self, n_layers: int) -> None:
        proposed = bands(n_layers)
        assert len(set(proposed)) == len(proposed)
        assert set().union(*proposed) == set(range(n_layers))
        assert all(list(band) == list(range(band[0], band[-1] + 1)) for band in proposed)
        assert set(StepFlowConfig().resolve(n_layers)) <= set(proposed)  # those of the paper are among them

    @pytest.mark.parametrize("n_layers", [1, 2, 3])
    def test_all_that_are_possible_can_be_proposed(self, n_layers: int) -> None:
        frame = pd.DataFrame([(t, layer, True, 0.1, 0.1) for t in range(3) for layer in range(n_layers)])
        frame.columns = ["trace", "layer", "correct", "lock_in", "thinking_deficit"]
        settings = propose(profile_evidence(frame, n_layers), possible(n_layers), base=StepFlowConfig())
        assert len(set(map(describe, settings))) == possible(n_layers)

    def metrics(self, planted: dict[str, tuple[int, ...]], n: int = 40) -> pd.DataFrame:
        """Draw metrics of `n` traces in 8 layers, with more of a metric in some layers of the wrong ones."""
        rng = np.random.default_rng(0)
        frame = pd.DataFrame([(t, layer, t % 2 == 0) for t in range(n) for layer in range(8)])
        frame.columns = ["trace", "layer", "correct"]
        for metric in ("lock_in", "thinking_deficit"):
            higher = frame["layer"].isin(planted.get(metric, ())) & ~frame["correct"]
            frame[metric] = rng.normal(size=len(frame)) + 2.0 * higher
        return frame

    def test_evidence_points_to_planted_layers(self) -> None:
        evidence = profile_evidence(self.metrics({"lock_in": (3, 4), "thinking_deficit": (5, 6)}), 8)
        for part, layers in (("oeb", (3, 4)), ("smi", (5, 6))):
            of_part = evidence[evidence["part"] == part].sort_values("prior", ascending=False)
            assert of_part["layers"].iloc[0] == layers
            assert of_part["t"].iloc[0] > 4
            assert of_part["prior"].sum() == pytest.approx(1.0)
            assert of_part["prior"].min() >= 0.5 / len(of_part)
            assert set(of_part["n_wrong"]) == {20}
        settings = propose(evidence, 200, base=StepFlowConfig(), seed=0)
        counts = sum(s.oeb_layers == (3, 4) for s in settings), sum(s.smi_layers == (5, 6) for s in settings)
        assert min(counts) > 2 * max(
            sum(s.oeb_layers == band for s in settings) for band in bands(8) if not {3, 4} & set(band)
        )

    def test_without_evidence_all_bands_are_alike(self) -> None:
        metrics = self.metrics({})
        metrics["correct"] = metrics["trace"] > 3  # four wrong ones
        evidence = profile_evidence(metrics, 8)
        assert evidence["t"].isna().all()
        assert np.allclose(evidence["prior"], 1 / len(bands(8)))
        missing = self.metrics({})
        missing.loc[missing["trace"] > 8, "lock_in"] = np.nan
        evidence = profile_evidence(missing, 8)
        assert evidence.loc[evidence["part"] == "oeb", "t"].isna().all()
        assert evidence.loc[evidence["part"] == "smi", "t"].notna().all()

    def test_what_tells_them_apart_for_sure_takes_not_all(self) -> None:
        metrics = self.metrics({})
        metrics["lock_in"] = np.where(metrics["correct"], 0.1, 0.3)  # without any spread
        evidence = profile_evidence(metrics, 8)
        assert np.isfinite(evidence["prior"]).all()
        assert len(propose(evidence, 20, base=StepFlowConfig())) == 20

    def test_settings_differ_and_hold_the_papers(self) -> None:
        evidence = profile_evidence(self.metrics({}), 8)
        settings = propose(evidence, 64, base=StepFlowConfig(window=4), seed=1)
        assert len(set(map(describe, settings))) == len(settings) == 64
        assert StepFlowConfig(oeb_layers=(0, 1), smi_layers=(6, 7), window=4) in settings
        assert all(s.window == 4 for s in settings)
        assert all(s.oeb_layers != () or s.smi_layers != () for s in settings)
        assert {s.tau_max for s in settings} == set(TAUS)
        assert {s.alpha for s in settings} == set(ALPHAS)
        others = propose(evidence, 64, base=StepFlowConfig(window=4), seed=2)
        assert others != settings

    def test_words(self) -> None:
        assert describe(StepFlowConfig(oeb_layers=(0, 1), smi_layers=(3, 5))) == "OEB 0-1 at 0.15, SMI 3,5 at 0.06"
        assert describe(StepFlowConfig(oeb_layers=(), window=4)) == "SMI deep at 0.06, window=4"
        assert describe(StepFlowConfig(oeb_layers=(), smi_layers=())) == "no edit"
