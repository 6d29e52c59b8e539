import re
from pathlib import Path

import pytest

from piip_core import zoo
from piip_tools.flops.tables import analyze_multimodal, analyze_zoo


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("generate_tables")


@pytest.fixture(scope="module")
def rows():
    return list(analyze_zoo([zoo.get("vit_b_1024"), zoo.get("piip_tsb_1120_896_448")]))


@pytest.fixture
def readme(tmp_path, monkeypatch, tool, rows) -> Path:
    """A file with markers, and a zoo of two rows that is counted once."""
    monkeypatch.setattr(tool, "count", lambda name: {"zoo table": rows}[name])
    path = tmp_path / "README.md"
    path.write_text("# Title\n\n<!-- BEGIN zoo table -->\nstale words\n<!-- END zoo table -->\n\nText.\n")
    return path


def test_writes_then_finds_nothing_to_do(tool, readme, capsys):
    before = readme.read_text()
    assert tool.main([str(readme), "--check"]) == 1
    assert readme.read_text() == before
    assert "out of date" in capsys.readouterr().out
    assert tool.main([str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- BEGIN zoo table -->\n### DeiT") and text.endswith("\n\nText.\n")
    assert "stale words" not in text
    assert [path.name for path in readme.parent.iterdir()] == ["README.md"]
    assert tool.main([str(readme), "--check"]) == 0


def test_table_holds_published_and_counted_numbers(tool, readme):
    tool.main([str(readme)])
    header, _, vit, tsb = (line for line in readme.read_text().splitlines() if line.startswith("|"))
    cells = dict(zip((c.strip() for c in header.split("|")), (c.strip() for c in tsb.split("|")), strict=True))
    assert (cells["model"], cells["resolution"]) == ("PIIP-TSB", "1120/896/448")
    assert (cells["box AP"], cells["mask AP"]) == ("43.6 (43.9)", "38.7 (38.6)")
    assert (cells["#Param"], cells["#FLOPs"]) == ("146M", "243G")
    assert (cells["our #Param count"], cells["our #FLOPs count"]) == ("146.4M", "243.1G")
    assert cells["our params"] == "175.0M"
    assert "| ViT-B" in vit


def test_a_file_gets_the_blocks_it_has(tool, tmp_path, monkeypatch, rows):
    """And only those are counted."""
    counted = list(analyze_multimodal([zoo.multimodal("llava_1_5_7b")]))
    rows_of = {"multimodal table": counted}
    monkeypatch.setattr(tool, "count", lambda name: rows_of[name])  # and no other
    path, block = tmp_path / "README.md", "<!-- BEGIN {0} -->\nstale words\n<!-- END {0} -->\n"
    path.write_text(block.format("multimodal table"))
    assert tool.main([str(path)]) == 0
    assert "| LLaVA-1.5 |" in path.read_text() and "| ViT-B" not in path.read_text()
    rows_of["zoo table"] = rows
    path.write_text(block.format("zoo table") + "between\n" + block.format("multimodal table"))
    assert tool.main([str(path)]) == 0
    before, _, after = path.read_text().partition("between\n")
    assert "| ViT-B" in before and "| LLaVA-1.5 |" in after and "stale words" not in before + after
    assert tool.main([str(path), "--check"]) == 0


def test_readmes_have_their_blocks(tool):
    texts = {path.parent.name: path.read_text() for path in tool.READMES}
    blocks = {name: [block for block in tool.BLOCKS if f"BEGIN {block} -->" in text] for name, text in texts.items()}
    assert blocks == {"PIIP": ["zoo table", "classification table", "beyond table"], "llava_piip": ["multimodal table"]}


def test_config_links_exist_and_are_relative_to_the_file(tool, readme):
    tool.main([str(readme)])
    target = re.search(r"\[config\]\((.+?)\)", readme.read_text())[1]
    assert (readme.parent / target).resolve() == tool.CONFIGS / zoo.get("vit_b_1024").config_file
    entries = (*zoo.entries(), *zoo.classification_entries())
    assert all((tool.CONFIGS / entry.config_file).is_file() for entry in entries)


@pytest.mark.parametrize("text", ["none", "<!-- END zoo table -->\n<!-- BEGIN zoo table -->\n"])
def test_unusable_file_is_named_and_nothing_written(tool, readme, text):
    before, unmarked = readme.read_text(), readme.with_name("unmarked.md")
    unmarked.write_text(text)
    for other in (unmarked, readme.with_name("absent.md")):
        with pytest.raises(SystemExit, match=other.name):
            tool.main([str(readme), str(other)])
    assert readme.read_text() == before
