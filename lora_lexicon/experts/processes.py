"""The processes that train one run together, as `accelerate launch` started them; one alone is such a run.

Every process does the same, on its own share of the rows; the main one alone writes. Knows nothing of what is trained.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_lexicon.errors import ExpertError, MissingExtraError
from lora_lexicon.resources import accelerate_config

T = TypeVar("T")


def several() -> bool:
    """Whether this process was started as one of several; sharding may have been asked for one alone."""
    asked = int(os.environ.get("WORLD_SIZE", "1")) > 1 or _asks_for("FSDP") or _asks_for("DEEPSPEED")
    return "LOCAL_RANK" in os.environ and asked


def join() -> torch.device:
    """Meets the others, on GPUs where there are some; returns this process's device.

    Raises:
        ExpertError: they were started without FSDP2 and without DeepSpeed.
        MissingExtraError: with DeepSpeed, which is not installed.
    """
    if not several():
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if zero():
        need_deepspeed()
    elif not _asks_for("FSDP") or os.environ.get("FSDP_VERSION") != "2":
        raise ExpertError(
            "several processes were started without FSDP2 or DeepSpeed, by which they share a run: give --processes "
            f"instead, or accelerate launch --config_file {accelerate_config('fsdp')}"
        )
    return cast(torch.device, PartialState(cpu=not torch.cuda.is_available()).device)


def need_deepspeed() -> None:
    """Raises MissingExtraError where it is not installed."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("DeepSpeed's zero3", "deepspeed", "deepspeed") from error


def count() -> int:
    return dist.get_world_size() if several() else 1


def rank() -> int:
    """This one's number, from 0, which is the main one."""
    return dist.get_rank() if several() else 0


def zero() -> bool:
    """Whether they shard what they train by DeepSpeed's ZeRO, instead of FSDP."""
    return several() and _asks_for("DEEPSPEED")


def _asks_for(way: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true"


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


def shard(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Leaves each process a shard, in this dtype if one is given, of a model that all have loaded, by ZeRO."""
    from deepspeed import zero

    if dtype:  # ZeRO adds to float32 shards of its own
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    device = zero.Init(module=model).local_device
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for module in model.modules():
        for held in module.children():
            if isinstance(held, nn.ParameterList):  # without a forward pass of its own, before which to gather it
                for parameter in held:
                    zero.register_external_parameter(module, parameter)


def release(engine: Any) -> None:
    """Frees a run's shards, which ZeRO's own hooks would hold as long as the process lives."""
    engine.destroy()
    for parameter in engine.module.parameters():
        del parameter.ds_tensor
    engine.basic_optimizer.state.clear()
    vars(engine.optimizer).clear()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a shard; all must ask for it."""
    if hasattr(tensor, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([cast(nn.Parameter, tensor)]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Whole parameters on the CPU; empty but in the main process. All must ask for them."""
    found = {}
    for name, parameter in parameters.items():
        tensor = whole(parameter)
        if rank() == 0:
            found[name] = tensor.cpu()
    return found


def put(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Gives a parameter a whole tensor's values; all must. ZeRO's float32 shards are its checkpoints' matter."""
    with torch.no_grad():
        if hasattr(parameter, "ds_id"):
            from deepspeed import zero

            with zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensor)
        elif isinstance(parameter, DTensor):
            shard = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.copy_(shard.to(parameter.dtype))
        else:
            parameter.copy_(tensor)
