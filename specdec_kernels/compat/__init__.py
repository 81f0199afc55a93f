"""The ops under other engines' signatures (vLLM, SGLang, FlashInfer), so that they drop into code that exists.

One module for each engine. None of them imports its engine: a shim takes and returns what the engine's own function
takes and returns, as tensors and numbers, and calls the public ops. No engine is covered yet.
"""
