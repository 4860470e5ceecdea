"""The contract with Flower: every name that is not public has the signature or the fields that are used here.

It runs on each version of flwr that pyproject.toml allows: `make test-flower`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from packaging.requirements import Requirement

from common import flower

ROOT = Path(__file__).resolve().parents[2]
SIGNATURES = {
    flower.remove_content_from_message: ["message"],
    flower.fab_to_proto: ["fab"],
    flower.message_from_proto: ["message_proto"],
    flower.message_to_proto: ["message"],
    flower.recorddict_from_proto: ["recorddict_proto"],
    flower.recorddict_to_proto: ["recorddict"],
    flower.user_config_to_proto: ["user_config"],
    flower.now: [],
    flower.Fab: ["hash_str", "content", "verifications"],
    flower.get_all_nested_objects: ["obj"],
    flower.get_object_head_values_from_object_content: ["object_content"],
    flower.get_object_tree: ["obj"],
    flower.no_object_id_recompute: [],
    flower.inflate_object_from_contents: ["object_id", "object_contents"],
    flower.public_key_to_bytes: ["public_key"],
    flower.sign_message: ["private_key", "message"],
    flower.Run.create_empty: ["run_id"],
}
FIELDS = {
    flower.control_pb2.ListNodesResponse: {"nodes_info"},
    flower.control_pb2.RegisterNodeRequest: {"public_key", "name"},
    flower.control_pb2.RegisterNodeResponse: {"node_id"},
    flower.control_pb2.UnregisterNodeRequest: {"node_id"},
    flower.control_pb2.StartRunRequest: {"fab", "override_config"},
    flower.control_pb2.StartRunResponse: {"run_id"},
    flower.control_pb2.ListRunsResponse: {"run_dict"},
    flower.control_pb2.StopRunRequest: {"run_id"},
    flower.fab_pb2.GetFabRequest: {"node", "hash_str", "run_id"},
    flower.fab_pb2.GetFabResponse: {"fab"},
    flower.fleet_pb2.ActivateNodeRequest: {"public_key", "heartbeat_interval"},
    flower.fleet_pb2.ActivateNodeResponse: {"node_id"},
    flower.fleet_pb2.DeactivateNodeRequest: {"node_id"},
    flower.fleet_pb2.PullMessagesRequest: {"node"},
    flower.fleet_pb2.PullMessagesResponse: {"messages_list", "message_object_trees"},
    flower.fleet_pb2.PushMessagesRequest: {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"},
    flower.fleet_pb2.PushMessagesResponse: {"objects_to_push", "session_id"},
    flower.heartbeat_pb2.SendNodeHeartbeatRequest: {"node", "heartbeat_interval"},
    flower.heartbeat_pb2.SendNodeHeartbeatResponse: {"success"},
    flower.message_pb2.ConfirmMessageReceivedRequest: {"node", "run_id", "message_object_id"},
    flower.message_pb2.Message: {"metadata"},
    flower.message_pb2.Metadata: {
        *("run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "message_type"),
    },
    flower.message_pb2.ObjectTree: {"object_id", "children"},
    flower.message_pb2.PullObjectRequest: {"node", "run_id", "object_id"},
    flower.message_pb2.PullObjectResponse: {"object_found", "object_available", "object_content"},
    flower.message_pb2.PushObjectRequest: {"node", "run_id", "object_id", "object_content", "session_id"},
    flower.message_pb2.PushObjectResponse: {"stored"},
    flower.node_pb2.Node: {"node_id"},
    flower.node_pb2.NodeInfo: {
        *("node_id", "public_key", "status", "last_activated_at", "last_deactivated_at"),
        *("online_until", "heartbeat_interval"),
    },
    flower.run_pb2.GetRunRequest: {"node", "run_id"},
    flower.run_pb2.GetRunResponse: {"run"},
    flower.runtime_pb2.AcquireTaskRequest: set(),
}
# SHA-256 of the bytes below as flwr 1.41.0 and 1.42.0 make them: other bytes mean another answer to a stored request.
RECORDS = "316bb6473df1c521aa92cf984be1c5fd0ddd2b5e508042e301cfffa4885b7f0e"
ENVELOPE = "c399df0cb464a33b1f7a86004951e414dcdfef7c45526f4a5f4233846d109b65"
OBJECTS = [
    "1898f06bc27d8c7072daf39595f1b7aaf1c3a0f678a8f841d6b8c9d35a3bbed6",
    "3c3a11f0b5e3c6e22f8ebd6f3f5f5af68599355fb1e61231d9bca2b883be347c",
    "42e9a2f90c83962e77ff86e658cba22aa45ba6e035a79367d4763d61468d2c4a",
    "9f17f9bc1d559405731b34986df9519c21330ce6cf7ceaba882eca59344849a9",
]
SUPERLINK_SETTINGS = {
    *("control_address", "health_server_address", "host", "port", "insecure", "certificates", "superexec_auth_secret"),
    *("authn_plugin", "event_log_plugin", "fleet_event_log_plugin", "enable_event_log", "artifact_provider"),
    *("enable_supernode_auth", "fleet_api_type", "fleet_api_address", "simulation", "ssl_ca_certfile", "ssl_certfile"),
    *("ssl_keyfile", "database", "isolation", "runtime_dependency_install"),
}


def records() -> RecordDict:
    return RecordDict(
        {"public": ConfigRecord({"json": '{"round":1}'}), "heads": ConfigRecord({"data": bytes(range(9))})}
    )


@pytest.fixture
def message() -> Iterator[Message]:
    flower.set_task_identity(3, 5)
    message = Message(records(), dst_node_id=7, message_type="query", group_id="2", ttl=60.0)
    flower.set_metadata(message, message_type="query.join", created_at=0.0)
    flower.set_metadata(message, message_id=message.object_id)
    yield message
    flower.set_task_identity()


def test_this_version_of_flower_is_one_that_is_allowed() -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (allowed,) = (Requirement(line).specifier for line in lines if line.startswith("flwr"))
    assert version("flwr") in allowed


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_a_function_takes_the_arguments_it_is_given_here(function: type) -> None:
    parameters = inspect.signature(function).parameters
    needed = [name for name, one in parameters.items() if one.default is one.empty and one.kind is not one.KEYWORD_ONLY]
    assert needed == SIGNATURES[function]


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.DESCRIPTOR.full_name)
def test_a_protobuf_message_has_the_fields_used_here(kind: type[flower.message_pb2.Message]) -> None:
    assert set(kind.DESCRIPTOR.fields_by_name) >= FIELDS[kind]


def test_records_have_known_bytes_and_come_back() -> None:
    data = flower.recorddict_to_proto(records()).SerializeToString(deterministic=True)
    assert hashlib.sha256(data).hexdigest() == RECORDS
    assert flower.recorddict_from_proto(flower.recorddict_pb2.RecordDict.FromString(data)) == records()


def test_a_message_is_known_objects_and_comes_back(message: Message) -> None:
    objects = {name: part.deflate() for name, part in flower.get_all_nested_objects(message).items()}
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in objects.items())
    assert sorted(objects) == OBJECTS
    with flower.no_object_id_recompute():
        assert flower.get_object_tree(message).object_id == message.object_id
    head = flower.get_object_head_values_from_object_content(objects[message.object_id])
    assert head[:2] == ("Message", [message.content.object_id])
    copy = flower.inflate_object_from_contents(message.object_id, objects)
    assert isinstance(copy, Message) and copy.content == records()


def test_an_envelope_has_known_bytes_and_comes_back(message: Message) -> None:
    envelope = flower.message_to_proto(flower.remove_content_from_message(message))
    assert hashlib.sha256(envelope.SerializeToString(deterministic=True)).hexdigest() == ENVELOPE
    back = flower.message_from_proto(envelope).metadata
    assert (back.run_id, back.src_node_id, back.dst_node_id, back.group_id) == (3, 5, 7, "2")
    assert (back.message_type, back.message_id) == ("query.join", message.object_id)


def test_an_envelope_of_an_unknown_kind_is_a_value_error(message: Message) -> None:
    envelope = flower.message_to_proto(flower.remove_content_from_message(message))
    envelope.metadata.message_type = "nonsense"
    with pytest.raises(ValueError):
        flower.message_from_proto(envelope)


def test_a_message_takes_the_metadata_of_another(message: Message) -> None:
    other = Message(records(), dst_node_id=9, message_type="train")
    flower.copy_metadata(message, other)
    assert other.metadata.dst_node_id == 7 and other.metadata.message_id == message.metadata.message_id


def test_a_signature_and_its_headers_are_what_the_coordinator_checks() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    key.public_key().verify(flower.sign_message(key, b"now"), b"now", ec.ECDSA(hashes.SHA256()))
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert flower.public_key_to_bytes(key.public_key()) == pem
    assert flower.now().utcoffset() is not None
    headers = (flower.FLEET_HTTP_PUBLIC_KEY_HEADER, flower.FLEET_HTTP_SIGNATURE_HEADER, flower.TIMESTAMP_HEADER)
    assert headers == ("flwr-public-key", "flwr-signature", "flwr-timestamp")
    assert flower.make_version_headers() == {
        "flwr-package-name": "flwr",
        "flwr-package-version": version("flwr"),
        "flwr-component-name": "SuperNode",
    }


def test_the_numbers_of_errors_are_those_that_reports_explain() -> None:
    numbers = {name: value for name, value in vars(flower.ErrorCode).items() if name.isupper()}
    assert numbers == {
        "UNKNOWN": 0,
        "LOAD_CLIENT_APP_EXCEPTION": 1,
        "CLIENT_APP_RAISED_EXCEPTION": 2,
        "MESSAGE_UNAVAILABLE": 3,
        "REPLY_MESSAGE_UNAVAILABLE": 4,
        "NODE_UNAVAILABLE": 5,
        "MOD_FAILED_PRECONDITION": 6,
        "INVALID_FAB": 7,
        "CLIENT_APP_CRASHED": 8,
    }


def test_the_superlinks_settings_are_those_that_are_set_here() -> None:
    superlink = flower.import_superlink()
    assert set(inspect.signature(superlink.settings).parameters) == SUPERLINK_SETTINGS
    assert list(inspect.signature(superlink.create_app).parameters) == ["config", "superlink_lifespan_class"]
    superlink.no_authentication()


def test_the_simulation_engine_has_the_parts_that_tests_use() -> None:
    engine = flower.import_simulation_engine()
    taken = ["messageins_queue", "messageres_queue", "node_info_store", "backend", "f_stop", "metrics"]
    assert list(inspect.signature(engine.work).parameters) == taken
    assert engine.backend.__abstractmethods__ == {"build", "is_worker_idle", "process_message", "terminate"}
    engine.metrics()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own build
def test_equal_files_make_equal_bundles() -> None:
    from server.deployment.app_bundle import collect_bundle_files

    assert flower.build_bundle(collect_bundle_files()) == flower.build_bundle(collect_bundle_files())


def test_a_site_loads_nothing_of_the_superlink() -> None:
    script = (
        "import json, sys, client.connection.worker, client.connection.fleet; print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not {name for name in loaded if name.startswith(("flwr.superlink", "flwr.cli.", "fastapi", "sqlalchemy"))}
