"""Golden cases of DINO notice the mistakes that are easiest to make."""

import pytest

pytest.importorskip("detectron2")

import torch

from checkers import Status
from piip.modeling.dino import criterion, denoising, geometry, transformer
from written_cases import GOLDENS, failed, run_path


@pytest.mark.parametrize(
    ("module", "constant", "value", "name", "expected"),
    [
        (geometry, "_EPS", 1e-5, "dino_decoder_dn", "output.ref.1"),
        (geometry, "_EPS", 1e-5, "dino_dn_queries", "output.dn_bbox_query"),
        (geometry, "_MAP_TEMPERATURE", 10_000, "dino_encoder_many_queries", "output.pos.0"),
        (geometry, "_BOX_TEMPERATURE", 20, "dino_decoder_dn", "output.query_pos.0"),
        (transformer, "_BASE_SIDE", 0.1, "dino_encoder_many_queries", "output.proposals_unact"),
    ],
)
def test_wrong_constants_fail(monkeypatch, module, constant, value, name, expected):
    monkeypatch.setattr(module, constant, value)
    assert expected in failed(run_path(GOLDENS / f"{name}.json"))


def test_boxes_that_stop_the_gradient_fail(monkeypatch):
    """Looking forward once: the boxes that a layer starts from are detached for its prediction, too."""
    forward = transformer.Decoder.forward

    def once(self, *args, **kwargs):
        hidden, references = forward(self, *args, **kwargs)
        return hidden, [reference.detach() for reference in references]

    monkeypatch.setattr(transformer.Decoder, "forward", once)
    wrong = failed(run_path(GOLDENS / "dino_dn_train_one_empty.json"))
    assert wrong and all(name.startswith("grad.") for name in wrong)


def test_content_from_the_memory_fails(monkeypatch):
    """Pure query selection, as in Deformable DETR, gives other predictions."""
    initial = transformer.DINOTransformer.initial_queries

    def pure(self, selection, queries=None):
        content, box_logits = initial(self, selection, queries)
        return content.roll(1, dims=1), box_logits

    monkeypatch.setattr(transformer.DINOTransformer, "initial_queries", pure)
    assert "output.boxes.0" in failed(run_path(GOLDENS / "dino_test_many_queries.json"))


def test_groups_that_see_each_other_fail(monkeypatch):
    def open_mask(self, num_queries):
        size = self.size + num_queries
        return torch.zeros(size, size, dtype=torch.bool)

    monkeypatch.setattr(denoising.DenoisingLayout, "attention_mask", open_mask)
    assert {"inter.attn_mask", "output.loss_cls"} <= set(failed(run_path(GOLDENS / "dino_dn_train_one_empty.json")))


def test_a_normaliser_of_all_queries_fails(monkeypatch):
    averaged = criterion._averaged
    monkeypatch.setattr(criterion, "_averaged", lambda counts, like: 2 * averaged(counts, like))
    assert "output.dn_loss_cls" in failed(run_path(GOLDENS / "dino_loss_with_dn.json"))


def test_a_whole_training_step_passes_otherwise():
    result = run_path(GOLDENS / "dino_dn_train_one_empty.json")
    assert result.status is Status.PASSED, str(result)
    assert sum(comparison.name.startswith("grad.") for comparison in result.comparisons) > 100
