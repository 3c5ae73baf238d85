"""Dynamic sparse training: SET, RigL and the methods that drop and grow as they do."""
