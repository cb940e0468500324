"""The command behind `make chaos`: scenarios by name, all of them without one. Exit code 1: a promise was broken."""

import argparse
import asyncio
import secrets
import tempfile
from pathlib import Path

from chaos.plans import Plan
from chaos.scenarios import SCENARIOS, named


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(
        prog="make chaos",
        description="Hurts desks of its own under load and judges what their clients were told.",
        epilog="scenarios, and their rounds:\n" + "\n".join(named()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", metavar="NAME", help="by default all of them")
    parser.add_argument("--seed", type=int, default=None, help="chance again as it was in another run")
    parser.add_argument("--rounds", type=int, default=None, help="for each scenario, instead of its own number")
    parser.add_argument("--results", type=Path, default=None, help="where journals and logs are kept")
    given = parser.parse_args()
    unknown = set(given.scenarios) - SCENARIOS.keys()
    if unknown:
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}")
    seed = secrets.randbelow(2**32) if given.seed is None else given.seed
    results = given.results or Path(tempfile.mkdtemp(prefix="chaos-"))
    results.mkdir(parents=True, exist_ok=True)
    results.chmod(0o755)  # the embedded PostgreSQL may be another account's
    broken = 0
    for name in given.scenarios or SCENARIOS:
        scenario, rounds = SCENARIOS[name]
        plan = Plan(results / name, seed, given.rounds or rounds)
        plan.directory.mkdir()
        plan.directory.chmod(0o755)
        print(f"{name}, seed {seed}, {plan.rounds} rounds, journal in {plan.directory}", flush=True)
        verdict = asyncio.run(scenario(plan))
        for what, value in verdict.seen.items():
            print(f"  {what:<32}{value}")
        for each in verdict.wrong[:20]:
            print(f"  BROKEN: {each}")
        print(f"  {len(verdict.wrong)} promises broken", flush=True)
        broken += len(verdict.wrong)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
