"""Running a model aside from its training: its modes, and the tensors it takes and gives."""
