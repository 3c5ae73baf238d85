"""The application around the library: command line, training loop, reports, data sets,
benchmarks.
"""
