"""A PIIP classifier, with the published mixup, cutmix and label smoothing of fine-tuning."""

from detectron2.config import LazyCall as L
from timm.data import Mixup

from piip.lazy import lazy_dataclass
from piip.modeling import ImageClassifier
from piip_core import zoo
from piip_core.zoo.entry import IMAGENET_MEAN, IMAGENET_STD

model = L(ImageClassifier)(
    # Every row of ../ImageNet replaces `config` by its own
    config=lazy_dataclass(zoo.classification("piip_tsb_368_192_128").training_config),
    pixel_mean=list(IMAGENET_MEAN),
    pixel_std=list(IMAGENET_STD),
    input_format="RGB",
    pretrained="${train.load_pretrained}",
    use_act_checkpoint=False,
    random_erasing=None,  # L(timm.data.random_erasing.RandomErasing)(probability=0.25, mode="pixel", device=...)
    mixup=L(Mixup)(
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing="${..label_smoothing}",
        num_classes="${data.num_classes}",
    ),
    label_smoothing=0.1,
    loss=None,  # cross entropy; from scratch the binary one (piip.recipes.classifier)
)
model.config.num_classes = "${data.num_classes}"
