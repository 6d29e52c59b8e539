"""Settings of the paper's ablations: what each changes about a published model, and the numbers printed for it.

The paper names image sizes, branches and interactions. What it leaves open (windows) is as in the published models,
or was found from the printed costs; `ZooEntry.note` then says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from ..config import MergingConfig, PIIPConfig
from .dense import ENTRIES
from .entry import MultimodalEntry, PublishedNumbers, ZooEntry
from .multimodal import SETTINGS
from .pyramids import baseline, deit_pyramid, hybrid_pyramid

TABLES = {
    "II": "Feature pyramid from maps of several depths (the row of the CNN and hybrid table with three ViTs)",
    "IX": "Branches that take part in merging",
    "XIII": "Interactions of PIIP-LLaVA, and what its first training stage trains",
    "XIV": "Image pyramid, parameter-inverted design and interactions",
    "XV": "Single branch at the resolution of the pyramid",
    "XVI": "Attention and number of interactions",
    "XVII": "Direction of the interactions",
}
"""The paper's tables of ablations by number, with their subject."""

_ENTRIES = {entry.name: entry for entry in ENTRIES}
_TSB, _SMALL_TSB, _SBL, _TSBL = (
    f"piip_{name}" for name in ("tsb_1568_1120_672", "tsb_1120_896_448", "sbl_1568_896_672", "tsbl_1792_1568_1120_448")
)


def _setting(
    table: str,
    like: str,
    name: str,
    title: str,
    config: PIIPConfig | None,
    *numbers: float | None,
    note: str = "",
) -> ZooEntry:
    """A setting trained like a published model, whose Detectron2 config its `config_file` is.

    Args:
        table: Number of its table.
        like: Name of that model.
        name: Name of the setting.
        title: What distinguishes it within the table.
        config: The backbone; None for that of the model.
        numbers: Printed: box AP, mask AP, millions of parameters and GFLOPs.
        note: What to know about them.
    """
    entry = _ENTRIES[like]
    own: dict[str, Any] = {"name": name, "table": table, "title": title, "config": config or entry.config, "note": note}
    return dataclasses.replace(
        entry, **own, backbone=like, published=PublishedNumbers(), paper=PublishedNumbers(*numbers)
    )


def _config(name: str) -> PIIPConfig:
    return _ENTRIES[name].config


def _interact(config: PIIPConfig, **changes: Any) -> PIIPConfig:
    return dataclasses.replace(config, interaction=dataclasses.replace(config.interaction, **changes))


def _separate(config: PIIPConfig) -> PIIPConfig:
    return _interact(config, num_interactions=0)


def _parameter_direct() -> PIIPConfig:
    """The largest model at the largest image; its windows are those of the single-branch ViT-B."""
    _, *others = deit_pyramid("TSB", (448, 672, 896), window_size=14).branches
    return PIIPConfig(branches=(*baseline("B", 896).branches, *others))


def _out_branches() -> Iterator[ZooEntry]:
    # Branch 1 is B
    for chosen, box_ap, mask_ap in (
        ("B", 43.1, 37.0),
        ("S", 44.7, 39.1),
        ("T", 45.6, 40.6),
        ("B+S", 45.4, 39.8),
        ("B+T", 46.3, 41.1),
        ("S+T", 46.2, 40.9),
        ("B+S+T", 46.6, 41.4),
    ):
        merging = MergingConfig(branches=tuple("BST".index(size) + 1 for size in chosen.split("+")))
        config = dataclasses.replace(_config(_TSB), merging=merging)
        name = f"out_{chosen.lower().replace('+', '_')}"
        yield _setting("IX", _TSB, name, f"out branch {chosen}", config, box_ap, mask_ap)


def _designs() -> tuple[ZooEntry, ...]:
    pyramid, vit_b, vit_l = (partial(_setting, "XIV", like) for like in (_TSB, "vit_b_1024", "vit_l_1024"))
    multi_scale = partial(_setting, "XIV", "internvit_6b_1024")  # the published single branch that is trained so
    bbb, bbb_wide = (deit_pyramid("BBB", sides, window_size=14) for sides in ((896, 448, 224), (896, 672, 224)))
    lll = deit_pyramid("LLL", (896, 448, 224), window_size=14)
    tsb, sbl = (deit_pyramid("TSB", (896,) * 3, window_size=14), deit_pyramid("SBL", (848,) * 3, window_size=28))
    windows = "windows of 14 for ViT-L too, found from the printed #FLOPs"
    direct = (
        "the windows of Branch 1 (every third block global, as in the single ViT-B) were found from the printed #FLOPs:"
        " windows of 14 everywhere cost 395G, of 28 441G"
    )
    return (
        vit_b("design_b_1024", "B 1024", None, 43.8, 39.9, 90, 463),
        multi_scale("design_b_multi_scale", "B, multi-scale training", _config("vit_b_1024"), 44.8, 41.0, 90, 463),
        pyramid(
            "design_bbb_896_448_224_separate",
            "BBB 896/448/224, no interactions",
            _separate(bbb),
            *(43.3, 37.9, 262, 369),
        ),
        pyramid(
            "design_bbb_896_672_224_separate",
            "BBB 896/672/224, no interactions",
            _separate(bbb_wide),
            *(43.8, 38.2, 263, 457),
        ),
        pyramid("design_bbb_896_448_224", "BBB 896/448/224", bbb, 44.5, 38.7, 341, 466),
        pyramid("design_tsb_896_896_896", "TSB 896/896/896", tsb, 44.6, 39.0, 148, 468),
        pyramid(
            "design_tsb_448_672_896",
            "TSB 448/672/896 (parameter-direct)",
            _parameter_direct(),
            *(42.6, 36.5, 147, 452),
            note=direct,
        ),
        pyramid("design_tsb_1568_1120_672", "TSB 1568/1120/672", None, 46.6, 41.4, 149, 453),
        vit_l("design_l_1024", "L 1024", None, 46.8, 42.5, 308, 1542),
        multi_scale("design_l_multi_scale", "L, multi-scale training", _config("vit_l_1024"), note="not in the paper"),
        pyramid(
            "design_lll_896_448_224_separate",
            "LLL 896/448/224, no interactions",
            _separate(lll),
            note="not in the paper",
        ),
        pyramid("design_lll_896_448_224", "LLL 896/448/224", lll, 46.9, 40.8, 1053, 1458, note=windows),
        pyramid("design_sbl_848_848_848", "SBL 848/848/848", sbl, 47.2, 41.1, 495, 1539),
        pyramid("design_sbl_1568_896_672", "SBL 1568/896/672", _config(_SBL), 49.4, 43.7, 497, 1464),
    )


def _resolutions() -> tuple[ZooEntry, ...]:
    vit_l, tsbl = (partial(_setting, "XV", like) for like in ("vit_l_1024", _TSBL))
    repeated = "#Param: the paper repeats the 308M of 1024; the position table of 1792 makes them 317M"
    return (
        vit_l("resolution_l_1024", "L 1024", None, 46.8, None, 308, 1542),
        vit_l("resolution_l_1792", "L 1792", baseline("L", 1792), 48.3, None, 308, 6458, note=repeated),
        tsbl("resolution_tsbl_1792_1568_1120_448", "TSBL 1792/1568/1120/448", None, 49.4, None, 512, 1535),
    )


def _interactions() -> Iterator[ZooEntry]:
    small = _config(_SMALL_TSB)
    setting = partial(_setting, "XVI", _SMALL_TSB)
    yield setting("interactions_0", "no interactions", _separate(small), 41.3, None, None, 176)
    # number of interactions: box AP and GFLOPs
    regular = {1: (41.1, 211), 2: (41.7, 245), 4: (41.6, 315), 6: (42.1, 384), 12: (42.0, 592)}
    deformable = {1: (41.9, 182), 2: (42.5, 187), 4: (43.0, 198), 6: (43.3, 210), 12: (43.9, 243)}
    for attention, printed in (("regular", regular), ("deformable", deformable)):
        for count, (box_ap, flops_g) in printed.items():
            config = _interact(small, num_interactions=count, attention=attention)
            title = f"{count} x {attention} attention"
            yield setting(f"interactions_{count}_{attention}", title, config, box_ap, None, None, flops_g)


def _directions() -> Iterator[ZooEntry]:
    cycle = "#FLOPs: 230G is printed for both cycles; counted, this one costs 229.0G and the other 229.6G"
    for units, title, numbers, note in (
        ("alternating", "one direction, alternating", (43.5, 38.7, None, 210), ""),
        ("cycle_down", "cycle 3 -> 2 -> 1 -> 3", (43.2, 38.3, None, 230), cycle),
        ("cycle_up", "cycle 1 -> 2 -> 3 -> 1", (43.6, 38.6, None, 230), ""),
        ("adjacent", "both directions, neighbours (default)", (43.9, 38.6, None, 243), ""),
        ("bidirectional_cycle", "both directions, all pairs", (44.0, 38.7, None, 283), ""),
    ):
        config = _interact(_config(_SMALL_TSB), units=units)
        yield _setting("XVII", _SMALL_TSB, f"direction_{units}", title, config, *numbers, note=note)


def _regular_fpn() -> ZooEntry:
    return _setting(
        "II",
        "piip_vt_vs_cb_1024_672_448",
        "regular_fpn_tsb_1024_672_448",
        "TSB 1024/672/448, intermediate merging",
        hybrid_pyramid("VVV"),
        *(44.3, 39.9, None, 225),
        note="trained like the hybrids of its table",
    )


ABLATIONS = {
    setting.name: setting
    for setting in (
        _regular_fpn(),
        *_out_branches(),
        *_designs(),
        *_resolutions(),
        *_interactions(),
        *_directions(),
    )
}
"""All settings by name, in the order of the tables. `table` is a key of `TABLES`, `paper` has its printed numbers."""

CHAT_ABLATIONS: dict[str, MultimodalEntry] = {setting.name: setting for setting in SETTINGS}
"""Settings of Table XIII by name, for `llava_piip`."""

# ---- Figures ----

# Image sizes of Table I
_SIZES = {
    "TSB": ("1120_896_448", "1568_896_448", "1568_1120_672"),
    "SBL": ("1120_672_448", "1344_896_448", "1568_896_672"),
    "TSBL": ("1344_896_672_448", "1568_1120_672_448", "1792_1568_1120_448"),
}
_CURVES = {
    f"PIIP-{models}": tuple(_ENTRIES[f"piip_{models.lower()}_{sizes}"] for sizes in all_sizes)
    for models, all_sizes in _SIZES.items()
}


def _tbl(sizes: str) -> ZooEntry:
    config = deit_pyramid("TBL", tuple(map(int, sizes.split("_"))), window_size=28)
    return _setting("", _SBL, f"tbl_{sizes}", f"TBL {sizes.replace('_', '/')}", config)


def _curve(printed: str, **interaction: Any) -> dict[str, tuple[ZooEntry, ...]]:
    """A setting of a table, and the same at the larger sizes of PIIP-TSB."""
    setting = ABLATIONS[printed]
    larger = (
        _setting("", entry.name, f"{printed}_{sizes}", setting.title, _interact(entry.config, **interaction))
        for entry, sizes in zip(_CURVES["PIIP-TSB"][1:], _SIZES["TSB"][1:], strict=True)
    )
    return {setting.title: (setting, *larger)}


def _beside_tsb(*curves: dict[str, tuple[ZooEntry, ...]]) -> dict[str, tuple[ZooEntry, ...]]:
    return {label: points for curve in curves for label, points in curve.items()} | {"PIIP-TSB": _CURVES["PIIP-TSB"]}


FIGURES: dict[str, dict[str, dict[str, tuple[ZooEntry, ...]]]] = {
    "6": {"models and image sizes": {"ViTDet": (_ENTRIES["vit_b_1024"], _ENTRIES["vit_l_1024"]), **_CURVES}},
    "7": {
        "(a) models and image sizes": _beside_tsb({"PIIP-TBL": tuple(map(_tbl, _SIZES["TSB"]))}),
        "(b) interactions (PIIP-TSB has 12) and image sizes": _beside_tsb(
            _curve("interactions_0", num_interactions=0),
            *(_curve(f"interactions_{count}_deformable", num_interactions=count) for count in (1, 2, 4, 6)),
        ),
    },
    "8": {
        "directions (PIIP-TSB: both, neighbours) and image sizes": _beside_tsb(
            *(
                _curve(f"direction_{units}", units=units)
                for units in ("alternating", "cycle_down", "cycle_up", "bidirectional_cycle")
            )
        )
    },
}
"""Panels of the paper's figures of cost and box AP: their curves, and the points of each.

The figures are images, so a point has scores only where a table prints them. The sizes of the other points are not
printed: they are those of PIIP-TSB in Table I. Of Figure 7 (a) the text names PIIP-TSB and PIIP-TBL alone; here
PIIP-TBL has the same sizes, and the windows of PIIP-SBL.
"""

FIGURE_SETTINGS = {
    point.name: point
    for panels in FIGURES.values()
    for curves in panels.values()
    for points in curves.values()
    for point in points
    if not point.table
}
"""Points that stand in no table, by name."""
