"""The journal: whole lines, in order, whatever a crash left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.events import FileJournal, read


def test_facts_are_read_in_the_order_they_were_written(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "deep" / "journal.jsonl")
    for number in range(5):
        journal.write("step", number=number)
    assert [fact["number"] for fact in read(journal.path)] == list(range(5))


def test_a_torn_last_line_is_ignored_and_the_next_one_is_whole(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal.jsonl")
    journal.write("first")
    with journal.path.open("a") as file:
        file.write('{"event": "to')
    assert [fact["event"] for fact in read(journal.path)] == ["first"]
    journal.write("second")
    assert [fact["event"] for fact in read(journal.path)] == ["first", "second"]


def test_a_value_that_is_not_a_number_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        FileJournal(tmp_path / "journal.jsonl").write("metric", value=float("nan"))


def test_a_missing_journal_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == []


def test_a_line_that_is_no_fact_is_passed_over(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal.jsonl")
    journal.write("first")
    with journal.path.open("ab") as file:
        file.write(b"\xff\xfe\x00\n[1]\n{}\n")
    journal.write("second")
    assert [fact["event"] for fact in read(journal.path)] == ["first", "second"]
