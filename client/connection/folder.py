"""A new site's folder: its keys, the kit's files, and a site file that explains every setting."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.config import MAIN
from client.connection.keys import read_key, write_key_pair
from client.connection.kit import Kit, check_authorities
from common.files import private_folder, write_atomic
from common.tasks import NamedCells, open_task
from common.types import BadInput
from common.yaml import FILL_IN, read_yaml

SITE_FILE = "site.yaml"

_TEMPLATE = """\
# The file of one site: what this hospital decides. Nothing in it is sent except what is marked public.
# Replace every {mark}, then: headwater site check site.yaml
# Relative paths are relative to this file. ${{NAME}} is taken from the environment.

name: {name}                      # public: short, lower case; the name under which the coordinator admits this site
registry: {registry} # the population one budget protects; re-exported or extended data stay in it. A site
                                  # file of the same patients, for whatever coordinator, must name the same registry
unit: {unit}                      # public: what the budget protects: `patient` or `example` (a single record)
budget:                           # public: what the registry may spend in total, for ever
  epsilon: {mark}                 # such as 8.0
  delta: 1.0e-5                   # at most 1 / (10 x the largest public_size below)
  # filter: renyi                 # how charges add up: `renyi` counts sampled releases for less than `gdp` does, and
                                  # full-batch ones for a little more. By default the first charge fixes which

allow:                            # nothing is allowed by omission; `any` must be written
  tasks: {tasks}
  backbones: any                  # or a list of digests: of all backbones that your tasks of a run stand on
  solvers: {solvers}
  non_private: false              # true lets runs without noise through; they count as an infinite loss
approval: required                # join after `headwater site approve`; `automatic`: whatever `allow` covers

sources:                          # where records are; kinds and their keys: docs/reference/kinds.md. Where they lie in
                                  # folders, or masks or boxes beside them, `headwater inspect DATA --site` writes this
                                  # part and the next
  records:
    kind: manifest                # a CSV or Parquet file that lists images, labels and patients
    path: {mark}                  # such as ./records.csv
    image: image                  # its column of image paths, relative to the file
    patient: patient       # its column of patient ids; leave the line out where there are none
    # split: split         # its column of `train` or `test`, where the data come with a split

tasks:                            # public: their names and sizes
{task_entries}
split: {{test_fraction: 0.2, salt: ""}}   # held-out patients, by a hash of their id: nobody moves when rows are added
on_bad_record: skip               # a record that cannot be used is left out and listed; `stop`: no run is approved
evaluation: local                 # held-out records are evaluated here only. Or in noised counts, from a share of the
                                  # budget: {{share: 0.1, evaluations: 20}}

coordinator:
  address: {address} # host:port; always TLS
  ca: ./ca.crt                    # certificate of the federation's authority, from the kit
  key: ./keys/{name}              # this site's private key; it never leaves. Send keys/{name}.pub
  # health_port: 9101             # loopback port of the gRPC health service, for systemd or Kubernetes
# coordinators: {{}}               # further ones, by name, under the same budget; this one is called `main`:
                                  # headwater site init DIR --kit KIT.zip --coordinator NAME adds one

# secure_sum:                     # runs with `trust: secure_sum`: the coordinator sees the sum over sites alone
#   identity: ./keys/identity     # made by `headwater site identity keys/identity`; it never leaves
#   roster: {{{name}: PUBLIC_KEY}}  # all sites, with the public keys that their own staff told you
#   min_sites: 4                  # nothing is unmasked with fewer
#   colluding: 1                  # so many of them may collude with the coordinator
# own_backbones:                  # opened from here instead of being received, where a run's backbone is one of these
#   - {{kind: torchvision, model: mobilenet_v2, weights: ./mobilenet_v2.safetensors}}
# reply_every_s: 1.0              # answers leave at whole numbers of such seconds; longer than any takes hides its time
# personal: fit                 # final heads adapted to this site, which never leave: none, prior, fit, tied or adapt
# aligners: [{{kind: mean_std}}]  # how `adapt` moves features towards those the heads were trained on; the first is
                                  # taken unless labels here veto it
# plugins: ./plugins              # folder of this site's own source kinds, one file each
# ledger_dir: ./ledgers           # where budgets are kept; by default one place for all site files of this user,
                                  # ~/.local/share/headwater/ledgers. In a container: on a volume that stays. Back it up
state_dir: ./state                # approvals, replies, features, received backbones: for the owner only. Back it up
# cache_dir: ./cache              # features elsewhere, such as on a larger disk
# cache_limit_gib: 64             # most GiB of one source's features: those of masks and boxes take 350 KB a picture
# backbone_limit_gib: 2          # most GiB of a backbone that a run names; else 8
# cache_bits: 8                   # features take half the disk and change a little
device: auto                      # `cpu`, `cuda`, or what is there
# precision: bfloat16             # features in less time, with an error that is measured and logged; else float32
"""

_TASK = """\
  {name}:                         # {about}
    source: records
    label: {column}                 # {meaning}
    # values: {{{values}}}         # your values, where they are not the task's own
    # multiply: {{{mark}: 30.4375}}  # a column whose numbers are in another unit than the task's: months for days, say
    missing: skip                 # an empty label: `skip` (no label for this task) or `refuse` (a bad record)
    unmapped: refuse              # a value that is no label, likewise
    public_size: {mark}           # public: declared number of units, a round number near the truth; weights use it,
                                  # never the true count
    # min_units: 50               # take part with at least so many usable ones to train on; default 1
    # mix: {{no: 0.7, yes: 0.3}}    # shares of the task's labels here, for `personal: adapt` where no record has one
"""

_COORDINATOR = """\
  {coordinator}:
    address: {address}
    ca: ./coordinators/{coordinator}/ca.crt
    key: ./keys/{name}
"""


def make_folder(folder: Path, kit: Kit | None, name: str | None) -> Path:
    """Writes a new site's folder and returns the public key's file, which the site sends.

    Args:
        folder: the folder to make; it may exist if it is empty.
        kit: the coordinator's startup kit, where there is one.
        name: the site's name; by default the kit's.

    Raises:
        BadInput: the folder is not empty, there is no name, or the name is not the kit's.
    """
    chosen = _choose_name(kit, name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(
            f"{folder}: expected a new or empty folder, got one with something in it; nothing was changed "
            "(`--new-key` replaces a site's key and nothing else)"
        )
    private_folder(folder)
    public = write_key_pair(private_folder(folder / "keys") / chosen, chosen)
    offers = {} if kit is None else kit.offers
    if kit is not None:
        write_atomic(folder / "ca.crt", kit.ca)
    for run, content in offers.items():
        write_atomic(private_folder(folder / "offers") / f"{run}.json", content)
    # Unique: two sites of one name on one machine, such as trials, are not taken for one population.
    registry = f"{chosen}-{secrets.token_hex(4)}"
    write_atomic(folder / SITE_FILE, _render_site_file(chosen, kit, registry).encode())
    return public


def renew_key(folder: Path) -> Path:
    """Makes a new key for a site that lost its own and returns the public key's file.

    Nothing else changes: what the site has spent stays in its ledger. An old key is kept beside the new one.

    Raises:
        BadInput: the folder is not a site's, or its present key works.
    """
    name = _choose_name(None, str(read_yaml(folder / SITE_FILE).get("name")))
    key = private_folder(folder / "keys") / name
    if _is_usable(key):
        raise BadInput(
            f"{key}: this key works, and with another one the federation would turn this site away until it is "
            "admitted again; nothing was changed. To replace it nevertheless, move the file elsewhere first"
        )
    for old in (key, key.with_name(f"{name}.pub")):
        if old.exists():
            old.rename(old.with_name(f"{old.name}.{int(old.stat().st_mtime)}.old"))
    return write_key_pair(key, name)


def _is_usable(key: Path) -> bool:
    try:
        read_key(key)
    except BadInput:
        return False
    return True


def take_kit(folder: Path, kit: Kit) -> None:
    """Adds a kit to a folder that `make_folder` made without one, because a coordinator needs the key first.

    Authority and offers are added. A site file that nobody has changed is written anew; in another one only a missing
    address is filled in.

    Raises:
        BadInput: the kit is another site's, or names an authority that is neither trusted nor vouched for by one that
            is.
    """
    key = folder / "keys" / kit.settings.site
    if not key.exists():
        raise BadInput(f"{folder}: expected a kit for the site whose key is in keys/, got one for {kit.settings.site}")
    ca = folder / "ca.crt"
    check_authorities(ca, kit)
    write_atomic(ca, kit.ca)
    for run, content in kit.offers.items():
        write_atomic(private_folder(folder / "offers") / f"{run}.json", content)
    site_file = folder / SITE_FILE
    text = site_file.read_text(encoding="utf-8")
    registry = "".join(re.findall(r"^registry: (\S+)", text, re.MULTILINE)[:1])
    untouched = text == _render_site_file(kit.settings.site, None, registry)
    waiting = f"  address: {FILL_IN} "
    filled = text.replace(waiting, f"  address: {kit.settings.address} ")
    write_atomic(site_file, (_render_site_file(kit.settings.site, kit, registry) if untouched else filled).encode())


def add_coordinator(folder: Path, kit: Kit, coordinator: str) -> None:
    """Adds a kit of a further coordinator to a site's folder and names the coordinator in the site file.

    Of one that is there already, the authorities are brought up to date.

    Args:
        folder: the site's folder.
        kit: the further coordinator's kit.
        coordinator: name that the site gives to the coordinator.

    Raises:
        BadInput: the kit is for a site whose key is not here, or the site file names the coordinator already.
    """
    _check_name("--coordinator", coordinator)
    name, site_file = kit.settings.site, folder / SITE_FILE
    if not (folder / "keys" / name).exists():
        raise BadInput(f"{folder}: expected a kit for the site whose key is in keys/, got one for {name}")
    ca = folder / "coordinators" / coordinator / "ca.crt"
    if coordinator != MAIN and ca.exists() and ca.read_bytes() != kit.ca:
        check_authorities(ca, kit)  # It is known; only its authority is being exchanged.
        write_atomic(ca, kit.ca)
        return
    text = site_file.read_text(encoding="utf-8")
    if coordinator == MAIN or coordinator in (read_yaml(site_file).get("coordinators") or {}):
        raise BadInput(f"--coordinator: expected a name that {site_file} does not use yet, got {coordinator}")
    entry = _COORDINATOR.format(coordinator=coordinator, address=kit.settings.address, name=name)
    first, *others = re.split(r"^(?=coordinators:)", text, flags=re.MULTILINE)
    if not others:
        text = f"{first.rstrip()}\n\ncoordinators:                     # further ones, under the same budget\n{entry}"
    elif (line := re.match(r"coordinators: *(#.*)?\n", others[0])) is not None:
        text = f"{first}{line[0]}{entry}{others[0][line.end() :]}"
    else:
        raise BadInput(
            f"{site_file}: expected `coordinators:` in a line of its own, with a coordinator in each block below"
        )
    write_atomic(private_folder(folder / "coordinators" / coordinator) / "ca.crt", kit.ca)
    for run, content in kit.offers.items():
        write_atomic(private_folder(folder / "offers" / coordinator) / f"{run}.json", content)
    write_atomic(site_file, text.encode())


def _choose_name(kit: Kit | None, name: str | None) -> str:
    known = None if kit is None else kit.settings.site
    if name is not None and known is not None and name != known:
        raise BadInput(f"--name: the kit is for the site {known}, got {name}; ask for a kit of your own")
    chosen = name or known
    if chosen is None:
        raise BadInput("--name: expected the site's name, got none; the kit would give one")
    _check_name("--name", chosen)
    return chosen


def _check_name(option: str, name: str) -> None:
    if not name.isascii() or not name.replace("-", "a").replace("_", "a").isalnum() or name != name.lower():
        raise BadInput(f"{option}: expected lower-case letters, digits, - and _, got {name!r}")


def _render_site_file(name: str, kit: Kit | None, registry: str) -> str:
    runs = [] if kit is None else kit.runs()
    tasks = {task: spec for run in runs for task, spec in run.tasks.items()}
    units = {asked.unit.value for run in runs if (asked := run.requested_privacy) is not None}
    solvers = sorted({run.solver.kind for run in runs})
    entries = [_render_task(task, spec.model_dump()) for task, spec in tasks.items()] or [_render_task("finding", {})]
    return _TEMPLATE.format(
        mark=FILL_IN,
        name=name,
        registry=registry,
        unit=units.pop() if len(units) == 1 else "patient",
        tasks=json.dumps(sorted(tasks) or ["finding"]),
        solvers=json.dumps(solvers or ["dp_sgd", "head_sum"]),
        task_entries="".join(entries),
        address=FILL_IN if kit is None else kit.settings.address,
    )


def _render_task(name: str, spec: Mapping[str, Any]) -> str:
    # JSON quotes what a stranger wrote: no line break or colon of it can become a key of this file.
    kind, cells = json.dumps(str(spec.get("kind", "classification"))), _name_cells(spec)
    if cells:
        column, meaning = f"[{', '.join([FILL_IN] * len(cells))}]", f"your columns of {' and '.join(cells)}"
        values = f'{FILL_IN}: {{{FILL_IN}: "0", {FILL_IN}: "1"}}'
        return _TASK.format(name=name, mark=FILL_IN, about=kind, column=column, meaning=meaning, values=values)
    labels = [str(label) for label in spec.get("labels") or ["no", "yes"]]
    return _TASK.format(
        name=name,
        mark=FILL_IN,
        about=f"{kind}, labels {json.dumps(labels)}",
        column=FILL_IN,
        meaning="your column of this task's labels",
        values=", ".join(f"{FILL_IN}: {json.dumps(label)}" for label in labels),
    )


def _name_cells(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the meanings of a task's columns where they differ; nothing of a kind that is not installed here."""
    try:
        task = open_task({"kind": "", **{key: value for key, value in spec.items() if key != "backbone"}}, "task")
    except BadInput:
        return ()
    return task.cell_names if isinstance(task, NamedCells) else ()
