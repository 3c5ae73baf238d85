"""What every method is made of: base class, attachment to model and optimizer, registry, groups."""
