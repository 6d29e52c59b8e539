"""Runs that launchers start: a JSON file with one after the other, interrupted where it says so."""

import json
import os
import signal
import sys
from pathlib import Path

from conftest import narrow

from llava_piip import PIIPLlavaConfig
from llava_piip.train import train, trainer
from piip_core import zoo
from piip_core.training_checkpoints import RunFolder
from piip_core.zoo import MultimodalEntry, MultimodalScores


class Interrupted(BaseException):
    pass


def publish_or_die(run, name, publish=RunFolder.publish):
    """Kills this process as soon as everything of a save is written, before it is published."""
    if name == spec["kill_at"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return publish(run, name)


def step_or_stop(self, *args, step=trainer.PIIPTrainer.training_step, **kwargs):
    if self.state.global_step == spec["stop_after"]:
        raise Interrupted
    return step(self, *args, **kwargs)


def multimodal(name, known=zoo.multimodal):
    """The zoo with narrow chat models, and with a row "tiny" that has the vision tower of a saved model."""
    if name != "tiny":
        return narrow(known(name))
    vision = PIIPLlavaConfig.from_pretrained(spec["tiny"]).vision_config.piip
    scores = MultimodalScores(*[0.0] * 9)
    return MultimodalEntry(
        name="tiny", title="tiny", vision=vision, language_model="none", embed_dim=32, scores=scores, flops_g=0.0
    )


zoo.multimodal = multimodal
RunFolder.publish, trainer.PIIPTrainer.training_step = publish_or_die, step_or_stop
local_rank = [argument for argument in sys.argv[1:-1] if argument.startswith("--local_rank")]
for spec in json.loads(Path(sys.argv[-1]).read_text()):
    try:
        status = train.main([*spec["arguments"], *local_rank])
    except Interrupted:
        continue
    if status:
        sys.exit(status)
