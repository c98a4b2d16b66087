"""The flywheel: curates the log, evaluates and trains small candidates, and controls their rollouts."""
