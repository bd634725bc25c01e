"""What puts a guest's first program into memory: one file a protocol."""
