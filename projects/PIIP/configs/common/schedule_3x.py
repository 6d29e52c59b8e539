"""The published 3x schedule: three times the 1x schedule, with drops after epochs 27 and 33 of 36."""

from piip.rows import set_schedule

from .schedule_1x import lr_multiplier, optimizer, train

set_schedule(train, lr_multiplier, epochs=36, lr_drops=(27, 33), batch_size=16)
