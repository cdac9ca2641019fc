"""Jobs on many machines: chunks of account names in Redis, parts in a directory or in object storage."""
