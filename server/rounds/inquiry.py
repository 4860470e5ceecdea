"""One request to one site, and how long it is waited for. Values and rules only: nothing here sends anything.

A site that does not answer is asked again, because Flower hands a message out once: what a site that was killed had
received is lost. The site keeps its reply, so that asking again costs it nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import RecordDict

from common.run import RunConfig
from server.rounds.aggregators import count_required_updates
from server.rounds.replies import AWAY, FAILED, MAY_CHANGE, NO_REPLY, Rejected

_FIRST_INTERVAL_S = 3.0
_LONGEST_INTERVAL_S = 120.0
_BYTES_PER_S = 2**20
"""A request is repeated so seldom that its copies take about this much of a line."""
_MAX_RETURNS = 20
"""So often a site is asked at once when it comes back, in one request: one that leaves all the time floods nobody."""


@dataclass(frozen=True)
class Quorum:
    """The replies that a request needs; without arguments none.

    Attributes:
        num_sites: number of sites whose replies are needed.
        per_group: head or trunk -> number of replies that are needed of it.
        groups: node id -> heads and trunks that its site trains.
    """

    num_sites: int = 0
    per_group: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[int, Collection[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunConfig, cohort: Mapping[int, Collection[str]], late: Mapping[int, Collection[str]]) -> Quorum:
        """Returns the quorum of a round.

        Args:
            run: the run's settings.
            cohort: node id of each site that is asked -> its heads and trunks.
            late: the same of sites outside the cohort whose update of the round before is still awaited; theirs counts.
        """
        least = count_required_updates(run)
        counts = Counter(group for groups in cohort.values() for group in groups)
        per_group = {group: least for group, count in sorted(counts.items()) if count >= least}
        return cls(min(run.cohort.min_sites, len(cohort)), per_group, {**late, **cohort})

    def describe_missing(self, nodes: Collection[int]) -> str | None:
        """Returns what these nodes' replies lack of the quorum; None where they are one."""
        if len(nodes) < self.num_sites:
            return f"expected updates of at least {self.num_sites} site(s), got {len(nodes)}"
        for group, least in self.per_group.items():
            count = sum(group in self.groups[node] for node in nodes)
            if count < least:
                return f"expected at least {least} update(s) of {group}, got {count}"
        return None


@dataclass
class Inquiry:
    """One request to one site: the messages that carry it, and what is known of the reply.

    Attributes:
        node_id: Flower's number of the site's node.
        kind: message type.
        round: number of the round, 0 outside rounds.
        records: the encoded request.
        started: monotonic time at which the site was first asked, or at which it came back.
        asked_at: message id -> monotonic time at which it was sent.
        ask_again_at: monotonic time at which the next message is due.
        interval_s: seconds between the last message and the next.
        away_since: monotonic time since which the site is not connected; None while it is.
        num_returns: number of times it came back.
        preparing: true while it is asked to prepare again, before the request itself is repeated.
        rejected: the reason why there is no usable reply so far, where one is known.
        rejected_at: monotonic time of the first such reason.
        accepted: true once there is a usable reply.
    """

    node_id: int
    kind: str
    round: int
    records: RecordDict
    started: float
    interval_s: float
    ask_again_at: float = 0.0
    asked_at: dict[str, float] = field(default_factory=dict)
    away_since: float | None = None
    num_returns: int = 0
    preparing: bool = False
    rejected: Rejected | None = None
    rejected_at: float | None = None
    accepted: bool = False

    @classmethod
    def new(cls, node_id: int, kind: str, round_: int, *, records: RecordDict, size: int, now: float) -> Inquiry:
        """Returns an inquiry of which no message was sent yet.

        Args:
            node_id: Flower's number of the node.
            kind: message type.
            round_: number of the round.
            records: the encoded request.
            size: its size in bytes.
            now: monotonic time.
        """
        return cls(node_id, kind, round_, records, now, max(_FIRST_INTERVAL_S, size / _BYTES_PER_S))

    @property
    def is_final(self) -> bool:
        """True where asking again would give the same: a usable reply, or a reason that does not go away."""
        return self.accepted or (self.rejected is not None and self.rejected.reason not in (*MAY_CHANGE, FAILED))

    @property
    def is_silent(self) -> bool:
        """True where nothing has come yet."""
        return not self.accepted and self.rejected is None

    @property
    def reason(self) -> Rejected:
        """Why there is no usable reply."""
        return self.rejected or Rejected(self.node_id, AWAY if self.away_since is not None else NO_REPLY)

    def note_sent(self, message_id: str, now: float) -> None:
        """Notes a message that was sent; the next one is due after twice the time."""
        self.asked_at[message_id] = now
        self.ask_again_at = now + self.interval_s
        self.interval_s = max(self.interval_s, min(2.0 * self.interval_s, _LONGEST_INTERVAL_S))

    def note_presence(self, connected: bool, now: float, away_since: float) -> None:
        """Notes whether the site is connected; one that came back is asked again at once.

        Args:
            connected: whether it is.
            now: monotonic time.
            away_since: monotonic time since which it is not, where it is not.
        """
        if not connected:
            self.away_since = away_since if self.away_since is None else self.away_since
        elif self.away_since is not None:
            self.away_since = None
            self.num_returns += 1
            if self.num_returns <= _MAX_RETURNS:
                self.started, self.ask_again_at = now, now

    def reject(self, rejected: Rejected, now: float) -> None:
        """Notes why there is no usable reply, for now or for good."""
        self.rejected = rejected
        self.rejected_at = now if self.rejected_at is None else self.rejected_at


@dataclass(frozen=True)
class Waiting:
    """The rules by which a request ends.

    Attributes:
        timeout_s: longest wait for a connected site.
        grace_s: wait for a site after the connection to it was lost, and beyond twice its longest time so far.
        patience_s: wait for a quorum that is missing.
        asks_again: whether a silent site is asked again.
        quorum: the replies that are needed.
        since_lost: whether the grace of a site that was away before the request began counts from that time.
        at_once: whether the request ends with its quorum: more replies are of no use.
    """

    timeout_s: float
    grace_s: float = 0.0
    patience_s: float = 0.0
    asks_again: bool = True
    quorum: Quorum = field(default_factory=Quorum)
    since_lost: bool = False
    at_once: bool = False

    @classmethod
    def of(cls, run: RunConfig, quorum: Quorum | None = None) -> Waiting:
        """Returns the rules of a run's requests: of a round's where a quorum is given, else those without one."""
        rules = run.cohort
        if quorum is None:
            return cls(rules.timeout_s, rules.grace_s)
        # A site that is away for long is waited for once, not in every round.
        return cls(rules.timeout_s, rules.grace_s, rules.patience_s, quorum=quorum, since_lost=True)

    @property
    def life_s(self) -> float:
        """Seconds for which a message is valid: as long as its reply may be used, also in the next round."""
        return 2.0 * (self.timeout_s + self.grace_s + self.patience_s) + 60.0

    def is_over(self, inquiries: Sequence[Inquiry], longest_s: Mapping[int, float], started: float, now: float) -> bool:
        """Returns true if nothing is awaited any more.

        Args:
            inquiries: all inquiries of the request.
            longest_s: node id -> longest time that its site needed for such a request so far.
            started: monotonic time at which the request began.
            now: monotonic time.
        """
        if self.quorum.describe_missing(_accepted(inquiries)) is not None:
            return not self.can_be_met(inquiries, started, now)
        if self.at_once or now >= started + self.timeout_s:
            return True
        return all(
            now >= self._grace_until(inquiry, longest_s.get(inquiry.node_id), started)
            for inquiry in inquiries
            if inquiry.is_silent
        )

    def can_be_met(self, inquiries: Sequence[Inquiry], started: float, now: float) -> bool:
        """Returns true if the sites that have answered, and those there is hope for, are a quorum.

        Args:
            inquiries: all inquiries of the request.
            started: monotonic time at which the request began.
            now: monotonic time.
        """
        hopeful = {inquiry.node_id for inquiry in inquiries if now < self.hope_until(inquiry, started)}
        return self.quorum.describe_missing(hopeful | _accepted(inquiries)) is None

    def hope_until(self, inquiry: Inquiry, started: float) -> float:
        """Returns the monotonic time until which a request without its quorum waits for a site."""
        if inquiry.is_final:
            return started
        if inquiry.rejected_at is not None:
            return inquiry.rejected_at + self.patience_s
        if inquiry.away_since is not None:
            return max(inquiry.away_since, started) + self.patience_s
        return max(inquiry.started, started) + self.timeout_s + self.patience_s

    def _grace_until(self, inquiry: Inquiry, longest_s: float | None, started: float) -> float:
        if inquiry.away_since is not None:
            lost = inquiry.away_since if self.since_lost else max(inquiry.away_since, started)
            return lost + self.grace_s
        if longest_s is None or inquiry.preparing:
            # It may be the slowest of all: nobody knows yet how long it takes.
            return inquiry.started + self.timeout_s
        return inquiry.started + 2.0 * longest_s + self.grace_s


def _accepted(inquiries: Iterable[Inquiry]) -> set[int]:
    return {inquiry.node_id for inquiry in inquiries if inquiry.accepted}
