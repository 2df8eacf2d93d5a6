"""Models whose parameters lie in parts on two processes."""

from __future__ import annotations

import dtensor_processes as processes


def test_both_entrances_of_a_sharded_model_agree_with_the_whole_one(gloo) -> None:
    gloo(2, processes.assert_sharded_models_agree)
