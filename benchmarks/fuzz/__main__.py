"""The command `python -m benchmarks.fuzz`."""

from __future__ import annotations

import argparse
import os
import random
import resource
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import benchmarks.fuzz as fuzz
from benchmarks.fuzz import MAX_MIB, Tally, Target, fuzz_randomly, fuzz_with_coverage
from benchmarks.fuzz.targets import TARGETS


def _limit_memory() -> None:
    """Lets this process grow by `MAX_MIB` from here; more is a MemoryError, and so a fault."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (MAX_MIB << 20), most))


def main() -> None:
    """Fuzzes targets by name."""
    parser = argparse.ArgumentParser(description=fuzz.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"`all`, or some of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=None, help="seed of the mutations; by default a new one")
    parser.add_argument("--faults", type=Path, default=None, help="folder for the inputs of faults")
    parser.add_argument("--coverage", action="store_true", help="let atheris guide the mutations")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch warns of old pickles, once for each.
    names = list(TARGETS) if arguments.targets == ["all"] else arguments.targets
    if not names or not set(names) <= set(TARGETS):
        print("\n".join(TARGETS))
        raise SystemExit(0 if not names else 2)
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    folder = arguments.faults or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}; inputs of faults go to {folder}", flush=True)
    faults = 0
    for name in names:
        if arguments.coverage:
            faults += _fuzz_in_process(TARGETS[name], name, arguments.seconds, seed, folder)
            continue
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        target = TARGETS[name]()
        _limit_memory()
        tally = fuzz_randomly(target, arguments.seconds, seed, folder)
        faults += len(tally.faults)
        print(_describe(name, tally), flush=True)
    raise SystemExit(1 if faults else 0)


def _describe(name: str, tally: Tally) -> str:
    return f"{name}: {tally.executions:,} inputs, {tally.accepted:,} accepted, {len(tally.faults)} faults"


def _fuzz_in_process(open_target: Callable[[], Target], name: str, seconds: float, seed: int, folder: Path) -> int:
    child = os.fork()  # libFuzzer ends its process.
    if child == 0:
        fuzz_with_coverage(open_target, seconds, seed, folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = len(list(folder.glob(f"{name}-*")))
    print(f"{name}: libFuzzer ended with {os.waitstatus_to_exitcode(status)}; {found} faults", flush=True)
    return found + (status != 0)


if __name__ == "__main__":
    main()
