"""`lora-lexicon compose`."""

import typer

app = typer.Typer(no_args_is_help=True, help="compose")


@app.callback()
def _group() -> None: ...
