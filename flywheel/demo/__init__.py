"""The demo's own parts: sample traffic, a stand-in for the production model, and a tiny base model."""
