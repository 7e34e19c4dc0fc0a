"""The gains of edits as a labelled value: by text, step, layer and head; with tables, files, and the best heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from stepsal.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

KIND, FORMAT_VERSION = "stepsal.EditGains", 1
Edit = Literal["bridge", "momentum"]


@dataclass(frozen=True, eq=False)
class EditGains:
    """First-order gains of the edits of StepFlow, from `stepsal.edit_gains`.

    Attributes:
        bridge: gain of bridging a head at tau_max, in nats, [text, step, tau_max, layer, head]. The step is that of the
            query, so that a text's gain is the sum over its steps; steps that a text does not have are 0.
        momentum: gain of momentum where a step begins, in nats per unit of alpha, [text, step, layer, head].
        objective: value of the objective without an edit, in nats, [text].
        roles: role of each step of each text.
        about: labels of each text.
        metadata: model, objective and settings of the edits.

    Example:
        >>> trace = stepsal.generate(model := stepsal.load("mini"), stepsal.tasks.chain.EXAMPLE)
        >>> gains = stepsal.edit_gains(model, [trace], "answer", progress=False)
        >>> gains, list(gains.to_dataframe())
        (EditGains(mini, 1 text, 8 layers x 4 heads, tau_max 0.15), ['text', 'tau_max', 'layer', 'head', 'gain'])
    """

    bridge: xr.DataArray
    momentum: xr.DataArray
    objective: xr.DataArray
    roles: tuple[tuple[str, ...], ...]
    about: tuple[Mapping[str, Any], ...]
    metadata: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        bridge: Float[np.ndarray, "text step tau layer head"],
        momentum: Float[np.ndarray, "text step layer head"],
        objective: Float[np.ndarray, " text"],
        taus: Sequence[float],
        *,
        roles: Sequence[Sequence[str]],
        about: Sequence[Mapping[str, Any]],
        metadata: Mapping[str, Any],
    ) -> EditGains:
        """Return gains with labels from plain arrays.

        Args:
            bridge: see the attributes.
            momentum: see the attributes.
            objective: see the attributes.
            taus: values of tau_max.
            roles: role of each step of each text.
            about: labels of each text.
            metadata: model, objective and settings of the edits.
        """
        import xarray as xr

        coordinates = {"tau_max": list(map(float, taus))}
        return cls(
            xr.DataArray(bridge, dims=("text", "step", "tau_max", "layer", "head"), coords=coordinates),
            xr.DataArray(momentum, dims=("text", "step", "layer", "head")),
            xr.DataArray(objective, dims=("text",)),
            tuple(map(tuple, roles)), tuple(about), dict(metadata),
        )  # fmt: skip

    @property
    def n_texts(self) -> int:
        """The number of texts."""
        return self.objective.sizes["text"]

    def of_texts(self, edit: Edit = "bridge", tau_max: float | None = None) -> Float[np.ndarray, "text layer head"]:
        """Return the gain of each head on each text, over all steps, in nats.

        Args:
            edit: "bridge", or "momentum" (per unit of alpha).
            tau_max: strength of the bridge; None is the only one there is.

        Raises:
            ValueError: gains were not computed at this tau_max, or it is not said which.
        """
        if edit == "momentum":
            return self.momentum.sum("step").values
        taus = self.bridge["tau_max"].values.tolist()
        if tau_max is None and len(taus) > 1:
            raise ValueError(f"there are gains at tau_max {taus}: name one by tau_max=")
        chosen = taus[0] if tau_max is None else tau_max
        if chosen not in taus:
            raise ValueError(
                f"there are no gains at tau_max={chosen}, only at {taus}: compute them by edit_gains(taus=...)"
            )
        return self.bridge.sum("step").sel(tau_max=chosen).values

    def summary(self, edit: Edit = "bridge", tau_max: float | None = None) -> pd.DataFrame:
        """Return a row for each head: layer, head, gain (the mean), stderr, t, shrunken; largest `shrunken` first.

        The standard error is over texts; `t` is their quotient, NaN where there is one text. `shrunken` is the mean
        gain drawn towards 0, the more the less it is known: it is multiplied by v / (v + stderr**2), where v is the
        variance of true gains over heads, estimated as the mean square of the gains minus that of their standard errors
        (empirical Bayes, normal prior around 0). So a head that gains much on one text alone does not come first. With
        one text, nothing is known of the error and nothing is shrunken.

        Args:
            edit: "bridge" or "momentum".
            tau_max: strength of the bridge; None is the only one there is.

        Raises:
            ValueError: gains were not computed at this tau_max, or it is not said which.
        """
        import pandas as pd

        gains = self.of_texts(edit, tau_max)
        n = len(gains)
        layer, head = np.indices(gains.shape[1:]).reshape(2, -1)
        mean = gains.mean(0).ravel()
        stderr = gains.std(0, ddof=1).ravel() / n**0.5 if n > 1 else np.full(mean.shape, np.nan)
        t = np.divide(mean, stderr, out=np.full(mean.shape, np.nan), where=stderr > 0)
        table = pd.DataFrame({"layer": layer, "head": head, "gain": mean, "stderr": stderr, "t": t})
        table["shrunken"] = shrunken(mean, stderr) if n > 1 else mean
        return table.sort_values("shrunken", ascending=False, kind="stable", ignore_index=True)

    def top(self, k: int, edit: Edit = "bridge", tau_max: float | None = None) -> dict[int, list[int]]:
        """Return the k heads of the largest shrunken gain, by layer, as `StepFlowConfig` takes them.

        Args:
            k: number of heads; fewer are returned where fewer gain.
            edit: "bridge" or "momentum".
            tau_max: strength of the bridge; None is the only one there is.

        Raises:
            ValueError: k is below 1, or gains were not computed at this tau_max.
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        table = self.summary(edit, tau_max)
        return _by_layer(table[table["shrunken"] > 0].head(k).sort_values(["layer", "head"]))

    def sure_heads(self, edit: Edit = "bridge", tau_max: float | None = None, fdr: float = 0.1) -> dict[int, list[int]]:
        """Return the heads whose gain is told from none, by layer, as `StepFlowConfig` takes them.

        Each head is tested over texts (one-sided t-test that its mean gain is above 0), and the false discovery rate
        over all heads is held (Benjamini and Hochberg); none is returned where the gains of all heads vary no more than
        their errors, so that nothing is left of them when they are shrunken. So few texts buy few heads.

        Args:
            edit: "bridge" or "momentum".
            tau_max: strength of the bridge; None is the only one there is.
            fdr: expected share of heads without a gain among those that are returned, in (0, 1).

        Raises:
            ValueError: `fdr` is out of range, there are fewer than three texts, or gains were not computed at this
                tau_max.
        """
        from scipy.stats import false_discovery_control
        from scipy.stats import t as student

        if not 0 < fdr < 1:
            raise ValueError(f"fdr={fdr} must lie in (0, 1)")
        if self.n_texts < 3:
            raise ValueError(f"gains of {self.n_texts} texts can't be tested: give at least 3, better 40")
        table = self.summary(edit, tau_max).sort_values(["layer", "head"])
        p = student.sf(table["t"].fillna(0.0).to_numpy(), self.n_texts - 1)
        return _by_layer(table[(false_discovery_control(p) <= fdr) & (table["shrunken"] > 0)])

    def to_dataframe(self, edit: Edit = "bridge", by_step: bool = False) -> pd.DataFrame:
        """Return a row for each gain, in nats: text, (step, role,) (tau_max,) layer, head, gain.

        Args:
            edit: "bridge" or "momentum".
            by_step: keep the steps apart; those that a text does not have are left out.
        """
        gains = self.bridge if edit == "bridge" else self.momentum
        table = (gains if by_step else gains.sum("step")).to_dataframe("gain").reset_index()
        if by_step:
            n_steps = np.array(list(map(len, self.roles)))
            table = table[table["step"] < n_steps[table["text"]]].reset_index(drop=True)
            roles = [self.roles[text][step] for text, step in zip(table["text"], table["step"], strict=True)]
            table.insert(2, "role", roles)
        return table

    def save(self, path: str | Path) -> Path:
        """Write the gains to one safetensors file, the labels as a JSON document in its header.

        Args:
            path: where to write; `.safetensors` is appended where it is missing, and the folder is made.

        Returns:
            The path of the file, with its suffix.

        Example:
            >>> import tempfile
            >>> trace = stepsal.generate(model := stepsal.load("mini"), stepsal.tasks.chain.EXAMPLE)
            >>> path = stepsal.edit_gains(model, [trace], "answer", progress=False).save(tempfile.mkdtemp() + "/gains")
            >>> stepsal.intervention.EditGains.load(path).n_texts
            1
        """
        import torch

        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(self, name).values))
            for name in ("bridge", "momentum", "objective")
        }
        document = {
            "taus": self.bridge["tau_max"].values.tolist(), "roles": self.roles, "about": self.about,
            "metadata": self.metadata,
        }  # fmt: skip
        return save_tensors(path, KIND, FORMAT_VERSION, tensors, document)

    @classmethod
    def load(cls, path: str | Path) -> EditGains:
        """Read gains that `save` has written; nothing is unpickled or executed.

        Args:
            path: the file; `.safetensors` is appended where it is missing.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is corrupt, foreign, or of another format version.
        """
        tensors, document = load_tensors(path, KIND, FORMAT_VERSION)
        try:
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            return cls.of(**arrays, **document)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is inconsistent: {error}") from error

    def __repr__(self) -> str:
        n_layers, n_heads = self.bridge.shape[-2:]
        taus = ", ".join(f"{tau:g}" for tau in self.bridge["tau_max"].values)
        return (
            f"EditGains({self.metadata.get('model_name')}, {self.n_texts} text{'s' * (self.n_texts != 1)}, "
            f"{n_layers} layers x {n_heads} heads, tau_max {taus})"
        )


def shrunken(mean: Float[np.ndarray, " head"], stderr: Float[np.ndarray, " head"]) -> Float[np.ndarray, " head"]:
    """Return mean gains drawn towards 0 by what is not known of them, see `EditGains.summary`.

    Args:
        mean: mean gain of each head.
        stderr: its standard error.

    Example:
        >>> import numpy as np
        >>> from stepsal.intervention.gain_table import shrunken
        >>> shrunken(np.array([1.0, 1.0, 0.0]), np.array([0.1, 1.0, 0.1])).round(2).tolist()
        [0.97, 0.25, 0.0]
    """
    variance = max(0.0, float((mean**2 - stderr**2).mean()))
    total = variance + stderr**2
    return np.divide(variance * mean, total, out=np.zeros_like(mean), where=total > 0)


def _by_layer(table: pd.DataFrame) -> dict[int, list[int]]:
    """Return the heads of a table by layer."""
    heads: dict[int, list[int]] = {}
    for layer, head in zip(table["layer"].tolist(), table["head"].tolist(), strict=True):
        heads.setdefault(layer, []).append(head)
    return heads
