"""Settings that vLLM derives from the architecture of a model."""

from __future__ import annotations

from vllm.config import ModelConfig, MultiModalConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from . import TOKENIZER_MODE


class PIIPLlavaDefaults(VerifyAndUpdateConfig):
    """Lets `vllm serve FOLDER` work without options."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Chooses tokenizer mode and cache; vLLM calls this before it makes tokenizer and renderer.

        Raises:
            ValueError: For another mode, which would make other ids than the model was trained with; for a model that
                takes images at their own aspect ratio, or adds to states within the language model.
        """
        if model_config.tokenizer_mode not in ("auto", TOKENIZER_MODE):
            raise ValueError(
                f"tokenizer_mode={model_config.tokenizer_mode!r}: PIIP-LLaVA needs {TOKENIZER_MODE!r}, which is chosen "
                "when --tokenizer-mode is left out"
            )
        config = model_config.hf_config
        if config.vision_config.max_pixels is not None or config.projector_deep:
            raise ValueError("PIIP-LLaVA in vLLM: expected a model without max_pixels and projector_deep")
        model_config.tokenizer_mode = TOKENIZER_MODE
        # Of two requests at once with the same image, vLLM 0.32 sends the pixels with the one that it processed first;
        # when the other one arrives first at the engine, it fails with status 500 ("P0/P1 cache drift"). Prefix
        # caching and the cache of visual tokens go by the image's hash and stay.
        multimodal = model_config.multimodal_config
        if multimodal.mm_processor_cache_gb == MultiModalConfig().mm_processor_cache_gb:  # not set by the user
            multimodal.mm_processor_cache_gb = 0
