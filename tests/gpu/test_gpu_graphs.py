"""CUDA graphs, torch.compile and static caches on a GPU: no waiting, nothing that depends on the data."""

import pytest
import torch

import octavo
from octavo import codebook, ops
from octavo.ops import reference


def matrix(rows, columns, device, block=64):
    weight = torch.randn(rows, columns, device=device)
    code = codebook.dynamic().to(device)
    return (*reference.quantize(weight, code, block, torch.float16), code, block)


@pytest.mark.parametrize("tokens", [1, 8, 40, 300])
def test_operations_do_not_wait(tokens, device, no_waiting):
    torch.cuda.set_sync_debug_mode("default")
    packed = matrix(512, 1024, device)
    x = torch.randn(tokens, 1024, device=device).half()
    ids = torch.randint(0, 512, (tokens,), device=device)

    def run():
        ops.linear(x, *packed)
        ops.linear_transposed(x[:, :512], *packed)
        ops.embedding(ids, *packed, torch.float16)
        ops.dequantize(*packed, torch.float16)

    run()  # compiles and checks, which waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run()


@pytest.mark.parametrize("tokens", [1, 5, 20, 100, 200])
def test_captured_graphs_follow_their_inputs(tokens, device):
    packed = matrix(300, 2048, device)
    x = torch.randn(tokens, 2048, device=device).half()
    ids = torch.randint(0, 300, (tokens,), device=device)

    def run():
        return ops.linear(x, *packed), ops.embedding(ids, *packed, torch.float16)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        x.normal_()
        ids.random_(0, 300)
        for out in captured:
            out.fill_(float("nan"))
        graph.replay()
        for out, eager in zip(captured, run(), strict=True):
            assert torch.equal(out, eager)


def test_a_kernel_first_met_in_a_capture_warns(device, monkeypatch):
    from octavo.ops.gpu import choose, verify

    packed = matrix(64, 256, device)
    x = torch.randn(1, 256, device=device).half()
    ops.linear(torch.randn(200, 256, device=device).half(), *packed)  # cuBLAS is set up
    monkeypatch.setattr(verify, "_verdicts", {})
    monkeypatch.setattr(choose, "_products", {})
    monkeypatch.setattr(choose, "_bound", {})
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(RuntimeWarning, match="while a CUDA graph is captured"), torch.cuda.graph(graph):
        out = ops.linear(x, *packed)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.isfinite(out).all()
    assert not choose._products


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_as_one_graph(mode, device):
    weight = octavo.OctavoTensor.from_float(torch.randn(256, 512, device=device), dtype=torch.float16)
    layer = torch.nn.Linear(512, 256, device=device, dtype=torch.float16)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):
        x = torch.randn(4, 512, device=device).half()
        torch.testing.assert_close(compiled(x).clone(), layer(x))


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).to("cuda").eval()
    return octavo.quantize_model(model)


def test_static_cache_generates_the_same_tokens(model, device):
    prompt = torch.randint(3, 512, (1, 12), device=device)
    options = dict(
        max_new_tokens=20, min_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    eager = model.generate(prompt, **options)
    static = model.generate(prompt, cache_implementation="static", **options)
    same = (eager == static).float().mean().item()
    # Compiled code rounds elsewhere in other places; a random model's near-ties may then fall differently.
    assert same > 0.8, (eager, static)


def test_a_whole_decoding_step_is_captured(model, device):
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=64)
    ids = torch.randint(3, 512, (1, 8), device=device)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        token = torch.full((1, 1), 7, device=device)
        position = torch.full((1, 1), 8, device=device)

        def step():
            return model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits

        for _ in range(2):
            step()
            position.add_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.isfinite(logits).all()


def test_octavo_generate_decodes_by_a_graph(model, device):
    """As `octavo generate` does, without compiling; the same tokens as eagerly."""
    from octavo.integrations.cuda_graph import decoding_by_graph

    ids = torch.randint(3, model.config.vocab_size, (1, 7), device=device)
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
    with torch.inference_mode():
        # With the same cache: other kernels of attention round in other ways.
        right = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
        for _ in range(2):
            with decoding_by_graph(model) as graphs:
                found = model.generate(ids, **graphs.options, **options)
            assert graphs.eager == "" and graphs.replayed == 17
            assert torch.equal(found, right)


def test_a_step_that_waits_goes_on_eagerly(model, device, monkeypatch):
    """Recording it fails; what runs afterwards is in the right order and gives the same tokens."""
    from octavo.integrations.cuda_graph import decoding_by_graph

    ids = torch.randint(3, model.config.vocab_size, (1, 7), device=device)
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
    right = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: head(x) if x.sum().item() < 1e30 else x)
    stream = torch.cuda.current_stream()
    with decoding_by_graph(model) as graphs:
        found = model.generate(ids, **graphs.options, **options)
    assert graphs.eager and graphs.replayed == 0 and torch.cuda.current_stream() == stream
    assert torch.equal(found, right)
