"""The words that every room speaks: errors, seeds, scopes, records that travel, the base of all configuration."""
