"""A run as one page: samples token by token, curves, before and after. The page loads nothing and sends nothing."""
