"""`lora-lexicon serve`: definitions over HTTP."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import check_given, guarded, note
from .signing import TrustOption, check_served
from .use import BaseOption, Dtype, DtypeOption, MemoryOption, ModelHelp, Quantize, QuantizeOption, load

if TYPE_CHECKING:
    import socket

TOKEN = "LORA_LEXICON_TOKEN"
BACKLOG = 2048  # connections that wait to be taken


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
    trust: TrustOption = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"A file with the token that changes need; by default {TOKEN} of the environment."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="A certificate (PEM), to answer over HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, if it does not lie in the same file.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Definitions written at once.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Definitions that may wait; more are answered with 429.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 60,
    max_context: Annotated[
        int,
        typer.Option(
            "--max-context",
            min=1,
            help="Tokens of a text that is continued, with its continuation; never more than the model reads.",
        ),
    ] = 4096,
    base: BaseOption = None,
    dtype: DtypeOption = Dtype.float32,
    quantize: QuantizeOption = Quantize.none,
    expert_memory: MemoryOption = None,
) -> None:
    """Answer over HTTP: definitions, routing, domains, OpenAI's completions.

    Domains can be added and removed while it runs. Ctrl-C ends it when what it has taken is done, a second one at
    once. docs/serve.md has the interface.
    """
    import math
    import signal

    from lora_lexicon.errors import LexiconError, MissingExtraError

    check_given(model, base)
    token = read_token(token_file)
    check_certificate(tls_cert, tls_key)
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
    policy = check_served(model, trust)
    with bound(host, port) as place:
        from lora_lexicon.serve.app import Settings, create_app
        from lora_lexicon.serve.gate import BODY_SECONDS
        from lora_lexicon.serve.wire import IDLE, Connection, Server, room_for

        system = load(model, base, dtype, quantize, expert_memory)
        settings = Settings(
            host, token, [folder.resolve() for folder in packs or ()], policy, batch_size, queue, timeout, max_context
        )
        config = uvicorn.Config(
            create_app(system, settings),
            http=Connection,
            ws="none",
            log_level="warning",
            server_header=False,
            limit_concurrency=room_for(queue + batch_size + IDLE),
            timeout_graceful_shutdown=math.ceil(timeout + BODY_SECONDS),
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
        )
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has ended
            signal.signal(number, signal.SIG_IGN)
        with saying(host, port):  # not before the model is there: until then a client is told that nobody answers
            place.listen(BACKLOG)
        if tls_cert is None and not is_loopback(host):
            note(f"what is sent to {host} can be read on its way, the token too: add --tls-cert, or a proxy with TLS")
        scheme, name = "http" if tls_cert is None else "https", f"[{host}]" if ":" in host else host
        typer.echo(f"{system.name} answers at {scheme}://{name}:{place.getsockname()[1]}")
        Server(config).run(sockets=[place])


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
    if not (token.strip().isascii() and token.strip().isprintable() and " " not in token.strip()):
        raise LexiconError(
            f"the token in {file or TOKEN} is not one word of letters, digits and signs: no client sends it"
        )
    return token.strip()


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    """Raises a LexiconError unless there is neither, or both can be read and belong together."""
    import ssl

    from lora_lexicon.errors import LexiconError

    if certificate is None:
        if key is not None:
            raise LexiconError("--tls-key belongs to a certificate: add --tls-cert FILE")
        return
    for file in (certificate, key):
        if file is not None and not file.is_file():
            raise LexiconError(f"{file} is no file: give the certificate and its key as PEM")
    try:
        # A key with a passphrase would ask for it: nobody may be there to answer.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password=str)
    except (OSError, ValueError) as error:
        raise LexiconError(
            f"--tls-cert {certificate} cannot be used ({error}): give PEM, and the certificate's own key, which must "
            "have no passphrase"
        ) from error


def bound(host: str, port: int) -> "socket.socket":
    """A socket that has the address before anything slow is done, and does not listen yet.

    Raises:
        LexiconError: the port is taken, or the address is not this machine's.
    """
    import socket

    with saying(host, port):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        place = socket.socket(family, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # or the port is taken for a minute after a server has ended
                place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                place.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            place.bind(address)
        except OSError:
            place.close()
            raise
        return place


@contextmanager
def saying(host: str, port: int) -> Iterator[None]:
    """Raises a LexiconError that says why one cannot listen there."""
    import errno

    from lora_lexicon.errors import LexiconError

    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LexiconError(f"port {port} of {host} is taken: give another --port, or 0 for any") from error
        raise LexiconError(f"cannot listen at {host}, port {port} ({error.strerror or error}): give another") from error
