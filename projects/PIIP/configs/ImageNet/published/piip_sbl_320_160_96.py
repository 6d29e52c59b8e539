"""PIIP-SBL 320/160/96 as released, to evaluate its converted weights: heads read the first patch.

New trainings read the class token: ../piip_sbl_320_160_96_20ep.py
"""

from piip.lazy import lazy_dataclass
from piip_core import zoo

from ..piip_sbl_320_160_96_20ep import data, dataloader, lr_multiplier, model, optimizer, train

model.config = lazy_dataclass(zoo.classification("piip_sbl_320_160_96").config)
model.config.num_classes = "${data.num_classes}"
train.output_dir = "output/piip_sbl_320_160_96_published"
