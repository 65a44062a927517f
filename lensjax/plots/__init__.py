"""Pictures (extra `plots`)."""
