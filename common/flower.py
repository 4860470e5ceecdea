"""Every name of Flower that Flower does not call public, in one place: nothing else here imports one.

Public are `flwr.app`, `flwr.clientapp`, `flwr.serverapp` and `flwr.simulation`; other modules import those directly.
What stands here may change in any release of flwr, so tests/common/test_flower.py checks each name's signature or
fields and the bytes of a message; `make test-flower` runs it on every version that pyproject.toml allows.

What costs nothing once `flwr.app` is loaded is imported at once. The SuperLink (0.5 s), the bundle's builder and the
version headers (0.15 s) are imported by the functions that need them, so that no site loads the coordinator's server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flwr.app import Message

# Returns a message without its records: the envelope that the Fleet API carries.
from flwr.app.message import remove_content_from_message as remove_content_from_message

# The number of heartbeat intervals for which a node counts as online after a heartbeat.
from flwr.common.constant import HEARTBEAT_PATIENCE as HEARTBEAT_PATIENCE

# The header with the time that a site's signature signs.
from flwr.common.constant import TIMESTAMP_HEADER as TIMESTAMP_HEADER

# The numbers by which Flower reports an error instead of a reply.
from flwr.common.constant import ErrorCode as ErrorCode

# Converts an app bundle to protobuf.
from flwr.common.serde import fab_to_proto as fab_to_proto

# Converts an envelope to a Message; raises ValueError for a kind that Flower does not know.
from flwr.common.serde import message_from_proto as message_from_proto

# Converts a Message without records to its envelope.
from flwr.common.serde import message_to_proto as message_to_proto

# Converts protobuf to records.
from flwr.common.serde import recorddict_from_proto as recorddict_from_proto

# Converts records to protobuf: how replies are stored and requests are told apart.
from flwr.common.serde import recorddict_to_proto as recorddict_to_proto

# Converts a run's flat settings to protobuf.
from flwr.common.serde import user_config_to_proto as user_config_to_proto

# Messages of the Control API, by which a coordinator's staff admits sites and submits runs.
from flwr.proto import control_pb2 as control_pb2

# Messages by which an app bundle is fetched.
from flwr.proto import fab_pb2 as fab_pb2

# Messages of the Fleet API, by which a site comes, pulls, pushes and leaves.
from flwr.proto import fleet_pb2 as fleet_pb2

# The message by which a site stays online.
from flwr.proto import heartbeat_pb2 as heartbeat_pb2

# Envelopes, object trees, and the messages by which single objects are pulled and pushed.
from flwr.proto import message_pb2 as message_pb2

# A site's number, which most requests carry.
from flwr.proto import node_pb2 as node_pb2

# Records as protobuf.
from flwr.proto import recorddict_pb2 as recorddict_pb2

# Messages by which a run's settings are fetched.
from flwr.proto import run_pb2 as run_pb2

# Messages of the Runtime API, by which a run's process works; used to show that strangers cannot.
from flwr.proto import runtime_pb2 as runtime_pb2

# The header with a site's public key.
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER as FLEET_HTTP_PUBLIC_KEY_HEADER

# The header with a site's signature of the time.
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER as FLEET_HTTP_SIGNATURE_HEADER

# The clock whose ISO format the SuperLink reads.
from flwr.supercore.date import now as now

# An app bundle with its hash.
from flwr.supercore.fab import Fab as Fab

# A record, some records or a message: what becomes bytes as one object.
from flwr.supercore.inflatable.inflatable_object import InflatableObject as InflatableObject

# Raised where an object's bytes are not what its name says.
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError as UnexpectedObjectContentError

# Returns the objects of which a message consists, each named by the SHA-256 of its bytes.
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects as get_all_nested_objects

# Reads the type, the children and the size that an object's bytes declare.
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content as get_object_head_values_from_object_content,
)

# Returns the tree of a message's object names.
from flwr.supercore.inflatable.inflatable_object import get_object_tree as get_object_tree

# Keeps Flower from encoding and hashing every object once more for each object above it.
from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute as no_object_id_recompute

# Makes a message from the bytes of its objects.
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents as inflate_object_from_contents

# Encodes a public key as the SuperLink keeps it.
from flwr.supercore.primitives.asymmetric import public_key_to_bytes as public_key_to_bytes

# Signs bytes as the SuperLink checks them.
from flwr.supercore.primitives.asymmetric import sign_message as sign_message

# The identity of a run, which every Grid has.
from flwr.supercore.run import Run as Run

# The task that a process works for; without it Flower builds no Message.
from flwr.supercore.task_identity import TaskIdentity as TaskIdentity

if TYPE_CHECKING:
    from fastapi import FastAPI


def set_task_identity(run_id: int = 1, node_id: int = 1) -> None:
    """Sets the run and the node that this process works for: Flower refuses to build a Message without them."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, 1


def set_metadata(message: Message, **values: object) -> None:
    """Sets fields of a message's metadata that Flower offers no setter for, such as `message_id`."""
    message.metadata.__dict__.update({f"_{name}": value for name, value in values.items()})


def copy_metadata(source: Message, target: Message) -> None:
    """Gives the target message all metadata of the source message."""
    target.metadata.__dict__.update(source.metadata.__dict__)


def make_version_headers() -> dict[str, str]:
    """Returns the headers by which a site tells the SuperLink which version of Flower it speaks."""
    from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

    return dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())


def build_bundle(files: Mapping[str, bytes | Path]) -> bytes:
    """Returns the app bundle of named contents. Raises ValueError where Flower does not accept them."""
    from flwr.cli.build import build_fab_from_files

    return build_fab_from_files({**files})[0]


def build_bundle_from_folder(folder: Path) -> bytes:
    """Returns the app bundle that `flwr run` would make of a folder."""
    from flwr.cli.build import build_fab_from_disk

    return build_fab_from_disk(folder)


class SuperLinkParts(NamedTuple):
    """The parts of which the SuperLink's app is made: `create_app(settings(...), lifespan)`."""

    create_app: Callable[[Any, Any], FastAPI]
    settings: Callable[..., Any]
    lifespan: type
    no_authentication: Callable[[], Any]


def import_superlink() -> SuperLinkParts:
    """Imports the SuperLink's server and returns the parts of its app."""
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    return SuperLinkParts(create_app, SuperLinkLifespanConfig, SuperLinkLifespan, NoOpControlAuthnPlugin)


class SimulationParts(NamedTuple):
    """The parts of Flower's simulation engine that turn what a ClientApp raises into a reply."""

    backend: type
    metrics: Callable[[], Any]
    work: Callable[..., None]


def import_simulation_engine() -> SimulationParts:
    """Imports Flower's simulation engine and returns its backend's base class, its metrics and its worker loop."""
    from flwr.server.superlink.fleet.vce.backend.backend import Backend
    from flwr.server.superlink.fleet.vce.metrics import VceMetrics
    from flwr.server.superlink.fleet.vce.vce_api import worker

    return SimulationParts(Backend, VceMetrics, worker)
