"""Parameters and multiply-accumulates of PIIP models, by two rules.

The *published count* is the rule behind the published #Param and #FLOPs; it leaves out the merging convolutions and the
feature pyramid. The *executed count* is what our modules hold and compute for one image. All counts are absolute
numbers of parameters and of multiply-accumulates (one multiply-accumulate is what the published tables call a FLOP).
"""

from .classification import ClassificationRow, analyze_classifiers
from .executed import ModuleCounts, executed_count
from .multimodal import MultimodalRow, analyze_multimodal
from .published import Count, PublishedCount, published_count
from .report import ModelReport, ModuleRow, ZooRow, analyze_backbone, analyze_model, analyze_zoo, padded_size
from .tables import (
    classification_table,
    model_table,
    multimodal_table,
    published_tables,
    replace_block,
    zoo_table,
)

__all__ = [
    "ClassificationRow",
    "Count",
    "ModelReport",
    "ModuleCounts",
    "ModuleRow",
    "MultimodalRow",
    "PublishedCount",
    "ZooRow",
    "analyze_backbone",
    "analyze_classifiers",
    "analyze_model",
    "analyze_multimodal",
    "analyze_zoo",
    "classification_table",
    "executed_count",
    "model_table",
    "multimodal_table",
    "padded_size",
    "published_count",
    "published_tables",
    "replace_block",
    "zoo_table",
]
