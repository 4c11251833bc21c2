"""`lora-lexicon pack`."""

import typer

app = typer.Typer(no_args_is_help=True, help="pack")


@app.callback()
def _group() -> None: ...
