"""The command line `headwater simulate`, also `python -m simulations`; each verb is a file of simulations/commands."""

from __future__ import annotations

from common.process.console import make_verbs_app, run_app

app = make_verbs_app(
    "simulations.commands", "Run federations on one machine.\n\nA new simulation uses: check, plan, run, resume."
)

if __name__ == "__main__":
    run_app(app)
