"""The revisions, oldest first: NNNN_name.py."""
