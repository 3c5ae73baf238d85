"""Running a model outside its training: modes, and the tensors among inputs and outputs."""
