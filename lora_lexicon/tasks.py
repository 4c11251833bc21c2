"""Runs a list of independent tasks, here or on Ray. Knows nothing of what they do. Imports only `errors`.

On Ray each task is a process on some machine, with CPUs and GPUs of its own. One whose process dies (killed, out of
memory, its machine gone) is run again, and goes on from whatever it left on disk. Tasks run in the folder that this
process is in, so paths mean the same; on several machines it, and what tasks write, must lie on a file system that
all of them share.
"""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lora_lexicon.errors import LexiconError, MissingExtraError

R = TypeVar("R")
Progress = Callable[..., object]  # (number of the task, what it reports)
LOGGER = logging.getLogger("lora_lexicon")
RETRIES = 3  # of each task
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Here:
    """Tasks run in this process, one after the other."""

    slots: int = 1

    def run(
        self,
        function: Callable[..., R],
        tasks: Sequence[tuple[Any, ...]],
        names: Sequence[str],
        progress: Progress | None = None,
    ) -> list[R]:
        """`function(*task, report)` of each task."""
        return [function(*task, partial(progress or _ignore, number)) for number, task in enumerate(tasks)]


@dataclass(frozen=True)
class OnRay:
    """Tasks run on the Ray that this process is connected to (see `connect`).

    Attributes:
        cpus, gpus: what each task gets.
        slots: how many tasks the cluster runs at once.
    """

    cpus: int
    gpus: float
    slots: int

    def run(
        self,
        function: Callable[..., R],
        tasks: Sequence[tuple[Any, ...]],
        names: Sequence[str],
        progress: Progress | None = None,
    ) -> list[R]:
        """`function(*task, report)` of each task, as processes on the cluster; `names` are for messages.

        Where a task fails the others are finished, so that nothing they did is lost; then its error is raised.

        Args:
            function: of a module that the machines have installed too.

        Raises:
            LexiconError: what a task raised, or a task whose process died more than `RETRIES` times.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=beside).remote()
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": RETRIES}
        if not self.gpus:  # Ray leaves all GPUs visible to a task that asked for none
            options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        remote: Any = ray.remote(_in_worker)
        waiting = {
            remote.options(name=name, **options).remote(function, task, number, os.getcwd(), mailbox): number
            for number, (name, task) in enumerate(zip(names, tasks, strict=True))
        }
        found: dict[int, R] = {}
        errors: list[Exception] = []
        starts = [0] * len(tasks)

        def read() -> None:
            for number, kind, what in ray.get(mailbox.take.remote()):
                if kind == "progress":
                    (progress or _ignore)(number, *what)
                elif kind == "log":
                    LOGGER.warning("%s: %s", names[number], what)
                elif kind == "start":
                    if starts[number]:
                        LOGGER.warning("%s: its process died; it goes on on %s", names[number], what)
                    starts[number] += 1

        try:
            # What Ray itself says of a process that died it prints on standard output, where results go.
            with contextlib.redirect_stdout(sys.stderr):
                while waiting:
                    ready, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
                    read()
                    for reference in ready:
                        number = waiting.pop(reference)
                        try:
                            found[number] = ray.get(reference)
                            continue
                        except RayTaskError as error:
                            failed = error.cause if isinstance(error.cause, LexiconError) else error
                        except RayError as error:
                            failed = LexiconError(
                                f"{names[number]}: its process died {starts[number]} times ({type(error).__name__}): "
                                "see to the machines, and give the same command again"
                            )
                        errors.append(failed)
                        if waiting:
                            LOGGER.warning("%s failed, the others go on: %s", names[number], failed)
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            ray.kill(mailbox)
        if errors:
            raise errors[0]
        return [found[number] for number in range(len(tasks))]


Launcher = Here | OnRay


def connect(cpus: int | None = None, gpus: float | None = None) -> OnRay:
    """Connects to Ray: to the one at RAY_ADDRESS, else to one that runs on this machine, else to one that it starts.

    Args:
        cpus: of each task; by default one where it has a GPU, else those of the largest machine.
        gpus: of each task, at most one; by default one where the cluster has any.

    Raises:
        MissingExtraError: Ray is not installed.
        LexiconError: no Ray answers at RAY_ADDRESS, or no machine of the cluster has what a task needs.
    """
    need_ray()
    import ray

    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = os.environ.get("RAY_ADDRESS", "this machine")
            raise LexiconError(
                f"no Ray answers at {where} ({error}): start it, or unset RAY_ADDRESS; "
                "one that asks for tokens also needs RAY_AUTH_MODE=token"
            ) from error
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = min(1.0, max(machine.get("GPU", 0) for machine in machines))
    if cpus is None:
        cpus = 1 if gpus else int(max(machine.get("CPU", 0) for machine in machines))
    slots = sum(_slots(machine, cpus, gpus) for machine in machines)
    if not slots:
        raise LexiconError(
            f"no machine of this Ray has {cpus} CPUs and {gpus:g} GPUs for a task: ask for less with --cpus and --gpus"
        )
    return OnRay(cpus, gpus, slots)


def need_ray() -> None:
    """Raises MissingExtraError where Ray is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read on import
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("--on ray", "ray", "ray") from error


def _slots(machine: dict[str, float], cpus: int, gpus: float) -> int:
    """How many tasks a machine runs at once."""
    by_cpu = int(machine.get("CPU", 0) / cpus)
    return min(by_cpu, int(machine.get("GPU", 0) / gpus)) if gpus else by_cpu


class _Mailbox:
    """An actor that tasks tell what they do, and that the driver asks."""

    def __init__(self) -> None:
        self.items: list[tuple[int, str, Any]] = []

    def put(self, number: int, kind: str, what: Any) -> None:
        self.items.append((number, kind, what))

    def take(self) -> list[tuple[int, str, Any]]:
        items, self.items = self.items, []
        return items


class _Forward(logging.Handler):
    """Warnings of a task's process, for the person in front of the driver."""

    def __init__(self, put: Callable[[str, Any], object]) -> None:
        super().__init__(logging.WARNING)
        self.put = put

    def emit(self, record: logging.LogRecord) -> None:
        self.put("log", record.getMessage())


def _in_worker(function: Callable[..., R], task: tuple[Any, ...], number: int, folder: str, mailbox: Any) -> R:
    """One task, in its own process."""
    import ray

    def put(kind: str, what: Any) -> Any:
        return mailbox.put.remote(number, kind, what)  # nobody waits for it, and a mailbox that is gone is no error

    host, forward = socket.gethostname(), _Forward(put)
    ray.get(put("start", host))  # a process that dies soon is counted too
    if not Path(folder).is_dir():
        raise LexiconError(f"{folder} is not on {host}: with --on ray, work in a folder that all machines share")
    LOGGER.addHandler(forward)
    try:
        with contextlib.chdir(folder):
            result = function(*task, lambda *what: put("progress", what))
        ray.get(put("end", None))  # so that the driver has read all before it has the result
        return result
    finally:
        LOGGER.removeHandler(forward)


def _ignore(*_: Any) -> None:
    """No progress is shown."""
