"""Decoding by a CUDA graph, where there is none: what a graph keeps and what it forgets is imitated on the CPU."""

from unittest import mock

import pytest
import torch
import transformers as tf
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import octavo
from octavo.integrations import cuda_graph
from octavo.integrations.cuda_graph import Graphs, decoding_by_graph, why_not

from .models.checkpoints import CONFIGS, build

READS_BACK = ("item", "_local_scalar_dense", "nonzero", "is_nonzero")


def refuse(*_):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")


class Recorder(TorchDispatchMode):
    """Notes every operation with the tensors that it takes and gives, as a graph notes kernels with their addresses."""

    def __init__(self):
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in READS_BACK:
            refuse()
        if function._schema.is_mutable:
            for tensor in pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        outputs = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, outputs))
        return outputs

    def replay(self):
        for function, args, kwargs, outputs in self.calls:
            found = function(*args, **kwargs)
            if function._schema.is_mutable:
                continue
            for old, new in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(found), strict=True):
                # Not of a view: it lies where it lay.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(step):
    """As `record_cuda`: nothing has happened afterwards."""
    recorder = Recorder()
    try:
        # Of a tensor on the CPU it reads memory, past all operations.
        with recorder, mock.patch.object(torch.Tensor, "tolist", refuse):
            outputs = step()
    finally:
        for tensor, value in recorder.before.values():
            tensor.copy_(value)
    return outputs, recorder.replay


def model_of(family):
    torch.manual_seed(0)
    return octavo.quantize_model(build(OTHERS.get(family) or CONFIGS[family]())).eval()


def generate(model, ids, **options):
    """`generate` by graphs, as on a GPU. → (tokens, the graphs)"""
    with (
        torch.inference_mode(),
        # On a CPU transformers does not compile, and does not ask for what would be.
        mock.patch.object(model, "_valid_auto_compile_criteria", lambda *args: True),
        decoding_by_graph(model, record) as graphs,
    ):
        found = model.generate(ids, **graphs.options, **OPTIONS, **options)
    return found, graphs


OPTIONS = {"max_new_tokens": 14, "min_new_tokens": 14, "pad_token_id": 0}
IDS = torch.tensor([[5, 9, 2, 7, 11]])
SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
}
OTHERS = {
    "qwen2": tf.Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=1, eos_token_id=2),
    "phi": tf.PhiConfig(**SMALL, intermediate_size=64, eos_token_id=2),
    "gpt_neox": tf.GPTNeoXConfig(**SMALL, intermediate_size=64, eos_token_id=2),
    "bloom": tf.BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2),
}
FAMILIES = ["llama", "llama-tied", "gpt2", "gptj", *OTHERS]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens(family):
    model = model_of(family)
    right = model.generate(IDS, do_sample=False, **OPTIONS)
    found, graphs = generate(model, IDS, do_sample=False)
    assert torch.equal(found, right)
    # Of 13 steps after the first token the first two are eager.
    assert graphs.replayed == 11, graphs.eager
    assert "get_compiled_call" not in vars(model)


def test_sampling_takes_the_same_numbers():
    model = model_of("llama")
    options = {"do_sample": True, "temperature": 1.3}
    torch.manual_seed(3)
    right = model.generate(IDS, **options, **OPTIONS)
    torch.manual_seed(3)
    assert torch.equal(generate(model, IDS, **options)[0], right)


def test_several_texts_of_different_lengths():
    model = model_of("llama")
    ids = torch.tensor([[0, 0, 5, 9, 2], [3, 8, 2, 7, 11]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    right = model.generate(ids, attention_mask=mask, do_sample=False, **OPTIONS)
    found, graphs = generate(model, ids, attention_mask=mask, do_sample=False)
    assert torch.equal(found, right) and graphs.replayed == 11


def test_what_is_kept_of_a_step_is_not_written_over():
    model = model_of("llama")
    options = {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    right = model.generate(IDS, **options, **OPTIONS)
    found, graphs = generate(model, IDS, **options)
    assert graphs.replayed == 11
    for ours, theirs in zip(found.logits, right.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    for ours, theirs in zip(found.hidden_states, right.hidden_states, strict=True):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_a_cache_that_is_put_elsewhere_is_recorded_anew():
    """Beam search puts new tensors into the cache at each step."""
    model = model_of("llama")
    right = model.generate(IDS, num_beams=3, do_sample=False, **OPTIONS)
    assert torch.equal(generate(model, IDS, num_beams=3, do_sample=False)[0], right)


def test_one_model_again_and_again():
    model = model_of("llama")
    for length in (9, 3, 14):
        ids = torch.arange(1, length + 1)[None]
        right = model.generate(ids, do_sample=False, **OPTIONS)
        assert torch.equal(generate(model, ids, do_sample=False)[0], right)


def test_a_model_that_reads_numbers_back_goes_on_eagerly(monkeypatch):
    model = model_of("llama")
    right = model.generate(IDS, do_sample=False, **OPTIONS)
    norm = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: norm(x) if x.sum().item() < 1e9 else x)
    found, graphs = generate(model, IDS, do_sample=False)
    assert torch.equal(found, right) and graphs.replayed == 0
    assert graphs.eager.startswith("CUDA error: operation not permitted") and "\n" not in graphs.eager


def test_a_position_that_python_keeps_is_noticed(monkeypatch):
    """A graph repeats the number that it was recorded with."""
    model = model_of("gpt2")
    embed, prepare, known = model.transformer.wpe.forward, model.prepare_inputs_for_generation, []

    def note(ids, **options):
        known.append(ids.shape[1])
        return prepare(ids, **options)

    monkeypatch.setattr(model, "prepare_inputs_for_generation", note)
    monkeypatch.setattr(
        model.transformer.wpe,
        "forward",
        lambda positions: embed(torch.arange(known[-1] - positions.shape[-1], known[-1])[None]),
    )
    right = model.generate(IDS, do_sample=False, **OPTIONS)
    found, graphs = generate(model, IDS, do_sample=False)
    assert graphs.eager.startswith("a replayed step was off by ") and graphs.replayed == 1
    assert torch.equal(found, right)


def test_why_not():
    assert why_not(model_of("llama")) == ""
    assert "experts" in why_not(model_of("mixtral"))
    model = model_of("llama")
    model.hf_device_map = {"": 0, "lm_head": 1}
    assert "several devices" in why_not(model)
    from transformers import MistralConfig, MistralForCausalLM

    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    for window, found in ((None, ""), (4, "sliding windows")):
        model = MistralForCausalLM(MistralConfig(**small, num_key_value_heads=1, sliding_window=window))
        assert found in why_not(model) and bool(found) == bool(why_not(model))


def test_a_wrong_graph_is_thrown_away():
    class Layer:
        keys = values = torch.zeros(1)
        cumulative_length = torch.zeros(1)

    class Cache:
        layers = (Layer(),)

    from transformers.modeling_outputs import CausalLMOutputWithPast

    def step(x, past_key_values):
        return CausalLMOutputWithPast(logits=x * 2.0)

    def wrong(call):
        outputs = call()
        return outputs, lambda: outputs.logits.fill_(7.0)

    graphs, cache = Graphs(step, wrong), Cache()
    found = [graphs(x=torch.full((2,), float(n)), past_key_values=cache).logits[0].item() for n in range(5)]
    assert found == [0.0, 2.0, 4.0, 6.0, 8.0] and "off by" in graphs.eager
    assert cuda_graph.TOLERANCE < 0.1
