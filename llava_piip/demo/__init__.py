"""A small PIIP-LLaVA, trained on the spot to talk about digits on photographs."""
