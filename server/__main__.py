"""The command line `headwater coordinator`, also `python -m server`; each verb is a file of server/commands."""

from __future__ import annotations

from common.process.console import make_verbs_app, run_app

app = make_verbs_app(
    "server.commands",
    "Run the coordinator of a federation.\n\nA new federation uses: init, admit, kit, start, status, stop.",
)

if __name__ == "__main__":
    run_app(app)
