"""Detectron2's training options, plus those of our lazyconfig_train_net.py."""

import torch
from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train
train.device = "cuda" if torch.cuda.is_available() else "cpu"
train.seed = 0  # of order, augmentations and sampling: a resumed run equals an uninterrupted one. -1 draws one
train.amp.precision = "bfloat16"  # or "float16" (CUDA only, with loss scaling); used when train.amp.enabled
# Weights of the branches from their own files. Models refer to it: pretrained="${train.load_pretrained}"; our tools
# turn it off by themselves when a checkpoint of the whole model follows
train.load_pretrained = True
