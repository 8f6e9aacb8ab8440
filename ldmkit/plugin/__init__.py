"""The plugin system: `spec` (what a plugin may say), `manager` (finding and isolating plugins), `registry` (parts by name)."""
