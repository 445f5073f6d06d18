"""`octavo plan`: will it fit? Memory for loading, generating and training, from the configuration alone."""

from typing import Annotated, Any, Literal

import typer

from .options import DtypeName, integer, named, size


def plan(
    model: Annotated[
        str,
        named(
            "MODEL", "A folder with a config.json, or a Hugging Face id: of it only config.json is fetched."
        ),
    ],
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What there is: 11GB, 24GiB; a plain number is in GiB. Says what to change if it is too little.",
        ),
    ] = None,
    max_length: Annotated[
        int | None, integer(help="Tokens of a text. Default: 2048, or what the model reads at most.", min=2)
    ] = None,
    batch_size: Annotated[int, integer(help="Texts at once.", min=1)] = 1,
    lora_r: Annotated[int, integer(help="Rank of the adapters.", min=1)] = 16,
    lora_targets: Annotated[
        str, typer.Option(metavar="NAME,...", help="all-linear, all, or names: q_proj,v_proj.")
    ] = "all-linear",
    optimizer: Annotated[
        Literal["adamw_8bit", "adamw"], typer.Option(help="As in `octavo finetune`.")
    ] = "adamw_8bit",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="As in `octavo finetune`."),
    ] = True,
    device: Annotated[
        Literal["cuda", "cpu"] | None,
        typer.Option(help="Where it is to run. Default: a GPU if this machine has one."),
    ] = None,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Type to compute in. Default: bfloat16 on a GPU, float32 on a CPU."),
    ] = None,
) -> None:
    """Estimate the memory that MODEL takes in 8 bits. Part by part, without downloading its weights: for loading it, for
    generating from it, and for `octavo finetune`. With --memory, each is said to fit or not; 8GB are 7.45 GiB.

    Examples:

    \b
        octavo plan EleutherAI/gpt-j-6b --device cuda --memory 11GB
        octavo plan ./my-model-8bit --max-length 512 --batch-size 4
    """
    from octavo.checkpoint.reading.locate import locate_config

    from .terminal import quiet_libraries, say, terminal

    available = None if memory is None else size(memory, "--memory", bare="GiB")
    found = locate_config(model)
    if found is None:
        raise ValueError(
            f"{model}: a GGUF file has no config.json to plan from; `octavo quantize` it, and plan for the folder"
        )

    import torch

    from octavo.planning import memory as estimates
    from octavo.training.data import check_length
    from octavo.training.recipe import Recipe

    quiet_libraries()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    target = device or here
    chosen = dtype or ("bfloat16" if target == "cuda" else "float32")
    computing = getattr(torch, chosen)
    config, octavo_config, quantized = read_config(found.parent)
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
            device=target,
        )

    loading = estimates.loading(config, octavo_config, computing, quantized=quantized, device=target)
    console = terminal()
    say(
        console,
        (model, "bold"),
        f": {loading.parameters / 1e6:,.0f} million parameters in 8 bits, computing in {chosen} on {target}"
        + (
            "; this machine has no GPU: --device cuda plans for one"
            if device is None and here == "cpu"
            else ""
        ),
    )
    if available is not None and memory and memory.strip()[-1].isdigit():
        say(console, f"--memory {memory.strip()} is read as {_gib(available).strip()}")
    _show(console, "loading", loading, available)
    of_size = f"{batch_size} × {length_now} tokens"

    def generate(length: int, batch: int):
        return estimates.generating(
            config, octavo_config, computing, max_length=length, batch_size=batch, device=target
        )

    try:
        generating = generate(length_now, batch_size)
        _show(console, f"generating, {of_size}", generating, available)
        if available is not None and generating.total > available:
            _advise_generating(console, generate, available, length_now, batch_size)
        training = train(length_now, batch_size)
    except estimates.DependsOnValues as error:
        console.print()
        say(console, f"generating and training: {error}")
        return
    _show(console, f"training, {of_size}", training, available)
    say(console, f"  ({training.trainable / 1e6:,.1f} million parameters are trained)")
    if available is not None and training.total > available:
        _advise(console, train, available, length_now, batch_size, options)


def read_config(folder: Any) -> tuple[Any, Any, bool]:
    """transformers' configuration of a model, how it is (or would be) stored, and whether it is in 8 bits already."""
    from transformers import AutoConfig

    from octavo import OctavoConfig
    from octavo.wording import one_line

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: expected a config.json that transformers knows; found {one_line(error)}"
        ) from error
    stored: Any = getattr(config, "quantization_config", None)
    stored = stored.to_dict() if hasattr(stored, "to_dict") else stored
    if stored and stored.get("quant_method") == "octavo":
        return config, OctavoConfig.from_dict(dict(stored)), True
    return config, OctavoConfig(), False


def _gib(size: int) -> str:
    return f"{size / 2**30:8.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:8.2f} MiB"


def _show(console: Any, title: str, estimate: Any, available: int | None) -> None:
    from .terminal import say

    fits = []
    if available is not None:
        fits = [(" fits", "green") if estimate.total <= available else (" does not fit", "red")]
        fits.append((f" into {_gib(available).strip()}", ""))
    console.print()
    say(console, (title, "bold"), *fits)
    # One unit per table.
    unit, name = (2**30, "GiB") if estimate.total >= 2**30 else (2**20, "MiB")
    for part, count in (*estimate.parts.items(), ("together", estimate.total)):
        say(console, f"  {part:32} {count / unit:8.2f} {name}", style="bold" if part == "together" else "")


def _advise_generating(console: Any, generate: Any, available: int, length: int, batch: int) -> None:
    """Print the first batch and length that fit, if any do."""
    from .terminal import say

    while batch > 1 or length > 256:
        batch, length = (1, length) if batch > 1 else (1, length // 2)
        total = generate(length, batch).total
        if total <= available:
            say(console, f"  {batch} × {length} tokens fit: {_gib(total).strip()}")
            return
    say(console, "  It does not fit with 256 tokens either: a smaller model, or more memory.")


def _advise(
    console: Any, train: Any, available: int, length: int, batch: int, options: dict[str, Any]
) -> None:
    """Print what would make training fit, each change on top of those before, until it does."""
    from .terminal import say

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
    console.print()
    say(console, ("To make training fit", "bold"), ", one after the other:")
    for words, length_now, batch_now, changed in steps:
        total = train(length_now, batch_now, **changed).total
        say(console, f"  {words:40} {_gib(total)}")
        if total <= available:
            return
    say(
        console,
        "  Nothing here is enough: a smaller model, or more memory (several GPUs: FSDP2, see docs/TRAINING.md).",
    )
