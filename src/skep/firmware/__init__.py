"""What a PC's firmware leaves in memory for the guest."""
