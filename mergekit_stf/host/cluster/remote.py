"""What runs on the nodes of a Ray cluster: these functions, and no others.

Ray finds them by their names in the package that is installed on the node.
"""

from __future__ import annotations

import socket

import ray
import torch

from mergekit_stf.host.executors.messages import Merge, Order, Reply
from mergekit_stf.host.executors.nodes import check_node, kind_of_device
from mergekit_stf.host.executors.worker import merge_here


def merge_on_node(order: Order, merge: Merge) -> Reply:
    """Merge one weight on the card that Ray has given to this task, or on its cores."""
    device = _device(merge.options.device)
    reply = merge_here(order, merge, node_name(), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the next task of this process may get another card
    return reply


def check_this_node(merge: Merge) -> tuple[str, str, int]:
    """Compare this node with the driver's.

    Returns:
        The name of the node, the kind of its devices, and the bytes of a card's memory.

    Raises:
        STFError: the node lacks something or has another version.
    """
    name = node_name()
    check_node(merge.expected, name, merge.options.transformers_cache)
    device = _device(merge.options.device)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return name, kind_of_device(device), memory


def warm_up() -> None:
    """Have this module and all that it imports in the process."""


def node_name() -> str:
    """Return the name of this node: that of its machine, and the beginning of Ray's number."""
    return named(socket.gethostname(), ray.get_runtime_context().get_node_id())


def named(host: str, number: str) -> str:
    """Return the name of a node of a cluster, of which a machine may run several."""
    return f"{host}/{number[:6]}"


def _device(asked: str | None) -> torch.device:
    """Return the device of a task, a card being made that of all that only says ``cuda``."""
    device = torch.device(asked or "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(ray.get_gpu_ids()[0]))
        torch.cuda.set_device(device)
    return device
