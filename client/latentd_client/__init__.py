"""The latentd client library."""
