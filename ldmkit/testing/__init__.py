"""Test tools that are shipped: oracles, Hypothesis strategies. Nothing else that is shipped imports this."""
