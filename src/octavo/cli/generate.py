"""`octavo generate`: text from a prompt, streamed, with its speed."""

import time
from typing import Annotated

import typer


def generate(
    model: Annotated[
        str, typer.Argument(help="A folder, a file or a Hugging Face id; anything `octavo.load` takes.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue. `-` reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="Above 1 bolder, below 1 safer.", min=0.0)] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that add up to this.", min=0.0, max=1.0)
    ] = 0.95,
    top_k: Annotated[
        int, typer.Option(help="Sample from this many likeliest tokens; 0: from all.", min=0)
    ] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 discourages repetition.", min=0.01)
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the sampling repeatable.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the model's chat template. Default: if the model has one.",
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter folder to put on top.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type to compute in: float32, float16, bfloat16. Default: the model's own."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")
    ] = None,
) -> None:
    """Continue PROMPT with MODEL, printing the text as it comes, and the speed at the end.

    A model that is not quantized yet is quantized while it loads; `octavo quantize` does that once and for all.

    Examples:

        octavo generate ./my-model-8bit "El sentido de la vida es" --seed 1

        octavo generate ./my-model-8bit "def fibonacci(n):" --greedy --no-chat
    """
    import sys

    import torch

    from octavo.cli.progress import quiet_future_warnings, quiet_loading
    from octavo.loading import load, load_tokenizer
    from octavo.serving.generation import stream

    text = sys.stdin.read() if prompt == "-" else prompt
    quiet_loading(always=False)
    quiet_future_warnings()
    started = time.perf_counter()
    network = load(model, dtype=dtype, device=device, adapter=adapter)
    tokenizer = load_tokenizer(model)
    loaded = time.perf_counter() - started
    if seed is not None:
        torch.manual_seed(seed)
    sampling = greedy or temperature == 0.0
    options = (
        {"do_sample": False}
        if sampling
        else {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
        }
    )
    result = stream(
        network,
        tokenizer,
        text,
        write=lambda piece: print(piece, end="", flush=True),
        chat=chat,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        **options,
    )
    print()
    print(
        f"\n{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s "
        f"(first after {result.first_token_seconds:.2f} s; loaded in {loaded:.1f} s; "
        f"{network.dtype} on {network.device})".replace("torch.", ""),
        file=sys.stderr,
    )
