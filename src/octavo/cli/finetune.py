"""`octavo finetune`: teach a model your texts, on top of its frozen 8-bit weights."""

from typing import Annotated, Any, Literal

import typer

from .options import DtypeName, Model, integer, number


def finetune(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|ID",
            help="What to learn from: .txt; .jsonl with text, prompt + completion, or chat messages (see above); .csv with "
            "such columns; or the id of a data set on the hub. May be repeated.",
        ),
    ],
    output: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for the adapter, the checkpoints and the loss curve.")
    ],
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|ID", help="Files to measure on. Default: a part of --data."),
    ] = None,
    validation_split: Annotated[
        float | None, number(help="Share of --data to set aside and measure on. Default: 0.05.")
    ] = None,
    preset: Annotated[
        Literal["model-card"] | None,
        typer.Option(
            help="As the published 8-bit models advise: adapters on every linear layer, the head and the "
            "embedding, the LoRA paper's numbers. Other options override it."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a stopped run, from its last checkpoint.")
    ] = False,
    epochs: Annotated[float | None, number(help="How often to go through the data. Default: 1.")] = None,
    max_steps: Annotated[
        int | None, integer(help="Stop after this many steps; --epochs is then ignored.")
    ] = None,
    batch_size: Annotated[
        int | None, integer(help="Examples at once, on each device. Memory grows with it. Default: 4.")
    ] = None,
    gradient_accumulation: Annotated[
        int | None, integer(help="Batches that make one step: a larger batch for no memory. Default: 1.")
    ] = None,
    learning_rate: Annotated[
        float | None, number(help="Size of the steps. Too large: the loss jumps about. Default: 2e-4.")
    ] = None,
    schedule: Annotated[
        Literal["cosine", "linear", "constant"] | None,
        typer.Option(help="How the learning rate falls. Default: cosine."),
    ] = None,
    warmup: Annotated[
        float | None, number(help="Share of the steps in which the learning rate rises. Default: 0.03.")
    ] = None,
    weight_decay: Annotated[float | None, number(help="Pull of the adapters towards 0. Default: 0.")] = None,
    optimizer: Annotated[
        Literal["adamw_8bit", "adamw"] | None,
        typer.Option(help="adamw_8bit: bitsandbytes' AdamW, a quarter of the memory. Default: adamw_8bit."),
    ] = None,
    max_length: Annotated[
        int | None,
        integer(
            help="Longest example in tokens; texts are cut into pieces of this. Memory grows with it. Default: 512."
        ),
    ] = None,
    packing: Annotated[
        bool | None,
        typer.Option(
            "--packing/--no-packing", help="Join short texts into full examples. Default: for .txt."
        ),
    ] = None,
    lora_r: Annotated[
        int | None, integer(help="Rank of the adapters: how much they can learn. Default: 16.")
    ] = None,
    lora_alpha: Annotated[
        int | None,
        integer(help="Strength of the adapters: what they add is multiplied by alpha / rank. Default: 32."),
    ] = None,
    lora_dropout: Annotated[float | None, number(help="Against learning by heart. Default: 0.05.")] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="all-linear (default), all (also head and embedding), or names: q_proj,v_proj.",
        ),
    ] = None,
    lora_parameters: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Of a mixture of experts stored as stacks, the stacks to adapt, such as mlp.experts.down_proj.",
        ),
    ] = None,
    dora: Annotated[bool | None, typer.Option("--dora", help="Weight-decomposed adapters (DoRA).")] = None,
    rslora: Annotated[bool | None, typer.Option("--rslora", help="Scale adapters by alpha / √rank.")] = None,
    train_norms: Annotated[
        bool | None, typer.Option("--train-norms", help="Train the norms as well.")
    ] = None,
    train_biases: Annotated[
        bool | None, typer.Option("--train-biases", help="Train the biases as well.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="A third more time for much less memory. Default: on.",
        ),
    ] = None,
    evaluations: Annotated[
        int | None, integer(help="How often to measure and save during the run. Default: 5.")
    ] = None,
    seed: Annotated[int | None, integer(help="The same seed gives the same run. Default: 0.")] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Type to compute in. Default: what the device does best.")
    ] = None,
) -> None:
    """Teach MODEL your texts. Its weights stay frozen in 8 bits; small adapters on top of them learn.

    MODEL may be in 8 bits already (`octavo quantize`) or not: then it is quantized while it loads. A line of a .jsonl
    file is one of

    \b
        {"text": "A whole text."}
        {"prompt": "2 + 2 = ", "completion": "4"}
        {"messages": [{"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Hello!"}]}

    of which the completion and the assistant's turns are learned; nothing is put between prompt and completion. What the
    adapter was trained on is kept with it: `octavo generate MODEL --adapter OUTPUT` asks in the same way.

    Ctrl-C saves; the same command with --resume goes on. Several devices: accelerate launch -m octavo finetune ...

    Examples:

    \b
        octavo finetune ./my-model-8bit --data poems.txt --output poems
        octavo finetune ./my-model-8bit --data questions.jsonl \\
            --output answers --preset model-card --max-length 1024
    """
    # The signature is the interface: every option but those of files goes into the recipe under its own name.
    given = dict(locals())
    from octavo.training.folder import newest_checkpoint, refuse_to_overwrite
    from octavo.training.recipe import Recipe
    from octavo.training.records import read_records, split_records

    from .checks import check_model
    from .terminal import quiet_libraries, say, terminal, warnings_as_lines

    recipe = Recipe.of(preset, **{name: given[name] for name in Recipe.__dataclass_fields__ if name in given})
    if resume:
        newest_checkpoint(output)
    else:
        refuse_to_overwrite(output)
    # Of several processes the first one talks.
    messages = terminal(stderr=True, quiet=_rank() > 0)
    with warnings_as_lines(messages):
        records = read_records(data)
        if validation:
            held = read_records(validation, "--validation")
        else:
            records, held = split_records(records, recipe.validation_split, recipe.seed)
    check_model(model, "fine-tune")

    from octavo.loading import load, load_tokenizer
    from octavo.training.card import Origin
    from octavo.training.curves import show_example
    from octavo.training.data import tokenize
    from octavo.training.finetune import finetune_model, training_device, training_type
    from octavo.training.prompts import Prompts
    from octavo.training.sharding import leave_together, sharding_asked

    quiet_libraries()
    device = training_device()
    messages.quiet = messages.quiet or device.index not in (None, 0)
    tokenizer = load_tokenizer(model)
    train = tokenize(records, tokenizer, recipe.max_length, recipe.packing)
    held_out = tokenize(held, tokenizer, recipe.max_length, recipe.packing)
    say(
        messages,
        f"{len(train.examples):,} examples, {train.tokens:,} tokens to learn; {len(held_out.examples):,} examples "
        f"({held_out.tokens:,} tokens) to measure on",
    )
    for count, what in ((train.truncated, "cut at"), (train.dropped, "left out: nothing to learn within")):
        if count:
            say(messages, f"{count:,} examples {what} --max-length {recipe.max_length}")
    if train.examples:
        show_example(train.examples[0], tokenizer, messages)
    # A model that is to be sharded is cut on the CPU: no device then ever holds all of it.
    place = "cpu" if sharding_asked() else device
    network = load(model, dtype=training_type(recipe.dtype, device), device=place)
    outcome = finetune_model(
        network,
        tokenizer,
        train.examples,
        held_out.examples,
        recipe,
        output,
        origin=Origin(model, data, Prompts.of(records, tokenizer)),
        resume=resume,
    )
    leave_together()
    if _rank() == 0:
        _show(messages, outcome, model, output, records[0])
    if outcome.interrupted:
        raise typer.Exit(130)


def _show(messages: Any, outcome: Any, model: str, output: str, record: dict[str, Any]) -> None:
    """What came of the run, and what to do with it."""
    import shlex
    from pathlib import Path

    from octavo.training.curves import print_table
    from octavo.training.sharding import is_sharded

    from .terminal import say, say_command

    if outcome.interrupted:
        say(messages, f"stopped at step {outcome.steps} and saved; the same command with --resume goes on")
        return
    print_table(outcome.history, messages)
    if is_sharded(outcome.model):
        say(messages, f"FSDP2: this process held {outcome.held_bytes / 1e6:.3f} MB of 8-bit weights")
    curve = Path(output) / "loss.png"
    say(
        messages,
        f"trained {outcome.trainable:,} of {outcome.total:,} parameters for {outcome.steps} steps"
        + (f"; curve: {curve}" if curve.exists() else "; for a curve, `pip install matplotlib`"),
    )
    if outcome.after:
        say(
            messages,
            f"perplexity {outcome.before['eval_perplexity']:.2f} → {outcome.after['eval_perplexity']:.2f} "
            f"({int(outcome.after['eval_tokens']):,} tokens not trained on)",
        )
    say_command(
        messages,
        "Try it:",
        f"octavo generate {shlex.quote(model)} {shlex.quote(example_prompt(record))} --adapter {shlex.quote(output)}",
    )


def example_prompt(record: dict[str, Any]) -> str:
    """A prompt of the data that is short enough to print, else three dots."""
    turns = record.get("messages") or [{}]
    asked = next((turn.get("content") for turn in turns if turn.get("role") == "user"), None)
    prompt = record.get("prompt", asked)
    short = isinstance(prompt, str) and prompt.strip() and len(prompt) <= 60 and prompt.isprintable()
    return prompt if short and isinstance(prompt, str) else "..."


def _rank() -> int:
    import os

    return int(os.environ.get("RANK", 0))
