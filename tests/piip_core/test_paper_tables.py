"""Every row of the paper's tables: in the zoo with its printed numbers, or in a list of what is not reproduced.

`tests/data/paper_tables.tsv` has the rows in the order of the paper, each with whose it is: "ours" are the paper's own
models and the baselines that it ran, "others" are results of other methods, quoted for comparison. Numbers are as
printed, under the zoo's names; those of a row with two models have the model before a point.

Tables VII (pretraining) and VIII (classifiers from pretrained networks) are not in the text that the rows come from.
The zoo has their models from the public README, and of Table VIII's baselines what section IV-D says.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest

from piip_core import zoo
from piip_core.zoo.ablations import ABLATIONS, CHAT_ABLATIONS
from piip_tools.flops.published import published_count

ROOT = Path(__file__).parents[2]
PAPER = ROOT.parent / "shared" / "seeds" / "paper.txt"  # where it lies beside the checkout

NOT_REPRODUCED = {
    ("III", "PIIP-TSB, Mask R-CNN 1x"): "the table prints neither image sizes nor #FLOPs, and no public model fits",
}
ROWS = {
    "ours": {
        **{"I": 11, "II": 10, "III": 7, "IV": 4, "V": 4, "VI": 2, "IX": 7, "X(a)": 5, "X(b)": 2},
        **{"XI": 8, "XII": 7, "XIII": 5, "XIV": 12, "XV": 3, "XVI": 6, "XVII": 5},
    },
    "others": {"III": 17, "VI": 10, "XI": 3, "XII": 17},
}
# The zoo keeps AP over all thresholds and sizes
NOT_KEPT = {"box_ap50", "box_ap75", "mask_ap50", "mask_ap75", "ap_large", "ap_medium", "ap_small"}
_PRINTED = re.compile(r"(?=.*\d)[\d./]+[GM]?\*?")


@dataclasses.dataclass(frozen=True)
class Row:
    """A printed row: `numbers` are pairs of a name and the text, in the order of the columns."""

    table: str
    row: str
    whose: str
    numbers: tuple[tuple[str, str], ...]

    def models(self) -> list[dict[str, str]]:
        """The numbers of each model of the row by their names."""
        both = {name: text for name, text in self.numbers if "." not in name}
        parts: dict[str, dict[str, str]] = {}
        for name, text in self.numbers:
            part, point, name = name.rpartition(".")
            if point:
                parts.setdefault(part, dict(both))[name] = text
        return list(parts.values()) or [both]


def read_rows() -> list[Row]:
    with (ROOT / "tests/data/paper_tables.tsv").open(newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    pairs = [tuple(tuple(pair.split("=")) for pair in line.pop("numbers").split()) for line in lines]
    return [Row(**line, numbers=numbers) for line, numbers in zip(lines, pairs, strict=True)]


ALL_ROWS = read_rows()
OURS = [row for row in ALL_ROWS if row.whose == "ours" and row.table != "X(a)"]


def known(entry: zoo.ZooEntry | zoo.ClassificationEntry | zoo.MultimodalEntry) -> dict[str, object]:
    """What the zoo says that the paper prints for a model."""
    if isinstance(entry, zoo.MultimodalEntry):
        found = dataclasses.asdict(entry.scores) | {"flops_g": entry.flops_g, "data": entry.training_data}
        return found | {"resolution": entry.resolution, "interactions": entry.vision.num_interactions}
    config = getattr(entry.config, "pyramid", entry.config)
    found = {"resolution": entry.resolution, "interactions": config.num_interactions}
    found |= dataclasses.asdict(entry.published)
    if isinstance(entry, zoo.ZooEntry):
        found |= {name: value for name, value in dataclasses.asdict(entry.paper).items() if value is not None}
    return found


def entries(table: str) -> list[zoo.ZooEntry | zoo.ClassificationEntry | zoo.MultimodalEntry]:
    """Models that a row of the table may be: settings of its own, or published models."""
    settings = [setting for setting in (*ABLATIONS.values(), *CHAT_ABLATIONS.values()) if setting.table == table]
    if settings and table != "II":
        return settings
    return [*settings, *zoo.entries(), *zoo.classification_entries(), *zoo.multimodal_entries()]


def find(table: str, numbers: dict[str, str]) -> list[str]:
    """Names of the models that have all of the numbers that the zoo keeps."""
    wanted = {
        name: text if name in ("resolution", "data") else float(text.rstrip("GM*"))
        for name, text in numbers.items()
        if name not in NOT_KEPT
    }
    return [entry.name for entry in entries(table) if wanted.items() <= known(entry).items()]


def models_of(rows: list[Row]) -> list[object]:
    return [
        pytest.param(row.table, numbers, id=f"{row.table}-{row.row}-{numbers.get('resolution', '')}")
        for row in rows
        for numbers in row.models()
    ]


@pytest.mark.parametrize(
    ("table", "numbers"), models_of([row for row in OURS if (row.table, row.row) not in NOT_REPRODUCED])
)
def test_printed_model_is_in_the_zoo(table, numbers):
    assert find(table, numbers)


def test_what_is_not_reproduced_is_printed_and_not_in_the_zoo():
    missing = [row for row in OURS if (row.table, row.row) in NOT_REPRODUCED]
    assert {(row.table, row.row) for row in missing} == NOT_REPRODUCED.keys()
    assert not [row for row in missing for numbers in row.models() if find(row.table, numbers)]


def test_numbers_that_the_zoo_has_from_the_paper_are_printed_there():
    found = {name for row in OURS for numbers in row.models() for name in find(row.table, numbers)}
    settings = (*zoo.entries(), *ABLATIONS.values())
    assert {entry.name for entry in settings if entry.paper != zoo.PublishedNumbers()} <= found


def test_every_row_is_there():
    assert {whose: Counter(row.table for row in ALL_ROWS if row.whose == whose) for whose in ROWS} == ROWS
    if PAPER.is_file():
        assert printed_in_the_text() == [
            [text for _, text in row.numbers] for row in ALL_ROWS if row.table != "XVII"
        ] + printed_by_column("XVII")


def printed_in_the_text() -> list[list[str]]:
    """The numbers of every row of a table in the paper's text."""
    lines = [line for line in PAPER.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [found for row in cells if (found := [cell for cell in row if _PRINTED.fullmatch(cell)])]


def printed_by_column(table: str) -> list[list[str]]:
    """A table whose models are columns in the text."""
    columns = [[text for _, text in row.numbers] for row in ALL_ROWS if row.table == table]
    return list(map(list, zip(*columns, strict=True)))


def test_parts_of_piip_b_are_the_printed_ones():
    """Table X (a), printed cut off or rounded. The last linear of 1000 classes is not among its parts."""
    config = zoo.classification("piip_b_512_256_128").config
    count = published_count(config)
    linear = config.pyramid.branches[0].network.embed_dim * 1000 + 1000
    parts = [(part.params, part.macs) for part in (*count.branches, count.interactions)]
    parts.append((count.head.params - linear, count.head.macs))
    rows = [dict(row.numbers) for row in ALL_ROWS if row.table == "X(a)"]
    for row, (params, macs) in zip(rows, parts, strict=True):
        assert params / 1e6 == pytest.approx(float(row["params_m"].rstrip("M")), abs=0.1)
        assert macs / 1e9 == pytest.approx(float(row["flops_g"].rstrip("G")), abs=0.1)
    for row, branch in zip(rows, config.pyramid.branches, strict=False):
        network = branch.network
        sizes = (network.depth, network.embed_dim, network.num_heads, branch.image_size)
        assert sizes == tuple(int(row[name]) for name in ("layers", "dim", "heads", "resolution"))
    assert config.pyramid.num_interactions == int(rows[3]["layers"])
