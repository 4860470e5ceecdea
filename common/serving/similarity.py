"""The distances between the sites of a run, and from a backbone's home sample to each (`common.serving.means`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.serving.means import FeatureMean, MeanDistance, combine_means, compute_distance

ALL, OTHERS = "all sites", "all others"
"""Names, as they are shown, of the mean over all sites, and over all but one."""

WARNING = (
    "A distance is a warning, not a forecast. Sharpness dominates it: the same pictures blurred can be farther away "
    "than other pictures. It knows nothing of labels: for the four hospitals of Fed-Heart its order was the wrong one."
)


@dataclass(frozen=True)
class Similarity:
    """The distances between all means of one backbone.

    Attributes:
        digest: digest of the backbone.
        means: the home sample, where there is one, and the sites', in the order of rows and columns.
        distances: name -> other name -> their distance; of a pair both ways.
        others: name of a site -> its distance from the mean of all other sites; of the home sample that from the mean
            of all sites. Empty where there is one site.
    """

    digest: str
    means: Sequence[FeatureMean] = field(repr=False)
    distances: Mapping[str, Mapping[str, MeanDistance]]
    others: Mapping[str, MeanDistance]


def compare_means(sites: Sequence[FeatureMean], home: FeatureMean | None) -> list[Similarity]:
    """Returns the distances between the sites of each backbone, and from the home sample of one.

    Args:
        sites: the means that sites released.
        home: the mean of the home sample of one of their backbones; None leaves it out.
    """
    found = []
    for digest in dict.fromkeys(each.digest for each in sites):
        own = [each for each in sites if each.digest == digest]
        means = [home, *own] if home is not None and home.digest == digest else own
        found.append(
            Similarity(
                digest,
                means,
                {
                    one.name: {other.name: compute_distance(one, other) for other in means if other is not one}
                    for one in means
                },
                _compare_with_others(means, own) if len(own) > 1 else {},
            )
        )
    return found


def _compare_with_others(means: Sequence[FeatureMean], sites: Sequence[FeatureMean]) -> dict[str, MeanDistance]:
    distances = {}
    for one in means:
        # Without the site itself: the noise of its mean would be in both.
        others = combine_means([each for each in sites if each is not one], OTHERS)
        distances[one.name] = compute_distance(one, others)
    return distances
