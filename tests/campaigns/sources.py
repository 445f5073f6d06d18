"""What is mutated: small folders and files of each kind that Octavo reads, and what a user does with them."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import octavo
from octavo.checkpoint import convert, open_source

from ..models.checkpoints import CONFIGS, build, save
from ..models.gguf_files import write_llama
from ..models.published import publish, tiny_gptj


@dataclass(frozen=True)
class Source:
    """One kind of input.

    Args:
        name: for the table.
        make: writes it into a folder.
        use: what a user does: (folder, a fresh output folder) → numbers that depend on every weight.
        container: the file whose header is mutated; config: its configuration, or None.
    """

    name: str
    make: Callable[[Path], None]
    use: Callable[[Path, Path], torch.Tensor]
    container: str
    config: str | None = "config.json"


def _logits(model) -> torch.Tensor:
    ids = torch.arange(1, 9).view(1, 8) % model.config.vocab_size
    try:
        with torch.no_grad():
            return model.eval()(ids).logits.float()
    except RuntimeError:
        # A configuration that transformers takes and its model cannot compute with: not a matter of the files.
        return torch.empty(0)


def _load(folder: Path, out: Path) -> torch.Tensor:
    return _logits(octavo.load(folder, device="cpu"))


def _convert(folder: Path, out: Path) -> torch.Tensor:
    with open_source(folder) as source:
        convert(source, out / "eight")
    return _logits(octavo.load(out / "eight", device="cpu"))


def _convert_gguf(folder: Path, out: Path) -> torch.Tensor:
    return _convert(folder / "model.gguf", out)


def _adapted(folder: Path, out: Path) -> torch.Tensor:
    return _logits(octavo.load(folder / "base", adapter=folder / "adapter", device="cpu"))


def _octavo(folder: Path) -> None:
    save("llama", folder / "plain")
    with open_source(folder / "plain") as source:
        convert(source, folder / "eight")
    shutil.rmtree(folder / "plain")
    for file in (folder / "eight").iterdir():
        file.rename(folder / file.name)
    (folder / "eight").rmdir()


def _plain(folder: Path) -> None:
    save("llama", folder)


def _sharded(folder: Path) -> None:
    save("llama", folder, max_shard_size="40KB")


def _published(folder: Path) -> None:
    publish(tiny_gptj(), folder)


def _gguf(folder: Path) -> None:
    write_llama(folder / "model.gguf", build(CONFIGS["llama"]()))


def _adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    (folder / "base").mkdir()
    _octavo(folder / "base")
    model = get_peft_model(
        octavo.load(folder / "base", device="cpu"), LoraConfig(target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / "adapter")


SOURCES = [
    Source("Octavo folder", _octavo, _load, "model.safetensors"),
    Source("safetensors", _plain, _convert, "model.safetensors"),
    Source("shards", _sharded, _convert, "model.safetensors.index.json"),
    Source("published .bin", _published, _convert, "pytorch_model.bin"),
    Source("GGUF", _gguf, _convert_gguf, "model.gguf", None),
    Source(
        "LoRA adapter", _adapter, _adapted, "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
    ),
]
