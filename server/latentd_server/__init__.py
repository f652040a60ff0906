"""The latentd server: loads bundles, batches unlike requests step by step, streams results."""
