"""`octavo finetune`: teach a model your texts, on top of its frozen 8-bit weights."""

from typing import Annotated

import typer

LENGTH = "Longest example in tokens; texts are cut into pieces of this. Memory grows with it."


def finetune(
    model: Annotated[
        str, typer.Argument(help="A folder, a file or a Hugging Face id; anything `octavo.load` takes.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="What to learn from: .txt; .jsonl with text, prompt + completion, or chat messages (see above); .csv with "
            "such columns; or the id of a data set on the hub. May be given several times.",
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder for the adapter, the checkpoints and the loss curve.")],
    validation: Annotated[
        list[str] | None, typer.Option(help="Files to measure on. Default: a part of --data.")
    ] = None,
    validation_split: Annotated[
        float | None, typer.Option(help="Share of --data to set aside and measure on. Default: 0.05.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="model-card: as the published 8-bit models advise: adapters on every linear layer, the head and the "
            "embedding, the LoRA paper's numbers. Other options override it."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a stopped run, from its last checkpoint.")
    ] = False,
    epochs: Annotated[
        float | None, typer.Option(help="How often to go through the data. Default: 1.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Stop after this many steps; --epochs is then ignored.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples at once, on each device. Memory grows with it. Default: 4.")
    ] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option(help="Batches that make one step: a larger batch for no memory. Default: 1.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Size of the steps. Too large: the loss jumps about. Default: 2e-4.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="How the learning rate falls: cosine, linear, constant. Default: cosine."),
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps in which the learning rate rises. Default: 0.03.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Pull of the adapters towards 0. Default: 0.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw_8bit (bitsandbytes; a quarter of the memory) or adamw.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help=f"{LENGTH} Default: 512.")] = None,
    packing: Annotated[
        bool | None,
        typer.Option(
            "--packing/--no-packing", help="Join short texts into full examples. Default: for .txt."
        ),
    ] = None,
    lora_r: Annotated[
        int | None, typer.Option(help="Rank of the adapters: how much they can learn. Default: 16.")
    ] = None,
    lora_alpha: Annotated[
        int | None,
        typer.Option(
            help="Strength of the adapters: what they add is multiplied by alpha / rank. Default: 32."
        ),
    ] = None,
    lora_dropout: Annotated[
        float | None, typer.Option(help="Against learning by heart. Default: 0.05.")
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(help="all-linear (default), all (also head and embedding), or names: q_proj,v_proj."),
    ] = None,
    lora_parameters: Annotated[
        str | None,
        typer.Option(
            help="Of a mixture of experts stored as stacks, the stacks to adapt: "
            "mlp.experts.gate_up_proj,mlp.experts.down_proj."
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
        int | None, typer.Option(help="How often to measure and save during the run. Default: 5.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same run. Default: 0.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type to compute in: float32, float16, bfloat16. Default: what the device does best."
        ),
    ] = None,
) -> None:
    """Teach MODEL your texts. Its weights stay frozen in 8 bits; small adapters on top of them learn.

    MODEL may be in 8 bits already (`octavo quantize`) or not: then it is quantized while it loads. A line of a .jsonl
    file is one of

    {"text": "A whole text."}

    {"prompt": "2 + 2 = ", "completion": "4"}

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

    of which the completion and the assistant's turns are learned; nothing is put between prompt and completion.

    The result is an adapter folder of a few megabytes, for `octavo generate MODEL --adapter OUTPUT` or PEFT. Ctrl-C
    saves; the same command with --resume goes on. Several devices: accelerate launch -m octavo finetune ...

    Examples:

        octavo finetune ./my-model-8bit --data poems.txt --output poems --epochs 3

        octavo finetune ./my-model-8bit --data questions.jsonl --output answers --preset model-card --max-length 1024
    """
    # The signature is the interface: every option but those of files goes into the recipe under its own name.
    given = dict(locals())
    import sys

    from rich.console import Console

    from octavo.cli.progress import quiet_future_warnings, quiet_peft
    from octavo.loading import load, load_tokenizer
    from octavo.training.data import read_records, split_records, tokenize
    from octavo.training.recipe import Recipe
    from octavo.training.report import print_table, show_example, write_curve, write_log
    from octavo.training.run import (
        finetune_model,
        newest_checkpoint,
        refuse_to_overwrite,
        training_device,
        training_type,
    )
    from octavo.training.sharding import is_sharded, leave_together, sharding_asked

    quiet_future_warnings()
    quiet_peft()
    recipe = Recipe.of(preset, **{name: given[name] for name in Recipe.__dataclass_fields__ if name in given})
    if resume:
        newest_checkpoint(output)
    else:
        refuse_to_overwrite(output)
    device = training_device()
    # Of several processes the first one talks.
    console = Console(stderr=True, quiet=device.index not in (None, 0) or _rank() > 0)
    records = read_records(data)
    if validation:
        held = read_records(validation, "--validation")
    else:
        records, held = split_records(records, recipe.validation_split, recipe.seed)
    tokenizer = load_tokenizer(model)
    train = tokenize(records, tokenizer, recipe.max_length, recipe.packing)
    held_out = tokenize(held, tokenizer, recipe.max_length, recipe.packing)
    console.print(
        f"{len(train.examples):,} examples, {train.tokens:,} tokens to learn; {len(held_out.examples):,} examples "
        f"({held_out.tokens:,} tokens) to measure on"
    )
    for count, what in ((train.truncated, "cut at"), (train.dropped, "left out: nothing to learn within")):
        if count:
            console.print(f"{count:,} examples {what} --max-length {recipe.max_length}")
    if train.examples:
        show_example(train.examples[0], tokenizer, console)
    # A model that is to be sharded is cut on the CPU: no device then ever holds all of it.
    place = "cpu" if sharding_asked() else device
    network = load(model, dtype=training_type(recipe.dtype, device), device=place)
    outcome = finetune_model(
        network, tokenizer, train.examples, held_out.examples, recipe, output, resume=resume
    )
    if _rank() > 0:
        leave_together()
        return
    write_log(outcome.history, f"{output}/training.json")
    drawn = write_curve(outcome.history, f"{output}/loss.png", title=f"{model} on {', '.join(data)}")
    leave_together()
    if outcome.interrupted:
        console.print(f"stopped at step {outcome.steps} and saved; the same command with --resume goes on")
        sys.exit(130)
    print_table(outcome.history, console)
    if is_sharded(outcome.model):
        console.print(f"FSDP2: this process held {outcome.held_bytes / 1e6:.3f} MB of 8-bit weights")
    console.print(
        f"trained {outcome.trainable:,} of {outcome.total:,} parameters for {outcome.steps} steps"
        + (f"; curve: {output}/loss.png" if drawn else "; for a curve, `pip install matplotlib`")
    )
    if outcome.after:
        console.print(
            f"perplexity {outcome.before['eval_perplexity']:.2f} → {outcome.after['eval_perplexity']:.2f} "
            f"({int(outcome.after['eval_tokens']):,} tokens not trained on)"
        )
    console.print(f'Try it: octavo generate {model} --adapter {output} "..."', soft_wrap=True)


def _rank() -> int:
    import os

    return int(os.environ.get("RANK", 0))
