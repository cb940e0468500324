"""What a scenario is given, and what it gives back."""

from dataclasses import dataclass, field
from pathlib import Path

from chaos.journal import Journal


@dataclass
class Verdict:
    """What a scenario found: `wrong` are broken promises, `seen` is what it measured."""

    wrong: list[str] = field(default_factory=list)
    seen: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a scenario is given: a directory of its own, a seed, how many rounds."""

    directory: Path
    seed: int
    rounds: int

    @property
    def journal_path(self) -> Path:
        return self.directory / "journal.jsonl"

    def journal(self) -> Journal:
        return Journal(self.journal_path, self.seed)
