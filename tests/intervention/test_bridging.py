"""Groups and shares of one pass on a device, against the groups of the ledger."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import char_tokenizer

from stepsal.intervention.bridging import Bridging, KeyGroups
from stepsal.intervention.ledger import Ledger
from stepsal.intervention.oeb import bridge_share
from stepsal.trace import FORMATS, PromptFrame
from stepsal.trace.tracking import SequenceTracker

TOKENIZER = char_tokenizer()
FIRST = "<bos><user>How many?<assistant><think>We add three and four. Then it is seven.</think>It is seven. "
SECOND = "<user>And why is that?<assistant><think>So it is said. "
CPU = torch.device("cpu")


def read(texts: list[str], cuts: list[int], select: list[int] | None = None) -> tuple[Ledger, list, list]:
    """Read texts of one length in portions, and lay out each of them; after the first one some rows may stay."""
    ids = np.array([TOKENIZER(text)["input_ids"] for text in texts])
    ledger = Ledger(
        [SequenceTracker(TOKENIZER, PromptFrame.of(TOKENIZER), FORMATS["think"]) for _ in texts],
    )
    key_groups, portions, bridgings = KeyGroups(len(texts), CPU), [], []
    for part in np.split(ids, cuts, axis=1):
        rows = part if len(part) == ledger.n_rows else part[select]
        portions.append(ledger.advance(rows, np.ones(rows.shape, dtype=bool)))
        key_groups.update(ledger, portions[-1].changed)
        bridgings.append(key_groups.lay_out(ledger, portions[-1], {None, 6}))
        if select is not None and ledger.n_rows == len(texts):
            ledger.select(select)
            key_groups.select(select)
    return ledger, portions, bridgings


@pytest.mark.parametrize("text", [FIRST, FIRST + SECOND, FIRST + "Then it goes on. " * 40 + SECOND])
@pytest.mark.parametrize("cuts", [[], [10], [50, 51, 52], list(range(1, 60))])
def test_groups_are_those_of_the_ledger(text: str, cuts: list[int]) -> None:
    ledger, portions, bridgings = read([text], cuts)
    assert bridgings[-1] is not None
    for portion, bridging in zip(portions, bridgings, strict=True):
        if bridging is None:
            assert (portion.groups.bridge == -1).all()
            continue
        keys = np.arange(portion.stop)
        for of_rows, sections in zip(bridging.of_rows.unbind(-1), portion.groups[:2], strict=True):
            mask = bridging.groups[:, None] == of_rows[..., None]
            expected = (ledger.sections[:, None, : portion.stop] == sections[:, :, None]) & (
                keys >= portion.groups.since[:, :, None]
            )
            causal = keys <= np.arange(portion.first, portion.stop)[:, None]
            np.testing.assert_array_equal(mask.numpy() & causal, expected & causal)


def test_shares_are_those_of_what_each_window_sees() -> None:
    ledger, (portion,), (bridging,) = read([FIRST], [])
    for window in (None, 6):
        counts = [torch.from_numpy(ledger.count_visible(s, window)) for s in portion.groups[:2]]
        assert torch.equal(bridging.shares[window][:, 0], bridge_share(*counts))
        assert torch.equal(bridging.shares[window][:, 0] > 0, (counts[0] > 0) & (counts[1] > 0))
    assert (bridging.shares[6] > 0).sum() < (bridging.shares[None] > 0).sum()


def test_rows_that_stay() -> None:
    texts = [FIRST, FIRST.replace("</think>It is seven. ", " And so it is."), FIRST.replace("three. ", "three, ")]
    assert len({len(TOKENIZER(text)["input_ids"]) for text in texts}) == 1
    _, _, (_, together) = read(texts, [60])
    _, _, (_, stayed) = read(texts, [60], select=[2, 1])
    for name in ("groups", "of_rows"):
        assert torch.equal(getattr(stayed, name), getattr(together, name)[[2, 1]])
    assert torch.equal(stayed.shares[6], together.shares[6][[2, 1]])


@pytest.mark.parametrize("text", [FIRST, FIRST + SECOND])
def test_members_are_groups_one_by_one(text: str) -> None:
    _, _, (bridging,) = read([text, text], [])
    members, of_rows = bridging.row_groups(n_keys=20)  # as many as a window sees
    assert members.shape == (2, 20, bridging.n_groups)
    assert torch.equal(members.argmax(-1), bridging.groups[:, -20:].long())
    assert torch.equal(members.sum(-1), torch.ones(2, 20))
    assert int(bridging.of_rows.max()) < bridging.n_groups
    edited = (of_rows >= 0).all(-1)
    assert not edited[:, : bridging.first].any()
    assert edited[:, bridging.first].all()


def test_it_goes_where_the_layer_is() -> None:
    bridging = Bridging(torch.ones(1, 3).int(), torch.ones(1, 2, 2).long(), {None: torch.ones(1, 1, 2)}, n_groups=4)
    assert bridging.on(CPU) is bridging
    other = bridging.on(torch.device("meta"))
    assert other is bridging.on(torch.device("meta"))
    tensors = [other.groups, other.of_rows, other.shares[None]]
    assert {x.device.type for x in tensors} == {"meta"}
