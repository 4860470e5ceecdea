"""The training units of many sites side by side in one set of arrays: for simulations, where one process has them all.

Units are numbered site by site, and so are records: a site's own are a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.units import DecodedFeatures, TaskRecords, Units


@dataclass(frozen=True)
class ManyUnits:
    """Units of many sites.

    Attributes:
        units: all units together; the records of each task are in the order of their sites.
        start_S: int64 [S + 1], the first unit of each site, and the number of all units.
        rows: task -> int64 [S + 1], its first record of each site, and the number of all its records.
    """

    units: Units = field(repr=False)
    start_S: NDArray[np.int64] = field(repr=False)
    rows: dict[str, NDArray[np.int64]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.start_S) - 1

    @classmethod
    def divide(cls, units: Units, sites: Sequence[NDArray[np.int64]], num_sites: int) -> ManyUnits:
        """Returns the units of one place as those of the sites that its records belong to.

        A unit of which several sites have records becomes a unit of each. Within a site, records and units keep their
        order, so that a site has what it would have prepared by itself.

        Args:
            units: all units, numbered in the order of their first records.
            sites: for each task of `units.tasks`, the site of each of its records, from 0; -1 for one that is left out.
            num_sites: number of sites S, also of those without a record.
        """
        # One number for each unit of each site, ascending by site, then by the unit's number.
        keys = [
            own * units.num_units + records.unit_R.numpy()
            for own, records in zip(sites, units.tasks.values(), strict=True)
        ]
        present = np.unique(np.concatenate([key_R[key_R >= 0] for key_R in keys]))
        divided, rows = {}, {}
        for (name, records), key_R, site_R in zip(units.tasks.items(), keys, sites, strict=True):
            order_R = np.argsort(site_R, kind="stable")[np.count_nonzero(site_R < 0) :]
            moved = records.taken(torch.from_numpy(order_R), torch.from_numpy(np.searchsorted(present, key_R)))
            weighed = TaskRecords.of(moved.features_RD, moved.labels, moved.mask_R, moved.unit_R, len(present))
            divided[name] = replace(moved, weight_R=weighed.weight_R)
            rows[name] = np.searchsorted(site_R[order_R], np.arange(num_sites + 1))
        start_S = np.searchsorted(present, np.arange(num_sites + 1) * units.num_units)
        return cls(Units(len(present), divided), start_S, rows)

    def select_site(self, site: int) -> Units:
        """Returns the units of one site, as it would have opened them by itself."""
        first, last = int(self.start_S[site]), int(self.start_S[site + 1])
        tasks = {
            name: _slice(records, slice(int(self.rows[name][site]), int(self.rows[name][site + 1])), first)
            for name, records in self.units.tasks.items()
        }
        return Units(last - first, tasks)


def _slice(records: TaskRecords, rows: slice, first_unit: int) -> TaskRecords:
    decoded = None
    if records.decoded is not None and records.rows is not None:
        decoded = DecodedFeatures(records.decoded.rows[rows], records.decoded.values_RD[rows])
    return replace(
        records,
        features_RD=records.features_RD[rows] if decoded is None else decoded.values_RD,
        labels=records.labels[rows],
        mask_R=records.mask_R[rows],
        unit_R=records.unit_R[rows] - first_unit,
        weight_R=records.weight_R[rows],
        decoded=decoded,
    )
