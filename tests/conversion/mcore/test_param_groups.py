"""Settings of an optimizer's parameter groups that a checkpoint of another optimizer does not have."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

from megatron_embed.conversion.mcore.param_groups import take_groups

KEY = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}


@pytest.mark.parametrize("nested", [True, False])
def test_a_group_keeps_the_settings_that_only_its_optimizer_has(nested: bool) -> None:
    """Transformer Engine's FusedAdam reads ``bias_correction``, which no other optimizer saves."""
    own: list[dict[str, Any]] = [
        {**KEY, "lr": 1.0, "bias_correction": True, "params": LocalNonpersistentObject([0])},
        {**KEY, "wd_mult": 0.0, "lr": 1.0, "bias_correction": True, "params": LocalNonpersistentObject([1])},
    ]
    groups = {"param_groups": [{**KEY, "lr": 0.5, "step": 3, "params": [0]}]}
    loaded = {"optimizer": groups} if nested else groups
    assert not take_groups(loaded, own)
    assert groups["param_groups"] == [
        {**KEY, "lr": 0.5, "step": 3, "bias_correction": True, "params": [0]},
        {**KEY, "wd_mult": 0.0, "lr": 1.0, "bias_correction": True, "params": [1]},
    ]
