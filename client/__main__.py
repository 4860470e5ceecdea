"""The command line `headwater site`, also `python -m client`; each verb is a file of client/commands."""

from __future__ import annotations

from common.process.console import make_verbs_app, run_app

app = make_verbs_app(
    "client.commands",
    "Join a coordinator as one site, approve runs, and watch the budget.\n\n"
    "A new site uses: init, check, start, approve.",
)

if __name__ == "__main__":
    run_app(app)
