"""`octavo bench`, and what it shares with the scripts in benchmarks/: turns, disturbed rounds, engines in their own processes."""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, BertModel
from typer.testing import CliRunner

import octavo
from benchmarks import conversion, cpu_report, page_cache
from octavo.bench import kernels, load, measure, models, turns
from octavo.bench.process import Worker, WorkerError
from octavo.bench.timing import alternate, ratios, spread
from octavo.cli import app
from octavo.cli.bench import _show

from .models import causal, config


def tiny_llama():
    return causal("llama", vocab_size=192, max_position_embeddings=64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a plain float32 model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """The same model in 8 bits."""
    folder = tmp_path_factory.mktemp("quantized")
    octavo.load(plain).save_pretrained(folder)
    return folder


def test_alternate_runs_each_function_once_a_round_in_turn():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = alternate(functions, rounds=3)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}


def test_alternate_stops_when_its_time_is_up_but_not_before_a_round():
    assert len(alternate({"slow": lambda: time.sleep(0.02)}, rounds=50, seconds=0.0)["slow"]) == 1


def test_alternate_waits_for_the_device_before_each_reading_of_the_clock():
    calls = []
    alternate({"f": lambda: calls.append("f")}, rounds=1, synchronize=lambda: calls.append("wait"))
    assert calls == ["f", "wait", "f", "wait"]


def test_spread_and_ratios():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert ratios([2.0, 6.0], [1.0, 2.0]) == {"median": 2.5, "low": 2.0, "high": 3.0}


def test_a_meter_tells_other_work_from_ours():
    """Two meters over the same time differ by what the process took that only one of them knows as ours."""
    code = "import time; end = time.perf_counter() + 60\nwhile time.perf_counter() < end: pass"
    busy = subprocess.Popen([sys.executable, "-c", code])
    try:
        stranger, owner = load.Meter(), load.Meter(busy.pid)
        process = psutil.Process(busy.pid)
        before, started = load.cpu_seconds(process), time.perf_counter()
        while load.cpu_seconds(process) - before < 0.4:
            time.sleep(0.05)
        with_it, without = stranger.since()["others"], owner.since()["others"]
        elapsed, took = time.perf_counter() - started, load.cpu_seconds(process) - before
    finally:
        busy.kill()
        busy.wait()
    assert with_it > without
    # Where nothing else runs, `without` is cut off at 0, and the difference is smaller by the counters' resolution.
    assert (with_it - without) * elapsed == pytest.approx(took, abs=0.15)


def test_a_busy_machine_is_said_to_be():
    cores = psutil.cpu_count()
    assert load.warning({"load_average": 3.0, "others": 0.01 * cores, "steal": 0.0}) is None
    said = load.warning({"load_average": 3.0, "others": 0.5 * cores, "steal": 0.1 * cores})
    assert "other work takes" in said and "load average 3.0" in said


def test_rounds_are_distrusted_for_other_work_steal_slow_memory_and_a_slow_clock():
    cores = psutil.cpu_count()
    found = {
        "others": [0.0, 0.2 * cores, 0.0, 0.0, 0.0],
        "steal": [0.0, 0.0, 0.2 * cores, 0.0, 0.0],
        "bandwidth": [40e9, 40e9, 40e9, 20e9, 40e9],
        "compute": [2e12, 2e12, 2e12, 2e12, 1.5e12],
    }
    assert turns.undisturbed(found) == [True, False, False, False, False]
    assert turns.undisturbed(found, {"bandwidth": 80e9, "compute": 2e12}) == [False] * 5
    unmeasured = {**found, "bandwidth": [0.0] * 5, "compute": [0.0] * 5}
    assert turns.undisturbed(unmeasured) == [True, False, False, True, True]
    assert turns.best_of(found, unmeasured) == {"bandwidth": 40e9, "compute": 2e12}


class Engine:
    """Stands for a worker: every answer takes `seconds`, without waiting."""

    pid = os.getpid()

    def __init__(self, name, seconds, asked):
        self.name, self.seconds, self.asked = name, seconds, asked

    def ask(self, method, tokens):
        self.asked.append((self.name, method, tokens))
        return self.seconds


def test_engines_take_turns_and_disturbed_rounds_are_made_up_for(monkeypatch):
    disturbances = [{"others": 9.0 * psutil.cpu_count(), "steal": 0.0}, *[{"others": 0.0, "steal": 0.0}] * 9]
    # Each round asks the meter twice: at its start and at its end.
    answers = iter([each for d in disturbances for each in ({}, d)])
    monkeypatch.setattr(load.Meter, "since", lambda self: next(answers))
    asked = []
    workers = {"octavo": Engine("octavo", 0.5, asked), "peer": Engine("peer", 2.0, asked)}
    found = turns.take_turns(workers, "decode", 8, rounds=2, extra=2, probes={"bandwidth": lambda: 1e9})
    assert [name for name, *_ in asked] == ["octavo", "peer"] * 4  # one to warm up, three rounds
    assert found["octavo"] == [16.0] * 3 and found["peer"] == [4.0] * 3
    assert turns.undisturbed(found) == [False, True, True]


def test_a_worker_answers_and_says_what_it_held():
    with Worker("collections:Counter", 1, a=2, b=3) as worker:
        assert worker.ask("total") == 5
        assert worker.ask("peak_memory") > 10 << 20
        if sys.platform == "linux":
            assert worker.ask("page_kinds")["all"] > 10 << 20
        assert worker.ready > 0
    assert worker.process.returncode == 0


def test_what_an_engine_raises_is_raised_here():
    with pytest.raises(ValueError, match="sigma must be non-negative"):
        Worker("statistics:NormalDist", 1, mu=0.0, sigma=-1.0)
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        Worker("fractions:Fraction", 1, numerator=1, denominator=0)
    with pytest.raises(WorkerError, match="ended with status 3"):
        Worker("os:_exit", 1, status=3)


def test_linear_measures_octavo_against_memory_and_peers(no_fallbacks):
    found = kernels.linear(192, 128, "cpu", rounds=3, stream_bytes=1 << 18)
    assert found["rounds"] == 3 and found["bytes"] == 192 * 128 + 192 * 2 * 2 + 256 * 4
    assert set(found["weights_per_second"]) == {"octavo", "bfloat16", "float32"}
    assert set(found["faster_by"]) == {"bfloat16", "float32"}
    for part in (found["share"], found["bandwidth"], *found["weights_per_second"].values()):
        assert 0 < part["low"] <= part["median"] <= part["high"]


def test_decode_goes_token_by_token_and_prefill_at_once():
    model, seen = tiny_llama(), []

    def step(model, ids, past):
        seen.append(ids.shape[1])
        return models.step(model, ids, past)

    assert models.decode(model, 5, None, step) > 0
    assert seen == [models.PROMPT, 1, 1, 1, 1, 1]
    seen.clear()
    assert models.prefill(model, 12, None, step) > 0
    assert seen == [12]


def test_an_engine_describes_its_model(quantized):
    about = models.Quantized(str(quantized), "cpu").describe()
    assert about["class"] == "LlamaForCausalLM" and about["dtype"] == "float32"
    assert about["context"] == 64
    count = Counter((rows, columns) for rows, columns, _, _, n in about["matrices"] for _ in range(n))
    assert count[128, 64] == 4 and count[64, 128] == 2 and count[192, 64] == 2
    weights = [rows * columns * n for rows, columns, _, _, n in about["matrices"]]
    assert weights == sorted(weights, reverse=True)


def test_a_model_says_which_way_its_codebooks_take(plain, tmp_path):
    for codebook, kind in (("fitted", "segments"), ("dynamic", "table")):
        config = octavo.OctavoConfig(codebook=codebook)
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(
            tmp_path / codebook
        )
        about = models.Quantized(str(tmp_path / codebook), "cpu").describe()
        assert {found for _, _, _, found, _ in about["matrices"]} == {kind}
        measured = kernels.linear(128, 64, "cpu", kind=kind, rounds=1, stream_bytes=1 << 16)
        assert measured["codebook"] == kind
        assert kernels.kind_of(kernels.random_weight(128, 64, 64, torch.device("cpu"), kind).code) == kind


def test_dense_weights_are_the_checkpoints_own_or_the_de_quantized_ones(plain, quantized):
    original = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    loaded = models.load_dense(str(plain), torch.device("cpu"), torch.float32)
    assert all(torch.equal(value, original[name]) for name, value in loaded.state_dict().items())
    octavos = octavo.load(quantized, dtype=torch.float32, device="cpu")
    dense = models.load_dense(str(quantized), torch.device("cpu"), torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    value = dense.get_parameter(name)
    assert type(value.data) is torch.Tensor
    assert torch.equal(value, octavos.get_parameter(name).dequantize())


def test_a_model_that_does_not_write_is_refused():

    model = BertModel(config("bert"))
    with pytest.raises(ValueError, match="BertModel does not continue text"):
        models.Engine(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "expected auto, cpu, cuda"),
        ({"device": "nonsense:x"}, "expected auto, cpu, cuda"),
        ({"device": "cuda:99"}, "this torch finds"),
        ({"dtype": "int4"}, "expected one of float32"),
        ({"model": "no/such-model"}, "no/such-model"),
    ],
)
def test_what_a_user_can_mend_is_an_error_that_says_so(options, message):
    with pytest.raises((ValueError, OSError), match=message):
        measure.measure(measure.Options(quick=True, **options))


def test_a_model_too_large_for_the_memory_is_left_out(monkeypatch):
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=1 << 30))
    assert measure._too_large(1 << 29, torch.device("cpu")) is None
    assert "2.0 GiB, and 1.0 GiB are free" in measure._too_large(2 << 30, torch.device("cpu"))


def test_a_short_context_shortens_what_is_measured():
    options = measure.Options(tokens=100, prefill=300)
    assert measure._lengths(64, options) == {"decode": 56, "prefill": 64}
    assert measure._lengths(None, options) == {"decode": 100, "prefill": 300}


@pytest.fixture
def measured(quantized, monkeypatch) -> dict:
    """A whole quick run on the tiny model."""
    monkeypatch.setitem(kernels.STREAM_BYTES, "cpu", 1 << 20)
    options = measure.Options(model=str(quantized), tokens=4, prefill=16, quick=True, device="cpu")
    return measure.measure(options, "a processor")


def test_a_whole_run_and_its_tables(measured, capsys):
    json.dumps(measured)
    assert measured["machine"]["kernels"] and measured["machine"]["device"] == "a processor"
    model = measured["model"]
    assert list(model["peers"]) == ["float32"] and model["fallbacks"] == {}
    assert model["tokens"] == {"decode": 4, "prefill": 16}
    for method in ("decode", "prefill"):
        found = model["peers"]["float32"][method]
        assert len(found["octavo"]) == len(found["peer"]) == len(found["undisturbed"]) >= 1
        assert min(found["octavo"]) > 0
    assert model["octavo"]["peak_bytes"] > 50 << 20 and model["octavo"]["ready_seconds"] > 0
    # The shape with most weights, and its block.
    assert [(k["rows"], k["columns"], k["block_size"]) for k in measured["kernels"]] == [(128, 64, 64)]
    _show(measured)
    shown = " ".join(capsys.readouterr().out.split())
    for expected in ("a processor", "128 x 64", "LlamaForCausalLM", "8 bits: ready after", "decode 4"):
        assert expected in shown


def test_a_model_without_a_peer_is_measured_alone(quantized, monkeypatch, capsys):
    monkeypatch.setitem(kernels.STREAM_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(measure, "_too_large", lambda needed, place: "it is too large")
    found = measure.measure(
        measure.Options(model=str(quantized), tokens=2, prefill=4, quick=True, device="cpu")
    )
    assert found["model"]["peers"] == {} and len(found["model"]["alone"]["decode"]["octavo"]) >= 1
    _show(found)
    assert "Left out: float32: it is too large." in " ".join(capsys.readouterr().out.split())


def test_the_command_explains_its_options():
    shown = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    for option in ("--device", "--threads", "--tokens", "--prefill", "--quick", "--kernels-only", "--json"):
        assert option in shown.output


@pytest.mark.slow
def test_the_command_measures_the_shipped_model():
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "bench", "--quick", "--tokens", "4", "--prefill", "16"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    for expected in ("16384 x 4096", "of the memory", "GPTJForCausalLM", "8 bits: ready after"):
        assert expected in done.stdout


def test_the_table_of_the_peers_is_of_undisturbed_rounds(tmp_path, capsys):
    def rounds(octavo, peer, others):
        quiet = {"steal": [0.0] * 3, "waiting": [0.0] * 3, "bandwidth": [30e9] * 3, "compute": [1e11] * 3}
        return {"octavo": octavo, "peer": peer, "others": others, **quiet}

    quiet, busy = 0.0, 1.0 * psutil.cpu_count()
    result = {
        "machine": {"processor": "p", "threads": 2},
        "shape": {"tiny": {}},
        "octavo": {"ready": 1.0, "peak_bytes": 1 << 30},
        "failed": {"broken": "why"},
        "missing": [],
        "peers": {
            "other": {
                "decode": rounds([20.0, 2.0, 22.0], [10.0, 7.0, 10.0], [quiet, busy, quiet]),
                "prefill": rounds([90.0] * 3, [30.0] * 3, [busy] * 3),
                "ready": 2.0,
                "peak_bytes": 2 << 30,
            }
        },
    }
    cpu_report.show_models(result, tmp_path)
    shown = capsys.readouterr().out
    assert "2.10 (2.00 to 2.20)" in shown and "2 of 3, 0 of 3" in shown
    assert "3.00 (3.00 to 3.00) !" in shown and "the ratio counts, not the speeds" in shown
    assert "failed: broken: why" in shown


def test_a_checkpoint_to_convert_has_the_size_asked_for_and_normal_weights(tmp_path):
    layers = conversion.layers_for("tiny", 0.004)
    folder = tmp_path / "source"
    size = conversion.write_checkpoint(folder, "tiny", layers)
    assert size == pytest.approx(0.004e9, rel=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_hidden_layers == layers
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert float(weight.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(weight.mean())) < 1e-3


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is asked for on Linux")
def test_the_page_cache_is_what_is_said(tmp_path):
    path = tmp_path / "file"
    content = os.urandom(5 << 20)
    path.write_bytes(content)
    page_cache.read([path])
    assert page_cache.cached_share([path]) == 1.0
    page_cache.in_huge_pages([path])
    assert page_cache.cached_share([path]) == 1.0
    assert path.read_bytes() == content


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_command_is_watched():
    code = "import time; held = bytearray(b'x') * (200 << 20); time.sleep(0.5)"
    found = conversion.watched([sys.executable, "-c", code])
    assert found["seconds"] >= 0.5
    assert 200 << 20 <= found["anonymous"] <= found["peak"] < 400 << 20
    with pytest.raises(RuntimeError, match="status 7"):
        conversion.watched([sys.executable, "-c", "raise SystemExit(7)"])


@pytest.mark.slow
def test_the_kernel_benchmark_runs_as_a_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu",
        "kernels",
        "--rows",
        "128",
        "--columns",
        "128",
        "--tokens",
        "1",
        "40",
    ]
    done = subprocess.run(
        [*command, "--rounds", "1", "--results", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # Titles are wrapped to the width of their tables.
    assert "of the memory's bandwidth" in " ".join(done.stdout.split())
    (written,) = tmp_path.glob("cpu-kernels-*.json")
    assert len(json.loads(written.read_text())["linear"]) == 6
