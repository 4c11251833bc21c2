"""Starts the command again in several processes, by accelerate's own launcher."""

import logging
import os
import sys
from enum import StrEnum
from typing import Any

import typer

from .console import LAUNCHED


class Sharding(StrEnum):
    """By what several processes hold a shard each: FSDP2, or DeepSpeed's ZeRO stage 3."""

    fsdp = "fsdp"
    zero3 = "zero3"


def launch(processes: int, sharding: Sharding | None) -> bool:
    """Runs this same command in so many processes, by accelerate; False in a process that was so started.

    Whether they can run here is `check_training`'s matter.
    """
    started = os.environ.get("WORLD_SIZE")
    if started is not None and "LOCAL_RANK" in os.environ:
        if int(started) != processes:
            raise typer.BadParameter(f"--processes is {processes}, and {started} processes have been started already")
        found = Sharding.zero3 if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else Sharding.fsdp
        if (sharding or found) is not found:
            raise typer.BadParameter(f"--sharding is {sharding}, and processes have been started with {found}")
        return False

    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from lora_lexicon.resources import accelerate_config

    config = ["--config_file", str(accelerate_config(sharding or Sharding.fsdp)), "--num_processes", str(processes)]
    command = ["--module", "lora_lexicon.cli.main", *sys.argv[1:]]
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # of an error our line is enough
    try:
        with patch_environment(**{LAUNCHED: "1"}):
            launch_command(launch_command_parser().parse_args([*config, *command]))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        why = f"process {number} ended with exit code {failure.exitcode}"
        said: Any = failure.message
        if isinstance(said, dict):  # {"message": "RecipeError: ..."}, of one that could still say why
            why = said["message"].partition(": ")[2]
        typer.echo(f"error: {why}", err=True)
        raise typer.Exit(1) from None
    except SignalException as error:
        raise typer.Exit(128 + error.sigval) from None
    return True
