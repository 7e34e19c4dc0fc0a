"""The labelled result, in and out of files."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from stepsal.maps import StepSaliency
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
        "model": "mini",
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


def test_xarray_carries_roles_and_texts():
    saliency = make()
    array = saliency.to_xarray()
    assert array.dims == ("layer", "query_step", "key_step")
    assert array.sel(layer=7, query_step=4, key_step=0).item() == saliency.values[3, 4, 0].item()
    assert array.sel(key_step=array.key_role == "thinking").shape == (4, 5, 3)
    assert array.query_text.values[2] == saliency.step_texts[2]
    assert array.attrs["reduce"] == "density"


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
        "target='token', reduce='density')"
    )
