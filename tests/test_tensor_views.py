"""Views of an OctavoTensor: those along stored rows stay in 8 bits and share storage, others are float copies."""

import pytest
import torch

import octavo
from octavo import OctavoTensor

from .conftest import relative_error
from .models.weights import check_view, make


@pytest.mark.usefixtures("no_fallbacks")
@pytest.mark.parametrize("shape", [(12, 100), (4, 12, 100)])
def test_transposing_is_a_flag(shape):
    t = make(*shape)
    dense = t.dequantize()
    order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    for found in (t.mT, t.transpose(-1, -2), t.transpose(len(shape) - 2, len(shape) - 1), t.permute(order)):
        check_view(found, dense.mT)
        assert found.qdata.data_ptr() == t.qdata.data_ptr()
    check_view(t.mT.mT, dense)
    check_view(t.permute(*range(len(shape))), dense)
    if len(shape) == 2:
        check_view(t.T, dense.T)
        check_view(t.t(), dense.t())


CUTS = {
    "first": lambda t: t[0],
    "last": lambda t: t[-1],
    "rows": lambda t: t[2:5],
    "from the end": lambda t: t[-3:],
    "steps": lambda t: t[1:9:3],
    "none": lambda t: t[4:4],
    "narrow": lambda t: t.narrow(0, 1, 2),
    "select": lambda t: t.select(0, 3),
    "ellipsis": lambda t: t[...],
    "one component": lambda t: t[2:5, :],
    "blocks": lambda t: t[..., 64:],
    "more blocks": lambda t: t[..., :64],
    "twice": lambda t: t[2:8][1:3],
}


@pytest.mark.usefixtures("no_fallbacks")
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("shape", [(12, 100), (12, 5, 100)])
def test_cuts_along_rows_stay_in_8_bits(shape, cut):
    t = make(*shape)
    dense = t.dequantize()
    found = cut(t)
    check_view(found, cut(dense))
    if found.numel():
        assert found.qdata.untyped_storage().data_ptr() == t.qdata.untyped_storage().data_ptr()


@pytest.mark.usefixtures("no_fallbacks")
@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t.split(5),
        lambda t: t.split([2, 3, 7]),
        lambda t: t.chunk(3),
        lambda t: t.chunk(5),
        lambda t: t.unbind(0),
        lambda t: list(t),
        lambda t: torch.tensor_split(t, 3),
    ],
)
@pytest.mark.parametrize("shape", [(12, 100), (12, 5, 100)])
def test_splits_along_rows(shape, cut):
    t = make(*shape)
    found, expected = cut(t), cut(t.dequantize())
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        check_view(one, other)


@pytest.mark.usefixtures("no_fallbacks")
def test_cuts_of_a_transposed_weight_run_along_stored_rows():
    t = make(12, 100).T
    dense = t.dequantize()
    for found, expected in ((t[:, 2:5], dense[:, 2:5]), (t.split(5, 1)[1], dense.split(5, 1)[1])):
        assert isinstance(found, OctavoTensor) and torch.equal(found.dequantize(), expected)
    column = t[:, 3]
    assert isinstance(column, OctavoTensor) and torch.equal(column.dequantize(), dense[:, 3])
    experts = make(3, 12, 100).mT
    assert torch.equal(experts[1].dequantize(), experts.dequantize()[1])
    assert torch.equal(experts[:, :, 2:4].dequantize(), experts.dequantize()[:, :, 2:4])


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t[:, 3],
        lambda t: t[:, 3:9],
        lambda t: t[2, 5],
        lambda t: t.T[3:9],
        lambda t: t[:, ::2],
        lambda t: t.chunk(2, 1)[1],
        lambda t: t.unsqueeze(0),
        lambda t: t.view(3, 8, 50),
        lambda t: t.reshape(-1),
        lambda t: t[t > 1],
        lambda t: t[:, torch.tensor([1, 2])],
        lambda t: t.diagonal(),
        lambda t: t.expand(2, 12, 100),
        lambda t: t.permute(1, 0)[:3],
        lambda t: t.T.contiguous().view(-1),
        lambda t: t[torch.arange(12) > 6],
    ],
)
def test_other_cuts_are_float_and_counted(cut):
    t = make(12, 100)
    octavo.reset_fallbacks()
    found = cut(t)
    assert not isinstance(found, OctavoTensor) and torch.equal(found, cut(t.dequantize()))
    assert octavo.fallbacks()
    octavo.reset_fallbacks()


@pytest.mark.usefixtures("no_fallbacks")
def test_indexing_by_ids_decodes_only_those_rows():
    t = make(12, 100)
    dense = t.dequantize()
    for ids in (
        torch.tensor([3, 0, 3]),
        torch.tensor([[1, -1], [-12, 5]]),
        torch.tensor([], dtype=torch.int64),
    ):
        assert torch.equal(t[ids], dense[ids])
    assert torch.equal(t.index_select(0, torch.tensor([1, 1])), dense[[1, 1]])
    assert torch.equal(t[[1, 2]], dense[[1, 2]])
    experts = make(4, 12, 100)
    picked = experts[torch.tensor([3, 1, 3])]
    assert isinstance(picked, OctavoTensor)
    assert torch.equal(picked.dequantize(), experts.dequantize()[[3, 1, 3]])
    with pytest.raises(IndexError):
        t[torch.tensor([12])]
    with pytest.raises(IndexError):
        t[torch.tensor([-13])]


def test_rows_in_groups_are_a_stack(no_fallbacks, device):
    """A matrix seen as a stack, as layers do that are linear group by group; writing into a group reaches the matrix."""
    weight = OctavoTensor.from_float(torch.randn(24, 100, device=device))
    dense = weight.dequantize()
    groups = weight.view(4, -1, 100)
    assert isinstance(groups, OctavoTensor) and groups.qdata.data_ptr() == weight.qdata.data_ptr()
    assert torch.equal(groups.dequantize(), dense.view(4, 6, 100))
    x = torch.randn(4, 5, 100, device=device)
    expected = torch.bmm(x, dense.view(4, 6, 100).transpose(1, 2))
    assert relative_error(torch.bmm(x, groups.transpose(1, 2)), expected) < 1e-5
    groups[1].copy_(torch.zeros(6, 100, device=device))
    assert weight[6:12].dequantize().abs().max() == 0 and torch.equal(weight[:6].dequantize(), dense[:6])
