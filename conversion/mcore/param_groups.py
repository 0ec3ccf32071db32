"""Loading of a checkpoint whose parameter groups differ from the optimizer's.

megatron-core's checkpoint holds the groups as a list of settings, and merges it with the optimizer's own list by place.
With one group more or less on either side it can load nothing, although the state of every parameter is there.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.optimizer.optimizer import param_group_identifier_keys

Groups = list[dict[str, Any]]


def ask_for_saved_groups(wanted: dict[str, Any], saved: dict[str, Any]) -> Groups:
    """Make ``wanted`` ask for the groups that a checkpoint has, in its order.

    Args:
        wanted: the optimizer's sharded state; changed in place.
        saved: the optimizer's part of the checkpoint's plain values.

    Returns:
        The optimizer's own groups, for :func:`take_groups`; empty for an optimizer without parameters on this rank.
    """
    holder, of_checkpoint = _holder(wanted), _holder(saved)
    own: Groups = holder.get("param_groups", [])
    if own and "param_groups" in of_checkpoint:
        by_key = {_key(group): group for group in own}
        none: dict[str, Any] = {"params": LocalNonpersistentObject([])} if "params" in own[0] else {}
        holder["param_groups"] = [by_key.get(_key(group), none) for group in of_checkpoint["param_groups"]]
    return own


def take_groups(loaded: dict[str, Any], own: Groups) -> bool:
    """Put the optimizer's ``own`` groups into ``loaded``, with the checkpoint's settings where it has them.

    Returns:
        Whether the checkpoint has all of them.
    """
    if not own:
        return True
    holder = _holder(loaded)
    by_key = {_key(group): group for group in holder["param_groups"]}
    holder["param_groups"] = [{**_without_wrapper(group), **by_key.get(_key(group), {})} for group in own]
    return all(_key(group) in by_key for group in own)


def _holder(state: dict[str, Any]) -> dict[str, Any]:
    """Return the part that holds the groups: optimizers with main parameters have torch's state inside their own."""
    return state.get("optimizer", state)


def _key(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(name) for name in param_group_identifier_keys)


def _without_wrapper(group: dict[str, Any]) -> dict[str, Any]:
    params = group.get("params")
    return {**group, "params": params.unwrap()} if isinstance(params, LocalNonpersistentObject) else group
