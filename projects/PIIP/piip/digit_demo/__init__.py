"""A complete run on real images: handwritten digits on photographs, learnt by a small PIIP on the CPU."""
