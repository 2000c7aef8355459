"""Changes to a dense model that leave its outputs as they are, fused into its weights: a rotation, and scales."""
