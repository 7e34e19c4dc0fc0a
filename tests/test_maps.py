"""Pooling against a double loop, and the labelled result in and out of files."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepsal import maps
from stepsal.maps import (
    StepSaliency,
    band_layers,
    normalise_rows,
    pair_counts,
    pool_rows,
    pool_steps,
    reduce_blocks,
    row_counts,
)


@st.composite
def segmented(draw):
    """Step ids of a trace (template tokens anywhere, steps in order or not), steps, targets and a token map."""
    n_steps = draw(st.integers(1, 5))
    ids = draw(st.lists(st.integers(-1, n_steps - 1), min_size=1, max_size=24))
    if draw(st.booleans()):
        ids = sorted(ids)
    has_target = draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    token_map = torch.rand(len(ids), len(ids), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return token_map, torch.tensor(ids), n_steps, None if has_target is None else torch.tensor(has_target)


def double_loop(token_map, step_ids, n_steps, has_target, causal=True):
    n_pos = len(step_ids)
    sums = torch.zeros(n_steps, n_steps, dtype=torch.float64)
    counts = torch.zeros(n_steps, n_steps, dtype=torch.long)
    for t in range(n_pos):
        for k in range(n_pos):
            i, j = int(step_ids[t]), int(step_ids[k])
            row_counted = t < n_pos - 1 if has_target is None else bool(has_target[t])
            if i >= 0 and j >= 0 and row_counted and (k <= t or not causal):
                counts[i, j] += 1
                if k <= t:
                    sums[i, j] += token_map[t, k].double()
    return sums, counts


@given(segmented(), st.integers(1, 30))
def test_pooling_agrees_with_a_double_loop(case, rows_per_block):
    token_map, step_ids, n_steps, has_target = case
    sums, counts = double_loop(token_map, step_ids, n_steps, has_target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "ROWS_PER_BLOCK", rows_per_block)
        pooled = pool_steps(token_map, step_ids, n_steps, has_target)
    torch.testing.assert_close(pooled.double(), sums, rtol=1e-5, atol=1e-6)
    assert torch.equal(pair_counts(step_ids, n_steps, has_target), counts)


@given(segmented())
def test_mean_times_pairs_is_sum_times_rows(case):
    token_map, step_ids, n_steps, has_target = case
    sums = pool_steps(token_map.double(), step_ids, n_steps, has_target)
    counts = pair_counts(step_ids, n_steps, has_target)
    rows = row_counts(step_ids, n_steps, has_target)
    mean, mass = (reduce_blocks(sums, counts, rows, how) for how in ("mean", "sum"))
    torch.testing.assert_close(mean * counts, sums)
    torch.testing.assert_close(mass * rows[:, None], sums)


@given(segmented())
def test_uniform_token_map_pools_to_uniform_step_map(case):
    _, step_ids, n_steps, has_target = case
    uniform = torch.ones(len(step_ids), len(step_ids), dtype=torch.float64)
    counts = pair_counts(step_ids, n_steps, has_target)
    mean = reduce_blocks(
        pool_steps(uniform, step_ids, n_steps, has_target), counts, row_counts(step_ids, n_steps, has_target), "mean"
    )
    assert torch.equal(mean, (counts > 0).double())


def ordered_steps(*lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def test_ordered_steps_pool_to_a_lower_triangle():
    step_ids = ordered_steps(3, 5, 2)
    pooled = pool_steps(torch.rand(2, 4, 10, 10), step_ids, 3)
    assert pooled.shape == (2, 4, 3, 3)
    assert not pooled.triu(1).any()
    assert (pooled.tril() + torch.ones(3, 3).triu(1) > 0).all()


def test_nothing_above_the_diagonal_is_read():
    token_map = torch.where(torch.ones(6, 6).tril().bool(), torch.ones(6, 6), torch.nan)
    assert pool_steps(token_map, ordered_steps(2, 4), 2).isfinite().all()


def test_template_tokens_are_in_no_block():
    step_ids = torch.tensor([-1, 0, 0, -1, 1, 1, -1])
    token_map = torch.ones(7, 7)
    before = pool_steps(token_map, step_ids, 2)
    token_map[:, step_ids == -1] = 1e6
    token_map[step_ids == -1] = 1e6
    assert torch.equal(pool_steps(token_map, step_ids, 2), before)
    assert row_counts(step_ids, 2).tolist() == [2, 2]  # the last position, which has no target, is template


def test_authors_convention_averages_the_zeros_above_the_diagonal():
    n = 10
    step_ids = ordered_steps(n, n, n, 1)
    uniform = torch.ones(31, 31).tril()
    counts = pair_counts(step_ids, 4, causal=False)
    mean = reduce_blocks(pool_steps(uniform, step_ids, 4), counts, row_counts(step_ids, 4), "mean")
    expected = torch.ones(3, 3).tril(-1) + (n + 1) / (2 * n) * torch.eye(3)  # 0.55 on the diagonal
    torch.testing.assert_close(mean[:3, :3], expected)
    causal = pair_counts(step_ids, 4)
    below = torch.ones(4, 4).tril(-1).bool()
    assert torch.equal(counts[below], causal[below])
    assert not counts.triu(1).any()


def test_pooling_row_blocks_adds_up():
    token_map, step_ids = torch.rand(3, 20, 20), ordered_steps(6, 9, 5)
    blocks = [pool_rows(token_map[:, a:b], a, step_ids, 3) for a, b in ((0, 7), (7, 8), (8, 20))]
    torch.testing.assert_close(torch.stack(blocks).sum(0), pool_steps(token_map, step_ids, 3))


def test_half_precision_is_summed_in_float32():
    step_ids = ordered_steps(2000, 1)
    token_map = torch.full((2001, 2001), 1e-2, dtype=torch.bfloat16)
    pooled = pool_steps(token_map, step_ids, 2)
    assert pooled.dtype == torch.float32
    expected = float(token_map[0, 0]) * 2000 * 2001 / 2
    assert pooled[0, 0].item() == pytest.approx(expected, rel=1e-4)


def test_pair_counts_are_exact_beyond_float32():
    n = 6001
    assert pair_counts(torch.zeros(n + 1, dtype=torch.long), 1).item() == n * (n + 1) // 2


def test_pooling_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="covers 4 positions"):
        pool_steps(torch.ones(3, 4), torch.zeros(4, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="do not fit 4 positions"):
        pool_rows(torch.ones(2, 2), 1, torch.zeros(4, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="has_target"):
        pair_counts(torch.zeros(4, dtype=torch.long), 1, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="'median' is unknown"):
        reduce_blocks(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), "median")


# ----------------------------------------------------------------------------------------------------- result


def make(n_heads=2, layers=(0, 1, 3, 7), n_layers=8, **changes) -> StepSaliency:
    """A question of 4 tokens, three thinking steps, a summary; template tokens before and between."""
    lengths = (4, 3, 2, 3, 2)
    step_ids = torch.tensor([-1, *[0] * 4, -1, *[1] * 3, *[2] * 2, *[3] * 3, *[4] * 2])
    n_pos = len(step_ids)
    tokens = torch.rand(len(layers), n_heads, n_pos, n_pos, generator=torch.Generator().manual_seed(0)).tril()
    heads = reduce_blocks(pool_steps(tokens, step_ids, 5), pair_counts(step_ids, 5), row_counts(step_ids, 5), "mean")
    fields = {
        "values": heads.mean(1),
        "layers": layers,
        "n_layers": n_layers,
        "model": "mini",
        "target": "token",
        "reduce": "mean",
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
    with pytest.raises(ValueError, match="layer -9 was not computed"):
        saliency.layer(-9)
    with pytest.raises(ValueError, match="no layer given"):
        saliency.mean_over([])


def test_bands_split_the_model_not_the_computed_layers():
    saliency = make()
    assert [saliency.band(name) for name in ("shallow", "middle", "deep")] == [(0, 1), (3,), (7,)]
    assert band_layers("shallow", 30) == tuple(range(7))
    assert band_layers("deep", 30) == tuple(range(23, 30))
    assert [band_layers(name, 1) for name in ("shallow", "middle", "deep")] == [(0,), (), (0,)]
    with pytest.raises(ValueError, match="band 'low' is unknown"):
        saliency.band("low")
    with pytest.raises(ValueError, match="no computed layer lies in the deep band"):
        make(layers=(0, 1, 2, 3)).mean_over("deep")


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


@given(st.floats(1e-30, 1e30))
def test_row_shares_ignore_the_scale(scale):
    values = torch.tensor([[1.0, 0.0], [1.0, 3.0]])
    torch.testing.assert_close(normalise_rows(values * scale), torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


def test_xarray_carries_roles_and_texts():
    saliency = make()
    array = saliency.to_xarray()
    assert array.dims == ("layer", "query_step", "key_step")
    assert array.sel(layer=7, query_step=4, key_step=0).item() == saliency.values[3, 4, 0].item()
    assert array.sel(key_step=array.key_role == "thinking").shape == (4, 5, 3)
    assert array.query_text.values[2] == saliency.step_texts[2]
    assert array.attrs["reduce"] == "mean"


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

    monkeypatch.setattr(maps.os, "replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        make(model="other").save(path)
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
        ({"version": 99}, "format version 99"),
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
        "target='token', reduce='mean')"
    )
