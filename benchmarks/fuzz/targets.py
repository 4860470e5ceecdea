"""The targets of `benchmarks.fuzz`: each opens what reads the bytes, and inputs that are accepted.

Imports stand inside the functions: what a coverage-guided run is to see is imported under its instrumentation.
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.fuzz import PART, Broken, Target
from common.types import HeadwaterError, LedgerDamaged

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "name": "tiny",
    "seed": 3,
    "rounds": 2,
    "backbone": {"kind": "identity", "dim": 4},
    "tasks": {"size": {"kind": "classification", "labels": ["small", "large"]}},
    "solver": {"kind": "dp_gd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0},
    "privacy": {"unit": "example", "delta": 1e-5, "noise_multiplier": 2.0},
    "aggregation": {"kind": "mean"},
}


def _make_file(name: str) -> Path:
    """Returns a path in a folder of its own."""
    return Path(tempfile.mkdtemp(prefix="fuzz-")) / name


def _read_from(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def run(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return run


# --- messages --------------------------------------------------------------------------------------------------------


def open_messages() -> Target:
    """Records of any message: the number of the expected kind, the public text, the layout of arrays, their bytes."""
    import numpy as np
    from flwr.app import ConfigRecord, RecordDict

    from common import messages
    from common.types import DeclineReason, Delta, LedgerWitness, Plan, Unit

    heads = {"size": {"weight": np.ones((2, 4), np.float32), "bias": np.ones(2, np.float32)}}
    plan, digest = Plan(1.0, 2, 1.0, 2.0, Unit.EXAMPLE), "0" * 64
    witness = LedgerWitness(digest, 3, digest, digest)
    samples = [
        messages.JoinRequest("run-1", RUN, {"backbone": digest}),
        messages.JoinReply("north", {"size": 40}, Unit.EXAMPLE, 1e-5, 3.0, {"backbone": messages.Held(False, (1,))}),
        messages.PartRequest("run-1", digest, 0, 1, b"weights"),
        messages.PrepareRequest("run-1", {digest: "{}"}),
        messages.TrainRequest("run-1", 1, heads, witness),
        messages.TrainReply(Delta(heads), plan),
        messages.TrainReply(Delta(heads), plan, "float16", witness),
        messages.FinishRequest("run-1", heads, digest),
        messages.Declined(DeclineReason.BUDGET, "north"),
        messages.Ready(),
        messages.EvaluateRequest("run-1", 1, heads),
    ]
    kinds: list[type[messages.Payload]] = list(dict.fromkeys(type(sample) for sample in samples))
    kinds.append(messages.EvaluateReply)

    def pack(sample: messages.Payload) -> bytes:
        records = messages.encode(sample).config_records
        arrays = records.get("heads", {})
        data = arrays.get("data", records.get("part", {}).get("data", b""))
        texts = [str(records["public"]["json"]).encode(), str(arrays.get("layout", "")).encode()]
        return PART.join([str(kinds.index(type(sample))).encode(), *texts, bytes(data)])  # type: ignore[arg-type]

    def run(content: bytes) -> object:
        number, public, layout, data, *_ = [*content.split(PART), b"", b"", b"", b""]
        expected = (
            kinds[int(number) % len(kinds)] if number.isdigit() and len(number) < 4 else kinds[len(number) % len(kinds)]
        )
        records = RecordDict({"public": ConfigRecord({"json": public.decode(errors="surrogateescape")})})
        if layout or data:
            text = layout.decode(errors="replace")
            records["heads"] = ConfigRecord({"layout": text, "data": data} if layout else {"data": data})
        if expected is messages.PartRequest:
            records["part"] = ConfigRecord({"data": data})
            records.pop("heads", None)
        return messages.decode(records, expected)

    words = [b'"payload":"TrainReply"', b'"float16"', b"[0]", b"[1000000,1000000]", b"[-1]", b'"round":1', PART]
    return Target("messages", [pack(sample) for sample in samples], run, words)


def open_frames() -> Target:
    """Reads the frames that a site's connection and its worker exchange, and the objects of a message in them."""
    from flwr.app import Message, RecordDict

    from client.connection import worker
    from common import messages
    from common.flower import get_all_nested_objects, message_to_proto, set_metadata, set_task_identity

    set_task_identity(1, 2)
    request = messages.JoinRequest("run-1", RUN, {"backbone": "0" * 64})
    seeds = []
    for content in (messages.encode(request), RecordDict()):
        message = Message(content, dst_node_id=2, message_type=messages.JOIN, group_id="0")
        set_metadata(message, message_id="1")
        objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
        envelope = message_to_proto(Message(RecordDict(), dst_node_id=2, message_type=messages.JOIN))
        parts = [envelope.SerializeToString(), message.object_id.encode()]
        parts += [part for name, each in objects.items() for part in (name.encode(), each)]
        pipe = io.BytesIO()
        worker._write_frames(pipe, parts)
        seeds.append(pipe.getvalue())

    def run(content: bytes) -> object:
        try:
            parts = worker._read_frames(io.BytesIO(content))
        except (EOFError, OverflowError, MemoryError) as error:  # As `Worker._exchange`: the worker is ended.
            raise HeadwaterError("the frames end early") from error
        if len(parts) < 2 or len(parts) % 2:
            return parts
        # The envelope and the objects' names come from protobuf, which has read them already.
        contents = {parts[at].decode(errors="replace"): parts[at + 1] for at in range(2, len(parts), 2)}
        try:
            return worker.inflate_object_from_contents(parts[1].decode(errors="replace"), contents)
        except worker._UNREADABLE as error:
            raise HeadwaterError("declined: bad_request") from error

    return Target("frames", seeds, run, [b"RecordDict", b"ConfigRecord", b"Message", b"ArrayRecord", b"\x00"])


# --- configurations --------------------------------------------------------------------------------------------------


def _read_words(*models: type[Any]) -> list[bytes]:
    words = [name for model in models for name in model.model_fields]
    return [f"{word}: ".encode() for word in words] + [b"&a ", b"*a", b"<<: *a", b"? ", b"- ", b"!!int ", b"kind: "]


def open_run_file() -> Target:
    """A coordinator's run file, and the offer that follows from it."""
    from common.offers import Offer, parse_offer
    from common.run import RunConfig
    from common.yaml import load

    def read(path: Path) -> object:
        run = load(RunConfig, path)
        offer = Offer(run.model_dump(mode="json"), {})
        if parse_offer(offer.to_bytes(), "offer").run_config().model_dump(mode="json") != offer.run:
            raise Broken("expected the run that was offered")
        return run

    seeds = [path.read_bytes() for path in (ROOT / "configs" / "runs").glob("*.yaml")]
    seeds.append(json.dumps(RUN).encode())
    return Target("run_file", seeds, _read_from(_make_file("run.yaml"), read), _read_words(RunConfig))


def open_site_file() -> Target:
    """A hospital's own file."""
    from client.config import SiteConfig
    from common.yaml import load

    seeds = [path.read_bytes() for path in (ROOT / "configs" / "sites").glob("*.yaml")]
    return Target(
        "site_file",
        seeds,
        _read_from(_make_file("site.yaml"), lambda path: load(SiteConfig, path)),
        _read_words(SiteConfig),
    )


def open_federation_file() -> Target:
    """A coordinator's federation.yaml and its list of admitted sites."""
    from common.yaml import load
    from server.deployment.admitted_sites import load_admitted_sites
    from server.deployment.federation import Federation, FederationConfig

    path = _make_file("federation.yaml")
    settings = b"name: hearts\naddress: localhost:9092\nbind: 127.0.0.1:9092\ncontrol_port: 9093\nhealth_port: 9094\n"
    sites = b'[{"site": "north", "key": "ecdsa-sha2-nistp384 AAAA", "admitted": "2026-01-01", "removed": null}]'

    def run(content: bytes) -> object:
        text, _, admitted = content.partition(PART)
        path.write_bytes(text)
        path.with_name("sites.json").write_bytes(admitted)
        return load_admitted_sites(Federation(path.parent, load(FederationConfig, path)))

    return Target(
        "federation_file", [settings + PART + b"[]", settings + PART + sites], run, _read_words(FederationConfig)
    )


# --- kits and bundles ------------------------------------------------------------------------------------------------


def _zip(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), content, compression)
    return buffer.getvalue()


def _make_certificate() -> bytes:
    from server.deployment.certificates import write_authority

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    write_authority(folder, "hearts")
    return next(path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".crt")


def open_kit() -> Target:
    """A startup kit as it comes by mail: a zip, and its parts one by one."""
    from client.connection.kit import read_kit
    from common.offers import encode_offer

    certificate = _make_certificate()
    settings = b"federation: hearts\nsite: north\naddress: localhost:9092\n"
    offer = encode_offer(RUN, {"backbone": "0" * 64})
    files = {"kit.yaml": settings, "ca.crt": certificate, "offers/tiny.json": offer}
    path = _make_file("kit.zip")

    def run(content: bytes) -> object:
        if content.startswith(b"PK"):
            path.write_bytes(content)
        else:  # The parts, so that a mutation need not guess a checksum.
            parts = [*content.split(PART), b"", b"", b""]
            path.write_bytes(_zip(dict(zip(files, parts, strict=False))))
        kit = read_kit(path)
        return [run.name for run in kit.runs()]

    seeds = [_zip(files), _zip(files, zipfile.ZIP_DEFLATED), PART.join(files.values())]
    return Target("kit", seeds, run, [b"kit.yaml", b"ca.crt", b"offers/", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"])


def open_bundle() -> Target:
    """An app bundle as a coordinator's Flower hands it out."""
    from common.bundle import compute_bundle_digest

    settings = b'[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "client.app:app"\n'
    files = {"pyproject.toml": settings, "client/app.py": b"app = 1\n", "common/types.py": b"\n"}

    def run(content: bytes) -> object:
        if not content.startswith(b"PK"):
            content = _zip({**files, "pyproject.toml": content})
        return compute_bundle_digest(content)

    seeds = [_zip(files), _zip(files, zipfile.ZIP_DEFLATED), settings]
    return Target("bundle", seeds, run, [b"../", b"client/", b"pyproject.toml", b".info/CONTENT"])


# --- ledgers and journals --------------------------------------------------------------------------------------------


def open_ledger() -> Target:
    """A ledger's three files, of which any may be damaged: it opens with what was spent, or does not open."""
    from client.ledger import chain
    from client.ledger.ledger import Ledger
    from common.files import without_flushing
    from common.privacy.accounting import Mechanism
    from common.types import Unit

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    terms: Mapping[str, Any] = {"unit": Unit.PATIENT, "epsilon_cap": 5.0, "delta": 1e-5}
    ledger = Ledger.open(folder, population="oncology", **terms)
    for number in (1, 2, 3):
        charge = Mechanism("gaussian", 20.0, 1.0, 2, 1.0)
        ledger.commit(ledger.reserve(charge, run="run", round=number, request="00ff"))
    names = ("ledger.jsonl", "anchor.json", "ledger.key")
    files = [(folder / "oncology" / name).read_bytes() for name in names]
    spent, key = ledger.spent(), files[2]
    lines = files[0].splitlines(keepends=True)
    # As it is; without the last note, which a power cut may take; with half a line.
    forms = [files, [b"".join(lines[:-1]), *files[1:]], [files[0] + b'{"n":9', *files[1:]]]

    @without_flushing()
    def run(content: bytes) -> object:
        parts = [*content.split(PART), b"", b"", b""][:3]
        for name, part in zip(names, parts, strict=True):
            (folder / "oncology" / name).write_bytes(part)
        # Another process: it remembers nothing.
        chain._KNOWN.clear()
        chain._SEEN.clear()
        chain.read_legible(folder / "oncology")
        chain.read_verifiable(folder / "oncology")
        found = Ledger.find(folder, "oncology")
        if found is None:
            raise LedgerDamaged("there is none")
        now = found.spent()
        # With its key and anchor a ledger shows every damage; all that remains is a torn last line.
        if parts[2] == key and (now.reserved_epsilon, now.terms) != (spent.reserved_epsilon, spent.terms):
            raise Broken(f"expected {spent.reserved_epsilon} spent, got {now.reserved_epsilon}")
        return now

    return Target(
        "ledger", [PART.join(form) for form in forms], run, [b'"mac":"', b'"event":"reserved"', b'"length": 2', PART]
    )


def open_journals() -> Target:
    """Journals of all kinds: readers skip what they cannot read, and a writer goes on behind it."""
    from common.events import (
        FileJournal,
        JournalView,
        RunEvent,
        SiteJoined,
        SiteRejected,
        read_approval_journal,
        read_daemon_journal,
        read_run_journal,
        read_site_journal,
        select_events,
    )
    from common.files import without_flushing
    from common.types import Unit

    path, written = _make_file("journal.jsonl"), _make_file("written.jsonl")
    journal = FileJournal(written)
    joined = SiteJoined(site="north", tasks={"size": 40}, unit=Unit.EXAMPLE, delta=1e-5, budget_epsilon=3.0)
    journal.write(joined)
    journal.write(SiteRejected(site="north", reason="late", stage="train", round=1))
    seeds = [written.read_bytes()]
    seeds += [path.read_bytes()[:20_000] for path in sorted((ROOT / "tests").rglob("*.jsonl"))[:4]]

    @without_flushing()
    def run(content: bytes) -> object:
        path.write_bytes(content)
        for read in (read_site_journal, read_approval_journal, read_daemon_journal):
            read(path)
        before = read_run_journal(path)
        view: JournalView[list[Any]] = JournalView(path, RunEvent, list, list.append)
        view.read()
        FileJournal(path).write(joined)
        after = read_run_journal(path)
        if len(after) < len(before) or select_events(after, SiteJoined)[-1].site != "north" or not view.read():
            raise Broken("expected the event that was written last to be read")
        return after

    return Target("journals", seeds, run, [b'"event": "round_ended"', b'"time": ', b"{}", b'"event": []'])


def open_witnesses() -> Target:
    """The coordinator's file of the witnesses of sites' ledgers, and a new witness beside what it holds."""
    from common.types import LedgerWitness
    from server.rounds.witnesses import Witnesses

    path, digest = _make_file("witnesses.json"), "0" * 64
    Witnesses(path).keep({"north": LedgerWitness(digest, 3, digest, digest)})
    seeds = [path.read_bytes(), b"{}"]
    newer = LedgerWitness(digest, 4, digest, digest)

    def read(path: Path) -> object:
        kept = Witnesses(path)
        kept.keep({"north": newer, "south": newer})
        return Witnesses(path).find("north")

    return Target("witnesses", seeds, _read_from(path, read), [b'"north"', b'"length"', b'"chain"'])


# --- weights and checkpoints -----------------------------------------------------------------------------------------


def open_weights() -> Target:
    """Weights files: the first byte says which of the three kinds of file it is."""
    import torch
    from safetensors.torch import save

    from common.backbones.parts.weights import read_state

    state = {"weight": torch.ones(2, 3), "count": torch.tensor(4)}
    buffer, old = io.BytesIO(), io.BytesIO()
    torch.save(state, buffer)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    wheel = _zip({"model.pt": buffer.getvalue()})
    paths = {b"s": _make_file("a.safetensors"), b"p": _make_file("a.pth"), b"w": _make_file("a.whl")}
    seeds = [b"s" + save(state), b"p" + buffer.getvalue(), b"p" + old.getvalue(), b"w" + wheel]

    def run(content: bytes) -> object:
        path = paths.get(content[:1], paths[b"p"])
        path.write_bytes(content[1:])
        return read_state(path)

    return Target(
        "weights", seeds, run, [b'"dtype":"F64"', b'"data_offsets":[0,24]', b"cos\nsystem\n", b"\x80\x02}", b"data.pkl"]
    )


def open_checkpoint() -> Target:
    """The coordinator's checkpoint after a round; what is read can be written again and is the same."""
    import numpy as np

    from server.rounds.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

    path = _make_file("checkpoint.safetensors")
    heads = {"size": {"weight": np.ones((2, 4), np.float32), "bias": np.zeros(2, np.float32)}}
    save_checkpoint(path, Checkpoint("run-1", 3, heads, {"size": {"first": heads["size"]}}, {"size": 3}))
    seeds = [path.read_bytes()]

    def read(path: Path) -> object:
        found = load_checkpoint(path)
        save_checkpoint(path, found)
        again = load_checkpoint(path)
        if (found.run_id, found.rounds_done, found.updates) != (again.run_id, again.rounds_done, again.updates):
            raise Broken("expected the checkpoint that was written")
        return found

    return Target(
        "checkpoint", seeds, _read_from(path, read), [b"head/size/weight", b"state/", b'"updates"', b'"BF16"', b'"F16"']
    )


def open_means() -> Target:
    """The means of features that a run left; what is read can be written again and is the same."""
    import numpy as np

    from common.serving.means import FeatureMean, read_means, write_means
    from common.serving.similarity import compare_means

    path = _make_file("means.safetensors")
    write_means(path, [FeatureMean(name, "a" * 64, np.ones(4), 0.1, 40.0, "records") for name in ("east", "north")])
    seeds = [path.read_bytes()]

    def read(path: Path) -> object:
        found = read_means(path)
        write_means(path, found)
        if [each.name for each in read_means(path)] != [each.name for each in found]:
            raise Broken("expected the means that were written")
        return compare_means(found, None)

    return Target(
        "means", seeds, _read_from(path, read), [b'\\"deviation\\"', b'\\"units\\": 1e400', b'"BF16"', b"NaN"]
    )


TARGETS: Mapping[str, Callable[[], Target]] = {
    "messages": open_messages,
    "frames": open_frames,
    "run_file": open_run_file,
    "site_file": open_site_file,
    "federation_file": open_federation_file,
    "kit": open_kit,
    "bundle": open_bundle,
    "ledger": open_ledger,
    "journals": open_journals,
    "witnesses": open_witnesses,
    "weights": open_weights,
    "means": open_means,
    "checkpoint": open_checkpoint,
}
"""Name -> what opens the target."""
