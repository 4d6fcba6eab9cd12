"""Training of one stage: loop, validation, checkpoints, hand-over to the next stage."""
