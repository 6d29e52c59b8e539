"""Settings that vLLM derives from the architecture of a model."""

from __future__ import annotations

from vllm.config import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from . import TOKENIZER_MODE

__all__ = ["PIIPLlavaDefaults"]


class PIIPLlavaDefaults(VerifyAndUpdateConfig):
    """Lets `vllm serve FOLDER` find our renderer without `--tokenizer-mode`."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Chooses the tokenizer mode; vLLM calls this before it makes tokenizer and renderer.

        Raises:
            ValueError: For another mode, which would make other ids than the model was trained with.
        """
        if model_config.tokenizer_mode not in ("auto", TOKENIZER_MODE):
            raise ValueError(
                f"tokenizer_mode={model_config.tokenizer_mode!r}: PIIP-LLaVA needs {TOKENIZER_MODE!r}, which is chosen "
                "when --tokenizer-mode is left out"
            )
        model_config.tokenizer_mode = TOKENIZER_MODE
