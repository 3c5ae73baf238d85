"""Measures how fast and how small rewire is here, beside what else there is, and judges the bars P1
to P12.
"""
