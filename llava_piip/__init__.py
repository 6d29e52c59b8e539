"""Multimodal language models with a PIIP vision tower (see the README for what is there yet)."""
