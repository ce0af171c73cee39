"""Reading documents: jsonl, parquet and text, local or remote, in batches that can be resumed anywhere."""
