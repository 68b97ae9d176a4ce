"""What every room builds on: errors, seeds, scopes, records that travel, the base of all configuration."""
