"""The experiments around the method: `python -m experiments.NAME`, from anywhere by their path."""
