"""`octavo plan`: will it fit? Memory for loading, generating and training, from the configuration alone."""

from typing import Annotated, Any

import typer

UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with a config.json, or a Hugging Face id: of it only config.json is fetched."
        ),
    ],
    memory: Annotated[
        str | None, typer.Option(help="What there is: 11GB, 24GiB. Says what to change if it is too little.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a text. Default: 2048, or what the model reads at most.", min=2),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts at once.", min=1)] = 1,
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 16,
    lora_targets: Annotated[
        str, typer.Option(help="all-linear, all, or names: q_proj,v_proj.")
    ] = "all-linear",
    optimizer: Annotated[str, typer.Option(help="adamw_8bit or adamw.")] = "adamw_8bit",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="As in `octavo finetune`."),
    ] = True,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[
        str | None, typer.Option(help="Type to compute in. Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
) -> None:
    """Estimate the memory that MODEL takes in 8 bits, part by part, without downloading its weights: for loading it, for
    generating from it, and for `octavo finetune`. With --memory, each is said to fit or not; 8GB are 7.45 GiB.

    Examples:

        octavo plan EleutherAI/gpt-j-6b --memory 11GB

        octavo plan ./my-model-8bit --device cpu --max-length 512 --batch-size 4
    """
    import torch
    from rich.console import Console

    from octavo.cli.progress import quiet_future_warnings
    from octavo.training import memory as estimates
    from octavo.training.data import check_length
    from octavo.training.recipe import Recipe

    quiet_future_warnings()
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device: expected cuda or cpu, found {device!r}")
    available = None if memory is None else parse_memory(memory)
    types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    chosen = dtype or ("bfloat16" if device == "cuda" else "float32")
    if chosen not in types:
        raise ValueError(f"--dtype: expected one of {', '.join(types)}, found {chosen!r}")
    computing = types[chosen]
    config, octavo_config, quantized = read_config(model)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    length_now = max_length or min(2048, positions or 2048)
    check_length(config, length_now)
    options: dict[str, Any] = {
        "lora_r": lora_r,
        "lora_targets": lora_targets,
        "optimizer": optimizer,
        "gradient_checkpointing": gradient_checkpointing,
    }

    def train(length: int, batch: int, **changes: Any):
        recipe = Recipe(**{**options, **changes})
        return estimates.training(
            config,
            octavo_config,
            computing,
            max_length=length,
            batch_size=batch,
            recipe=recipe,
            device=device,
        )

    loading = estimates.loading(config, octavo_config, computing, quantized=quantized, device=device)
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"[bold]{model}[/bold]: {loading.parameters / 1e6:,.0f} million parameters in 8 bits, computing in {chosen} on "
        f"{device}"
    )
    _show(console, "loading", loading, available)
    size = f"{batch_size} × {length_now} tokens"

    def generate(length: int, batch: int):
        return estimates.generating(
            config, octavo_config, computing, max_length=length, batch_size=batch, device=device
        )

    try:
        generating = generate(length_now, batch_size)
        _show(console, f"generating, {size}", generating, available)
        if available is not None and generating.total > available:
            _advise_generating(console, generate, available, length_now, batch_size)
        training = train(length_now, batch_size)
    except estimates.DependsOnValues as error:
        console.print(f"\ngenerating and training: {error}")
        return
    _show(console, f"training, {size}", training, available)
    console.print(f"  ({training.trainable / 1e6:,.1f} million parameters are trained)")
    if available is not None and training.total > available:
        _advise(console, train, available, length_now, batch_size, options)


def parse_memory(text: str) -> int:
    """Bytes of "11GB" (10⁹), "11GiB" (2³⁰), "500MB". Raises ValueError saying what is expected."""
    import re

    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in UNITS:
        raise ValueError(f"--memory: expected a size such as 11GB or 24GiB, found {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def read_config(model: str) -> tuple[Any, Any, bool]:
    """transformers' configuration of a model, how it is (or would be) stored, and whether it is in 8 bits already."""
    from transformers import AutoConfig

    from octavo import OctavoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model}: expected a folder with a config.json that transformers knows, or a hub id; found none "
            f"({str(error).splitlines()[0]})"
        ) from error
    stored: Any = getattr(config, "quantization_config", None)
    stored = stored.to_dict() if hasattr(stored, "to_dict") else stored
    if stored and stored.get("quant_method") == "octavo":
        return config, OctavoConfig.from_dict(dict(stored)), True
    return config, OctavoConfig(), False


def _gib(size: int) -> str:
    return f"{size / 2**30:8.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:8.2f} MiB"


def _show(console: Any, title: str, estimate: Any, available: int | None) -> None:
    fits = ""
    if available is not None:
        fits = " [green]fits" if estimate.total <= available else " [red]does not fit"
        fits += f"[/] into {_gib(available).strip()}"
    console.print(f"\n[bold]{title}[/bold]{fits}")
    # One unit a table.
    unit, name = (2**30, "GiB") if estimate.total >= 2**30 else (2**20, "MiB")
    for part, size in (*estimate.parts.items(), ("together", estimate.total)):
        line = f"{part:32} {size / unit:8.2f} {name}"
        console.print(f"  [bold]{line}[/bold]" if part == "together" else f"  {line}")


def _advise_generating(console: Any, generate: Any, available: int, length: int, batch: int) -> None:
    """Print the first batch and length that fit, if any do."""
    while batch > 1 or length > 256:
        batch, length = (1, length) if batch > 1 else (1, length // 2)
        total = generate(length, batch).total
        if total <= available:
            console.print(f"  {batch} × {length} tokens fit: {_gib(total).strip()}")
            return
    console.print("  It does not fit with 256 tokens either: a smaller model, or more memory.")


def _advise(
    console: Any, train: Any, available: int, length: int, batch: int, options: dict[str, Any]
) -> None:
    """Print what would make training fit, each change on top of those before, until it does."""
    changes: dict[str, Any] = {}
    steps: list[tuple[str, int, int, dict[str, Any]]] = []
    if not options["gradient_checkpointing"]:
        changes = {**changes, "gradient_checkpointing": True}
        steps.append(("--gradient-checkpointing", length, batch, changes))
    if batch > 1:
        batch_was, batch = batch, 1
        steps.append((f"--batch-size 1 --gradient-accumulation {batch_was}", length, batch, changes))
    if options["optimizer"] != "adamw_8bit":
        changes = {**changes, "optimizer": "adamw_8bit"}
        steps.append(("--optimizer adamw_8bit", length, batch, changes))
    while length > 256:
        length //= 2
        steps.append((f"--max-length {length}", length, batch, changes))
    if options["lora_r"] > 4:
        changes = {**changes, "lora_r": 4}
        steps.append(("--lora-r 4", length, batch, changes))
    console.print("\n[bold]To make training fit[/bold], one after the other:")
    for words, length_now, batch_now, changed in steps:
        total = train(length_now, batch_now, **changed).total
        console.print(f"  {words:40} {_gib(total)}")
        if total <= available:
            return
    console.print(
        "  Nothing here is enough: a smaller model, or more memory (several GPUs: FSDP2, see docs/TRAINING.md)."
    )
