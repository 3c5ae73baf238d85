"""`rewire bench`: measures speed and memory here and judges the performance targets."""
