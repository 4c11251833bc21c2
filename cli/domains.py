"""`lora-lexicon domains`."""

import typer

app = typer.Typer(no_args_is_help=True, help="domains")


@app.callback()
def _group() -> None: ...
