"""Measuring models: texts, predictions in a file, a model against its base."""

import gc
import json
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

import octavo
from octavo.evaluation import evaluate as module
from octavo.evaluation.divergence import token_divergence
from octavo.evaluation.evaluate import evaluate, measure
from octavo.evaluation.logits import LogitsReader
from octavo.evaluation.scoring import choose_window, scored, token_nll, windows
from octavo.evaluation.texts import Text, Tokens, read_texts, tokenize

from .models import causal, config
from .models.published import tiny_gptj
from .models.tokenizers import word_tokenizer

WORDS = [f"w{i}" for i in range(300)]


@pytest.fixture(autouse=True)
def _one_thread(_reproducible):
    # Models so small that a second thread is only waited for.
    torch.set_num_threads(1)


def tokens_of(length, seed=1, name="a text"):
    ids = torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed))
    return Tokens(name, ids, words=length, bytes=3 * length)


def tiny_llama(vocabulary=2000, seed=0):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    return causal("llama", seed, vocab_size=vocabulary, tie_word_embeddings=True, **sizes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain model in a folder, the same quantized, and a text."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = tiny_gptj()
    model.save_pretrained(folder / "plain")
    octavo.quantize_model(model, octavo.OctavoConfig()).save_pretrained(folder / "eight")
    for name in ("plain", "eight"):
        word_tokenizer(WORDS).save_pretrained(folder / name)
    order = torch.randint(0, 300, (1500,), generator=torch.Generator().manual_seed(2))
    (folder / "text.txt").write_text(" ".join(WORDS[i] for i in order), encoding="utf-8")
    return folder


def brute_force(model, ids, window, stride):
    """log-probabilities of every token but the first, one window at a time: float64 [tokens - 1, vocabulary]."""
    rows = []
    for start, stop, first in windows(len(ids), window, stride):
        with torch.no_grad():
            logits = model(ids[None, start:stop]).logits[0].double().log_softmax(-1)
        rows += [logits[position - 1 - start] for position in range(first, stop)]
    return torch.stack(rows)


@pytest.mark.parametrize("make", [tiny_gptj, tiny_llama])
def test_what_is_streamed_equals_brute_force_whatever_the_batch(make):
    model, ids = make(), tokens_of(131).ids
    expected = brute_force(model, ids, 32, 12)
    for batch_size in (1, 3, None):
        parts = list(scored(model, ids, 32, 12, batch_size, hidden_states=True))
        assert [part.first for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert all(part.logits.shape[0] == part.stop - part.first for part in parts)
        found = torch.cat([part.logits for part in parts]).double().log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        states = torch.cat([part.hidden_states for part in parts])
        again = model.get_output_embeddings()(states).double().log_softmax(-1)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


def test_only_what_is_scored_is_computed(monkeypatch):
    model, seen = tiny_llama(), []
    forward = type(model).forward

    def watched(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        seen.append(tuple(out.logits.shape[:2]))
        return out

    monkeypatch.setattr(type(model), "forward", watched)
    model.forward = watched.__get__(model)
    model.forward.__func__.__wrapped__ = forward
    list(scored(model, tokens_of(100).ids, 32, 8, 4))
    assert max(rows for _, rows in seen) == 31 and {rows for _, rows in seen[1:-1]} == {8}


def test_divergence_equals_torch_and_scipy():
    base, ours = torch.randn(40, 97) * 3, torch.randn(40, 97) * 3
    kl, agreed = token_divergence(base, ours)
    expected = torch.nn.functional.kl_div(
        ours.double().log_softmax(-1), base.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(agreed, base.argmax(-1) == ours.argmax(-1))
    special = pytest.importorskip("scipy.special")
    theirs = special.rel_entr(base.double().softmax(-1).numpy(), ours.double().softmax(-1).numpy()).sum(-1)
    torch.testing.assert_close(kl, torch.from_numpy(theirs), rtol=1e-9, atol=1e-12)


def test_a_token_ruled_out_by_the_base_adds_nothing():
    base, ours = torch.randn(3, 10), torch.randn(3, 10)
    base[:, 4] = ours[:, 4] = -math.inf
    kl, _ = token_divergence(base, ours)
    rest = [i for i in range(10) if i != 4]
    torch.testing.assert_close(kl, token_divergence(base[:, rest], ours[:, rest])[0])


def test_measured_against_saved_predictions_equals_both_in_memory(tmp_path):
    plain, eight = tiny_gptj(), octavo.quantize_model(tiny_gptj(), octavo.OctavoConfig())
    texts = [tokens_of(131), tokens_of(70, seed=5, name="another")]
    first = measure(plain, texts, 32, 12, name="plain", save=tmp_path / "base.logits")
    base = LogitsReader(tmp_path / "base.logits")
    torch.testing.assert_close(base.nll, first.nll, rtol=0, atol=0)
    found = measure(eight, texts, 32, 12, name="eight", base=base, batch_size=2)
    theirs, ours = (torch.cat([brute_force(m, t.ids, 32, 12) for t in texts]) for m in (plain, eight))
    targets = torch.cat([t.ids[1:] for t in texts])
    torch.testing.assert_close(found.nll, -ours[range(199), targets], rtol=1e-5, atol=1e-5)
    expected = (theirs.exp() * (theirs - ours)).sum(-1)
    torch.testing.assert_close(found.kl, expected, rtol=1e-3, atol=1e-9)
    assert torch.equal(found.agreed, theirs.argmax(-1) == ours.argmax(-1))
    compared = module.compare_with(found, base)
    assert compared.base.perplexity == pytest.approx(first.perplexity.perplexity)
    assert compared.difference.mean == pytest.approx((found.nll - first.nll).mean().item())
    assert compared.divergence.kl_max == pytest.approx(expected.max().item(), rel=1e-3)
    assert sum(found.sizes) == 199 == found.perplexity.tokens


@pytest.mark.parametrize("make", [tiny_gptj, tiny_llama])
def test_a_model_is_indistinguishable_from_its_own_predictions(tmp_path, make):
    text = tokens_of(400)
    measure(make(), [text], 32, 12, save=tmp_path / "p")
    base = LogitsReader(tmp_path / "p")
    compared = module.compare_with(measure(make(), [text], 32, 12, base=base), base)
    assert compared.verdict == "indistinguishable" and compared.divergence.top1_agreement == 1
    assert abs(compared.difference.mean) < 1e-6 and compared.divergence.kl_max < 1e-9


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("large vocabulary", "states"), ("bent logits", "logits"), ("small", "logits"), ("8-bit", "states")],
)
def test_a_file_of_predictions_is_compact_and_exact_in_float32(tmp_path, kind, kept):
    # Fewer entries in the vocabulary than numbers in a state.
    model = tiny_llama(20 if kind == "small" else 2000)
    if kind == "8-bit":
        octavo.quantize_model(model, octavo.OctavoConfig())
    if kind == "bent logits":
        forward = model.forward

        def bent(input_ids=None, use_cache=None, logits_to_keep=0):
            out = forward(input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)
            out.logits = 3 * torch.tanh(out.logits / 3)
            return out

        model.forward = bent
    text = Tokens("a text", tokens_of(240).ids % 20, 240, 900)
    path = tmp_path / "predictions"
    measure(model, [text], 64, 32, name="tiny", save=path)
    assert kept in load_file(path) and not (tmp_path / "predictions.partial").exists()
    expected = torch.cat([part.logits for part in scored(model, text.ids, 64, 32)])
    found = LogitsReader(path).rows(0, 239)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    whole = expected.numel() * 4
    if kept == "states":
        assert path.stat().st_size < 0.2 * whole
    else:
        assert whole < path.stat().st_size < whole + 4096


def test_bfloat16_predictions_are_kept_as_they_were(tmp_path):
    model = tiny_llama().bfloat16()
    text = tokens_of(100)
    measure(model, [text], 64, 32, save=tmp_path / "p")
    expected = torch.cat([part.logits for part in scored(model, text.ids, 64, 32)])
    found = LogitsReader(tmp_path / "p").rows(0, 99)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


def test_predictions_must_be_of_the_same_tokens_windows_and_vocabulary(tmp_path):
    path = tmp_path / "p"
    measure(tiny_gptj(), [tokens_of(100)], 32, 16, save=path)
    with pytest.raises(ValueError, match="other tokens"):
        measure(tiny_gptj(), [tokens_of(100, seed=2)], 32, 16, base=LogitsReader(path))
    with pytest.raises(ValueError, match="--window 32 --stride 16"):
        measure(tiny_gptj(), [tokens_of(100)], 32, 8, base=LogitsReader(path))
    with pytest.raises(ValueError, match="300 tokens in its vocabulary, found 2000"):
        measure(tiny_llama(), [tokens_of(100)], 32, 16, base=LogitsReader(path))


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_other(path):
    path.write_bytes(b"not a safetensors file at all, only words")


def damage_tensors(**changes):
    def damage(path):
        tensors = load_file(path)
        for name, change in changes.items():
            tensors[name] = change(tensors.get(name))
        save_file({name: value for name, value in tensors.items() if value is not None}, path)

    return damage


def about(**changes):
    def change(tensor):
        found = {**json.loads(tensor.numpy().tobytes()), **changes}
        return torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "not a whole safetensors file"),
        (damage_other, "not a whole safetensors file"),
        (damage_tensors(about=lambda _: None), "holds no saved logits"),
        (damage_tensors(about=about(format="other")), "holds no saved logits"),
        (damage_tensors(about=about(version=9)), "format version 1, found 9"),
        (damage_tensors(about=about(texts=[{"name": "x"}])), "incomplete"),
        (damage_tensors(about=about(texts=3)), "incomplete"),
        (damage_tensors(about=about(vocabulary=10**9)), "do not fit together"),
        (damage_tensors(about=about(vocabulary="many")), "incomplete"),
        (damage_tensors(about=lambda t: torch.full_like(t, 255)), "holds no saved logits"),
        (damage_tensors(states=lambda t: t[:-1].contiguous()), "do not fit together"),
        (damage_tensors(head=lambda t: t.int()), "do not fit together"),
        (damage_tensors(nll=lambda _: None), "do not fit together"),
        (damage_tensors(states=lambda t: t.flip(0).contiguous()), "disagree"),
        (damage_tensors(head=lambda t: t * torch.nan), "disagree"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, damage, message):
    path = tmp_path / "p"
    text = tokens_of(100)
    measure(tiny_llama(), [text], 32, 16, save=path)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        measure(tiny_llama(), [text], 32, 16, base=LogitsReader(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="gives token 299, the model knows 100"):
        measure(tiny_llama(100), [Tokens("a text", torch.arange(300), 300, 900)], 32, 16)


def test_an_interrupted_run_leaves_no_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "p"
    path.write_text("old")

    def stop(name, done, total):
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tiny_gptj(), [tokens_of(100)], 32, 16, save=path, progress=stop)
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["p"]


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(OSError, match="free on the disk"):
        measure(tiny_gptj(), [tokens_of(100)], 32, 16, save=tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_logits_that_are_no_numbers_are_an_error():
    model = tiny_gptj()
    with torch.no_grad():
        model.transformer.h[1].mlp.fc_in.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        measure(model, [tokens_of(40)], 32, 16, name="broken")


def test_evaluate_loads_one_model_at_a_time_and_plain_ones_plain(folders, monkeypatch):
    alive, order = weakref.WeakSet(), []

    def watched(src, *arguments):
        gc.collect()
        order.append((str(src), len(alive)))
        model = load(src, *arguments)
        alive.add(model)
        return model

    load = module.load_as_it_is
    monkeypatch.setattr(module, "load_as_it_is", watched)
    found = evaluate(folders / "eight", [str(folders / "text.txt")], against=folders / "plain", window=64)
    assert order == [(str(folders / "plain"), 0), (str(folders / "eight"), 0)]
    base = evaluate(folders / "plain", [str(folders / "text.txt")], window=64)
    assert base.perplexity == pytest.approx(found.comparison.base.perplexity, rel=1e-9)
    assert base.comparison is None and base.bits_per_weight == 32 and 8 < found.bits_per_weight < 10
    # Plain is plain: the same as transformers' own model, not a quantized one.
    expected = brute_force(tiny_gptj(), base.measured.tokens[0].ids, 64, 32)
    targets = base.measured.tokens[0].ids[1:]
    assert base.measured.nll.sum().item() == pytest.approx(
        -expected[range(1499), targets].sum().item(), rel=1e-6
    )


def test_evaluate_from_a_saved_file_equals_evaluate_against(folders, tmp_path):
    text = [str(folders / "text.txt")]
    direct = evaluate(
        folders / "eight", text, against=folders / "plain", window=48, stride=20, limit_tokens=900
    )
    evaluate(folders / "plain", text, save_logits=tmp_path / "p", window=48, stride=20, limit_tokens=900)
    later = evaluate(folders / "eight", text, logits=tmp_path / "p", limit_tokens=900)
    ours, theirs = direct.to_dict(), later.to_dict()
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert ours["tokens"] == 899 and ours["words"] == 900
    for key in ("perplexity", "kl_mean", "kl_p99", "kl_max", "top1_agreement", "p_value", "bits_per_byte"):
        assert isinstance(ours[key], float) and math.isfinite(ours[key])
    low, high = ours["difference_interval"]
    assert low <= ours["difference"] <= high
    assert math.exp(ours["difference"]) * ours["base_perplexity"] == pytest.approx(ours["perplexity"])


def test_a_broken_model_is_told_from_its_base_and_a_good_one_is_not(folders, tmp_path):
    text = [str(folders / "text.txt")]
    good = evaluate(folders / "eight", text, against=folders / "plain").comparison
    assert good.verdict == "indistinguishable" and good.p_value > 0.05
    assert "no more than chance" in good.sentence and "may still be there" in good.sentence
    model = tiny_gptj()
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)
    model.save_pretrained(tmp_path / "worse")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "worse")
    bad = evaluate(tmp_path / "worse", text, against=folders / "plain").comparison
    assert bad.verdict == "worse" and bad.p_value < 0.01 and bad.kl_mean > 10 * good.kl_mean
    back = evaluate(folders / "plain", text, against=tmp_path / "worse").comparison
    assert back.verdict == "better" and back.difference.mean == pytest.approx(-bad.difference.mean, rel=1e-6)
    short = evaluate(folders / "eight", text, against=folders / "plain", limit_tokens=40).comparison
    assert short.verdict == "undecided" and "too short" in short.sentence


def test_what_is_no_causal_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no causal language model"):
        measure(BertForMaskedLM(config("bert", vocab_size=300)).eval(), [tokens_of(40)], 32, 16)


def test_window_and_stride_are_chosen_and_checked():
    assert choose_window(tiny_gptj()) == (64, 32)
    assert choose_window(tiny_gptj(), 20) == (20, 10)
    assert choose_window(tiny_gptj(), 20, 19) == (20, 19)
    with pytest.raises(ValueError, match="context is 64 tokens, found 65"):
        choose_window(tiny_gptj(), 65)
    with pytest.raises(ValueError, match="stride"):
        choose_window(tiny_gptj(), 20, 20)


def test_texts_are_read_and_checked(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("w1 w2", encoding="utf-8-sig")
    (tmp_path / "b").write_text("w3 ñandú", encoding="utf-8")
    texts = read_texts([str(tmp_path / "a.txt"), str(tmp_path / "b")])
    assert [each.text for each in texts] == ["w1 w2", "w3 ñandú"]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("ñ".encode("latin-1"))
    for name, message in (
        ("empty.txt", "blank lines"),
        ("latin.txt", "UTF-8"),
        ("", "folder"),
        ("no.txt", "no such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            read_texts([str(tmp_path / name)])
    # Offline, as tests are: one clear line.
    with pytest.raises(ValueError, match=r"'Salesforce/wikitext'.*wikitext-2-raw-v1") as caught:
        read_texts(["wikitext-2"])
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_is_joined_as_transformers_does(monkeypatch):
    import datasets

    asked = []

    def fake(name, configuration, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict(
            {"text": ["", " = Title = \n", " Words . \n"], "page": ["x", "y", "z"]}
        )

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert read_texts(["wikitext-2"])[0].text == "\n\n = Title = \n\n\n Words . \n"
    assert read_texts(["some/set"])[0].name == "some/set"
    assert read_texts(["some/set:en:train:page"])[0].text == "x\n\ny\n\nz"
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("some/set", None, "test"),
        ("some/set", "en", "train"),
    ]
    with pytest.raises(ValueError, match="column 'body', found text, page"):
        read_texts(["some/set:en:train:body"])


def test_the_limit_counts_tokens_over_all_texts_and_words_of_what_is_kept():
    tokenizer = word_tokenizer(WORDS)
    texts = [Text("a", "w1 w2 w3"), Text("b", "w4 w5 w6 w7"), Text("c", "w8 w9")]
    found = tokenize(texts, tokenizer, 5)
    assert [(t.name, t.ids.tolist(), t.words, t.bytes) for t in found] == [
        ("a", [1, 2, 3], 3, 8),
        ("b", [4, 5], 2, 5),
    ]
    assert [len(t.ids) for t in tokenize(texts, tokenizer)] == [3, 4, 2]
    with pytest.raises(ValueError, match="fewer than two tokens"):
        tokenize([Text("d", "w1")], tokenizer)


def test_likelihoods_do_not_depend_on_how_rows_are_cut(monkeypatch):
    logits, targets = torch.randn(37, 50), torch.randint(0, 50, (37,))
    whole = token_nll(logits, targets)
    monkeypatch.setattr("octavo.evaluation.scoring.CHUNK", 120)
    torch.testing.assert_close(token_nll(logits, targets), whole, rtol=0, atol=0)
    torch.testing.assert_close(
        whole, -logits.double().log_softmax(-1)[range(37), targets], rtol=1e-5, atol=1e-5
    )
