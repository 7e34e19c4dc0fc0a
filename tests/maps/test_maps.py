"""The labelled result, in and out of files."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from stepsal.maps import StepSaliency, average
from stepsal.maps.pooling import pair_counts, pool_steps, reduce_blocks, row_counts


def make(n_heads=2, layers=(0, 1, 3, 7), n_layers=8, **changes) -> StepSaliency:
    """A question of 4 tokens, three thinking steps, a summary; template tokens before and between."""
    lengths = (4, 3, 2, 3, 2)
    step_ids = torch.tensor([-1, *[0] * 4, -1, *[1] * 3, *[2] * 2, *[3] * 3, *[4] * 2])
    n_pos = len(step_ids)
    tokens = torch.rand(len(layers), n_heads, n_pos, n_pos, generator=torch.Generator().manual_seed(0)).tril()
    heads = reduce_blocks(pool_steps(tokens, step_ids, 5), pair_counts(step_ids, 5), row_counts(step_ids, 5), "density")
    fields = {
        "values": heads.mean(1),
        "layers": layers,
        "n_layers": n_layers,
        "model_name": "mini",
        "target": "token",
        "reduce": "density",
        "roles": ("question", "thinking", "thinking", "thinking", "summary"),
        "step_texts": tuple(f"step {i}, naïve ∑" for i in range(5)),
        "step_lengths": lengths,
        "step_ids": step_ids,
        "token_texts": tuple(f" t{i}" for i in range(n_pos)),
        "head_values": heads,
        "token_values": tokens.mean(1),
        "metadata": {"seed": 3, "versions": {"torch": "2"}, "engine": "streamed"},
    }
    return StepSaliency(**fields | changes)


def test_layers_by_index():
    saliency = make()
    assert torch.equal(saliency.layer(3), saliency.values[2])
    assert torch.equal(saliency.layer(-1), saliency.values[3])
    torch.testing.assert_close(saliency.mean_over([0, -1]), saliency.values[[0, 3]].mean(0))
    torch.testing.assert_close(saliency.mean_over("shallow"), saliency.values[:2].mean(0))
    with pytest.raises(ValueError, match="layer 2 was not computed"):
        saliency.layer(2)
    with pytest.raises(ValueError, match="there is no layer -9 in a model of 8 layers"):
        saliency.layer(-9)
    for nothing in ([], ()):
        with pytest.raises(ValueError, match=r"names no computed layer of 8; computed: \(0, 1, 3, 7\)"):
            saliency.mean_over(nothing)


def test_bands_split_the_model_not_the_computed_layers():
    saliency = make()
    assert [saliency.computed(name) for name in ("shallow", "middle", "deep")] == [(0, 1), (3,), (7,)]
    assert saliency.computed((0.0, 0.5)) == (0, 1, 3)
    assert saliency.positions((0.25, 1.0)) == [2, 3]
    assert saliency.computed([2, 3]) == (3,)
    with pytest.raises(ValueError, match="layer 2 was not computed"):
        saliency.positions([2, 3])
    with pytest.raises(ValueError, match="layers='low' names no layers"):
        saliency.computed("low")
    with pytest.raises(ValueError, match="layers='deep' names no computed layer of 8"):
        make(layers=(0, 1, 2, 3)).mean_over("deep")


def links_by_loop(saliency, layers, own_step):
    """All links as (saliency, query, key), the largest first."""
    mean = saliency.mean_over(layers)
    pairs = [(i, j) for i in range(saliency.n_steps) for j in range(i + own_step)]
    return sorted(((mean[i, j].item(), i, j) for i, j in pairs if mean[i, j] > 0), key=lambda link: -link[0])


@pytest.mark.parametrize("own_step", [False, True])
@pytest.mark.parametrize("layers", ["all", "deep", [0, 3], (0.0, 0.5)])
def test_top_gives_the_largest_links(layers, own_step):
    saliency = make()
    expected = links_by_loop(saliency, layers, own_step)
    frame = saliency.top(4, layers=layers, own_step=own_step)
    assert list(frame) == [
        "query_step", "key_step", "query_role", "key_role", "saliency", "query_text", "key_text"
    ]  # fmt: skip
    assert list(frame.index) == [0, 1, 2, 3]
    for row, (value, i, j) in zip(frame.itertuples(), expected, strict=False):
        assert (row.query_step, row.key_step) == (i, j)
        assert row.saliency == pytest.approx(value, rel=1e-5)
        assert (row.query_text, row.key_text) == (saliency.step_texts[i], saliency.step_texts[j])
        assert (row.query_role, row.key_role) == (saliency.roles[i], saliency.roles[j])
    assert len(saliency.top(100, layers=layers, own_step=own_step)) == len(expected) == 10 + 5 * own_step


def test_top_of_roles_ties_and_nothing():
    saliency = make()
    assert set(saliency.top(99, query_role="summary", key_role="thinking").key_step) == {1, 2, 3}
    assert set(saliency.top(99, query_role="summary").query_step) == {4}
    flat = make(values=torch.ones(4, 5, 5).tril(-1), head_values=None)
    assert flat.top(3)[["query_step", "key_step"]].values.tolist() == [[1, 0], [2, 0], [2, 1]]
    assert flat.top(99, own_step=True).query_step.tolist() == flat.top(99).query_step.tolist()  # zero is no link
    assert make(values=torch.zeros(4, 5, 5), head_values=None).top().empty
    assert list(make(values=torch.zeros(4, 5, 5), head_values=None).top()) == list(flat.top())
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        saliency.top(0)
    with pytest.raises(ValueError, match="query_role='answer' is unknown"):
        saliency.top(query_role="answer")
    with pytest.raises(ValueError, match="layer 2 was not computed"):
        saliency.top(layers=2)


def test_rows_sum_to_one_or_stay_zero():
    saliency = make()
    values = saliency.values.clone() * 1e-20
    values[1, 2] = 0
    normalised = make(values=values).row_normalised()
    sums = normalised.values.sum(-1)
    assert sums[1, 2] == 0
    sums[1, 2] = 1
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert normalised.metadata["row_normalised"]
    assert "row_normalised" not in saliency.metadata
    torch.testing.assert_close(normalised.head_values.sum(-1)[0, 0], torch.ones(5))


def test_xarray_carries_roles_and_texts():
    saliency = make()
    array = saliency.to_xarray()
    assert array.dims == ("layer", "query_step", "key_step")
    assert array.sel(layer=7, query_step=4, key_step=0).item() == saliency.values[3, 4, 0].item()
    assert array.sel(key_step=array.key_role == "thinking").shape == (4, 5, 3)
    assert array.query_text.values[2] == saliency.step_texts[2]
    assert array.attrs == {"model_name": "mini", "n_layers": 8, "target": "token", "reduce": "density"}


def test_dataframe_is_the_lower_triangle():
    saliency = make()
    frame = saliency.to_dataframe()
    assert list(frame) == ["layer", "query_step", "key_step", "query_role", "key_role", "saliency"]
    assert len(frame) == 4 * 15
    assert (frame.key_step <= frame.query_step).all()
    row = frame[(frame.layer == 3) & (frame.query_step == 4) & (frame.key_step == 1)].iloc[0]
    assert (row.query_role, row.key_role) == ("summary", "thinking")
    assert row.saliency == pytest.approx(saliency.layer(3)[4, 1].item())


@pytest.mark.parametrize("kept", [{}, {"head_values": None}, {"token_values": None, "head_values": None}])
def test_save_and_load_give_the_same_saliency(tmp_path, kept):
    saliency = make(**kept)
    path = saliency.save(tmp_path / "deep" / "run.v1")
    assert path.name == "run.v1.safetensors"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = StepSaliency.load(tmp_path / "deep" / "run.v1")
    for entry in dataclasses.fields(StepSaliency):
        before, after = getattr(saliency, entry.name), getattr(loaded, entry.name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after)
            assert before.dtype == after.dtype
        else:
            assert before == after


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    heads = make().head_values[:, :1]
    saliency = make(head_values=heads, values=heads[:, 0])
    assert torch.equal(StepSaliency.load(saliency.save(tmp_path / "run")).values, saliency.values)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = make().save(tmp_path / "run")
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr("stepsal.storage.os.replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        make(model_name="other").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def rewritten(path, **changes):
    """The saved file with its document changed."""
    with safetensors.safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["stepsal"])
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {"stepsal": json.dumps(document | changes)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "format version 99, this stepsal reads 2: use the stepsal that wrote it"),
        ({"version": None}, "format version None"),
        ({"format": "something"}, "does not hold a StepSaliency"),
        ({"roles": ["question"]}, "inconsistent"),
        ({"colour": "red"}, "inconsistent"),
    ],
)
def test_load_refuses_other_documents(tmp_path, changes, message):
    path = make().save(tmp_path / "run")
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message):
        StepSaliency.load(path)


def test_files_of_the_first_version_are_refused_with_the_way_to_new_ones(tmp_path):
    path = make().save(tmp_path / "run")
    rewritten(path, version=1, model="mini", reduce="mean")
    message = rf"format version 1, this stepsal reads 2: migrate it by `python scripts/migrate.py {path}`"
    with pytest.raises(ValueError, match=message):
        StepSaliency.load(tmp_path / "run")


def test_load_refuses_foreign_and_broken_files(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        StepSaliency.load(path)
    path.write_bytes(make().save(tmp_path / "good").read_bytes()[:-40])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        StepSaliency.load(path)
    path.write_text("not a tensor in sight")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        StepSaliency.load(path)
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not written by StepSaliency"):
        StepSaliency.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(4, 5, 4)}, r"values has shape \[4, 5, 4\]"),
        ({"values": torch.zeros(4, 5, 5).half()}, "float16"),
        ({"values": torch.ones(4, 5, 5)}, "above the diagonal"),
        ({"values": torch.full((4, 5, 5), torch.nan)}, "NaN"),
        ({"roles": ("question",) * 4 + ("answer",)}, "role='answer' is unknown"),
        ({"roles": ("question",)}, "entries for 1 steps"),
        ({"step_lengths": (4, 3, 2, 3, 3)}, "step_ids counts"),
        ({"layers": (0, 1, 3, 8)}, "distinct indices"),
        ({"layers": (0, 1, 3, 3)}, "distinct indices"),
        ({"step_ids": torch.full((16,), 5)}, "must lie in"),
        ({"head_values": torch.zeros(4, 5, 5)}, "head_values has shape"),
        ({"token_values": torch.zeros(4, 5, 5)}, "token_values has shape"),
        ({"target": "word"}, "target='word' is unknown"),
        ({"metadata": {"device": torch.device("cpu")}}, "cannot be written as JSON"),
    ],
)
def test_inconsistent_saliency_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_repr_is_one_short_line():
    assert repr(make()) == (
        "StepSaliency('mini', 4 of 8 layers, 5 steps: 1 question, 3 thinking, 1 summary; 16 tokens, "
        "target='token', reduce='density')"
    )


def test_average_of_maps_with_the_same_steps():
    first, second = make(), make(values=make().values.flip(0), metadata={"seed": 4})
    mean = average([first, second])
    torch.testing.assert_close(mean.values, (first.values + second.values) / 2)
    torch.testing.assert_close(mean.head_values, first.head_values)
    assert (mean.step_texts, mean.token_values) == (("",) * 5, None)
    assert mean.metadata == {**first.metadata, "averaged": 2}
    assert average([first, make(head_values=None)]).head_values is None
    for other, difference in (
        (make(model_name="other"), "has model_name='other' but the first has 'mini'"),
        (make(reduce="mass"), "reduce='mass'"),
        (first.row_normalised(), "differ in row_normalised"),
    ):
        with pytest.raises(ValueError, match=difference):
            average([first, other])
    with pytest.raises(ValueError, match="nothing to average"):
        average([])
