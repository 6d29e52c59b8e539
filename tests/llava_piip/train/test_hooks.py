"""What training replaces of transformers' Trainer is there, and is called."""

from types import SimpleNamespace

import pytest
from transformers import Trainer

from llava_piip.train import trainer as module
from llava_piip.train.trainer import PIIPTrainer, check_trainer
from piip_core.errors import ConfigError


@pytest.mark.parametrize("name", module._REPLACED)
def test_the_trainer_has_what_is_replaced(name):
    assert callable(getattr(Trainer, name, None)), f"transformers' Trainer has no {name} any more"


def test_a_trainer_without_it_is_refused_by_name():
    names = [name for name in module._REPLACED if name != "_save_checkpoint"]
    with pytest.raises(ConfigError, match=r"its Trainer has no _save_checkpoint, .*expected 5"):
        check_trainer(SimpleNamespace(**dict.fromkeys(names, print)))


def spied(name, own, called):
    def method(self, *args, **kwargs):
        called.add(name)
        return own(self, *args, **kwargs)

    return method


def test_a_run_calls_each(files, tmp_path, monkeypatch):
    """A name that is there and not called would leave the Trainer's own behaviour in place, unnoticed."""
    called = set()
    for name in {*module._REPLACED} & {*vars(PIIPTrainer)}:
        monkeypatch.setattr(PIIPTrainer, name, spied(name, getattr(PIIPTrainer, name), called))
    arguments = ("--max_steps", "2", "--save_steps", "1", "--save_strategy", "steps")
    trainer, _ = files.trainer(tmp_path, *arguments)
    trainer.train()
    trainer, checkpoint = files.trainer(tmp_path, *arguments, "--max_steps", "3", "--resume", "true")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert {*module._REPLACED} & {*vars(PIIPTrainer)} == called
