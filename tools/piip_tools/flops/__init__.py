"""Parameters and multiply-accumulates of PIIP models, by two rules.

The *published count* is the rule behind the published #Param and #FLOPs; it leaves out the merging convolutions and the
feature pyramid. The *executed count* is what our modules hold and compute for one image. All counts are absolute
numbers of parameters and of multiply-accumulates (one multiply-accumulate is what the published tables call a FLOP).
"""

from .executed import ModelReport, analyze_backbone, analyze_model, executed_count, padded_size
from .published import Count, published_count
from .tables import (
    ablation_table,
    analyze_multimodal,
    analyze_zoo,
    classification_table,
    model_table,
    multimodal_table,
    published_tables,
)

__all__ = [
    "Count",
    "ModelReport",
    "ablation_table",
    "analyze_backbone",
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
]
