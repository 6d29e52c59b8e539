"""Times whole backbones against each other, in turns in one process."""
