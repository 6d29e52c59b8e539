"""Times the deformable-attention operators against the same computation by others."""
