"""The processes that train one run together, as `accelerate launch` started them; one alone is such a run.

Every process does the same, on its own share of the rows; the main one alone writes. Knows nothing of what is trained.
"""

import os
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_lexicon.errors import ExpertError
from lora_lexicon.resources import accelerate_config

T = TypeVar("T")


def several() -> bool:
    """Whether this process was started as one of several; FSDP may have been asked for one alone."""
    return "LOCAL_RANK" in os.environ and (int(os.environ.get("WORLD_SIZE", "1")) > 1 or _asks_for_fsdp())


def join() -> torch.device:
    """Meets the others, on GPUs where there are some; returns this process's device.

    Raises:
        ExpertError: they were started without FSDP2.
    """
    if not several():
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not sharded() or os.environ.get("FSDP_VERSION") != "2":
        raise ExpertError(
            "several processes were started without FSDP2, by which they share a run: give --processes instead, or "
            f"accelerate launch --config_file {accelerate_config('fsdp')}"
        )
    return cast(torch.device, PartialState(cpu=not torch.cuda.is_available()).device)


def count() -> int:
    return dist.get_world_size() if several() else 1


def rank() -> int:
    """This one's number, from 0, which is the main one."""
    return dist.get_rank() if several() else 0


def sharded() -> bool:
    """Whether they shard what they train."""
    return several() and _asks_for_fsdp()


def _asks_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def total(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in each of them."""
    if several():
        dist.all_reduce(tensor)
    return tensor


def wait() -> None:
    """Until all have come here."""
    if several():
        dist.barrier()


def main_says(value: T) -> T:
    """The main process's value, which must pickle, in all of them."""
    said = [value]
    if several():
        dist.broadcast_object_list(said)
    return said[0]


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a shard; all must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Whole parameters on the CPU; empty but in the main process. All must ask for them."""
    found = {}
    for name, parameter in parameters.items():
        tensor = whole(parameter.detach())
        if rank() == 0:
            found[name] = tensor.cpu()
    return found


def put(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Gives a parameter a whole tensor's values; all must."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            shard = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.copy_(shard.to(parameter.dtype))
        else:
            parameter.copy_(tensor)
