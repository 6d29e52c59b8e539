"""Times PIIP-LLaVA against LLaVA-1.5 around the same language model, both in one process."""
