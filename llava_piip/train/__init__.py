"""Training in two stages with transformers' Trainer, under the deepspeed launcher, torchrun or on one device."""
