"""A site's startup kit: the coordinator's address, the authority to trust, the offered runs. No secret, no code.

The archive is the same bytes for the same content, so that a hospital can compare digests by telephone.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import instead
from common.files import write_atomic
from common.offers import Offer, list_digests, make_offer
from common.run import RunConfig, resolve_backbone_paths
from common.types import BadInput
from common.yaml import load
from server.deployment.admitted_sites import check_name
from server.deployment.certificates import read_trusted, read_vouch
from server.deployment.federation import Federation
from server.deployment.preparation import prepare_run

_ABOUT = "kit.yaml"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_kits(federation: Federation, paths: Mapping[str, Path], run_files: Sequence[Path]) -> list[str]:
    """Writes the startup kits of sites that are admitted or about to be.

    Args:
        federation: the federation that the sites join.
        paths: name of each site -> the archive to write.
        run_files: run files to offer, of runs with different names.

    Returns:
        The names of the files in an archive.

    Raises:
        BadInput: a name is not valid, a run cannot be offered, or a kit cannot be written.
    """
    for site in paths:
        check_name(site)
    shared = {"ca.crt": _read_authority(federation), **_build_offers(federation, run_files)}
    for site, path in paths.items():
        try:
            write_atomic(path, _pack_files({_ABOUT: _describe_coordinator(federation, site), **shared}))
        except OSError as error:
            raise BadInput(f"{path}: expected a place that can be written{instead(error)}") from error
    return [_ABOUT, *shared]


def _describe_coordinator(federation: Federation, site: str) -> bytes:
    # JSON is YAML: the values need no quoting rules of their own.
    about = {"federation": federation.config.name, "site": site, "address": str(federation.config.address)}
    signature = read_vouch(federation.tls)
    if signature is not None:
        about["authority_vouch"] = signature
    lines = [f"{key}: {json.dumps(value)}" for key, value in about.items()]
    return ("\n".join(["# The coordinator to join; `headwater site init DIR --kit` reads it.", *lines]) + "\n").encode()


def _read_authority(federation: Federation) -> bytes:
    path = federation.tls / "ca.crt"
    try:
        return read_trusted(federation.tls)
    except OSError as error:
        raise BadInput(
            f"{path}: expected the federation's authority{instead(error)}; restore it, or `headwater coordinator renew "
            "--ca --at-once` makes a new one, for which every site needs a new kit"
        ) from error


def _build_offers(federation: Federation, run_files: Sequence[Path]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for run_file in run_files:
        run = load(RunConfig, run_file)
        name = f"offers/{run.name}.json"
        if name in files:
            raise BadInput(f"{run_file}: expected runs of different names, got {run.name} twice")
        backbones = prepare_run(federation, resolve_backbone_paths(run)).backbones
        files[name] = Offer(make_offer(run, backbones), list_digests(backbones)).to_bytes()
    return files


def _pack_files(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content)
    return buffer.getvalue()
