"""The experiments around the method: `python -m experiments.NAME`, or by path from another folder."""
