"""The app: every command group in one place. Imports nothing heavy, so that `--help` answers at once."""

from typing import Annotated

import typer

from . import (
    compose,
    data,
    demo,
    doctor,
    domains,
    evaluate,
    experiment,
    human,
    incontext,
    pack,
    plan,
    report,
    score,
    serve,
    train,
    use,
)  # fmt: skip

app = typer.Typer(
    name="lora-lexicon",
    help="Definition modelling with a mixture of domain experts: from a dictionary to definitions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help takes half the time
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.add_typer(domains.app, name="domains")
app.add_typer(train.app, name="train")
app.add_typer(compose.app, name="compose")
app.add_typer(pack.app, name="pack")
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)
app.command("route")(use.route)
app.command("define")(use.define)
app.command("evaluate")(evaluate.evaluate)
app.command("score")(score.score)
app.command("experiment")(experiment.experiment)
app.command("incontext")(incontext.incontext)
app.add_typer(human.app, name="human")
app.command("report")(report.report)
app.command("serve")(serve.serve)


def _version(asked: bool) -> None:
    if asked:
        from lora_lexicon import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Definition modelling with a mixture of domain experts."""


if __name__ == "__main__":  # `accelerate launch --module lora_lexicon.cli.main`
    app(prog_name="lora-lexicon")
