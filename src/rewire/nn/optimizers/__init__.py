"""How optimizer state follows the connections: restarts, ages, and optimizers inside optimizers."""
