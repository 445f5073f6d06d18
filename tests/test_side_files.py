"""Everything small in a model's folder that is no weights comes along, from folders and from the hub; nothing else does."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import octavo
from octavo.checkpoint import convert, open_source
from octavo.checkpoint.reading.side_files import choose_side_files

from .models.checkpoints import save

KEPT = [
    "README.md",
    "LICENSE",
    "generation_config.json",
    "tokenizer.json",
    "source.spm",
    "target.spm",
    "bpe.codes",
    "dict.txt",
    "vocab-src.json",
    "video_preprocessor_config.json",
    "prophetnet.tokenizer",
    "emoji.json",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "chat_templates/tool.jinja",
    "voices/en/one.npy",
    "additional [odd] name.txt",
]
LEFT = [
    "pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "model.Q8_0.gguf",
    "optimizer.pt",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "modeling_custom.py",
    ".gitattributes",
    ".git/config",
    ".cache/huggingface/x.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "openvino/openvino_model.bin",
    "openvino/openvino_model.xml",
    "original/consolidated.00.pth",
    "original/params.json",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/trainer_state.json",
    "2_Dense/pytorch_model.bin",
    "__pycache__/a.json",
]
MODULES = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../elsewhere"}, {"path": ".."}]


def fill(folder):
    for name in (*KEPT, *LEFT):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(MODULES) if name == "modules.json" else name)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_all_that_is_small_and_no_weights_comes_along(tmp_path):
    source = tmp_path / "plain"
    save("llama", source)
    fill(source)
    (tmp_path / "secret.txt").write_text("not the model's")
    (source / "link.txt").symlink_to(tmp_path / "secret.txt")
    (source / "folder").symlink_to(tmp_path)
    (source / "within.txt").symlink_to(source / "dict.txt")
    (source / "dangling.txt").symlink_to(source / "nowhere")
    os.mkfifo(source / "pipe")
    (source / "video.mp4").touch()
    os.truncate(source / "video.mp4", 1 << 30)
    with pytest.warns(UserWarning, match=r"video\.mp4 is left behind: it takes 1074 MB"):
        convert(source, tmp_path / "out")
    assert files(tmp_path / "out") == {*KEPT, "config.json", "model.safetensors", "within.txt"}
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_text() == "2_Dense/model.safetensors"
    assert (tmp_path / "out" / "within.txt").read_text() == "dict.txt"
    assert octavo.load(tmp_path / "out").config.model_type == "llama"


def test_code_comes_along_only_where_it_is_trusted(tmp_path):
    assert choose_side_files(["a.py", "sub/b.py", "c.json"]) == ["c.json"]
    save("llama", tmp_path / "plain")
    (tmp_path / "plain" / "tokenization_odd.py").write_text("")
    for trusted in (False, True):
        with open_source(tmp_path / "plain", trust_remote_code=trusted) as source:
            convert(source, tmp_path / f"out-{trusted}")
        assert (tmp_path / f"out-{trusted}" / "tokenization_odd.py").exists() == trusted


def test_out_within_the_source_does_not_swallow_itself(tmp_path):
    save("llama", tmp_path)
    fill(tmp_path)
    before = files(tmp_path)
    convert(tmp_path, tmp_path / "8bit")
    convert(tmp_path, tmp_path / "deep" / "er" / "8bit")
    for out in (tmp_path / "8bit", tmp_path / "deep" / "er" / "8bit"):
        assert files(out) == {*KEPT, "config.json", "model.safetensors"}
    assert before <= files(tmp_path)


def test_a_source_in_a_crowded_folder_takes_what_lies_beside_it(tmp_path, monkeypatch):
    from octavo.checkpoint.reading import side_files

    monkeypatch.setattr(side_files, "MOST", 50)
    save("llama", tmp_path / "home")
    for number in range(60):
        (tmp_path / "home" / "photos").mkdir(exist_ok=True)
        (tmp_path / "home" / "photos" / f"{number}.jpg").touch()
    (tmp_path / "home" / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="more than 50 files"):
        convert(tmp_path / "home", tmp_path / "out")
    assert files(tmp_path / "out") == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository of the hub and its cache, played by folders: files are links into blobs, as the real cache has them."""
    import huggingface_hub

    repository, cache = tmp_path / "repository", tmp_path / "cache"
    save("llama", repository)
    fill(repository)
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    fetched = []

    def fetch(name):
        fetched.append(name)
        target = snapshot / name
        target.parent.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        blob = blobs / name.replace("/", "-")
        shutil.copyfile(repository / name, blob)
        if not target.is_symlink():
            target.symlink_to(os.path.relpath(blob, target.parent))
        return str(target)

    def snapshot_download(name, *, allow_patterns, **options):
        for file in allow_patterns:
            fetch(file)
        return str(snapshot)

    listing = sorted(files(repository))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision=None: listing)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, **options: fetch(file))
    return fetched


def test_the_same_comes_along_from_the_hub(hub, tmp_path):
    convert("someone/some-model", tmp_path / "out")
    assert files(tmp_path / "out") == {*KEPT, "config.json", "model.safetensors"}
    assert set(hub) == {*KEPT, "config.json", "model.safetensors"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def sentence_model(folder):
    """A small sentence-transformers model: BERT, mean of the tokens, a dense layer, norm 1."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (folder / "bert").mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    base = Transformer(str(folder / "bert"))
    modules = [base, Pooling(64, "mean"), Dense(64, 32), Normalize()]
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    model.save(str(folder / "model"))
    return model, folder / "model"


SENTENCES = ["the quick brown fox", "jumps over a lazy dog", "vectors"]


def same_vectors(folder, out, least):
    from sentence_transformers import SentenceTransformer

    expected = torch.tensor(SentenceTransformer(str(folder), device="cpu").encode(SENTENCES))
    found = torch.tensor(SentenceTransformer(str(out), device="cpu").encode(SENTENCES))
    assert found.shape == expected.shape
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(SENTENCES)), atol=1e-4, rtol=0)
    assert float((found * expected).sum(1).min()) > least


@pytest.mark.filterwarnings("ignore")
def test_a_sentence_transformers_folder_stays_one(tmp_path):
    """Pooling, the dense layer's weights and the normalization come along: vectors of norm 1, close to the original's."""
    _, folder = sentence_model(tmp_path)
    convert(folder, tmp_path / "out")
    same_vectors(folder, tmp_path / "out", 0.999)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_minilm_as_sentence_transformers_reads_it(tmp_path):
    pytest.importorskip("sentence_transformers")
    path = os.environ.get("OCTAVO_TEST_MINILM")
    if not path or not Path(path).exists():
        pytest.skip("OCTAVO_TEST_MINILM names no file; `make test-all` fetches it")
    convert(Path(path).parent, tmp_path / "out")
    same_vectors(Path(path).parent, tmp_path / "out", 0.999)
