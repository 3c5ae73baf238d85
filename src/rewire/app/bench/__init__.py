"""Measures how fast and how small rewire is here, beside what else there is, and judges the
performance targets P1 to P12.
"""
