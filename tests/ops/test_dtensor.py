"""Ops whose parameters, or rows, are DTensors of two processes: the values and gradients of one process."""

from __future__ import annotations

import dtensor_processes as processes


def test_parameters_are_gathered_and_get_the_mean_gradient(gloo) -> None:
    gloo(2, processes.assert_own_rows_give_the_mean)


def test_losses_of_rows_that_are_dtensors(gloo) -> None:
    gloo(2, processes.assert_losses_of_all_rows)


def test_wrong_rows_are_refused_by_name(gloo) -> None:
    gloo(1, processes.assert_wrong_rows_are_refused)
