"""What crosses a boundary: the config tree, Arrow schemas, artifact files, batches of tensors, errors."""
