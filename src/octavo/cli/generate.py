"""`octavo generate`: text from a prompt, streamed, with its speed."""

import time
from typing import Annotated

import typer

from .options import Adapter, Device, Dtype, Model, integer, number


def generate(
    model: Model,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue. `-` reads it from standard input.",
            show_default=False,
        ),
    ],
    max_new_tokens: Annotated[int, integer(help="Stop after this many tokens.", min=1)] = 128,
    temperature: Annotated[float, number(help="Above 1 bolder, below 1 safer.", min=0.0)] = 0.8,
    top_p: Annotated[
        float, number(help="Sample from the likeliest tokens that add up to this.", min=0.0, max=1.0)
    ] = 0.95,
    top_k: Annotated[int, integer(help="Sample from this many likeliest tokens; 0: from all.", min=0)] = 0,
    repetition_penalty: Annotated[float, number(help="Above 1 discourages repetition.", min=0.01)] = 1.0,
    seed: Annotated[int | None, integer(help="Makes the sampling repeatable.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the model's chat template. Default: as the adapter was trained; without one, if "
            "there is a template.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="The system text of the conversation. Default: as the adapter was trained."
        ),
    ] = None,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="On a GPU: record the decoding of a token once, and replay it. Models that cannot be recorded decode as usual.",
        ),
    ] = True,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Continue PROMPT with MODEL. The text is printed as it comes, and the speed at the end.

    A model that is not quantized yet is quantized while it loads; `octavo quantize` does that once and for all. An adapter of
    `octavo finetune` says how it was trained, and the prompt is put to the model in that way.

    Examples:

    \b
        octavo generate ./my-model-8bit "El sentido de la vida es" --seed 1
        octavo generate ./my-model-8bit "def fibonacci(n):" --greedy --no-chat
        octavo generate ./my-model-8bit "2 + 2 =" --adapter ./answers
    """
    import sys

    from octavo.text_files import check_whole, decode

    from .checks import check_model, check_prompt
    from .terminal import quiet_libraries, say, terminal

    text = prompt
    if prompt == "-":
        text = decode(sys.stdin.buffer.read(), "the prompt on standard input")
        # The line end that `echo` puts there is not meant.
        text = text.removesuffix("\n").removesuffix("\r")
    check_prompt(text)
    check_whole(system or "", "--system")
    if chat is False and system is not None:
        raise ValueError("--system and --no-chat: plain text has no system text; leave one of them out")
    check_model(model, what_for="generate", adapter=adapter)

    import torch

    from octavo.generation import stream
    from octavo.loading import load, load_tokenizer
    from octavo.training.prompts import encode, read_prompts

    quiet_libraries()
    messages = terminal(stderr=True)
    tokenizer = load_tokenizer(model)
    trained = read_prompts(model if adapter is None else adapter)
    encoded = encode(tokenizer, text, chat, system, trained, adapter=adapter is not None)
    for note in encoded.notes:
        say(messages, f"note: {note}", style="yellow")
    started = time.perf_counter()
    network = load(model, dtype=dtype, device=device, adapter=adapter)
    if not network.can_generate():
        raise ValueError(f"{model}: {type(network).__name__} does not continue text")
    loaded = time.perf_counter() - started
    if seed is not None:
        torch.manual_seed(seed)
    sampling = (
        {"do_sample": False}
        if greedy or temperature == 0.0
        else {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    )
    result = stream(
        network,
        tokenizer,
        encoded,
        write=lambda piece: print(piece, end="", flush=True),
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        cuda_graph=cuda_graph,
        **sampling,
    )
    print()
    say(messages)
    if result.eager:
        say(messages, f"note: decoded without a CUDA graph: {result.eager}", style="yellow")
    where = f"{network.dtype} on {network.device}".removeprefix("torch.")
    by = ", CUDA graph" if result.replayed and not result.eager else ""
    say(
        messages,
        f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s (first after {result.first_token_seconds:.2f} s; "
        f"loaded in {loaded:.1f} s; {where}{by})",
    )
