"""Control requests against an HTTP server that refuses to stop a run, as Flower does where the run has ended."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from common.flower import control_pb2
from common.types import RunFailed
from server.superlink.control import Control
from tests.server.deployment.federations import new_federation


@pytest.mark.parametrize("status", ["finished", "running"])
def test_a_run_that_has_ended_by_itself_is_not_an_error_to_stop(tmp_path: Path, status: str) -> None:
    listed = control_pb2.ListRunsResponse()
    run = listed.run_dict[7]
    run.run_id, run.status.status = 7, status
    run.override_config["run-folder"].string = "/runs/tiny-1"

    class Superlink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            refused = self.path.endswith("stop-run")
            content = b"Run is already finished." if refused else listed.SerializeToString()
            self.send_response(412 if refused else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Writes nothing."""

    federation = new_federation(tmp_path / "fed")
    with HTTPServer(("127.0.0.1", federation.config.control_port), Superlink) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Control(federation) as control:
            if status == "finished":
                control.stop_run(7)
            else:
                with pytest.raises(RunFailed, match="refused stop-run: status 412"):
                    control.stop_run(7)
        server.shutdown()
