"""PIIP-SBL 384/192/128 as released, to evaluate its converted weights: heads read the first patch.

New trainings read the class token: ../piip_sbl_384_192_128_20ep.py
"""

from piip.lazy import lazy_dataclass
from piip_core import zoo

from ..piip_sbl_384_192_128_20ep import data, dataloader, lr_multiplier, model, optimizer, train

model.config = lazy_dataclass(zoo.classification("piip_sbl_384_192_128").config)
model.config.num_classes = "${data.num_classes}"
train.output_dir = "output/piip_sbl_384_192_128_published"
