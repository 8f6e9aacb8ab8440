"""Testing tools that are shipped: oracles, Hypothesis strategies, conformance kits. Nothing else that is shipped imports this."""
