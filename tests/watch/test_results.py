from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from cluster.watch.intervals import Accuracy, newcombe
from cluster.watch.results import verdict
from cluster.watch.tables import print_results, result_rows, without_table
from tests.watch.made_up import evaluation, result, with_outcomes


def test_collaboration_wins() -> None:
    outcome = verdict(evaluation(result(0.575, 0.907)))
    assert outcome.won
    assert outcome.difference == pytest.approx(0.415)
    assert outcome.low < outcome.difference < outcome.high
    assert outcome.text.startswith(
        "Collaboration wins: on composed the router answers 57.5%, the best baseline (route and answer) 16.0%: "
        "+41.5 points [+35.2, +47.3]; on the mean over tasks the router also beats route and answer, +24.6 points ["
    )
    assert outcome.hindsight == "With hindsight, the best expert for each prompt would reach 25.0% on composed."


def test_routing_wins() -> None:
    outcome = verdict(evaluation(result(0.05, 0.60)))
    assert not outcome.won
    assert outcome.high < 0
    assert outcome.text.startswith("On this mixture routing wins: on composed the router answers 5.0%")
    assert "-11.0 points [" in outcome.text
    assert "on the mean over tasks routing wins (route and answer), -17.0 points [" in outcome.text


def test_a_small_difference_is_not_a_win() -> None:
    outcome = verdict(evaluation(result(0.17, 0.60)))
    assert outcome.low < 0 < outcome.high
    assert not outcome.won
    assert outcome.text.startswith("No difference shown: on composed the router answers 17.0%")


def test_hindsight_is_no_baseline() -> None:
    systems = evaluation(result(0.22, 0.83))
    outcome = verdict(systems)
    assert outcome.won, "better than every baseline, though not than the oracle"
    assert outcome.comparisons[0].baseline == "route_and_answer"


def test_the_winner_is_named_after_what_it_is() -> None:
    lost = result(0.01, 0.01)
    assert "On this mixture a single expert wins" in verdict({"router": lost, "experts/a": result(0.5, 0.5)}).text
    assert "On this mixture the policy alone wins" in verdict({"router": lost, "frozen_policy": result(0.5, 0.5)}).text


def test_without_a_composed_task_the_mean_decides() -> None:
    router, routing = ({"tasks": {"aiw": share}, "mean": share, "prompts": {"aiw": 200}} for share in (0.743, 0.95))
    outcome = verdict({"router": router, "route_and_answer": routing})  # type: ignore[dict-item]
    assert outcome.text.startswith("On this mixture routing wins: on the mean over tasks the router answers 74.3%")
    assert len(outcome.comparisons) == 1


def test_outcomes_make_the_interval_paired() -> None:
    router, routing = with_outcomes(result(0.20, 0.83)), with_outcomes(result(0.16, 0.83))
    paired = verdict({"router": router, "route_and_answer": routing})
    unpaired = verdict({"router": result(0.20, 0.83), "route_and_answer": result(0.16, 0.83)})
    assert paired.won and paired.comparisons[0].paired
    assert not unpaired.won and not unpaired.comparisons[0].paired


def test_outcomes_without_spread_are_not_certainty() -> None:
    router, policy = with_outcomes(result(1.0, 1.0, 3), 3), with_outcomes(result(0.0, 0.0, 3), 3)
    comparison = verdict({"router": router, "frozen_policy": policy}).comparisons[0]
    independent = newcombe([Accuracy(1.0, 3)], [Accuracy(0.0, 3)])
    assert comparison.low <= independent.low and comparison.difference == comparison.high == 1.0
    assert comparison.paired


def test_a_win_that_shuffled_features_share_is_qualified() -> None:
    systems = evaluation(result(0.575, 0.907))
    systems["shuffled_within_task"] = result(0.57, 0.90)
    text = verdict(systems).text
    assert "features of other prompts do as well (+0.5 points [" in text
    assert "features of other prompts" not in verdict(evaluation(result(0.575, 0.907))).text


def test_there_must_be_something_to_compare() -> None:
    with pytest.raises(ValueError, match="no baseline was evaluated on composed"):
        verdict({"router": result(0.5, 0.5), "oracle_route": result(0.6, 0.6)})
    with pytest.raises(ValueError, match="has no router, only frozen_policy"):
        verdict({"frozen_policy": result(0.5, 0.5)})


def test_the_verdict_fits_into_the_summary() -> None:
    summary = json.loads(json.dumps(verdict(evaluation(result(0.575, 0.907))).summary()))
    assert summary["won"] is True
    assert summary["comparisons"][1]["column"] == "mean"


def test_the_best_of_each_column_is_marked_without_hindsight() -> None:
    rows = {row.system: row.cells for row in result_rows(evaluation(result(0.575, 0.80)))}
    assert [cell.best for cell in rows["router"]] == [True, False, True]
    assert [cell.best for cell in rows["experts/chain_sum"]] == [False, True, False]
    assert not any(cell.best for cell in rows["oracle_route"])


def test_what_stands_in_for_an_expert_is_told_where_it_helps() -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    shares = {"x": 0.2, "mean": 0.2}
    one = {"hidden": shares, "stood_in": {"x": 0.875, "mean": 0.875}, "used": True}
    two = {"hidden": {"x": 0.7, "mean": 0.7}, "stood_in": shares, "used": False}
    console.print(without_table({"whole": {"x": 0.9, "mean": 0.9}, "without": {"one": one, "two": two}}))
    rows = [line.split() for line in console.export_text().splitlines() if line.split()[-2:-1]]
    assert ["router", "90.0", "90.0"] in rows and ["without", "one", "20.0", "20.0"] in rows
    assert ["stand-in", "for", "one", "87.5", "87.5"] in rows and ["without", "two", "70.0", "70.0"] in rows
    assert not any(row[:3] == ["stand-in", "for", "two"] for row in rows)


def test_the_printed_results_hold_every_number() -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    print_results(
        console,
        evaluation(result(0.575, 0.907)),
        before={"router": result(0.07, 0.11)},
        attention={"composed": {"chain_sum": 0.47, "leg_counting": 0.53}},
    )
    lines = console.export_text().splitlines()
    router = next(line for line in lines if line.split()[:1] == ["router"])
    # Wilson: 230 of 400 is 52.6 to 62.3, 363 of 400 is 87.5 to 93.2.
    assert router.split() == ["router", "57.5", "53–62", "90.7", "87–93", "74.1", "71–77"]
    assert next(line for line in lines if "before training" in line).split()[3] == "7.0"
    assert next(line for line in lines if "0.47" in line).split()[0] == "composed"
    assert any(line.startswith("Collaboration wins") for line in lines)
    assert lines[-1].startswith("With hindsight")
