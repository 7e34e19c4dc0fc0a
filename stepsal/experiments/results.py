"""The result of `stepsal.evaluate`: answers of several variants to the same problems, and tables of them.

The folder of an evaluation::

    folder/
      manifest.json                  model, task, seed, decoding, segmentation, versions
      parts/<uuid>/answers.parquet   one row per answer, see `stepsal.experiments.answer_rows`
      parts/request-<uuid>/          variants, n_problems and n_samples of the last completed call

The column `variant` is `Variant.key`, so that variants which differ only in votes share their rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from stepsal.experiments.answer_rows import ANSWER_KEY, read_answers
from stepsal.experiments.request import read_request
from stepsal.experiments.store import Store
from stepsal.experiments.summaries import What, evaluation_report
from stepsal.experiments.variants import Variant, check_names, draws_needed
from stepsal.stats.paired import Groups, PairedDifference, Verdicts, accuracy, paired_difference, pass_at_k
from stepsal.stats.report import Report

if TYPE_CHECKING:
    import pandas as pd

KIND, VERSION = "evaluation", 2

_COSTS = ["n_new_tokens", "flops"]  # of a vote, the sum over its draws


@dataclass(frozen=True)
class Evaluation:
    """The answers of several variants to the same problems, with tables that compare them.

    Attributes:
        folder: folder that keeps the answers.
        variants: variants that are compared; the first is the baseline.
        n_problems: number of problems that every variant has answered.
        n_samples: number of samples of each problem under each variant.

    Example:
        >>> import tempfile
        >>> task, decoding = stepsal.tasks.chain.ChainTask(length=1), stepsal.Decoding(max_new_tokens=30)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = stepsal.evaluate(
        ...         stepsal.load("mini"), task, [stepsal.Variant("greedy")], 3, folder=folder, decoding=decoding,
        ...         progress=False,
        ...     )
        ...     stepsal.experiments.Evaluation.load(folder).verdicts("greedy").shape
        (3, 1)
    """

    folder: Path
    variants: tuple[Variant, ...]
    n_problems: int
    n_samples: int

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        variants: Sequence[Variant] | None = None,
        n_problems: int | None = None,
        n_samples: int | None = None,
    ) -> Evaluation:
        """Read an evaluation from a folder.

        Args:
            folder: the folder of `stepsal.evaluate`.
            variants: variants to compare, the baseline first; None takes those of the last completed call.
            n_problems: number of problems; None takes as many as the last completed call.
            n_samples: number of samples of each problem; None takes as many as the last completed call.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the folder is no evaluation, is damaged, or records no completed call where one is needed.
        """
        folder = Path(folder)
        store = Store.load(folder, KIND, VERSION)
        if variants is None or n_problems is None or n_samples is None:
            request = read_request(
                store, ("variants", "n_problems", "n_samples"),
                "pass variants=, n_problems= and n_samples= to Evaluation.load",
            )  # fmt: skip
            variants = [Variant.from_dict(v) for v in request["variants"]] if variants is None else variants
            n_problems = request["n_problems"] if n_problems is None else n_problems
            n_samples = request["n_samples"] if n_samples is None else n_samples
        check_names(variants)
        return cls(folder, tuple(variants), int(n_problems), int(n_samples))

    def save(self, folder: str | Path) -> Path:
        """Copy all answers to another folder, after checking them, and return it.

        Args:
            folder: an empty or new folder; created if missing.

        Raises:
            ValueError: the folder is not empty, or an answer is damaged or missing.
        """
        self.answers  # noqa: B018  complete
        return Store.load(self.folder, KIND, VERSION).save(folder)

    def to_request(self) -> dict[str, Any]:
        """Return what the evaluation was asked for, JSON-ready: variants, n_problems, n_samples."""
        variants = [variant.to_dict() for variant in self.variants]
        return {"variants": variants, "n_problems": self.n_problems, "n_samples": self.n_samples}

    @property
    def manifest(self) -> dict[str, Any]:
        """Model, task, parameters and versions."""
        return dict(Store.load(self.folder, KIND, VERSION).manifest)

    @cached_property
    def answers(self) -> pd.DataFrame:
        """Table of the answers that the variants need, one row each: variant, problem, draw, correct, error, ...

        `question` is a digest that tells different questions apart; `response` is what the model wrote.

        Raises:
            ValueError: the folder lacks some of the answers, or is damaged.
        """
        frame = read_answers(Store.load(self.folder, KIND, VERSION))
        needed = draws_needed(self.variants, self.n_samples)
        requested = frame["problem"].lt(self.n_problems) & frame["draw"].lt(frame["variant"].map(needed))
        frame = frame[requested].sort_values(ANSWER_KEY, ignore_index=True)
        for key, n_draws in needed.items():
            if (n_answers := int((frame["variant"] == key).sum())) != n_draws * self.n_problems:
                raise ValueError(
                    f"{self.folder} has {n_answers} of {n_draws * self.n_problems} answers of {key}: evaluate again"
                )
        return frame

    def answers_of(self, name: str) -> pd.DataFrame:
        """Return the answers of a variant, one row per problem and sample; where it votes, the winning ones.

        The costs of a winning answer (n_new_tokens, flops) are those of all its draws.

        Args:
            name: name of the variant.

        Raises:
            ValueError: an unknown variant, or answers that the folder lacks.
        """
        variant = self._variant(name)
        frame = self.answers[self.answers["variant"] == variant.key]
        frame = frame[frame["draw"] < self.n_samples * variant.votes]
        frame = frame.assign(sample=frame["draw"] // variant.votes)
        if variant.votes > 1:
            groups = frame.sort_values("draw").groupby(["problem", "sample"], sort=True)
            costs = groups[_COSTS].sum()
            frame = frame.loc[[voted_for(group["final_answer"]) for _, group in groups]].reset_index(drop=True)
            frame[_COSTS] = costs.to_numpy()
            frame["n_new_tokens"] = frame["n_new_tokens"].astype(int)
        return frame.sort_values(["problem", "sample"], ignore_index=True)

    def verdicts(self, name: str, what: What = "correct") -> Verdicts:
        """Return the verdicts on the answers of a variant, as booleans [problem, sample].

        Args:
            name: name of the variant.
            what: which verdict: "correct", or "final_answer_correct" where a task tells these apart.

        Raises:
            ValueError: an unknown variant or verdict, or answers that the folder lacks.
        """
        if what not in get_args(What):
            raise ValueError(f"what={what!r} is no verdict; use one of {', '.join(map(repr, get_args(What)))}")
        return self.answers_of(name)[what].to_numpy(dtype=bool).reshape(self.n_problems, self.n_samples)

    @cached_property
    def groups(self) -> Groups:
        """Numbers [problem], equal where the same question comes again."""
        import pandas as pd

        questions = self.answers.drop_duplicates("problem").set_index("problem")["question"].sort_index()
        return np.asarray(pd.factorize(questions)[0])

    def accuracy(self, what: What = "correct", k: Sequence[int] = ()) -> pd.DataFrame:
        """Return the accuracy of each variant with its interval, pass@k, and the share of answers that were cut off.

        Args:
            what: which verdict: "correct", or "final_answer_correct" where a task tells these apart.
            k: numbers of samples for which pass@k is returned.

        Returns:
            One row per variant: variant, n_problems, n_different, n_samples, accuracy, low and high (its 95 %
            interval), a column "pass@<n>" for each n of `k`, and truncated.

        Raises:
            ValueError: an unknown verdict, a k outside 1..n_samples, or answers that the folder lacks.
        """
        import pandas as pd

        rows = []
        for variant in self.variants:
            correct = self.verdicts(variant.name, what)
            share = accuracy(correct, groups=self.groups)
            rows.append(
                {"variant": variant.name, "n_problems": self.n_problems, "n_different": len(set(self.groups)),
                 "n_samples": self.n_samples, "accuracy": share.value, "low": share.low, "high": share.high}
                | {f"pass@{n}": pass_at_k(correct, n) for n in k}
                | {"truncated": self.answers_of(variant.name)["truncated"].mean()}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def paired(self, baseline: str | None = None, what: What = "correct") -> pd.DataFrame:
        """Compare the accuracy of each variant with that of the baseline, on the same problems and samples.

        Sample j of a variant that votes has other draws than sample j of one that does not, from j = 1 on.

        Args:
            baseline: name of a variant; None takes the first.
            what: which verdict: "correct", or "final_answer_correct" where a task tells these apart.

        Returns:
            One row per variant but the baseline: variant, baseline, and the fields of `stepsal.stats.PairedDifference`
            (difference, low, high, fixed, broken, p, ...).

        Raises:
            ValueError: an unknown variant or verdict, or answers that the folder lacks.
        """
        import pandas as pd

        base = self._variant(baseline).name
        rows = [
            {"variant": v.name, "baseline": base} | asdict(self.difference(base, v.name, what))
            for v in self.variants
            if v.name != base
        ]
        return pd.DataFrame(rows, columns=["variant", "baseline", *(f.name for f in fields(PairedDifference))])

    def difference(self, before: str, after: str, what: What = "correct") -> PairedDifference:
        """Return the change of accuracy from one variant to another.

        Args:
            before: name of the variant to start from.
            after: name of the variant to compare with it.
            what: which verdict: "correct", or "final_answer_correct" where a task tells these apart.

        Raises:
            ValueError: an unknown variant or verdict, or answers that the folder lacks.
        """
        return paired_difference(self.verdicts(before, what), self.verdicts(after, what), groups=self.groups)

    def summary(self, what: What = "correct") -> Report:
        """Say what came out: accuracy of each variant, and how it differs from the first one's.

        Args:
            what: which verdict: "correct", or "final_answer_correct" where a task tells these apart.

        Returns:
            The report; `print` writes it within 100 columns, JupyterLab shows it as a table.

        Raises:
            ValueError: an unknown verdict, or answers that the folder lacks.
        """
        return evaluation_report(self, what)

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def errors(self, name: str, baseline: str | None = None) -> pd.DataFrame:
        """Count answers by the kind of their first error under the baseline (rows) and under a variant (columns).

        Args:
            name: name of the variant.
            baseline: name of a variant; None takes the first.

        Returns:
            A table of counts; its rows ("before") and columns ("after") are kinds of errors, and "none" for correct
            answers.

        Raises:
            ValueError: an unknown variant, or answers that the folder lacks.
        """
        import pandas as pd

        before, after = (self.answers_of(n)["error"].fillna("none") for n in (self._variant(baseline).name, name))
        return pd.crosstab(before.rename("before"), after.rename("after"))

    def repairs(self, name: str, baseline: str | None = None) -> pd.DataFrame:
        """Count what a variant fixes and breaks, by the kind of the first error.

        Args:
            name: name of the variant.
            baseline: name of a variant; None takes the first.

        Returns:
            One row per kind:

                error
                before    baseline answers with this error
                fixed     of those, the ones that become correct
                changed   of those, the ones that get another first error
                broken    correct baseline answers that get this error
                after     answers of the variant with this error

        Raises:
            ValueError: an unknown variant, or answers that the folder lacks.
        """
        import pandas as pd

        table = self.errors(name, baseline)
        kinds = sorted((set(table.index) | set(table.columns)) - {"none"})
        table = table.reindex(index=["none", *kinds], columns=["none", *kinds], fill_value=0)
        before, after = table.sum(axis=1)[kinds], table.sum(axis=0)[kinds]
        fixed, same = table.loc[kinds, "none"], [table.loc[kind, kind] for kind in kinds]
        columns = {
            "before": before,
            "fixed": fixed,
            "changed": before - fixed - same,
            "broken": table.loc["none", kinds],
            "after": after,
        }
        counts = pd.DataFrame(columns, index=kinds).rename_axis("error")
        return counts.sort_values("before", ascending=False, kind="stable").reset_index()

    def costs(self, baseline: str | None = None) -> pd.DataFrame:
        """Return the mean cost of an answer of each variant: new tokens, FLOPs, and time relative to the baseline.

        Where draws vote, the costs of all of them count. FLOPs are those of decoding, prompt included
        (`stepsal.generation.flops`); what an `edit` computes is not counted.

        Args:
            baseline: name of a variant; None takes the first.

        Returns:
            One row per variant: variant, new_tokens, flops, flops_ratio (to the baseline), time_ratio (to the
            baseline: the median over batches that answered the same draws under both in one run, times the ratio of
            their votes; NaN without such a batch), time_low and time_high (its quartiles), batches (their number).

        Raises:
            ValueError: an unknown variant, or answers that the folder lacks.
        """
        import pandas as pd

        self.answers  # noqa: B018  complete
        base = self._variant(baseline)
        base_flops = self.answers_of(base.name)["flops"].mean()
        batches = self._batches()
        rows = []
        for variant in self.variants:
            answers = self.answers_of(variant.name)
            ratio = time_ratios(batches, variant, base)
            low, median, high = ratio.quantile([0.25, 0.5, 0.75])
            rows.append(
                {"variant": variant.name, "new_tokens": answers["n_new_tokens"].mean(),
                 "flops": answers["flops"].mean(), "flops_ratio": answers["flops"].mean() / base_flops,
                 "time_ratio": median, "time_low": low, "time_high": high, "batches": len(ratio)}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def _batches(self) -> pd.DataFrame:
        """Return seconds and (draw, problem) pairs of every batch in the folder, by variant, run and batch."""
        frame = read_answers(Store.load(self.folder, KIND, VERSION)).sort_values(["draw", "problem"])
        frame["pair"] = list(zip(frame["draw"], frame["problem"], strict=True))
        return frame.groupby(["variant", "run", "batch"]).agg(seconds=("seconds", "sum"), pairs=("pair", tuple))

    def _variant(self, name: str | None) -> Variant:
        """Return the variant of a name; None is the first."""
        by_name = {v.name: v for v in self.variants}
        if name is not None and name not in by_name:
            raise ValueError(f"there is no variant {name!r}; there is {', '.join(map(repr, by_name))}")
        return self.variants[0] if name is None else by_name[name]


def time_ratios(batches: pd.DataFrame, variant: Variant, base: Variant) -> pd.Series:
    """Return the time of an answer of a variant over that of the baseline, for each batch that both have done.

    Args:
        batches: seconds, and pairs of draw and problem, by variant, run and batch.
        variant: the variant.
        base: the baseline.
    """
    both = batches.loc[variant.key].join(batches.loc[base.key], how="inner", rsuffix="_base")
    both = both[both["pairs"] == both["pairs_base"]]
    return both["seconds"] / both["seconds_base"] * variant.votes / base.votes


def voted_for(final_answers: pd.Series) -> Any:
    """Return the index of the first answer with the most frequent final answer; of the first answer if none has one.

    Args:
        final_answers: final answer of each answer, in the order of draws; missing where it states none.

    Example:
        >>> import pandas as pd
        >>> from stepsal.experiments.results import voted_for
        >>> voted_for(pd.Series(["3", "5", None, "5"]))
        1
    """
    counts = Counter(final_answers.dropna())
    if not counts:
        return final_answers.index[0]
    most = max(counts.values())
    return next(i for i, final_answer in final_answers.items() if counts.get(final_answer, 0) == most)
