"""A model evaluated over data: rows, losses, processes. What curvature, optim and training share."""
