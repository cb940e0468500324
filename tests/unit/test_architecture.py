"""docs/architecture.md shows the package as it is: its layers, and the places it names."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]


def test_tree_is_that_of_the_import_contract() -> None:
    [layers] = [contract["layers"] for contract in CONTRACTS if contract["type"] == "layers"]
    tree = PAGE.partition("## The tree")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\[.*?) \|", tree, re.MULTILINE)
    shown = [set(re.findall(r"\[([^]]+)\]", row.replace("\\", ""))) for row in rows]
    assert shown == [set(re.split(r" [|:] ", layer)) for layer in layers]


def test_every_name_that_is_said_to_be_in_a_file_is_there() -> None:
    placed = re.findall(r"\]\(\.\./(src/buydesk/\S+?\.(?:py|sql))\), `(\w+)`", PAGE)
    placed += [(file, name) for name, file in re.findall(r"`(\w+)` in \[[^]]*\]\(\.\./(src/buydesk/\S+?)\)", PAGE)]
    assert len(placed) > 8
    missing = [(file, name) for file, name in placed if name not in (ROOT / file).read_text(encoding="utf-8")]
    assert missing == []
