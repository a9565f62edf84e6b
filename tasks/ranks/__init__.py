"""An update made by several processes, each with a part of the weights."""
