"""Programs that use freebits from end to end."""
