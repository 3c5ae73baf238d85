"""Files: atomic writes, locks and checksums; bounded reading of JSON and tensors."""
