"""PIIP-LLaVA in vLLM. The entry point `vllm.general_plugins` calls `register` in every process that vLLM starts.

Seen working with vLLM 0.32; what it builds on is there in 0.33, too, and a test goes through the names. Nothing else of
the project imports this package or vLLM.
"""

from __future__ import annotations

__all__ = ["register"]

ARCHITECTURE = "PIIPLlavaForConditionalGeneration"
TOKENIZER_MODE = "piip_llava"


def register() -> None:
    """Makes the model, its tokenizer mode and its configuration known to vLLM; calling it again changes nothing."""
    from vllm import ModelRegistry

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return

    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers import TokenizerRegistry

    import llava_piip  # noqa: F401  transformers' Auto classes, with which vLLM loads configuration and processor

    from .defaults import PIIPLlavaDefaults

    # As text: importing the class here would initialise CUDA before vLLM forks
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:PIIPLlavaForVLLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = PIIPLlavaDefaults
    TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{__name__}.renderer", "PIIPLlavaRenderer")
