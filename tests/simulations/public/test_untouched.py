"""The untouched model is judged on all sites' held-out recordings, and on no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.data.sources import open_source
from common.backbones.parts.hub.huggingface import Location
from common.backbones.parts.hub.transcriber import open_transcriber
from common.tasks import open_tasks
from common.tasks.parts.transcripts.symbols import count_edits
from common.types import BadInput
from simulations.config import SimulationConfig
from simulations.partition import build_sites
from simulations.public.untouched import compute_untouched
from tests.simulations.test_speech import make_config, write_words
from tests.spoken import TONES, write_whisper


def compute(config: SimulationConfig, *, restricted: bool) -> dict[str, dict[str, float]]:
    sites = build_sites(config, config.runs_dir / "sites", non_private=True)
    tasks = open_tasks(config.run)
    return compute_untouched(config.run, tasks, sites, restricted=restricted, observe=lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("restricted", [False, True])
def test_its_errors_are_those_of_every_held_out_recording(tmp_path: Path, restricted: bool) -> None:
    write_words(tmp_path)
    write_whisper(tmp_path / "whisper", ["maybe", *TONES])
    config = make_config(tmp_path, backbone=dict(WHISPER))
    found = compute(config, restricted=restricted)["said"]
    source = open_source(config.sources["words"], "words").open()
    hear = open_transcriber(Location(tmp_path / "whisper", None, True), TONES.__contains__ if restricted else None)
    wrong, words, seen = 0, 0, set()
    for position, record in enumerate(source.index()):
        if record.split == "test":
            heard, said = hear(source.load(position)).split(), record.cells["transcript"].split()
            wrong, words = wrong + min(4, count_edits(heard, said)), words + len(said)
            seen |= set(heard)
    assert found["wer"] == pytest.approx(min(1.0, wrong / words)) and words > 25
    assert ("maybe" in seen) != restricted


def test_a_model_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    write_words(tmp_path)
    with pytest.raises(BadInput, match="expected for `untouched` a backbone that is part of a Whisper model"):
        compute(make_config(tmp_path), restricted=False)


WHISPER = {
    "kind": "transformers",
    "folder": "whisper",
    "modality": "audio",
    "part": "encoder",
    "pooling": "frames",
    "seconds": 0.4,
}
