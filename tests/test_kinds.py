"""Whether a codebook consists of segments, as the launchers of GPU kernels know it: exactly, once, and never stale."""

import copy
import gc

import pytest
import torch

import octavo
from octavo import codebook
from octavo.ops.gpu import kinds


@pytest.fixture(autouse=True)
def looked(monkeypatch):
    """One entry for each codebook whose values were looked at; not the codebook, which would then live on."""
    kinds.forget()
    calls, recognise = [], kinds.recognise

    def spy(code):
        calls.append(1)
        return recognise(code)

    monkeypatch.setattr(kinds, "recognise", spy)
    yield calls
    kinds.forget()


def lines(slope=30):
    return (torch.arange(256) - 128).mul(slope).div(16384).float()


CODES = {
    "fitted": lambda: codebook.fit(torch.randn(64, 64), 64),
    "even": lines,
    "flat": lambda: torch.zeros(256),
    "grid 2^-11": lambda: (torch.arange(256) - 128) / 2048,
    "the ends": lambda: torch.cat([torch.full((128,), -1.0), torch.ones(128)]),
    "dynamic": codebook.dynamic,
    "finer than the grid": lambda: lines() / 64,
    "beyond 1": lambda: lines(150),
    "one entry off": lambda: lines().index_fill(0, torch.tensor([77]), 0.0),
    "descending": lambda: -lines(),
    "NaN": lambda: lines().index_fill(0, torch.tensor([255]), torch.nan),
    "infinity": lambda: lines().index_fill(0, torch.tensor([255]), torch.inf),
}


@pytest.mark.parametrize("name", list(CODES))
def test_recognising_is_codebook_segments(name):
    code = CODES[name]()
    wanted = name in ("fitted", "even", "flat", "grid 2^-11", "the ends")
    assert kinds.is_segments(code) == wanted
    if name not in ("NaN", "infinity"):
        assert (codebook.segments(code) is not None) == wanted


def test_it_is_looked_at_once(looked):
    code = lines()
    assert all(kinds.is_segments(code) for _ in range(3))
    assert kinds.is_segments(code.detach()) and kinds.is_segments(code.view(1, 256)[0])
    assert len(looked) == 1


def test_experts_of_a_stack_are_known_apart(looked):
    stack = torch.stack([lines(), codebook.dynamic(), lines(2)])
    for _ in range(2):
        assert [kinds.is_segments(stack[index]) for index in range(3)] == [True, False, True]
    assert [kinds.is_segments(code) for code in stack.unbind()] == [True, False, True]
    assert len(looked) == 3


@pytest.mark.parametrize("inference", [False, True])
def test_a_change_in_place_is_seen(inference):
    """By PyTorch's counter of versions; tensors of inference mode have none, and what we change ourselves is forgotten."""
    with torch.inference_mode(inference):
        weight = octavo.OctavoTensor.from_float(torch.randn(32, 64))
        other = octavo.OctavoTensor.from_float(torch.randn(32, 64), octavo.OctavoConfig(codebook="dynamic"))
        other.block_size, other.absmax = 64, other.absmax.to(weight.absmax.dtype).expand_as(weight.absmax)
        alias = weight.detach()
        assert kinds.is_segments(weight.code) and kinds.is_segments(alias.code)
        alias.copy_(other)
        assert torch.equal(weight.code, codebook.dynamic())
        assert not kinds.is_segments(weight.code) and not kinds.is_segments(alias.code)
        weight.copy_(octavo.OctavoTensor.from_float(torch.randn(32, 64)))
        assert kinds.is_segments(weight.code)
    if not inference:
        weight.code[3] = 0.4999
        assert not kinds.is_segments(alias.code)


def test_a_codebook_that_is_replaced():
    weight = octavo.OctavoTensor.from_float(torch.randn(32, 64))
    assert kinds.is_segments(weight.code)
    for code in (codebook.dynamic(), lines(), codebook.dynamic()):
        weight.code = code
        assert kinds.is_segments(weight.code) == (code is not None and codebook.segments(code) is not None)


def test_copies_and_what_is_loaded_and_refitted(tmp_path):
    for config, wanted in ((None, True), (octavo.OctavoConfig(codebook="dynamic"), False)):
        weight = octavo.OctavoTensor.from_float(torch.randn(32, 64), config)
        layer = torch.nn.Linear(64, 32, bias=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        layer.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True), assign=True)
        found = [
            weight,
            layer.weight,
            copy.deepcopy(weight),
            weight.clone(),
            weight.half(),
            weight.T,
            weight[3:7],
        ]
        assert [kinds.is_segments(one.code) for one in found] == [wanted] * len(found)
        weight.mul_(1.37)
        assert kinds.is_segments(weight.code) == wanted


def test_memory_that_is_used_again_is_other_memory(looked):
    """The caching allocators give freed memory to the next tensor of its size, at the same address."""
    answers = []
    for turn in range(40):
        code = lines() if turn % 2 else codebook.dynamic()
        answers.append(kinds.is_segments(code) == bool(turn % 2))
        del code
        gc.collect()
    assert all(answers) and len(looked) == 40
    assert len(kinds._known) < 40


def test_storage_that_is_freed_and_filled_again_keeps_its_kind(looked):
    """As FSDP2 does with what it gathers: the storage stays, its memory does not, and no version is counted."""
    code = torch.stack([lines(), codebook.dynamic()])
    assert [kinds.is_segments(one) for one in code] == [True, False]
    values, size = code.clone(), code.untyped_storage().nbytes()
    with torch.autograd._unsafe_preserve_version_counter(code):
        code.untyped_storage().resize_(0)
        code.untyped_storage().resize_(size)
        code.copy_(values)
    assert [kinds.is_segments(one) for one in code] == [True, False]
    assert len(looked) == 2


def test_a_copy_takes_the_answer_along(looked):
    old = torch.stack([lines(), codebook.dynamic()])
    new = old.clone()
    kinds.carry(old, new)
    looked.clear()
    assert [kinds.is_segments(one) for one in new] == [True, False] and not looked
    single = lines().clone()
    kinds.carry(lines(), single)
    looked.clear()
    assert kinds.is_segments(single) and not looked


def test_nothing_is_read_back_while_a_graph_is_captured(monkeypatch, looked):
    class OnGPU:
        """Stands for a codebook on a GPU."""

        is_cuda, _version = True, 0

        def __init__(self):
            self.code = lines()

        def __getattr__(self, name):
            return getattr(self.code, name)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    code = OnGPU()
    assert not kinds.is_segments(code) and not looked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kinds.is_segments(code) and len(looked) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kinds.is_segments(code)
