"""A run that the admitted sites cannot carry out is refused before any of them is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.types import BadInput
from server.deployment.admitted_sites import admit_site
from server.deployment.federation import Federation
from server.deployment.run_checks import check_run
from tests.server.deployment.federations import new_federation, write_key_pair
from tests.tiny import run_config


@pytest.fixture(scope="module")
def four_sites(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("four")
    federation = new_federation(folder / "fed")
    for name in ("a", "b", "c", "d"):
        admit_site(federation, name, write_key_pair(folder, name))
    return federation


def check(federation: Federation, folder: Path, aggregation: dict[str, Any], **cohort: Any) -> None:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(aggregation=aggregation, cohort=cohort).model_dump(mode="json")))
    check_run(federation, path, [])


@pytest.mark.parametrize(
    ("aggregation", "cohort"),
    [
        ({"kind": "median"}, {}),
        ({"kind": "trimmed_mean", "trim": 1}, {}),
        ({"kind": "trimmed_mean", "trim": 1}, {"fraction": 0.5, "min_sites": 3}),
        ({"kind": "mean"}, {"min_replies_per_task": 4}),
    ],
)
def test_enough_sites_are_enough(
    four_sites: Federation, tmp_path: Path, aggregation: dict[str, Any], cohort: dict[str, Any]
) -> None:
    check(four_sites, tmp_path, aggregation, **cohort)


@pytest.mark.parametrize(
    ("aggregation", "cohort", "said"),
    [
        ({"kind": "krum", "byzantine": 1}, {}, r"4 site\(s\) that a round asks .* krum .* need 5"),
        ({"kind": "trimmed_mean", "trim": 2}, {}, r"4 site\(s\) that a round asks .* trimmed_mean .* need 5"),
        ({"kind": "trimmed_mean", "trim": 1}, {"fraction": 0.5}, r"2 site\(s\) that a round asks .* need 3"),
        ({"kind": "mean"}, {"fraction": 0.5, "min_replies_per_task": 3}, r"2 site\(s\) that a round asks .* need 3"),
    ],
)
def test_too_few_sites_for_the_aggregator_are_named_in_one_sentence(
    four_sites: Federation, tmp_path: Path, aggregation: dict[str, Any], cohort: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        check(four_sites, tmp_path, aggregation, **cohort)
    assert "\n" not in str(refused.value)


WIDE = {"colour": {"kind": "classification", "labels": ["red", "green", "blue"], "head": {"hidden": 40_000}}}
"""320,003 parameters: 1.22 MiB, and half of that in float16."""


def test_a_run_whose_updates_are_larger_than_an_upload_is_refused_beforehand(tmp_path: Path) -> None:
    """Each site would be charged for a round whose reply it could not send."""
    federation = new_federation(tmp_path / "fed", max_upload_mib=1)
    admit_site(federation, "north", write_key_pair(tmp_path, "north"))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(tasks=WIDE).model_dump(mode="json")))
    with pytest.raises(BadInput, match=r"at most max_upload_mib .* 1 MiB, got 1\.2 MiB"):
        check_run(federation, path, [])
    check_run(federation, path, ["delta_precision=float16"])


def test_a_prior_for_which_no_head_is_served_is_refused_beforehand(four_sites: Federation, tmp_path: Path) -> None:
    declared = {"kind": "classification", "labels": ["red", "blue"], "prior": {"red": 0.9, "blue": 0.1}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(tasks={"colour": declared}).model_dump(mode="json")))
    with pytest.raises(BadInput, match=r"tasks\.colour\.prior: expected `head: \{prior: true\}`"):
        check_run(four_sites, path, [])
