"""The application around the library: command line, training, reports, data, benchmarks."""
