"""resq_compiler: compile a Hugging Face decoder LLM to 4 bits (ResQ, W4A4KV4)."""
