"""Files: atomic writes, locks and checksums; reading of JSON and tensors within limits."""
