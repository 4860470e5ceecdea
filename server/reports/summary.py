"""Every report is a view of the journal: the summary (stable JSON) and the tables a person reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.privacy.accounting import Mechanism, epsilon, rounded_up
from common.types import RELATION, Plan, Unit

Facts = list[dict[str, Any]]
Summary = dict[str, Any]

FLOWER_APP = "flower_app"
"""Executor of `flwr run`: sites may be anywhere, and nothing of their held-out records is seen."""

DEPLOYMENT = "deployment"
"""Executor of `python -m server start`: the same."""

BASELINES = {
    "obvious": "obvious,\nuntrained",
    "local": "site alone\nprivate",
    "non_private": "federated\nnot private",
    "central": "central\nnot private",
    "random_backbone": "federated\nprivate\nrandom\nbackbone",
}


AUDIT = ("passed", "epsilon_claimed", "epsilon_lower_95", "epsilon_lower_99_9", "noise_std_ratio", "delta", "reasons")


def summarize(facts: Facts) -> Summary:
    """The run's summary, schema 1 (documented in README).

    Args:
        facts: the journal's lines.
    """
    about = _last(facts, "run_started") or {}
    ended = _last(facts, "run_ended")
    rounds = [fact for fact in facts if fact["event"] == "round"]
    backbones = about.get("backbones", {})
    return {
        "schema": 1,
        "run": about.get("name"),
        "path": about.get("path"),
        "executor": about.get("executor"),
        "rounds": len(rounds),
        "status": "completed" if ended and all(ended["updates"].values()) else "failed",
        "backbone": next(iter(backbones.values())) if len(backbones) == 1 else None,
        "backbones": backbones,
        "tasks": {name: _task(facts, name, kind) for name, kind in about.get("tasks", {}).items()},
        "sites": _sites(facts, rounds),
        "audit": _audit(facts),
        "bytes": _bytes(facts, rounds),
        "seconds": _seconds(facts, rounds),
    }


def tables(summary: Summary) -> Group:
    """What the run brought and what it cost, for a terminal."""
    evaluated = any(task["metrics"] for task in summary["tasks"].values())
    results: list[RenderableType] = [_results_table(summary)] if evaluated else []
    if any(task["evaluation"] for task in summary["tasks"].values()):
        results.append(_evaluation_table(summary))
    footnote = Text(_footnote(summary, evaluated), no_wrap=True, overflow="ignore")
    return Group(*results, _sites_table(summary), footnote)


# --- summary ---------------------------------------------------------------------------------------------------------


def _last(facts: Facts, event: str) -> dict[str, Any] | None:
    found = [fact for fact in facts if fact["event"] == event]
    return found[-1] if found else None


def _task(facts: Facts, name: str, kind: str) -> dict[str, Any]:
    ended = _last(facts, "run_ended")
    updates = ended["updates"].get(name, 0) if ended else 0
    metrics = next((fact for fact in facts if fact["event"] == "metrics" and fact["task"] == name), None)
    return {
        "kind": kind,
        "status": "updated" if updates else "never_updated",
        "updates": updates,
        "sites": sorted(fact["site"] for fact in facts if fact["event"] == "joined" and name in fact["tasks"]),
        "metrics": metrics["pooled"] if metrics else {},
        "per_site": metrics["per_site"] if metrics else {},
        "evaluation": _evaluation(facts, name),
        "baselines": {
            fact["name"]: fact["metrics"][name]
            for fact in facts
            if fact["event"] == "baseline" and name in fact["metrics"]
        },
    }


def _evaluation(facts: Facts, name: str) -> dict[str, Any] | None:
    """What sites released of their held-out units, noised and charged; None where none did."""
    rounds = [{"round": fact["round"], **fact["tasks"][name]} for fact in _evaluations(facts) if name in fact["tasks"]]
    return {**rounds[-1], "rounds": rounds} if rounds else None


def _evaluations(facts: Facts) -> Facts:
    """The last evaluation after each round: a resumed run repeats what it got."""
    return list({fact["round"]: fact for fact in facts if fact["event"] == "evaluation"}.values())


def _sites(facts: Facts, rounds: Facts) -> dict[str, Any]:
    evaluations = _evaluations(facts)
    sites: dict[str, Any] = {}
    joined_at: dict[str, int] = {}
    for position, fact in enumerate(facts):
        if fact["event"] == "joined":
            joined_at.setdefault(fact["site"], position)
            sites[fact["site"]] = {
                "status": "completed",
                "reason": None,
                "epsilon": _accounted(fact, rounds, evaluations),
                "delta": fact["delta"],
                "unit": fact["unit"],
                "relation": RELATION,
                "budget_epsilon": fact["budget_epsilon"],
                "rounds": sum(fact["site"] in item["sites"] for item in rounds),
                "evaluations": sum(fact["site"] in item["noise"] for item in evaluations),
                "left_out": None,
            }
    for position, fact in enumerate(facts):
        if fact["event"] == "set_aside":
            if position < joined_at.get(fact["site"], 0):
                continue  # Asked again, it joined: its staff had not approved the run yet.
            empty = dict.fromkeys(("epsilon", "delta", "unit", "relation", "budget_epsilon", "left_out"))
            site = sites.setdefault(fact["site"], {**empty, "rounds": 0, "evaluations": 0})
            declined = fact["reason"].startswith("declined")
            site["status"] = "partial" if site["rounds"] else ("declined" if declined else "set_aside")
            site["reason"] = fact["reason"]
        elif fact["event"] == "epsilon":
            sites[fact["site"]]["epsilon"] = fact["epsilon"]
        elif fact["event"] == "left_out":
            sites[fact["site"]]["left_out"] = {"records": fact["records"], "listed": fact["listed"]}
    return dict(sorted(sites.items()))


def _accounted(joined: Mapping[str, Any], rounds: Facts, evaluations: Facts) -> float | None:
    """Epsilon of the accepted contributions and evaluations, from their public numbers; None without privacy.

    A site may have spent more than the coordinator accepted: its own ledger has the last word, and a simulation puts
    that in its place.
    """
    own = [item["sites"][joined["site"]]["plan"] for item in rounds if joined["site"] in item["sites"]]
    plans = [Plan(**{**plan, "unit": Unit(plan["unit"])}) for plan in own]
    if not plans or not all(plan.private for plan in plans):
        return None
    noises = [item["noise"][joined["site"]] for item in evaluations if joined["site"] in item["noise"]]
    held_out = [Mechanism("gaussian", noise, 1.0, 1, 1.0) for noise in noises]
    return epsilon([*(Mechanism.of(plan) for plan in plans), *held_out], joined["delta"])


def _audit(facts: Facts) -> dict[str, Any]:
    """Whether the run required an audit, and the result of the simulator's own; a site's own result stays there."""
    about, own = _last(facts, "run_started") or {}, _last(facts, "audit")
    found = dict.fromkeys(AUDIT) if own is None else {name: own[name] for name in AUDIT}
    return {"required": own is not None or bool(about.get("audit_required")), **found}


def _bytes(facts: Facts, rounds: Facts) -> dict[str, int | None]:
    down = [size["down"] for item in rounds for size in item["sites"].values()]
    up = [size["up"] for item in rounds for size in item["sites"].values()]
    received: dict[str, int] = {}
    for fact in facts:
        if fact["event"] == "backbone_sent":
            received[fact["site"]] = received.get(fact["site"], 0) + fact["bytes"]
    return {
        "down_per_site_round": _mean(down),
        "up_per_site_round": _mean(up),
        "backbone_per_site": max(received.values(), default=None),
    }


def _mean(values: list[int]) -> int | None:
    return round(sum(values) / len(values)) if values else None


def _seconds(facts: Facts, rounds: Facts) -> dict[str, float]:
    times = [fact["time"] for fact in facts]
    features = _last(facts, "features_ready")
    return {
        "total": round(times[-1] - times[0], 3) if times else 0.0,
        "features": features["seconds"] if features else 0.0,
        "training": round(sum(item["seconds"] for item in rounds), 3),
        "baselines": round(sum(fact["seconds"] for fact in facts if fact["event"] == "baseline"), 3),
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def _results_table(summary: Summary) -> Table:
    shown = [name for name in BASELINES if any(name in task["baselines"] for task in summary["tasks"].values())]
    private = any(site["epsilon"] is not None for site in summary["sites"].values())
    table = Table(title=f"{summary['run']}: pooled held-out records", title_justify="left", box=box.SIMPLE)
    table.add_column("task")
    table.add_column("metric", no_wrap=True)
    table.add_column("federated\nprivate" if private else "federated\nnot private", style="bold", justify="right")
    for name in shown:
        table.add_column(BASELINES[name], justify="right")
    for task, facts in summary["tasks"].items():
        for position, metric in enumerate(facts["metrics"]):
            values = [facts["metrics"], *(facts["baselines"].get(name, {}) for name in shown)]
            table.add_row(task if position == 0 else "", metric, *(_number(value.get(metric)) for value in values))
    return table


def _evaluation_table(summary: Summary) -> Table:
    title = f"{summary['run']}: held-out units as the sites released them: noised, charged to their budgets"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("task", "metric", "noised", "standard error\nof the noise", "after round", "sites"):
        table.add_column(column, justify="right" if column.startswith(("noised", "standard")) else "left")
    for task, facts in summary["tasks"].items():
        found = facts["evaluation"]
        if found is None:
            continue
        for position, (metric, value) in enumerate(found["metrics"].items()):
            first = position == 0
            table.add_row(
                task if first else "",
                metric,
                _number(value),
                _number(found["standard_errors"][metric]),
                str(found["round"]) if first else "",
                str(len(found["sites"])) if first else "",
            )
    return table


def _sites_table(summary: Summary) -> Table:
    table = Table(title="sites", title_justify="left", box=box.SIMPLE)
    for column in ("site", "tasks", "status", "rounds", "epsilon\nof budget", "delta", "unit\nneighbours"):
        table.add_column(column)
    for name, site in summary["sites"].items():
        tasks = [task for task, facts in summary["tasks"].items() if name in facts["sites"]]
        status = site["status"] + (f" ({site['reason']})" if site["reason"] else "")
        table.add_row(
            name,
            ", ".join(tasks),
            status,
            str(site["rounds"]),
            _spent(site),
            f"{site['delta']:g}" if site["delta"] else "",
            f"{site['unit']}\n{site['relation']}" if site["unit"] else "",
        )
    return table


def _spent(site: Mapping[str, Any]) -> str:
    if site["epsilon"] is None:
        return "not private" if site["rounds"] else "nothing"
    return f"{rounded_up(site['epsilon']):.2f}\nof {site['budget_epsilon']:.2f}"


def _footnote(summary: Summary, evaluated: bool) -> str:
    size, seconds = summary["bytes"], summary["seconds"]
    down, up = _count(size["down_per_site_round"]), _count(size["up_per_site_round"])
    times = ", ".join(f"{seconds[name]:.1f} {name}" for name in ("features", "training", "baselines"))
    left_out = "".join(
        f"{name}: {site['left_out']['records']} record(s) left out, listed in {site['left_out']['listed']}\n"
        for name, site in summary["sites"].items()
        if site["left_out"]
    )
    backbone = _count(size["backbone_per_site"])
    audit = _audited(summary["audit"])
    view = "Baselines and pooled metrics are the simulator's own view, outside the privacy promise."
    return (
        f"{left_out}{audit}bytes per site and round: {down} down, {up} up; backbone once per site: {backbone}\n"
        f"seconds: {seconds['total']:.1f} in all; {times}" + (f"\n{view}" if evaluated else "")
    )


def _audited(audit: Mapping[str, Any]) -> str:
    if audit["passed"] is None:
        return "audit: required; each site passed its own before it joined\n" if audit["required"] else ""
    verdict = "passed" if audit["passed"] else f"FAILED: {audit['reasons'][0]}"
    claimed, shown = rounded_up(audit["epsilon_claimed"]), audit["epsilon_lower_95"]
    return (
        f"audit: {verdict}; epsilon {claimed:.2f} claimed, at least {shown:.2f} at 95 % confidence; "
        f"noise ratio {audit['noise_std_ratio']:.3f}\n"
    )


def _count(value: int | None) -> str:
    return "none sent" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def failures(summary: Summary) -> Iterable[str]:
    """What went wrong, one sentence each; nothing when the run is whole."""
    for name, task in summary["tasks"].items():
        if task["status"] == "never_updated":
            yield f"task {name} was never updated: no site's contribution was accepted"
        elif not task["metrics"] and summary["executor"] not in (FLOWER_APP, DEPLOYMENT):
            yield f"task {name} could not be evaluated: no site holds out a record with its label"
