"""NoiseOut: merging correlated neurons."""
