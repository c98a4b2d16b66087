"""The control plane: what commands can ask, by HTTP under /api, with a page at /; the controller serves it."""
