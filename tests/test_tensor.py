"""OctavoTensor passes for the float weight it stands for: shapes, types, devices, slices, copies, files."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import octavo
from octavo import OctavoConfig, OctavoTensor

from .conftest import brute_dequantize
from .models.weights import check_view, make


def same_parts(one: OctavoTensor, other: OctavoTensor) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("qdata", "absmax", "code"))


# --- what it is


def test_it_looks_like_the_weight(device):
    weight = torch.randn(16, 128, device=device, dtype=torch.bfloat16)
    t = OctavoTensor.from_float(weight)
    assert isinstance(t, torch.Tensor)
    assert t.shape == weight.shape and t.dtype == weight.dtype and t.device == weight.device
    assert t.stride() == weight.stride() and t.numel() == weight.numel() and t.is_contiguous()
    assert t.is_floating_point() and not t.requires_grad and t.is_leaf
    assert t.qdata.dtype == torch.uint8 and t.absmax.dtype == torch.float16 and t.code.dtype == torch.float32
    assert t.nbytes == t.nbytes_stored == 16 * 128 + 16 * 2 * 2 + 1024
    assert t.numel() * t.element_size() == 16 * 128  # what transformers' get_memory_footprint counts
    assert "OctavoTensor(shape=(16, 128), dtype=torch.bfloat16" in repr(t) and "transposed" in repr(t.T)


@pytest.mark.parametrize("shape", [(5, 100), (3, 5, 100), (2, 3, 5, 70)])
@pytest.mark.parametrize("transposed", [False, True])
def test_dequantize_is_the_format(shape, transposed, device):
    weight = torch.randn(shape, device=device)
    t = OctavoTensor.from_float(weight, transposed=transposed)
    assert t.shape == weight.shape
    found = t.dequantize().cpu()
    stored = found.mT if transposed else found
    for index in itertools.product(*(range(n) for n in shape[:-2])):
        exact = brute_dequantize(t.qdata[index], t.absmax[index], t.code[index], t.block_size)
        assert torch.equal(stored[index], exact.float())
    assert (found - weight.cpu()).norm() / weight.norm().cpu() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_dequantize_to_a_type(dtype):
    t = make(8, 64)
    assert torch.equal(t.dequantize(dtype), t.dequantize(torch.float32).to(dtype))


def test_each_matrix_of_a_stack_is_quantized_by_itself():
    weight = torch.stack([torch.randn(8, 64), torch.rand(8, 64) * 100])
    t = OctavoTensor.from_float(weight)
    for index in range(2):
        alone = OctavoTensor.from_float(weight[index])
        assert torch.equal(t.qdata[index], alone.qdata) and torch.equal(t.code[index], alone.code)


def test_one_type_of_scales_for_a_stack():
    weight = torch.stack([torch.randn(8, 64), torch.randn(8, 64) * 1e-8])
    assert OctavoTensor.from_float(weight).absmax.dtype == torch.float32
    assert OctavoTensor.from_float(weight[:1]).absmax.dtype == torch.float16


@pytest.mark.parametrize(
    ("config", "block_size", "scales"),
    [
        (OctavoConfig(), 64, torch.float16),
        (OctavoConfig(block_size=32), 32, torch.float16),
        (OctavoConfig(scales="float32"), 64, torch.float32),
        (OctavoConfig(codebook="dynamic"), 128, torch.float32),
        (OctavoConfig(codebook="dynamic", block_size=64), 64, torch.float32),
    ],
)
def test_from_float_follows_the_config(config, block_size, scales):
    t = make(6, 384, config=config)
    assert (t.block_size, t.absmax.dtype) == (block_size, scales)
    assert t.absmax.shape == (6, 384 // block_size)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((4, 64), torch.nan), "layer.weight.*NaN"),
        (torch.tensor([[1.0, torch.inf]]), "layer.weight.*NaN or infinity.*skip"),
        (torch.zeros(8), r"layer.weight.*matrix.*\(8,\)"),
        (torch.zeros(4, 4, dtype=torch.int64), "layer.weight.*floating-point"),
        (torch.zeros(0, 4, 4), "layer.weight is empty"),
    ],
)
def test_errors_name_the_weight(weight, message):
    with pytest.raises(ValueError, match=message):
        OctavoTensor.from_float(weight, name="layer.weight")


def test_weights_beyond_float16_scales():
    huge = torch.full((4, 64), 1e6)
    assert OctavoTensor.from_float(huge).absmax.dtype == torch.float32
    with pytest.raises(ValueError, match=r"big.*65504.*scales='auto'"):
        OctavoTensor.from_float(huge, OctavoConfig(scales="float16"), name="big")


def test_from_packed_checks_its_parts():
    from octavo.quantizer import Packed

    t = make(8, 128)
    for parts, message in [
        ((t.qdata, t.absmax[:4], t.code, 64), r"shape of absmax.*\(8, 2\).*\(4, 2\)"),
        ((t.qdata, t.absmax, t.code[:16], 64), "not one parameter"),
        ((t.qdata.float(), t.absmax, t.code, 64), "type of qdata"),
        ((t.qdata, t.absmax, t.code, 32), "blocks of 32"),
    ]:
        with pytest.raises(ValueError, match=message):
            OctavoTensor.from_packed(Packed(*parts), torch.float32)


def test_a_weight_stored_transposed_is_contiguous_as_the_float_one_was():
    weight = torch.randn(3, 64, 100)
    t = OctavoTensor.from_float(weight, transposed=True)
    assert t.stride() == weight.stride() and t.is_contiguous()


# --- gradients


def test_asking_for_its_gradient_says_what_to_do():
    t = make(8, 64)
    layer = nn.Linear(64, 8)
    layer.weight = nn.Parameter(t, requires_grad=False)

    def assign():
        t.requires_grad = True

    for ask in (t.requires_grad_, assign, lambda: layer.requires_grad_(True), lambda: t.requires_grad_(True)):
        with pytest.raises(RuntimeError, match=r"frozen.*LoraConfig.*skip="):
            ask()
    assert not layer.weight.requires_grad
    layer.requires_grad_(False)
    t.requires_grad = False


def test_a_parameter_of_it_is_frozen():
    parameter = nn.Parameter(make(8, 64))
    assert isinstance(parameter, nn.Parameter) and isinstance(parameter, OctavoTensor)
    assert not parameter.requires_grad


# --- aliases, copies, types, devices


@pytest.mark.usefixtures("no_fallbacks")
def test_detach_and_data_share_storage():
    t = make(8, 64)
    for alias in (t.detach(), t.data, nn.Parameter(t, requires_grad=False), t[:], t.view(8, 64)):
        check_view(alias, t.dequantize())
        assert alias.qdata.data_ptr() == t.qdata.data_ptr() and alias.absmax.data_ptr() == t.absmax.data_ptr()


@pytest.mark.usefixtures("no_fallbacks")
@pytest.mark.parametrize(
    "make_copy", [torch.clone, copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_copies(make_copy):
    t = make(8, 100).T.to(torch.bfloat16)
    other = make_copy(t)
    assert (
        same_parts(t, other) and other.dtype == t.dtype and other.transposed and other.codebook == t.codebook
    )
    if make_copy is not copy.copy:
        assert other.qdata.data_ptr() != t.qdata.data_ptr()


def test_deepcopy_of_a_module_keeps_ties_and_parameters():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight = nn.Parameter(make(64, 64), requires_grad=False)
    other = copy.deepcopy(model)
    assert other[0].weight is other[1].weight and other[0].weight is not model[0].weight
    assert isinstance(other[0].weight, nn.Parameter)
    assert other[0].weight.qdata.data_ptr() != model[0].weight.qdata.data_ptr()
    assert same_parts(other[0].weight, model[0].weight)


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: nn.Parameter(t, requires_grad=False), lambda t: t.T.half()]
)
def test_torch_save_and_load_with_weights_only(wrap):
    t = wrap(make(8, 100))
    file = io.BytesIO()
    torch.save({"weight": t}, file)
    file.seek(0)
    back = torch.load(file, weights_only=True)["weight"]
    assert isinstance(back, OctavoTensor) and same_parts(t, back)
    assert (back.dtype, back.transposed, back.block_size, back.codebook) == (
        t.dtype,
        t.transposed,
        64,
        "fitted",
    )
    assert isinstance(back, nn.Parameter) == isinstance(t, nn.Parameter)


@pytest.mark.usefixtures("no_fallbacks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_type_only_changes_what_is_computed_in(dtype):
    t = make(8, 64)
    other = t.to(dtype)
    assert other.dtype == dtype and same_parts(t, other)
    assert other.absmax.dtype == torch.float16 and other.code.dtype == torch.float32
    assert t.to(torch.float32) is t and torch.equal(other.float().dequantize(), t.dequantize())
    assert torch.equal(other.dequantize(), t.dequantize().to(dtype))


@pytest.mark.usefixtures("no_fallbacks")
@pytest.mark.parametrize("name", ["half", "bfloat16", "double"])
def test_modules_change_type(name):
    layer = nn.Linear(64, 8)
    layer.weight = nn.Parameter(make(8, 64), requires_grad=False)
    parts = layer.weight.detach().clone()
    getattr(layer, name)()
    assert layer.weight.dtype == layer.bias.dtype != torch.float32
    assert isinstance(layer.weight, nn.Parameter) and same_parts(layer.weight, parts)
    assert layer.float().weight.dtype == torch.float32 and same_parts(layer.weight, parts)


def test_tied_weights_stay_tied_through_half():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight = nn.Parameter(make(64, 64), requires_grad=False)
    model.half()
    assert model[0].weight is model[1].weight and model[0].weight.dtype == torch.float16


def test_devices(device):
    t = make(8, 64)
    moved = t.to(device)
    assert moved.device.type == device.type and moved.qdata.device.type == device.type
    assert same_parts(t, moved.cpu())
    meta = t.to("meta", torch.bfloat16)
    assert meta.is_meta and meta.qdata.is_meta and meta.dtype == torch.bfloat16 and meta.shape == t.shape
    assert torch.nn.functional.linear(
        torch.empty(3, 64, device="meta", dtype=torch.bfloat16), meta
    ).shape == (3, 8)
    layer = nn.Linear(64, 8, bias=False)
    layer.weight = nn.Parameter(t, requires_grad=False)
    assert layer.to(device).weight.device.type == device.type
    assert layer.to("meta").weight.is_meta


# --- fall-backs and new tensors


def test_unknown_operations_decode_and_are_counted():
    t = make(8, 64)
    dense = t.dequantize()
    octavo.reset_fallbacks()
    assert torch.equal(torch.exp(t), dense.exp())
    assert torch.equal(t * 2 + t, dense * 2 + dense)
    assert t.norm() == dense.norm() and torch.equal(torch.cat([t, t]), torch.cat([dense, dense]))
    counted = octavo.fallbacks()
    assert counted["aten.exp.default"] == 1 and counted["aten.cat.default"] == 1
    assert list(counted.values()) == sorted(counted.values(), reverse=True)
    octavo.reset_fallbacks()
    assert octavo.fallbacks() == {}


def test_numpy_and_python_values():
    t = make(2, 64)
    assert (t.numpy() == t.dequantize().numpy()).all() and t.tolist() == t.dequantize().tolist()
    assert t[0, 3].item() == t.dequantize()[0, 3].item()


@pytest.mark.parametrize(
    "create",
    [
        torch.zeros_like,
        torch.ones_like,
        torch.empty_like,
        torch.rand_like,
        lambda t: torch.full_like(t, 2.0),
        lambda t: t.new_zeros(3, 64),
        lambda t: t.new_zeros(t.shape),
        lambda t: t.new_empty(5),
        lambda t: t.new_ones(5),
        lambda t: t.new_full((5,), 2.0),
        lambda t: t.new_tensor([1.0]),
    ],
)
def test_new_tensors_are_plain_floats(create):
    found = create(make(8, 64, dtype=torch.bfloat16))
    assert type(found) is torch.Tensor and found.dtype == torch.bfloat16
    assert create(make(8, 64).to("meta")).is_meta


def test_state_dict_round_trip():
    def module():
        layer = nn.Linear(64, 8)
        layer.weight = nn.Parameter(make(8, 64), requires_grad=False)
        return layer

    one, other = module(), module()
    assert not same_parts(one.weight, other.weight)
    state = one.state_dict()
    assert isinstance(state["weight"], OctavoTensor)
    alias = other.weight.data
    other.load_state_dict(state, strict=True)
    assert same_parts(one.weight, other.weight) and same_parts(alias, one.weight)
    other = module()
    other.load_state_dict(state, strict=True, assign=True)
    assert other.weight.qdata.data_ptr() == one.weight.qdata.data_ptr()
    assert isinstance(other.weight, nn.Parameter) and not other.weight.requires_grad
    plain = torch.randn(8, 64)
    other = module()
    other.load_state_dict({"weight": plain, "bias": torch.zeros(8)})
    assert isinstance(other.weight, OctavoTensor)
    assert same_parts(other.weight, OctavoTensor.from_float(plain))
    floats = nn.Linear(64, 8)
    floats.load_state_dict(state)
    assert torch.equal(floats.weight, one.weight.dequantize())


def test_flatten_and_unflatten():
    t = make(8, 100, config=OctavoConfig(codebook="dynamic")).T.half()
    names, context = t.__tensor_flatten__()
    back = OctavoTensor.__tensor_unflatten__({n: getattr(t, n) for n in names}, context, t.shape, t.stride())
    assert same_parts(t, back) and back.stride() == t.stride()
    assert (back.dtype, back.transposed, back.codebook) == (torch.float16, True, "dynamic")
