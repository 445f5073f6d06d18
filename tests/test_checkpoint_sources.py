"""Finding and opening checkpoints: folders, files, hub ids; reading lazily."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from octavo.checkpoint import CheckpointError, open_source
from octavo.checkpoint.reading.locate import download, locate, wanted_files

from .models.checkpoints import save

TENSORS = {
    "float": torch.randn(7, 5),
    "half": torch.randn(3, 4).half(),
    "brain": torch.randn(3).bfloat16(),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "counts": torch.arange(5),
    "number": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
}


def same(source):
    assert set(source.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        info = source.tensors[name]
        assert (info.shape, info.dtype, info.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert torch.equal(source.read(name), tensor), name


@pytest.mark.parametrize("kind", ["safetensors", "bin", "legacy"])
def test_every_type_is_read_as_it_is(kind, tmp_path):
    if kind == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(TENSORS, path)
    else:
        path = tmp_path / "pytorch_model.bin"
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "bin")
    for where in (tmp_path, path):
        with open_source(where) as source:
            assert source.kind == ("safetensors" if kind == "safetensors" else "bin")
            same(source)
            for name in TENSORS:
                source.release(name)
            same(source)


def test_tensors_outlive_their_source(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        tensor = source.read("float")
    assert torch.equal(tensor, TENSORS["float"])


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    before = path.read_bytes()
    with open_source(tmp_path) as source:
        source.read("float").zero_()
    assert path.read_bytes() == before


def test_unaligned_file_of_an_old_writer(tmp_path):
    tensors = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.randn(3), "c": torch.randn(3).half()}
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        kind = {torch.uint8: "U8", torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    with open_source(tmp_path) as source:
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor)


def test_safetensors_come_before_bin(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert locate(tmp_path).format == "safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    assert locate(tmp_path).files == [tmp_path / "model-00001-of-00001.safetensors"]
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    torch.save({"seed": 1}, tmp_path / "training_args.bin")
    assert locate(tmp_path).files == [tmp_path / "pytorch_model.bin"]


def test_one_index_is_enough(tmp_path):
    model = save("llama", tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    with open_source(index) as source:
        assert set(source.tensors) == set(model.state_dict())


def test_config_and_auxiliary_files(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_text("")
    with open_source(tmp_path) as source:
        assert source.config["model_type"] == "llama"
        assert [path.name for path in source.auxiliary_files()] == [
            "generation_config.json",
            "tokenizer.json",
        ]


REPOSITORY = [
    ".gitattributes",
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "tf_model.h5",
    "onnx/model.onnx",
    "original/consolidated.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.Q4_0.gguf",
]


def test_only_what_is_needed_is_downloaded():
    wanted = wanted_files(REPOSITORY)
    assert sorted(wanted) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    bins = [name for name in REPOSITORY if "safetensors" not in name]
    assert [name for name in wanted_files(bins) if name.endswith(".bin")] == ["pytorch_model.bin"]
    assert wanted_files(["a.gguf", "README.md"]) == ["a.gguf"]
    assert wanted_files(["README.md"]) == []
    with pytest.raises(CheckpointError, match=r"append one to its id: a\.gguf, b\.gguf"):
        wanted_files(["b.gguf", "a.gguf"])


def test_a_hub_id_is_downloaded_into_the_cache(tmp_path, monkeypatch):
    """The hub is played by a folder."""
    import huggingface_hub

    save("llama", tmp_path)
    asked = {}

    def snapshot_download(repository, **options):
        asked[repository] = options
        return str(tmp_path)

    names = [path.name for path in tmp_path.iterdir()]
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repository, revision=None: names
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with open_source("someone/some-model", revision="v1") as source:
        assert source.kind == "safetensors"
    assert asked["someone/some-model"]["revision"] == "v1"
    assert set(asked["someone/some-model"]["allow_patterns"]) == set(names)
    (tmp_path / "m.Q8.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"m\.Q8\.gguf"):
        open_source("someone/some-model/m.Q8.gguf")
    assert asked["someone/some-model"]["allow_patterns"] == ["m.Q8.gguf"]


def test_offline_the_cache_serves_or_the_error_says_so(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(self, repository, revision=None):
        raise OSError("no route to host")

    def cached(repository, local_files_only=False, **options):
        assert local_files_only
        if repository == "someone/known":
            return str(tmp_path)
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert download("someone/known") == tmp_path
    with pytest.raises(CheckpointError, match=r"hub cannot be reached.*cache does not hold it"):
        open_source("someone/unknown")
