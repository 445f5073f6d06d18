"""`octavo serve`: a model behind OpenAI's API and a chat page, by a server that exists."""

from typing import Annotated, Literal

import typer

from .options import Adapter, Device, Dtype, Model, integer, number, size


def serve(
    context: typer.Context,
    model: Model,
    adapter: Adapter = None,
    engine: Annotated[
        Literal["auto", "vllm", "transformers"],
        typer.Option(
            help="auto: vLLM where it is installed and serves the model, else transformers' server."
        ),
    ] = "auto",
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on. Beyond this machine only with a key.")
    ] = "127.0.0.1",
    port: Annotated[int, integer(help="Port to listen on.", min=1, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="OCTAVO_API_KEY",
            help="What every request must bring. The variable keeps it out of the list of processes.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The model's name in the API. Default: that of the adapter's or model's folder.",
        ),
    ] = None,
    max_requests: Annotated[
        int, integer(help="Requests at a time, running and waiting; others get 429.", min=1)
    ] = 64,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest request.")] = "8MB",
    max_seconds: Annotated[
        float, number(help="Longest time of a request until its answer has ended.", min=1)
    ] = 600,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Serve MODEL: a chat page at /, and OpenAI's API at /v1, for programs.

    Options after `--` go to vLLM as they are. An adapter of `octavo finetune` is asked as it was trained. docs/SERVING.md tells
    more.

    Examples:

    \b
        octavo serve ./my-model-8bit
        octavo serve ./my-model-8bit --adapter ./answers --port 8080
        octavo serve ./my-model-8bit --host 0.0.0.0 --api-key "$KEY"
        octavo serve ./my-model-8bit --engine vllm -- --tensor-parallel-size 2
    """
    from pathlib import Path

    from octavo.serving.choice import VLLM, check_installed, choose
    from octavo.serving.door import is_loopback

    from .checks import check_model
    from .terminal import quiet_libraries, say, terminal

    messages = terminal(stderr=True)
    extra = list(context.args)
    most_bytes = size(max_body, "--max-body")
    if api_key is not None and not api_key.strip():
        raise ValueError("--api-key: expected a key, found an empty one")
    if not is_loopback(host) and api_key is None:
        raise ValueError(
            f"--host {host}: others can reach it, so it needs a key: --api-key KEY, or the variable OCTAVO_API_KEY"
        )
    if extra and (unknown := [word for word in extra[:1] if not word.startswith("-")]):
        raise typer.BadParameter(f"expected an option of vLLM's after `--`, found {unknown[0]!r}")
    check_installed(engine)
    found = check_model(model, what_for="serve", adapter=adapter)
    listening = _listen(host, port)
    folder = _adapter_folder(adapter)
    chosen = choose(engine, found, folder)
    if extra and chosen.engine != VLLM:
        raise ValueError(
            f"{extra[0]}: options after `--` are vLLM's, and the engine is transformers' server ({chosen.why})"
        )
    if device is not None and chosen.engine == VLLM:
        raise ValueError("--device: vLLM chooses by itself; CUDA_VISIBLE_DEVICES tells it which GPUs to use")

    from octavo.loading import load_tokenizer
    from octavo.serving.door import Settings
    from octavo.serving.templates import served_template
    from octavo.training.prompts import CHAT, read_prompts

    quiet_libraries()
    tokenizer = load_tokenizer(model)
    trained = read_prompts(model if adapter is None else adapter)
    own_template = getattr(tokenizer, "chat_template", None)
    template = served_template(tokenizer, trained)
    names = [Path(model).name.removesuffix(".gguf")]
    if adapter is not None:
        names.append(Path(adapter).name if Path(adapter).name != names[0] else f"{names[0]}-adapter")
    if name is not None:
        names[-1] = name
    shown_host = f"[{host}]" if ":" in host else host
    settings = Settings(
        model=names[-1],
        engine=_engine_name(chosen.engine),
        url=f"http://{shown_host}:{port}",
        chat=template is not None if trained is None else trained.prompts == CHAT and template is not None,
        api_key=api_key,
        max_requests=max_requests,
        max_body=most_bytes,
        max_seconds=max_seconds,
    )
    say(messages, f"Engine: {settings.engine} ({chosen.why}). Loading {names[-1]} ...")
    if chosen.engine == VLLM:
        listening.close()
        _run_vllm(
            settings,
            names,
            model,
            found.folder,
            folder,
            template if template != own_template else None,
            dtype,
            extra,
        )
        return

    from dataclasses import replace

    from octavo.loading import load
    from octavo.serving.transformers_engine import run

    network = load(model, dtype=dtype, device=device, adapter=adapter)
    tokenizer.chat_template = template
    window = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    run(network, tokenizer, replace(settings, context=window), listening)


def _listen(host: str, port: int):
    """A bound socket: a port in use is told before a model is loaded."""
    import socket

    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(kind)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); choose another"
        ) from error
    return listening


def _adapter_folder(adapter: str | None):
    """The adapter's folder; of a hub id, its files are fetched."""
    from pathlib import Path

    if adapter is None:
        return None
    folder = Path(adapter).expanduser()
    if not folder.exists():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(adapter))
    return folder.absolute()


def _engine_name(engine: str) -> str:
    from importlib.metadata import version

    if engine == "transformers":
        return f"transformers {version('transformers')}"
    import vllm

    return f"vLLM {vllm.__version__}"


def _run_vllm(settings, names, model, folder, adapter, template, dtype, extra) -> None:
    """Become vLLM's server."""
    import os
    import tempfile
    from pathlib import Path
    from urllib.parse import urlsplit

    import psutil
    import torch

    from octavo.checkpoint.reading.source import read_config, stated_dtype
    from octavo.loading import compute_dtype
    from octavo.serving.vllm_engine import command

    file = None
    if template is not None:
        with tempfile.NamedTemporaryFile("w", suffix=".jinja", delete=False, encoding="utf-8") as written:
            written.write(template)
        file = Path(written.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        own = stated_dtype(read_config(folder))
        dtype = "auto" if own is None else str(compute_dtype(own, device)).removeprefix("torch.")
    free = psutil.virtual_memory().available if device.type == "cpu" else None
    address = urlsplit(settings.url)
    line = command(
        folder, names, adapter, file, address.hostname or "", address.port or 0, dtype, free, extra
    )
    os.execve(line[0], line, {**os.environ, **settings.to_environment()})
