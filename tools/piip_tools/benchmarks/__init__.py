"""Times parts of PIIP and whole models against baselines, in turns in one process."""
