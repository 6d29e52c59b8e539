"""Detectron2's training options, plus those of our lazyconfig_train_net.py."""

import torch
from detectron2 import model_zoo

from piip.solver import iterations
from piip_core.deepspeed_start import BUCKET_SIZE

train = model_zoo.get_config("common/train.py").train
train.device = "cuda" if torch.cuda.is_available() else "cpu"
train.seed = 0  # of order, augmentations and sampling: a resumed run equals an uninterrupted one. -1 draws one
train.amp.precision = "bfloat16"  # or "float16" (CUDA only, with loss scaling); used when train.amp.enabled
train.amp.float32_heads = False  # autocast of the backbone alone; neck and heads compute in float32, as published
train.eval_precision = "float32"  # of evaluation: also "bfloat16", "float16", or "training" for that of train.amp
train.clip_norm = 0.0  # largest norm of the gradients of all parameters together; 0: not clipped
# Models that outgrow one GPU; see "Large models: DeepSpeed" in the README of this project
train.deepspeed = {
    "stage": 0,  # 1, 2, 3: ZeRO; 0: DistributedDataParallel, without DeepSpeed
    "offload_optimizer": False,  # optimizer states in the host's memory
    "offload_parameters": False,  # weights in the host's memory, stage 3 only
    "bucket_size": BUCKET_SIZE,  # elements that are sent at a time
    "config": None,  # JSON file with further settings of DeepSpeed, which go first
}
# Weights of the branches from their own files. Models refer to it: pretrained="${train.load_pretrained}"; our tools
# turn it off by themselves when a checkpoint of the whole model follows
train.load_pretrained = True
# A moving average of the weights: timm's ModelEmaV3, and its arguments. Saved, evaluated beside the model ("ema/...")
# and written as model_ema.safetensors at the end
train.ema = {
    "decay": None,  # for example 0.9999; null: none
    "use_warmup": False,  # a smaller decay at first, for short trainings
}
# The weights with the best metric of metrics.json ("bbox/AP"), kept as model_best.safetensors; after `patience`
# evaluations without a better one the training ends. null: neither
train.best = {"metric": None, "patience": None}
# Images that pass the model at a time in each process, or fewer if the memory of the GPU says so; null: its whole batch
train.micro_batch = None
train.freeze = None  # "branches", or "all-but-heads": what is not trained
train.lora = None  # rank of adapters (peft) on the linear layers of the branches, which themselves are not trained then
train.report = False  # report.html in the output folder, after evaluations
train.track = "tensorboard"  # where curves go beside metrics.json; also "wandb", "mlflow"
# Reading a saved configuration imports what stands here, and with it "${piip.iterations:...}"
train.resolvers = iterations
