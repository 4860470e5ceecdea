"""Recordings, texts, pairs of texts and series: what is read, which side it stands on, what becomes of broken items."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from scipy.io import wavfile

from client.config import SiteConfig
from client.data.feature_store import FeatureStore
from client.data.prepare import PROBLEMS, Encoding, prepare
from client.data.records import find_usable, select_rows
from client.data.sources import Source, open_source
from common.inputs import Audio, Text
from common.model.backbones import open_pretrained
from common.tasks import open_task
from common.types import BadInput, BadRecord, Unit
from common.yaml import parse

TONE = (0.25 * np.sin(2 * np.pi * 440 * np.arange(800) / 8000)).astype(np.float32)


def opened(**settings: Any) -> Source:
    return open_source({name: _plain(value) for name, value in settings.items()}, "sources.rows").open()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def test_wav_and_flac_of_any_channels_are_the_same_recording(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", TONE, 8000)
    soundfile.write(tmp_path / "b.flac", np.stack([TONE, TONE], axis=1), 8000)
    soundfile.write(tmp_path / "c.wav", np.stack([2 * TONE, 0 * TONE], axis=1), 8000, subtype="FLOAT")
    (tmp_path / "list.csv").write_text("file,word\na.wav,yes\nb.flac,no\nc.wav,yes\n")
    source = opened(kind="manifest", path=tmp_path / "list.csv", audio="file")
    for position in range(3):
        found = source.load(position)
        assert isinstance(found, Audio) and found.sample_rate == 8000
        np.testing.assert_allclose(found.samples_T, TONE, atol=1e-4)


def test_excerpts_are_parts_of_a_recording_evenly_spread_and_on_one_side(tmp_path: Path) -> None:
    ramp = (np.arange(1000) / 1000).astype(np.float32)
    soundfile.write(tmp_path / "a_song.wav", ramp, 100, subtype="FLOAT")
    soundfile.write(tmp_path / "b_jingle.wav", ramp[:150], 100, subtype="FLOAT")
    settings = {"kind": "audio", "path": tmp_path, "pattern": r"(?P<song>[ab])_", "patient": "song"}
    cut = opened(**settings, excerpts={"count": 2, "seconds": 2})
    # 8 s are left beside an excerpt of 2: they begin at a quarter and at three quarters of these.
    np.testing.assert_array_equal(cut.load(0).samples_T, ramp[200:400])
    np.testing.assert_array_equal(cut.load(1).samples_T, ramp[600:800])
    for position in (2, 3):
        np.testing.assert_array_equal(cut.load(position).samples_T, ramp[:150])
    assert [record.patient for record in cut.index()] == ["a", "a", "b", "b"]
    assert [record.row for record in cut.index()] == [1, 1, 2, 2]
    assert len({record.key for record in cut.index()}) == 2
    digests = {cut.digest(), opened(**settings).digest()}
    assert len({*digests, opened(**settings, excerpts={"count": 2, "seconds": 3}).digest()}) == 3


def test_a_transcript_is_the_text_file_beside_a_recording(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        soundfile.write(tmp_path / f"{name}_x.wav", TONE, 8000)
    (tmp_path / "a_x.txt").write_text("Grüß Gott.\n", encoding="utf-8-sig")
    (tmp_path / "b_x.txt").write_bytes("Grüß Gott".encode("latin-1"))
    (tmp_path / "c_x.txt").write_bytes(b"a" * (2**20 + 1))
    settings = {"kind": "audio", "path": tmp_path, "pattern": "(?P<name>[a-d])_"}
    source = opened(**settings, transcript="said")
    first, second, third, fourth = (record.cells for record in source.index())
    assert first["said"].strip() == "Grüß Gott." and first["name"] == "a" and fourth["said"] == ""
    for cells, words in ((second, "in UTF-8"), (third, "at most 1048576 bytes")):
        with pytest.raises(BadRecord, match=words):
            cells["said"]
    before = source.digest()
    (tmp_path / "a_x.txt").write_text("another one")
    assert opened(**settings, transcript="said").digest() != before
    assert "said" not in opened(**settings).index()[0].cells
    with pytest.raises(BadInput, match="transcript: expected none beside `excerpts`"):
        opened(**settings, transcript="said", excerpts={"count": 2, "seconds": 1})


def test_subtitles_are_read_without_their_times_and_an_empty_file_says_that_nothing_is_said(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        soundfile.write(tmp_path / f"{name}_x.wav", TONE, 8000)
    first = "1\r\n00:00:00,000 --> 00:00:01,500 X1:40\r\n<i>Grüß</i> Gott,\r\n{\\an8}zwei\r\n\r\n"
    second = "2\r\n00:00:02.000-->00:00:03.000\r\n3 < 4\r\n\r\nno subtitle\r\n"
    (tmp_path / "a_x.srt").write_bytes((first + second).encode("utf-8-sig"))
    (tmp_path / "b_x.srt").write_text("1\nhello\n")
    (tmp_path / "c_x.txt").write_text(" \n")
    source = opened(kind="audio", path=tmp_path, pattern="(?P<name>[a-d])_", transcript="said")
    a, b, c, d = (record.cells for record in source.index())
    assert a["said"].split() == ["Grüß", "Gott,", "zwei", "3", "<", "4"]
    with pytest.raises(BadRecord, match="expected subtitles with times"):
        b["said"]
    letters = open_task({"kind": "ctc", "symbols": list("ab.,"), "unit": "characters", "max_symbols": 9}, "said")
    silent = c["said"].strip()
    assert silent and letters.codec.encode([silent]).tolist() == letters.codec.missing().tolist()
    assert d["said"] == "", "nobody wrote it down"


def test_a_list_of_recordings_without_a_line_of_names(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", TONE, 8000)
    (tmp_path / "list.tsv").write_text("a.wav\tyes no\n")
    source = opened(kind="manifest", path=tmp_path / "list.tsv", audio="file", separator="\t", header=["file", "said"])
    assert [record.cells["said"] for record in source.index()] == ["yes no"] and len(source.load(0).samples_T)


def test_recordings_of_words_are_joined_each_into_one_utterance(tmp_path: Path) -> None:
    lengths = {}
    for speaker in ("ann", "bob"):
        for word in ("yes", "no"):
            for take in range(7):
                lengths[f"{word}_{speaker}_{take}"] = length = 100 + len(lengths)
                soundfile.write(tmp_path / f"{word}_{speaker}_{take}.wav", np.full(length, 0.5, np.float32), 8000)
    settings = {
        "kind": "utterances",
        "path": tmp_path,
        "pattern": r"(?P<word>\w+?)_(?P<speaker>\w+?)_(?P<take>\d+)",
        "word": "word",
        "by": ["speaker"],
        "patient": "speaker",
        "test": {"take": ["0", "1"]},
        "words": [2, 3],
        "pause_s": 0.01,
    }
    source = opened(**settings)
    totals: dict[tuple[str | None, str | None], int] = {}
    for position, record in enumerate(source.index()):
        words = record.cells["transcript"].split()
        assert 2 <= len(words) <= 3 and record.patient == record.cells["speaker"]
        samples_T = source.load(position).samples_T
        silent_T = samples_T == 0.0
        # A pause of 80 samples between two words, and none at an end.
        assert silent_T.sum() == 80 * (len(words) - 1) and not silent_T[0] and not silent_T[-1]
        key = (record.patient, record.split)
        totals[key] = totals.get(key, 0) + int((~silent_T).sum())
    # Every recording is in one utterance, of its own speaker and side.
    expected: dict[tuple[str | None, str | None], int] = {}
    for name, length in lengths.items():
        _, speaker, take = name.split("_")
        side = "test" if take in "01" else "train"
        expected[speaker, side] = expected.get((speaker, side), 0) + length
    assert totals == expected
    assert opened(**{**settings, "seed": 1}).digest() != source.digest()
    with pytest.raises(BadInput, match="names fit the pattern"):
        opened(**{**settings, "pattern": "(?P<word>x)(?P<speaker>y)(?P<take>z)"})
    with pytest.raises(BadInput, match="patient: expected one of `by`"):
        opened(**{**settings, "patient": "take"})
    soundfile.write(tmp_path / "yes_ann_0.wav", TONE, 16000)
    slow = opened(**settings)
    faults = 0
    for position in range(len(slow.index())):
        try:
            slow.load(position)
        except BadRecord as error:
            faults += "one sample rate" in str(error)
    assert faults == 1


def test_excerpts_of_ogg_are_read_from_the_middle(tmp_path: Path) -> None:
    time = np.arange(40_000) / 8000
    samples = np.where(time < 2.5, 0.0, 0.25 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    soundfile.write(tmp_path / "half_silent.ogg", samples, 8000)
    source = opened(kind="audio", path=tmp_path, pattern="(?P<song>half)", excerpts={"count": 2, "seconds": 1})
    loudness = [float(np.abs(source.load(position).samples_T).max()) for position in (0, 1)]
    assert loudness[0] < 0.01 and loudness[1] > 0.2


def test_a_recordings_name_says_its_columns_patient_and_side(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        for name in ("7_ann_0", "7_ann_12", "3_bob_1", "notes"):
            data = io.BytesIO()
            wavfile.write(data, 8000, (TONE * 32767).astype(np.int16))
            archive.writestr(f"deep/{name}.wav", data.getvalue())
        archive.writestr("__MACOSX/7_ann_0.wav", b"")
        archive.writestr("readme.txt", b"")
    pattern = r"(?P<digit>\d)_(?P<speaker>\w+)_(?P<take>\d+)\."
    source = opened(
        kind="audio", path=tmp_path / "clips.zip", pattern=pattern, patient="speaker", test={"take": [0, 1]}
    )
    found = [(r.cells["digit"], r.patient, r.split) for r in source.index()]
    assert found == [("3", "bob", "test"), ("7", "ann", "test"), ("7", "ann", "train"), ("", "", "train")]
    np.testing.assert_allclose(source.load(0).samples_T, TONE, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "("}, "got one with an error"),
        ({"pattern": r"(\d)"}, "named group for each column"),
        ({"patient": "who"}, "patient: expected one of the pattern's groups digit"),
        ({"test": {"who": ["x"]}}, "test: expected one of the pattern's groups digit"),
        ({"path": "absent"}, "expected a folder or zip of recordings"),
    ],
)
def test_wrong_audio_settings_are_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        opened(**{"kind": "audio", "path": ".", "pattern": r"(?P<digit>\d)", **change})


def test_texts_keep_their_quotes_and_stand_on_their_files_side(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('an "odd film\t1\n"quoted"\t0\n', encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("naïve\t0\n", encoding="utf-8")
    source = opened(
        kind="text",
        path={"train": str(tmp_path / "train.tsv"), "test": str(tmp_path / "dev.tsv")},
        header=["sentence", "label"],
        text="sentence",
    )
    assert [source.load(position) for position in range(3)] == [
        Text('an "odd film'),
        Text('"quoted"'),
        Text("naïve"),
    ]
    assert [(r.split, r.cells["label"]) for r in source.index()] == [("train", "1"), ("train", "0"), ("test", "0")]


def test_pairs_of_texts_are_read_from_a_manifest_and_differ_from_single_ones(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('q,a,same\n"Is it, well, done?",Yes.,1\n')
    pair = opened(kind="manifest", path=tmp_path / "list.csv", text="q", text_pair="a")
    alone = opened(kind="manifest", path=tmp_path / "list.csv", text="q")
    assert pair.load(0) == Text("Is it, well, done?", "Yes.")
    assert alone.load(0) == Text("Is it, well, done?")
    assert pair.digest() != alone.digest()
    with pytest.raises(BadInput, match="at most one of image, audio, series and text, got audio and text"):
        opened(kind="manifest", path=tmp_path / "list.csv", text="q", audio="a")
    with pytest.raises(BadInput, match="expected it beside `text`"):
        opened(kind="manifest", path=tmp_path / "list.csv", text_pair="q")


def test_series_come_from_files_and_from_rows(tmp_path: Path) -> None:
    steps = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "a.npy", steps)
    np.savetxt(tmp_path / "b.csv", steps, delimiter=",")
    (tmp_path / "list.csv").write_text("file,beat\na.npy,n\nb.csv,n\n")
    listed = opened(kind="manifest", path=tmp_path / "list.csv", series="file")
    (tmp_path / "rows.txt").write_text("  1.0  0 1 2 3 4 5\n -1.0  7 8\n")
    table = opened(
        kind="series",
        path=str(tmp_path / "rows.txt"),
        separator="whitespace",
        labels={"beat": 1},
        channels=2,
    )
    (tmp_path / "named.csv").write_text("t0,who,t1,side\n0.5,ann,1.5,train\n1,bob,,test\n")
    named = opened(
        kind="series",
        path=str(tmp_path / "named.csv"),
        labels=["who", "side"],
        patient="who",
        split="side",
    )
    for found in (listed.load(0), listed.load(1), table.load(0)):
        np.testing.assert_array_equal(found, steps)
    assert table.load(1).tolist() == [[7.0, 8.0]]
    assert [record.cells["beat"] for record in table.index()] == ["1.0", "-1.0"]
    assert [(record.patient, record.split) for record in named.index()] == [("ann", "train"), ("bob", "test")]
    assert named.load(0).tolist() == [0.5, 1.5] and named.load(1).tolist() == [1.0]


def test_a_pickled_series_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "list.csv").write_text("file\na.npy\n")
    with pytest.raises(BadRecord, match="unreadable series"):
        opened(kind="manifest", path=tmp_path / "list.csv", series="file").load(0)


def test_pictures_and_recordings_of_a_saved_data_set_are_decoded_here(tmp_path: Path) -> None:
    picture, sound = io.BytesIO(), io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture, "PNG")
    soundfile.write(sound, TONE, 8000, format="WAV")
    columns = {
        "scan": [{"bytes": picture.getvalue(), "path": None}],
        "voice": [{"bytes": sound.getvalue(), "path": None}],
        "beat": [[0.0, 1.0, 2.0]],
        "label": [1],
    }
    features = datasets.Features(
        {
            "scan": datasets.Image(),
            "voice": datasets.Audio(),
            "beat": datasets.Sequence(datasets.Value("float32")),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    storage = {name: columns[name] for name in ("beat", "label")}
    whole = datasets.Dataset.from_dict(storage | {"scan": columns["scan"], "voice": columns["voice"]})
    whole = whole.cast(datasets.Features({name: features[name] for name in whole.column_names}))
    datasets.DatasetDict({"validation": whole, "other": whole}).save_to_disk(str(tmp_path / "data"))
    path, splits = tmp_path / "data", {"validation": "test"}
    scan = opened(kind="huggingface", path=path, image="scan", splits=splits)
    assert [(r.split, r.cells) for r in scan.index()] == [("test", {"label": "yes"})]
    assert (np.asarray(scan.load(0)) == pixels).all()
    np.testing.assert_allclose(
        opened(kind="huggingface", path=path, audio="voice", splits=splits).load(0).samples_T, TONE, atol=1e-4
    )
    assert opened(kind="huggingface", path=path, series="beat", splits=splits).load(0).tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(BadInput, match="expected one of the splits train, test"):
        opened(kind="huggingface", path=path, image="scan")
    with pytest.raises(BadInput, match="expected a column 'scam'"):
        opened(kind="huggingface", path=path, image="scam", splits=splits)


def test_a_broken_recording_is_named_by_file_and_row_and_left_out(tmp_path: Path) -> None:
    from common.backbones.speech_embedding import SpeechEmbedding

    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.resize(TONE * (number + 1) / 3, 8000), 8000)
    (tmp_path / "1.wav").write_bytes(b"RIFF of Jane Doe")
    rows = "".join(f"{name}.wav,p{name},w{name % 2}\n" for name in range(4))
    (tmp_path / "list.csv").write_text("file,who,word\n" + rows)
    values = {
        "name": "clinic",
        "registry": "r",
        "unit": "patient",
        "budget": {"epsilon": 1.0, "delta": 1e-5},
        "allow": {"tasks": "any", "backbones": "any", "solvers": "any"},
        "sources": {
            "voices": {
                "kind": "manifest",
                "path": str(tmp_path / "list.csv"),
                "audio": "file",
                "patient": "who",
            }
        },
        "tasks": {"word": {"source": "voices", "label": "word", "missing": "refuse", "public_size": 4}},
        "split": {"test_fraction": 0.0},
        "on_bad_record": "stop",  # Approves no run; nothing stops a run that was joined.
        "evaluation": "local",
        "state_dir": str(tmp_path / "state"),
    }
    site = parse(SiteConfig, values, base=tmp_path)
    (tmp_path / "weights").mkdir()
    backbone = open_pretrained(SpeechEmbedding.example(tmp_path / "weights").settings, "b")
    tasks = {"word": open_task({"kind": "classification", "labels": ["w0", "w1"]}, "t")}
    folder = tmp_path / "run" / "data"

    encoding = Encoding(FeatureStore(tmp_path / "store"), torch.device("cpu"))
    assert prepare(site, tasks, {"word": backbone}, encoding, folder).num_units["train"] == 2
    with folder.with_name(PROBLEMS).open() as file:
        listed = [(line["file"], line["row"], line["reason"]) for line in csv.DictReader(file)]
    assert listed == [("list.csv", "2", "unreadable recording"), ("list.csv", "4", "missing recording")]


def test_a_file_whose_name_fits_no_pattern_is_left_out_as_that(tmp_path: Path) -> None:
    """A name that fits and holds no patient is another thing."""
    names = ["a_song.wav", "_song.wav", "jingle.wav"]
    for name in names:
        soundfile.write(tmp_path / name, np.zeros(10, np.float32), 100)
    source = opened(kind="audio", path=tmp_path, pattern="^(?P<who>[ab]?)_", patient="who")
    index = source.index()
    members, problems = find_usable("songs", index, select_rows(None, index)[0], {}, Unit.PATIENT)
    assert [member.record.key for member in members] == ["a_song.wav"]
    assert [(problem.row, problem.reason) for problem in problems] == [
        (1, "blank patient id"),
        (3, "the file's name does not fit the source's pattern"),
    ]
