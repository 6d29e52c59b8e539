"""Time and memory of backbones against each other, side by side in one process.

What is compared (`Side`) comes from outside, so that networks of other packages take part; `piip_sides` gives this
package's own.
"""

from .breakdown import PARTS, REST, Breakdown, measure_parts
from .drawing import draw_measurements
from .measuring import PRECISIONS, Measurement, measure_inference, measure_training
from .plain import plain_formulation
from .report import breakdown_table, measurement_table
from .sides import FORMS, Side, piip_sides

__all__ = [
    "FORMS",
    "PARTS",
    "PRECISIONS",
    "REST",
    "Breakdown",
    "Measurement",
    "Side",
    "breakdown_table",
    "draw_measurements",
    "measure_inference",
    "measure_parts",
    "measure_training",
    "measurement_table",
    "piip_sides",
    "plain_formulation",
]
