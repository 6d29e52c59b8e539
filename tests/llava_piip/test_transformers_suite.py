"""transformers' own common tests over our classes, where TRANSFORMERS_CHECKOUT names a checkout of its repository."""

import copy
import os
import sys
import unittest

import pytest
import torch
from PIL import Image
from transformers.models.auto import modeling_auto

from llava_piip import PIIPImageProcessor, PIIPLlavaForConditionalGeneration, PIIPLlavaProcessor
from llava_piip.configuration import PIIPLlavaConfig
from llava_piip.modeling import PIIPLlavaModel
from piip_core import ClassifierConfig, InteractionConfig
from piip_core.integrations.transformers import (
    PIIPBackbone,
    PIIPForImageClassification,
    PIIPModel,
    PIIPTransformersConfig,
)

if "TRANSFORMERS_CHECKOUT" not in os.environ:
    pytest.skip("TRANSFORMERS_CHECKOUT names no checkout of transformers' repository", allow_module_level=True)
sys.modules["tests"].__path__ = [*sys.modules["tests"].__path__, os.environ["TRANSFORMERS_CHECKOUT"] + "/tests"]
from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_backbone_common import BackboneTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, global_rng  # noqa: E402
from tests.test_processing_common import ProcessorTesterMixin  # noqa: E402

# Why our classes cannot pass a test, and which: docs/suites.md. They run, and have to fail
NOT_APPLICABLE = {
    "hidden states are maps of all branches, not tokens of one network": """
        VisionSuite.test_hidden_states_output
        VisionSuite.test_retain_grad_hidden_states_attentions
    """,
    "several networks have patch embeddings of their own": "VisionSuite.test_model_get_set_embeddings",
    "looks for layers of transformers; the pyramid recomputes its blocks": """
        VisionSuite.test_gradient_checkpointing_enable_disable
    """,
    "a pyramid has no stem, and returns all levels by default": "TestBackbone.test_config",
    "the kernels of the vision tower keep no attention maps": "TestLlava.test_get_image_features_attentions",
    "the class inherits generation through transformers' LLaVA": "TestLlava.test_inherits_generation_mixin",
    "images together with inputs_embeds are refused": """
        TestLlava.test_generate_from_inputs_embeds_0_greedy
        TestLlava.test_generate_from_inputs_embeds_1_beam_search
        TestLlava.test_generate_from_inputs_embeds_with_static_cache
        TestLlava.test_inputs_embeds
        TestLlava.test_inputs_embeds_matches_input_ids
    """,
    "settings that the image processor does not have, as do_rescale, are refused": """
        TestImageProcessor.test_call_numpy_4_channels
        TestImageProcessor.test_image_processor_from_dict_with_kwargs_has_attributes
        TestProcessor.test_args_overlap_kwargs
        TestProcessor.test_doubly_passed_kwargs_0_images
        TestProcessor.test_kwargs_overrides_default_subprocessor_kwargs_0_images
        TestProcessor.test_save_load_pretrained_additional_features
        TestProcessor.test_unstructured_kwargs_0_images
        TestProcessor.test_unstructured_kwargs_batched_0_images
    """,
    "text_kwargs, images_kwargs and common_kwargs are refused: settings are given flat": """
        TestProcessor.test_flat_kwarg_applied_when_modality_dict_lacks_it
        TestProcessor.test_overlapping_text_image_kwargs_handling_0_images
        TestProcessor.test_structured_kwargs_nested_from_dict_0_images
    """,
    "a call pads on the left to the longest prompt, whatever the tokenizer would do": """
        TestProcessor.test_call_arguments_default_none
        TestProcessor.test_call_arguments_not_in_processor_kwargs
        TestProcessor.test_subprocessor_defaults_preserved_by_kwargs_0_images
    """,
    "prompts are not cut: truncation is refused": """
        TestProcessor.test_apply_chat_template_image_0
        TestProcessor.test_apply_chat_template_image_1
    """,
    "content parts of messages are dicts": "TestProcessor.test_chat_template_message_objects",
    "a chat template without Jinja is refused": "TestProcessor.test_chat_template_save_loading",
    "a processor needs its image_seq_length": "TestProcessor.test_tokenizer_decode_defaults",
    "a rule for image processors inside transformers, or a process that does not import ours": """
        TestImageProcessor.test_new_models_require_torchvision_backend
        TestImageProcessor.test_pil_can_run_without_torchvision
    """,
}
# The same of tests that fail in subtests alone, of which no mark can be expected
IN_SUBTESTS = {
    "looks for layers of transformers to recompute": """
        TestVisionModels.test_training_gradient_checkpointing
        TestVisionModels.test_training_gradient_checkpointing_use_reentrant_false
        TestVisionModels.test_training_gradient_checkpointing_use_reentrant_true
    """,
    "transformers' OnnxExporter has no translation of our operator; piip_core.export writes ONNX without it": """
        VisionSuite.test_onnx_export_static VisionSuite.test_onnx_export_dynamic
        TestLlava.test_onnx_export_static TestLlava.test_onnx_export_dynamic
    """,
}
# By these names transformers' tests know whether a class has labels, and of what shape
modeling_auto.MODEL_MAPPING_NAMES |= {"piip": "PIIPModel", "piip_llava": "PIIPLlavaModel"}
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["piip"] = "PIIPBackbone"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["piip"] = "PIIPForImageClassification"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["piip_llava"] = "PIIPLlavaForConditionalGeneration"


@pytest.fixture(autouse=True)
def _applicable(request):
    names = {f"{base.__name__}.{request.node.name}" for base in request.cls.__mro__}
    for reason, tests in NOT_APPLICABLE.items():
        if names & set(tests.split()):
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    for reason, tests in IN_SUBTESTS.items():
        if names & set(tests.split()):
            pytest.skip(reason)


class Subject:
    """What transformers' tests ask of a model: a configuration and inputs."""

    is_training = True
    batch_size = 3
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32

    def __init__(self, config, **inputs):
        self.config, self.inputs = config, inputs

    def prepare_config_and_inputs_for_common(self):
        return copy.deepcopy(self.config), copy.deepcopy(self.inputs)


class VisionSuite(ModelTesterMixin):
    test_resize_embeddings = False
    has_attentions = False

    @pytest.fixture(autouse=True)
    def _make(self, tiny_config):
        pyramid = tiny_config((32, 16), (32, 64), InteractionConfig(num_interactions=2, num_heads=2), None)
        config = ClassifierConfig(pyramid=pyramid, num_classes=3, pooling="average")
        self.model_tester = Subject(
            PIIPTransformersConfig.from_classifier(config), pixel_values=torch.rand(3, 3, 64, 64)
        )


class TestVisionModels(VisionSuite, unittest.TestCase):
    all_model_classes = (PIIPModel, PIIPForImageClassification)

    def test_config(self):
        properties = dict(has_text_modality=False, common_properties=["hidden_size"])
        ConfigTester(self, config_class=PIIPTransformersConfig, **properties).run_common_tests()


class TestBackbone(VisionSuite, BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (PIIPBackbone,)
    config_class = PIIPTransformersConfig


class TestLlava(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (PIIPLlavaForConditionalGeneration, PIIPLlavaModel)
    _is_composite = True
    additional_model_inputs = ("pixel_values",)

    @pytest.fixture(autouse=True)
    def _make(self, make_llava):
        # With a row among the embeddings, which we do not need, but these tests look it up
        config = PIIPLlavaConfig.from_dict(make_llava()[0].config.to_dict() | {"image_token_index": 880})
        global_rng.seed(3)  # whose random text holds no placeholder
        length = config.image_seq_length
        ids = torch.randint(5, 800, (7, 7 + length))
        ids[:, :length] = config.image_token_id
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.rand(7, 3, 64, 64))
        self.model_tester = Subject(config, **inputs)
        self.model_tester.batch_size, self.model_tester.seq_length = ids.shape
        self.model_tester.base_model_class = PIIPLlavaModel

    def test_config(self):
        ConfigTester(self, config_class=PIIPLlavaConfig, has_text_modality=False).run_common_tests()


class ImageTester(ImageProcessingTester):
    def __init__(self, parent):
        super().__init__(parent, size={"height": 64, "width": 64})

    def _get_image_processing_classes(self):
        return {"pil": PIIPImageProcessor}


class TestImageProcessor(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester


class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PIIPLlavaProcessor

    @classmethod
    def setUpClass(cls):
        """Made by the fixture."""

    @staticmethod
    def prepare_processor_dict():
        return {"image_seq_length": 4}

    @pytest.fixture(autouse=True)
    def _make(self, make_llava, tmp_path, monkeypatch):
        photo = str(tmp_path / "image.png")  # instead of images from the internet
        Image.new("RGB", (50, 40)).save(photo)
        monkeypatch.setattr("tests.test_processing_common.url_to_local_path", lambda address: photo)
        type(self).tmpdirname, type(self).full_tmpdirname = str(tmp_path), None
        processor = make_llava()[1]
        self._setup_test_attributes(processor)
        processor.save_pretrained(tmp_path)
