"""`lora-lexicon serve`: definitions over HTTP."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import guarded
from .use import BaseOption, Dtype, DtypeOption, ModelHelp, Quantize, QuantizeOption, load

if TYPE_CHECKING:
    import socket

TOKEN = "LORA_LEXICON_TOKEN"


@guarded
def serve(
    model: Annotated[str, typer.Argument(help=ModelHelp)] = "tiny",
    host: Annotated[
        str, typer.Option(help="The address to listen at. Any but this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any that is free.")] = 8000,
    packs: Annotated[
        list[Path] | None, typer.Option("--packs", help="A folder that packs may be added from. Repeatable.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"A file with the token that changes need; by default {TOKEN} of the environment."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Definitions written at once.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Definitions that may wait; more are answered with 429.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 60,
    base: BaseOption = None,
    dtype: DtypeOption = Dtype.float32,
    quantize: QuantizeOption = Quantize.none,
) -> None:
    """Answer over HTTP: definitions, routing, domains, OpenAI's completions.

    Domains can be added and removed while it runs. Ctrl-C ends it when what it has taken is done. docs/serve.md has
    the interface.
    """
    import signal

    from lora_lexicon.errors import LexiconError, MissingExtraError

    token = read_token(token_file)
    for folder in packs or ():
        if not folder.is_dir():
            raise LexiconError(f"--packs {folder} is no folder: give one that holds packs")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise MissingExtraError("serve", error.name or "fastapi", "serve") from error
    from lora_lexicon.serve.gate import is_loopback

    if token is None and not is_loopback(host):
        raise LexiconError(
            f"--host {host} can be reached from elsewhere, which needs a token: add --token-file FILE, or set {TOKEN}"
        )
    with listening(host, port) as place:
        from lora_lexicon.serve.app import Settings, create_app

        system = load(model, base, dtype, quantize)
        settings = Settings(host, token, [folder.resolve() for folder in packs or ()], batch_size, queue, timeout)
        app = create_app(system, settings)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has ended
            signal.signal(number, signal.SIG_IGN)
        name = f"[{host}]" if ":" in host else host
        typer.echo(f"{system.name} answers at http://{name}:{place.getsockname()[1]}")
        server.run(sockets=[place])


def read_token(file: Path | None) -> str | None:
    """The token of a file or of the environment.

    Raises:
        LexiconError: a file that cannot be read, or an empty token.
    """
    from lora_lexicon.errors import LexiconError

    try:
        token = os.environ.get(TOKEN) if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LexiconError(f"--token-file {file} cannot be read: write the token into a text file") from error
    if token is None:
        return None
    if not token.strip():
        raise LexiconError(f"the token in {file or TOKEN} is empty: write a long random one there")
    return token.strip()


def listening(host: str, port: int) -> "socket.socket":
    """A socket that listens, before anything slow is done.

    Raises:
        LexiconError: the port is taken, or the address is not this machine's.
    """
    import errno
    import socket

    from lora_lexicon.errors import LexiconError

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LexiconError(f"port {port} of {host} is taken: give another --port, or 0 for any") from error
        raise LexiconError(f"cannot listen at {host}, port {port} ({error.strerror or error}): give another") from error
