"""Studies: methods, densities and seeds compared, by any number of processes."""
