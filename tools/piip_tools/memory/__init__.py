"""How much memory a training takes on each GPU, without allocating it.

Activations come from a training step on tensors without data (`DryRun`), parameters, gradients, optimizer state and
communication from their number and the ZeRO stage (`model_states`).
"""
