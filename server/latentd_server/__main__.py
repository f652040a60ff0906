"""Stand-in so that the environment installs; replaced by the server's entry point."""
