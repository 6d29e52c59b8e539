"""What the documents of the top level say about the rest of the project."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table_rows(name: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in read(name).splitlines() if line[:1] == "|"
    ]


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d.]*", text))


def test_results_of_the_readme_are_those_of_the_tables():
    """Scores, FLOPs and parameters as in the generated tables, times as in the measurements."""
    tables = table_rows("projects/PIIP/README.md") + table_rows("llava_piip/README.md")
    measured = numbers(read("docs/performance.md")) | numbers(read("docs/chat_speed.md"))
    rows = [row for row in table_rows("README.md") if len(row) == 7][2:]
    assert len(rows) > 10
    for _, model, sizes, *cells, time in rows:
        shown = numbers(" ".join(cells))
        found = [
            numbers(" ".join(row)) for row in tables if [re.sub(r" \[\d\]", "", row[0]), *row[1:2]] == [model, sizes]
        ]
        assert any(shown <= row | (measured if "LLaVA" in model else set()) for row in found), (model, sizes)
        assert numbers(time.partition("[")[0]) <= measured, (model, sizes)


def test_version_is_the_same_everywhere():
    (version,) = re.findall(r'^version = "(.+)"', read("pyproject.toml"), re.MULTILINE)
    assert f'__version__ = "{version}"' in read("piip_core/__init__.py")
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == version
